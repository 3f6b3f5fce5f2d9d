"""What sites use is in the history, whichever process dies. Nothing that happens to the history affects a tunnel."""

import contextlib
import os
import secrets
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.harness import (
    Certificate,
    RawOrigin,
    Tunnel,
    client_context,
    connect_tcp,
    connect_tls,
    echo_bytes,
    eventually,
    handshake_request,
    missing,
    read_response,
    receive_exactly,
    upgrade,
)
from tests.promises.firewalled import config_for
from tests.promises.versions import Versions, upgraded
from tests.redis_server import RedisServer
from tlstunnel.state.history.database import FILE_NAME
from tlstunnel.state.history.reader import HistoryReader
from tlstunnel.state.history.samples import NOTHING, Counts
from tlstunnel.state.history.store import MINUTES

SITE = "localhost"
DAY = 86_400


class Measured(NamedTuple):
    """A site's history: samples, the sum of the tunnels in them, the most in one of them, and what was counted."""

    samples: int
    tunnels: int
    peak: int
    counts: Counts

    def mean_since(self, before: "Measured") -> float:
        """The mean of the samples since `before`."""
        return (self.tunnels - before.tunnels) / (self.samples - before.samples)


@pytest.fixture(scope="module")
def origin() -> Iterator[RawOrigin]:
    with RawOrigin(echo_bytes) as origin:
        yield origin


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


def _tunnel(
    origin: RawOrigin,
    certificate: Certificate,
    folder: Path | None,
    *,
    processes: int = 1,
    url: str = "",
    environment: dict[str, str] | None = None,
    errors_expected: bool = False,
) -> Tunnel:
    top = f'processes = {processes}\nrelease.drain_over = "0s"\n'
    if folder is not None:
        top += f'state.dir = "{folder}"\n'
    if url:
        top += f'state.url = "{url}"\n'
    return Tunnel(
        None,
        certificate,
        config=config_for(origin.address, certificate, top=top),
        environment=environment,
        errors_expected=errors_expected,
    )


def _ledger(tunnel: Tunnel) -> dict[str, Any]:
    found = tunnel.status()["ledger"]
    return dict(found) if found is not None else {}


def _history(tunnel: Tunnel) -> dict[str, Any]:
    found = _ledger(tunnel).get("history")
    return dict(found) if found is not None else {}


def _wait_for_another_ledger(tunnel: Tunnel, before: int) -> None:
    """Wait until another ledger has opened the history, which the one before has closed."""
    eventually(lambda: _ledger(tunnel).get("process") not in {before, None} and _history(tunnel)["path"])


def _measure(tunnel: Tunnel, folder: Path) -> Measured:
    """Have the ledger replaced, which stores what it has sampled, and read it."""
    before = _ledger(tunnel)["process"]
    os.kill(before, signal.SIGTERM)
    _wait_for_another_ledger(tunnel, before)
    return _read(folder)


def _read(folder: Path) -> Measured:
    now = time.time()
    with HistoryReader(folder) as reader:
        usage = reader.read_totals(MINUTES, now - DAY, now + DAY).get(SITE)
    if usage is None or usage.level is None:
        return Measured(0, 0, 0, NOTHING)
    return Measured(usage.samples, round(usage.level.mean * usage.samples), usage.level.peak, usage.counts)


def _measure_until_sampled(tunnel: Tunnel, folder: Path, before: Measured, samples: int = 1) -> Measured:
    def measure() -> Measured | None:
        measured = _measure(tunnel, folder)
        return measured if measured.samples >= before.samples + samples else None

    found = eventually(measure, interval=0.7)
    assert found is not None
    return found


def _wait_for_handshakes(tunnel: Tunnel, folder: Path, handshakes: int, interval: float = 0.7) -> Measured:
    """Return the history when it has so many handshakes. It never has more."""

    def measure() -> Measured | None:
        measured = _measure(tunnel, folder)
        assert measured.counts.handshakes <= handshakes, "counted twice"
        return measured if measured.counts.handshakes == handshakes else None

    found = eventually(measure, interval=interval)
    assert found is not None
    return found


@contextlib.contextmanager
def _tunnels(tunnel: Tunnel, count: int) -> Iterator[list[ssl.SSLSocket]]:
    context = client_context(tunnel)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect_tls(tunnel, context=context)) for _ in range(count)]
        assert {upgrade(client).status for client in clients} == {101}
        yield clients


def test_ten_tunnels_are_ten_whatever_dies(origin: RawOrigin, certificate: Certificate, folder: Path) -> None:
    """A serving process and the ledger are killed."""
    with (
        _tunnel(origin, certificate, folder, processes=2, errors_expected=True) as tunnel,
        _tunnels(tunnel, 10),
    ):
        begun = _wait_for_handshakes(tunnel, folder, 10)
        measured = _measure_until_sampled(tunnel, folder, begun)
        assert measured.mean_since(begun) == measured.peak == 10
        assert measured.counts.handshakes == 10

        one = max(tunnel.status()["processes"], key=lambda process: int(process["tunnels"]))
        left = 10 - one["tunnels"]
        os.kill(one["process"], signal.SIGKILL)
        eventually(lambda: sum(process["tunnels"] or 0 for process in tunnel.status()["processes"]) == left)
        begun = _measure(tunnel, folder)
        measured = _measure_until_sampled(tunnel, folder, begun)
        assert measured.mean_since(begun) == left

        with _tunnels(tunnel, 3):
            ledger = _ledger(tunnel)["process"]
            os.kill(ledger, signal.SIGKILL)
            _wait_for_another_ledger(tunnel, ledger)
            begun = measured
            measured = _wait_for_handshakes(tunnel, folder, 13)
            assert measured.mean_since(begun) == pytest.approx(left + 3, abs=3)
    stopped = _read(folder)
    assert (stopped.counts.handshakes, stopped.peak) == (13, max(10, left + 3))
    assert stopped.counts.cpu > 0


@pytest.mark.soak
def test_the_history_goes_on_after_an_upgrade_and_a_start(
    origin: RawOrigin, certificate: Certificate, folder: Path, tmp_path: Path
) -> None:
    versions = Versions(tmp_path / "versions")
    with _tunnel(origin, certificate, folder, processes=2, environment=dict(versions.environment)) as tunnel:
        with _tunnels(tunnel, 13):
            versions.install("2.0.0")
            assert upgraded(tunnel) == "1.0.0 -> 2.0.0, generation 2"
            with _tunnels(tunnel, 4):
                begun = _wait_for_handshakes(tunnel, folder, 17)
                measured = _measure_until_sampled(tunnel, folder, begun)
                assert measured.mean_since(begun) == 13 + 4, "a generation that drains has tunnels too"
        with connect_tls(tunnel) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert read_response(client).status == 426
    stopped = _read(folder)
    counts = stopped.counts
    assert (counts.handshakes, counts.invalid, stopped.peak) == (17, 1, 17)
    assert counts.cpu > 0
    with _tunnel(origin, certificate, folder) as tunnel, _tunnels(tunnel, 1):
        pass
    measured = _read(folder)
    assert (measured.counts.handshakes, measured.counts.invalid, measured.peak) == (18, 1, stopped.peak)
    assert measured.counts.cpu > counts.cpu


def test_the_bytes_of_a_tunnel_appear_while_it_is_open(
    origin: RawOrigin, certificate: Certificate, folder: Path
) -> None:
    """Also if no connection begins or ends meanwhile. At its end they are not counted again."""
    data = secrets.token_bytes(100_000)
    with _tunnel(origin, certificate, folder) as tunnel, _tunnels(tunnel, 1) as (client,):
        eventually(lambda: _measure(tunnel, folder).peak == 1, interval=0.7)
        client.sendall(data)
        assert receive_exactly(client, len(data)) == data
        counts = eventually(lambda: _moved(_measure(tunnel, folder)), interval=1.0) or NOTHING
        assert (counts.bytes_up, counts.bytes_down) == (len(data), len(data))
    counts = _read(folder).counts
    assert (counts.handshakes, counts.bytes_up, counts.bytes_down) == (1, len(data), len(data))


def _moved(measured: Measured) -> Counts | None:
    return measured.counts if measured.counts.bytes_up else None


def test_what_happens_to_connections_is_counted_by_kind(certificate: Certificate, folder: Path) -> None:
    """Each connection once, for the site that it was for."""
    with contextlib.ExitStack() as running:
        origin = running.enter_context(RawOrigin(echo_bytes))
        tunnel = _tunnel(origin, certificate, folder)
        text = tunnel.file.read_text()
        limit = '[[sites.rate_limits]]\nname = "one"\nlimit = "1/year"\nwhen = \'path == "/limited"\'\n'
        rule = '[[sites.rules]]\nname = "no"\naction = "block"\nwhen = \'path == "/blocked"\'\n'
        tunnel.file.write_text(text + limit + rule)
        with tunnel:
            for path, status in (("/limited", 101), ("/limited", 429), ("/blocked", 403)):
                with connect_tls(tunnel) as client:
                    client.sendall(handshake_request(path))
                    assert read_response(client).status == status
            with connect_tls(tunnel):
                pass  # no request
            with connect_tcp(tunnel) as client:
                client.sendall(b"GET / HTTP/1.1\r\n\r\n")  # no TLS, so of no site
            running.close()
            with connect_tls(tunnel) as client:
                client.sendall(handshake_request("/"))
                assert read_response(client).status == 502
            tunnel.wait_records(5)
    assert _read(folder).counts._replace(cpu=0) == Counts(
        handshakes=1, short=1, limited=1, blocked=1, unfinished=1, origin=1
    )


# --- what is there and cannot be used -------------------------------------------------------------------------------


def test_a_foreign_file_is_left_alone_and_used_for_nothing(
    origin: RawOrigin, certificate: Certificate, folder: Path
) -> None:
    """Tunnels work, the log says it once, and the history begins as soon as the file is gone."""
    folder.mkdir()
    file = folder / FILE_NAME
    file.write_text("not ours")
    with _tunnel(origin, certificate, folder) as tunnel, _tunnels(tunnel, 2):
        assert "is not an SQLite database" in str(eventually(lambda: _history(tunnel).get("problem")))
        (record,) = tunnel.wait_records(1, "history not opened")
        assert record["level"] == "warning"
        assert "is not an SQLite database: move it away" in record["reason"]
        assert any(line.startswith("history: none: ") for line in tunnel.run_command("status"))
        assert file.read_text() == "not ours"
        file.unlink()
        eventually(lambda: _history(tunnel)["path"])
        assert len(tunnel.records("history not opened")) == 1
        eventually(lambda: _measure(tunnel, folder).peak == 2, interval=0.7)
        (line,) = (line for line in tunnel.run_command("status") if line.startswith("history: "))
        assert str(file) in line


def test_a_full_disk_loses_no_counts(origin: RawOrigin, certificate: Certificate, folder: Path) -> None:
    """Nor does it affect a tunnel, or the hand-over of the counts."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        missing("only root can mount a small file system")
    try:
        with _tunnel(origin, certificate, folder) as tunnel:
            eventually(lambda: _history(tunnel).get("path"))
            filler = folder / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            with _tunnels(tunnel, 3):
                before = _ledger(tunnel)["process"]
                eventually(lambda: tunnel.status()["processes"][0]["tunnels"] == 3)
                os.kill(before, signal.SIGTERM)
                eventually(lambda: _ledger(tunnel).get("process") not in {before, None})
                with _tunnels(tunnel, 1):
                    pass
                filler.unlink()
                _wait_for_handshakes(tunnel, folder, 4)
        assert _read(folder).counts.handshakes == 4
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.soak
def test_a_reload_begins_moves_and_ends_the_history(
    origin: RawOrigin, certificate: Certificate, folder: Path, tmp_path: Path
) -> None:
    """$STATE_DIRECTORY alone begins one too."""
    other = tmp_path / "other"
    with _tunnel(origin, certificate, None) as tunnel:
        text = tunnel.file.read_text()
        assert tunnel.status()["ledger"] is None
        tunnel.reload(text.replace("[[sites]]", f'state.dir = "{folder}"\n[[sites]]', 1))
        eventually(lambda: _history(tunnel).get("path") == str(folder / FILE_NAME))
        with _tunnels(tunnel, 2):
            eventually(lambda: _measure(tunnel, folder).peak == 2, interval=0.7)
            tunnel.reload(text.replace("[[sites]]", f'state.dir = "{other}"\n[[sites]]', 1))
            eventually(lambda: _history(tunnel).get("path") == str(other / FILE_NAME))
            eventually(lambda: _measure(tunnel, other).peak == 2, interval=0.7)
        tunnel.reload(text)
        eventually(lambda: tunnel.status()["ledger"] is None)
    assert _read(folder).counts.handshakes == 2
    with _tunnel(origin, certificate, None, environment={"STATE_DIRECTORY": str(tmp_path / "systemd")}) as tunnel:
        eventually(lambda: _history(tunnel).get("path") == str(tmp_path / "systemd" / FILE_NAME))


def test_two_tunnels_do_not_write_one_history(origin: RawOrigin, certificate: Certificate, folder: Path) -> None:
    """The second serves without one, until the first is gone."""
    with _tunnel(origin, certificate, folder) as first:
        eventually(lambda: _history(first).get("path"))
        with _tunnel(origin, certificate, folder) as second, _tunnels(second, 1):
            assert _history(second)["path"] == ""
            first.stop()
            eventually(lambda: _history(second)["path"])


# --- before resources run out -----------------------------------------------------------------------------------------


def test_the_operator_is_told_before_descriptors_run_out(origin: RawOrigin, certificate: Certificate) -> None:
    """With the site that grew, once, and in the status; also without a history."""
    config = config_for(origin.address, certificate)
    with Tunnel(None, certificate, config=config, descriptors=72) as tunnel:  # (72 - 32) / 2 connections
        with _tunnels(tunnel, 17):
            (record,) = tunnel.wait_records(1, "running short")
            assert (record["resource"], record["percent"], record["process"]) == ("descriptors", 85, tunnel.pid)
            assert (record["site"], record["tunnels"]) == (SITE, 17)
            (line,) = (line for line in tunnel.run_command("status") if line.startswith("running short: "))
            assert "localhost has 17 tunnels" in line
        tunnel.wait_records(1, "no longer short")
        assert len(tunnel.records("running short")) == 1
        assert tunnel.status()["shortages"] == []


# --- several machines -------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_each_machine_has_the_history_of_all(origin: RawOrigin, certificate: Certificate, tmp_path: Path) -> None:
    """Also of one that ends meanwhile: its tunnels are gone, and its counts stay."""
    here, there = tmp_path / "here", tmp_path / "there"
    with RedisServer() as server, contextlib.ExitStack() as running:
        one, two = (
            running.enter_context(_tunnel(origin, certificate, folder, url=server.url)) for folder in (here, there)
        )
        running.enter_context(_tunnels(one, 3))
        running.enter_context(_tunnels(two, 4))
        for tunnel, folder in ((one, here), (two, there)):
            assert _wait_for_handshakes(tunnel, folder, 7, interval=2.0).peak == 7
        two.stop()
        eventually(lambda: _mean_of(one, here, 3), interval=0.7)
        assert _read(here).counts.handshakes == 7
        assert one.records("machine away") == []


def _mean_of(tunnel: Tunnel, folder: Path, tunnels: int) -> bool:
    begun = _measure(tunnel, folder)
    return _measure_until_sampled(tunnel, folder, begun).mean_since(begun) == tunnels
