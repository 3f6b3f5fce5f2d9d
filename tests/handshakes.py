"""Valid handshakes, and mutations of them that a hostile peer may send."""

from itertools import pairwise

from hypothesis import strategies as st

# RFC 6455 section 1.3.
KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="

Field = tuple[bytes, bytes]

FIELDS: tuple[Field, ...] = (
    (b"Host", b"chat.example.com"),
    (b"Upgrade", b"websocket"),
    (b"Connection", b"Upgrade"),
    (b"Sec-WebSocket-Key", KEY),
    (b"Sec-WebSocket-Version", b"13"),
)

# As Chromium sends it, with what proxies and attackers add.
RICH_FIELDS: tuple[Field, ...] = (
    (b"Host", b"chat.example.com:8443"),
    (b"Connection", b"keep-alive, Upgrade, X-Private"),
    (b"X-Private", b"for one hop"),
    (b"Upgrade", b"websocket"),
    (b"Origin", b"https://chat.example.com"),
    (b"Cookie", b"a=1; b=2"),
    (b"X-Forwarded-For", b"192.0.2.1"),
    (b"sec-websocket-key", KEY),
    (b"Sec-WebSocket-Version", b"13"),
    (b"Sec-WebSocket-Protocol", b"chat, superchat"),
    (b"Sec-WebSocket-Extensions", b"permessage-deflate; client_max_window_bits, x-other"),
    (b"Content-Length", b"0"),
)

RESPONSE_FIELDS: tuple[Field, ...] = (
    (b"Upgrade", b"websocket"),
    (b"Connection", b"Upgrade"),
    (b"Sec-WebSocket-Accept", ACCEPT),
)

_FRAGMENTS = (
    b"\r",
    b"\n",
    b"\r\n",
    b"\r\n\r\n",
    b"\n\n",
    b"\r\n ",
    b"\x00",
    b"\x0b",
    b"\x7f",
    b"\x80",
    b"\xff",
    b" ",
    b"\t",
    b":",
    b",",
    b";",
    b'"',
    b"_",
    b"#",
    b"HTTP/1.0",
    b"GET / HTTP/1.1\r\nHost: b\r\n\r\n",
    b"\r\nContent-Length: 5",
    b"\r\nTransfer-Encoding: chunked",
    b"\r\nHost: other",
    b"\r\nConnection: Host, Sec-WebSocket-Key, Cookie",
    b"\r\nX_Forwarded_For: 192.0.2.9",
    b"\r\nForwarded: for=192.0.2.9",
    b"5\r\nhello\r\n0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
)
_POSITION = st.integers(0, 2000)
_CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), _POSITION, st.sampled_from(_FRAGMENTS) | st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("replace"), _POSITION, st.sampled_from(_FRAGMENTS) | st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("delete"), _POSITION, st.integers(1, 30)),
        st.tuples(st.just("swap lines"), _POSITION, _POSITION),
        st.tuples(st.just("double line"), _POSITION, _POSITION),
        st.tuples(st.just("drop line"), _POSITION, _POSITION),
    ),
    max_size=4,
)


def render_head(line: bytes, fields: tuple[Field, ...] | list[Field]) -> bytes:
    return line + b"\r\n" + b"".join(b"%b: %b\r\n" % field for field in fields) + b"\r\n"


def request(fields: tuple[Field, ...] | list[Field] = FIELDS, line: bytes = b"GET /chat?room=1 HTTP/1.1") -> bytes:
    return render_head(line, fields)


def response(fields: tuple[Field, ...] | list[Field], line: bytes = b"HTTP/1.1 101 Switching Protocols") -> bytes:
    return render_head(line, fields)


def without(name: bytes, fields: tuple[Field, ...] = FIELDS) -> tuple[Field, ...]:
    return tuple(field for field in fields if field[0].lower() != name.lower())


def mutated(*bases: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy for one of `bases` with up to four changes."""
    return st.builds(_changed, st.sampled_from(bases), _CHANGES)


def splits() -> st.SearchStrategy[list[int]]:
    """Return a strategy for the places to cut, which `pieces` takes modulo the length."""
    return st.lists(_POSITION, max_size=8)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Return `data` cut at `cuts`, without empty pieces."""
    at = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[a:b] for a, b in pairwise(at) if a < b]


def _changed(data: bytes, changes: list[tuple[str, int, bytes | int]]) -> bytes:
    for change, position, what in changes:
        at = position % (len(data) + 1)
        if isinstance(what, bytes):
            data = data[:at] + what + data[at + (len(what) if change == "replace" else 0) :]
        elif change == "delete":
            data = data[:at] + data[at + what :]
        else:
            lines = data.split(b"\r\n")
            a, b = position % len(lines), what % len(lines)
            if change == "swap lines":
                lines[a], lines[b] = lines[b], lines[a]
            elif change == "double line":
                lines.insert(b, lines[a])
            else:
                del lines[a]
            data = b"\r\n".join(lines)
    return data
