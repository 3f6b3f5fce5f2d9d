"""One connection to a server: commands in order, many at once, and why it failed.

A client library with a pool of connections would not do: what makes counts exact is that all commands of a process are
executed in the order in which they were sent, and that none is repeated without its number. A command whose reply is no
longer awaited stays in the queue, so that no reply is taken for that of another.
"""

import asyncio
import re
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import hiredis

from tlstunnel.escaping import printable, shorten
from tlstunnel.state.valkey.address import Endpoint
from tlstunnel.state.valkey.replies import INCOMPLETE, Replies

_LONGEST_REASON = 200

Command = tuple[bytes | str | int, ...]
Done = Callable[[object], None]
"""Receives the reply, or an exception: `ServerUnavailable` if the connection was lost."""

_REASONS: Final = {
    "WRONGPASS": "it does not accept the user or the password of state.url and state.password_file",
    "LOADING": "it is loading its data",
    "READONLY": "it is a read-only replica",
    "MASTERDOWN": "it is a replica that has lost its primary",
    "OOM": "its memory is full (maxmemory)",
    "MISCONF": "it refuses to write, since it cannot save its data",
    "NOREPLICAS": "it refuses to write, since it has too few replicas",
    "CLUSTERDOWN": "the cluster is down",
    "BUSY": "it is busy with another script",
    "TRYAGAIN": "the cluster is moving our keys to another node",
    "ASK": "the cluster is moving our keys to another node",
    "NOSCRIPT": "it has forgotten our scripts",
}


_FORBIDDEN: Final = re.compile(r"The user executing the script can't|ACL failure in script")
"""How Redis 7 and 8 say within a script what they otherwise call NOPERM."""


class ServerUnavailable(Exception):
    """No answer can be had from the server. `str` is the reason, escaped.

    `moved_to` is where a cluster has our keys.
    """

    def __init__(self, reason: str, moved_to: Endpoint | None = None) -> None:
        super().__init__(reason)
        self.moved_to = moved_to


class PasswordRequired(ServerUnavailable):
    """The server requires a password, and got none."""


def explain_error(error: Exception) -> ServerUnavailable:
    """Return what an error means: one that the server has replied, or a failure of the socket."""
    if isinstance(error, ServerUnavailable):
        return error
    if isinstance(error, hiredis.ReplyError):
        return _explain_reply(str(error))
    if isinstance(error, hiredis.ProtocolError):
        return ServerUnavailable("what it sends is not the protocol of a Valkey or Redis server")
    return ServerUnavailable(_explain_failure(error))


def _explain_failure(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it does not answer"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({_clean(error.verify_message)})"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({_clean(getattr(error, 'reason', None) or str(error))})"
    if isinstance(error, OSError):
        return _clean(error.strerror or str(error))
    return _clean(str(error))


def _explain_reply(text: str) -> ServerUnavailable:
    code, _, rest = text.partition(" ")
    if code == "MOVED":
        host, _, port = rest.partition(" ")[2].rpartition(":")
        if port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536:
            return ServerUnavailable("the cluster has moved our keys to another node", Endpoint(host, int(port)))
    if code == "NOAUTH":
        return PasswordRequired("it requires a password; set one in state.url or state.password_file")
    if code == "NOPERM" or _FORBIDDEN.search(text):
        return ServerUnavailable(f"its user lacks a permission ({_clean(rest)}); see docs/state.md")
    if text.startswith("ERR AUTH") and "without any password" in text:
        return ServerUnavailable("it has no password, but state.url or state.password_file has one")
    return ServerUnavailable(_REASONS.get(code) or f"it answers: {_clean(text)}")


def _clean(text: str) -> str:
    return shorten(printable(text), _LONGEST_REASON)


class Connection(asyncio.Protocol):
    """Sends commands, all of one turn of the loop at once, and gives each reply to the function that waits for it.

    `on_lost` is called once, after the functions of all commands that were not answered. `lost` is then the reason.
    """

    def __init__(self) -> None:
        self.on_lost: Callable[[], None] | None = None
        self.lost: ServerUnavailable | None = None
        self._loop = asyncio.get_running_loop()
        self._replies = Replies()
        self._waiting: deque[Done] = deque()
        self._transport: asyncio.Transport | None = None
        self._unsent: list[bytes] = []
        self._reason: ServerUnavailable | None = None
        self._ended = asyncio.Event()

    @property
    def waiting(self) -> int:
        """The number of commands that were not answered yet."""
        return len(self._waiting)

    def send(self, command: Command, done: Done) -> None:
        """Send a command. `done` is called with the reply."""
        if self.lost is not None:
            self._loop.call_soon(done, self.lost)
            return
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(hiredis.pack_command(command))  # type: ignore[arg-type] # they say of one element
        self._waiting.append(done)

    async def call(self, *command: bytes | str | int) -> Any:
        """Send a command and return the reply. Raises ServerUnavailable, also for a reply that is an error."""
        future: asyncio.Future[object] = self._loop.create_future()
        self.send(command, lambda reply: None if future.done() else future.set_result(reply))
        reply = await future
        if isinstance(reply, Exception):
            raise explain_error(reply)
        return reply

    def close(self, reason: ServerUnavailable | None = None) -> None:
        """Close the connection at once."""
        self._reason = self._reason or reason or ServerUnavailable("it is disconnected")
        if self._transport is not None:
            self._transport.abort()

    async def wait_lost(self) -> ServerUnavailable:
        """Return why the connection was lost, once it is."""
        await self._ended.wait()
        assert self.lost is not None
        return self.lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        try:
            self._replies.feed(data)
            while self._waiting and (reply := self._replies.get()) is not INCOMPLETE:
                self._waiting.popleft()(reply)
            if not self._waiting and self._replies.waiting:
                raise hiredis.ProtocolError("a reply to nothing")
        except hiredis.ProtocolError as error:
            self.close(explain_error(error))

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        closed = ServerUnavailable("it closed the connection")
        self.lost = self._reason or (closed if error is None else explain_error(error))
        while self._waiting:
            self._waiting.popleft()(self.lost)
        self._ended.set()
        if self.on_lost is not None:
            self.on_lost()

    def _flush(self) -> None:
        if self._transport is not None and self._reason is None:
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()


async def open_connection(endpoint: Endpoint, tls: ssl.SSLContext | None) -> Connection:
    """Connect. Raises ServerUnavailable."""
    loop = asyncio.get_running_loop()
    try:
        if endpoint.path:
            _, connection = await loop.create_unix_connection(Connection, endpoint.path)
        else:
            _, connection = await loop.create_connection(Connection, endpoint.host, endpoint.port, ssl=tls)
    except (OSError, ValueError, OverflowError) as error:  # the last two for a host or a port that a server has named
        raise explain_error(error) from None
    return connection
