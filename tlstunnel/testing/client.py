"""The client's side of a handshake, and requests for tests of a worker's function alone.

Tested by tests/e2e/test_testing_fixtures.py.
"""

import base64
import secrets
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import h11
from multidict import CIMultiDictProxy
from wsproto import ConnectionType
from wsproto.connection import Connection as Frames
from wsproto.events import CloseConnection, Message

from tlstunnel.edge import ClientCertificate, WorkerRequest
from tlstunnel.edge.values import to_worker_request
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import RequestReader
from tlstunnel.handshake.text import build_head
from tlstunnel.testing.messages import join_messages, make_message, read_events
from tlstunnel.testing.origin import OriginRequest, parse_fields
from tlstunnel.testing.program import Record

Headers = Mapping[str, str] | Iterable[tuple[str, str]]
"""Header fields: by name, or as pairs, where a name occurs twice."""


@dataclass(frozen=True, slots=True)
class HandshakeResult:
    """The result of one handshake.

    `body` is that of a refusal. `request` is what reached an origin, or None. `record` is the tunnel's log record of
    the connection. `messages` are those that the origin sent back.
    """

    status: int
    headers: CIMultiDictProxy[str]
    body: str
    request: OriginRequest | None
    record: Record
    messages: tuple[str | bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Handshake:
    """A handshake to send: the bytes of its head, and the key that identifies it, which no worker can change."""

    head: bytes
    key: str


@dataclass(frozen=True, slots=True)
class Received:
    """What a client received: the response to its handshake, and the messages after it."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes
    messages: tuple[str | bytes, ...]


def make_handshake(path: str, headers: Headers, subprotocols: Sequence[str], host: str) -> Handshake:
    """Return a handshake with a random key and these fields."""
    key = base64.b64encode(secrets.token_bytes(16)).decode()
    fields = [*_list_fields(headers, subprotocols), ("Sec-WebSocket-Key", key)]
    return Handshake(build_head(f"GET {path}", fields, host), key)


def converse(sock: socket.socket, handshake: Handshake, messages: Sequence[str | bytes]) -> Received:
    """Send a handshake and read its response; after a 101, send `messages`, read as many, and close.

    Raises AssertionError: the response was incomplete.
    """
    __tracebackhide__ = True
    sock.sendall(handshake.head)
    http = h11.Connection(h11.CLIENT)
    stand_in = [("Host", "localhost"), ("Connection", "Upgrade"), ("Upgrade", "websocket")]
    http.send(h11.Request(method="GET", target="/", headers=stand_in))  # so that h11 expects a response
    head: h11.Response | h11.InformationalResponse | None = None
    body = bytearray()
    while not isinstance(event := http.next_event(), h11.EndOfMessage | h11.PAUSED):
        if event is h11.NEED_DATA:
            http.receive_data(sock.recv(65536))
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.Response | h11.InformationalResponse):
            head = event
        else:
            raise AssertionError(f"the tunnel closed the connection before the response was complete: {event}")
    assert head is not None
    echoed = _exchange(sock, http.trailing_data[0], messages) if head.status_code == 101 else ()
    return Received(head.status_code, parse_fields(head.headers), bytes(body), echoed)


def _exchange(sock: socket.socket, received: bytes, messages: Sequence[str | bytes]) -> tuple[str | bytes, ...]:
    """Send each message and wait for one in return; then close. `received` came with the response's head."""
    __tracebackhide__ = True
    echoed: list[str | bytes] = []
    ws = Frames(ConnectionType.CLIENT)
    events = join_messages(read_events(sock, ws, received))
    for message in messages:
        sock.sendall(ws.send(make_message(message)))
        event = next(events, None)
        assert isinstance(event, Message), event
        echoed.append(event.data)
    sock.sendall(ws.send(CloseConnection(1000)))
    list(events)  # wait until the origin has closed, too
    return tuple(echoed)


def worker_request(  # noqa: PLR0913 - what a worker sees of a request
    request: str = "GET /",
    *,
    headers: Headers = (),
    subprotocols: Sequence[str] = (),
    client_address: str = "127.0.0.1",
    site: str = "localhost",
    client_certificate: ClientCertificate | None = None,
    request_id: str = "0123456789abcdef",
) -> WorkerRequest:
    """Return a request as a worker gets it, for a test of its function alone: ``worker_request("GET /chat?room=1")``.

    The fields that every WebSocket handshake has are added. Raises ValueError if the tunnel would refuse the request
    before the worker sees it.
    """
    try:
        read = RequestReader().feed(build_head(request, _list_fields(headers, subprotocols), site))
    except Refusal as refusal:
        raise ValueError(f"the tunnel refuses this with {refusal.status}: {refusal.text}") from None
    if read is None:  # pragma: no cover - build_head returns a complete head
        raise ValueError("this request is incomplete")
    subject, der = (client_certificate.subject, client_certificate.der) if client_certificate else ("", None)
    connection = Connection(
        ip=client_address,
        tls_version="TLSv1.3",
        tls_cipher="TLS_AES_256_GCM_SHA384",
        tls_sni=read.host,
        tls_ja4="t13d1516h2_8daaf6152771_02713d6af862",
        client_subject=subject,
        site=site,
        certificate=der,
        request_id=request_id,
    )
    return to_worker_request(read, connection, time.time())


def _list_fields(headers: Headers, subprotocols: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [*(headers.items() if isinstance(headers, Mapping) else headers)]
    return pairs + ([("Sec-WebSocket-Protocol", ", ".join(subprotocols))] if subprotocols else [])
