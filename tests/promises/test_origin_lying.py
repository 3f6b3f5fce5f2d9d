"""Only a 101 that is valid in every respect opens a tunnel; after any other response, no bytes pass."""

import base64
import contextlib
import hashlib
import itertools
import socket
from collections.abc import Iterator

import pytest

from tests.harness import (
    Certificate,
    RawOrigin,
    Request,
    Tunnel,
    accept_token,
    connect_tls,
    handshake_request,
    read_request,
    read_response,
    receive_exactly,
    switching_protocols,
    upgrade,
)
from tests.promises.scripted_origin import SMUGGLED, Script, ScriptedOrigin, record_of
from tests.promises.wire import read_until_end, send_request

LIE = b"WORDS-OF-THE-LIAR"


def _switch(*fields: str, line: str = "HTTP/1.1 101 Switching Protocols", token: str | None = "right") -> Script:
    """A 101 with these fields and, unless ``token`` is None, an accept token: the right one or that text."""

    def script(request: Request) -> bytes:
        right = accept_token(request.headers["Sec-WebSocket-Key"])
        accept = [f"Sec-WebSocket-Accept: {token.replace('right', right)}"] if token is not None else []
        return "\r\n".join([line, *fields, *accept, "", ""]).encode("latin-1") + LIE

    return script


def _with_key_as_token(request: Request) -> bytes:
    key = request.headers["Sec-WebSocket-Key"].encode()
    return switching_protocols(request).replace(accept_token(key.decode()).encode(), key) + LIE


def _with_token_of_nothing(request: Request) -> bytes:
    """The digest without RFC 6455's GUID."""
    key = request.headers["Sec-WebSocket-Key"]
    digest = base64.b64encode(hashlib.sha1(key.encode(), usedforsecurity=False).digest()).decode()
    return _switch("Upgrade: websocket", "Connection: Upgrade", token=digest)(request)


UPGRADE = ("Upgrade: websocket", "Connection: Upgrade")

LIES: dict[str, Script | bytes] = {
    "wrong token": _switch(*UPGRADE, token="s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),  # RFC 6455's example, for another key
    "the key as token": _with_key_as_token,
    "digest of the key alone": _with_token_of_nothing,
    "no token": _switch(*UPGRADE, token=None),
    "empty token": _switch(*UPGRADE, token=""),
    "right token twice": _switch(*UPGRADE, "Sec-WebSocket-Accept: right", token="right\r\nSec-WebSocket-Accept: right"),
    "right token after a wrong one": _switch(*UPGRADE, "Sec-WebSocket-Accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA="),
    "right token in a list": _switch(*UPGRADE, token="right, right"),
    "no Upgrade": _switch("Connection: Upgrade"),
    "Upgrade to something else": _switch("Upgrade: h2c", "Connection: Upgrade"),
    "Upgrade to two things": _switch("Upgrade: websocket, h2c", "Connection: Upgrade"),
    "no Connection": _switch("Upgrade: websocket"),
    "Connection: close": _switch("Upgrade: websocket", "Connection: close"),
    "an extension": _switch(*UPGRADE, "Sec-WebSocket-Extensions: permessage-deflate"),
    "a subprotocol": _switch(*UPGRADE, "Sec-WebSocket-Protocol: chat"),
    "nothing but the status": b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + LIE,
    "another version": b"HTTP/2 101\r\n\r\n" + LIE,
    "no version": b"HTTP 101 Switching Protocols\r\n\r\n" + LIE,
    "a control character": _switch(*UPGRADE, "X-Odd: a\x01b"),
    "a line without a name": _switch(*UPGRADE, "no field at all"),
    "white space before the colon": _switch(*UPGRADE, "X-Odd : a"),
    "garbage": b"\x00\xff\xfe garbage \x80" + LIE + b"\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n" + LIE,
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + LIE,
    "HTTP/2 settings": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + LIE + b"\r\n\r\n",
    "a TLS alert": b"\x15\x03\x03\x00\x02\x02\x46" + LIE + b"\r\n\r\n",
    "a request": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + LIE,
    "an endless line": b"HTTP/1.1 101 " + LIE * 8192,
    "endless fields": b"HTTP/1.1 101 Switching Protocols\r\n" + (b"X-Lie: " + LIE + b"\r\n") * 8192,
    "endless 100s": b"HTTP/1.1 100 Continue\r\n\r\n" * 8192,
    "a refusal with two lengths": b"HTTP/1.1 403 Forbidden\r\nContent-Length: 17\r\nTransfer-Encoding: chunked\r\n\r\n"
    + LIE,
    "a refusal of odd length": b"HTTP/1.1 403 Forbidden\r\nContent-Length: -1\r\n\r\n" + LIE,
    "a refusal in an odd coding": b"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: gzip, chunked\r\n\r\n" + LIE,
}


Stage = tuple[ScriptedOrigin, Tunnel]


@pytest.fixture(scope="module")
def stage(certificate: Certificate) -> Iterator[Stage]:
    with ScriptedOrigin() as origin, Tunnel(origin.address, certificate) as tunnel:
        yield origin, tunnel


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_an_invalid_101_is_a_502_and_passes_nothing(stage: Stage, lie: Script | bytes) -> None:
    origin, tunnel = stage
    traffic = origin.play(lie)
    with connect_tls(tunnel) as client:
        client.sendall(handshake_request() + SMUGGLED)
        answer = read_response(client)
        assert answer.status == 502
        with contextlib.suppress(OSError):
            client.sendall(SMUGGLED)
        rest = answer.leftover + read_until_end(client)
    assert LIE not in rest
    assert LIE.decode() not in str(answer.headers)
    assert answer.headers["X-Request-Id"].encode() in rest
    assert traffic.surplus_at_end() == b""
    record = record_of(tunnel, answer.headers)
    assert (record["status"], record["verdict"], record["reason"]) == (502, "refused", "invalid response")
    assert record["ended_by"] == "tunnel"
    assert record["detail"], "the record explains the failure"
    assert (record["up"], record["down"]) == (0, 0)


TRUTHS: dict[str, Script] = {
    "after a 100": lambda request: b"HTTP/1.1 100 Continue\r\n\r\n" + switching_protocols(request),
    "after early hints": lambda request: (
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + switching_protocols(request)
    ),
    "after three of them": lambda request: b"HTTP/1.1 102 Processing\r\n\r\n" * 3 + switching_protocols(request),
    "in other cases": lambda request: (
        switching_protocols(request)
        .replace(b"Upgrade: websocket", b"uPGRADE: WebSocket")
        .replace(b"Connection: Upgrade", b"connection: upgrade")
    ),
    "with keep-alive beside it": lambda request: switching_protocols(request).replace(
        b"Connection: Upgrade", b"Connection: keep-alive, Upgrade"
    ),
    "with a length of nothing": lambda request: switching_protocols(request, [("Content-Length", "0")]),
    "without a reason": lambda request: switching_protocols(request).replace(b"101 Switching Protocols", b"101 "),
    "with what was requested": lambda request: switching_protocols(
        request,
        [
            ("Sec-WebSocket-Protocol", "superchat"),
            ("Sec-WebSocket-Extensions", "permessage-deflate; server_no_context_takeover"),
        ],
    ),
}


def test_a_valid_101_is_accepted_in_every_form(certificate: Certificate) -> None:
    attempts = [(truth, piece) for truth in TRUTHS.values() for piece in (1, 7, 1 << 20)]
    next_ones = iter(attempts)

    def play(sock: socket.socket) -> None:
        request = read_request(sock)
        truth, piece = next(next_ones)
        answer = truth(request) + b"first words"
        for at in range(0, len(answer), piece):
            sock.sendall(answer[at : at + piece])
        assert receive_exactly(sock, 5) == b"hello"
        sock.sendall(b"last words")

    wishes = [("Sec-WebSocket-Protocol", "chat, superchat"), ("Sec-WebSocket-Extensions", "permessage-deflate")]
    with RawOrigin(play) as origin, Tunnel(origin.address, certificate) as tunnel:
        for _ in attempts:
            with connect_tls(tunnel) as client:
                client.sendall(handshake_request(headers=wishes))
                answer = read_response(client)
                assert answer.status == 101
                assert answer.headers.get_all("Upgrade") == ["websocket"]
                assert answer.headers["Link"] is None, "a field of a response that was dropped"
                received = answer.leftover + receive_exactly(client, len(b"first words") - len(answer.leftover))
                assert received == b"first words"
                client.sendall(b"hello")
                assert receive_exactly(client, 10) == b"last words"


def test_an_invalid_101_does_not_affect_the_next_client(stage: Stage) -> None:
    origin, tunnel = stage
    turns = itertools.count()
    origin.play(lambda request: LIE + b"\r\n\r\n" if next(turns) % 2 == 0 else switching_protocols(request))
    for _ in range(3):
        assert send_request(tunnel, handshake_request()).status == 502
        with connect_tls(tunnel) as client:
            assert upgrade(client).status == 101


def test_a_response_before_the_request_is_still_checked(certificate: Certificate) -> None:
    """It is sent on connecting, when the origin cannot know the key."""

    def hasty(sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n" + LIE)
        read_until_end(sock)

    with RawOrigin(hasty) as origin, Tunnel(origin.address, certificate) as tunnel:
        response = send_request(tunnel, handshake_request())
        assert response.status == 502
        assert LIE not in response.raw
