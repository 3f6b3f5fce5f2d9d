"""The table ``[log]``: what is logged, and how.

Tested by tests/unit/test_config.py.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from tlstunnel.addresses import quoted
from tlstunnel.config.document import KeyPath
from tlstunnel.config.kinds import Array, FilePath, Kind, Reading, Schema, Text
from tlstunnel.config.tables import Table

LOG_FIELDS = (
    "client",
    "peer",
    "site",
    "sni",
    "ja4",
    "tls_version",
    "cipher",
    "method",
    "host",
    "path",
    "web_origin",
    "user_agent",
    "client_subject",
    "trace",
    "status",
    "verdict",
    "origin",
    "edge",
    "edge_log",
    "tags",
    "detail",
    "rule",
    "logged",
    "managed_rules",
    "up",
    "down",
    "seconds",
    "ended_by",
    "reason",
)
"""Fields of the record that can be left out. Its `id` is always written."""

USUAL_FIELDS = tuple(name for name in LOG_FIELDS if name not in {"method", "host"})
"""Those that are written by default: nearly every method is GET, and nearly every host the one in `sni`."""


def _parse_field(text: str) -> str:
    if text not in LOG_FIELDS:
        near = difflib.get_close_matches(text[:50], LOG_FIELDS, n=1)
        hint = f"; did you mean {quoted(near[0])}?" if near else "; docs/log.md lists them"
        raise ValueError(f"{quoted(text)} is not a field of the record{hint}")
    return text


class _FieldsKind(Kind):
    """``"usual"``, ``"all"``, or an array of names of fields."""

    def __init__(self) -> None:
        self._array = Array(Text(_parse_field, "client"))

    def read(self, value: object, path: KeyPath, reading: Reading) -> Any:
        return value if value in ("usual", "all") else self._array.read(value, path, reading)

    def schema(self) -> Schema:
        return {"anyOf": [{"enum": ["usual", "all"]}, {"type": "array", "items": {"enum": list(LOG_FIELDS)}}]}

    def render(self, value: Any) -> Any:
        return value if isinstance(value, str) else list(value)


LogPath = Annotated[Path, FilePath("a file that the log is appended to")]


class Log(Table, frozen=True):
    """What is logged, and how."""

    format: Literal["text", "json"] = "text"
    opened: bool = False
    file: LogPath | None = None
    fields: Annotated[tuple[str, ...] | Literal["usual", "all"], _FieldsKind()] = "usual"
    address: Literal["full", "prefix", "hash"] = "full"

    @property
    def selected(self) -> tuple[str, ...]:
        """The fields of the record that are written."""
        if isinstance(self.fields, tuple):
            return self.fields
        return LOG_FIELDS if self.fields == "all" else USUAL_FIELDS
