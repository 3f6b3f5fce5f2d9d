"""systemd is notified when the tunnel is ready, reloading, stopping and alive, and accepts the shipped units."""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, TIMEOUT, Certificate, RawOrigin, Tunnel, echo_bytes, require

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
    # Debian 12 has systemd 252, and the type is of 253.
    assert [line for line in said if not re.search("Failed to parse service type, ignoring: notify-reload", line)] == []


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
