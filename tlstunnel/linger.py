"""Closing a socket so that its peer sees what was sent last.

Closing with unread input sends RST, and an RST destroys what is still on its way to the peer (seen: 485 KB of 5 MB
arrived). So the end is sent first, and what the peer still sends is thrown away for a moment.
"""

import asyncio
import contextlib
import socket
import struct

from tlstunnel.readiness import ERR, HUP, IN, AnyReadiness

LINGER_BYTES = 65_536
LINGER_SECONDS = 1.0

_ABORT = struct.pack("ii", 1, 0)


def abort(sock: socket.socket) -> None:
    """Close `sock` with RST: whatever is still to be sent is thrown away (SO_LINGER with 0 seconds)."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    sock.close()


def plain(sock: socket.socket) -> socket.socket:
    """The descriptor of `sock` (an ``SSLSocket``, perhaps) as a plain socket; `sock` itself is then of no more use."""
    raw = socket.socket(fileno=sock.detach())
    raw.setblocking(False)
    return raw


class Linger:
    """Shuts down the writing of `sock`, reads on for at most 64 KiB or 1 s or until the peer ends, then closes it.

    The descriptor must not be registered.
    """

    __slots__ = ("_left", "_readiness", "_sock", "_timer")

    def __init__(self, sock: socket.socket, readiness: AnyReadiness, loop: asyncio.AbstractEventLoop) -> None:
        if sock.fileno() < 0:
            return
        self._sock = plain(sock)
        self._left = LINGER_BYTES
        self._readiness = readiness
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        self._timer = loop.call_later(LINGER_SECONDS, self._close)
        readiness.register(self._sock.fileno(), IN, self._on_event)
        self._on_event(IN)

    def _on_event(self, events: int) -> None:
        try:
            while self._left > 0:
                dropped = self._sock.recv(min(self._left, 16_384))
                if not dropped:
                    break
                self._left -= len(dropped)
        except BlockingIOError:
            # Both directions shut down is HUP without an error and without an end to read.
            if not events & (ERR | HUP):
                return
        except OSError:
            pass
        self._close()

    def _close(self) -> None:
        self._timer.cancel()
        self._readiness.unregister(self._sock.fileno())
        self._sock.close()
