"""Close a socket so that its peer still receives what was sent last.

Closing a socket that has unread input sends RST, and an RST destroys what is still on its way to the peer: in our send
buffer and, on some systems, in the peer's receive buffer (seen: 485 KB of 5 MB arrived). Therefore a graceful close
sends FIN first and discards what the peer still sends for a moment, and an intended RST waits until the peer has
received what was sent before it.

Tested by tests/promises/test_last_bytes_before_a_close.py.
"""

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
from collections.abc import Callable

from tlstunnel.sockets.readiness import ERR, HUP, IN, Readiness

DISCARD_BYTES = 65_536
DISCARD_SECONDS = 1.0
"""How much input of a closing socket is discarded, and for how long, before it is closed although the peer still sends.

Apache httpd (2 s between reads, 30 s in total) and nginx (5 s, 30 s) discard longer, but hold a connection for that.
"""

LINGER_PAUSE = 2.0
LINGER_SECONDS = 30.0
"""How long a peer that may still be sending a body may pause, and how long its input is discarded in total: as long as
by Apache httpd. Chromium reads a response only after it has sent its request, and a reset would destroy it."""

FIRST_CHECK, LAST_CHECK = 0.005, 0.25
"""Seconds between two checks of how much the peer has acknowledged. They double from the first to the last: the kernel
reports no event for it."""

_TCP_CLOSE = b"\x07"  # tcpi_state, the first byte of struct tcp_info
_LINGER_0 = struct.pack("ii", 1, 0)


def reset(sock: socket.socket) -> None:
    """Close `sock` with RST and discard what is still to be sent (SO_LINGER with 0 seconds)."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
    sock.close()


def _detach(sock: socket.socket) -> socket.socket:
    """Return a plain socket with the descriptor of `sock`, which may be an ``SSLSocket`` and is unusable afterwards."""
    plain = socket.socket(fileno=sock.detach())
    plain.setblocking(False)
    return plain


def _unacknowledged(sock: socket.socket) -> int:
    """Return how many bytes sent on `sock` its peer may still acknowledge (SIOCOUTQ, tcp(7)).

    0 for a connection that has failed or where the count is not available.
    """
    try:
        # A connection that has failed keeps its count.
        if sock.family != socket.AF_UNIX and sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == _TCP_CLOSE:
            return 0
        return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0" * 4))[0])
    except OSError:
        return 0


class ClosingSockets:
    """The sockets of this process that are being closed."""

    def __init__(self, readiness: Readiness, loop: asyncio.AbstractEventLoop) -> None:
        self.readiness = readiness
        self.loop = loop
        self.open: dict[_ClosingSocket, None] = {}  # oldest first

    def close_gracefully(self, sock: socket.socket, timeout: float = DISCARD_SECONDS, *, lingers: bool = False) -> None:
        """Send FIN, discard what the peer still sends, and close (RFC 9112 section 9.6).

        The socket is closed when the peer sends its own FIN; or when the peer has acknowledged everything and
        DISCARD_BYTES were discarded or DISCARD_SECONDS have passed; or when the peer has acknowledged nothing for
        `timeout` seconds. With `lingers`, the number of bytes is not limited, and input is discarded until the peer
        sends none for LINGER_PAUSE, for at most LINGER_SECONDS. The descriptor must not be registered with the
        readiness.
        """
        if sock.fileno() >= 0:
            _GracefulClose(self, _detach(sock), timeout, lingers=lingers)

    def reset_after_delivery(self, sock: socket.socket, timeout: float) -> None:
        """Close `sock` with RST once the peer has acknowledged everything, or nothing for `timeout` seconds.

        The descriptor must not be registered with the readiness.
        """
        if sock.fileno() >= 0:
            _DelayedReset(self, _detach(sock), timeout)

    def reset_oldest(self) -> None:
        """Close the oldest with RST, to free its descriptor: a peer that reads a byte at a time can hold it forever."""
        next(iter(self.open)).close(reset)

    def reset_all(self) -> None:
        """Close all of them with RST, now."""
        for closing in list(self.open):
            closing.close(reset)


class _ClosingSocket:
    """A socket that is checked again and again until `close`."""

    __slots__ = ("_deadline", "_interval", "_last_count", "_owner", "_sock", "_timeout", "_timer")

    def __init__(self, owner: ClosingSockets, sock: socket.socket, timeout: float) -> None:
        self._owner = owner
        self._sock = sock
        self._timeout = timeout
        self._interval = FIRST_CHECK
        self._last_count = -1
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def close(self, close: Callable[[socket.socket], None] = socket.socket.close) -> None:
        """Close it with the function `close`: regularly or with RST."""
        if self._timer is not None:
            self._timer.cancel()
        self._owner.readiness.unregister(self._sock.fileno())
        self._owner.open.pop(self, None)
        close(self._sock)

    def _is_delivered(self, now: float) -> bool | None:
        """Return whether the peer has acknowledged everything; None if it has made no progress for the timeout."""
        count = _unacknowledged(self._sock)
        if count != self._last_count:
            self._last_count, self._deadline = count, now + self._timeout
        return None if now >= self._deadline else not count

    def _check_later(self, check: Callable[[], None]) -> None:
        self._timer = self._owner.loop.call_later(self._interval, check)
        self._interval = min(self._interval * 2, LAST_CHECK)


class _GracefulClose(_ClosingSocket):
    __slots__ = ("_discard_until", "_discarded", "_linger_until")

    def __init__(self, owner: ClosingSockets, sock: socket.socket, timeout: float, *, lingers: bool) -> None:
        super().__init__(owner, sock, timeout)
        now = owner.loop.time()
        self._discarded = 0
        self._discard_until = now + (LINGER_PAUSE if lingers else DISCARD_SECONDS)
        self._linger_until = now + LINGER_SECONDS if lingers else None
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        owner.open[self] = None
        owner.readiness.register(sock.fileno(), IN, self._on_event)
        self._timer = owner.loop.call_later(DISCARD_SECONDS, self._check)
        self._on_event(IN)

    def _on_event(self, events: int) -> None:
        try:
            # Bounded for each wake-up, however much the peer sends.
            for _ in range(DISCARD_BYTES // 16_384):
                discarded = self._sock.recv(16_384)
                if not discarded:
                    return self.close()
                self._discarded += len(discarded)
        except BlockingIOError:
            # When both directions are shut down, there is a HUP without an error and without an end to read.
            if events & (ERR | HUP):
                self.close()
        except OSError:
            self.close()
        else:
            if self._linger_until is None and self._discarded >= DISCARD_BYTES and not _unacknowledged(self._sock):
                return self.close()
        if self._linger_until is not None:
            self._discard_until = min(self._owner.loop.time() + LINGER_PAUSE, self._linger_until)

    def _check(self) -> None:
        now = self._owner.loop.time()
        delivered = self._is_delivered(now)
        if delivered is None or (delivered and now >= self._discard_until):
            return self.close()
        self._check_later(self._check)


class _DelayedReset(_ClosingSocket):
    __slots__ = ()

    def __init__(self, owner: ClosingSockets, sock: socket.socket, timeout: float) -> None:
        super().__init__(owner, sock, timeout)
        owner.open[self] = None
        self._check()

    def _check(self) -> None:
        if self._is_delivered(self._owner.loop.time()) is False:
            return self._check_later(self._check)
        self.close(reset)
