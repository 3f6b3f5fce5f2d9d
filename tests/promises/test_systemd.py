"""systemd is notified when the tunnel is ready, reloading, stopping and alive, and accepts the shipped units."""

import os
import re
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import (
    PROGRAM,
    REPOSITORY,
    TIMEOUT,
    Certificate,
    RawOrigin,
    Tunnel,
    child_environment,
    echo_bytes,
    require,
)

UNITS = REPOSITORY / "docs" / "systemd"


class Manager:
    """systemd's end of the notification socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(TIMEOUT)

    def next(self) -> dict[str, str]:
        """Return the next notification that is not for the watchdog."""
        while True:
            notification = dict(line.split("=", 1) for line in self._socket.recv(4096).decode().splitlines())
            if notification != {"WATCHDOG": "1"}:
                return notification

    def wait_for_life(self, times: int) -> None:
        """Wait for messages of the watchdog."""
        while times:
            times -= self._socket.recv(4096) == b"WATCHDOG=1"

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    try:
        yield manager
    finally:
        manager.close()


def test_notifications(manager: Manager, certificate: Certificate) -> None:
    environment = {"NOTIFY_SOCKET": str(manager.path)}
    with RawOrigin(echo_bytes) as origin, Tunnel(origin.address, certificate, environment=environment) as tunnel:
        ready = manager.next()
        assert ready["READY"] == "1"
        assert ready["MAINPID"] == str(tunnel.parent)
        assert ready["STATUS"].endswith(", generation 1, 1 process")
        tunnel.send_signal(signal.SIGHUP)
        reloading = manager.next()
        assert reloading["RELOADING"] == "1"
        assert int(reloading["MONOTONIC_USEC"]) > 0
        assert manager.next()["READY"] == "1"
        tunnel.send_signal(signal.SIGUSR2)
        assert manager.next()["RELOADING"] == "1"
        upgraded = manager.next()
        assert (upgraded["READY"], upgraded["MAINPID"]) == ("1", str(tunnel.parent))
        assert "generation 2" in upgraded["STATUS"]
        tunnel.send_signal(signal.SIGTERM)
        assert manager.next() == {"STOPPING": "1"}
        assert tunnel.wait() == 0


def test_a_reload_that_fails_ends_too(manager: Manager, certificate: Certificate) -> None:
    environment = {"NOTIFY_SOCKET": str(manager.path)}
    with (
        RawOrigin(echo_bytes) as origin,
        Tunnel(origin.address, certificate, settings="[log]\n", environment=environment) as tunnel,
    ):
        assert manager.next()["READY"] == "1"
        tunnel.reload("nothing = that is known\n", status=1)
        assert manager.next()["RELOADING"] == "1"
        assert manager.next()["READY"] == "1"


def test_watchdog(manager: Manager, certificate: Certificate) -> None:
    environment = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "100000"}
    with RawOrigin(echo_bytes) as origin, Tunnel(origin.address, certificate, environment=environment) as tunnel:
        manager.wait_for_life(3)
        tunnel.send_signal(signal.SIGUSR2)  # and the code after an upgrade sends it too
        tunnel.wait_record(lambda record: record["event"] == "upgraded")
        manager.wait_for_life(3)


def test_the_units_are_valid(tmp_path: Path) -> None:
    analyze = require("systemd-analyze", "systemd")
    program = tmp_path / "tlstunnel"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for unit in ("tlstunnel.service", "tlstunnel.socket"):
        text = (UNITS / unit).read_text().replace("/opt/tlstunnel/bin/tlstunnel", str(program))
        (tmp_path / unit).write_text(text)
    done = subprocess.run(
        [analyze, "verify", *(str(tmp_path / unit) for unit in ("tlstunnel.service", "tlstunnel.socket"))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line]
    assert said == []


def test_the_unit_reloads_with_the_command(certificate: Certificate) -> None:
    """As systemd calls it: with RUNTIME_DIRECTORY, and without a session."""
    (line,) = [line for line in (UNITS / "tlstunnel.service").read_text().splitlines() if "ExecReload" in line]
    arguments = line.removeprefix("ExecReload=/opt/tlstunnel/bin/tlstunnel ").split()
    with RawOrigin(echo_bytes) as origin, Tunnel(origin.address, certificate, settings="[log]\n") as tunnel:
        environment = child_environment() | {"RUNTIME_DIRECTORY": str(tunnel.folder / "run")}

        def reload() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*PROGRAM, *arguments], env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
            )

        assert reload().returncode == 0
        tunnel.file.write_text("nonsense = 1\n")
        failed = reload()
        assert failed.returncode == 1
        assert "nothing was changed" in failed.stderr


def test_the_deploy_hook_copies_a_renewed_certificate(certificate: Certificate, tmp_path: Path) -> None:
    lineage = tmp_path / "live" / "chat.example"
    lineage.mkdir(parents=True)
    (lineage / "fullchain.pem").write_bytes(certificate.cert.read_bytes())
    (lineage / "privkey.pem").write_bytes(certificate.key.read_bytes())
    folder = tmp_path / "certs"
    environment = {
        "TLSTUNNEL_CERTS": str(folder),
        "TLSTUNNEL_GROUP": str(os.getegid()),
        "RENEWED_LINEAGE": str(lineage),
    }
    for _ in range(2):
        subprocess.run([UNITS / "certbot-deploy-hook"], env={**os.environ, **environment}, check=True)
        found = {path.name: (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) for path in folder.iterdir()}
        assert found == {
            "chat.example-fullchain.pem": (certificate.cert.read_bytes(), 0o640),
            "chat.example-privkey.pem": (certificate.key.read_bytes(), 0o640),
        }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_the_documentation_states_its_exposure() -> None:
    analyze = require("systemd-analyze", "systemd")
    command = [analyze, "security", "--offline=true", str(UNITS / "tlstunnel.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for tlstunnel\.service: ([0-9.]+)", done.stdout)
    assert found is not None, done
    assert float(found[1]) <= 2.0
    line = re.search(r".* rates the unit .*", (REPOSITORY / "docs" / "operations.md").read_text())
    assert line is not None
    assert f" {found[1]} with Debian" in line[0]
