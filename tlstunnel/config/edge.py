"""Edge workers of a site."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

from tlstunnel.addresses import Networks, normalise_name, quoted
from tlstunnel.config.document import KeyPath
from tlstunnel.config.kinds import UNREADABLE, Kind, PlacedText, Reading, Schema, Text, describe
from tlstunnel.config.secrets import hide_secrets

_WORKER = re.compile(r"(?:(?P<file>[^\0]+\.py)|[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<function>[^\W\d]\w*)")
_WORKER_FORMS = '"edge/chat.py:fetch" or "package.module:fetch"'


def parse_worker_reference(text: str, folder: Path) -> str:
    """Return a reference to a worker, with the path of its file absolute. Raises ValueError."""
    reference = _WORKER.fullmatch(text)
    if reference is None:
        raise ValueError(f"expected {_WORKER_FORMS}, got {quoted(text)}")
    return f"{folder / reference['file']}:{reference['function']}" if reference["file"] else reference[0]


def parse_worker_origin(text: str) -> str:
    """Return a network, an address or a name in the form in which it is compared. Raises ValueError."""
    if text == "*":
        raise ValueError('"*" would make the worker an open relay; list networks such as 10.0.0.0/8, or names')
    if "/" in text or text.count(":") > 1 or text.replace(".", "").isdecimal():
        return str(next(iter(Networks.parse([text]))))
    return normalise_name(text)


WorkerReference = Annotated[str, PlacedText(parse_worker_reference, "edge/chat.py:fetch", expected=_WORKER_FORMS)]
"""``FILE:FUNCTION``, the path of the file absolute and ending in ``.py``, or ``PACKAGE.MODULE:FUNCTION``."""

WorkerOrigin = Annotated[str, Text(parse_worker_origin, "*.shards.internal")]
"""A network in its shortest form, or a name as ``addresses.normalise_name`` returns it."""


class WorkerTable(dict[str, Any]):
    """What a file passes to an edge worker: any values of TOML; immutable by convention."""

    @property
    def canonical(self) -> str:
        """The same text for equal tables, whatever the order of their keys."""
        return json.dumps(self, sort_keys=True, default=str)

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self.canonical)

    @classmethod
    def kind(cls) -> Kind:
        """Return the kind of this value in the file."""
        return _WorkerTableKind()


class _WorkerTableKind(Kind):
    def read(self, value: object, path: KeyPath, reading: Reading) -> Any:
        if not isinstance(value, dict):
            reading.refuse(path, f'expected a table such as {{ url = "valkey://localhost" }}, got {describe(value)}')
            return UNREADABLE
        return WorkerTable(value)

    def schema(self) -> Schema:
        return {"type": "object", "additionalProperties": True}

    def render(self, value: Any) -> Any:
        return hide_secrets(value)
