"""Origins: servers in threads of the test's own process.

Tested by tests/e2e/test_testing_fixtures.py.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from multidict import CIMultiDict, CIMultiDictProxy
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, RejectConnection, Request
from wsproto.utilities import RemoteProtocolError

from tlstunnel.testing.messages import echo, read_events
from tlstunnel.testing.program import TIMEOUT


@dataclass(frozen=True, slots=True)
class OriginRequest:
    """A request that reached an origin: its target, its fields by name, and the bytes of its head."""

    target: str
    headers: CIMultiDictProxy[str]
    head: bytes


class RawOrigin:
    """A TCP (or, with `path`, Unix) server that runs ``handler(sock)`` in a thread for each connection.

    The socket is closed when the handler returns. What a handler raises fails the test at the end of the ``with``,
    except for `ConnectionError`: a peer that goes away is usually what the test is about. `port` asks for that port,
    to start again where an earlier server was. `backlog` is that of `listen`.
    """

    def __init__(
        self, handler: Callable[[socket.socket], None], *, port: int = 0, path: Path | None = None, backlog: int = 1024
    ) -> None:
        self._handler = handler
        self._failures: list[BaseException] = []
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._acceptor = threading.Thread(target=self._accept, name="accept of an origin", daemon=True)
        self.connections = 0
        """How many it has accepted so far."""
        self.port = 0
        """Its TCP port; 0 on a Unix socket."""
        if path is None:
            self._listener = socket.create_server(("127.0.0.1", port), backlog=backlog)
            self.port = self._listener.getsockname()[1]
            self.address = f"127.0.0.1:{self.port}"
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen(backlog)
            self.address = f"unix:{path}"

    def __enter__(self) -> Self:
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() does not
        self._acceptor.join(TIMEOUT)
        self._listener.close()
        with self._lock:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + TIMEOUT
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if error is None and self._failures:
            raise self._failures[0]
        if error is None:
            assert not any(thread.is_alive() for thread in self._threads), "an origin's handler does not return"

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._run, args=(sock,), name="connection of an origin", daemon=True)
            with self._lock:
                self.connections += 1
                self._sockets.add(sock)
                self._threads = [other for other in self._threads if other.is_alive()]
                self._threads.append(thread)
                thread.start()

    def _run(self, sock: socket.socket) -> None:
        try:
            self._handler(sock)
        except ConnectionError:
            pass
        except BaseException as error:  # raised again in the test's own thread
            self._failures.append(error)
        finally:
            with self._lock:
                self._sockets.discard(sock)
            sock.close()


class EdgeOrigin:
    """A WebSocket server on a free port of 127.0.0.1. Its `address` is what a configuration needs.

    It accepts every upgrade, with the first subprotocol that the client offers, and sends every message back.
    `requests` are the requests that reached it, oldest first.
    """

    def __init__(self) -> None:
        self.requests: list[OriginRequest] = []
        self._server = RawOrigin(self._serve)
        self.address = self._server.address

    def __enter__(self) -> Self:
        self._server.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        self._server.__exit__(kind, error, trace)

    def _serve(self, sock: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (some := sock.recv(65536)):
                return  # such as a health check
            head += some
        self.requests.append(_parse_request(head.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"))
        ws = WSConnection(ConnectionType.SERVER)
        try:
            events = read_events(sock, ws, head)
            request = next(events)
            assert isinstance(request, Request)
            sock.sendall(ws.send(AcceptConnection(subprotocol=next(iter(request.subprotocols), None))))
            for response in echo(events):
                sock.sendall(ws.send(response))
        except RemoteProtocolError as error:  # not an upgrade: a site with http = "pass" passes these on
            if isinstance(error.event_hint, RejectConnection):
                sock.sendall(ws.send(error.event_hint))


def parse_fields(pairs: Iterable[tuple[bytes, bytes]]) -> CIMultiDictProxy[str]:
    """Return header fields by name, decoded as latin-1."""
    return CIMultiDictProxy(CIMultiDict([(n.decode("latin-1"), v.decode("latin-1")) for n, v in pairs]))


def _parse_request(head: bytes) -> OriginRequest:
    line, *fields = head[:-4].split(b"\r\n")
    pairs = [(name, value.strip()) for name, _, value in (field.partition(b":") for field in fields)]
    return OriginRequest(line.split(b" ")[1].decode("latin-1"), parse_fields(pairs), head)
