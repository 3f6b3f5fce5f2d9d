"""Header fields as both heads have them: lists, tokens, and which fields go no further than one hop."""

import re
from collections.abc import Iterable

from tlstunnel.handshake.refusal import Fields

FORBIDDEN_IN_HEAD = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)")
"""Control characters, which no field value may hold (RFC 9110 section 5.5), and a lone CR (RFC 9112 section 2.2)."""

HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)
"""RFC 9110 section 7.6.1: for the next hop alone, and so never forwarded."""

_NEVER_NOMINATED = re.compile(rb"host|content-length|sec-websocket-.*")


def values(fields: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    """The values of every field called `name` (lower case), in order."""
    return [value for field, value in fields if field.lower() == name]


def tokens(fields: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    """The elements of the list-based field `name`, over all its lines (RFC 9110 section 5.6.1), empty ones left out."""
    elements = (element.strip(b" \t") for value in values(fields, name) for element in value.split(b","))
    return [element for element in elements if element]


def has_token(fields: Iterable[tuple[bytes, bytes]], name: bytes, token: bytes) -> bool:
    """Whether the list-based field `name` has the element `token` (lower case), compared without regard to case."""
    return any(element.lower() == token for element in tokens(fields, name))


def extension_names(fields: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """The extensions that ``Sec-WebSocket-Extensions`` names, without their parameters (RFC 6455 section 9.1)."""
    return frozenset(e.split(b";", 1)[0].strip(b" \t") for e in tokens(fields, b"sec-websocket-extensions"))


def hop_by_hop(fields: Fields) -> frozenset[bytes]:
    """Names (lower case) of the fields of this message that end here: the fixed ones and those Connection names.

    What the handshake itself rests on stays whatever Connection says: naming it is a known way to strip a field that
    the next hop relies on.
    """
    nominated = (name.lower() for name in tokens(fields, b"connection"))
    return HOP_BY_HOP | {name for name in nominated if not _NEVER_NOMINATED.fullmatch(name)}
