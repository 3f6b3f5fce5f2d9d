"""The facts of a request: the fields that rules can read, and the normalised path that they compare."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cached_property
from ipaddress import IPv6Address

from tlstunnel.firewall.cookies import MAX_COOKIES, is_unusual, parse_cookies
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.fields import split_list
from tlstunnel.handshake.forwarding import to_cgi_name
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import Request
from tlstunnel.journal.events import Reason

MAX_QUERY_VALUES = 128
"""Values of a query. PHP and ModSecurity's recommended settings accept 1000, the guard of managed rules 64."""

MAX_ELEMENTS = 64
"""Elements of Sec-WebSocket-Protocol, and of Sec-WebSocket-Extensions. Real clients send fewer than ten."""

_REPEATABLE = re.compile(
    r"accept(?:-.*)?|access-control-request-headers|cache-control|connection|cookie|dnt|expect|forwarded|if-match"
    r"|if-none-match|pragma|prefer|priority|sec-ch-.*|sec-websocket-(?:extensions|protocol)|te|trailer"
    r"|transfer-encoding|upgrade|user-agent|via|warning|x-forwarded-.*"
)
"""Fields that may occur several times: those that are lists (RFC 9110 section 5.3), or that some clients repeat and no
server trusts."""

_ESCAPE = re.compile(rb"%[0-9A-Fa-f]{2}")
_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_SUSPECT = re.compile(rb"[%\\]|/[./;]")
"""In every target that may be ambiguous."""

# Up to a semicolon, because Java servers remove path parameters before they look at a segment: "..;a" is "..".
_DOT_SEGMENT = re.compile(rb"/\.\.?(?![^/;])")
_EMPTY_SEGMENT = re.compile(rb"/[/;]")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
"""Of Unicode's category Cc. Python's ``$`` matches before a final LF, so routes of this form ignore one."""


class Facts:
    """The fields that rules can read, as attributes, and the `request` that they come from. Made by `gather`.

    What a client sent is decoded as latin-1, so that all bytes can be compared, except `path` and `query`, which are
    percent-decoded as UTF-8. No attribute raises.
    """

    def __init__(self, request: Request, connection: Connection, path: str, now: float) -> None:
        self.request = request
        self.connection = connection
        self.path = path
        self.ip = _unmap(connection.ip)
        self.method = request.method
        self.host = request.host
        self.tls_version = connection.tls_version
        self.tls_cipher = connection.tls_cipher
        self.tls_sni = connection.tls_sni
        self.tls_ja4 = connection.tls_ja4
        self.client_subject = connection.client_subject
        self.site = connection.site
        self.seconds = now

    @cached_property
    def raw_path(self) -> str:
        """The path as sent, with its escapes, without the query."""
        return self.request.target.partition(b"?")[0].decode("ascii")

    @cached_property
    def query(self) -> dict[str, list[str]]:
        """The values of each name in the query, in order. A ``+`` is a space, as in forms."""
        query: dict[str, list[str]] = {}
        for pair in self.request.target.partition(b"?")[2].split(b"&"):
            if pair:
                name, _, value = pair.replace(b"+", b" ").partition(b"=")
                query.setdefault(_decode(name), []).append(_decode(value))
        return query

    @cached_property
    def headers(self) -> dict[str, str]:
        """The field values by name in lower case. Repeated fields are joined by a comma (RFC 9110 section 5.3).

        Cookie fields are joined by a semicolon (RFC 9113 section 8.2.3).
        """
        return {
            name.decode("ascii"): (b"; " if name == b"cookie" else b", ").join(values).decode("latin-1")
            for name, values in self.request.by_name.items()
        }

    def refuse_repeated(self, names: Iterable[str] | None) -> None:
        """Raise `Refusal` (400) if one of these fields, or with None any, is repeated and is no list.

        Starlette, aiohttp and Go read the first one, others the last, and a rule would see neither but both joined. CGI
        and some WSGI servers see fields with other characters instead of hyphens as the same field.
        """
        fields = self.request.by_name
        if self._unusual_names and names is not None:
            for name in sorted(names):
                if self._unusual_names.get(to_cgi_name(name.encode()), name) != name:
                    raise Refusal(400, Reason.REPEATED_FIELD, f"a field has the name {name} in another spelling")
        if len(fields) == len(self.request.fields):  # nearly always
            return
        repeated = {name.decode("ascii") for name, values in fields.items() if len(values) > 1}
        for name in sorted(repeated if names is None else repeated.intersection(names)):
            if not _REPEATABLE.fullmatch(name):
                raise Refusal(400, Reason.REPEATED_FIELD, f"{name} may occur only once")

    @cached_property
    def _unusual_names(self) -> dict[bytes, str]:
        """The names of fields that contain other characters than letters, digits and hyphens, by CGI's name."""
        names = b"".join(self.request.by_name)
        if names.replace(b"-", b"").isalnum():  # nearly always
            return {}
        unusual = (name for name in self.request.by_name if not name.replace(b"-", b"").isalnum())
        return {to_cgi_name(name): name.decode("ascii") for name in unusual}

    def count_largest(self, names: Iterable[str]) -> int:
        """Return the number of elements in the largest of these attributes that has any."""
        found = [getattr(self, name) for name in names if name in _COLLECTIONS]
        return max((sum(map(len, one.values())) if one is self.query else len(one) for one in found), default=0)

    @cached_property
    def cookie_values(self) -> dict[str, tuple[str, ...]]:
        """The different values of each cookie, in order (`parse_cookies`)."""
        return parse_cookies(self._cookie_field)

    @cached_property
    def cookies(self) -> dict[str, str]:
        """The first value of each cookie."""
        return {name: values[0] for name, values in self.cookie_values.items()}

    @cached_property
    def repeats_cookies(self) -> bool:
        """Whether a cookie has several values."""
        return any(len(values) > 1 for values in self.cookie_values.values())

    @property
    def has_too_many_cookies(self) -> bool:
        """Whether there are more cookies than rules iterate over. Cookies are only parsed if they are unusual."""
        many = self._cookie_field.count(";") >= MAX_COOKIES
        return many or (is_unusual(self._cookie_field) and len(self.cookie_values) > MAX_COOKIES)

    @cached_property
    def _cookie_field(self) -> str:
        return b";".join(self.request.by_name.get(b"cookie", ())).decode("latin-1")

    @cached_property
    def origin(self) -> str:
        """The Origin field, or "". Several are joined, which makes no valid origin."""
        return self._header(b"origin")

    @cached_property
    def user_agent(self) -> str:
        """The User-Agent field, or ""."""
        return self._header(b"user-agent")

    @cached_property
    def subprotocols(self) -> tuple[str, ...]:
        """The offers of Sec-WebSocket-Protocol, in order."""
        return tuple(t.decode("latin-1") for t in split_list(self.request.by_name, b"sec-websocket-protocol"))

    @cached_property
    def extensions(self) -> tuple[str, ...]:
        """The names of the extensions that Sec-WebSocket-Extensions offers, in order, without parameters."""
        offers = split_list(self.request.by_name, b"sec-websocket-extensions")
        return tuple(offer.split(b";", 1)[0].strip(b" \t").decode("latin-1") for offer in offers)

    @cached_property
    def now(self) -> datetime:
        """The time of the check, UTC."""
        return datetime.fromtimestamp(self.seconds, UTC)

    def _header(self, name: bytes) -> str:
        return b", ".join(self.request.by_name.get(name, ())).decode("latin-1")


FIELDS = (
    "ip",
    "method",
    "host",
    "path",
    "raw_path",
    "query",
    "headers",
    "cookies",
    "origin",
    "user_agent",
    "subprotocols",
    "extensions",
    "tls_version",
    "tls_cipher",
    "tls_sni",
    "tls_ja4",
    "client_subject",
    "site",
    "now",
)
"""The names that rules may use, each an attribute of `Facts`."""

_COLLECTIONS = frozenset({"query", "headers", "cookies", "subprotocols", "extensions"})
"""Those of them that have elements."""


def gather(request: Request, connection: Connection, *, strict_path: bool, now: float) -> Facts:
    """Return the facts of a request that is checked at `now` (``time.time()``).

    Raises `Refusal` (400) for more elements than rules may iterate over, since omitting some would hide them from the
    rules, and with `strict_path` for a target that can be read in two ways.
    """
    fields = request.by_name
    raw_path, _, query = request.target.partition(b"?")
    if query.count(b"&") >= MAX_QUERY_VALUES:
        raise Refusal(400, Reason.TOO_MANY_QUERY_VALUES, f"the query has more than {MAX_QUERY_VALUES} values")
    for name in (b"sec-websocket-protocol", b"sec-websocket-extensions"):
        if sum(value.count(b",") + 1 for value in fields.get(name, ())) > MAX_ELEMENTS:
            raise Refusal(400, Reason.TOO_MANY_ELEMENTS, f"{name.decode()} has more than {MAX_ELEMENTS} elements")
    if strict_path:
        refuse_ambiguous(request.target)
    facts = Facts(request, connection, normalise_path(raw_path), now)
    if b"cookie" in fields and facts.has_too_many_cookies:
        raise Refusal(400, Reason.TOO_MANY_COOKIES, f"the request has more than {MAX_COOKIES} cookies")
    return facts


def normalise_path(raw: bytes) -> str:
    """Return a path in the form that rules compare: decoded once, ``//`` as one slash, no dot segments, case kept.

    Dot segments are removed (RFC 3986 section 5.2.4) after escapes are decoded, since ``%2e`` is a dot (section
    6.2.2.3). Escapes that are not UTF-8 become U+FFFD, and an encoded slash becomes a slash. `refuse_ambiguous` refuses
    all of these: of what it accepts, nothing but escapes of ordinary characters changes here.
    """
    if b"%" not in raw and b"//" not in raw and b"/." not in raw:
        return raw.decode("ascii")
    segments: list[str] = []
    parts = _decode(raw).split("/")
    for part in parts:
        if part == "..":
            del segments[-1:]
        elif part not in ("", "."):
            segments.append(part)
    return "/" + "/".join(segments) + ("/" if segments and parts[-1] in ("", ".", "..") else "")


def refuse_ambiguous(target: bytes) -> None:
    """Refuse (400) a target that servers read in different ways: a rule that expects one way would miss the other.

    tests/promises/test_path_interpretation.py has the servers. In a query, slashes, backslashes and double escapes are
    ordinary, because queries contain URLs.
    """
    if not _SUSPECT.search(target):
        return
    path, _, query = target.partition(b"?")
    decoded = path
    if b"%" in path:
        decoded = _unescape(path)
        if _BROKEN_ESCAPE.search(path):
            raise _ambiguous_target("the path contains a % that does not begin an escape")
        if _ESCAPE.search(decoded):
            raise _ambiguous_target("the path contains a double escape")
        if decoded.count(b"/") != path.count(b"/"):
            raise _ambiguous_target("the path contains an encoded slash")
        if _CONTROL.search(_decode_utf_8(decoded)):
            raise _ambiguous_target("the path contains an encoded control character")
    if b"\\" in decoded:
        raise _ambiguous_target("the path contains a backslash")
    if _DOT_SEGMENT.search(decoded):
        raise _ambiguous_target("the path contains a dot segment")
    if _EMPTY_SEGMENT.search(decoded):
        raise _ambiguous_target("the path contains an empty segment (//)")
    if b"%" in query and "\0" in _decode_utf_8(_unescape(query)):
        raise _ambiguous_target("the query contains an encoded NUL")


_DIGITS = "0123456789abcdefABCDEF"
_BYTES = {f"%{a}{b}".encode(): bytes.fromhex(a + b) for a in _DIGITS for b in _DIGITS}


def _byte_of(escape: re.Match[bytes]) -> bytes:
    return _BYTES[escape[0]]


def _unescape(text: bytes) -> bytes:
    """Percent-decode; invalid escapes stay. ``urllib.parse.unquote_to_bytes`` takes 26 ms for 16 kB of escapes."""
    return _ESCAPE.sub(_byte_of, text) if b"%" in text else text


def _decode_utf_8(decoded: bytes) -> str:
    try:
        return decoded.decode()
    except UnicodeDecodeError:
        raise _ambiguous_target("the target is not UTF-8") from None


def _ambiguous_target(text: str) -> Refusal:
    return Refusal(400, Reason.AMBIGUOUS_TARGET, text)


def _decode(text: bytes) -> str:
    return _unescape(text).decode("utf-8", "replace")


def _unmap(ip: str) -> str:
    """Return an IPv4-mapped IPv6 address as the IPv4 address, and any other unchanged."""
    if not ip.startswith("::"):
        return ip
    mapped = IPv6Address(ip).ipv4_mapped
    return str(mapped) if mapped else ip
