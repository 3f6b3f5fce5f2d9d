"""The upgrade request: RFC 6455 section 4.2.1 and RFC 9112, row by row, and any bytes from a client."""

import re

import h11
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from tests.handshakes import FIELDS, KEY, RICH_FIELDS, Field, mutated, pieces, request, splits, without
from tlstunnel.handshake.refusal import Refusal, render_refusal
from tlstunnel.handshake.request import (
    MAX_FIELDS,
    MAX_HEAD,
    RequestReader,
    UpgradeRequest,
    parse_strict,
    parse_with_h11,
)

ID = "0123456789abcdef"


def read(*data: bytes) -> UpgradeRequest:
    """Return the request that `data`, fed piece by piece, completes."""
    reader = RequestReader()
    *first, last = data
    for piece in first:
        assert reader.feed(piece) is None
    found = reader.feed(last)
    assert found is not None
    return found


def refused(data: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        RequestReader().feed(data)
    return caught.value


def response(refusal: Refusal) -> tuple[h11.Response, bytes]:
    """Return how an HTTP client parses the refusal's response."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "chat.example.com")]))
    client.send(h11.EndOfMessage())
    client.receive_data(render_refusal(refusal, ID))
    client.receive_data(b"")
    head = client.next_event()
    assert isinstance(head, h11.Response)
    body = b""
    while isinstance(part := client.next_event(), h11.Data):
        body += part.data
    assert isinstance(part, h11.EndOfMessage)
    assert client.their_state is h11.CLOSED or isinstance(client.next_event(), h11.ConnectionClosed)
    return head, body


def field(head: h11.Response, name: bytes) -> bytes | None:
    values = [value for found, value in head.headers if found == name]
    assert len(values) <= 1
    return values[0] if values else None


def filled(size: int) -> bytes:
    """Return a valid request whose head has `size` bytes."""
    unfilled = len(request((*FIELDS, (b"X-Fill", b""))))
    return request((*FIELDS, (b"X-Fill", b"a" * (size - unfilled))))


# What is accepted.


def test_valid_request_is_read() -> None:
    found = read(request(RICH_FIELDS, b"GET /chat?room=1&token=%20 HTTP/1.1"))
    assert found == UpgradeRequest(
        target=b"/chat?room=1&token=%20",
        fields=RICH_FIELDS,
        authority=b"chat.example.com:8443",
        host="chat.example.com",
        key=KEY,
        subprotocols=frozenset({b"chat", b"superchat"}),
        extensions=frozenset({b"permessage-deflate", b"x-other"}),
    )


def test_request_of_the_rfc_is_read() -> None:
    found = read(
        b"GET /chat HTTP/1.1\r\nHost: server.example.com\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nOrigin: http://example.com\r\n"
        b"Sec-WebSocket-Protocol: chat, superchat\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    assert (found.target, found.host, found.key) == (b"/chat", "server.example.com", KEY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"Upgrade", b"WebSocket"),
        (b"Upgrade", b"h2c, websocket"),
        (b"Upgrade", b"websocket,"),
        (b"Connection", b"keep-alive, UPGRADE"),
        (b"Connection", b"upgrade\t,close"),
        (b"connection", b"Upgrade"),
        (b"Sec-WebSocket-Version", b"  13\t"),
        (b"Sec-WebSocket-Key", b"\t" + KEY + b" "),
    ],
)
def test_accepts_what_the_rfc_lets_a_client_write(name: bytes, value: bytes) -> None:
    assert read(request((*without(name), (name, value)))).key == KEY


def test_list_fields_may_be_on_several_lines() -> None:
    fields = (*without(b"Connection"), (b"Connection", b"keep-alive"), (b"Connection", b"Upgrade"))
    fields += ((b"Sec-WebSocket-Protocol", b"a"), (b"Sec-WebSocket-Protocol", b"b,, c"))
    assert read(request(fields)).subprotocols == {b"a", b"b", b"c"}


@pytest.mark.parametrize(
    ("value", "host"),
    [
        (b"chat.example.com", "chat.example.com"),
        (b"Chat.Example.COM", "chat.example.com"),
        (b"chat.example.com.", "chat.example.com"),
        (b"chat.example.com.:443", "chat.example.com"),
        (b"chat.example.com:443", "chat.example.com"),
        (b"chat.example.com:", "chat.example.com"),
        (b"chat.example.com:65535", "chat.example.com"),
        (b"192.0.2.1:8443", "192.0.2.1"),
        (b"[2001:DB8::1]", "2001:db8::1"),
        (b"[::1]:8443", "::1"),
        (b"[0:0:0:0:0:0:0:1]", "::1"),
        (b"a_b-c~d", "a_b-c~d"),
        (b"xn--bcher-kva.example", "xn--bcher-kva.example"),
        (b"b%C3%BCcher.example", "b%c3%bccher.example"),
    ],
)
def test_host_is_read_without_port_and_brackets_and_in_lower_case(value: bytes, host: str) -> None:
    found = read(request(((b"Host", value), *without(b"Host"))))
    assert (found.host, found.authority) == (host, value)


@pytest.mark.parametrize("target", [b"/", b"/?", b"//two", b"/a?b=/?c", b"/%2e%2E/", b"/a:b@c;d", b"/" + b"a" * 9000])
def test_origin_form_is_kept_as_sent(target: bytes) -> None:
    assert read(request(line=b"GET %b HTTP/1.1" % target)).target == target


def test_values_may_hold_tabs_inside_and_bytes_above_127() -> None:
    fields = (*FIELDS, (b"X-Name", b"J\xc3\xbcrgen\tM\xfcller"))
    assert read(request(fields)).fields == fields


def test_content_length_of_zero_is_no_body() -> None:
    assert (b"Content-Length", b"0") in read(request((*FIELDS, (b"Content-Length", b"0")))).fields


@pytest.mark.parametrize("behind", [b"", b"\x81\x85\x00\x00\x00\x00hello", b"GET / HTTP/1.1\r\n\r\n", b"\n\x00"])
def test_what_follows_the_head_is_left_over(behind: bytes) -> None:
    reader = RequestReader()
    assert reader.feed(request() + behind) == read(request())
    assert reader.leftover == behind


def test_byte_by_byte_gives_the_same() -> None:
    assert read(*(bytes((byte,)) for byte in request(RICH_FIELDS))) == read(request(RICH_FIELDS))


def test_incomplete_head_waits_for_more() -> None:
    reader = RequestReader()
    assert reader.feed(b"") is None
    assert reader.feed(request()[:-1]) is None
    assert reader.target == b""


# What is refused.

REFUSED: dict[str, tuple[bytes, int, str]] = {
    **{
        f"method {method.decode()}": (request(line=b"%b /chat HTTP/1.1" % method), 405, "method")
        for method in (b"POST", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"PATCH", b"get", b"X")
    },
    "method CONNECT, authority-form": (request(line=b"CONNECT chat.example.com:443 HTTP/1.1"), 405, "method"),
    "method OPTIONS, asterisk-form": (request(line=b"OPTIONS * HTTP/1.1"), 405, "method"),
    **{
        f"version {version.decode()}": (request(line=b"GET / HTTP/%b" % version), 505, "HTTP version")
        for version in (b"1.0", b"1.2", b"1.9", b"2.0", b"0.9", b"3.0", b"0.0", b"9.9")
    },
    "version 1.0 without Host": (request(without(b"Host"), line=b"GET / HTTP/1.0"), 505, "HTTP version"),
    "version 1.0 and POST": (request(line=b"POST / HTTP/1.0"), 505, "HTTP version"),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP version"),
    "no Upgrade": (request(without(b"Upgrade")), 426, "no upgrade"),
    "no Upgrade, no Connection": (request(((b"Host", b"a"),)), 426, "no upgrade"),
    "Upgrade to something else": (request((*without(b"Upgrade"), (b"Upgrade", b"h2c"))), 426, "no upgrade"),
    "Upgrade to websocket/13": (request((*without(b"Upgrade"), (b"Upgrade", b"websocket/13"))), 426, "no upgrade"),
    "Upgrade empty": (request((*without(b"Upgrade"), (b"Upgrade", b""))), 426, "no upgrade"),
    "Upgrade without Connection": (request(without(b"Connection")), 400, "Connection"),
    "Upgrade with Connection: close": (
        request((*without(b"Connection"), (b"Connection", b"close"))),
        400,
        "Connection",
    ),
    "Upgrade with Connection: upgraded": (
        request((*without(b"Connection"), (b"Connection", b"upgraded"))),
        400,
        "Connection",
    ),
    "no version": (request(without(b"Sec-WebSocket-Version")), 426, "WebSocket version"),
    **{
        f"WebSocket version {value.decode()}": (
            request((*without(b"Sec-WebSocket-Version"), (b"Sec-WebSocket-Version", value))),
            426,
            "WebSocket version",
        )
        for value in (b"", b"8", b"7", b"0", b"14", b"013", b"+13", b"13.0", b"1 3", b"13, 13", b"8, 13", b"thirteen")
    },
    "WebSocket version doubled": (request((*FIELDS, (b"Sec-WebSocket-Version", b"13"))), 426, "WebSocket version"),
    "WebSocket version 13 and 8": (request((*FIELDS, (b"sec-websocket-version", b"8"))), 426, "WebSocket version"),
    "no key": (request(without(b"Sec-WebSocket-Key")), 400, "Sec-WebSocket-Key"),
    "key doubled": (request((*FIELDS, (b"Sec-WebSocket-Key", KEY))), 400, "Sec-WebSocket-Key"),
    "another key": (request((*FIELDS, (b"sec-websocket-key", KEY[::-1]))), 400, "Sec-WebSocket-Key"),
    **{
        f"key {value.decode('latin-1')!r}": (
            request((*without(b"Sec-WebSocket-Key"), (b"Sec-WebSocket-Key", value))),
            400,
            "Sec-WebSocket-Key",
        )
        for value in (
            b"",
            b"=" * 24,
            KEY[:-1],
            KEY[:-2],
            KEY + b"=",
            KEY[1:],
            b"A" + KEY,
            b"A" * 24,
            b"AAAAAAAAAAAAAAAAAAAA",  # 15 bytes
            b"AAAAAAAAAAAAAAAAAAAAAAA=",  # 17 bytes
            b"dGhlIHNhbXBsZSBub25j-_==",  # base64url
            b"dGhlIHNh bXBsZSBub25jZQ==",
            b"dGhlIHNhbXBsZSBub25jZ\xff==",
            KEY + b", " + KEY,
            b'"' + KEY + b'"',
        )
    },
    "no Host": (request(without(b"Host")), 400, "malformed head"),
    "Host doubled": (request((*FIELDS, (b"Host", b"chat.example.com"))), 400, "malformed head"),
    "Host in two cases": (request((*FIELDS, (b"hOST", b"other"))), 400, "malformed head"),
    **{
        f"Host {value.decode('latin-1')!r}": (request(((b"Host", value), *without(b"Host"))), 400, "Host")
        for value in (
            b"",
            b".",
            b"..",
            b"chat.example.com..",
            b"chat..example.com:443",
            b":443",
            b"a b",
            b"a@b",
            b"user:pw@a",
            b"a/b",
            b"a?b",
            b"a#b",
            b"a\\b",
            b'a"b',
            b"a<b>",
            b"a,b:1:2",
            b"a:b",
            b"a:-1",
            b"a:+1",
            b"a:65536",
            b"a:99999",
            b"a:123456",
            b"a:1:2",
            b"http://a",
            b"b\xc3\xbccher.example",
            b"%zz",
            b"a%",
            b"a%4",
            b"[",
            b"[]",
            b"::1",
            b"[::1",
            b"::1]",
            b"[::1]a",
            b"[::1]:a",
            b"[::1]:70000",
            b"[1::2::3]",
            b"[12345::]",
            b"[1:2:3:4:5:6:7:8:9]",
            b"[1.2.3.4]",
            b"[::1%25eth0]",
            b"[v1.a]",
            b"[chat.example.com]",
            b"chat.example.com, other",
        )
    },
    **{
        f"Content-Length {value.decode()!r}": (request((*FIELDS, (b"Content-Length", value))), 400, reason)
        for value, reason in (
            (b"5", "body"),
            (b"1", "body"),
            (b"10", "body"),
            (b"00000000000000000001", "body"),
            (b"5, 5", "body"),
            (b"99999999999999999999", "body"),
            (b"", "malformed head"),
            (b"-1", "malformed head"),
            (b"+0", "malformed head"),
            (b"0x0", "malformed head"),
            (b"0, 5", "malformed head"),
            (b"0 0", "malformed head"),
            (b"a", "malformed head"),
            (b"100000000000000000000000", "malformed head"),
        )
    },
    "two lengths": (
        request((*FIELDS, (b"Content-Length", b"0"), (b"content-length", b"5"))),
        400,
        "malformed head",
    ),
    **{
        f"Transfer-Encoding {value.decode('latin-1')!r}": (
            request((*FIELDS, (b"Transfer-Encoding", value))),
            400,
            "body" if value.lower() == b"chunked" else "malformed head",
        )
        for value in (
            b"chunked",
            b"CHUNKED",
            b"identity",
            b"gzip, chunked",
            b"",
            b"xchunked",
            b"chunked, chunked",
            b"x",
        )
    },
    "Content-Length 0 and Transfer-Encoding": (
        request((*FIELDS, (b"Content-Length", b"0"), (b"Transfer-Encoding", b"chunked"))),
        400,
        "body",
    ),
    **{
        name: (request(line=b"GET %b HTTP/1.1" % target), 400, "target form")
        for name, target in {
            "absolute-form, ws": b"ws://chat.example.com/chat",
            "absolute-form, wss": b"wss://chat.example.com/chat",
            "authority-form": b"chat.example.com:443",
            "asterisk-form": b"*",
            "relative path": b"chat",
            "query alone": b"?a",
            "fragment": b"/chat#a",
            "fragment alone": b"#",
            "absolute-form with a fragment": b"https://chat.example.com/chat#a",
            "absolute-form without slashes": b"https:chat.example.com",
        }.items()
    },
    **{
        name: (request(line=line), 400, "malformed head")
        for name, line in {
            "space in the target": b"GET /a b HTTP/1.1",
            "no target": b"GET  HTTP/1.1",
            "two spaces before the target": b"GET  / HTTP/1.1",
            "two spaces before the version": b"GET /  HTTP/1.1",
            "space after the version": b"GET / HTTP/1.1 ",
            "tab instead of space": b"GET\t/\tHTTP/1.1",
            "target above 127": b"GET /\xc3\xbc HTTP/1.1",
            "no version": b"GET /",
            "HTTP/0.9 with a name": b"GET / HTTP",
            "version in lower case": b"GET / http/1.1",
            "version of one digit": b"GET / HTTP/1",
            "version of three digits": b"GET / HTTP/1.10",
            "version without a dot": b"GET / HTTP/11",
            "another protocol": b"GET / SIP/2.0",
            "method that is no token": b"G(T / HTTP/1.1",
            "method with a colon": b"GET: / HTTP/1.1",
            "words": b"hello",
            "only a method": b"GET",
        }.items()
    },
    **{
        name: (first + request(), 400, "malformed head")
        for name, first in {
            "two empty lines before": b"\r\n\r\n",
            "CR before": b"\r",
            "an empty line and a space before": b"\r\n ",
            "an empty line and LF before": b"\r\n\n",
            "LF before": b"\n",
            "space before": b" ",
            "tab before": b"\t",
            "NUL before": b"\x00",
            "DEL before": b"\x7f",
            "byte above 127 before": b"\xef\xbb\xbf",
            "a TLS record before": b"\x16\x03\x01\x02\x00",
        }.items()
    },
    "bare LF everywhere": (request().replace(b"\r\n", b"\n"), 400, "bare LF"),
    "bare LF after the request line": (request().replace(b"\r\n", b"\n", 1), 400, "bare LF"),
    "bare LF inside a value": (request((*FIELDS, (b"X", b"a\nb"))), 400, "bare LF"),
    "bare LF as the empty line": (request()[:-2] + b"\n", 400, "bare LF"),
    "LF CR": (request().replace(b"\r\n", b"\n\r", 1), 400, "bare LF"),
    **{
        f"obs-fold by {fold!r}": (request((*FIELDS, (b"X", b"a\r\n" + fold + b"b"))), 400, "folded field")
        for fold in (b" ", b"\t", b" \t ")
    },
    "obs-fold after the request line": (request().replace(b"\r\n", b"\r\n ", 1), 400, "folded field"),
    "a line of white space": (request((*FIELDS, (b"X", b"a\r\n ")))[:-2] + b"Y: b\r\n\r\n", 400, "folded field"),
    **{
        f"control character {byte:#04x} in a value": (
            request((*FIELDS, (b"X", b"a" + bytes((byte,)) + b"b"))),
            400,
            "control character",
        )
        for byte in (*range(9), 11, 12, *range(14, 32), 127)
    },
    "lone CR in a value": (request((*FIELDS, (b"X", b"a\rb"))), 400, "control character"),
    "lone CR at the end of a value": (request((*FIELDS, (b"X", b"a\r"))), 400, "control character"),
    "lone CR in the request line": (request(line=b"GET /\r HTTP/1.1"), 400, "control character"),
    "NUL in the target": (request(line=b"GET /\x00 HTTP/1.1"), 400, "control character"),
    "NUL in a name": (request((*FIELDS, (b"X\x00", b"a"))), 400, "control character"),
    **{
        f"field line {line!r}": (request()[:-2] + line + b"\r\n\r\n", 400, "malformed head")
        for line in (
            b"X : a",
            b"X\t: a",
            b"X",
            b": a",
            b":",
            b"X Y: a",
            b"X(Y): a",
            b'"X": a',
            b"X\xff: a",
            b"X/Y: a",
            b"GET / HTTP/1.1",
            b"Transfer-Encoding : chunked",
            b"Content-Length : 5",
        )
    },
}


@pytest.mark.parametrize(("data", "status", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(data: bytes, status: int, reason: str) -> None:
    refusal = refused(data)
    assert (refusal.status, refusal.reason) == (status, reason)


@pytest.mark.parametrize("data", [case[0] for case in REFUSED.values()], ids=REFUSED)
def test_refused_the_same_byte_by_byte(data: bytes) -> None:
    assert outcome([bytes((byte,)) for byte in data]) == outcome([data])


@pytest.mark.parametrize(("data", "status", "reason"), REFUSED.values(), ids=REFUSED)
def test_refusal_is_a_response_that_http_clients_understand(data: bytes, status: int, reason: str) -> None:
    head, body = response(refused(data))
    assert head.status_code == status
    assert head.http_version == b"1.1"
    assert b"close" in (field(head, b"connection") or b"").split(b", ")
    assert field(head, b"content-type") == b"text/plain; charset=utf-8"
    assert field(head, b"x-request-id") == ID.encode()
    assert field(head, b"content-length") == b"%d" % len(body)
    assert body.startswith(b"%d " % status)
    assert ID.encode() in body
    assert len(body) < 300


def test_405_names_the_allowed_method() -> None:
    head, _ = response(refused(request(line=b"POST / HTTP/1.1")))
    assert field(head, b"allow") == b"GET"


@pytest.mark.parametrize(
    ("fields", "version"),
    [(without(b"Upgrade"), None), (without(b"Sec-WebSocket-Version"), b"13")],
    ids=["no Upgrade", "no version"],
)
def test_426_names_the_protocol_to_upgrade_to(fields: tuple[Field, ...], version: bytes | None) -> None:
    """RFC 9110 section 7.8: a sender of Upgrade names it in Connection. RFC 6455 section 4.4: the version."""
    head, _ = response(refused(request(fields)))
    assert field(head, b"upgrade") == b"websocket"
    assert field(head, b"connection") == b"close, Upgrade"
    assert field(head, b"sec-websocket-version") == version


def test_other_refusals_offer_no_upgrade() -> None:
    head, _ = response(refused(request(without(b"Sec-WebSocket-Key"))))
    assert field(head, b"upgrade") is None
    assert field(head, b"connection") == b"close"


@pytest.mark.parametrize("status", [400, 403, 405, 408, 421, 426, 429, 431, 500, 502, 503, 504, 505])
def test_every_status_of_the_design_has_a_response(status: int) -> None:
    head, body = response(Refusal(status, "word", "a sentence"))
    assert head.status_code == status
    assert head.reason
    assert b"a sentence\n" in body


def test_refusal_without_a_record_has_no_id() -> None:
    answer = render_refusal(Refusal(400, "plain HTTP", "use wss://"), None)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert body == b"400 Bad Request: use wss://\n"
    assert b"Content-Length: %d\r\n" % len(body) in head
    assert b"x-request-id" not in head.lower()


def test_response_contains_nothing_that_the_client_sent() -> None:
    refusal = refused(request((*FIELDS, (b"X-\xffevil", b"evil")), line=b"GET /evil HTTP/1.1"))
    assert "evil" not in refusal.detail
    assert b"evil" not in render_refusal(refusal, ID)


# The limits.


def test_head_of_16384_bytes_passes() -> None:
    data = filled(MAX_HEAD)
    assert len(data) == 16_384
    assert read(data).key == KEY
    assert read(data[:-1], data[-1:]).key == KEY


def test_head_of_16385_bytes_is_too_large() -> None:
    refusal = refused(filled(MAX_HEAD + 1))
    assert (refusal.status, refusal.reason) == (431, "head too large")


@pytest.mark.parametrize("size", [MAX_HEAD - 1, MAX_HEAD, MAX_HEAD + 1, 2 * MAX_HEAD])
@pytest.mark.parametrize("piece", [1, 7, 1000, 16_383, 16_384, 16_385, 65_536])
def test_limit_does_not_depend_on_the_split(size: int, piece: int) -> None:
    data = filled(size) + b"frames"
    found = outcome([data[at : at + piece] for at in range(0, len(data), piece)])
    assert found == outcome([data])
    assert found[0] == ("request" if size <= MAX_HEAD else "refused")


@pytest.mark.parametrize("data", [b"GET /" + b"a" * 20_000, b"a" * 16_384, request()[:-2] + b"X: " + b"b" * 20_000])
def test_line_without_end_is_too_large(data: bytes) -> None:
    assert refused(data).status == 431


def test_leftover_does_not_count() -> None:
    reader = RequestReader()
    assert reader.feed(filled(MAX_HEAD) + b"x" * 100_000) is not None
    assert reader.leftover == b"x" * 100_000


def test_100_fields_pass() -> None:
    fields = FIELDS + tuple((b"X-%d" % n, b"") for n in range(MAX_FIELDS - len(FIELDS)))
    assert len(read(request(fields)).fields) == 100


def test_101_fields_are_too_many() -> None:
    fields = FIELDS + tuple((b"X-%d" % n, b"") for n in range(MAX_FIELDS - len(FIELDS) + 1))
    refusal = refused(request(fields))
    assert (refusal.status, refusal.reason) == (431, "too many fields")


# What is known about a refused request.


def test_target_of_a_refused_request_is_known() -> None:
    reader = RequestReader()
    with pytest.raises(Refusal):
        reader.feed(request(line=b"POST /chat?token=1 HTTP/1.1"))
    assert reader.target == b"/chat?token=1"


# Any bytes.

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
VALUE = rb"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?"
# RFC 9112 sections 3 and 5, without obs-fold; written independently of the code.
ONE_REQUEST = re.compile(
    rb"GET (/[\x21-\x7e]*) HTTP/1\.1\r\n(?:" + TOKEN + rb":[ \t]*" + VALUE + rb"[ \t]*\r\n){1,100}\r\n"
)
BASES = (
    request(),
    request(RICH_FIELDS),
    request() + b"\x81\x05hello",
    request() + request(line=b"GET /second HTTP/1.1"),
    request((*FIELDS, (b"Content-Length", b"5"))) + b"hello",
    request(((b"Host", b"[::1]:443"), *without(b"Host"))),
    request(line=b"POST http://a/ HTTP/1.0"),
)


def outcome(fed: list[bytes]) -> tuple[object, ...]:
    """Return the outcome of the pieces `fed`: a request and everything after it, a refusal, or a wait for more."""
    reader = RequestReader()
    for number, piece in enumerate(fed):
        try:
            found = reader.feed(piece)
        except Refusal as refusal:
            return "refused", refusal.status, refusal.reason, refusal.args, reader.target
        if found is not None:
            assert found.target == reader.target
            return "request", found, reader.leftover + b"".join(fed[number + 1 :])
    return ("more",)


@given(st.binary(max_size=400) | mutated(*BASES), splits())
@example(request()[:-1] + b"\r\n", [len(request()) - 1])
def test_any_split_gives_the_same_and_nothing_but_a_refusal_is_raised(data: bytes, cuts: list[int]) -> None:
    whole = outcome([data])
    assert outcome(pieces(data, cuts)) == whole
    assert outcome([bytes((byte,)) for byte in data]) == whole


@given(mutated(*BASES))
def test_what_is_accepted_is_one_request_by_the_rfc(data: bytes) -> None:
    reader = RequestReader()
    try:
        found = reader.feed(data)
    except Refusal:
        return
    if found is None:
        return
    head = data[: len(data) - len(reader.leftover)].removeprefix(b"\r\n")
    match = ONE_REQUEST.fullmatch(head)
    assert match is not None
    assert found.target == match[1]
    assert head.count(b"\r\n\r\n") == 1
    assert len(re.findall(rb"(?i)\r\nhost:", head)) == 1
    assert len(re.findall(rb"(?i)\r\nsec-websocket-key:", head)) == 1
    assert not re.search(rb"(?i)\r\ntransfer-encoding", head)
    assert all(not length.strip(b"0, \t") for length in re.findall(rb"(?i)\r\ncontent-length:([^\r]*)", head))
    assert b"websocket" in head.lower()
    assert re.fullmatch(r"[\x21-\x7e]*", found.host)
    assert all(name and not value.startswith((b" ", b"\t")) for name, value in found.fields)


@given(mutated(*BASES))
@example(BASES[0])
def test_what_the_strict_parser_reads_h11_reads_the_same(data: bytes) -> None:
    """One expression reads nearly every request: it may leave one to h11, but must never read one differently."""
    head = data[: data.find(b"\r\n\r\n") + 4]
    read = parse_strict(head)
    if read is not None:
        assert parse_with_h11(head) == read
    else:
        event(f"left to h11: {head[:4]!r}")


@pytest.mark.parametrize("base", [BASES[0], BASES[2], BASES[3], BASES[5]])
def test_ordinary_requests_are_read_by_the_strict_parser(base: bytes) -> None:
    head = base[: base.find(b"\r\n\r\n") + 4]
    assert parse_strict(head) == parse_with_h11(head)


@pytest.mark.parametrize(
    "field",
    [
        b"Content-Length: 0",
        b"Transfer-Encoding: chunked",
        b"Host: two",
        b"Broken",
        b"Bad Name: x",
        b"X: a\x01b",
        b"X: a\n b",
        b" folded",
        b": nameless",
    ],
)
def test_requests_that_only_h11_reads_fully_are_left_to_it(field: bytes) -> None:
    assert parse_strict(request()[:-2] + field + b"\r\n\r\n") is None


# --- absolute-form and empty lines (RFC 9112 sections 3.2.2 and 2.2) -------------------------------------------------


@pytest.mark.parametrize(
    ("target", "path", "authority", "host"),
    [
        (b"https://other.example/chat?a=/b", b"/chat?a=/b", b"other.example", "other.example"),
        (b"HTTP://Other.Example:8443", b"/", b"Other.Example:8443", "other.example"),
        (b"https://other.example?a", b"/?a", b"other.example", "other.example"),
        (b"https://[::1]:1//x/../y", b"//x/../y", b"[::1]:1", "::1"),
        (b"https://other.example./", b"/", b"other.example.", "other.example"),
    ],
)
@pytest.mark.parametrize("start", [b"", b"\r\n"])
def test_absolute_form_replaces_host(start: bytes, target: bytes, path: bytes, authority: bytes, host: str) -> None:
    for plain in (False, True):
        fields = FIELDS if not plain else without(b"Upgrade")
        data = start + request(fields, line=b"GET %b HTTP/1.1" % target)
        reader = RequestReader(plain)
        found = reader.feed(data)
        assert found is not None
        assert (found.target, found.authority, found.host) == (path, authority, host)
        assert found.fields == tuple((name, authority if name == b"Host" else value) for name, value in fields)
        assert found.by_name[b"host"] == [authority]
        assert reader.target == path


@pytest.mark.parametrize("authority", [b"", b"a@b", b"a b", b":80", b"a:65536", b"[::g]", b"a..b", b"a,b\\", b"*:*:*"])
def test_absolute_form_with_an_invalid_authority_is_refused(authority: bytes) -> None:
    with pytest.raises(Refusal) as caught:
        RequestReader().feed(request(line=b"GET https://%b/ HTTP/1.1" % authority))
    assert caught.value.status == 400


@pytest.mark.parametrize("hosts", [(), (b"a b",), (b"chat.example.com", b"chat.example.com"), (b"",)])
def test_the_ignored_host_must_be_valid(hosts: tuple[bytes, ...]) -> None:
    fields = (*((b"Host", host) for host in hosts), *without(b"Host"))
    with pytest.raises(Refusal) as caught:
        RequestReader().feed(request(fields, line=b"GET https://chat.example.com/ HTTP/1.1"))
    assert caught.value.status == 400
