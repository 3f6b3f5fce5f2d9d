"""Header fields that a site sets or removes.

Tested by tests/unit/test_config.py.
"""

import re
from typing import Annotated, Any

from tlstunnel.addresses import quoted
from tlstunnel.config.document import KeyPath
from tlstunnel.config.kinds import UNREADABLE, Kind, Reading, Schema, Text, describe
from tlstunnel.config.secrets import hide_headers

FIELD_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}")
"""The name of a header field (RFC 9110 section 5.1)."""

KEPT_FIELD = re.compile(
    r"host|connection|keep-alive|proxy-connection|te|trailer|transfer-encoding|upgrade|content-length|sec-websocket-.*"
)
"""The names, in lower case, of header fields that cannot be set: the handshake or the connection depends on them."""

_FIELD_VALUE = re.compile(r"(?:[!-~](?:[ -~]{0,4094}[!-~])?)?")


def parse_header_name(text: str) -> str:
    """Return the name of a header field that may be set or removed. Raises ValueError."""
    if not FIELD_NAME.fullmatch(text):
        raise ValueError(f"expected a header name such as X-Site, got {quoted(text)}")
    if KEPT_FIELD.fullmatch(text.lower()):
        hint = "; use origin_host" if text.lower() == "host" else ""
        raise ValueError(f"{text} cannot be changed: the handshake or the connection depends on it{hint}")
    return text


_HEADER_NAME = Text(
    parse_header_name, "X-Site", expected="a header name such as X-Site", pattern=f"^{FIELD_NAME.pattern}$"
)

HeaderName = Annotated[str, _HEADER_NAME]


class Headers(dict[str, str]):
    """Header fields by name; immutable by convention."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    @classmethod
    def kind(cls) -> Kind:
        """Return the kind of this value in the file."""
        return _HeadersKind()


class _HeadersKind(Kind):
    def read(self, value: object, path: KeyPath, reading: Reading) -> Any:
        before = len(reading.problems)
        if not isinstance(value, dict):
            reading.refuse(path, f'expected a table such as {{ X-Site = "chat" }}, got {describe(value)}')
            return UNREADABLE
        for name, text in value.items():
            try:
                parse_header_name(name)
            except ValueError as error:
                reading.refuse(path, str(error), name)
                continue
            if not isinstance(text, str) or not _FIELD_VALUE.fullmatch(text):
                reading.refuse((*path, name), f"expected printable ASCII characters, got {describe(text)}")
        return Headers(value) if len(reading.problems) == before else UNREADABLE

    def schema(self) -> Schema:
        return {"type": "object", "additionalProperties": {"type": "string"}}

    def render(self, value: Any) -> Any:
        return hide_headers(value)
