"""An upgrade disconnects no client: the new release serves new connections, old processes keep their tunnels."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import (
    Certificate,
    Tunnel,
    WebsocketsOrigin,
    connect_tls,
    eventually,
    receive_exactly,
    upgrade,
)
from tests.promises.firewalled import config_for
from tests.promises.numbered import Traffic
from tests.promises.versions import Versions, upgraded
from tlstunnel.processes.messages import FORMAT
from tlstunnel.processes.previous import FORMAT as PREVIOUS

TUNNELS, UPGRADES = 300, 2


@pytest.fixture(scope="module")
def origin() -> Iterator[WebsocketsOrigin]:
    with WebsocketsOrigin() as origin:
        yield origin


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions(tmp_path / "versions")


@contextlib.contextmanager
def _started(
    origin: WebsocketsOrigin,
    certificate: Certificate,
    versions: Versions,
    release: str = "",
    *,
    errors_expected: bool = False,
    measured: bool = False,
) -> Iterator[Tunnel]:
    # On a busy machine an upgrade takes seconds.
    settings = '[timeouts]\ntls_handshake = "1m"\nrequest = "1m"\n' + (f"[release]\n{release}\n" if release else "")
    environment = versions.environment
    with Tunnel(
        origin.address,
        certificate,
        settings=settings,
        environment=environment,
        errors_expected=errors_expected,
        measured=measured,
    ) as tunnel:
        yield tunnel


def _echoes(tunnel: Tunnel) -> bool:
    """Return whether a new client reaches the origin."""
    with connect_tls(tunnel) as client:
        assert upgrade(client).status == 101
        client.sendall(b"\x82\x84\0\0\0\0ping")
        return receive_exactly(client, 6) == b"\x82\x04ping"


# --- the promise ------------------------------------------------------------------------------------------------------


def _through_upgrades(
    origin: WebsocketsOrigin, certificate: Certificate, versions: Versions, tunnels: int, upgrades: int
) -> None:
    names = ["2.0.0", "1.0.0"]

    with _started(origin, certificate, versions, 'drain_over = "1s"', measured=True) as tunnel:

        def change(number: int) -> None:
            versions.install(names[number % 2])
            assert upgraded(tunnel).endswith(f"-> {names[number % 2]}, generation {number + 2}")

        async def run() -> None:
            traffic = Traffic(tunnel, every=tunnels / 1500)
            await traffic.through(tunnels, upgrades, change)
            print(f"{traffic.come_and_gone} came and went, the slowest handshake took {traffic.slowest:.2f} s")
            counted = {one["generation"]: one["tunnels"] for one in tunnel.status()["processes"]}
            assert counted[1] == tunnels, counted
            await traffic.close()

        asyncio.run(run())
        # The old ones end with their last tunnel.
        eventually(lambda: len(tunnel.pids) == 1)
        assert [record for record in tunnel.records("connection") if record["status"] != 101] == []


def test_numbered_messages_through_upgrades(
    origin: WebsocketsOrigin, certificate: Certificate, versions: Versions
) -> None:
    _through_upgrades(origin, certificate, versions, TUNNELS, UPGRADES)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_numbered_messages_through_ten_upgrades(
    origin: WebsocketsOrigin, certificate: Certificate, versions: Versions
) -> None:
    _through_upgrades(origin, certificate, versions, 10 * TUNNELS, 10)


def test_the_same_process_and_sockets_by_signal(
    origin: WebsocketsOrigin, certificate: Certificate, versions: Versions
) -> None:
    with _started(origin, certificate, versions) as tunnel:
        port = tunnel.port
        versions.install("2.0.0")
        tunnel.send_signal(signal.SIGUSR2)
        done = tunnel.wait_record(lambda record: record["event"] == "upgraded")
        assert (done["before"], done["version"], done["generation"]) == ("1.0.0", "2.0.0", 2)
        status = tunnel.status()
        assert (status["process"], status["version"]) == (tunnel.parent, "2.0.0")
        assert status["listening"] == [f"127.0.0.1:{port}"]
        assert _echoes(tunnel)


def test_a_connection_that_waits_to_be_accepted_is_served(
    origin: WebsocketsOrigin, certificate: Certificate, versions: Versions
) -> None:
    with _started(origin, certificate, versions) as tunnel, contextlib.ExitStack() as stack:
        serving = tunnel.pid
        os.kill(serving, signal.SIGSTOP)
        waiting = [stack.enter_context(socket.create_connection(("127.0.0.1", tunnel.port))) for _ in range(100)]
        os.kill(serving, signal.SIGCONT)
        upgraded(tunnel)
        from tests.harness import client_context  # noqa: PLC0415

        for plain in waiting:
            with client_context(tunnel).wrap_socket(plain, server_hostname="localhost") as client:
                assert upgrade(client).status == 101


def test_handshakes_in_progress_are_completed_by_the_old_process(
    origin: WebsocketsOrigin, certificate: Certificate, versions: Versions
) -> None:
    with _started(origin, certificate, versions) as tunnel, connect_tls(tunnel) as client:
        upgraded(tunnel)
        assert len(tunnel.pids) == 2
        assert upgrade(client).status == 101
        client.sendall(b"\x82\x84\0\0\0\0ping")
        assert receive_exactly(client, 6) == b"\x82\x04ping"


def test_a_package_replaced_on_disk_does_not_reach_what_runs(
    origin: WebsocketsOrigin, certificate: Certificate, versions: Versions
) -> None:
    with _started(origin, certificate, versions) as tunnel:
        versions.install("2.0.0")
        versions.remove("1.0.0")
        assert _echoes(tunnel)
        assert tunnel.status()["version"] == "1.0.0"
        tunnel.reload()
        assert upgraded(tunnel) == "1.0.0 -> 2.0.0, generation 2"
        assert _echoes(tunnel)


def test_modules_imported_later_are_of_the_same_version(
    origin: WebsocketsOrigin, certificate: Certificate, versions: Versions
) -> None:
    """The first rules of a tunnel need modules not imported yet. They are refused once they have changed on disk."""
    text = config_for(origin.address, certificate)
    site = '[[sites.rules]]\nname = "r"\nwhen = "false"\naction = "block"\n'
    rules = config_for(origin.address, certificate, site=site)
    with Tunnel(None, certificate, config=text, environment=versions.environment) as tunnel:
        module = versions.install("1.0.0") / "firewall" / "rules.py"
        new = module.with_suffix(".new")
        new.write_text(module.read_text())
        new.replace(module)
        (said,) = tunnel.reload(rules, status=1)
        assert "the package on disk was replaced" in said
        assert _echoes(tunnel)
        upgraded(tunnel)
        tunnel.reload(text)
        assert any("rules" in line for line in tunnel.reload(rules))


def test_a_restarted_process_is_of_the_version_that_runs(
    origin: WebsocketsOrigin, certificate: Certificate, versions: Versions
) -> None:
    """Even if the link points to another by now: that one is for the upgrade."""
    with _started(origin, certificate, versions, errors_expected=True) as tunnel:
        versions.install("2.0.0")
        before = tunnel.pid
        os.kill(before, signal.SIGKILL)
        assert _echoes(tunnel)
        (one,) = tunnel.status()["processes"]
        assert (one["version"], one["process"] != before) == ("1.0.0", True)
        assert upgraded(tunnel) == "1.0.0 -> 2.0.0, generation 2"


def test_the_end_of_drain_after_ends_old_tunnels(
    origin: WebsocketsOrigin, certificate: Certificate, versions: Versions
) -> None:
    release = 'drain_after = "1s"\ndrain_over = "1s"'
    with _started(origin, certificate, versions, release) as tunnel, connect_tls(tunnel) as client:
        assert upgrade(client).status == 101
        upgraded(tunnel)
        assert client.recv(100) == b""
        eventually(lambda: len(tunnel.pids) == 1)
        assert _echoes(tunnel)


def test_changes_by_a_reload_are_kept(origin: WebsocketsOrigin, certificate: Certificate, tmp_path: Path) -> None:
    versions = Versions(tmp_path / "versions")
    text = config_for(origin.address, certificate)
    with Tunnel(None, certificate, config=text, environment=versions.environment) as tunnel:
        tunnel.reload(text.replace('listen = ["', f'listen = ["unix:{tmp_path / "more.sock"}", "', 1))
        upgraded(tunnel)
        assert f"unix:{tmp_path / 'more.sock'}" in tunnel.status()["listening"]
        assert _echoes(tunnel)


def test_listeners_come_and_go(origin: WebsocketsOrigin, certificate: Certificate, tmp_path: Path) -> None:
    """An upgrade also reads the file, and applies the listeners in it."""
    versions = Versions(tmp_path / "versions")
    first, second = tmp_path / "first.sock", tmp_path / "second.sock"
    text = config_for(origin.address, certificate)

    def listening_too(path: Path) -> str:
        return text.replace('listen = ["', f'listen = ["unix:{path}", "', 1)

    with Tunnel(None, certificate, config=listening_too(first), environment=versions.environment) as tunnel:
        assert first.is_socket()
        tunnel.file.write_text(listening_too(second))
        upgraded(tunnel)
        assert second.is_socket()
        assert not first.exists()
        assert _echoes(tunnel)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            tunnel.file.write_text(text.replace('listen = ["', f'listen = ["{address}", "', 1))
            assert f"cannot listen on {address}: it is in use" in upgraded(tunnel, status=1)
        assert second.is_socket()
        assert _echoes(tunnel)


# --- what fails changes nothing ---------------------------------------------------------------------------------------


def _refused(tunnel: Tunnel, *why: str) -> None:
    said = upgraded(tunnel, status=1)
    assert said.startswith("tlstunnel: nothing was changed: "), said
    for part in why:
        assert part in said, said
    assert tunnel.records("not upgraded")[-1]["reason"] == said.removeprefix("tlstunnel: ")
    assert tunnel.status()["generation"] == 1
    assert len(tunnel.pids) == 1
    assert _echoes(tunnel)


def test_code_that_does_not_import(origin: WebsocketsOrigin, certificate: Certificate, versions: Versions) -> None:
    with _started(origin, certificate, versions) as tunnel:
        (versions.install("2.0.0") / "tunnel" / "tunnel.py").write_text("import nothing_of_this_name\n")
        _refused(tunnel, "nothing_of_this_name")
        (versions.install("3.0.0") / "cli" / "start.py").write_text("syntax error\n")
        _refused(tunnel, "SyntaxError")


def test_code_that_is_missing(origin: WebsocketsOrigin, certificate: Certificate, versions: Versions) -> None:
    with _started(origin, certificate, versions) as tunnel:
        package = versions.install("2.0.0")
        (package / "__main__.py").write_text("raise SystemExit\n")
        tunnel.send_signal(signal.SIGUSR2)
        tunnel.wait_record(lambda record: "it exited without output" in record.get("reason", ""))
        assert _echoes(tunnel)


def test_a_probe_that_hangs(origin: WebsocketsOrigin, certificate: Certificate, versions: Versions) -> None:
    with _started(origin, certificate, versions, 'upgrade_timeout = "1s"') as tunnel:
        (versions.install("2.0.0") / "serving" / "service.py").write_text("import time\ntime.sleep(1000)\n")
        _refused(tunnel, "not ready within 1 s (release.upgrade_timeout)")


def test_an_unknown_format_of_the_handover(
    origin: WebsocketsOrigin, certificate: Certificate, versions: Versions
) -> None:
    with _started(origin, certificate, versions) as tunnel:
        package = versions.install("2.0.0")
        for module, before, after in (("messages", FORMAT, 99), ("previous", PREVIOUS, 98)):
            path = package / "processes" / f"{module}.py"
            text = path.read_text()
            assert f"\nFORMAT = {before}\n" in text
            path.write_text(text.replace(f"\nFORMAT = {before}\n", f"\nFORMAT = {after}\n"))
        _refused(tunnel, f"hands over in format {PREVIOUS}, and 2.0.0 supports 98 and 99")


def test_a_broken_configuration(origin: WebsocketsOrigin, certificate: Certificate, versions: Versions) -> None:
    with _started(origin, certificate, versions, 'drain_over = "1s"') as tunnel:
        tunnel.file.write_text("[release]\ndrain_ovr = 1\n")
        _refused(tunnel, "drain_ovr")


def test_an_unreadable_certificate(origin: WebsocketsOrigin, tmp_path: Path, certificate: Certificate) -> None:
    versions = Versions(tmp_path / "versions")
    own = Certificate(certificate.ca, tmp_path / "own.pem", tmp_path / "own-key.pem")
    own.cert.write_bytes(certificate.cert.read_bytes())
    own.key.write_bytes(certificate.key.read_bytes())
    with _started(origin, own, versions, errors_expected=True) as tunnel:
        own.cert.write_text("no certificate\n")
        _refused(tunnel, str(own.cert))


def test_a_full_disk(origin: WebsocketsOrigin, certificate: Certificate, tmp_path: Path) -> None:
    """If nothing can be written, neither bytecode of the new version nor anything else, it still upgrades."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], check=True)
    try:
        versions = Versions(disk / "versions")
        versions.install("2.0.0")
        versions.install("1.0.0")
        more = {**versions.environment, "TMPDIR": str(disk)}
        with Tunnel(origin.address, certificate, environment=more) as tunnel:
            with contextlib.suppress(OSError), (disk / "full").open("wb", buffering=0) as full:
                while True:
                    full.write(bytes(4096))
            versions_link = disk / "versions" / "current"
            versions_link.unlink()
            versions_link.symlink_to("2.0.0")
            assert upgraded(tunnel) == "1.0.0 -> 2.0.0, generation 2"
            assert _echoes(tunnel)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


# --- in every order ---------------------------------------------------------------------------------------------------


def test_an_upgrade_during_an_upgrade(origin: WebsocketsOrigin, certificate: Certificate, versions: Versions) -> None:
    with _started(origin, certificate, versions) as tunnel:
        over = tunnel.folder / "over"
        waits = f"import os, time\nwhile not os.path.exists({str(over)!r}):\n    time.sleep(0.1)\nraise SystemExit(1)\n"
        (versions.install("2.0.0") / "serving" / "service.py").write_text(waits)
        tunnel.send_signal(signal.SIGUSR2)
        eventually(lambda: _probes(tunnel))
        assert "a reload or an upgrade is in progress" in upgraded(tunnel, status=1)
        over.touch()
        tunnel.wait_records(1, "not upgraded")
        versions.install("3.0.0")
        assert upgraded(tunnel) == "1.0.0 -> 3.0.0, generation 2"


def test_stopping_during_an_upgrade(origin: WebsocketsOrigin, certificate: Certificate, versions: Versions) -> None:
    with _started(origin, certificate, versions) as tunnel:
        (versions.install("2.0.0") / "serving" / "service.py").write_text("import time\ntime.sleep(1000)\n")
        tunnel.send_signal(signal.SIGUSR2)
        eventually(lambda: _probes(tunnel))
        assert tunnel.stop(signal.SIGTERM) == 0


def test_a_reload_during_an_upgrade(origin: WebsocketsOrigin, certificate: Certificate, versions: Versions) -> None:
    with _started(origin, certificate, versions, 'upgrade_timeout = "1s"') as tunnel:
        (versions.install("2.0.0") / "serving" / "service.py").write_text("import time\ntime.sleep(1000)\n")
        tunnel.send_signal(signal.SIGUSR2)
        eventually(lambda: _probes(tunnel))
        assert tunnel.reload() == ["nothing has changed"]
        assert len(tunnel.records("not upgraded")) == 1


def _probes(tunnel: Tunnel) -> list[int]:
    own = Path(f"/proc/{tunnel.parent}/task/{tunnel.parent}/children").read_text().split()
    return [int(pid) for pid in own if b"start" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
