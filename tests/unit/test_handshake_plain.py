"""`http = "pass"`: a request without an upgrade, its body, and the response; hostile, and in any pieces."""

import http.client
import io
import re
from collections.abc import Iterable

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.handshakes import FIELDS, RICH_FIELDS, Field, mutated, pieces, render_head, request, splits, without
from tlstunnel.addresses import Networks
from tlstunnel.handshake.body import MAX_CHUNK_LINE, MAX_TRAILER, BadBody, Chunked
from tlstunnel.handshake.forwarding import Forwarding, find_client_address, read_request_id, render_forwarded_head
from tlstunnel.handshake.plain import BodyReader, PlainResponseReader
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import MAX_LENGTH, PlainRequest, Request, RequestReader, UpgradeRequest
from tlstunnel.handshake.response import MAX_RESPONSE_HEAD, BadResponse

HOST: Field = (b"Host", b"chat.example.com")
CHUNKED: Field = (b"Transfer-Encoding", b"chunked")
FROM_CLIENT = Forwarding("198.51.100.7", "0123456789abcdef", trusted=False)
FROM_PROXY = Forwarding("198.51.100.7", "0123456789abcdef", trusted=True)
TOLD = (
    (b"X-Forwarded-For", b"198.51.100.7"),
    (b"X-Forwarded-Proto", b"https"),
    (b"X-Forwarded-Host", b"chat.example.com"),
    (b"Forwarded", b'for=198.51.100.7;proto=https;host="chat.example.com"'),
    (b"X-Request-Id", b"0123456789abcdef"),
)
CLOSE: Field = (b"Connection", b"close")
SECOND = b"GET /admin HTTP/1.1\r\nHost: chat.example.com\r\n\r\n"


def asking(*more: Field, line: bytes = b"GET /app?x=1 HTTP/1.1") -> bytes:
    return request((HOST, *more), line)


def read(data: bytes) -> PlainRequest:
    found = RequestReader(accept_plain=True).feed(data)
    assert isinstance(found, PlainRequest)
    return found


def refused(data: bytes, *, accept_plain: bool = True) -> tuple[int, str]:
    with pytest.raises(Refusal) as caught:
        RequestReader(accept_plain).feed(data)
    return caught.value.status, caught.value.reason


def through(data: bytes, cuts: Iterable[int] = ()) -> tuple[PlainRequest, bytes]:
    """Return the request in `data`, which comes in pieces, and all that the origin gets of it; its body is complete."""
    reader, body, out, found = RequestReader(accept_plain=True), None, b"", None
    for piece in pieces(data, list(cuts)):
        if body is None:
            found = reader.feed(piece)
            if found is None:
                continue
            assert isinstance(found, PlainRequest)
            body = BodyReader(found)
            out = render_forwarded_head(found, FROM_CLIENT) + body.feed(reader.leftover)
        else:
            out += body.feed(piece)
    assert isinstance(found, PlainRequest) or body is not None
    assert body is not None
    assert body.complete
    assert isinstance(found, PlainRequest)
    return found, out


def served(data: bytes) -> tuple[h11.Request, bytes]:
    """Return how an origin parses `data`, which must be one whole request, the last one, and nothing more."""
    server = h11.Connection(h11.SERVER)
    server.receive_data(data)
    head = server.next_event()
    assert isinstance(head, h11.Request)
    body = b""
    while isinstance(event := server.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert event.headers.raw_items() == []
    assert server.their_state is h11.MUST_CLOSE
    assert server.trailing_data == (b"", False)
    return head, body


def fed(reader: BodyReader | PlainResponseReader, data: bytes, size: int) -> bytes:
    return b"".join([reader.feed(data[at : at + size]) for at in range(0, len(data), size)])


def chunked(*chunks: bytes, trailer: bytes = b"") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in chunks) + b"0\r\n" + trailer + b"\r\n"


# The request: which are forwarded.


@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "VERSION-CONTROL", "X_1"]
)
def test_method_is_forwarded(method: str) -> None:
    found, out = through(asking(line=b"%b /app HTTP/1.1" % method.encode()))
    assert found.method == method
    assert served(out)[0].method == method.encode()


def test_request_is_read_as_upgrade_requests_are() -> None:
    more = ((b"Cookie", b"a=1"), (b"x-Name", b"J\xc3\xbcrgen"))
    assert read(request(((b"Host", b"Chat.Example.COM.:8443"), *more), b"POST /a%20b?c HTTP/1.1")) == PlainRequest(
        method="POST",
        target=b"/a%20b?c",
        fields=((b"Host", b"Chat.Example.COM.:8443"), *more),
        authority=b"Chat.Example.COM.:8443",
        host="chat.example.com",
        length=None,
        chunked=False,
    )
    assert read(asking(*more)).by_name == {
        b"host": [HOST[1]],
        b"cookie": [b"a=1"],
        b"x-name": [b"J\xc3\xbcrgen"],
    }


@pytest.mark.parametrize(
    ("fields", "length", "is_chunked"),
    [
        ((), None, False),
        (((b"Content-Length", b"0"),), 0, False),
        (((b"Content-Length", b"0042"),), 42, False),
        (((b"Content-Length", b"5, 5"),), 5, False),
        (((b"Content-Length", b"5"), (b"content-length", b"5")), 5, False),
        (((b"Content-Length", b"%d" % MAX_LENGTH),), MAX_LENGTH, False),
        ((CHUNKED,), None, True),
        (((b"transfer-encoding", b"Chunked"),), None, True),
    ],
)
def test_framing_is_forwarded_once(fields: tuple[Field, ...], length: int | None, is_chunked: bool) -> None:
    """RFC 9112 section 6.3, item 5: equal lengths may be treated as one, and only one is forwarded."""
    found = read(asking(*fields, line=b"POST / HTTP/1.1"))
    assert (found.length, found.chunked) == (length, is_chunked)
    framing = [(b"Transfer-Encoding", b"chunked")] if is_chunked else []
    if length is not None:
        framing = [(b"Content-Length", b"%d" % length)]
    assert render_forwarded_head(found, FROM_CLIENT) == render_head(b"POST / HTTP/1.1", [HOST, *framing, CLOSE, *TOLD])


@pytest.mark.parametrize("accept_plain", [True, False])
def test_upgrade_request_is_one_whether_others_pass_or_not(accept_plain: bool) -> None:
    reader = RequestReader(accept_plain)
    found = reader.feed(request(RICH_FIELDS) + b"\x81\x05hello")
    assert found == RequestReader().feed(request(RICH_FIELDS))
    assert isinstance(found, UpgradeRequest)
    assert found.method == "GET"
    assert reader.leftover == b"\x81\x05hello"


def test_reader_without_pass_refuses_as_before() -> None:
    assert refused(asking(), accept_plain=False) == (426, "no upgrade")
    assert refused(asking(line=b"POST / HTTP/1.1"), accept_plain=False) == (405, "method")


def test_beginning_of_the_body_is_left_over() -> None:
    reader = RequestReader(accept_plain=True)
    assert reader.feed(asking((b"Content-Length", b"5"), line=b"POST / HTTP/1.1") + b"hel") is not None
    assert reader.leftover == b"hel"


def test_proxy_is_trusted_as_for_upgrade_requests() -> None:
    found = read(asking((b"X-Forwarded-For", b"192.0.2.1"), (b"X-Request-Id", b"abc")))
    assert read_request_id(found) == "abc"
    assert find_client_address(found, "10.0.0.9", Networks.parse(["10.0.0.0/8"])) == "192.0.2.1"
    assert b"\r\nX-Forwarded-For: 192.0.2.1, 198.51.100.7\r\n" in render_forwarded_head(found, FROM_PROXY)


# The request: which are refused.


@pytest.mark.parametrize("method", [b"CONNECT", b"TRACE", b"get", b"Post", b"pOST", b"connect", b"trace"])
def test_405(method: bytes) -> None:
    """Small letters: Werkzeug takes post for POST, and a rule on the method would have missed it."""
    target = b"chat.example.com:443" if method == b"CONNECT" else b"/"
    with pytest.raises(Refusal) as caught:
        RequestReader(accept_plain=True).feed(asking(line=b"%b %b HTTP/1.1" % (method, target)))
    assert (caught.value.status, caught.value.reason) == (405, "method")
    ((name, allowed),) = caught.value.fields
    assert name == b"Allow"
    assert method not in allowed.split(b", ")


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (request(line=b"POST /chat HTTP/1.1"), 405, "method"),
        (request((*FIELDS, (b"Content-Length", b"5"))) + b"hello", 400, "body"),
        (request((*FIELDS, CHUNKED)), 400, "body"),
        (request((*FIELDS, (b"Content-Length", b"0"), CHUNKED)), 400, "body"),
        (request(without(b"Connection")), 400, "Connection"),
        (request(without(b"Sec-WebSocket-Version")), 426, "WebSocket version"),
        (request(without(b"Sec-WebSocket-Key")), 400, "Sec-WebSocket-Key"),
        (request((*without(b"Upgrade"), (b"Upgrade", b"h2c, WebSocket"), CHUNKED)), 400, "body"),
    ],
)
def test_a_bad_websocket_request_is_refused_as_before(data: bytes, status: int, reason: str) -> None:
    assert refused(data) == refused(data, accept_plain=False) == (status, reason)


@pytest.mark.parametrize("version", [b"1.0", b"0.9", b"1.2", b"2.0"])
@pytest.mark.parametrize("more", [(), (CHUNKED,)])
def test_other_versions_are_refused(version: bytes, more: tuple[Field, ...]) -> None:
    assert refused(asking(*more, line=b"POST / HTTP/%b" % version)) == (505, "HTTP version")


@pytest.mark.parametrize(
    "target",
    [b"ws://chat.example.com/", b"ftp://chat.example.com/", b"https://chat.example.com/#b", b"*", b"a", b"?", b"/a#b"],
)
def test_target_that_is_not_a_path_is_refused(target: bytes) -> None:
    assert refused(asking(line=b"OPTIONS %b HTTP/1.1" % target)) == (400, "target form")


SMUGGLING: dict[str, tuple[tuple[Field, ...], str]] = {
    "length and chunked": (((b"Content-Length", b"5"), CHUNKED), "body"),
    "chunked and length": ((CHUNKED, (b"Content-Length", b"5")), "body"),
    "length of nothing and chunked": (((b"Content-Length", b"0"), CHUNKED), "body"),
    "length, small letters, and chunked": (((b"content-length", b"5"), (b"TRANSFER-ENCODING", b"Chunked")), "body"),
    "two lengths": (((b"Content-Length", b"5"), (b"Content-Length", b"6")), "malformed head"),
    "two lengths on a line": (((b"Content-Length", b"5, 6"),), "malformed head"),
    "three lengths": (((b"Content-Length", b"5, 5"), (b"Content-Length", b"6")), "malformed head"),
    "length beyond 63 bits": (((b"Content-Length", b"%d" % (MAX_LENGTH + 1)),), "body"),
    "length that wraps to 5": (((b"Content-Length", b"%d" % (2**64 + 5)),), "body"),
    **{
        f"Content-Length {value!r}": (((b"Content-Length", value),), "malformed head")
        for value in (b"", b"+5", b"-5", b"5 5", b"5.0", b"0x5", b"5,", b",5", b"5;", b"\xb2", b"1_0", b"5\t5", b"1e1")
    },
    **{
        f"Transfer-Encoding {value!r}": (((b"Transfer-Encoding", value),), "malformed head")
        for value in (
            b"",
            b"identity",
            b"gzip",
            b"gzip, chunked",
            b"chunked, identity",
            b"chunked, chunked",
            b"chunked,",
            b",chunked",
            b"chunked;a=b",
            b'"chunked"',
            b"xchunked",
            b"chunk",
            b"chunked\t chunked",
            b"chunked\xa0",
        )
    },
    "chunked twice": ((CHUNKED, CHUNKED), "malformed head"),
    "chunked and identity": ((CHUNKED, (b"Transfer-Encoding", b"identity")), "malformed head"),
    "chunked with a control character": (((b"Transfer-Encoding", b"\x0bchunked"),), "control character"),
    "chunked folded": (((b"Transfer-Encoding", b"\r\n chunked"),), "folded field"),
    "length folded": (((b"Content-Length", b"5\r\n 5"),), "folded field"),
    "blank before the colon": (((b"Transfer-Encoding ", b"chunked"),), "malformed head"),
    "blank before the name": (((b" Transfer-Encoding", b"chunked"),), "folded field"),
    "bare LF before it": (((b"X", b"a\nTransfer-Encoding: chunked"),), "bare LF"),
    "bare CR before it": (((b"X", b"a\rTransfer-Encoding: chunked"),), "control character"),
}


@pytest.mark.parametrize(("fields", "reason"), SMUGGLING.values(), ids=SMUGGLING)
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_ambiguous_framing_is_refused(method: bytes, fields: tuple[Field, ...], reason: str) -> None:
    data = asking(*fields, line=b"%b / HTTP/1.1" % method) + b"0\r\n\r\n" + SECOND
    assert refused(data) == (400, reason)


# The head for the origin.


@pytest.mark.parametrize(
    "fields",
    [
        ((b"Connection", b"keep-alive"),),
        ((b"Connection", b"close"), (b"connection", b"Keep-Alive")),
        ((b"Keep-Alive", b"timeout=5"),),
        ((b"Proxy-Connection", b"keep-alive"),),
        ((b"TE", b"trailers, deflate"), (b"Connection", b"TE")),
        ((b"Trailer", b"X-Sum"),),
        ((b"Upgrade", b"h2c"), (b"HTTP2-Settings", b"AAMAAABk"), (b"Connection", b"Upgrade, HTTP2-Settings")),
        ((b"Upgrade", b"h2c"),),
        ((b"Upgrade", b"TLS/1.0, foo/2"), (b"Connection", b"upgrade")),
        ((b"Upgrade", b"websockets"), (b"Connection", b"upgrade")),
        ((b"Upgrade", b""),),
        ((b"X-Private", b"1"), (b"Connection", b"x-private")),
        ((b"X-Forwarded-For", b"192.0.2.1"), (b"Forwarded", b"for=192.0.2.1"), (b"X_Real_IP", b"192.0.2.1")),
        ((b"Transfer_Encoding", b"chunked"),),
        ((b"Content_Length", b"5"),),
    ],
)
def test_hop_by_hop_field_is_not_forwarded(fields: tuple[Field, ...]) -> None:
    assert render_forwarded_head(read(asking(*fields)), FROM_CLIENT) == render_head(
        b"GET /app?x=1 HTTP/1.1", [HOST, CLOSE, *TOLD]
    )


@pytest.mark.parametrize(
    "fields",
    [
        ((b"Expect", b"100-continue"),),
        ((b"cOOkie", b"a=1"), (b"Cookie", b"b=2"), (b"Authorization", b"Bearer x")),
        ((b"Accept-Encoding", b"gzip"), (b"Range", b"bytes=0-1"), (b"If-None-Match", b'"a"')),
        ((b"Sec-WebSocket-Protocol", b"chat"), (b"Connection-Hint", b"x")),
    ],
)
def test_field_is_forwarded_unchanged(fields: tuple[Field, ...]) -> None:
    assert render_forwarded_head(read(asking(*fields)), FROM_CLIENT) == render_head(
        b"GET /app?x=1 HTTP/1.1", [HOST, *fields, CLOSE, *TOLD]
    )


@pytest.mark.parametrize("name", [b"Host", b"Content-Length", b"Transfer-Encoding"])
def test_framing_fields_cannot_be_nominated_away(name: bytes) -> None:
    framing = CHUNKED if name == b"Transfer-Encoding" else (b"Content-Length", b"5")
    found = read(asking(framing, (b"Connection", name), line=b"POST / HTTP/1.1"))
    assert render_forwarded_head(found, FROM_CLIENT) == render_head(b"POST / HTTP/1.1", [HOST, framing, CLOSE, *TOLD])


# The body to the origin.


@pytest.mark.parametrize("more", [(), ((b"Content-Length", b"0"),)])
@pytest.mark.parametrize("behind", [b"", SECOND, b"\r\n" + SECOND, b"hello"])
def test_request_without_a_body_is_complete_at_once(more: tuple[Field, ...], behind: bytes) -> None:
    found = read(asking(*more) + behind)
    body = BodyReader(found)
    assert body.complete
    assert body.feed(behind) == b""


def test_nothing_after_the_body_is_forwarded() -> None:
    length = (b"Content-Length", b"5")
    _, out = through(asking(length, line=b"POST / HTTP/1.1") + b"hello" + SECOND)
    assert served(out)[1] == b"hello"
    assert b"admin" not in out
    _, out = through(asking(CHUNKED, line=b"POST / HTTP/1.1") + chunked(b"hello") + SECOND)
    assert served(out)[1] == b"hello"
    assert b"admin" not in out


@pytest.mark.parametrize("framing", [(b"Content-Length", b"11"), CHUNKED], ids=["length", "chunked"])
def test_body_is_streamed(framing: Field) -> None:
    """Each byte is forwarded before the next one arrives."""
    body = BodyReader(read(asking(framing, line=b"POST / HTTP/1.1")))
    is_chunked = framing is CHUNKED
    assert body.feed(b"6\r\nhello " if is_chunked else b"hello ") == (b"6\r\nhello \r\n" if is_chunked else b"hello ")
    assert body.feed(b"") == b""
    assert not body.complete
    assert body.feed(b"\r\n5\r\nworld\r\n0\r\n" if is_chunked else b"world")
    assert body.complete is not is_chunked
    assert body.feed(b"\r\n") == (b"0\r\n\r\n" if is_chunked else b"")
    assert body.complete


def test_chunks_are_forwarded_without_extensions_and_trailer() -> None:
    data = b'5;a=b;c="d"\r\nhello\r\n006 \r\n world\r\n0;last\r\nX-Sum: 1\r\nTransfer-Encoding: chunked\r\n\r\n'
    _, out = through(asking(CHUNKED, line=b"POST / HTTP/1.1") + data)
    assert out.endswith(b"\r\n\r\nb\r\nhello world\r\n0\r\n\r\n")
    assert served(out)[1] == b"hello world"


BAD_CHUNKS: dict[str, bytes] = {
    "no size": b"\r\n",
    "no hexadecimal size": b"g\r\n",
    "negative size": b"-1\r\nh\r\n",
    "signed size": b"+1\r\nh\r\n",
    "size with a prefix": b"0x1\r\nh\r\n",
    "size with an underscore": b"1_0\r\n" + b"h" * 16,
    "blank before the size": b" 1\r\nh\r\n",
    "two sizes": b"1 1\r\nh\r\n",
    "size of 17 digits": b"00000000000000001\r\nh\r\n",
    "size that wraps": b"10000000000000001\r\nh\r\n",
    "other digits": b"\xb2\r\nhh\r\n",
    "LF behind the size": b"1\nh\r\n",
    "CR behind the size": b"1\rh\r\n0\r\n\r\n",
    "LF in an extension": b"1;a\nb\r\nh\r\n",
    "CR in an extension": b"1;a\rb\r\nh\r\n",
    "NUL in an extension": b"1;\x00\r\nh\r\n",
    "chunk longer than its size": b"1\r\nhello\r\n",
    "chunk shorter than its size": b"3\r\nh\r\n0\r\n\r\n",
    "LF behind the chunk": b"1\r\nh\n0\r\n\r\n",
    "nothing after the chunk": b"1\r\nh0\r\n\r\n",
    "LF ends the body": b"0\r\n\n",
    "LF behind the last size": b"0\n\r\n",
    "trailer without a colon": b"0\r\nX\r\n\r\n",
    "trailer without a name": b"0\r\n: x\r\n\r\n",
    "trailer with a blank before the colon": b"0\r\nX : y\r\n\r\n",
    "trailer folded": b"0\r\nX: y\r\n z\r\n\r\n",
    "trailer with a control character": b"0\r\nX: \x01\r\n\r\n",
    "trailer with a bare LF": b"0\r\nX: y\nZ: a\r\n\r\n",
    "request line as a trailer": b"0\r\n" + SECOND,
    "line without end": b"1;" + b"a" * MAX_CHUNK_LINE,
    "line too long": b"1;" + b"a" * (MAX_CHUNK_LINE - 3) + b"\r\nh\r\n",
    "trailer without end": b"0\r\nX: " + b"a" * MAX_TRAILER,
    "trailer too long": b"0\r\n" + b"X: a\r\n" * 3000 + b"\r\n",
}


@pytest.mark.parametrize("data", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
@pytest.mark.parametrize("size", [1, 70_000])
@pytest.mark.parametrize("before", [b"", b"5\r\nhello\r\n"])
def test_bad_chunk_is_refused(before: bytes, data: bytes, size: int) -> None:
    body = BodyReader(read(asking(CHUNKED, line=b"POST / HTTP/1.1")))
    data = before + data + b"\r\n" * 4
    with pytest.raises(Refusal) as caught:
        fed(body, data, size)
    assert (caught.value.status, caught.value.reason) == (400, "body")
    assert not body.complete


@pytest.mark.parametrize("size", [1, 1000, 70_000])
@pytest.mark.parametrize(
    ("line", "trailer"), [(0, 0), (1, 0), (0, 1)], ids=["both", "line too long", "trailer too long"]
)
def test_longest_line_and_trailer_pass(line: int, trailer: int, size: int) -> None:
    body = BodyReader(read(asking(CHUNKED, line=b"POST / HTTP/1.1")))
    data = b"5;" + b"a" * (MAX_CHUNK_LINE - 4 + line) + b"\r\nhello\r\n0\r\n"
    data += b"X: " + b"a" * (MAX_TRAILER - 9 + trailer) + b"\r\n\r\n"
    if line or trailer:
        with pytest.raises(Refusal):
            fed(body, data, size)
    else:
        assert fed(body, data, size).endswith(b"0\r\n\r\n")
    assert body.complete is (line == trailer == 0)


def test_a_read_of_the_smallest_chunks_is_little_work_and_one_chunk() -> None:
    body = BodyReader(read(asking(CHUNKED, line=b"POST / HTTP/1.1")))
    assert body.feed(b"1\r\nx\r\n" * 10_000) == b"2710\r\n" + b"x" * 10_000 + b"\r\n"


def test_any_length_is_streamed_without_being_buffered() -> None:
    body = BodyReader(read(asking((b"Content-Length", b"%d" % MAX_LENGTH), line=b"PUT / HTTP/1.1")))
    piece = b"x" * 65_536
    assert all(body.feed(piece) is piece or body.feed(piece) == piece for _ in range(100))
    assert not body.complete


CHUNKS = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
EXTENSION = st.sampled_from([b"", b";", b";a", b';a="b;c"', b" ", b"\t;x=\xff"])
TRAILER = st.sampled_from([b"", b"X-Sum: 1\r\n", b"A:\r\nHost: other\r\n"])


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=40), EXTENSION)), TRAILER, splits())
def test_chunked_body_in_any_pieces_arrives(chunks: list[tuple[bytes, bytes]], trailer: bytes, cuts: list[int]) -> None:
    sent = (
        b"".join(b"%X%b\r\n%b\r\n" % (len(each), more, each) for each, more in chunks) + b"00\r\n" + trailer + b"\r\n"
    )
    data = asking(CHUNKED, line=b"POST / HTTP/1.1") + sent + SECOND
    content = b"".join(each for each, _ in chunks)
    for split in (cuts, range(len(data))):
        head, body = served(through(data, split)[1])
        assert (head.method, body) == (b"POST", content)


@given(st.binary(max_size=200), st.binary(max_size=50), splits())
def test_counted_body_in_any_pieces_arrives(content: bytes, behind: bytes, cuts: list[int]) -> None:
    data = asking((b"Content-Length", b"%d" % len(content)), line=b"PUT / HTTP/1.1") + content + behind
    assert served(through(data, cuts)[1])[1] == content


CODED = (
    chunked(b"hello", b" world"),
    b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n" + SECOND,
    b"1\r\nh\r\n" * 3 + b"A\r\n0123456789\r\n000\r\n\r\n",
)


def decoded(fed: list[bytes]) -> tuple[bytes, bool] | None:
    body, content = Chunked(), b""
    try:
        for piece in fed:
            content += body.take(piece)
    except BadBody:
        return None
    return content, body.complete


@given(mutated(*CODED) | st.binary(max_size=60), splits())
@example(b"1\r\nh\r\n0\r\n\r\n", [3])
@example(b"1\r\nh\r\n0\r\n\n", [])
def test_coding_is_read_as_h11_reads_it_or_refused_and_the_same_in_any_pieces(data: bytes, cuts: list[int]) -> None:
    found = decoded([data])
    assert decoded(pieces(data, cuts)) == found
    assert decoded([bytes((byte,)) for byte in data]) == found
    if found is None:
        return
    server = h11.Connection(h11.SERVER)
    server.receive_data(asking(CHUNKED) + data)
    assert isinstance(server.next_event(), h11.Request)
    content = b""
    try:
        while isinstance(event := server.next_event(), h11.Data):
            content += event.data
    except h11.RemoteProtocolError:  # h11 notices it earlier: here a line is checked when it is complete
        assert not found[1]
        return
    if isinstance(event, h11.EndOfMessage) and not found[1]:
        # h11 takes a bare LF for the end of the trailers; here it begins a line that never ends.
        assert re.search(rb"\n(?<!\r\n)", data)
        return
    assert found == (content, isinstance(event, h11.EndOfMessage))


# The response.

GET = read(asking())
HEAD = read(asking(line=b"HEAD / HTTP/1.1"))
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n"


def relayed(*data: bytes, to: PlainRequest = GET) -> tuple[PlainResponseReader, bytes]:
    """Return what goes to the client of the origin's `data`, followed by its end."""
    reader, out = PlainResponseReader(to), b""
    for piece in (*data, b""):
        if reader.complete:
            break
        out += reader.feed(piece)
    assert reader.complete
    return reader, out


def bad(*data: bytes, to: PlainRequest = GET) -> tuple[int, str]:
    """Return the status that went to the client before the response turned out bad, and the reason."""
    reader = PlainResponseReader(to)
    with pytest.raises(BadResponse) as caught:
        list(map(reader.feed, (*data, b"")))
    return reader.status, caught.value.reason


class Wire:
    """The part of a socket that `http.client.HTTPResponse` uses."""

    def __init__(self, data: bytes) -> None:
        self.file = io.BytesIO(data)

    def makefile(self, _: str) -> io.BytesIO:
        return self.file


def understood(out: bytes, method: str = "GET") -> http.client.HTTPResponse:
    """Return how the standard library's client parses `out`: it must be one whole response and nothing more."""
    wire = Wire(out)
    response = http.client.HTTPResponse(wire, method=method)  # type: ignore[arg-type]
    response.begin()
    assert response.will_close
    response.body = response.read()  # type: ignore[attr-defined]
    assert wire.file.closed or wire.file.read() == b""
    return response


def body_of(response: http.client.HTTPResponse) -> bytes:
    body = response.body  # type: ignore[attr-defined]
    assert isinstance(body, bytes)
    return body


def test_response_is_forwarded_with_fields_in_order_and_case() -> None:
    fields = [(b"sERVER", b"x"), (b"Set-Cookie", b"a"), (b"Set-Cookie", b"b"), (b"Content-Length", b"2")]
    reader, out = relayed(render_head(b"HTTP/1.1 200 Very OK", fields) + b"ok")
    assert out == render_head(b"HTTP/1.1 200 Very OK", [*fields, CLOSE]) + b"ok"
    assert reader.status == 200


@pytest.mark.parametrize(
    "fields",
    [
        ((b"Connection", b"keep-alive"), (b"Keep-Alive", b"timeout=5")),
        ((b"Connection", b"X-Private"), (b"X-Private", b"1")),
        ((b"Upgrade", b"h2c"), (b"Connection", b"Upgrade")),
        ((b"Proxy-Connection", b"x"), (b"TE", b"x"), (b"Trailer", b"X")),
        ((b"Alt-Svc", b"clear"), (b"Proxy-Authenticate", b"Basic"), (b"Proxy-Authentication-Info", b"x=1")),
    ],
)
def test_hop_by_hop_fields_of_a_response_are_not_forwarded(fields: tuple[Field, ...]) -> None:
    length = (b"Content-Length", b"0")
    assert relayed(render_head(b"HTTP/1.1 200 OK", [*fields, length]))[1] == render_head(
        b"HTTP/1.1 200 OK", [length, CLOSE]
    )


def test_1xx_are_forwarded_at_once() -> None:
    reader = PlainResponseReader(GET)
    assert reader.feed(CONTINUE) == CONTINUE
    assert reader.feed(HINTS + b"HTTP/1.1 102") == HINTS
    assert reader.status == 0
    assert reader.feed(b" Processing\r\n\r\n") == b"HTTP/1.1 102 Processing\r\n\r\n"
    out = reader.feed(render_head(b"HTTP/1.1 200 OK", [(b"Content-Length", b"0")]))
    assert out == render_head(b"HTTP/1.1 200 OK", [(b"Content-Length", b"0"), CLOSE])
    assert reader.complete


def test_1xx_are_forwarded_without_framing_and_hop_by_hop_fields() -> None:
    fields = [(b"Content-Length", b"9"), CHUNKED, (b"Connection", b"close, X-Private"), (b"X-Private", b"1")]
    assert PlainResponseReader(GET).feed(render_head(b"HTTP/1.0 103 x", fields)) == b"HTTP/1.1 103 x\r\n\r\n"


@pytest.mark.parametrize("before", [b"", CONTINUE, HINTS])
@pytest.mark.parametrize("fields", [[], [(b"Upgrade", b"websocket"), (b"Connection", b"Upgrade")]])
def test_101_is_a_bad_response(before: bytes, fields: list[Field]) -> None:
    assert bad(before + render_head(b"HTTP/1.1 101 Switching Protocols", fields)) == (
        0,
        "101 in response to a request without Upgrade",
    )


@pytest.mark.parametrize("piece", [1000, 65_536])
def test_endless_1xx_are_a_bad_response(piece: int) -> None:
    endless = CONTINUE * 4000
    status, reason = bad(*(endless[at : at + piece] for at in range(0, len(endless), piece)))
    assert (status, reason) == (0, "response head too large")


@pytest.mark.parametrize("size", [1000, 65_536, 100_000])
def test_head_too_large_is_a_bad_response(size: int) -> None:
    reader = PlainResponseReader(GET)
    with pytest.raises(BadResponse):
        fed(reader, render_head(b"HTTP/1.1 200 OK", [(b"X", b"a" * MAX_RESPONSE_HEAD)]), size)
    assert reader.status == 0


FRAMINGS: list[list[Field]] = [[], [(b"Content-Length", b"5")], [CHUNKED]]


@pytest.mark.parametrize("status", [200, 404, 500])
@pytest.mark.parametrize("fields", FRAMINGS)
def test_response_to_head_has_no_body(status: int, fields: list[Field]) -> None:
    """RFC 9112 section 6.3, item 1. Content-Length stays: it is that of the response to a GET."""
    data = render_head(b"HTTP/1.1 %d x" % status, fields)
    for behind in (b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n"):
        reader = PlainResponseReader(HEAD)
        out = reader.feed(data + behind)
        assert reader.complete
        assert out == render_head(b"HTTP/1.1 %d x" % status, [*(f for f in fields if f is not CHUNKED), CLOSE])
        assert body_of(understood(out, "HEAD")) == b""


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("fields", FRAMINGS)
@pytest.mark.parametrize("to", [GET, HEAD], ids=["GET", "HEAD"])
def test_204_and_304_have_no_body(status: int, fields: list[Field], to: PlainRequest) -> None:
    """A 204 has no length either (RFC 9110 section 8.6)."""
    reader = PlainResponseReader(to)
    out = reader.feed(render_head(b"HTTP/1.1 %d x" % status, fields) + b"hello")
    assert reader.complete
    kept = [] if status == 204 else [field for field in fields if field is not CHUNKED]
    assert out == render_head(b"HTTP/1.1 %d x" % status, [*kept, CLOSE])


def test_length_delimits_the_response() -> None:
    _, out = relayed(
        render_head(b"HTTP/1.1 200 OK", [(b"Content-Length", b"5")]) + b"hel", b"lo" + b"HTTP/1.1 200 OK\r\n"
    )
    assert body_of(understood(out)) == b"hello"


def test_chunks_of_the_response_are_framed_anew_and_streamed() -> None:
    reader = PlainResponseReader(GET)
    head = reader.feed(render_head(b"HTTP/1.1 200 OK", [CHUNKED, (b"Trailer", b"X-Sum")]))
    assert head == render_head(b"HTTP/1.1 200 OK", [CHUNKED, CLOSE])
    first = reader.feed(b"5;a\r\nhel")
    assert first == b"3\r\nhel\r\n"
    rest = reader.feed(b"lo\r\n1\r\n!\r\n0\r\nX-Sum: 1\r\n\r\nmore")
    assert rest == b"3\r\nlo!\r\n0\r\n\r\n"
    assert reader.complete
    assert body_of(understood(head + first + rest)) == b"hello!"


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_end_delimits_the_response(version: bytes) -> None:
    reader, out = relayed(b"HTTP/%b 200 OK\r\n\r\nhel" % version, b"lo")
    assert out == b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello"
    assert body_of(understood(out)) == b"hello"
    assert reader.complete


@pytest.mark.parametrize(
    "data",
    [
        render_head(b"HTTP/1.1 200 OK", [(b"Content-Length", b"6")]) + b"hello",
        render_head(b"HTTP/1.1 200 OK", [(b"Content-Length", b"6")]),
        render_head(b"HTTP/1.1 200 OK", [CHUNKED]),
        render_head(b"HTTP/1.1 200 OK", [CHUNKED]) + b"6\r\nhello",
        render_head(b"HTTP/1.1 200 OK", [CHUNKED]) + b"5\r\nhello\r\n",
        render_head(b"HTTP/1.1 200 OK", [CHUNKED]) + b"5\r\nhello\r\n0\r\n",
    ],
)
def test_truncated_response_is_never_completed(data: bytes) -> None:
    reader = PlainResponseReader(GET)
    out = reader.feed(data)
    assert reader.status == 200
    with pytest.raises(BadResponse, match="incomplete body"):
        reader.feed(b"")
    assert not reader.complete
    with pytest.raises(http.client.HTTPException):
        understood(out)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        ((b"",), 0),
        ((CONTINUE,), 0),
        ((b"HTTP/1.1 200 OK\r\n",), 0),
        ((b"hello\r\n\r\n",), 0),
        ((render_head(b"HTTP/1.1 200 OK", [(b"Content-Length", b"5"), CHUNKED]),), 0),
        ((render_head(b"HTTP/1.0 200 OK", [CHUNKED]),), 0),
        ((render_head(b"HTTP/1.1 200 OK", [(b"Transfer-Encoding", b"gzip, chunked")]),), 0),
        ((render_head(b"HTTP/1.1 200 OK", [(b"Content-Length", b"5"), (b"Content-Length", b"6")]),), 0),
        ((render_head(b"HTTP/1.1 200 \x1b[2J", []),), 0),
        ((render_head(b"HTTP/1.1 200 OK", [(b"X", b"\x7f")]),), 0),
        ((render_head(b"HTTP/1.1 103 x", [(b"X", b"\x7f")]),), 0),
        ((render_head(b"HTTP/1.1 200 OK", [CHUNKED]) + b"x\r\n",), 0),
        ((render_head(b"HTTP/1.1 200 OK", [CHUNKED]), b"x\r\n"), 200),
        ((render_head(b"HTTP/1.1 200 OK", [CHUNKED]) + b"1\r\nh\r\n", b"x\r\n"), 200),
    ],
)
def test_status_shows_whether_a_bad_response_can_still_be_replaced(data: tuple[bytes, ...], status: int) -> None:
    assert bad(*data)[0] == status


def test_426_keeps_the_protocol_to_upgrade_to() -> None:
    fields = [(b"Upgrade", b"websocket"), (b"Connection", b"Upgrade"), (b"Content-Length", b"0")]
    _, out = relayed(render_head(b"HTTP/1.1 426 Upgrade Required", fields))
    assert b"\r\nUpgrade: websocket\r\nConnection: close, Upgrade\r\n" in out


# Any bytes.

REQUESTS = (
    asking(),
    asking((b"Content-Length", b"5"), line=b"POST / HTTP/1.1") + b"hello" + SECOND,
    asking(CHUNKED, (b"TE", b"trailers"), line=b"PUT / HTTP/1.1") + chunked(b"hello", trailer=b"X: y\r\n") + SECOND,
    asking((b"Upgrade", b"h2c"), (b"Connection", b"Upgrade, X"), (b"X", b"1"), (b"Forwarded", b"for=192.0.2.1")),
    request(),
    request(RICH_FIELDS) + b"\x81\x05hello",
)


def outcome(fed: list[bytes]) -> tuple[object, ...]:
    """Return the outcome of the pieces: the kind of request and what the origin gets of it; a refusal; or a wait."""
    reader, body, out = RequestReader(accept_plain=True), None, b""
    found: Request | None = None
    try:
        for number, piece in enumerate(fed):
            if body is not None:
                out += body.feed(piece)
                continue
            found = reader.feed(piece)
            if isinstance(found, UpgradeRequest):
                return "upgrade", found, reader.leftover + b"".join(fed[number + 1 :])
            if found is not None:
                body = BodyReader(found)
                out = body.feed(reader.leftover)
    except Refusal as refusal:
        return "refused", refusal.status, refusal.reason
    if body is None or found is None or not body.complete:
        return ("more",)
    return "plain", found, served(render_forwarded_head(found, FROM_CLIENT) + out)[1]


@given(mutated(*REQUESTS), splits())
def test_any_pieces_give_one_clean_request_or_a_refusal(data: bytes, cuts: list[int]) -> None:
    found = outcome([data])
    assert outcome(pieces(data, cuts)) == found
    assert outcome([bytes((byte,)) for byte in data]) == found


@given(mutated(*REQUESTS))
def test_passing_changes_nothing_for_websocket_requests(data: bytes) -> None:
    """Of the rest only the rows on the method, the upgrade and the body: other refusals stay."""

    def outcome_of(accept_plain: bool) -> tuple[object, ...]:
        try:
            return ("read", RequestReader(accept_plain).feed(data))
        except Refusal as refusal:
            return refusal.status, refusal.reason

    found, strict = outcome_of(accept_plain=True), outcome_of(accept_plain=False)
    if isinstance(found[1], PlainRequest):
        assert strict in [(405, "method"), (400, "body"), (426, "no upgrade")]
    elif found != strict:
        assert strict in [(405, "method"), (400, "body"), (426, "no upgrade")]
        assert found[0] in (400, 405)


@given(mutated(*REQUESTS), st.booleans())
def test_any_plain_request_is_forwarded_as_one_clean_head(data: bytes, trusted: bool) -> None:
    try:
        found = RequestReader(accept_plain=True).feed(data)
    except Refusal:
        return
    if not isinstance(found, PlainRequest):
        return
    head = render_forwarded_head(found, FROM_PROXY if trusted else FROM_CLIENT)
    assert head.startswith(b"%b %b HTTP/1.1\r\n" % (found.method.encode(), found.target))
    assert head.count(b"\r\n\r\n") == 1
    assert head.endswith(b"\r\n\r\n")
    assert head.count(b"\r") == head.count(b"\n") == head.count(b"\r\n")
    names = [name.lower() for name in re.findall(rb"\r\n([^:\r]+):", head)]
    assert names.count(b"host") == 1
    assert names.count(b"connection") == 1
    assert names.count(b"content-length") + names.count(b"transfer-encoding") == (
        found.chunked or found.length is not None
    )
    assert not {b"upgrade", b"te", b"trailer", b"keep-alive", b"proxy-connection"}.intersection(names)
    again = RequestReader(accept_plain=True).feed(head)
    assert isinstance(again, PlainRequest)
    assert (again.method, again.target, again.host) == (found.method, found.target, found.host)
    assert (again.length, again.chunked) == (found.length, found.chunked)


RESPONSES = (
    HINTS + render_head(b"HTTP/1.1 200 OK", [(b"Content-Length", b"5"), (b"Connection", b"keep-alive, X")]) + b"hello",
    render_head(b"HTTP/1.1 200 OK", [CHUNKED]) + b"5;a\r\nhello\r\n6\r\n world\r\n0\r\nX: y\r\n\r\n",
    CONTINUE + render_head(b"HTTP/1.0 404 Not Found", [(b"Server", b"x")]) + b"not here",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
    render_head(b"HTTP/1.1 101 x", [(b"Upgrade", b"websocket"), (b"Connection", b"upgrade")]),
)


def answered(fed: list[bytes], to: PlainRequest) -> tuple[object, ...]:
    reader, out = PlainResponseReader(to), b""
    try:
        for piece in (*fed, b""):
            if reader.complete:
                break
            out += reader.feed(piece)
    except BadResponse:
        return ("bad",)
    assert reader.complete
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=to.method, target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(out)
    client.receive_data(b"")
    interim = []
    while isinstance(event := client.next_event(), h11.InformationalResponse):
        interim.append((event.status_code, event.headers.raw_items()))
    assert isinstance(event, h11.Response)
    status, fields, body = event.status_code, event.headers.raw_items(), b""
    assert status == reader.status
    assert any(name == b"Connection" and value.startswith(b"close") for name, value in fields)
    while isinstance(event := client.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert client.trailing_data[0] == b""
    return interim, status, fields, body


@given(mutated(*RESPONSES), splits(), st.sampled_from([GET, HEAD]))
def test_any_pieces_of_a_response_give_one_clean_response_or_a_bad_one(
    data: bytes, cuts: list[int], to: PlainRequest
) -> None:
    found = answered([data] if data else [], to)
    assert answered(pieces(data, cuts), to) == found
    assert answered([bytes((byte,)) for byte in data], to) == found
