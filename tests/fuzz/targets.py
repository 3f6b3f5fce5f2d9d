"""What a fuzzer attacks: every reader of bytes that a client, a proxy, an origin or an operator sends.

A target takes any bytes. It fails, with any exception, if the reader raises something that its docstring does not name,
if its result depends on how the bytes were split, or if what the tunnel sends on means something else to its peer. The
first two bytes of the input choose where it is split, so that a fuzzer finds splits as it finds bytes.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h11
import hiredis
from starlette.requests import cookie_parser

from tests.handshakes import FIELDS as HANDSHAKE
from tlstunnel import config
from tlstunnel.config import RuleConfig
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.expressions import Expressions
from tlstunnel.firewall.facts import FIELDS, gather
from tlstunnel.firewall.lists import NamedLists
from tlstunnel.firewall.rules import Rules
from tlstunnel.handshake.body import BadBody, Chunked, render_chunk
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.forwarding import Forwarding, render_forwarded_head
from tlstunnel.handshake.plain import BodyReader, PlainResponseReader
from tlstunnel.handshake.refusal import Refusal, render_refusal
from tlstunnel.handshake.request import PlainRequest, Request, RequestReader, UpgradeRequest
from tlstunnel.handshake.response import BadResponse, Declined, Switched, UpgradeResponseReader
from tlstunnel.sockets import proxy_protocol
from tlstunnel.state import wire
from tlstunnel.state.ledger import Ledger
from tlstunnel.state.memory import MemoryCounters
from tlstunnel.state.valkey.replies import INCOMPLETE, Replies
from tlstunnel.state.valkey.scripts import decode_numbers, decode_registration
from tlstunnel.tls import hello

_FOLDER = Path("/nonexistent")
_RULES = Rules(
    [RuleConfig(name="banned", when='cookies["session"] == "banned"', action="block")], Expressions(NamedLists())
)
_PEER = "192.0.2.1"


def fuzz_hello(data: bytes) -> None:
    """A ClientHello: every prefix is incomplete or has the result of the whole."""
    data, cut = _choose_cut(data)
    whole, part = _read_hello(data), _read_hello(data[:cut])
    assert part in {None, whole}, f"{part} of a part, {whole} of the whole"


def _read_hello(data: bytes) -> object:
    try:
        found = hello.read_client_hello(data)
        needed = hello.bytes_needed(data)
    except hello.HelloError as error:
        return type(error).__name__
    if found is None:
        assert needed > len(data) or needed == hello.MAX_HELLO
    return found


def fuzz_proxy_header(data: bytes) -> None:
    """A PROXY header: every prefix is incomplete or has the result of the whole."""
    data, cut = _choose_cut(data)
    whole, part = _read_proxy_header(data), _read_proxy_header(data[:cut])
    assert part in {None, whole}, f"{part} of a part, {whole} of the whole"


def _read_proxy_header(data: bytes) -> object:
    assert proxy_protocol.bytes_needed(data) > 0
    try:
        return proxy_protocol.read_header(data)
    except proxy_protocol.BadHeader as error:
        return error.reason


def fuzz_request(data: bytes) -> None:
    """A request: the same in one piece and in two, and the origin reads what was checked, once."""
    data, cut = _choose_cut(data)
    for accept_plain in (False, True):
        whole, in_pieces = _read_request([data], accept_plain), _read_request([data[:cut], data[cut:]], accept_plain)
        assert whole == in_pieces
        if whole is not None:
            _check_forwarded_head(whole[0])


def _read_request(pieces: list[bytes], accept_plain: bool) -> tuple[Request, bytes] | None:
    reader = RequestReader(accept_plain)
    request, rest = None, b""
    try:
        for piece in pieces:
            if request is None:
                request = reader.feed(piece)
            else:
                rest += piece
    except Refusal as refusal:
        rendered = render_refusal(refusal, "0123456789abcdef")
        assert rendered.endswith(b"\r\n") or b"\r\n\r\n" in rendered
        return None
    return None if request is None else (request, reader.leftover + rest)


def _check_forwarded_head(request: Request) -> None:
    """Read the head for the origin with another parser: one request, and the one that was checked."""
    head = render_forwarded_head(request, Forwarding(_PEER, "0123456789abcdef", trusted=False))
    assert head.count(b"\r\n\r\n") == 1
    assert head.endswith(b"\r\n\r\n")
    origin = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    origin.receive_data(head)
    event = origin.next_event()
    assert isinstance(event, h11.Request), event
    names = [name for name, _ in event.headers]
    assert names.count(b"host") == 1
    if isinstance(request, PlainRequest):
        assert event.method == request.method.encode()
        assert (b"transfer-encoding" in names) == request.chunked
        assert (b"content-length" in names) <= (request.length is not None)
    else:
        assert event.method == b"GET"
        assert b"transfer-encoding" not in names
        assert b"content-length" not in names
    assert event.target == request.target


def fuzz_firewall(data: bytes) -> None:
    """What rules and limits see of a target and cookies: it never raises, and has the cookies that servers read."""
    data, cut = _choose_cut(data)
    fields = (*HANDSHAKE, (b"Cookie", data[cut:]))
    head = b"".join([b"GET /%b HTTP/1.1\r\n" % data[:cut], *(b"%b: %b\r\n" % field for field in fields), b"\r\n"])
    try:
        request = RequestReader().feed(head)
        if request is None:
            return
        facts = gather(request, Connection(ip=_PEER, site="localhost"), strict_path=False, now=0.0)
        for name in FIELDS:
            getattr(facts, name)
        outcome = _RULES.evaluate(facts)
    except Refusal:
        return
    for name, read in cookie_parser(facts.headers.get("cookie", "")).items():
        if name:
            assert _normalise(read) in facts.cookie_values[name]
        if (name, read) == ("session", "banned"):
            assert outcome.refusal is not None


def _normalise(value: str) -> str:
    """Decode escapes as rules see them: of letters, digits and ``-._~``, which no server sends."""

    def decode(escape: re.Match[str]) -> str:
        char = chr(int(escape[0][1:], 16))
        return char if re.fullmatch(r"[\w.~-]", char, re.ASCII) else escape[0].upper()

    return re.sub("%[0-9A-Fa-f]{2}", decode, value)


def fuzz_response(data: bytes) -> None:
    """An origin's response to an upgrade request: the same in one piece and in two, and the client can read it."""
    data, cut = _choose_cut(data)
    request = _sample_upgrade()
    whole = _read_response(UpgradeResponseReader(request), [data])
    assert whole == _read_response(UpgradeResponseReader(request), [data[:cut], data[cut:]])
    plain = _sample_plain()
    assert _read_plain_response(plain, [data]) == _read_plain_response(plain, [data[:cut], data[cut:]])


def _read_response(reader: UpgradeResponseReader, pieces: list[bytes]) -> tuple[int, bytes] | None:
    response: Switched | Declined | None = None
    out = b""
    try:
        for piece in [*filter(None, pieces), b""]:  # b"" is the end of the stream
            if response is None:
                response = reader.feed(piece)
                if isinstance(response, Declined):
                    out = response.head + reader.body(None)
            elif isinstance(response, Declined) and not reader.complete:
                out += reader.body(piece)
            if isinstance(response, Switched):
                assert response.head.startswith(b"HTTP/1.1 101 ")
                assert response.head.count(b"\r\n\r\n") == 1
                return 101, response.head
    except BadResponse:
        return None
    assert response is not None
    # A chunk of the origin's may leave in two: what the client reads must be the same.
    return response.status, _read_as_client(out)


def _read_plain_response(request: PlainRequest, pieces: list[bytes]) -> bytes | None:
    reader = PlainResponseReader(request)
    out = b""
    try:
        for piece in [*filter(None, pieces), b""]:  # b"" is the end of the stream
            if not reader.complete:
                out += reader.feed(piece)
    except BadResponse:
        return None
    return _read_as_client(out)


def _read_as_client(data: bytes) -> bytes:
    """Read one response with another parser; return its head's fields and its body. Raises what h11 raises."""
    client = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    client.send(h11.Request(method=b"GET", target=b"/", headers=[(b"Host", b"localhost")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    client.receive_data(b"")
    read = b""
    while True:
        event = client.next_event()
        if isinstance(event, h11.InformationalResponse | h11.Response):
            read += b"%d %r\n" % (event.status_code, list(event.headers))
        elif isinstance(event, h11.Data):
            read += event.data
        else:
            assert isinstance(event, h11.EndOfMessage), event
            return read


def fuzz_chunks(data: bytes) -> None:
    """A chunked body: the same content in one piece and in two, and another parser agrees on all that is accepted."""
    data, cut = _choose_cut(data)
    whole, in_pieces = _read_chunks([data]), _read_chunks([data[:cut], data[cut:]])
    assert whole == in_pieces
    request = _sample_plain(chunked=True)
    reader = BodyReader(request)
    try:
        framed = reader.feed(data[:cut]) + reader.feed(data[cut:])
    except Refusal:
        assert whole is None or not whole[1]
        return
    if reader.complete:
        assert whole is not None
        assert _read_chunks([framed]) == (whole[0], True)


def _read_chunks(pieces: list[bytes]) -> tuple[bytes, bool] | None:
    body = Chunked()
    try:
        content = b"".join(body.take(piece) for piece in pieces)
    except BadBody:
        return None
    assert render_chunk(content) or not content
    return content, body.complete


def fuzz_configuration(data: bytes) -> None:
    """A configuration file: a configuration, or errors that a terminal can show."""
    try:
        config.decode(data.decode("utf-8", "surrogateescape"), _FOLDER, "tlstunnel.toml")
    except ConfigurationError as error:
        str(error).encode()


def fuzz_ledger(data: bytes) -> None:
    """What a serving process sends to the ledger: the same in one piece and in two, and leases are counted exactly."""
    data, cut = _choose_cut(data)
    assert _ask_ledger([data]) == _ask_ledger([data[:cut], data[cut:]])


def _ask_ledger(pieces: list[bytes]) -> object:
    """Return what the ledger replies to two askers, and what it has counted for both. The first sends the bytes."""
    counters = MemoryCounters(clock=lambda: 1e6)
    ledger = Ledger(counters, lambda work: work.close(), clock=lambda: 1e6)
    replies: list[list[wire.LedgerMessage]] = [[], []]
    hostile, other = (ledger.open(one.extend) for one in replies)
    ledger.receive(other, wire.Batch(1e7, [wire.Take({"k": 1})]))
    failure, received, dialect = "", b"", wire.DIALECTS[wire.VERSION]
    try:
        for piece in pieces:
            payloads, received = wire.split(received + piece)
            for payload in payloads:
                ledger.receive(hostile, dialect.decode_batch(payload))
    except wire.WireError as error:
        failure = str(error)
    assert counters.tunnels == Counter(hostile.leases) + Counter(other.leases)
    for one in replies:
        sent = dialect.encode_replies(one)
        assert dialect.encode_replies(wire.decode_replies(sent[4:])) == sent
    ledger.close(hostile)
    assert counters.tunnels == {"k": 1}
    # What precedes a failure may be handled or not: the connection ends with it.
    return bool(failure) or [dialect.encode_replies(one) for one in replies]


def fuzz_ledger_reply(data: bytes) -> None:
    """What the ledger sends to a serving process: messages, or an error."""
    for decode in (wire.decode_hello, wire.decode_replies):
        try:
            decode(data)
        except wire.WireError:
            continue


def fuzz_valkey_reply(data: bytes) -> None:
    """Replies of a Valkey server: the same in one piece and in two, and numbers of ours or an error."""
    data, cut = _choose_cut(data)
    assert _read_valkey_replies([data]) == _read_valkey_replies([data[:cut], data[cut:]])


def _read_valkey_replies(pieces: list[bytes]) -> list[str]:
    reader, found = Replies(), []
    try:
        for piece in pieces:
            reader.feed(piece)
            while (reply := reader.get()) is not INCOMPLETE:
                found.append(repr(reply))
                for decode in (decode_numbers, decode_registration):
                    try:
                        decode(reply)
                    except ValueError:
                        continue
    except hiredis.ProtocolError as error:
        found.append(f"error: {error}")
    return found


def _choose_cut(data: bytes) -> tuple[bytes, int]:
    at = int.from_bytes(data[:2])
    data = data[2:]
    return data, at % (len(data) + 1)


def _sample_upgrade() -> UpgradeRequest:
    request = RequestReader().feed(
        b"GET / HTTP/1.1\r\nHost: localhost\r\n"
        b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: chat\r\n"
        b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
    )
    assert request is not None
    return request


def _sample_plain(*, chunked: bool = False) -> PlainRequest:
    body = b"Transfer-Encoding: chunked\r\n" if chunked else b""
    request = RequestReader(True).feed(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + body + b"\r\n")
    assert isinstance(request, PlainRequest)
    return request


TARGETS: dict[str, Callable[[bytes], None]] = {
    "hello": fuzz_hello,
    "proxy_header": fuzz_proxy_header,
    "request": fuzz_request,
    "firewall": fuzz_firewall,
    "response": fuzz_response,
    "chunks": fuzz_chunks,
    "configuration": fuzz_configuration,
    "ledger": fuzz_ledger,
    "ledger_reply": fuzz_ledger_reply,
    "valkey_reply": fuzz_valkey_reply,
}
