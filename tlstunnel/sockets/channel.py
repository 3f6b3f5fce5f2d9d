"""A connection's sockets before the splice: operations that wait.

Both are in the process's readiness, edge-triggered, and wake the one task of their connection. Edges,
not levels: a peeked hello that is not complete stays readable, and would wake a level-triggered wait for ever (seen:
375 000 times a second).
"""

import socket
import ssl

from tlstunnel.sockets.deadlines import Wakeup
from tlstunnel.sockets.readiness import EDGE_TRIGGERED, GONE, IN, OUT, RDHUP, Readiness

_WAIT = (BlockingIOError, ssl.SSLWantReadError)

# One for all connections: a buffer a read would be a large block that malloc takes and gives back at each of them.
_BUFFER = bytearray(65_536)
_VIEW = memoryview(_BUFFER)

MAX_READ = len(_BUFFER)
"""Bytes read at once. At least a TLS record (16 KiB): less would leave decrypted bytes in OpenSSL."""


class ClientGone(Exception):
    """The client has ended or reset its connection while something was still to be done for it."""


class Channel:
    """A non-blocking socket whose operations wait. `gone` is set once the peer has ended or failed."""

    __slots__ = ("_readiness", "fd", "gone", "sock", "wakeup")

    def __init__(self, sock: socket.socket, readiness: Readiness, wakeup: Wakeup) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.gone = False
        self._readiness = readiness
        self.wakeup = wakeup
        readiness.register(self.fd, EDGE_TRIGGERED | IN | RDHUP, self._on_event)

    def _on_event(self, events: int) -> None:
        if events & GONE:
            self.gone = True
        self.wakeup.fire()

    def release(self) -> None:
        """Stop watching; the socket is left open."""
        self._readiness.unregister(self.fd)

    async def wait_writable(self) -> None:
        """Wait for an event, writability among them."""
        self.watch_writability()
        await self.wakeup.wait()

    async def peek(self, size: int, seen: int) -> bytes:
        """The first bytes that wait in the socket, more than `seen` of them, at most `size`, without taking them.

        Raises ClientGone when there will be no more.
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
        """The next bytes; b"" at the peer's end. Raises ClientGone as soon as `unless_gone` is."""
        while True:
            try:
                return bytes(_VIEW[: self.sock.recv_into(_BUFFER)])
            except _WAIT:
                if unless_gone is not None and unless_gone.gone:
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
        """Take that many bytes from the socket, which have been peeked."""
        while size > 0:
            size -= self.sock.recv_into(_BUFFER, size)

    def recv_now(self) -> bytes | None:
        """The next bytes, b"" at the peer's end, None where one would have to wait."""
        try:
            return bytes(_VIEW[: self.sock.recv_into(_BUFFER)])
        except _WAIT:
            return None
        except ssl.SSLWantWriteError:
            self.watch_writability()
            return None

    def send_now(self, data: bytes) -> bytes:
        """Send what goes without waiting; give the rest, for which an event comes."""
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
        """Let writability be an event too."""
        self._readiness.modify(self.fd, EDGE_TRIGGERED | IN | OUT | RDHUP)

    async def do_handshake(self, unless_gone: "Channel | None" = None) -> ssl.SSLSocket:
        """The TLS handshake, on a socket that is an ``SSLSocket`` by now. Raises ClientGone once `unless_gone` is."""
        sock = self.sock
        assert isinstance(sock, ssl.SSLSocket)
        while True:
            try:
                sock.do_handshake()
                return sock
            except ssl.SSLWantReadError:
                if unless_gone is not None and unless_gone.gone:
                    raise ClientGone from None
                await self.wakeup.wait()
            except ssl.SSLWantWriteError:
                if unless_gone is not None and unless_gone.gone:
                    raise ClientGone from None
                await self.wait_writable()


def get_address(sock: socket.socket, *, peer: bool) -> tuple[str, int] | None:
    """A socket's own or its peer's address; None of a Unix socket, or of one that is gone."""
    try:
        found = sock.getpeername() if peer else sock.getsockname()
    except OSError:
        return None
    return (found[0], found[1]) if isinstance(found, tuple) else None
