"""Notifications to systemd: ready, reloading, stopping, and the watchdog (sd_notify(3))."""

import contextlib
import os
import socket
import time


class ServiceManager:
    """Sends notifications to the service manager, if there is one. Errors are ignored."""

    def __init__(self) -> None:
        path = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path

    def notify_ready(self, status: str) -> None:
        """Report that a start or a reload is complete."""
        self._send(f"READY=1\nSTATUS={status}\nMAINPID={os.getpid()}")

    def notify_reloading(self) -> None:
        """Report that a reload or an upgrade has begun. `notify_ready` must follow, also if it fails."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def notify_stopping(self) -> None:
        """Report that the shutdown has begun."""
        self._send("STOPPING=1")

    def notify_alive(self) -> None:
        """Report that this process is alive, for the watchdog."""
        self._send("WATCHDOG=1")

    @property
    def watchdog_interval(self) -> float:
        """Seconds between calls of `notify_alive`: half of its timeout (sd_watchdog_enabled(3)); 0 without one."""
        try:
            microseconds = int(os.environ.get("WATCHDOG_USEC", "0"))
            is_ours = int(os.environ.get("WATCHDOG_PID", os.getpid())) == os.getpid()
        except ValueError:
            return 0.0
        return microseconds / 2e6 if self._address and is_ours else 0.0

    def _send(self, message: str) -> None:
        if self._address:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto(message.encode(), self._address)
