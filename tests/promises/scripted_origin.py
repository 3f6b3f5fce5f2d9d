"""An origin that says what a test tells it to say, and writes down every byte that reaches it."""

import contextlib
import email.message
import re
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

from tests.harness import TIMEOUT, RawOrigin, Record, Request, Tunnel, eventually, read_request, reset

Script = Callable[[Request], bytes]
"""What to answer a request with, as the bytes to send."""
Then = Literal["keep", "end", "reset"]
"""What to do behind it: read on until the other side ends, end (and read on), or reset."""

SMUGGLED = b"GET /internal/secrets HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""What a client sends behind its handshake, which no origin may see before a verified 101."""


class Traffic:
    """What reached the origin while it followed one script: request heads, and in `surplus` what came behind them."""

    def __init__(self, script: Script, then: Then, after: threading.Event | None) -> None:
        self.script = script
        self.then = then
        self.after = after
        self.heads: list[bytes] = []
        self.surplus = b""
        self.connections = self.ended = 0

    def surplus_at_end(self, connections: int = 1) -> bytes:
        """Wait until that many connections have ended, so that nothing can follow; return what was too much."""
        eventually(lambda: self.ended >= connections)
        return self.surplus

    def record(self, tunnel: Tunnel) -> Record:
        """The tunnel's record of the one connection, found by the id that the origin was given."""
        eventually(lambda: self.heads)
        given = re.search(rb"\r\nX-Request-Id: ([0-9a-f]+)\r\n", self.heads[0])
        assert given, self.heads
        return record_of(tunnel, given[1].decode())


def record_of(tunnel: Tunnel, request_id: str | email.message.Message) -> Record:
    """The record of the connection with this id, or of the one that was answered with these fields."""
    wanted = request_id if isinstance(request_id, str) else request_id["X-Request-Id"]
    return tunnel.wait_record(lambda record: record["event"] == "connection" and record["id"] == wanted)


class ScriptedOrigin:
    """Follows the script that it was told last, on every connection that begins from then on."""

    def __init__(self) -> None:
        self._origin = RawOrigin(self._handle)
        self.address = self._origin.address
        self.play(b"")

    def __enter__(self) -> Self:
        self._origin.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._origin.__exit__(kind, error, trace)

    def play(self, script: Script | bytes, *, then: Then = "keep", after: threading.Event | None = None) -> Traffic:
        """Answer with ``script`` from now on, and then do ``then``, if given ``after`` that; note it down apart."""
        self._now = Traffic(script if callable(script) else lambda _: script, then, after)
        return self._now

    def _handle(self, sock: socket.socket) -> None:
        traffic = self._now
        traffic.connections += 1
        try:
            request = read_request(sock)
            traffic.heads.append(request.head)
            traffic.surplus += request.leftover
            with contextlib.suppress(ConnectionError):  # what is said here is often not listened to
                sock.sendall(traffic.script(request))
            if traffic.after is not None:
                assert traffic.after.wait(TIMEOUT)
            if traffic.then == "reset":
                return reset(sock)
            if traffic.then == "end":
                sock.shutdown(socket.SHUT_WR)
            while some := sock.recv(65536):
                traffic.surplus += some
        finally:
            traffic.ended += 1
