"""Closing a socket so that its peer sees what was sent last.

Closing with unread input sends RST, and an RST destroys what is still on its way to the peer: in our send buffer and,
on some systems, in its receive buffer (seen: 485 KB of 5 MB arrived). So the end is sent first, and what the peer
still sends is thrown away for a moment; and an RST that is meant waits until what came before it has been taken.
"""

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios

from tlstunnel.readiness import ERR, HUP, IN, AnyReadiness

LINGER_BYTES = 65_536
LINGER_SECONDS = 1.0

FIRST_LOOK, LAST_LOOK = 0.005, 0.25
"""Seconds between two looks at how much the peer has taken, doubled from the first to the last: nothing tells of it."""

_TCP_CLOSE = b"\x07"  # tcpi_state, the first byte of struct tcp_info
_ABORT = struct.pack("ii", 1, 0)


def reset(sock: socket.socket) -> None:
    """Close `sock` with RST: whatever is still to be sent is thrown away (SO_LINGER with 0 seconds)."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    sock.close()


def _plain(sock: socket.socket) -> socket.socket:
    """The descriptor of `sock` (an ``SSLSocket``, perhaps) as a plain socket; `sock` itself is then of no more use."""
    raw = socket.socket(fileno=sock.detach())
    raw.setblocking(False)
    return raw


def _untaken(sock: socket.socket) -> int:
    """How many bytes sent on `sock` its peer may still take (SIOCOUTQ of tcp(7)); 0 where nothing tells."""
    try:
        # A connection that has failed keeps its count.
        if sock.family != socket.AF_UNIX and sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == _TCP_CLOSE:
            return 0
        return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0" * 4))[0])
    except (OSError, AttributeError):
        return 0


class Linger:
    """Shuts down the writing of `sock`, throws away what the peer sends, and closes.

    That is once the peer ends too; or once it has taken everything and 64 KiB were thrown away or 1 s is over; or once
    it has taken nothing for `patience` seconds. The descriptor must not be registered.
    """

    __slots__ = (
        "_deadline",
        "_look",
        "_loop",
        "_patience",
        "_readiness",
        "_sock",
        "_thrown",
        "_timer",
        "_until",
        "_was",
    )

    def __init__(
        self, sock: socket.socket, readiness: AnyReadiness, loop: asyncio.AbstractEventLoop, patience: float
    ) -> None:
        if sock.fileno() < 0:
            return
        self._sock = _plain(sock)
        self._readiness = readiness
        self._loop = loop
        self._patience = patience
        self._thrown = 0
        self._look = FIRST_LOOK
        self._until = loop.time() + LINGER_SECONDS
        self._was = _untaken(self._sock)
        self._deadline = loop.time() + patience
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        self._timer = loop.call_later(LINGER_SECONDS, self._check)
        readiness.register(self._sock.fileno(), IN, self._on_event)
        self._on_event(IN)

    def _on_event(self, events: int) -> None:
        try:
            # A turn's worth and no more, whatever the peer sends.
            for _ in range(LINGER_BYTES // 16_384):
                dropped = self._sock.recv(16_384)
                if not dropped:
                    return self._close()
                self._thrown += len(dropped)
        except BlockingIOError:
            # Both directions shut down is HUP without an error and without an end to read.
            if events & (ERR | HUP):
                self._close()
        except OSError:
            self._close()
        else:
            if self._thrown >= LINGER_BYTES and not _untaken(self._sock):
                self._close()

    def _check(self) -> None:
        untaken, now = _untaken(self._sock), self._loop.time()
        if untaken != self._was:
            self._was, self._deadline = untaken, now + self._patience
        if now >= self._deadline or (not untaken and now >= self._until):
            return self._close()
        self._timer = self._loop.call_later(self._look, self._check)
        self._look = min(self._look * 2, LAST_LOOK)

    def _close(self) -> None:
        self._timer.cancel()
        self._readiness.unregister(self._sock.fileno())
        self._sock.close()


class Reset:
    """Closes `sock` with RST once its peer has taken what was sent, or has taken nothing for `patience` seconds."""

    __slots__ = ("_deadline", "_look", "_loop", "_patience", "_sock", "_was")

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop, patience: float) -> None:
        if sock.fileno() < 0:
            return
        self._sock = _plain(sock)
        self._loop = loop
        self._patience = patience
        self._look = FIRST_LOOK
        self._was = -1
        self._deadline = 0.0
        self._check()

    def _check(self) -> None:
        untaken, now = _untaken(self._sock), self._loop.time()
        if untaken != self._was:
            self._was, self._deadline = untaken, now + self._patience
        if not untaken or now >= self._deadline:
            return reset(self._sock)
        self._loop.call_later(self._look, self._check)
        self._look = min(self._look * 2, LAST_LOOK)
