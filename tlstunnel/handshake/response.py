"""The origin's response: a verified ``101``, another response to relay whole, or neither.

RFC 6455 section 4.1 says what a client must check in a ``101``. If the tunnel did not check it, an attacker who can
make an origin send something else would have a raw pipe to that origin (docs/architecture.md, smuggling).
"""

import re
from dataclasses import dataclass

import h11
from wsproto.utilities import generate_accept_token

from tlstunnel.handshake.body import LAST_CHUNK, BadBody, Body, Chunked, Counted, UntilEnd, render_chunk
from tlstunnel.handshake.fields import (
    ByName,
    find_hop_by_hop_of_response,
    group_by_name,
    has_control,
    has_token,
    parse_extension_names,
    split_list,
)
from tlstunnel.handshake.malformed import describe_malformed_head
from tlstunnel.handshake.refusal import render_head
from tlstunnel.handshake.request import UpgradeRequest

MAX_RESPONSE_HEAD = 65_536
"""Bytes of the interim heads and the final one together. Envoy allows 60 KiB, node 16 KiB."""

_NO_LENGTH = frozenset({b"content-length"})
"""Not allowed in a 1xx or a 204 (RFC 9110 section 8.6); some origins send ``Content-Length: 0`` anyway."""


# The strict syntax of RFC 9112 sections 4 and 5. What a recipient may accept beyond it is left to h11.
_SWITCHING = re.compile(
    rb"HTTP/1\.1 101(?: ([\t\x20-\x7e]*))?\r\n"
    rb"((?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e]*\r\n)+)\r\n"
)
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})

# h11 reads a response only after a request. It only needs to know that a 101 is possible: whether it is allowed, and
# where the body ends, is decided here.
_UPGRADE = h11.Request(
    method=b"GET", target=b"/", headers=[(b"Host", b"-"), (b"Connection", b"upgrade"), (b"Upgrade", b"websocket")]
)
_END = h11.EndOfMessage()


class BadResponse(Exception):
    """The origin's response to this request is invalid. `reason` is for the record; the client gets nothing of it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Switched:
    """A verified 101: the head for the client, and what the origin sent after it."""

    head: bytes
    leftover: bytes
    status: int = 101


@dataclass(frozen=True, slots=True)
class Declined:
    """Another final response: its status, and the head for the client. `ResponseReader.body` reads its body."""

    status: int
    head: bytes


class ResponseReader:
    """Reads an origin's response to any request: h11 reads its heads, `body` its body."""

    def __init__(self) -> None:
        self.complete = False
        self._taken = 0
        self._parser_or_none: h11.Connection | None = None
        self._after_head = b""
        self._body: Body = Counted(0)
        self._chunked = False

    @property
    def _parser(self) -> h11.Connection:
        """h11's parser, created for the first response that is not a plain 101 in one piece."""
        if self._parser_or_none is None:
            self._parser_or_none = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_RESPONSE_HEAD)
            self._parser_or_none.send(_UPGRADE)
            self._parser_or_none.send(_END)
        return self._parser_or_none

    def body(self, data: bytes | None) -> bytes:
        """Take the next bytes of the body (None for those already fed); return those for the client."""
        try:
            if data is None:
                content = self._body.take(self._after_head)
                self._after_head = b""
            elif data:
                content = self._body.take(data)
            else:
                content = b""
                self._body.end()
        except BadBody as error:
            raise BadResponse(error.reason) from None
        self.complete = self._body.complete
        if not self._chunked:
            return content
        return render_chunk(content) + (LAST_CHUNK if self.complete else b"")

    def _read_final_head(self, data: bytes) -> h11.InformationalResponse | h11.Response | None:
        """Take the next bytes; return the final head, or a 101, once it is complete. Raises `BadResponse`."""
        if not data:
            raise BadResponse("origin closed the connection without a response")
        self._taken += len(data)
        event = self._next_event(data)
        while isinstance(event, h11.InformationalResponse) and event.status_code != 101:
            self._handle_interim(event)
            event = self._next_event(None)
        self._after_head, _ = self._parser.trailing_data
        if self._taken - (0 if event is h11.NEED_DATA else len(self._after_head)) > MAX_RESPONSE_HEAD:
            raise BadResponse("response head too large")
        if event is h11.NEED_DATA:
            return None
        assert isinstance(event, h11.InformationalResponse | h11.Response)
        self._parser_or_none = None  # not needed any more, and holds up to 64 KiB
        return event

    def _handle_interim(self, event: h11.InformationalResponse) -> None:
        """Handle a 1xx before the final head. It is dropped: a client that asked for an upgrade waits for the 101."""

    def _has_no_body(self, status: int) -> bool:
        """Return whether responses with this status never have a body (RFC 9112 section 6.3, item 1)."""
        return status in {204, 304}

    def _next_event(self, data: bytes | None) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            if data is not None:
                self._parser.receive_data(data)
            return self._parser.next_event()
        except h11.RemoteProtocolError as error:
            raise BadResponse(f"response is not HTTP: {describe_malformed_head(error)}") from None

    def _build_declined(self, event: h11.Response) -> Declined:
        fields = check_fields(event)
        coded = b"transfer-encoding" in fields
        lengths = fields.get(b"content-length")
        if coded and lengths:
            raise BadResponse("response has both Content-Length and Transfer-Encoding")
        if coded and event.http_version < b"1.1":  # RFC 9112 section 6.1: its framing is faulty
            raise BadResponse("HTTP/1.0 response has Transfer-Encoding")
        dropped = find_hop_by_hop_of_response(fields)
        bodiless = self._has_no_body(event.status_code)
        self._chunked = coded and not bodiless
        if bodiless:
            self._body = Counted(0)
        elif coded:
            self._body = Chunked()
        else:
            self._body = Counted(int(lengths[0])) if lengths else UntilEnd()
        if event.status_code == 204:
            dropped |= _NO_LENGTH
        kept = [field for field in event.headers.raw_items() if field[0].lower() not in dropped]
        if self._chunked:
            kept.append((b"Transfer-Encoding", b"chunked"))
        upgrade = fields.get(b"upgrade", []) if event.status_code == 426 else []
        # RFC 9110 section 15.5.22: a 426 names the protocol in Upgrade, a hop-by-hop field that Connection must name.
        kept += [(b"Upgrade", value) for value in upgrade]
        kept.append((b"Connection", b"close, Upgrade" if upgrade else b"close"))
        return Declined(event.status_code, render_head(b"HTTP/1.1 %d %b" % (event.status_code, event.reason), kept))


class UpgradeResponseReader(ResponseReader):
    """Reads the origin's response to `request`.

    Call `feed` until it returns a `Switched` or a `Declined`. After a `Declined`, `body` returns the body's bytes,
    framed for the client, until `complete`. The end of the origin's stream is fed as ``b""``. Both raise `BadResponse`.
    """

    def __init__(self, request: UpgradeRequest) -> None:
        super().__init__()
        self._request = request

    def feed(self, data: bytes) -> Switched | Declined | None:
        """Take the next bytes; return the response once its head is complete. Raises `BadResponse`."""
        if not self._taken and (switched := self._read_plain_101(data)):
            return switched
        event = self._read_final_head(data)
        if event is None:
            return None
        if isinstance(event, h11.Response):
            return self._build_declined(event)
        if event.http_version != b"1.1":
            raise BadResponse("101 in an HTTP version other than 1.1")
        return self._accept_101(event.reason, check_fields(event), event.headers.raw_items(), self._after_head)

    def _read_plain_101(self, data: bytes) -> Switched | None:
        """Read the response of nearly every handshake by one regular expression: h11 took 30 us for it (measured).

        None for anything that is not a whole 101 in strict syntax; h11 reads that.
        """
        match = _SWITCHING.match(data, 0, MAX_RESPONSE_HEAD)
        if match is None:
            return None
        lines = (line.partition(b":") for line in match[2].split(b"\r\n")[:-1])
        raw = [(name, value.strip(b" \t")) for name, _, value in lines]
        fields = group_by_name(raw)
        if not _FRAMING.isdisjoint(fields):
            return None
        return self._accept_101(match[1] or b"", fields, raw, data[match.end() :])

    def _accept_101(self, reason: bytes, fields: ByName, raw: list[tuple[bytes, bytes]], leftover: bytes) -> Switched:
        _verify(self._request, fields)
        dropped = find_hop_by_hop_of_response(fields) | _NO_LENGTH
        kept = [(b"Upgrade", b"websocket"), (b"Connection", b"Upgrade")]
        kept += [field for field in raw if field[0].lower() not in dropped]
        return Switched(render_head(b"HTTP/1.1 101 %b" % (reason or b"Switching Protocols"), kept), leftover)


def check_fields(event: h11.Response | h11.InformationalResponse) -> ByName:
    """Return the fields of an origin's head by name. Raises `BadResponse` if they must not be forwarded to a client."""
    raw = event.headers.raw_items()
    if has_control(b" ".join([event.reason, *(value for _, value in raw)])):
        raise BadResponse("response head contains a control character")
    return group_by_name(raw)


def _verify(request: UpgradeRequest, fields: ByName) -> None:
    """Make the client's six checks of a 101 (RFC 6455 section 4.1)."""
    if [value.lower() for value in split_list(fields, b"upgrade")] != [b"websocket"]:
        raise BadResponse("101 without Upgrade: websocket")
    if not has_token(fields, b"connection", b"upgrade"):
        raise BadResponse("101 without Connection: Upgrade")
    if fields.get(b"sec-websocket-accept") != [generate_accept_token(request.key)]:
        raise BadResponse("101 with a wrong Sec-WebSocket-Accept")
    if not parse_extension_names(fields) <= request.extensions:
        raise BadResponse("101 with an extension that was not offered")
    subprotocols = fields.get(b"sec-websocket-protocol", ())
    if len(subprotocols) > 1 or not request.subprotocols.issuperset(subprotocols):
        raise BadResponse("101 with a subprotocol that was not offered")
