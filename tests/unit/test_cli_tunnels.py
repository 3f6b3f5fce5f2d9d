"""What `tlstunnel tunnels` prints; `tests/promises/test_tunnels_listed.py` runs it with real tunnels."""

import pytest

from tlstunnel.cli.tables import align, count, render_duration, render_size
from tlstunnel.cli.tunnels import LONGEST_CELL, render
from tlstunnel.commands.tunnels import TunnelsResult, TunnelStatus

TUNNEL = TunnelStatus(
    id="1f",
    process=7,
    site="chat.test",
    client="",
    origin="unix:/run/chat.sock",
    path="/" + "a" * 100,
    opened=0.0,
    seconds=7300.0,
    up=1500,
    down=0,
    rate=2.0,
    tags={"user": "42\x1b[2J"},
)


def test_a_tunnel_in_the_table() -> None:
    heading, line, count = render(TunnelsResult(now=0.0, total=2, tunnels=[TUNNEL], next="x"))
    assert heading.split()[:3] == ["id", "age", "site"]
    assert line.split()[:8] == ["1f", "2", "h", "1", "min", "chat.test", "unix", "unix:/run/chat.sock"]
    assert line.split()[8] == "/" + "a" * (LONGEST_CELL - 4) + "..."
    assert line.split()[9:] == ["1.5", "kB", "0", "B", "2", "B", "user=42\\x1b[2J"]
    assert count == "1 of 2 tunnels"


def test_no_tunnels() -> None:
    assert list(render(TunnelsResult(now=0.0, total=0))) == ["0 tunnels"]


def test_processes_that_do_not_respond_are_named() -> None:
    lines = list(render(TunnelsResult(now=0.0, total=1, tunnels=[TUNNEL], silent=[7, 8])))
    assert lines[2:] == ["1 tunnel", "without those of processes that do not respond: 7, 8"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (0.2, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (5400, "1 h 30 min"),
        (7259, "2 h"),
        (277_300, "3 d 5 h"),
    ],
)
def test_a_duration(seconds: float, text: str) -> None:
    assert render_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1536, "1.5 kB"), (999_700, "1000 kB"), (7e15, "7000 TB")]
)
def test_a_size(size: int, text: str) -> None:
    assert render_size(size) == text


def test_columns_are_below_each_other() -> None:
    assert align([["a", "b"], ["long", "c"]]) == ["a     b", "long  c"]
    assert align([["a", "b"], ["long", "c"]], right={0}) == ["   a  b", "long  c"]


@pytest.mark.parametrize(("number", "text"), [(0, "0 processes"), (1, "1 process"), (12_345, "12 345 processes")])
def test_a_count(number: int, text: str) -> None:
    assert count(number, "process", "processes") == text
    assert count(number, "tunnel").endswith("tunnel" if number == 1 else "tunnels")
