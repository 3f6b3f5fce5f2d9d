"""Read requests: an upgrade request, checked against RFC 6455 section 4.2.1, or any request that a site forwards.

One regular expression reads ordinary GET requests; it is stricter than h11. Everything else is left to h11, which
accepts more than the RFCs allow. Therefore we add our own checks: those of the raw bytes before it (`RequestReader`),
and those of the fields after either parser (`_CHECKS`). tests/unit/test_handshake_request.py checks that both parsers
agree.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv6Address
from typing import ClassVar, Generic, Literal, NamedTuple, TypeVar, cast, overload

import h11

from tlstunnel.handshake.fields import ByName, group_by_name, has_control, has_token, parse_extension_names, split_list
from tlstunnel.handshake.malformed import describe_malformed_head
from tlstunnel.handshake.refusal import UPGRADE, Fields, Refusal
from tlstunnel.journal.events import Reason

MAX_HEAD = 16_384
"""Bytes of a request head. nginx allows 4 buffers of 8 KiB, HAProxy 16 KiB, node 16 KiB, Apache 8 KiB per line."""

MAX_FIELDS = 100
"""Fields of a request head. Apache allows 100, HAProxy 101, Envoy 100."""

MAX_LENGTH = 2**63 - 1
"""Bytes of a body. A larger number overflows in a reader that counts in 64 bits, which then sees a shorter body."""

ALLOWED: Fields = ((b"Allow", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),)
"""What a 405 must list (RFC 9110 section 15.5.6). The tunnel does not know which other methods an origin has."""

VERSION_13: Fields = ((b"Upgrade", b"websocket"), (b"Sec-WebSocket-Version", b"13"))

_METHOD = re.compile(rb"(?!(?:CONNECT|TRACE)\Z)[!#$%&'*+\-.^_`|~0-9A-Z]+")
_KEY = re.compile(rb"[A-Za-z0-9+/]{22}==")
_HOST = re.compile(
    rb"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})+))(?::(?P<port>[0-9]{0,5}))?"
)

_ABSOLUTE_FORM = re.compile(rb"https?://([^/?#]*)((?:[/?#].*)?)", re.IGNORECASE)

# RFC 9112 sections 3 and 5: what nearly every client sends. h11 would take a tenth of the whole cost of a handshake.
_STRICT_GET = re.compile(
    rb"GET (/[!-~]*) HTTP/1\.1\r\n((?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\r\n)+)\r\n"
)
_SAFE = frozenset({b"GET", b"HEAD"})

_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
"""Fields of which h11 checks the value."""


class _Head(NamedTuple):
    """A parsed head, with its fields as received."""

    method: bytes
    target: bytes
    http_version: bytes
    raw: Fields


_NO_HEAD = _Head(b"", b"", b"", ())


@dataclass(frozen=True, slots=True)
class UpgradeRequest:
    """A valid WebSocket upgrade request.

    `target` is the target as sent, or in origin-form if it was in absolute-form; it is visible ASCII. `fields` are the
    client's, with order and case preserved; their values have no surrounding white space and no control characters
    except TAB. `by_name` has the same values by lower-case name. `authority` is the value of Host, and `host` only its
    host, in lower case without brackets or final dot.
    """

    method: ClassVar[str] = "GET"
    target: bytes
    fields: Fields
    authority: bytes
    host: str
    key: bytes
    subprotocols: frozenset[bytes]
    extensions: frozenset[bytes]
    by_name: ByName = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class PlainRequest:
    """A valid request that does not ask for an upgrade to WebSocket; its body follows.

    `method` is a token without lower-case letters. `length` is the body's in bytes, None without Content-Length; a
    `chunked` body has none. The other attributes are those of `UpgradeRequest`.
    """

    method: str
    target: bytes
    fields: Fields
    authority: bytes
    host: str
    length: int | None
    chunked: bool
    by_name: ByName = field(default_factory=dict, repr=False, compare=False)

    @property
    def has_body(self) -> bool:
        """Whether a body follows that is not empty, or may not be."""
        return self.chunked or bool(self.length)


Request = UpgradeRequest | PlainRequest

_NO_PAGE = "this address has no page to show. It accepts WebSocket connections, which programs make to wss:// addresses"
_PAGES_HINT = 'to forward pages to the origin too, set http = "pass" for the site, or start with --http pass'

_R = TypeVar("_R", bound=Request)


class RequestReader(Generic[_R]):
    """Reads one `UpgradeRequest` from bytes; `leftover` are the bytes received after its head.

    With `accept_plain`, a request without ``Upgrade: websocket`` becomes a `PlainRequest`; `leftover` may then be the
    beginning of its body. So does a GET or HEAD of `health_path`, if that is not empty.

    `target` is set as soon as the head has been parsed, so most requests that are refused have one too. The result
    depends only on the bytes, not on how they were split. After a `Refusal` the reader cannot be used again. One empty
    line before the request is ignored (RFC 9112 section 2.2).
    """

    @overload
    def __init__(self: "RequestReader[UpgradeRequest]", accept_plain: Literal[False] = False) -> None: ...

    @overload
    def __init__(self: "RequestReader[Request]", accept_plain: bool, health_path: bytes = b"") -> None: ...

    def __init__(self, accept_plain: bool = False, health_path: bytes = b"") -> None:
        self.leftover = self.target = b""
        self._health_path = health_path
        self._accepts_plain = accept_plain
        self._head = bytearray()
        self._at_start = True
        self._scanned = 0

    def feed(self, data: bytes) -> _R | None:
        """Take the next bytes; return the request once its head is complete. Raises `Refusal`."""
        self._head += data
        if self._at_start and not self._skip_empty_line():
            return None
        end = self._find_end_of_head()
        if end is None:
            return None
        self.leftover = bytes(self._head[end:])
        data = bytes(self._head[:end])
        head, fields = parse_strict(data) or parse_with_h11(data)
        if head.target[:1] != b"/":
            head, fields = _replace_absolute_form(head, fields)
        self.target = head.target
        accepts_plain = self._accepts_plain or (head.method in _SAFE and has_path(head, self._health_path))
        plain = accepts_plain and not has_token(fields, b"upgrade", b"websocket")
        return cast(_R, _check_plain_request(head, fields) if plain else _check_upgrade_request(head, fields))

    def _skip_empty_line(self) -> bool:
        """Remove an empty line before the request; return whether enough bytes are there to know."""
        if not self._head or self._head == b"\r":
            return False
        if self._head.startswith(b"\r\n"):
            del self._head[:2]
        self._at_start = False
        return True

    def _find_end_of_head(self) -> int | None:
        """Return where the head ends. The first byte that can be refused is refused, whatever follows it."""
        buffer = self._head
        # No method starts like this, but a TLS record within TLS does, and would never complete a line.
        if buffer and not 0x21 <= buffer[0] < 0x7F:
            raise _bad_request(Reason.MALFORMED_HEAD, "the request does not start with a method")
        start = self._scanned
        end = buffer.find(b"\r\n\r\n", max(start - 3, 0), MAX_HEAD)
        self._scanned = min(len(buffer), MAX_HEAD) if end < 0 else end + 4
        # An LF at the start of the new bytes belongs to a CR at the end of the last ones.
        lines = buffer[start - 1 if buffer[start - 1 : start] == b"\r" else start : self._scanned]
        if lines.count(b"\n") != lines.count(b"\r\n"):
            raise _bad_request(Reason.BARE_LF, "a line ends with LF instead of CRLF")
        if end >= 0:
            return end + 4
        if len(buffer) >= MAX_HEAD:
            raise Refusal(431, Reason.HEAD_TOO_LARGE, f"the request head has more than {MAX_HEAD} bytes")
        return None


def has_path(request: _Head | Request, path: bytes) -> bool:
    """Return whether a request asks for `path`, whatever its query."""
    return request.target.partition(b"?")[0] == path


def _replace_absolute_form(head: _Head, fields: ByName) -> tuple[_Head, ByName]:
    """Return a head whose target has a scheme and an authority as if it had only the path, and the authority in Host.

    RFC 9112 section 3.2.2 requires both; all later stages and the origin see that form. The received Host must be valid
    although it is ignored (section 3.2). The scheme may be http or https (RFC 6455 section 4.2.1), and says nothing:
    the connection has TLS. Any other target is returned unchanged.
    """
    match = _ABSOLUTE_FORM.fullmatch(head.target)
    if match is None:
        return head, fields
    _check_host(head, fields)
    authority, rest = match.groups()
    target = rest if rest.startswith(b"/") else b"/" + rest
    raw = tuple((name, authority if name.lower() == b"host" else value) for name, value in head.raw)
    return head._replace(target=target, raw=raw), {**fields, b"host": [authority]}


def _bad_request(reason: Reason, text: str, detail: str = "") -> Refusal:
    return Refusal(400, reason, text, detail=detail)


def parse_strict(data: bytes) -> tuple[_Head, ByName] | None:
    """Return a whole head in strict syntax; None for any other."""
    match = _STRICT_GET.fullmatch(data)
    if match is None:
        return None
    lines = match[2].split(b"\r\n")
    lines.pop()
    if len(lines) > MAX_FIELDS:
        return None
    cut = [line.partition(b":") for line in lines]
    raw = tuple([(name, value.strip(b" \t")) for name, _, value in cut])
    fields = group_by_name(raw)
    # h11 also checks how often Host occurs, and no other field.
    plain = _FRAMING.isdisjoint(fields) and len(fields.get(b"host", ())) == 1
    return (_Head(b"GET", match[1], b"1.1", raw), fields) if plain else None


def parse_with_h11(data: bytes) -> tuple[_Head, ByName]:
    """Parse a complete head. Raises `Refusal`."""
    if has_control(data):
        raise _bad_request(Reason.CONTROL_CHARACTER, "the request head contains a control character")
    if b"\r\n " in data or b"\r\n\t" in data:
        raise _bad_request(Reason.FOLDED_FIELD, "a field is folded over several lines (RFC 9112 section 5.2)")
    # The request line and the empty line are not fields.
    if data.count(b"\r\n") - 2 > MAX_FIELDS:
        raise Refusal(431, Reason.TOO_MANY_FIELDS, f"the request has more than {MAX_FIELDS} fields")
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    try:
        parser.receive_data(data)
        event = parser.next_event()
    except h11.RemoteProtocolError as error:
        raise _bad_request(
            Reason.MALFORMED_HEAD, "the request is not valid HTTP/1.1", describe_malformed_head(error, data)
        ) from None
    assert isinstance(event, h11.Request)  # the head is complete
    raw = tuple(event.headers.raw_items())
    return _Head(event.method, event.target, event.http_version, raw), group_by_name(raw)


def _check_upgrade_request(head: _Head, fields: ByName) -> UpgradeRequest:
    for check in _CHECKS:
        check(head, fields)
    authority = fields[b"host"][0]
    return UpgradeRequest(
        target=head.target,
        fields=head.raw,
        authority=authority,
        host=_read_host(authority),
        key=fields[b"sec-websocket-key"][0],
        subprotocols=frozenset(split_list(fields, b"sec-websocket-protocol")),
        extensions=parse_extension_names(fields),
        by_name=fields,
    )


def _check_plain_request(head: _Head, fields: ByName) -> PlainRequest:
    for check in _PLAIN_CHECKS:
        check(head, fields)
    authority = fields[b"host"][0]
    lengths = fields.get(b"content-length")
    return PlainRequest(
        method=head.method.decode("ascii"),
        target=head.target,
        fields=head.raw,
        authority=authority,
        host=_read_host(authority),
        length=int(lengths[0]) if lengths else None,
        chunked=b"transfer-encoding" in fields,
        by_name=fields,
    )


def _read_host(authority: bytes) -> str:
    host = _HOST.fullmatch(authority)
    assert host is not None  # _check_host
    return str(IPv6Address(host["ipv6"].decode())) if host["ipv6"] else host["name"].decode().lower().removesuffix(".")


def _check_http_version(request: _Head, _: ByName) -> None:
    if request.http_version != b"1.1":
        raise Refusal(505, Reason.HTTP_VERSION, "only HTTP/1.1 is supported")


def _check_get(request: _Head, _: ByName) -> None:
    if request.method != b"GET":
        raise Refusal(405, Reason.METHOD, "the method of a WebSocket handshake must be GET", ((b"Allow", b"GET"),))


def _check_method(request: _Head, _: ByName) -> None:
    """Refuse CONNECT, a tunnel to elsewhere, and TRACE, which shows what proxies add (RFC 9110 section 9.3).

    Lower-case letters are refused too: methods are case-sensitive, but not to every origin, so rules could be bypassed.
    """
    if not _METHOD.fullmatch(request.method):
        raise Refusal(405, Reason.METHOD, "this method is not supported", ALLOWED)


def _check_target(request: _Head, _: ByName) -> None:
    """RFC 9112 section 3.2.1 (for 3.2.2: `_replace_absolute_form`). h11 has checked that it is visible ASCII."""
    if not request.target.startswith(b"/"):
        raise _bad_request(Reason.TARGET_FORM, "the request target must be a path or an http(s) URL")
    if b"#" in request.target:
        raise _bad_request(Reason.TARGET_FORM, "the request target contains a fragment")


def is_authority(value: bytes) -> bool:
    """Return whether `value` is valid in Host."""
    try:
        _check_host(_NO_HEAD, {b"host": [value]})
    except Refusal:
        return False
    return True


def _check_host(_: _Head, fields: ByName) -> None:
    """RFC 9110 section 7.2, and uri-host [ ":" port ] of RFC 3986 section 3.2.2.

    Empty labels are no name of the DNS (RFC 1035 section 2.3.1), and programs that remove final dots remove one or all.
    """
    hosts = fields.get(b"host", ())
    match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if match is None:
        raise _bad_request(Reason.HOST, "the request must have exactly one valid Host field")
    if match["name"] and (match["name"].startswith(b".") or b".." in match["name"]):
        raise _bad_request(Reason.HOST, "the name in Host has an empty label")
    if match["ipv6"]:
        try:
            IPv6Address(match["ipv6"].decode())
        except AddressValueError:
            raise _bad_request(Reason.HOST, "the address in Host is not an IPv6 address") from None
    if match["port"] and int(match["port"]) > 65_535:
        raise _bad_request(Reason.HOST, "the port in Host is too large")


def _check_no_body(_: _Head, fields: ByName) -> None:
    """A server that ignores the length would read the body as WebSocket frames: request smuggling."""
    if b"transfer-encoding" in fields or any(value.strip(b"0") for value in split_list(fields, b"content-length")):
        raise _bad_request(Reason.BODY, "a WebSocket handshake must not have a body")


def _check_framing(_: _Head, fields: ByName) -> None:
    """RFC 9112 section 6.3: readers of both fields may disagree on the body's end. h11 has checked each field."""
    lengths = fields.get(b"content-length")
    if lengths and b"transfer-encoding" in fields:
        raise _bad_request(Reason.BODY, "the request has both Content-Length and Transfer-Encoding")
    if lengths and int(lengths[0]) > MAX_LENGTH:
        raise _bad_request(Reason.BODY, "Content-Length is too large")


def _check_upgrade(_: _Head, fields: ByName) -> None:
    """RFC 6455 section 4.2.1, items 3 and 4."""
    if not has_token(fields, b"upgrade", b"websocket"):
        raise Refusal(426, Reason.NO_UPGRADE, _NO_PAGE, UPGRADE, _PAGES_HINT)
    if not has_token(fields, b"connection", b"upgrade"):
        raise _bad_request(Reason.CONNECTION_FIELD, "Upgrade without Connection: Upgrade")


def _check_websocket_version(_: _Head, fields: ByName) -> None:
    """RFC 6455 section 4.2.1, item 6, and 4.4. A proxy that accepts another version can be abused as a raw pipe."""
    if fields.get(b"sec-websocket-version") != [b"13"]:
        raise Refusal(426, Reason.WEBSOCKET_VERSION, "only WebSocket version 13 is supported", VERSION_13)


def _check_key(_: _Head, fields: ByName) -> None:
    """RFC 6455 section 4.2.1, item 5: base64 that decodes to 16 bytes."""
    keys = fields.get(b"sec-websocket-key", ())
    if len(keys) != 1 or not _KEY.fullmatch(keys[0]):
        raise _bad_request(Reason.KEY_FIELD, "the request must have exactly one Sec-WebSocket-Key, 16 bytes in base64")


_CHECKS: tuple[Callable[[_Head, ByName], None], ...] = (
    _check_http_version,
    _check_get,
    _check_target,
    _check_host,
    _check_no_body,
    _check_upgrade,
    _check_websocket_version,
    _check_key,
)

_PLAIN_CHECKS: tuple[Callable[[_Head, ByName], None], ...] = (
    _check_http_version,
    _check_method,
    _check_target,
    _check_host,
    _check_framing,
)
