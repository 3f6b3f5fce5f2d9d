"""No client gets a raw connection to an origin: after any response but a verified 101, none of its bytes pass.

The scenarios are those of 0ang3el/websocket-smuggle (an origin's refusal or a foreign 101 taken for an upgrade) and of
HTTP request smuggling in general (a request that two parsers read in two ways).
"""

import base64
import contextlib
import threading
from collections.abc import Iterator

import pytest

from tests.harness import (
    TIMEOUT,
    Certificate,
    Request,
    Tunnel,
    connect_tls,
    eventually,
    handshake_request,
    read_response,
    switching_protocols,
    upgrade,
)
from tests.promises.scripted_origin import SMUGGLED, ScriptedOrigin, record_of
from tests.promises.wire import read_until_end, send_request

Stage = tuple[ScriptedOrigin, Tunnel]
FOREIGN = b"Sec-WebSocket-Accept: xUFfT1/AIvZnGdK/XSbIr7zQO10="
KEY = base64.b64encode(b"sixteen bytes ok").decode()


@pytest.fixture(scope="module")
def stage(certificate: Certificate) -> Iterator[Stage]:
    settings = '[timeouts]\nclose = "500ms"\n'  # one of these origins never finishes its response
    with ScriptedOrigin() as origin, Tunnel(origin.address, certificate, settings=settings) as tunnel:
        yield origin, tunnel


def _request(*fields: str, line: str = "GET /socket HTTP/1.1", host: str = "Host: localhost") -> bytes:
    """A valid handshake except for what is given; ``fields`` come last."""
    right = [line, host, "Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Key: {KEY}"]
    return "\r\n".join([*right, "Sec-WebSocket-Version: 13", *fields, "", ""]).encode("latin-1")


def _replaced(old: str, new: str) -> bytes:
    request = _request()
    assert old.encode() in request
    return request.replace(old.encode(), new.encode("latin-1"))


# --- scenario 1: a handshake that the origin will refuse -------------------------------------------------------------

NEVER_FORWARDED: dict[str, tuple[bytes, int]] = {
    "version 12": (_replaced("Version: 13", "Version: 12"), 426),
    "version 777": (_replaced("Version: 13", "Version: 777"), 426),
    "version 13 and 8": (_replaced("Version: 13", "Version: 13, 8"), 426),
    "version 13 twice": (_request("Sec-WebSocket-Version: 13"), 426),
    "version 013": (_replaced("Version: 13", "Version: 013"), 426),
    "no version": (_replaced("Sec-WebSocket-Version: 13\r\n", ""), 426),
    "no key": (_replaced(f"Sec-WebSocket-Key: {KEY}\r\n", ""), 400),
    "two keys": (_request(f"Sec-WebSocket-Key: {KEY}"), 400),
    "POST to a health check": (_request(line="POST /api/health?u=http://evil.example/ HTTP/1.1"), 405),
    "GET with a body's length": (_request("Content-Length: 50"), 400),
    "two lengths, one of them 0": (_request("Content-Length: 0", "Content-Length: 50"), 400),
    "a list of lengths": (_request("Content-Length: 0, 50"), 400),
    "a signed length": (_request("Content-Length: +0"), 400),
    "a length with spaces before the colon": (_request("Content-Length : 50"), 400),
    "chunked": (_request("Transfer-Encoding: chunked"), 400),
    "chunked in disguise": (_request("Transfer-Encoding: xchunked"), 400),
    "chunked after a tab": (_request("Transfer-Encoding:\tchunked"), 400),
    "chunked and a length": (_request("Content-Length: 0", "Transfer-Encoding: chunked"), 400),
    "chunked, then a length": (_request("Transfer-Encoding: identity", "Content-Length: 0"), 400),
    "a folded field": (_request("X-Folded: a", " Transfer-Encoding: chunked"), 400),
    "a folded first field": (_replaced("Host: localhost", " Host: localhost"), 400),
    "a bare LF": (_replaced("Connection: Upgrade\r\n", "Connection: Upgrade\n"), 400),
    "a bare LF before the last line": (_request("X-A: b\n"), 400),
    "a bare CR": (_request("X-A: b\rTransfer-Encoding: chunked"), 400),
    "a NUL": (_request("X-A: b\0c"), 400),
    "a request in a value": (_request("X-A: b\n\nGET /internal HTTP/1.1"), 400),
    "absolute form, user": (_request(line="GET http://localhost@internal/ HTTP/1.1"), 400),
    "absolute form, two Hosts": (_request("Host: internal", line="GET https://localhost/ HTTP/1.1"), 400),
    "absolute form, no host": (_request(line="GET http:///internal HTTP/1.1"), 400),
    "authority form": (_request(line="GET internal:80 HTTP/1.1"), 400),
    "CONNECT": (_request(line="CONNECT internal:80 HTTP/1.1"), 405),
    "two Hosts": (_request("Host: internal"), 400),
    "two Hosts that agree": (_request("Host: localhost"), 400),
    "Host with user": (_request(host="Host: localhost@internal"), 400),
    "Host with a space": (_request(host="Host: localhost internal"), 400),
    "Host with a path": (_request(host="Host: localhost/internal"), 400),
    "HTTP/1.0": (_request(line="GET /socket HTTP/1.0"), 505),
    "HTTP/0.9": (b"GET /socket\r\n\r\n", 400),
    "two spaces": (_request(line="GET  /socket HTTP/1.1"), 400),
    "more after the version": (_request(line="GET /socket HTTP/1.1 HTTP/1.1"), 400),
    "two empty lines first": (b"\r\n\r\n" + _request(), 400),
    "no Upgrade": (_replaced("Upgrade: websocket\r\n", ""), 426),
    "Upgrade to h2c": (_replaced("Upgrade: websocket", "Upgrade: h2c"), 426),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
}


@pytest.mark.parametrize(("request_", "status"), NEVER_FORWARDED.values(), ids=NEVER_FORWARDED.keys())
def test_an_ambiguous_or_wrong_handshake_never_reaches_an_origin(stage: Stage, request_: bytes, status: int) -> None:
    origin, tunnel = stage
    traffic = origin.play(switching_protocols)
    with connect_tls(tunnel) as client:
        client.sendall(request_ + SMUGGLED)
        answer = read_response(client)
        assert answer.status == status
        with contextlib.suppress(OSError):
            client.sendall(SMUGGLED)
        read_until_end(client)
    record = record_of(tunnel, answer.headers)
    assert (record["status"], record["verdict"], record["origin"]) == (status, "refused", "")
    # The record comes at the end of the connection: an origin would have been contacted before.
    assert traffic.connections == 0


# --- scenario 1 and 2: a response that is not an upgrade, while the client already sends its next request ------------

REFUSALS: dict[str, tuple[int, bytes]] = {
    "426": (
        426,
        b"426 Upgrade Required\r\nConnection: keep-alive\r\nSec-WebSocket-Version: 13\r\nContent-Length: 0\r\n\r\n",
    ),
    "400": (400, b"400 Bad Request\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nno"),
    "200": (200, b"200 OK\r\nContent-Length: 2\r\nKeep-Alive: timeout=60\r\n\r\nok"),
    "200, upgrade": (200, b"200 OK\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 0\r\n\r\n"),
    "200 without length": (200, b"200 OK\r\n\r\nto be continued"),
    "200 chunked": (200, b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
    "204": (204, b"204 No Content\r\n\r\n"),
    "304": (304, b"304 Not Modified\r\n\r\n"),
    "503": (503, b"503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"),
    "100 and 200": (200, b"100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    "200 and a 101": (200, b"200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 101 Switching Protocols\r\n\r\n"),
    "a bare 101": (502, b"101 Switching Protocols\r\n\r\n"),
    "another 101": (502, b"101 Switching Protocols\r\nUpgrade: TLS/1.2\r\nConnection: Upgrade\r\n\r\n"),
    "a foreign 101": (
        502,
        b"101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" + FOREIGN + b"\r\n\r\n",
    ),
}
"""The response that the client must get, and the origin's response after its HTTP version."""


@pytest.mark.parametrize(("status", "answer"), REFUSALS.values(), ids=REFUSALS.keys())
@pytest.mark.parametrize("when", ["with it", "behind it", "after the answer"])
def test_a_second_request_is_not_forwarded(stage: Stage, status: int, answer: bytes, when: str) -> None:
    """It is sent in the record of the first, or while the origin is silent, or after its response."""
    origin, tunnel = stage
    sent = threading.Event()

    def when_all_is_sent(_: Request) -> bytes:
        assert sent.wait(TIMEOUT)
        return b"HTTP/1.1 " + answer

    traffic = origin.play(when_all_is_sent)
    with connect_tls(tunnel) as client:
        client.sendall(
            _request(line="GET /api/health?u=http://evil.example/ HTTP/1.1") + SMUGGLED * (when == "with it")
        )
        if when == "behind it":
            eventually(lambda: traffic.heads)
            client.sendall(SMUGGLED)
        sent.set()
        read = read_response(client)
        if when == "after the answer":
            with contextlib.suppress(OSError):
                client.sendall(SMUGGLED)
        read_until_end(client)
    assert traffic.surplus_at_end() == b""
    assert traffic.connections == 1
    assert len(traffic.heads) == 1
    assert read.status == status
    record = traffic.record(tunnel)
    assert (record["up"], record["down"]) == (0, 0)


def test_early_bytes_wait_for_the_verified_101_and_then_arrive(stage: Stage) -> None:
    """Confirms that the other tests would notice early bytes: they are forwarded after a valid 101."""
    origin, tunnel = stage
    before: list[bytes] = []

    def late_but_right(request: Request) -> bytes:
        before.append(request.leftover + traffic.surplus)
        return switching_protocols(request)

    traffic = origin.play(late_but_right)
    with connect_tls(tunnel) as client:
        client.sendall(handshake_request() + b"early ")
        eventually(lambda: traffic.heads)
        client.sendall(b"bird")
        assert read_response(client).status == 101
        eventually(lambda: traffic.surplus == b"early bird")
    assert before == [b""]


# --- what is forwarded is what was checked ----------------------------------------------------------------------------


def _forwarded(stage: Stage, *fields: str, request: bytes | None = None) -> dict[str, list[str]]:
    """Return the fields of an accepted handshake that the origin gets, by their names in lower case."""
    origin, tunnel = stage
    traffic = origin.play(switching_protocols)
    with connect_tls(tunnel) as client:
        client.sendall(request or _request(*fields))
        assert read_response(client).status == 101
    lines = traffic.heads[0].decode("latin-1").split("\r\n")
    assert lines[0] == "GET /socket HTTP/1.1"
    assert lines[-2:] == ["", ""]
    found: dict[str, list[str]] = {}
    for line in lines[1:-2]:
        name, _, value = line.partition(": ")
        found.setdefault(name.lower(), []).append(value)
    return found


def test_connection_cannot_nominate_fields_of_the_handshake(stage: Stage) -> None:
    nominated = "Connection: Host, Sec-WebSocket-Key, Sec-WebSocket-Version, X-Forwarded-For, X-Request-Id, Forwarded"
    fields = _forwarded(stage, nominated)
    assert fields["host"] == ["localhost"]
    assert fields["sec-websocket-key"] == [KEY]
    assert fields["sec-websocket-version"] == ["13"]
    assert fields["x-forwarded-for"] == ["127.0.0.1"]
    assert len(fields["x-request-id"]) == len(fields["forwarded"]) == 1
    assert fields["connection"] == ["Upgrade"]
    assert fields["upgrade"] == ["websocket"]


def test_hop_by_hop_fields_are_not_forwarded(stage: Stage) -> None:
    own = ("Keep-Alive: timeout=5", "TE: trailers", "Trailer: X-T", "Proxy-Connection: keep-alive", "X-Private: a")
    fields = _forwarded(stage, "Connection: X-Private, keep-alive", *own, "X-Public: b")
    assert {"keep-alive", "te", "trailer", "proxy-connection", "x-private"}.isdisjoint(fields)
    assert fields["x-public"] == ["b"]
    assert fields["connection"] == ["Upgrade"]


def test_only_the_websocket_upgrade_is_forwarded(stage: Stage) -> None:
    request = _replaced("Upgrade: websocket", "Upgrade: h2c, websocket").replace(
        b"Connection: Upgrade", b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAARAAAAA"
    )
    fields = _forwarded(stage, request=request)
    assert fields["upgrade"] == ["websocket"]
    assert fields["connection"] == ["Upgrade"]
    assert "http2-settings" not in fields


def test_clients_cannot_forge_the_tunnels_own_fields(stage: Stage) -> None:
    forged = (
        "X-Forwarded-For: 10.0.0.1",
        "X_Forwarded_For: 10.0.0.1",
        "X-Real-IP: 10.0.0.1",
        "X-Forwarded-Proto: http",
    )
    more = ("Forwarded: for=10.0.0.1", "X-Request-Id: mine", "X-Forwarded-Host: internal", "X-Forwarded-Port: 80")
    fields = _forwarded(stage, *forged, *more)
    assert "10.0.0.1" not in str(fields)
    assert fields["x-forwarded-for"] == ["127.0.0.1"]
    assert fields["x-forwarded-proto"] == ["https"]
    assert fields["x-forwarded-host"] == ["localhost"]
    assert fields["x-request-id"] != ["mine"]
    assert "internal" not in str(fields)


def test_a_content_length_of_zero_is_no_body(stage: Stage) -> None:
    assert _forwarded(stage, "Content-Length: 0")["content-length"] == ["0"]


def test_a_smuggler_does_not_affect_the_next_client(stage: Stage) -> None:
    """Connections to origins are never reused, so none can be poisoned."""
    origin, tunnel = stage
    refused = origin.play(b"HTTP/1.1 " + REFUSALS["200"][1])
    assert send_request(tunnel, _request() + SMUGGLED).status == 200
    assert refused.surplus_at_end() == b""
    accepted = origin.play(switching_protocols)
    with connect_tls(tunnel) as client:
        assert upgrade(client, "/socket").status == 101
    assert accepted.surplus_at_end() == b""
    assert accepted.heads[0].startswith(b"GET /socket HTTP/1.1\r\n")
