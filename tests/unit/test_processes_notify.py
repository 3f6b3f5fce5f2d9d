"""Notifications to systemd."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tlstunnel.processes.notify import ServiceManager


@pytest.fixture(params=["a file", "an abstract name"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """systemd's end."""
    name = str(tmp_path / "notify") if request.param == "a file" else f"@tlstunnel-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:] if name.startswith("@") else name)
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield sock


def test_messages(manager: socket.socket) -> None:
    notify = ServiceManager()
    notify.notify_ready("serving")
    assert manager.recv(1000).decode() == f"READY=1\nSTATUS=serving\nMAINPID={os.getpid()}"
    notify.notify_reloading()
    first, second = manager.recv(1000).decode().split("\n")
    assert first == "RELOADING=1"
    assert second.startswith("MONOTONIC_USEC=")
    assert second.removeprefix("MONOTONIC_USEC=").isdecimal()
    notify.notify_stopping()
    assert manager.recv(1000) == b"STOPPING=1"
    notify.notify_alive()
    assert manager.recv(1000) == b"WATCHDOG=1"


@pytest.mark.parametrize(
    ("environment", "every"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
    ],
)
@pytest.mark.usefixtures("manager")
def test_watchdog(environment: dict[str, str], every: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ServiceManager().watchdog_interval == every


def test_without_a_manager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    ServiceManager().notify_ready("ignored")
    assert ServiceManager().watchdog_interval == 0.0
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "absent"))
    ServiceManager().notify_ready("ignored")
