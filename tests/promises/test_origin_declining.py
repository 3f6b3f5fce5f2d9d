"""An origin's own refusal reaches the client complete with its body; a truncated one is visible as truncated."""

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.harness import (
    Certificate,
    Record,
    Tunnel,
    connect_tls,
    eventually,
    handshake_request,
    read_response,
    receive_all,
    reset,
)
from tests.promises.scripted_origin import SMUGGLED, ScriptedOrigin, Then
from tests.promises.wire import ABRUPT_ENDS, Response, read_until_end, send_request

LARGE = random.Random(6455).randbytes(2 << 20)


def _by_length(head: bytes, body: bytes) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _chunked(head: bytes, body: bytes) -> bytes:
    sizes = random.Random(len(body))
    chunks, at = [], 0
    while at < len(body):
        size = sizes.randrange(1, 50_000)
        piece = body[at : at + size]
        chunks.append(b"%X\r\n%b\r\n" % (len(piece), piece))
        at += size
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(chunks) + b"0\r\nX-Trailer: dropped\r\n\r\n"


def _to_the_end(head: bytes, body: bytes) -> bytes:
    return head + b"\r\n" + body


FRAMINGS: dict[str, Callable[[bytes, bytes], bytes]] = {
    "length": _by_length,
    "chunked": _chunked,
    "to-the-end": _to_the_end,
}


Stage = tuple[ScriptedOrigin, Tunnel]


@pytest.fixture(scope="module")
def stage(certificate: Certificate) -> Iterator[Stage]:
    with ScriptedOrigin() as origin, Tunnel(origin.address, certificate) as tunnel:
        yield origin, tunnel


def _declined(stage: Stage, answer: bytes, *, then: Then) -> tuple[Response, Record]:
    origin, tunnel = stage
    traffic = origin.play(answer, then=then)
    response = send_request(tunnel, handshake_request() + SMUGGLED)
    assert traffic.surplus_at_end() == b""
    return response, traffic.record(tunnel)


@pytest.mark.parametrize("framing", FRAMINGS.values(), ids=FRAMINGS.keys())
@pytest.mark.parametrize("body", [b"", b"because\n", LARGE], ids=["empty", "short", "2MiB"])
def test_any_framing_is_relayed_completely(stage: Stage, framing: Callable[[bytes, bytes], bytes], body: bytes) -> None:
    head = b"HTTP/1.1 403 Out of the Question\r\nX-Why: Because\r\nContent-Type: text/odd\r\n"
    then: Then = "end" if framing is _to_the_end else "keep"
    response, record = _declined(stage, framing(head, body), then=then)
    assert (response.status, response.body) == (403, body)
    assert response.raw.startswith(b"HTTP/1.1 403 Out of the Question\r\n")
    assert response.headers["X-Why"] == "Because"
    assert response.headers["Content-Type"] == "text/odd"
    assert response.headers.get_all("Connection") == ["close"]
    assert (record["status"], record["verdict"]) == (403, "pass")
    assert (record["ended_by"], record["reason"]) == ("origin", "declined")


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        (b"HTTP/1.1 200 OK", [b"Content-Type: text/html"]),
        (b"HTTP/1.1 302 Found", [b"Location: https://localhost/login?next=%2Fchat"]),
        (b"HTTP/1.1 401 Unauthorized", [b'WWW-Authenticate: Basic realm="a"', b"WWW-Authenticate: Bearer"]),
        (b"HTTP/1.1 404 Not Found", [b"Set-Cookie: a=1", b"Set-Cookie: b=2"]),
        (b"HTTP/1.1 426 Upgrade Required", [b"Sec-WebSocket-Version: 13, 8"]),
        (b"HTTP/1.1 500 Internal Server Error", []),
        (b"HTTP/1.1 503 Service Unavailable", [b"Retry-After: 120"]),
    ],
    ids=lambda value: value.split()[1].decode() if isinstance(value, bytes) else "",
)
def test_any_status_is_relayed_with_its_fields(stage: Stage, line: bytes, fields: list[bytes]) -> None:
    answer = b"\r\n".join([line, *fields, b"Content-Length: 5", b"", b"body\n"])
    response, record = _declined(stage, answer, then="keep")
    assert response.raw.startswith(line + b"\r\n")
    for field in fields:
        assert field + b"\r\n" in response.raw
    assert response.body == b"body\n"
    assert record["status"] == response.status


@pytest.mark.parametrize("line", [b"HTTP/1.1 204 No Content", b"HTTP/1.1 304 Not Modified"], ids=["204", "304"])
def test_a_status_without_a_body_ends_at_its_head(stage: Stage, line: bytes) -> None:
    response, record = _declined(stage, line + b"\r\nX-Why: Because\r\n\r\n", then="keep")
    assert (response.body, response.headers["X-Why"]) == (b"", "Because")
    assert record["reason"] == "declined"


def test_hop_by_hop_fields_are_not_relayed(stage: Stage) -> None:
    head = b"HTTP/1.1 403 Forbidden\r\nConnection: keep-alive, X-Private\r\nKeep-Alive: timeout=5\r\nX-Private: a\r\n"
    response, _ = _declined(stage, _by_length(head, b"no"), then="keep")
    assert response.headers.get_all("Connection") == ["close"]
    assert response.headers["Keep-Alive"] is None
    assert response.headers["X-Private"] is None


CUT_SHORT: dict[str, tuple[bytes, Then]] = {
    "length, end": (b"Content-Length: 100\r\n\r\nnot a hundred", "end"),
    "length, reset": (b"Content-Length: 100\r\n\r\nnot a hundred", "reset"),
    "chunked, end": (b"Transfer-Encoding: chunked\r\n\r\n64\r\nnot a hundred", "end"),
    "chunked, no last chunk": (b"Transfer-Encoding: chunked\r\n\r\n5\r\nwords\r\n", "end"),
    "chunked, reset": (b"Transfer-Encoding: chunked\r\n\r\n5\r\nwords\r\n", "reset"),
    "to the end, reset": (b"\r\nwords", "reset"),
}


@pytest.mark.parametrize(("rest", "then"), CUT_SHORT.values(), ids=CUT_SHORT.keys())
def test_a_truncated_body_does_not_look_complete(stage: Stage, rest: bytes, then: Then) -> None:
    """No close_notify: it would mark the end, which is the only framing that some bodies have."""
    origin, tunnel = stage
    head_arrived = threading.Event()
    # Only once the client has the head can the body be truncated.
    traffic = origin.play(b"HTTP/1.1 500 Internal Server Error\r\n" + rest, then=then, after=head_arrived)
    with connect_tls(tunnel) as client:
        client.sendall(handshake_request())
        assert read_response(client).status == 500
        head_arrived.set()
        with pytest.raises(ABRUPT_ENDS):
            receive_all(client)
    record = traffic.record(tunnel)
    assert record["status"] == 500
    assert (record["ended_by"], record["reason"]) == ("origin", "response truncated"), record


def test_a_malformed_body_does_not_look_complete(stage: Stage) -> None:
    """It is in the segment of the head, so it is read before anything has been sent to the client."""
    origin, tunnel = stage
    traffic = origin.play(b"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\nthis is no chunk\r\n")
    with connect_tls(tunnel) as client:
        client.sendall(handshake_request() + SMUGGLED)
        received = read_until_end(client)
    assert b"this is no chunk" not in received
    assert traffic.surplus_at_end() == b""
    assert traffic.record(tunnel)["reason"] in {"response truncated", "invalid response"}


def test_a_client_that_reads_slowly_gets_all_of_it(certificate: Certificate) -> None:
    """In all this takes longer than timeouts.close, but never that long without a byte."""
    body = LARGE * 2
    with (
        ScriptedOrigin() as origin,
        Tunnel(origin.address, certificate, settings='[timeouts]\nclose = "1500ms"\n') as tunnel,
        connect_tls(tunnel) as client,
    ):
        traffic = origin.play(_by_length(b"HTTP/1.1 403 Forbidden\r\n", body))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        client.sendall(handshake_request())
        received = bytearray(read_response(client).leftover)
        while some := client.recv(65_536):
            received += some
            time.sleep(3 * len(some) / len(body))  # the slowness under test
        assert bytes(received) == body
        assert traffic.record(tunnel)["reason"] == "declined"


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["close", "reset"])
def test_a_client_that_leaves_in_the_middle_is_noticed_at_once(
    stage: Stage, leave: Callable[[socket.socket], None]
) -> None:
    """The origin keeps streaming, or waits: its connection is not held for ``timeouts.close`` (30 s here)."""
    origin, tunnel = stage
    traffic = origin.play(b"HTTP/1.1 200 OK\r\n\r\nstream")
    client = connect_tls(tunnel)
    client.sendall(handshake_request())
    assert read_response(client).status == 200
    leave(client)
    eventually(lambda: traffic.ended, 10)
    record = traffic.record(tunnel)
    assert (record["ended_by"], record["reason"]) == ("client", "closed during the response")
