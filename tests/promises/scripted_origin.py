"""An origin that follows a test's script and records every byte that reaches it."""

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
"""Returns the bytes to send in response to a request."""
Then = Literal["keep", "end", "reset"]
"""What to do after the response: keep reading until the peer ends, end (and keep reading), or reset."""

SMUGGLED = b"GET /internal/secrets HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""What a client sends after its handshake, which no origin may see before a verified 101."""


class Traffic:
    """What reached the origin while it followed one script: request heads, and in `surplus` the bytes after them."""

    def __init__(self, script: Script, then: Then, after: threading.Event | None) -> None:
        self.script = script
        self.then = then
        self.after = after
        self.heads: list[bytes] = []
        self.surplus = b""
        self.connections = self.ended = 0

    def surplus_at_end(self, connections: int = 1) -> bytes:
        """Wait until `connections` have ended, so that nothing can follow; return the surplus."""
        eventually(lambda: self.ended >= connections)
        return self.surplus

    def record(self, tunnel: Tunnel) -> Record:
        """Return the tunnel's record of the only connection, found by the request id that the origin received."""
        eventually(lambda: self.heads)
        given = re.search(rb"\r\nX-Request-Id: ([0-9a-f]+)\r\n", self.heads[0])
        assert given, self.heads
        return record_of(tunnel, given[1].decode())


def record_of(tunnel: Tunnel, request_id: str | email.message.Message) -> Record:
    """Return the record of the connection with this request id, or of the one whose response has these fields."""
    wanted = request_id if isinstance(request_id, str) else request_id["X-Request-Id"]
    return tunnel.wait_record(lambda record: record["event"] == "connection" and record["id"] == wanted)


class ScriptedOrigin:
    """An origin whose new connections follow the script of the last `play`."""

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
        """Respond with `script` from now on, wait for `after` if given, and do `then`. Return its traffic."""
        self._now = Traffic(script if callable(script) else lambda _: script, then, after)
        return self._now

    def _handle(self, sock: socket.socket) -> None:
        traffic = self._now
        traffic.connections += 1
        try:
            request = read_request(sock)
            traffic.heads.append(request.head)
            traffic.surplus += request.leftover
            with contextlib.suppress(ConnectionError):  # the tunnel has often closed the connection already
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
