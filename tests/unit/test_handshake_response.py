"""The origin's response: the one valid 101, all invalid ones, other responses relayed whole, and hostile bytes."""

from collections.abc import Iterator

import h11
import pytest
from hypothesis import given

from tests.handshakes import (
    ACCEPT,
    FIELDS,
    KEY,
    RESPONSE_FIELDS,
    Field,
    mutated,
    pieces,
    render_head,
    request,
    response,
    splits,
    without,
)
from tlstunnel.handshake.request import RequestReader, UpgradeRequest
from tlstunnel.handshake.response import MAX_RESPONSE_HEAD, BadResponse, Declined, Switched, UpgradeResponseReader

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n"
RIGHT = response(RESPONSE_FIELDS)


def upgrade_request(*more: Field) -> UpgradeRequest:
    found = RequestReader().feed(request((*FIELDS, *more)))
    assert found is not None
    return found


PLAIN = upgrade_request()
OFFERS = upgrade_request(
    (b"Sec-WebSocket-Protocol", b"chat, superchat"),
    (b"Sec-WebSocket-Extensions", b"permessage-deflate; client_max_window_bits, x-other"),
)


def switched(data: bytes, to: UpgradeRequest = PLAIN) -> Switched:
    found = UpgradeResponseReader(to).feed(data)
    assert isinstance(found, Switched)
    return found


def answered(reader: UpgradeResponseReader, fed: Iterator[bytes]) -> Switched | Declined:
    """Return the result of `reader` once it has got as much of `fed` as it needs."""
    return next(found for found in map(reader.feed, fed) if found is not None)


def bad(data: bytes, to: UpgradeRequest = PLAIN) -> str:
    """Return why the origin's `data`, followed by its end, is not a response."""
    reader = UpgradeResponseReader(to)
    with pytest.raises(BadResponse) as caught:
        answered(reader, iter((data, b"")))
    return caught.value.reason


def relayed(*data: bytes) -> tuple[Declined, bytes]:
    """Return what goes to the client of the origin's `data`, then its end: the response, and head and body as bytes."""
    reader = UpgradeResponseReader(PLAIN)
    fed = iter((*data, b""))
    found = answered(reader, fed)
    assert isinstance(found, Declined)
    out = found.head + reader.body(None)
    while not reader.complete:
        out += reader.body(next(fed))
    return found, out


def understood(out: bytes) -> tuple[h11.Response, bytes]:
    """Return how an HTTP client parses `out`, which must be one whole response and nothing more."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "a"), ("Upgrade", "websocket")]))
    client.send(h11.EndOfMessage())
    client.receive_data(out)
    client.receive_data(b"")
    head = client.next_event()
    assert isinstance(head, h11.Response)
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert client.trailing_data[0] == b""
    return head, body


def field(head: h11.Response, name: bytes) -> bytes | None:
    values = [value for found, value in head.headers if found == name]
    assert len(values) <= 1
    return values[0] if values else None


# The valid 101.


def test_valid_101_switches() -> None:
    found = switched(RIGHT)
    assert (found.status, found.head, found.leftover) == (101, RIGHT, b"")


def test_101_of_the_rfc_switches() -> None:
    chat = upgrade_request((b"Sec-WebSocket-Protocol", b"chat, superchat"))
    data = (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: chat\r\n\r\n"
    )
    assert switched(data, chat).head == data


@pytest.mark.parametrize("leftover", [b"\x81\x05hello", b"\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 100_000])
def test_bytes_after_the_101_are_kept(leftover: bytes) -> None:
    assert switched(RIGHT + leftover).leftover == leftover


@pytest.mark.parametrize(
    "fields",
    [
        ((b"upgrade", b"WebSocket"), (b"CONNECTION", b"upgrade"), (b"sec-websocket-accept", ACCEPT)),
        (*without(b"Connection", RESPONSE_FIELDS), (b"Connection", b"keep-alive, Upgrade")),
        (*without(b"Connection", RESPONSE_FIELDS), (b"Connection", b"keep-alive"), (b"Connection", b"upgrade")),
        (*without(b"Sec-WebSocket-Accept", RESPONSE_FIELDS), (b"Sec-WebSocket-Accept", b"  " + ACCEPT + b"\t")),
    ],
    ids=["case", "more in Connection", "two Connection lines", "white space"],
)
def test_101_may_be_written_this_way(fields: tuple[Field, ...]) -> None:
    assert switched(response(fields)).head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")


def test_fields_of_a_101_keep_order_and_case() -> None:
    more = ((b"sERVER", b"x"), (b"Set-Cookie", b"a=1"), (b"Set-Cookie", b"b=2"), (b"X-Name", b"M\xfcller\tx"))
    assert switched(response((*more, *RESPONSE_FIELDS))).head == response(
        (*RESPONSE_FIELDS[:2], *more, (b"Sec-WebSocket-Accept", ACCEPT))
    )


@pytest.mark.parametrize(
    "more",
    [
        ((b"Sec-WebSocket-Protocol", b"superchat"),),
        ((b"Sec-WebSocket-Extensions", b"permessage-deflate"),),
        ((b"Sec-WebSocket-Extensions", b"permessage-deflate; client_max_window_bits=10; server_no_context_takeover"),),
        ((b"Sec-WebSocket-Extensions", b"x-other"), (b"Sec-WebSocket-Extensions", b"permessage-deflate")),
    ],
    ids=["subprotocol", "extension", "parameters", "two lines"],
)
def test_what_was_requested_is_forwarded(more: tuple[Field, ...]) -> None:
    assert switched(response((*RESPONSE_FIELDS, *more)), OFFERS).head == response((*RESPONSE_FIELDS, *more))


@pytest.mark.parametrize(
    "dropped",
    [
        *(b"Content-Length", b"Transfer-Encoding", b"Keep-Alive", b"X-Private", b"TE", b"Trailer", b"Proxy-Connection"),
        *(b"Alt-Svc", b"Proxy-Authenticate", b"Proxy-Authentication-Info"),
    ],
)
def test_101_is_forwarded_without_body_and_hop_by_hop_fields(dropped: bytes) -> None:
    value = {b"Content-Length": b"0", b"Transfer-Encoding": b"chunked"}.get(dropped, b"x")
    fields = (*without(b"Connection", RESPONSE_FIELDS), (b"Connection", b"Upgrade, X-Private"), (dropped, value))
    assert switched(response(fields) + b"\x81\x00") == Switched(RIGHT, b"\x81\x00")


def test_accept_cannot_be_nominated_away() -> None:
    fields = (*without(b"Connection", RESPONSE_FIELDS), (b"Connection", b"Upgrade, Sec-WebSocket-Accept"))
    assert b"Sec-WebSocket-Accept: " + ACCEPT in switched(response(fields)).head


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        (b"HTTP/1.1 101", b"HTTP/1.1 101 Switching Protocols"),
        (b"HTTP/1.1 101 ", b"HTTP/1.1 101 Switching Protocols"),
        (b"HTTP/1.1 101 Web Socket Protocol Handshake", b"HTTP/1.1 101 Web Socket Protocol Handshake"),
    ],
)
def test_reason_of_a_101(line: bytes, sent: bytes) -> None:
    assert switched(response(RESPONSE_FIELDS, line)).head == response(RESPONSE_FIELDS, sent)


def test_byte_by_byte_gives_the_same() -> None:
    reader = UpgradeResponseReader(PLAIN)
    *first, last = (bytes((byte,)) for byte in CONTINUE + RIGHT)
    assert [reader.feed(byte) for byte in first] == [None] * len(first)
    assert reader.feed(last) == Switched(RIGHT, b"")


# Every invalid 101.


def changed(name: bytes, *values: bytes) -> bytes:
    return response((*without(name, RESPONSE_FIELDS), *((name, value) for value in values)))


WRONG: dict[str, tuple[bytes, str]] = {
    "no accept": (changed(b"Sec-WebSocket-Accept"), "Accept"),
    "accept of another key": (changed(b"Sec-WebSocket-Accept", b"AAAAAAAAAAAAAAAAAAAAAAAAAAA="), "Accept"),
    "accept empty": (changed(b"Sec-WebSocket-Accept", b""), "Accept"),
    "accept is the key": (changed(b"Sec-WebSocket-Accept", KEY), "Accept"),
    "accept in another case": (changed(b"Sec-WebSocket-Accept", ACCEPT.swapcase()), "Accept"),
    "accept with more": (changed(b"Sec-WebSocket-Accept", ACCEPT + b", x"), "Accept"),
    "accept quoted": (changed(b"Sec-WebSocket-Accept", b'"' + ACCEPT + b'"'), "Accept"),
    "accept doubled": (changed(b"Sec-WebSocket-Accept", ACCEPT, ACCEPT), "Accept"),
    "right and wrong accept": (changed(b"Sec-WebSocket-Accept", ACCEPT, b"x"), "Accept"),
    "no Upgrade": (changed(b"Upgrade"), "Upgrade: websocket"),
    "Upgrade empty": (changed(b"Upgrade", b""), "Upgrade: websocket"),
    "Upgrade to something else": (changed(b"Upgrade", b"h2c"), "Upgrade: websocket"),
    "Upgrade to two": (changed(b"Upgrade", b"websocket, h2c"), "Upgrade: websocket"),
    "Upgrade to websocket/13": (changed(b"Upgrade", b"websocket/13"), "Upgrade: websocket"),
    "Upgrade doubled": (changed(b"Upgrade", b"websocket", b"h2c"), "Upgrade: websocket"),
    "no Connection": (changed(b"Connection"), "Connection: Upgrade"),
    "Connection: close": (changed(b"Connection", b"close"), "Connection: Upgrade"),
    "Connection: upgraded": (changed(b"Connection", b"upgraded"), "Connection: Upgrade"),
    "nothing but the status": (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "Upgrade: websocket"),
    "extension not offered": (changed(b"Sec-WebSocket-Extensions", b"x-unasked"), "extension"),
    "one extension requested, one not": (
        changed(b"Sec-WebSocket-Extensions", b"permessage-deflate, x-unasked"),
        "extension",
    ),
    "extension not offered on a second line": (
        changed(b"Sec-WebSocket-Extensions", b"x-other", b"x-unasked; a=b"),
        "extension",
    ),
    "subprotocol not offered": (changed(b"Sec-WebSocket-Protocol", b"unasked"), "subprotocol"),
    "subprotocol in another case": (changed(b"Sec-WebSocket-Protocol", b"Chat"), "subprotocol"),
    "two subprotocols": (changed(b"Sec-WebSocket-Protocol", b"chat, superchat"), "subprotocol"),
    "two subprotocols on two lines": (changed(b"Sec-WebSocket-Protocol", b"chat", b"superchat"), "subprotocol"),
    "subprotocol doubled": (changed(b"Sec-WebSocket-Protocol", b"chat", b"chat"), "subprotocol"),
    "control character in a value": (response((*RESPONSE_FIELDS, (b"X", b"a\x1b[31m"))), "control character"),
    "DEL in a value": (response((*RESPONSE_FIELDS, (b"X", b"a\x7f"))), "control character"),
    "control character in the reason": (response(RESPONSE_FIELDS, b"HTTP/1.1 101 \x1b[2J"), "control character"),
    **{
        f"version {version.decode()}": (response(RESPONSE_FIELDS, b"HTTP/%b 101 x" % version), "version")
        for version in (b"1.0", b"1.2", b"2.0")
    },
    "two lengths": (response((*RESPONSE_FIELDS, (b"Content-Length", b"0, 1"))), "not HTTP"),
}


@pytest.mark.parametrize(("data", "reason"), WRONG.values(), ids=WRONG)
def test_invalid_101_is_a_bad_response(data: bytes, reason: str) -> None:
    assert reason in bad(data, OFFERS)


@pytest.mark.parametrize(("name", "value"), [(b"Sec-WebSocket-Extensions", b"x"), (b"Sec-WebSocket-Protocol", b"x")])
def test_nothing_may_be_agreed_that_was_not_requested(name: bytes, value: bytes) -> None:
    assert "not offered" in bad(changed(name, value), PLAIN)


def test_invalid_101_stays_invalid_after_any_1xx() -> None:
    assert "Accept" in bad(CONTINUE + HINTS + changed(b"Sec-WebSocket-Accept", b"x"))


# 1xx before the response.


@pytest.mark.parametrize("before", [CONTINUE, HINTS, b"HTTP/1.1 102 Processing\r\n\r\n", CONTINUE * 3 + HINTS * 2])
def test_1xx_before_the_101_is_dropped(before: bytes) -> None:
    assert switched(before + RIGHT + b"\x81\x00") == Switched(RIGHT, b"\x81\x00")


def test_1xx_in_segments_of_their_own_are_dropped() -> None:
    reader = UpgradeResponseReader(PLAIN)
    assert reader.feed(CONTINUE) is None
    assert reader.feed(HINTS) is None
    assert reader.feed(RIGHT) == Switched(RIGHT, b"")


def test_1xx_before_another_status_is_dropped() -> None:
    _, out = relayed(CONTINUE + b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
    head, body = understood(out)
    assert (head.status_code, body) == (403, b"no")


@pytest.mark.parametrize("piece", [1000, 65_536])
def test_endless_1xx_are_a_bad_response(piece: int) -> None:
    reader = UpgradeResponseReader(PLAIN)
    endless = CONTINUE * 10_000
    fed = iter([endless[at : at + piece] for at in range(0, len(endless), piece)])
    with pytest.raises(BadResponse, match="too large"):
        answered(reader, fed)
    assert len(b"".join(fed)) >= len(endless) - MAX_RESPONSE_HEAD - 2 * piece


# Invalid responses.

GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "half a head": RIGHT[:-1],
    "1xx and nothing more": CONTINUE,
    "HTTP/0.9": b"<html>hello</html>\r\n",
    "HTTP/0.9 with an empty line": b"<html>\r\n\r\nhello",
    "an error in words": b"wrong port\n\n",
    "frames": b"\x81\x05hello",
    "a TLS alert": b"\x15\x03\x01\x00\x02\x02\x28",
    "zeros": bytes(100),
    "a request": request(),
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "the preface of HTTP/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",
    "version in lower case": RIGHT.replace(b"HTTP", b"http", 1),
    "no status": response(RESPONSE_FIELDS, b"HTTP/1.1"),
    "status of two digits": response(RESPONSE_FIELDS, b"HTTP/1.1 10"),
    "status of four digits": response(RESPONSE_FIELDS, b"HTTP/1.1 1010 x"),
    "status 000": response(RESPONSE_FIELDS, b"HTTP/1.1 000 x"),
    "status in words": response(RESPONSE_FIELDS, b"HTTP/1.1 abc x"),
    "empty line before": b"\r\n" + RIGHT,
    "white space before the colon": response((*RESPONSE_FIELDS, (b"X ", b"a"))),
    "field without a colon": RIGHT[:-2] + b"X\r\n\r\n",
    "field without a name": RIGHT[:-2] + b": x\r\n\r\n",
    "NUL in a value": response((*RESPONSE_FIELDS, (b"X", b"a\x00b"))),
    "lone CR in a value": response((*RESPONSE_FIELDS, (b"X", b"a\rb"))),
    "lone CR in the reason": response(RESPONSE_FIELDS, b"HTTP/1.1 101 a\rb"),
    "length that is no number": render_head(b"HTTP/1.1 200 OK", [(b"Content-Length", b"x")]),
    "negative length": render_head(b"HTTP/1.1 200 OK", [(b"Content-Length", b"-1")]),
    "different lengths": render_head(b"HTTP/1.1 200 OK", [(b"Content-Length", b"1"), (b"Content-Length", b"2")]),
    "transfer coding doubled": render_head(
        b"HTTP/1.1 200 OK", [(b"Transfer-Encoding", b"chunked"), (b"Transfer-Encoding", b"chunked")]
    ),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_a_bad_response(data: bytes) -> None:
    assert bad(data)


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_a_bad_response_byte_by_byte(data: bytes) -> None:
    assert outcome([bytes((byte,)) for byte in data]) == ("bad",)


def test_end_instead_of_a_response_is_reported() -> None:
    assert bad(b"HTTP/1.1 101") == "origin closed the connection without a response"


@pytest.mark.parametrize("name", [b"Content-Length", b"content-length"])
def test_both_length_and_transfer_encoding_is_a_bad_response(name: bytes) -> None:
    """RFC 9112 section 6.1: it ought to be handled as an error; two readers may disagree on where it ends."""
    fields = [(name, b"5"), (b"Transfer-Encoding", b"chunked")]
    assert "both" in bad(render_head(b"HTTP/1.1 200 OK", fields) + b"5\r\nhello\r\n0\r\n\r\n")
    assert "both" in bad(render_head(b"HTTP/1.1 200 OK", fields[::-1]) + b"5\r\nhello\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    "data",
    [
        render_head(b"HTTP/1.1 403 Forbidden", [(b"X", b"\x1b[31m")]),
        render_head(b"HTTP/1.1 403 \x07", [(b"Content-Length", b"0")]),
    ],
    ids=["field", "reason"],
)
def test_control_character_in_a_declining_head_is_a_bad_response(data: bytes) -> None:
    assert "control character" in bad(data)


# The limit of the head.


def sized(size: int) -> bytes:
    unfilled = len(response((*RESPONSE_FIELDS, (b"X-Fill", b""))))
    return response((*RESPONSE_FIELDS, (b"X-Fill", b"a" * (size - unfilled))))


@pytest.mark.parametrize("piece", [1000, 16_384, 65_535, 65_536, 65_537, 200_000])
@pytest.mark.parametrize("before", [b"", CONTINUE])
@pytest.mark.parametrize("over", [-1, 0, 1, 10_000])
def test_limit_of_the_heads_does_not_depend_on_the_split(over: int, before: bytes, piece: int) -> None:
    """65 536 bytes for the 1xx and the final head together, as `MAX_RESPONSE_HEAD` says."""
    data = before + sized(MAX_RESPONSE_HEAD - len(before) + over) + b"frames"
    found = outcome([data[at : at + piece] for at in range(0, len(data), piece)])
    assert found[0] == ("bad" if over > 0 else "switched")


def test_line_without_end_is_a_bad_response() -> None:
    assert bad(b"HTTP/1.1 200 " + b"a" * 70_000)


def test_body_does_not_count() -> None:
    body = b"x" * 200_000
    _, out = relayed(render_head(b"HTTP/1.1 200 OK", [(b"Content-Length", b"200000")]) + body)
    assert understood(out)[1] == body


# Any other response, relayed whole.


@pytest.mark.parametrize("status", [200, 204, 301, 302, 304, 307, 400, 401, 403, 404, 429, 500, 503])
def test_any_other_status_is_relayed(status: int) -> None:
    fields = [(b"Content-Length", b"0")] if status not in {204, 304} else []
    found, out = relayed(render_head(b"HTTP/1.1 %d Reason of theirs" % status, fields))
    head, body = understood(out)
    assert (found.status, head.status_code, head.reason, body) == (status, status, b"Reason of theirs", b"")
    assert field(head, b"connection") == b"close"


def test_fields_are_relayed_in_order_and_case() -> None:
    fields = [
        (b"sERVER", b"x"),
        (b"WWW-Authenticate", b"Basic"),
        (b"Set-Cookie", b"a=1"),
        (b"Set-Cookie", b"b=2"),
        (b"Location", b"/login"),
        (b"Content-Length", b"2"),
    ]
    found, out = relayed(render_head(b"HTTP/1.1 401 Unauthorized", fields) + b"no")
    assert found.head == render_head(b"HTTP/1.1 401 Unauthorized", [*fields, (b"Connection", b"close")])
    assert out == found.head + b"no"


def test_hop_by_hop_fields_of_a_response_are_not_forwarded() -> None:
    fields = [
        (b"Connection", b"keep-alive, X-Private"),
        (b"Keep-Alive", b"timeout=5"),
        (b"X-Private", b"1"),
        (b"Upgrade", b"h2c"),
        (b"Trailer", b"X"),
        (b"Alt-Svc", b'h3=":443"'),
        (b"Proxy-Authenticate", b"Basic"),
        (b"Content-Length", b"0"),
    ]
    found, _ = relayed(render_head(b"HTTP/1.1 404 Not Found", fields))
    assert found.head == render_head(b"HTTP/1.1 404 Not Found", [(b"Content-Length", b"0"), (b"Connection", b"close")])


def test_426_keeps_the_protocol_to_upgrade_to() -> None:
    """RFC 9110 section 15.5.22: it must name the protocol, and Upgrade is hop by hop."""
    fields = [
        (b"Upgrade", b"websocket, HTTP/3.0"),
        (b"Connection", b"Upgrade"),
        (b"Sec-WebSocket-Version", b"13"),
        (b"Content-Length", b"0"),
    ]
    head, _ = understood(relayed(render_head(b"HTTP/1.1 426 Upgrade Required", fields))[1])
    assert field(head, b"upgrade") == b"websocket, HTTP/3.0"
    assert field(head, b"sec-websocket-version") == b"13"


def test_426_names_upgrade_in_connection() -> None:
    """RFC 9110 section 7.8: a sender of Upgrade MUST also send an "Upgrade" connection option."""
    fields = [(b"Upgrade", b"websocket"), (b"Connection", b"Upgrade"), (b"Content-Length", b"0")]
    head, _ = understood(relayed(render_head(b"HTTP/1.1 426 Upgrade Required", fields))[1])
    options = [value for name, value in head.headers if name == b"connection"]
    assert {option.strip().lower() for value in options for option in value.split(b",")} == {b"close", b"upgrade"}


def test_length_delimits_the_body() -> None:
    found, out = relayed(render_head(b"HTTP/1.1 200 OK", [(b"Content-Length", b"5")]) + b"he", b"ll", b"o and more")
    assert out == found.head + b"hello"


def test_length_zero_is_complete_at_once() -> None:
    reader = UpgradeResponseReader(PLAIN)
    assert reader.feed(render_head(b"HTTP/1.1 403 Forbidden", [(b"Content-Length", b"0")])) is not None
    assert not reader.complete
    assert reader.body(None) == b""
    assert reader.complete


def test_chunks_are_framed_anew() -> None:
    fields = [(b"Transfer-Encoding", b"Chunked"), (b"Trailer", b"X-Sum")]
    _, out = relayed(
        render_head(b"HTTP/1.1 200 OK", fields) + b"5;a=b\r\nhello\r\n00",
        b"3\r\n wo\r\n3\r\nr",
        b"ld\r\n0\r\nX-Sum: 1\r\nSet-Cookie: a=1\r\n\r\nmore",
    )
    head, body = understood(out)
    assert body == b"hello world"
    assert field(head, b"transfer-encoding") == b"chunked"
    assert field(head, b"content-length") is None
    assert field(head, b"trailer") is None
    assert b"X-Sum" not in out
    assert b"a=b" not in out
    assert out.endswith(b"0\r\n\r\n")


def test_end_delimits_the_body() -> None:
    found, out = relayed(render_head(b"HTTP/1.1 200 OK", [(b"Content-Type", b"text/plain")]) + b"hel", b"lo")
    assert out == found.head + b"hello"
    head, body = understood(out)
    assert (field(head, b"connection"), body) == (b"close", b"hello")


def test_end_right_after_the_head_is_an_empty_body() -> None:
    found, out = relayed(b"HTTP/1.1 200 OK\r\n\r\n")
    assert out == found.head


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize(
    "fields", [[], [(b"Content-Length", b"5")], [(b"Transfer-Encoding", b"chunked")]], ids=["no", "length", "chunked"]
)
def test_204_and_304_have_no_body(status: int, fields: list[Field]) -> None:
    """RFC 9112 section 6.3, item 1: the empty line ends them, whatever the fields say."""
    reader = UpgradeResponseReader(PLAIN)
    found = reader.feed(render_head(b"HTTP/1.1 %d x" % status, fields) + b"hello")
    assert isinstance(found, Declined)
    assert reader.body(None) == b""
    assert reader.complete


def test_response_of_http_1_0_is_relayed_as_1_1() -> None:
    _, out = relayed(b"HTTP/1.0 403 Forbidden\r\nConnection: keep-alive\r\n\r\nno")
    assert out == b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\n\r\nno"


@pytest.mark.parametrize(
    "data",
    [
        render_head(b"HTTP/1.1 200 OK", [(b"Content-Length", b"5")]),
        render_head(b"HTTP/1.1 200 OK", [(b"Content-Length", b"5")]) + b"hell",
        render_head(b"HTTP/1.1 200 OK", [(b"Transfer-Encoding", b"chunked")]),
        render_head(b"HTTP/1.1 200 OK", [(b"Transfer-Encoding", b"chunked")]) + b"5\r\nhell",
        render_head(b"HTTP/1.1 200 OK", [(b"Transfer-Encoding", b"chunked")]) + b"5\r\nhello\r\n",
        render_head(b"HTTP/1.1 200 OK", [(b"Transfer-Encoding", b"chunked")]) + b"5\r\nhello\r\n0\r\n",
        render_head(b"HTTP/1.1 200 OK", [(b"Transfer-Encoding", b"chunked")]) + b"5",
    ],
)
def test_truncated_body_is_a_bad_response(data: bytes) -> None:
    reader = UpgradeResponseReader(PLAIN)
    assert isinstance(reader.feed(data), Declined)
    reader.body(None)
    with pytest.raises(BadResponse):
        reader.body(b"")
    assert not reader.complete


@pytest.mark.parametrize("chunk", [b"x\r\n", b"-5\r\n", b"5 5\r\n", b"5\r\nhelloX", b"F" * 21 + b"\r\n"])
def test_bad_chunk_is_a_bad_response(chunk: bytes) -> None:
    reader = UpgradeResponseReader(PLAIN)
    assert reader.feed(render_head(b"HTTP/1.1 200 OK", [(b"Transfer-Encoding", b"chunked")]) + chunk) is not None
    with pytest.raises(BadResponse):
        reader.body(None)


# Any bytes.

BASES = (
    RIGHT + b"\x81\x05hello",
    CONTINUE + RIGHT,
    response((*RESPONSE_FIELDS, (b"Sec-WebSocket-Protocol", b"chat"), (b"Sec-WebSocket-Extensions", b"x-other; a=b"))),
    render_head(b"HTTP/1.1 403 Forbidden", [(b"Content-Length", b"5"), (b"Connection", b"keep-alive, X"), (b"X", b"1")])
    + b"hello",
    render_head(b"HTTP/1.1 200 OK", [(b"Transfer-Encoding", b"chunked")])
    + b"5;a\r\nhello\r\n6\r\n world\r\n0\r\nX: y\r\n\r\n",
    HINTS + render_head(b"HTTP/1.0 404 Not Found", [(b"Server", b"x")]) + b"not here",
    render_head(b"HTTP/1.1 426 Upgrade Required", [(b"Upgrade", b"websocket"), (b"Content-Length", b"0")]),
    b"HTTP/1.1 304 Not Modified\r\n\r\n",
)


def outcome(fed: list[bytes]) -> tuple[object, ...]:
    """Return the outcome of the pieces `fed` followed by the end.

    A body that turns out to be bad keeps what was already sent of it: that went to the client, so only the
    verdict is compared.
    """
    reader, rest = UpgradeResponseReader(OFFERS), iter((*fed, b""))
    try:
        found = answered(reader, rest)
        if isinstance(found, Switched):
            return "switched", found.head, found.leftover + b"".join(rest)
        out = reader.body(None)
        while not reader.complete:
            out += reader.body(next(rest))
    except BadResponse:
        return ("bad",)
    return "declined", found.status, understood(found.head + out)[1], found.head


@given(mutated(*BASES), splits())
def test_any_split_gives_the_same_and_only_a_bad_response_is_raised(data: bytes, cuts: list[int]) -> None:
    whole = outcome([data] if data else [])
    assert outcome(pieces(data, cuts)) == whole
    assert outcome([bytes((byte,)) for byte in data]) == whole


@given(mutated(*BASES))
def test_a_101_that_switches_is_clean(data: bytes) -> None:
    found = outcome([data] if data else [])
    if found[0] != "switched":
        return
    head = found[1]
    assert isinstance(head, bytes)
    assert head.count(b"\r\n\r\n") == 1
    assert head.endswith(b"\r\n\r\n")
    assert head.count(b"\r") == head.count(b"\n") == head.count(b"\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert head.lower().count(b"\r\nsec-websocket-accept: ") == 1
    assert b": %b\r\n" % ACCEPT in head
    assert b"\r\ncontent-length:" not in head.lower()
    assert b"\r\ntransfer-encoding:" not in head.lower()
