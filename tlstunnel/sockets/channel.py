"""The sockets of a connection before the splice, with operations that wait.

Both sockets are registered with the process's readiness, edge-triggered, and wake the task of their connection.
Level-triggered, an incomplete hello that was only peeked would stay readable and wake the task endlessly (seen: 375 000
times a second).

Tested by tests/promises/test_hello_in_pieces.py.
"""

import contextlib
import socket
import ssl

from tlstunnel.sockets.deadlines import Wakeup
from tlstunnel.sockets.readiness import EDGE_TRIGGERED, ERR, GONE, HUP, IN, OUT, RDHUP, Readiness

_WAIT = (BlockingIOError, ssl.SSLWantReadError)

# One for all connections: malloc would map and unmap a block of this size at every read.
_BUFFER = bytearray(65_536)
_VIEW = memoryview(_BUFFER)

MAX_READ = len(_BUFFER)
"""Bytes read at once. It must be at least a TLS record (16 KiB): less would leave decrypted bytes in OpenSSL."""


class ClientGone(Exception):
    """The client has closed or reset its connection before it got a response."""


class Channel:
    """A non-blocking socket with operations that wait.

    `gone` is set once the peer has closed its side or the connection has failed, `failed` in the second case only.
    """

    __slots__ = ("_readiness", "failed", "fd", "gone", "sock", "wakeup")

    def __init__(self, sock: socket.socket, readiness: Readiness, wakeup: Wakeup) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.gone = self.failed = False
        self._readiness = readiness
        self.wakeup = wakeup
        readiness.register(self.fd, EDGE_TRIGGERED | IN | RDHUP, self._on_event)

    def _on_event(self, events: int) -> None:
        if events & GONE:
            self.gone = True
            if events & (ERR | HUP):
                self.failed = True
        self.wakeup.fire()

    def check_gone(self) -> bool:
        """Return whether the peer no longer waits for what is sent to it. Call it when nothing can be received.

        A peer that has sent close_notify before its FIN may have ended only its own side (RFC 9112 section 9.6);
        whether it has left shows when something is sent to it. It counts as present until the connection fails. One
        that has closed without close_notify, or whose input is unread, counts as gone, and that input is lost.
        """
        if self.gone and not self.failed and isinstance(self.sock, ssl.SSLSocket):
            with contextlib.suppress(OSError):
                self.gone = self.sock.recv_into(_BUFFER) > 0
        return self.gone

    def release(self) -> None:
        """Stop watching the socket, and leave it open."""
        self._readiness.unregister(self.fd)

    async def wait_writable(self) -> None:
        """Wait until the socket may be writable, or for another event."""
        self.watch_writability()
        await self.wakeup.wait()

    async def peek(self, size: int, seen: int) -> bytes:
        """Return the first bytes in the socket's buffer without consuming them: more than `seen`, at most `size`.

        Raises ClientGone if no more bytes can arrive.
        """
        while True:
            try:
                n = self.sock.recv_into(_BUFFER, size, socket.MSG_PEEK)
                if n > seen:
                    return bytes(_VIEW[:n])
                if not n or self.gone:
                    raise ClientGone
            except BlockingIOError:
                pass
            await self.wakeup.wait()

    async def recv(self, unless_gone: "Channel | None" = None) -> bytes:
        """Return the next bytes; b"" at the peer's end. Raises ClientGone as soon as `unless_gone` is gone."""
        while True:
            try:
                return bytes(_VIEW[: self.sock.recv_into(_BUFFER)])
            except _WAIT:
                if unless_gone is not None and unless_gone.check_gone():
                    raise ClientGone from None
                await self.wakeup.wait()
            except ssl.SSLWantWriteError:
                await self.wait_writable()

    async def send(self, data: bytes) -> None:
        """Send all of `data`."""
        while data:
            try:
                data = data[self.sock.send(data) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                await self.wait_writable()
            except ssl.SSLWantReadError:
                await self.wakeup.wait()

    async def take(self, size: int) -> None:
        """Consume `size` bytes that have been peeked."""
        while size > 0:
            size -= self.sock.recv_into(_BUFFER, size)

    def recv_now(self) -> bytes | None:
        """Return the next bytes, b"" at the peer's end, None if none have arrived."""
        try:
            return bytes(_VIEW[: self.sock.recv_into(_BUFFER)])
        except _WAIT:
            return None
        except ssl.SSLWantWriteError:
            self.watch_writability()
            return None

    def send_now(self, data: bytes) -> bytes:
        """Send what is possible without waiting; return the rest. An event follows when more can be sent."""
        try:
            sent = self.sock.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError):
            sent = 0
        except ssl.SSLWantReadError:
            return data
        if sent < len(data):
            self.watch_writability()
        return data[sent:]

    def watch_writability(self) -> None:
        """Watch for writability too."""
        self._readiness.modify(self.fd, EDGE_TRIGGERED | IN | OUT | RDHUP)

    async def do_handshake(self, unless_gone: "Channel | None" = None) -> ssl.SSLSocket:
        """Make the TLS handshake on an ``SSLSocket``. Raises ClientGone as soon as `unless_gone` is gone."""
        sock = self.sock
        assert isinstance(sock, ssl.SSLSocket)
        while True:
            try:
                sock.do_handshake()
                return sock
            except ssl.SSLWantReadError:
                if unless_gone is not None and unless_gone.check_gone():
                    raise ClientGone from None
                await self.wakeup.wait()
            except ssl.SSLWantWriteError:
                if unless_gone is not None and unless_gone.check_gone():
                    raise ClientGone from None
                await self.wait_writable()


def get_address(sock: socket.socket, *, peer: bool) -> tuple[str, int] | None:
    """Return a socket's own or its peer's address; None for a Unix socket or a closed connection."""
    try:
        found = sock.getpeername() if peer else sock.getsockname()
    except OSError:
        return None
    return (found[0], found[1]) if isinstance(found, tuple) else None
