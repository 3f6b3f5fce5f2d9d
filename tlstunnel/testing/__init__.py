"""pytest's fixtures for those who write edge workers: the real tunnel with a worker, and real origins behind it.

In a `conftest.py` or a test module::

    pytest_plugins = ["tlstunnel.testing"]

    def test_a_stranger_is_sent_away(edge_tunnel):
        tunnel = edge_tunnel("edge/chat.py:fetch", config={"sessions": "redis://localhost:6379/0"})
        answer = tunnel.handshake("/chat", headers={"Cookie": "sid=1"})
        assert (answer.status, answer.request) == (401, None)

`EdgeTunnel` and `EdgeOrigin` are context managers too, for a fixture of one's own that lives for a whole module;
`upgrade_request` is for a test of the function alone. Time-outs are in seconds.

PYTEST_DONT_REWRITE: or pytest warns of whoever imports these names above `pytest_plugins`.
"""

import base64
import contextlib
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h11
import pytest
from multidict import CIMultiDict, CIMultiDictProxy
from wsproto import ConnectionType, WSConnection
from wsproto.connection import Connection as Frames
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Message,
    Ping,
    RejectConnection,
    Request,
    TextMessage,
)
from wsproto.utilities import RemoteProtocolError

from tlstunnel.certificates import issue
from tlstunnel.cli.shown import inline
from tlstunnel.edge import ClientCertificate, UpgradeRequest
from tlstunnel.edge.values import upgrade_request as seen
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import RequestReader
from tlstunnel.handshake.text import build_head

PATIENCE = 15.0
"""How long anything may take before a test fails: generous, since only a failing test waits for all of it."""

Headers = Mapping[str, str] | Iterable[tuple[str, str]]
"""Fields: by name, or in pairs, where a name occurs twice."""

Record = dict[str, Any]
"""A line of the tunnel's log, decoded: docs/log.md."""


@dataclass(frozen=True, slots=True)
class OriginRequest:
    """A request as it reached an origin: its target, its fields by name, and the head as the bytes that it was."""

    target: str
    headers: CIMultiDictProxy[str]
    head: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one handshake.

    `body` is that of a refusal. `request` is what reached an origin, None where nothing did. `record` is the tunnel's
    record of the connection. `messages` are those that the origin sent back.
    """

    status: int
    headers: CIMultiDictProxy[str]
    body: str
    request: OriginRequest | None
    record: Record
    messages: tuple[str | bytes, ...] = ()


class EdgeOrigin:
    """A WebSocket server on a free port of 127.0.0.1: `address`, as a configuration names it.

    It accepts every upgrade, with the first subprotocol that is offered, and sends every message back. `requests` are
    those that reached it, oldest first.
    """

    def __init__(self) -> None:
        self.requests: list[OriginRequest] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept, name="edge origin", daemon=True)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which closing does not
        self._threads[0].join(PATIENCE)
        self._listener.close()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join(PATIENCE)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(sock,), name="edge origin's connection", daemon=True)
            with self._lock:
                self._open.add(sock)
                self._threads = [one for one in self._threads if one.is_alive()] + [thread]
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock, contextlib.suppress(OSError):
                self._converse(sock)
        finally:
            with self._lock:
                self._open.discard(sock)

    def _converse(self, sock: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (some := sock.recv(65536)):
                return  # a health check, say
            head += some
        self.requests.append(_arrived(head.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"))
        ws = WSConnection(ConnectionType.SERVER)
        try:
            events = _events(sock, ws, head)
            request = next(events)
            assert isinstance(request, Request)
            sock.sendall(ws.send(AcceptConnection(subprotocol=next(iter(request.subprotocols), None))))
            for answer in _answers(events):
                sock.sendall(ws.send(answer))
        except RemoteProtocolError as error:  # no upgrade, which a site with http = "pass" may send
            if isinstance(error.event_hint, RejectConnection):
                sock.sendall(ws.send(error.event_hint))


class EdgeTunnel:
    """``tlstunnel start`` with one site that has a worker, from entering the ``with`` to leaving it.

    `worker` is what a configuration says, ``FILE:FUNCTION`` or ``PACKAGE.MODULE:FUNCTION``; a file is taken from the
    working directory, where the tunnel runs too, and it imports what the test does. `config` is the site's
    ``worker_config``. `origins` are the site's, one `EdgeOrigin` where there is none; `worker_origins` are others that
    the worker may choose. `names` are the site's, beside localhost. `site` and `top` are more of the configuration
    (TOML): the site's, and what stands above the sites.

    Raises AssertionError, which has the log, when the tunnel does not start, and at the end when it does not exit
    with 0.
    """

    def __init__(  # noqa: PLR0913 - what a configuration may have
        self,
        worker: str,
        *,
        config: Mapping[str, Any] | None = None,
        origins: Sequence[EdgeOrigin | str] = (),
        worker_origins: Sequence[EdgeOrigin | str] = (),
        names: Sequence[str] = (),
        site: str = "",
        top: str = "",
    ) -> None:
        self._worker, self._config, self._site, self._top = worker, config or {}, site, top
        self._names = [*dict.fromkeys([*names, "localhost"])]
        self._origins, self._worker_origins = list(origins), list(worker_origins)
        self._stack = contextlib.ExitStack()
        self._changed = threading.Condition()
        self._asking = threading.Lock()
        self._lines: list[str] = []
        self._records: list[Record] = []
        self.port = 0
        """Where it listens, on 127.0.0.1."""

    def __enter__(self) -> Self:
        __tracebackhide__ = True
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-tunnel-")))
            if not self._origins:
                self._origins.append(stack.enter_context(EdgeOrigin()))
            self._start(folder)
            stack.callback(self._end)
            self._wait(lambda: self._found(0, event="ready"), "the tunnel did not start")
            self.port = int(self.log_of("listening")[0]["address"].rpartition(":")[2])
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        with self._stack:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
            status = self._end()
        if error is None and status != 0:
            raise AssertionError(f"the tunnel exited with {status}; its log:\n{self.text}")

    @property
    def uri(self) -> str:
        """Where a client connects to."""
        return f"wss://localhost:{self.port}/"

    @property
    def ca(self) -> Path:
        """The certificate of the authority that a client has to trust, PEM."""
        return self._ca

    @property
    def context(self) -> ssl.SSLContext:
        """For a client in Python that trusts it, and nothing else."""
        return ssl.create_default_context(cafile=self._ca)

    @property
    def origin(self) -> EdgeOrigin:
        """The first of the site's origins that are `EdgeOrigin`."""
        return next(one for one in self._origins if isinstance(one, EdgeOrigin))

    @property
    def log(self) -> list[Record]:
        """The log so far."""
        with self._changed:
            return [*self._records]

    @property
    def text(self) -> str:
        """The log so far, as it was written, with what is no record."""
        with self._changed:
            return "".join(self._lines)

    def log_of(self, event: str, **fields: object) -> list[Record]:
        """The records so far of that event, with these fields."""
        return self._found(0, event=event, **fields)

    def wait_for(self, event: str, **fields: object) -> Record:
        """The first record of that event with these fields, past or to come. Raises AssertionError, with the log."""
        __tracebackhide__ = True
        return self._wait(lambda: self._found(0, event=event, **fields), f"no record {event!r} with {fields}")[0]

    def handshake(  # noqa: PLR0913 - what a handshake may have
        self,
        path: str = "/",
        *,
        headers: Headers = (),
        subprotocols: Sequence[str] = (),
        messages: Sequence[str | bytes] = (),
        host: str = "localhost",
        client_address: str = "127.0.0.1",
    ) -> Answer:
        """Do one real handshake; of a tunnel that comes of it, send `messages`, wait for as many, and close it.

        `path` may have a query. `host` is one of the site's names. `client_address` is one of 127.0.0.0/8, each of
        which is another client. Raises AssertionError: there was no answer.
        """
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        fields = [*_pairs(headers, subprotocols), ("Sec-WebSocket-Key", key)]
        sent = build_head(f"GET {path}", fields, host)
        address = "127.0.0.1", self.port
        with self._asking:
            before = len(self.log)
            with (
                socket.create_connection(address, PATIENCE, (client_address, 0)) as plain,
                self.context.wrap_socket(plain, server_hostname=host) as sock,
            ):
                sock.sendall(sent)
                status, answered, body, echoed = _conversed(sock, messages)
            # A tunnel's refusal names its id; otherwise it is the one connection that ended meanwhile.
            known = {"id": answered["X-Request-Id"]} if "X-Request-Id" in answered else {"path": path.partition("?")[0]}
            ended = {"event": "connection", "status": status, **known}
            record = self._wait(lambda: self._found(before, **ended), "the connection has no record")[0]
        # By the key, which no worker can change.
        reached = next((one for one in self._arrived() if one.headers.get("Sec-WebSocket-Key") == key), None)
        return Answer(status, answered, body.decode("utf-8", "replace"), reached, record, echoed)

    def _arrived(self) -> Iterator[OriginRequest]:
        for origin in (*self._origins, *self._worker_origins):
            if isinstance(origin, EdgeOrigin):
                yield from origin.requests

    def _start(self, folder: Path) -> None:
        issued = issue.create([*self._names, "127.0.0.1"], folder)
        self._ca = issued.ca
        place, _, function = self._worker.rpartition(":")
        worker = f"{Path(place).resolve()}:{function}" if place.endswith(".py") else self._worker
        site = {
            "names": self._names,
            "cert": str(issued.cert),
            "key": str(issued.key),
            "origins": [one.address if isinstance(one, EdgeOrigin) else one for one in self._origins],
            "worker": worker,
            "worker_config": self._config,
        }
        if self._worker_origins:
            hosts = [one.address if isinstance(one, EdgeOrigin) else one for one in self._worker_origins]
            site["worker_origins"] = [host.partition(":")[0] if host.count(":") == 1 else host for host in hosts]
        written = "\n".join(f"{name} = {inline(value)}" for name, value in site.items())
        file = folder / "tlstunnel.toml"
        file.write_text(f'listen = ["127.0.0.1:0"]\n{self._top}\n[[sites]]\n{written}\n{self._site}\n')
        command = [sys.executable, "-m", "tlstunnel", "start", "--log-format", "json"]
        self._process = subprocess.Popen(  # noqa: S603 - this program
            [*command, "--config", str(file), "--control", str(folder / "control.sock")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="backslashreplace",
            start_new_session=True,  # a Ctrl-C is for pytest, which ends this
        )
        self._reader = threading.Thread(target=self._read_log, name="the tunnel's log", daemon=True)
        self._reader.start()

    def _end(self) -> int:
        """Make sure that it has ended, with all that it started, and give its status."""
        status = self._process.poll()
        if status != 0:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            status = self._process.wait()
        self._reader.join(PATIENCE)
        if self._process.stderr is not None:
            self._process.stderr.close()
        return status

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            try:
                record = json.loads(line)
            except ValueError:  # before the log begins, an error is a line for people
                record = None
            with self._changed:
                self._lines.append(line)
                if isinstance(record, dict):
                    self._records.append(record)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _found(self, start: int, **fields: object) -> list[Record]:
        with self._changed:
            return [one for one in self._records[start:] if all(one.get(k) == v for k, v in fields.items())]

    def _wait(self, find: Callable[[], list[Record]], otherwise: str) -> list[Record]:
        __tracebackhide__ = True
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            while not (found := find()):
                left = deadline - time.monotonic()
                if left <= 0 or not self._reader.is_alive():
                    why = f"within {PATIENCE:g} s" if self._reader.is_alive() else "before it ended"
                    raise AssertionError(f"{otherwise} {why}; its log:\n{''.join(self._lines)}")
                self._changed.wait(min(left, 0.5))
        return found


@pytest.fixture
def edge_origin() -> Iterator[Callable[[], EdgeOrigin]]:
    """Origins for this test: each call gives another `EdgeOrigin`."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(EdgeOrigin())


@pytest.fixture
def edge_tunnel(
    request: pytest.FixtureRequest, edge_origin: Callable[[], EdgeOrigin]
) -> Iterator[Callable[..., EdgeTunnel]]:
    """Tunnels for this test: called as `EdgeTunnel` is, gives it running. Of a test that fails, the logs are shown."""

    def start(*arguments: Any, **options: Any) -> EdgeTunnel:
        __tracebackhide__ = True
        tunnel = stack.enter_context(EdgeTunnel(*arguments, **options))
        shown.callback(lambda: request.node.add_report_section("teardown", "log of the tunnel", tunnel.text))
        return tunnel

    with contextlib.ExitStack() as shown, contextlib.ExitStack() as stack:
        yield start


def upgrade_request(  # noqa: PLR0913 - what a worker sees of a request
    request: str = "GET /",
    *,
    headers: Headers = (),
    subprotocols: Sequence[str] = (),
    client_address: str = "127.0.0.1",
    site: str = "localhost",
    client_certificate: ClientCertificate | None = None,
    request_id: str = "0123456789abcdef",
) -> UpgradeRequest:
    """A request as a worker gets it, for a test of the function alone: ``upgrade_request("GET /chat?room=1")``.

    What every WebSocket handshake has is added. Raises ValueError: the tunnel would refuse it before the worker.
    """
    try:
        read = RequestReader().feed(build_head(request, _pairs(headers, subprotocols), site))
    except Refusal as refusal:
        raise ValueError(f"the tunnel refuses this with {refusal.status}: {refusal.text}") from None
    if read is None:  # pragma: no cover - build_head gives a whole one
        raise ValueError("this is no whole request")
    subject, der = (client_certificate.subject, client_certificate.der) if client_certificate else ("", None)
    connection = Connection(
        ip=client_address,
        tls_version="TLSv1.3",
        tls_cipher="TLS_AES_256_GCM_SHA384",
        tls_sni=read.host,
        tls_ja4="t13d1516h2_8daaf6152771_02713d6af862",
        client_subject=subject,
        site=site,
    )
    return seen(read, connection, request_id, der, time.time())


def _events(sock: socket.socket, ws: WSConnection | Frames, begun: bytes) -> Generator[Event, None, None]:
    """What comes, until the other side ends; `begun` has come already."""
    data = begun or sock.recv(65536)
    while data:
        ws.receive_data(data)
        yield from ws.events()
        data = sock.recv(65536)


def _answers(events: Iterable[Event]) -> Iterator[Event]:
    """What an echoing side sends for each event. Whole messages: a side that sends one does not read meanwhile."""
    for event in _whole(events):
        if isinstance(event, Message):
            yield event
        elif isinstance(event, Ping | CloseConnection):
            yield event.response()
        if isinstance(event, CloseConnection):
            return


def _whole(events: Iterable[Event]) -> Iterator[Event]:
    parts: list[Any] = []
    for event in events:
        if not isinstance(event, Message):
            yield event
            continue
        parts.append(event.data)
        if event.message_finished:
            yield _message("".join(parts) if isinstance(event.data, str) else b"".join(parts))
            parts.clear()


def _message(data: str | bytes) -> Event:
    return TextMessage(data) if isinstance(data, str) else BytesMessage(data)


_Conversed = tuple[int, CIMultiDictProxy[str], bytes, tuple[str | bytes, ...]]


def _conversed(sock: socket.socket, messages: Sequence[str | bytes]) -> _Conversed:
    """Read the answer to a handshake; send messages and read as many; close. Raises AssertionError."""
    reading = h11.Connection(h11.CLIENT)
    asked = [("Host", "localhost"), ("Connection", "Upgrade"), ("Upgrade", "websocket")]
    reading.send(h11.Request(method="GET", target="/", headers=asked))  # has been sent, in the test's own words
    head: h11.Response | h11.InformationalResponse | None = None
    body = bytearray()
    while not isinstance(event := reading.next_event(), h11.EndOfMessage | h11.PAUSED):
        if event is h11.NEED_DATA:
            reading.receive_data(sock.recv(65536))
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.Response | h11.InformationalResponse):
            head = event
        else:
            raise AssertionError(f"the tunnel ended the connection without a whole answer: {event}")
    assert head is not None
    echoed: list[str | bytes] = []
    if head.status_code == 101:
        ws = Frames(ConnectionType.CLIENT)
        events = _whole(_events(sock, ws, reading.trailing_data[0]))
        for message in messages:
            sock.sendall(ws.send(_message(message)))
            reply = next(events, None)
            assert isinstance(reply, Message), reply
            echoed.append(reply.data)
        sock.sendall(ws.send(CloseConnection(1000)))
        list(events)  # up to the end, which is then the origin's
    return head.status_code, _fields(head.headers), bytes(body), tuple(echoed)


def _arrived(head: bytes) -> OriginRequest:
    line, *fields = head[:-4].split(b"\r\n")
    pairs = [(name, value.strip()) for name, _, value in (field.partition(b":") for field in fields)]
    return OriginRequest(line.split(b" ")[1].decode("latin-1"), _fields(pairs), head)


def _fields(pairs: Iterable[tuple[bytes, bytes]]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict([(n.decode("latin-1"), v.decode("latin-1")) for n, v in pairs]))


def _pairs(headers: Headers, subprotocols: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [*(headers.items() if isinstance(headers, Mapping) else headers)]
    return pairs + ([("Sec-WebSocket-Protocol", ", ".join(subprotocols))] if subprotocols else [])
