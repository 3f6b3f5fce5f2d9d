"""The HTTP server: uvicorn's protocols on the loop of the process, with limits on connections, time and memory.

uvicorn's own server is not used: it handles signals, wakes up ten times a second, has no limit on connections that send
nothing, and no timeout for a request that does not end.

Tested by tests/promises/test_admin_security.py.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.wsproto_impl import WSProtocol
from uvicorn.server import ServerState
from wsproto import events

from tlstunnel.admin.access import Peer
from tlstunnel.admin.app import MOST_HEAD
from tlstunnel.admin.live import LONGEST_MESSAGE

MOST_CONNECTIONS = 256
"""Connections at once. For another one, that which has waited longest for its client is closed."""

HEAD_SECONDS = 10.0
"""How long the TLS handshake and the head of the first request may take, and the head of a request from its begin."""

IDLE_SECONDS = 60.0
"""How long a connection may be without a request."""

BODY_SECONDS = 10.0
"""How long the body of a request may take."""

LINGER_SECONDS = 2.0
"""How long the rest of an unwanted body is read: closing at once would lose the response that refuses it."""

RESPONSE_SECONDS = 60.0
"""How long it may take to make a response, and to receive it."""

MOST_UNSENT = 32 << 20
"""Bytes of responses that wait until their clients receive them. A list of ten thousand sites has 3 MiB."""

READ_BYTES = 1_024
"""Read at once from a connection, then others have their turn: it has up to 170 frames or parts of a body, which take
some milliseconds. Asyncio reads 256 KiB at once, which take a second."""

_ACCEPTED_AT_ONCE = 64
_PAUSE_SECONDS = 0.1
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_CREDENTIALS = struct.Struct("iII")


class Connection:
    """A connection of a client. It can be closed for another one while it is `waiting` for its client."""

    def __init__(self, sock: socket.socket, on_end: "Callable[[Connection], None]") -> None:
        self.waiting = True
        self._sock = sock
        self._on_end = on_end
        self._transport: asyncio.Transport | None = None
        self._opening: asyncio.Task[Any] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def open(self, factory: Callable[[], asyncio.Protocol], context: ssl.SSLContext | None) -> None:
        """Begin."""
        self.set_deadline(HEAD_SECONDS)
        self._opening = asyncio.ensure_future(self._open(factory, context))

    def begin(self, transport: asyncio.Transport) -> None:
        """Note that the TLS handshake, if there is one, is complete."""
        self._transport = transport

    def set_deadline(self, seconds: float | None, *, waiting: bool = True) -> None:
        """Close the connection in so many seconds, unless this is called again before. `waiting` is for its client."""
        self.waiting = waiting
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if seconds is not None:
            self._deadline = asyncio.get_running_loop().call_later(seconds, self._expire)

    @property
    def unsent(self) -> int:
        """How many bytes of its response wait to be sent."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def abort(self) -> None:
        """Close it at once, whatever it has not received."""
        if self._transport is not None:
            self._transport.abort()
        elif self._opening is not None:
            self._opening.cancel()

    def _expire(self) -> None:
        transport = self._transport
        if transport is None or transport.get_write_buffer_size() or transport.get_extra_info("ssl_object") is not None:
            self.abort()  # an orderly end could take as long as the client likes
        else:
            transport.close()

    def end(self) -> None:
        """Note that it is closed."""
        self.set_deadline(None)
        self._on_end(self)

    async def _open(self, factory: Callable[[], asyncio.Protocol], context: ssl.SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(factory, self._sock, ssl=context)
        except (OSError, asyncio.CancelledError):  # ssl.SSLError among them
            self._sock.close()
            self.end()


class HttpServer:
    """Serves `app` at one listening socket after another. `show` returns the address of a client as it may be shown."""

    def __init__(self, app: ASGIApp, show: Callable[[str], str] = str) -> None:
        # Clients cause most of what uvicorn logs, and the application logs its own errors.
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
        self._config = Config(
            app=app,
            http=_Http,
            ws=_WebSocket,
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=MOST_HEAD,
            timeout_keep_alive=86_400,  # `Connection` has the deadlines
            ws_max_size=LONGEST_MESSAGE,
            ws_per_message_deflate=False,
        )
        self._config.load()
        self._show = show
        self._state = ServerState()
        self._connections: OrderedDict[Connection, None] = OrderedDict()
        self._sock: socket.socket | None = None
        self._context: ssl.SSLContext | None = None
        self._resuming: asyncio.TimerHandle | None = None

    def listen(self, sock: socket.socket | None) -> None:
        """Accept at this socket from now on, and at no other. Connections that are open stay."""
        loop = asyncio.get_running_loop()
        if self._resuming is not None:
            self._resuming.cancel()
        if self._sock is not None:
            loop.remove_reader(self._sock)
            self._sock.close()
        self._sock = sock
        if sock is not None:
            sock.setblocking(False)
            loop.add_reader(sock, self._accept)

    def use(self, context: ssl.SSLContext | None) -> None:
        """Use this context for TLS from now on, or no TLS."""
        self._context = context

    def close_connections(self) -> None:
        """Close all connections at once."""
        for connection in list(self._connections):
            connection.abort()

    def close(self) -> None:
        """Stop accepting, and close everything."""
        self.listen(None)
        self.close_connections()

    def _accept(self) -> None:
        assert self._sock is not None
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self._pause()
                    return
                continue
            self._make_room()
            connection = Connection(sock, self._forget)
            self._connections[connection] = None
            connection.open(lambda connection=connection: self._make_protocol(connection), self._context)  # type: ignore[misc]

    def _make_protocol(self, connection: Connection) -> asyncio.Protocol:
        state = {"connection": connection, "limit_unsent": self._limit_unsent, "show": self._show}
        return _Http(config=self._config, server_state=self._state, app_state=state)

    def _make_room(self) -> None:
        """Close the connection that has waited longest for its client, if there are too many."""
        if len(self._connections) >= MOST_CONNECTIONS:
            oldest = next((one for one in self._connections if one.waiting), next(iter(self._connections)))
            self._connections.pop(oldest)
            oldest.abort()

    def _limit_unsent(self) -> None:
        """Close the connections with the most that waits to be sent, if that is too much of all together."""
        unsent = {connection: size for connection in self._connections if (size := connection.unsent)}
        total = sum(unsent.values())
        while total > MOST_UNSENT:
            largest = max(unsent, key=unsent.__getitem__)
            total -= unsent.pop(largest)
            largest.abort()

    def _forget(self, connection: Connection) -> None:
        self._connections.pop(connection, None)

    def _pause(self) -> None:
        loop = asyncio.get_running_loop()
        assert self._sock is not None
        loop.remove_reader(self._sock)
        self._resuming = loop.call_later(_PAUSE_SECONDS, self._resume)

    def _resume(self) -> None:
        if self._sock is not None:
            asyncio.get_running_loop().add_reader(self._sock, self._accept)


class _LittleAtOnce(asyncio.BufferedProtocol):
    """Passes on what is received in small parts, each in a turn of the loop of its own."""

    def get_buffer(self, _: int) -> memoryview:
        """Return where to write what is read next."""
        self._buffer = memoryview(bytearray(READ_BYTES))
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take so many bytes."""
        self.data_received(bytes(self._buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Take these bytes."""
        raise NotImplementedError


class _Http(_LittleAtOnce, H11Protocol):  # type: ignore[misc]  # both return None
    """uvicorn's HTTP/1.1, with deadlines."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._connection: Connection = self.app_state["connection"]
        self._upgraded = False
        self._busy = False
        self._lingering = False
        self._refused = False
        self._connection.begin(transport)
        peer = describe_peer(transport, self.app_state["show"])
        self.app_state = {
            **self.app_state,
            "peer": peer,
            "abort": self._connection.abort,
            "is_gone": transport.is_closing,
        }
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if not (self._busy or self._lingering) and self.conn.trailing_data[0] == b"":
            self._connection.set_deadline(HEAD_SECONDS)  # the begin of a request
        try:
            H11Protocol.data_received(self, data)
        except (h11.ProtocolError, UnicodeError):  # such as garbage while the response to a request is sent
            self._connection.abort()
            return
        self._update()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._upgraded = True
        self._connection.set_deadline(None, waiting=False)
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        """Respond to something that is not a request, and read on for a moment: closing at once would reset it."""
        body = msg.encode("ascii", "replace")
        fields = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        response = h11.Response(status_code=400, headers=fields, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._refused = True
        self._connection.set_deadline(LINGER_SECONDS)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.app_state["limit_unsent"]()
        self._update()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connection.end()

    def _update(self) -> None:
        """Set the deadline for what is awaited now."""
        if self._upgraded or self._refused or self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            if self.conn.their_state is h11.SEND_BODY:
                if not self._lingering:
                    self._connection.set_deadline(LINGER_SECONDS)
                self._lingering = True
            elif self._busy or self._lingering:
                self._connection.set_deadline(IDLE_SECONDS)
                self._lingering = False
            self._busy = False
        elif cycle.more_body:
            if not self._busy:
                self._connection.set_deadline(BODY_SECONDS)
            self._busy = True
        elif self._connection.waiting:
            self._connection.set_deadline(RESPONSE_SECONDS, waiting=False)
            self._busy = True


class _WebSocket(_LittleAtOnce, WSProtocol):  # type: ignore[misc]  # both return None
    """uvicorn's WebSocket, which reads no more from a client that reads no responses to its pings."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._connection: Connection = self.app_state["connection"]
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        try:
            WSProtocol.data_received(self, data)
        except Exception:
            self._connection.abort()

    def handle_ping(self, event: events.Ping) -> None:
        if not self.transport.is_closing():  # asyncio would log each response that cannot be sent
            super().handle_ping(event)

    def pause_writing(self) -> None:
        super().pause_writing()
        with contextlib.suppress(RuntimeError):
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.read_paused:
            with contextlib.suppress(RuntimeError):
                self.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connection.end()


def describe_peer(transport: asyncio.Transport, show: Callable[[str], str]) -> Peer:
    """Return who is at the other end of a connection. `show` returns an address as it may be shown."""
    sock = transport.get_extra_info("socket")
    if sock.family == socket.AF_UNIX:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(credentials)
        return Peer(client=f"uid {uid}", local="", uid=uid)
    secure = transport.get_extra_info("ssl_object") is not None
    certificate = transport.get_extra_info("peercert")
    peer, local = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    return Peer(
        client=show(str(peer[0])) if peer else "",
        local=str(local[0]) if local else "",
        secure=secure,
        certificate=_render_subject(certificate) if certificate else "",
    )


def _render_subject(certificate: Any) -> str:
    """Return the subject of a certificate: its common name, else its whole subject."""
    parts = [(name, value) for group in certificate.get("subject", ()) for name, value in group]
    names = [value for name, value in parts if name == "commonName"]
    return names[0] if names else ", ".join(f"{name}={value}" for name, value in parts) or "without a subject"
