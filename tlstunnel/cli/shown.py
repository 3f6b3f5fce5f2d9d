"""A configuration as text: the effective one in TOML, and what a file may hold as JSON Schema."""

import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union

import msgspec

from tlstunnel.addresses import ListenAddress, Networks, OriginAddress
from tlstunnel.config import Config, Duration, Headers, IdleTimeout, Lists, OriginConfig, WorkerTable

DIALECT = "https://json-schema.org/draft/2020-12/schema"

HIDDEN = "(hidden)"
_SECRET = re.compile(r"(?i)authorization|cookie|token|secret|passw|pwd|passphrase|key|credential")
# A URL with a user, and so a password; and what stands in its query, or in a data source's name.
_SECRET_URL = re.compile(r"(?i)://[^/\s]*@|(?:passw\w*|pwd|secret|token|key)\s*=")
_DURATION = r"^[0-9]{1,15}(\.[0-9]{1,9})?(ms|s|m|h|d)$"
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def toml(config: Config) -> Iterator[str]:
    """The lines of a file that says all of `config`, defaults too; fields for origins that may be secret are hidden."""
    yield from _table(_plain(config), ())


def _plain(value: Any) -> Any:  # noqa: PLR0911 - each kind of value
    """A value as TOML has it; None for what is left out."""
    match value:
        case msgspec.Struct():
            hints = typing.get_type_hints(type(value))
            pairs = ((name, getattr(value, name), hints[name]) for name in value.__struct_fields__)
            plain = {name: "off" if one is None and _may_be_off(hint) else _plain(one) for name, one, hint in pairs}
            return {name: one for name, one in plain.items() if one is not None}
        case ListenAddress() | OriginAddress() | Duration() | Path():
            return str(value)
        case Headers():
            return {name: HIDDEN if _SECRET.search(name) else text for name, text in value.items()}
        case WorkerTable():
            return _without_secrets(value)
        case dict():
            return {name: _plain(one) for name, one in value.items()}
        case Networks():
            return [str(network) for network in value]
        case tuple():
            return [_plain(one) for one in value]
        case _:
            return value


def _without_secrets(value: Any) -> Any:
    """What a file says to a worker, at any depth."""
    if isinstance(value, dict):
        return {name: HIDDEN if _SECRET.search(name) else _without_secrets(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_secrets(one) for one in value]
    return HIDDEN if isinstance(value, str) and _SECRET_URL.search(value) else value


def _may_be_off(hint: Any) -> bool:
    return IdleTimeout in typing.get_args(hint)


def _table(table: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """The keys of a table, then the tables in it: TOML wants them in this order."""
    later = {}
    for name, value in table.items():
        tables = value if isinstance(value, list) else [value]
        if value and all(isinstance(one, dict) for one in tables):
            later[name] = value
        else:
            yield f"{_key(name)} = {inline(value)}"
    for name, value in later.items():
        inner = (*path, _key(name))
        for one in value if isinstance(value, list) else [value]:
            heading = ".".join(inner)
            yield ""
            yield f"[[{heading}]]" if isinstance(value, list) else f"[{heading}]"
            yield from _table(one, inner)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else json.dumps(name)


def inline(value: Any) -> str:
    """A value as TOML writes it on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inline, value))}]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{_key(name)} = {inline(one)}" for name, one in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, str):
        # What JSON writes is a basic string of TOML, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else str(value)


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a configuration file, for editors."""
    made = _of_table(Config)
    return {"$schema": DIALECT, "title": "tlstunnel's configuration", **made}


def _of_table(kind: type[msgspec.Struct]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = msgspec.structs.fields(kind)
    return {
        "type": "object",
        "description": " ".join((kind.__doc__ or "").split()),
        "properties": {field.name: _described(field, hints[field.name]) for field in fields},
        "required": [field.name for field in fields if field.default is msgspec.NODEFAULT],
        "additionalProperties": False,
    }


def _described(field: msgspec.structs.FieldInfo, hint: Any) -> dict[str, Any]:
    made = _of(hint)
    default = None if field.default is msgspec.NODEFAULT else _plain(field.default)
    return made if default is None or isinstance(default, dict) else made | {"default": default}


def _of(hint: Any) -> dict[str, Any]:  # noqa: PLR0911 - each kind of value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        meta: msgspec.Meta = hint.__metadata__[0]
        return _of(arguments[0]) | {"minimum": meta.ge, "maximum": meta.le}
    if origin in (Union, types.UnionType):
        choices = [_of(one) for one in arguments if one is not type(None)]
        if IdleTimeout in arguments:
            choices.append({"const": "off"})
        return {"anyOf": choices} if len(choices) > 1 else choices[0]
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _of(arguments[0])}
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        made = _of_table(hint)
        # An origin may be written as its address alone.
        return {"anyOf": [{"type": "string"}, made]} if hint is OriginConfig else made
    if isinstance(hint, type) and issubclass(hint, Duration):
        return {"type": "string", "pattern": _DURATION}
    if hint is Networks:
        return {"type": "array", "items": {"type": "string"}}
    if hint is WorkerTable:
        return {"type": "object", "additionalProperties": True}
    if hint is Headers:
        return {"type": "object", "additionalProperties": {"type": "string"}}
    if hint is Lists:
        entries = {"type": "array", "items": {"type": "string"}}
        return {"type": "object", "additionalProperties": {"anyOf": [{"type": "string"}, entries]}}
    return {"type": {bool: "boolean", int: "integer"}.get(hint, "string")}
