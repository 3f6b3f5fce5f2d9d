"""A running tunnel lists the open tunnels of all its processes, as the clients know them."""

import asyncio
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import run_main
from tests.harness import Certificate, RawOrigin, Tunnel, echo_bytes, eventually
from tests.promises.firewalled import config_for
from tests.promises.listed import Client, ask, clients_of, list_all
from tests.promises.numbered import Traffic
from tests.promises.versions import Versions, upgraded
from tlstunnel.errors import ControlError

MANY = 2_000


@pytest.fixture(scope="module")
def origin() -> Iterator[RawOrigin]:
    with RawOrigin(echo_bytes) as origin:
        yield origin


def config(origin: RawOrigin, certificate: Certificate) -> str:
    return config_for(origin.address, certificate, top='processes = 2\nrelease.drain_over = "0s"')


@pytest.fixture(scope="module")
def tunnel(origin: RawOrigin, certificate: Certificate) -> Iterator[Tunnel]:
    with Tunnel(None, certificate, config=config(origin, certificate)) as tunnel:
        yield tunnel


@pytest.fixture(scope="module")
def clients(tunnel: Tunnel) -> Iterator[list[Client]]:
    with clients_of(tunnel, 12) as clients:
        for number, client in enumerate(clients):
            client.echo(100 * (number + 1))
        yield clients


def agree(tunnel: Tunnel, clients: list[Client]) -> None:
    """Compare what is listed with what the clients know."""
    found = {one["path"]: one for one in list_all(tunnel, limit=5)}
    assert found.keys() == {client.path for client in clients}
    for client in clients:
        one = found[client.path]
        assert (one["client"], one["up"], one["down"]) == (client.ip, client.up, client.down)
        assert (one["site"], one["sni"], one["draining"]) == ("localhost", "localhost", False)
        assert one["origin"]
        assert one["tls_version"] == "TLSv1.3"
        assert 0 <= one["seconds"] < 600
        assert abs(time.time() - one["seconds"] - one["opened"]) < 5
    assert len({one["id"] for one in found.values()}) == len(clients)


def test_a_list_agrees_with_the_clients(tunnel: Tunnel, clients: list[Client]) -> None:
    agree(tunnel, clients)
    assert {one["process"] for one in list_all(tunnel)} == set(tunnel.pids)


def test_the_oldest_are_first(tunnel: Tunnel, clients: list[Client]) -> None:
    assert [one["path"] for one in list_all(tunnel, limit=5)] == [client.path for client in clients]


def test_the_largest_are_first(tunnel: Tunnel, clients: list[Client]) -> None:
    largest = ask(tunnel, sort="up", limit=3)
    expected = sorted(clients, key=lambda client: client.up, reverse=True)[:3]
    assert [one["path"] for one in largest["tunnels"]] == [client.path for client in expected]
    assert (largest["total"], largest["silent"]) == (len(clients), [])


def test_the_busiest_is_first(tunnel: Tunnel, clients: list[Client]) -> None:
    """Since the look before."""
    ask(tunnel, sort="rate")
    began = time.monotonic()
    while time.monotonic() - began < 0.6:
        clients[3].echo(10_000)
    first, *others = ask(tunnel, sort="rate")["tunnels"]
    assert first["path"] == "/3"
    assert first["rate"] > 10_000
    assert [one["rate"] for one in others] == [0.0] * len(others)


def test_filters(tunnel: Tunnel, clients: list[Client]) -> None:
    assert [one["path"] for one in list_all(tunnel, client="127.0.0.4")] == ["/2"]
    assert len(list_all(tunnel, client="127.0.0.4/30")) == 4
    some = list_all(tunnel)[5]
    assert [one["path"] for one in list_all(tunnel, id=some["id"])] == [some["path"]]
    assert len(list_all(tunnel, site="localhost", origin=some["origin"])) == len(clients)
    for none in ({"site": "other"}, {"origin": "x:1"}, {"tag": "user"}, {"older": 86_400}, {"id": "0"}):
        assert list_all(tunnel, **none) == []


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"limit": 1001}, "limit"),
        ({"limit": -1}, "limit"),
        ({"older": -1}, "older"),
        ({"older": float("inf")}, "older must be a number of seconds"),
        ({"client": "nobody"}, '"nobody" is not a network'),
        ({"site": "a" * 2000}, "site is longer than 1024 characters"),
        ({"sort": "colour"}, "sort"),
        ({"after": "forged"}, "after: not the end of a list that is sorted by age; pass `next` of the list before"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_means_nothing_is_refused(tunnel: Tunnel, fields: dict[str, object], problem: str) -> None:
    with pytest.raises(ControlError, match=re.escape(problem)):
        ask(tunnel, **fields)


def test_the_command(tunnel: Tunnel, clients: list[Client]) -> None:
    control = ["--control", str(tunnel.control)]
    lines = run_main("tunnels", *control, "--sort", "client", "--limit", "2").output.splitlines()
    assert lines[0].split() == ["id", "age", "site", "client", "origin", "path", "up", "down", "per", "second", "tags"]
    assert re.fullmatch(r"[0-9a-f]{16}  \d+ \w+ +localhost +127.0.0.10 +127.0.0.1:\d+ +/8 .*", lines[1])
    assert lines[3] == f"2 of {len(clients)} tunnels"
    printed = json.loads(run_main("tunnels", *control, "--client", "127.0.0.13", "--json").stdout)
    assert [one["path"] for one in printed["tunnels"]] == ["/11"]
    assert run_main("tunnels", *control, "--limit", "0").output == f"0 of {len(clients)} tunnels\n"
    assert run_main("tunnels", *control, "--older", "1d").output == "0 tunnels\n"
    failed = run_main("tunnels", *control, "--client", "nobody", "--json")
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["error"].startswith('"nobody" is not a network')


def test_it_agrees_after_a_reload(tunnel: Tunnel, clients: list[Client]) -> None:
    """Also if the site has more names by then, each of which selects it."""
    before = tunnel.file.read_text()
    tunnel.reload(before.replace('["localhost"]', '["localhost", "also.test"]'))
    agree(tunnel, clients)
    assert len(list_all(tunnel, site="also.test")) == len(clients)
    tunnel.reload(before)


def test_it_agrees_after_a_hang_and_a_kill(origin: RawOrigin, certificate: Certificate) -> None:
    """While a process hangs, it is named, because its tunnels are missing."""
    with (
        Tunnel(None, certificate, config=config(origin, certificate), errors_expected=True) as tunnel,
        clients_of(tunnel, 12) as clients,
    ):
        victim = tunnel.pids[0]
        lost = {one["path"] for one in list_all(tunnel) if one["process"] == victim}
        assert lost
        left = [client for client in clients if client.path not in lost]
        os.kill(victim, signal.SIGSTOP)
        result = ask(tunnel)
        assert result["silent"] == [victim]
        assert {one["path"] for one in result["tunnels"]} == {client.path for client in left}
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: len(set(tunnel.pids) - {victim}) == 2)
        with clients_of(tunnel, 6, "new") as new:
            new[0].echo(10)
            eventually(lambda: ask(tunnel, limit=0)["silent"] == [])
            agree(tunnel, [*left, *new])


def test_it_agrees_after_an_upgrade(origin: RawOrigin, certificate: Certificate, tmp_path: Path) -> None:
    """Processes of both generations are asked."""
    versions = Versions(tmp_path / "versions")
    text = config(origin, certificate)
    with (
        Tunnel(None, certificate, config=text, environment=versions.environment) as tunnel,
        clients_of(tunnel, 6) as before,
    ):
        versions.install("2.0.0")
        upgraded(tunnel)
        with clients_of(tunnel, 6, "new") as after:
            after[0].echo(10)
            before[0].echo(20)
            agree(tunnel, [*before, *after])
            assert len(tunnel.pids) >= 3


@pytest.mark.soak
@pytest.mark.alone
@pytest.mark.timeout(1200)
def test_a_list_of_thousands_delays_no_message(certificate: Certificate) -> None:
    """While lists are made all the time, messages take a few milliseconds more at most: the processors are shared."""
    with Tunnel(None, certificate, measured=True) as tunnel:

        async def run() -> None:
            traffic = Traffic(tunnel)
            kept = await asyncio.gather(*(traffic.opened() for _ in range(MANY)))
            assert ask(tunnel, limit=0)["total"] == MANY
            measured: dict[bool, list[float]] = {False: [], True: []}
            for listing in (False, True) * 5:
                with listed_all_the_time(tunnel) if listing else contextlib.nullcontext():
                    for one in kept[:200]:
                        began = time.perf_counter()
                        await one.exchange()
                        measured[listing].append(time.perf_counter() - began)
            without, during = (statistics.quantiles(sorted(measured[one]), n=100) for one in (False, True))
            print(", ".join(f"p{n}: {without[n - 1] * 1e3:.2f} and {during[n - 1] * 1e3:.2f} ms" for n in (50, 95, 99)))
            assert during[49] < without[49] + 0.002
            assert during[94] < without[94] + 0.010
            await asyncio.gather(*(one.close() for one in kept))

        asyncio.run(run())


LIST = """
import sys
from pathlib import Path
from tlstunnel.processes.reach import send_command
while True:
    result = send_command(Path(sys.argv[1]), {"do": "tunnels", "sort": "rate"})
    print(len(result["tunnels"]), flush=True)
"""


@contextlib.contextmanager
def listed_all_the_time(tunnel: Tunnel) -> Iterator[None]:
    """List the busiest tunnels again and again, in a process of its own: a thread would delay this one's messages."""
    command = [sys.executable, "-c", LIST, str(tunnel.control)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "100\n"
        yield
        process.kill()
        process.stdout.read()
