"""Tables of the file as structs: reading every key, checking what no single value shows, and their JSON Schema.

A table that has a problem is still checked as far as its other values allow, so that one reading of a file reports all
of its problems.

Tested by tests/unit/test_config.py.
"""

import difflib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Union

import msgspec

from tlstunnel.addresses import quoted
from tlstunnel.config.document import KeyPath
from tlstunnel.config.kinds import (
    UNREADABLE,
    Array,
    Boolean,
    Choice,
    Either,
    Kind,
    Reading,
    Scalar,
    Schema,
    String,
    describe,
)

Findings = Iterator[tuple[KeyPath, str]]
"""What a check found: the path below its table, and the reason."""


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table of the file.

    Each method ``check_...`` yields what is wrong with the table as a whole. A check that reads a key whose own value
    is wrong ends there.
    """

    renamed: ClassVar[Mapping[str, str]] = {}
    """Keys of versions before 0.1.0, with their names of today."""

    @classmethod
    def table_kind(cls) -> Kind:
        """Return the kind of this table."""
        return TableKind(cls)


class UnreadableError(Exception):
    """A check read a key whose value is wrong."""


class Partial:
    """Stands for a table in which something is wrong: has the values that are right, and raises UnreadableError."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise UnreadableError(name) from None


class TableKind(Kind):
    """A table, read as ``struct``."""

    def __init__(self, struct: type[Table]) -> None:
        self._struct = struct

    def read(self, value: object, path: KeyPath, reading: Reading) -> Any:
        if not isinstance(value, dict):
            reading.refuse(path, f"expected a table, got {describe(value)}")
            return Partial({})
        before = len(reading.problems)
        kinds, values = kinds_of(self._struct), {}
        for key, inner in value.items():
            if key in kinds:
                values[key] = kinds[key].read(inner, (*path, key), reading)
            else:
                reading.refuse(path, self._reject(key, kinds), key)
        for key in required_keys(self._struct) - value.keys():
            reading.refuse(path, f"the key {key} is missing")
        right = len(reading.problems) == before
        table = self._struct(**values) if right else self._partial(value, values)
        for check in checks_of(self._struct):
            with suppress(UnreadableError):
                for inside, reason in check(table):
                    reading.refuse((*path, *inside), reason)
        return table

    def _reject(self, key: str, kinds: Mapping[str, Kind]) -> str:
        if key in self._struct.renamed:
            return f"unknown key {quoted(key)}; it was renamed to {quoted(self._struct.renamed[key])}"
        near = difflib.get_close_matches(key[:100], kinds, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"the keys here are {', '.join(kinds)}"
        return f"unknown key {quoted(key)}; {hint}"

    def _partial(self, written: Mapping[str, object], values: Mapping[str, Any]) -> Partial:
        fields = msgspec.structs.fields(self._struct)
        defaults = {f.name: UNREADABLE if f.default is msgspec.NODEFAULT else f.default for f in fields}
        # A key under its old name is not missing, so its default must not count.
        wrong = {new for old, new in self._struct.renamed.items() if old in written} - values.keys()
        known = {key: values.get(key, default) for key, default in defaults.items() if key not in wrong}
        return Partial({key: value for key, value in known.items() if value is not UNREADABLE})

    def schema(self) -> Schema:
        kinds = kinds_of(self._struct)
        return {
            "type": "object",
            "description": " ".join((self._struct.__doc__ or "").split()),
            "properties": {
                field.name: _with_default(kinds[field.name], field.default)
                for field in msgspec.structs.fields(self._struct)
            },
            "required": sorted(required_keys(self._struct)),
            "additionalProperties": False,
        }

    def render(self, value: Any) -> Any:
        if value is None:
            return None
        rendered = {name: kind.render(getattr(value, name)) for name, kind in kinds_of(self._struct).items()}
        return {name: inner for name, inner in rendered.items() if inner is not None}


class TableArray(Array):
    """An array of tables."""

    def read(self, value: object, path: KeyPath, reading: Reading) -> Any:
        if isinstance(value, dict):
            name = ".".join(step for step in path if isinstance(step, str))
            reason = f"expected an array of tables, got a table; write [[{name}]], in double brackets"
            reading.refuse(path, reason)
            return UNREADABLE
        return super().read(value, path, reading)


class Shorthand(Kind):
    """A table, or instead of it the value of its one key that matters."""

    def __init__(self, struct: type[Table], key: str) -> None:
        self._struct = struct
        self._key = key
        self._table = TableKind(struct)

    def read(self, value: object, path: KeyPath, reading: Reading) -> Any:
        if isinstance(value, dict):
            return self._table.read(value, path, reading)
        inner = kinds_of(self._struct)[self._key].read(value, path, reading)
        return Partial({}) if inner is UNREADABLE else self._struct(**{self._key: inner})

    def schema(self) -> Schema:
        return {"anyOf": [kinds_of(self._struct)[self._key].schema(), self._table.schema()]}

    def render(self, value: Any) -> Any:
        return self._table.render(value)


def _with_default(kind: Kind, default: Any) -> Schema:
    rendered = None if default is msgspec.NODEFAULT else kind.render(default)
    return kind.schema() | ({} if rendered is None or isinstance(rendered, dict) else {"default": rendered})


@cache
def kinds_of(struct: type[Table]) -> dict[str, Kind]:
    """Return the kind of each key of a table, in the order of its fields."""
    hints = typing.get_type_hints(struct, include_extras=True)
    return {name: kind_of(hints[name]) for name in struct.__struct_fields__}


@cache
def required_keys(struct: type[Table]) -> frozenset[str]:
    """Return the keys without a default."""
    return frozenset(f.name for f in msgspec.structs.fields(struct) if f.default is msgspec.NODEFAULT)


@cache
def checks_of(struct: type[Table]) -> tuple[Callable[[Any], Findings], ...]:
    """Return the checks of a table."""
    return tuple(getattr(struct, name) for name in dir(struct) if name.startswith("check_"))


def kind_of(hint: Any) -> Kind:  # noqa: PLR0911 - each form of a type
    """Return the kind of value that a field of this type has."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        (extra,) = hint.__metadata__
        # ``Off`` wraps the kind of the type that it annotates; the others replace it.
        return extra(kind_of(arguments[0])) if isinstance(extra, type) else extra  # type: ignore[no-any-return]
    if origin in (Union, types.UnionType):
        kinds = [kind_of(inner) for inner in arguments if inner is not type(None)]
        return kinds[0] if len(kinds) == 1 else Either(*typing.cast("list[Scalar]", kinds))
    if origin is Literal:
        return Choice(*arguments)
    if origin is tuple:
        kind = kind_of(arguments[0])
        return TableArray(kind) if isinstance(kind, TableKind) else Array(kind)
    if issubclass(hint, Table):
        return hint.table_kind()  # type: ignore[no-any-return]
    if hasattr(hint, "kind"):
        return hint.kind()  # type: ignore[no-any-return]
    return {bool: Boolean, str: String}[hint]()
