"""`tlstunnel usage` with a real tunnel: what is now, what was, what is done about it, and what is left after it."""

import contextlib
import csv
import io
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import (
    PROGRAM,
    Certificate,
    RawOrigin,
    Tunnel,
    client_context,
    connect_tls,
    echo_bytes,
    eventually,
    missing,
    upgrade,
)
from tests.promises.firewalled import config_for
from tlstunnel.state.history.database import FILE_NAME, HISTORY, open_for_writing
from tlstunnel.state.history.samples import Counts, Minute, SiteMinute
from tlstunnel.state.history.store import Keep, Store

SITE = "localhost"
GUIDELINE = 10
MINUTE, DAY = 60, 86_400


@pytest.fixture(scope="module")
def origin() -> Iterator[RawOrigin]:
    with RawOrigin(echo_bytes) as origin:
        yield origin


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A state folder with the history of yesterday, when 25 tunnels were open and 5 requests were refused."""
    yesterday = int(time.time() // DAY - 1) * DAY // MINUTE
    rows = (SiteMinute(SITE, 25, 25 * 60, Counts(30, blocked=5, bytes_up=1000)),)
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    with contextlib.closing(open_for_writing(folder / FILE_NAME, HISTORY)) as connection:
        Store(connection, Keep()).write([Minute(yesterday, 60, rows, {})])
    return folder


@contextlib.contextmanager
def running(origin: RawOrigin, certificate: Certificate, folder: Path) -> Iterator[Tunnel]:
    top = f'processes = 2\nrelease.drain_over = "0s"\nstate.dir = "{folder}"\n'
    site = f'plan = "free"\nguideline = {GUIDELINE}\ncontact = "mailto:owner@example.com"\n'
    config = config_for(origin.address, certificate, top=top, site=site)
    with Tunnel(None, certificate, config=config) as tunnel:
        eventually(lambda: site_of(tunnel)["standing"])
        yield tunnel


def site_of(tunnel: Tunnel) -> dict[str, Any]:
    """Return what `usage SITE --json` says about the site."""
    (site,) = json.loads("\n".join(tunnel.run_command("usage", SITE, "--json")))["sites"]
    return dict(site)


@contextlib.contextmanager
def connected(tunnel: Tunnel, count: int) -> Iterator[None]:
    context = client_context(tunnel)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect_tls(tunnel, context=context)) for _ in range(count)]
        assert {upgrade(client).status for client in clients} == {101}
        yield


def test_tunnels_over_the_guideline_are_a_spike_and_nothing_else(
    origin: RawOrigin, certificate: Certificate, folder: Path
) -> None:
    with running(origin, certificate, folder) as tunnel:
        with connected(tunnel, 2 * GUIDELINE):
            eventually(lambda: site_of(tunnel)["now"] == 2 * GUIDELINE)
            found = site_of(tunnel)
            assert (found["standing"], found["guideline"], found["plan"]) == ("spike", GUIDELINE, "free")
            assert found["peak"] == 25
            lines = tunnel.run_command("usage")
            assert lines[1].split()[:5] == [SITE, "Free", "10", "20", "25"]
            assert "up to 2" in lines[2]
        one = tunnel.run_command("usage", SITE)
        yesterday = time.strftime("%Y-%m-%d", time.gmtime(time.time() - DAY))
        (line,) = [line for line in one if line.startswith(yesterday)]
        assert line.split()[1:3] == ["25", "25"]
        assert "gap" in line


def test_what_is_asked_and_refused(origin: RawOrigin, certificate: Certificate, folder: Path) -> None:
    with running(origin, certificate, folder) as tunnel:
        words = ["throttle", SITE, "1000/second", "--for", "1h", "--why", "a test"]
        (refused,) = tunnel.run_command("usage", *words, status=1)
        assert "got no notice yet" in refused
        assert "--abuse" in refused
        tunnel.run_command("usage", *words, "--abuse")
        throttled = [line for line in tunnel.run_command("usage") if "throttled" in line]
        assert "above 1000/second get 429 until" in throttled[0]
        assert "against abuse, by " in throttled[0]
        assert site_of(tunnel)["throttles"][0]["why"] == "a test"
        (line,) = tunnel.run_command("usage", "release", SITE)
        assert line == f"{SITE} is not throttled any more"
        assert site_of(tunnel)["throttles"] == []
        (line,) = tunnel.run_command("usage", "mute", SITE, "--for", "30d")
        assert line.startswith(f"{SITE}: no notices until ")
        assert site_of(tunnel)["muted_until"] > time.time() + 29 * DAY
        (unknown,) = tunnel.run_command("usage", "mute", "locolhost", "--for", "30d", status=1)
        assert unknown == 'tlstunnel: there is no site "locolhost"; did you mean "localhost"?'
        (none,) = tunnel.run_command("usage", "ack", "notice-1", status=1)
        assert 'there is no notice "notice-1"' in none
        assert tunnel.run_command("usage", "notices") == ["no notices"]


def test_after_the_end_there_is_what_was_stored(origin: RawOrigin, certificate: Certificate, folder: Path) -> None:
    with running(origin, certificate, folder) as tunnel, connected(tunnel, 3):
        file = tunnel.file.read_text()
    config = folder.parent / "tlstunnel.toml"
    config.write_text(file)

    def use(*words: str) -> str:
        command = [*PROGRAM, "usage", *words, "--config", str(config), "--control", str(folder / "none")]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    lines = use().splitlines()
    assert lines[0].startswith("no tunnel responds: standings are ")
    assert lines[2].split()[:5] == [SITE, "Free", "10", "-", "25"]
    days = list(csv.DictReader(io.StringIO(use("--csv"))))
    assert [(day["site"], day["handshakes"]) for day in days] == [(SITE, "30"), (SITE, "3")]
    assert (days[0]["blocked"], days[0]["bytes_up"], days[0]["measured"]) == ("5", "1000", "60")


def test_a_plot_of_a_real_tunnel(origin: RawOrigin, certificate: Certificate, folder: Path, tmp_path: Path) -> None:
    with running(origin, certificate, folder) as tunnel:
        try:
            tunnel.run_command("usage", SITE, "--plot", str(tmp_path / "a.svg"))
        except AssertionError as error:
            if "needs matplotlib" in str(error):
                missing("matplotlib not found: ./scripts/install gets it")
            raise
    assert f">{SITE} (Free)<" in (tmp_path / "a.svg").read_text()
