"""A configuration as TOML, and what a file may hold as JSON Schema."""

import json
import re
from collections.abc import Iterator
from typing import Any

from tlstunnel.config.server import Config
from tlstunnel.config.tables import TableKind

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def render_toml(config: Config) -> Iterator[str]:
    """Yield the lines of a file with every key of ``config``, also where it has its default. Secrets are hidden."""
    yield from _render_table(TableKind(Config).render(config), ())


def render_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a configuration file, for editors."""
    return {"$schema": DIALECT, "title": "tlstunnel's configuration", **TableKind(Config).schema()}


def render_value(value: Any) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(render_value, value))}]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{_render_key(name)} = {render_value(inner)}" for name, inner in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, str):
        # A string of JSON is a basic string of TOML, except for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _render_table(table: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Yield the keys of a table, then the tables in it: TOML wants them in this order."""
    later = {}
    for name, value in table.items():
        tables = value if isinstance(value, list) else [value]
        if value and all(isinstance(inner, dict) for inner in tables):
            later[name] = value
        else:
            yield f"{_render_key(name)} = {render_value(value)}"
    for name, value in later.items():
        heading = (*path, _render_key(name))
        for inner in value if isinstance(value, list) else [value]:
            yield ""
            yield f"[[{'.'.join(heading)}]]" if isinstance(value, list) else f"[{'.'.join(heading)}]"
            yield from _render_table(inner, heading)


def _render_key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else json.dumps(name)
