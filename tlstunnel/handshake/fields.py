"""Header fields of requests and responses: lists, tokens, and hop-by-hop fields.

Tested by tests/unit/test_handshake_edits.py.
"""

import re
from collections.abc import Mapping, Sequence

_CONTROLS = bytes({*range(0x20), 0x7F} - set(b"\t\r\n"))

HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)
"""RFC 9110 section 7.6.1: meant for the next hop only, and never forwarded."""

_FOR_THIS_HOP = frozenset({b"alt-svc", b"proxy-authenticate", b"proxy-authentication-info"})
"""Also meant for the next hop, in a response: where else the origin is, which would lead clients around the tunnel (RFC
7838 section 3), and how to log in to a proxy (RFC 9110 section 11.7). Go and Caddy remove them too."""

_NEVER_NOMINATED = re.compile(rb"host|content-length|sec-websocket-.*")

_NONE: frozenset[bytes] = frozenset()

ByName = Mapping[bytes, Sequence[bytes]]
"""The values of a head's fields by lower-case name; the values of a repeated field are in order."""


def has_control(text: bytes) -> bool:
    """Return whether `text` has a control character (forbidden by RFC 9110 section 5.5) or a CR without LF.

    CRLF is allowed, as between the lines of a head. A regular expression took 40 us for a browser's request.
    """
    return len(text.translate(None, _CONTROLS)) != len(text) or text.count(b"\r") != text.count(b"\r\n")


def group_by_name(fields: Sequence[tuple[bytes, bytes]]) -> dict[bytes, list[bytes]]:
    """Group fields by their names in lower case. A handshake looks up about a dozen of them."""
    grouped = {name.lower(): [value] for name, value in fields}
    if len(grouped) != len(fields):  # rare: a name that occurs twice
        grouped = {}
        for name, value in fields:
            grouped.setdefault(name.lower(), []).append(value)
    return grouped


def split_list(fields: ByName, name: bytes) -> list[bytes]:
    """Return the elements of the list-based field `name`, without empty ones (RFC 9110 section 5.6.1)."""
    values = fields.get(name)
    if values is None:
        return []
    if len(values) == 1 and b"," not in values[0]:  # nearly always
        return [element] if (element := values[0].strip(b" \t")) else []
    elements = (element.strip(b" \t") for value in values for element in value.split(b","))
    return [element for element in elements if element]


def has_token(fields: ByName, name: bytes, token: bytes) -> bool:
    """Return whether the list-based field `name` has the element `token` (lower case), in any case."""
    values = fields.get(name, ())
    if len(values) == 1 and values[0].lower() == token:  # nearly always
        return True
    return any(element.lower() == token for element in split_list(fields, name))


def parse_extension_names(fields: ByName) -> frozenset[bytes]:
    """Return the names in ``Sec-WebSocket-Extensions``, without parameters (RFC 6455 section 9.1)."""
    if b"sec-websocket-extensions" not in fields:
        return _NONE
    return frozenset(e.split(b";", 1)[0].strip(b" \t") for e in split_list(fields, b"sec-websocket-extensions"))


def find_hop_by_hop(fields: ByName) -> frozenset[bytes]:
    """Return the names (lower case) of the hop-by-hop fields: the standard ones and those that Connection names.

    The fields that the handshake needs are kept even if Connection names them: that is a known way to strip a field
    that the next hop relies on.
    """
    nominated = {name.lower() for name in split_list(fields, b"connection")} - HOP_BY_HOP
    if not nominated:
        return HOP_BY_HOP
    return HOP_BY_HOP.union(name for name in nominated if not _NEVER_NOMINATED.fullmatch(name))


def find_hop_by_hop_of_response(fields: ByName) -> frozenset[bytes]:
    """Return the names (lower case) of the fields of a response that are not forwarded to the client."""
    return find_hop_by_hop(fields) | _FOR_THIS_HOP
