"""What systemd is told (sd_notify(3)): readiness, reloads, the end, and that this process is alive."""

import contextlib
import os
import socket
import time


class ServiceManager:
    """Tells the service manager, if there is one; nothing that goes wrong here is worth ending for."""

    def __init__(self) -> None:
        path = os.environ.get("NOTIFY_SOCKET", "")
        self._where = "\0" + path[1:] if path.startswith("@") else path

    def notify_ready(self, status: str) -> None:
        """Starting, or reloading, is done."""
        self._send(f"READY=1\nSTATUS={status}\nMAINPID={os.getpid()}")

    def notify_reloading(self) -> None:
        """A reload or an upgrade has begun; `ready` ends it, also where it has failed."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def notify_stopping(self) -> None:
        """The end has begun."""
        self._send("STOPPING=1")

    def notify_alive(self) -> None:
        """The watchdog need not act."""
        self._send("WATCHDOG=1")

    @property
    def watchdog_interval(self) -> float:
        """Seconds between calls of `alive`, half of what systemd waits (sd_watchdog_enabled(3)); 0: never."""
        try:
            microseconds = int(os.environ.get("WATCHDOG_USEC", "0"))
            meant = int(os.environ.get("WATCHDOG_PID", os.getpid())) == os.getpid()
        except ValueError:
            return 0.0
        return microseconds / 2e6 if self._where and meant else 0.0

    def _send(self, what: str) -> None:
        if self._where:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto(what.encode(), self._where)
