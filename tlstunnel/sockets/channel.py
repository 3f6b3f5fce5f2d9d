"""The sockets of a connection before the splice, with operations that wait, with TLS or without.

Both sockets are registered with the process's readiness, edge-triggered, and wake the task of their connection.

Tested by tests/unit/test_channel.py and tests/promises/test_hello_in_pieces.py.
"""

import asyncio
import contextlib
import socket
import ssl
from typing import Final

from tlstunnel.sockets.deadlines import Wakeup
from tlstunnel.sockets.readiness import EDGE_TRIGGERED, ERR, GONE, HUP, IN, OUT, RDHUP, Readiness
from tlstunnel.tls.stream import LARGE, RECORD, SMALL, TlsStream
from tlstunnel.tls.truncation import Truncated

MAX_SEND: Final = 65_536
"""Bytes that are encrypted at once: a peer that reads nothing costs no more memory than this."""

# One of each for all connections: malloc would map and unmap a block of this size at every read.
_RECEIVED = bytearray(LARGE)
_PLAINTEXT = bytearray(LARGE + RECORD)
_RECEIVED_VIEW, _PLAINTEXT_VIEW = memoryview(_RECEIVED), memoryview(_PLAINTEXT)


class ClientGone(Exception):
    """The client has closed or reset its connection before it got a response."""


class Channel:
    """A non-blocking socket with operations that wait. With `tls`, they receive and send plaintext.

    `gone` is set once the peer has closed its side or the connection has failed, `failed` in the second case only.
    """

    __slots__ = ("_begun", "_buffered", "_readiness", "_unsent", "failed", "fd", "gone", "sock", "tls", "wakeup")

    def __init__(self, sock: socket.socket, readiness: Readiness, wakeup: Wakeup) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.gone = self.failed = False
        self.tls: TlsStream | None = None
        self._buffered = b""  # received before TLS, and not consumed
        self._unsent = b""  # ciphertext that the socket has not taken yet
        self._begun = 0  # bytes of plaintext that it belongs to, which the caller still offers
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
        if self.gone and not self.failed and self.tls is not None:
            with contextlib.suppress(OSError):
                self.gone = self._receive(self.tls) != b""
        return self.gone

    def release(self) -> None:
        """Stop watching the socket, and leave it open."""
        self._readiness.unregister(self.fd)

    def watch_writability(self) -> None:
        """Watch for writability too."""
        self._readiness.modify(self.fd, EDGE_TRIGGERED | IN | OUT | RDHUP)

    async def wait_writable(self) -> None:
        """Wait until the socket may be writable, or for another event."""
        self.watch_writability()
        await self.wakeup.wait()

    async def buffer(self, size: int) -> bytes:
        """Return what was received before TLS and not consumed, once there are `size` bytes, at most SMALL more.

        Raises ClientGone if they cannot arrive any more.
        """
        while len(self._buffered) < size:
            try:
                n = self.sock.recv_into(_RECEIVED, SMALL)
            except BlockingIOError:
                await self.wakeup.wait()
                continue
            if not n:
                raise ClientGone
            self._buffered += _RECEIVED_VIEW[:n]
        return self._buffered

    def consume(self, size: int) -> None:
        """Drop the first `size` bytes of what `buffer` returns."""
        self._buffered = self._buffered[size:]

    async def begin_tls(self, tls: TlsStream, unless_gone: "Channel | None" = None) -> None:
        """Make the TLS handshake; what `buffer` has received is the peer's first bytes.

        What may be sent with the first data is left in the stream, until `send` or until `recv` has to wait: a server's
        session ticket, a client's last flight.
        Raises ssl.SSLError after the alert has been sent; ClientGone as soon as `unless_gone` is gone.
        """
        received, self._buffered = self._buffered, b""
        # A client begins with nothing; a server has the hello.
        data: bytes | memoryview = received
        while True:
            try:
                complete = tls.handshake(data)
            except ssl.SSLError:
                self._send_alert(tls)
                raise
            if complete and tls.version == "TLSv1.3":
                break  # a server's ticket and a client's last flight can go with the first data
            self._send_output(tls)
            if complete:
                break
            while self._unsent:
                await self._wait(unless_gone, writable=True)
                self._flush()
            while True:
                try:
                    n = self.sock.recv_into(_RECEIVED, SMALL)
                    break
                except BlockingIOError:
                    await self._wait(unless_gone)
            if not n:
                raise Truncated
            data = _RECEIVED_VIEW[:n]
            if n == SMALL:
                data = bytes(data)
                await asyncio.sleep(0)  # more may have come, and tiny records take 2 ms
        self.tls = tls

    async def _wait(self, unless_gone: "Channel | None", *, writable: bool = False) -> None:
        if unless_gone is not None and unless_gone.check_gone():
            raise ClientGone
        if writable:
            self.watch_writability()
        await self.wakeup.wait()

    async def recv(self, unless_gone: "Channel | None" = None) -> bytes:
        """Return the next bytes; b"" at the peer's end. Raises ClientGone as soon as `unless_gone` is gone."""
        while True:
            try:
                data = self._receive(self.tls)
            except BlockingIOError:
                # Now, and not with the first data: without a response, a system delays its acknowledgement by 40 ms,
                # for which a client with Nagle's algorithm (RFC 896) waits before it sends its request (seen).
                self._send_output(self.tls)
                await self._wait(unless_gone)
                continue
            if data is not None:
                return data
            await asyncio.sleep(0)  # records without data cost time too

    def recv_now(self) -> bytes | None:
        """Return the next bytes, b"" at the peer's end, None if none have arrived."""
        try:
            data: bytes | None = None
            while data is None:  # after records without data, of which a stream allows few
                data = self._receive(self.tls)
        except BlockingIOError:
            return None
        return data

    def _receive(self, tls: TlsStream | None) -> bytes | None:
        """Return the next bytes, b"" at the peer's end, None after records without data. Raises BlockingIOError."""
        if tls is None:
            return bytes(_RECEIVED_VIEW[: self.sock.recv_into(_RECEIVED)])
        if tls.failure is not None:
            raise tls.failure
        if tls.ended:
            return b""
        if tls.surplus:
            data, tls.surplus = memoryview(tls.surplus), b""
        elif n := self.sock.recv_into(_RECEIVED, tls.limit):
            data = _RECEIVED_VIEW[:n]
        else:
            raise Truncated
        return self._decrypt(tls, data)

    def _decrypt(self, tls: TlsStream, data: memoryview) -> bytes | None:
        n = tls.receive(data, _PLAINTEXT_VIEW)
        if tls.failure is not None:
            self._send_alert(tls)
            if not n:
                raise tls.failure
        return bytes(_PLAINTEXT_VIEW[:n]) if n else b"" if tls.ended else None

    def _send_output(self, tls: TlsStream | None) -> None:
        """Send what TLS has for the peer, as far as the socket takes it."""
        if tls is not None and tls.output:
            self._unsent += tls.output
            tls.output = b""
            self._flush()

    def _send_alert(self, tls: TlsStream) -> None:
        if not self._unsent:
            with contextlib.suppress(OSError):
                self.sock.send(tls.output)
        tls.output = b""

    async def send(self, data: bytes, *, last: bool = False) -> None:
        """Send all of `data`. If it is the `last`, it waits for the end, to leave in one segment with it."""
        while data := self.send_now(data, last=last):
            await self.wakeup.wait()

    def send_now(self, data: bytes, *, last: bool = False) -> bytes:
        """Send what is possible without waiting; return the rest. An event follows when more can be sent.

        With TLS, the rest must be offered again, and may be followed by more: a part of it is encrypted already. If the
        data is the `last`, `end` and a FIN must follow at once.
        """
        if self.tls is None:
            with contextlib.suppress(BlockingIOError):
                data = data[self.sock.send(data) :]
        elif not self._unsent or self._flush():
            while data := data[self._begun :]:
                chunk = data[:MAX_SEND]
                self._begun, self._unsent = len(chunk), self.tls.send(chunk)
                if not self._flush(socket.MSG_MORE if last and len(chunk) == len(data) else 0):
                    break
            else:
                self._begun = 0
        if data:
            self.watch_writability()
        return data

    def _flush(self, flags: int = 0) -> bool:
        """Send what is encrypted; return whether the socket took all of it."""
        with contextlib.suppress(BlockingIOError):
            self._unsent = self._unsent[self.sock.send(self._unsent, flags) :]
        return not self._unsent

    def end(self) -> None:
        """Send close_notify if there is TLS, to leave in one segment with the FIN that must follow. It never waits."""
        if self.tls is not None and not self._unsent:
            with contextlib.suppress(OSError):
                self.sock.send(self.tls.close(), socket.MSG_MORE)


def get_address(sock: socket.socket, *, peer: bool) -> tuple[str, int] | None:
    """Return a socket's own or its peer's address; None for a Unix socket or a closed connection."""
    try:
        found = sock.getpeername() if peer else sock.getsockname()
    except OSError:
        return None
    return (found[0], found[1]) if isinstance(found, tuple) else None
