"""Kinds of values: for each, what the file may hold, the error for anything else, and its JSON Schema.

A field of a table names its kind by its type: ``bool``, ``str`` and ``Literal`` have one each, classes such as
``Duration`` have a method ``kind``, and ``Annotated[str, Text(...)]`` has one of its own. ``tables.kind_of`` finds it.

Tested by tests/unit/test_config.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from tlstunnel.addresses import quoted
from tlstunnel.config.document import KeyPath
from tlstunnel.config.problems import Problem

Schema = dict[str, Any]


class Reading:
    """One reading of a file: relative paths start from ``folder``, and every problem is collected."""

    __slots__ = ("folder", "problems")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[Problem] = []

    def refuse(self, path: KeyPath, reason: str, key: str | None = None) -> None:
        """Add a problem."""
        self.problems.append(Problem(path, reason, key))


class _Unreadable:
    """The type of ``UNREADABLE``."""


UNREADABLE: Final = _Unreadable()
"""Returned in place of a value with a problem."""


def describe(value: object) -> str:
    """Return a value of the file as messages show it."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "an array"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of more than 64 bits"  # str() refuses one of thousands of digits
    return str(value)


class Kind(ABC):
    """A kind of value."""

    @abstractmethod
    def read(self, value: object, path: KeyPath, reading: Reading) -> Any:
        """Return what a value of the file stands for, or UNREADABLE after adding its problems to ``reading``."""

    @abstractmethod
    def schema(self) -> Schema:
        """Return the JSON Schema (draft 2020-12) of a value in the file."""

    def render(self, value: Any) -> Any:
        """Return the value as the file may hold it, or None where its key is left out. Secrets are hidden."""
        return value if value is None or isinstance(value, bool | int | str) else str(value)


class Scalar(Kind):
    """A kind of value that has one problem at most."""

    expected: str
    """The value in words, for messages: ``a whole number from 1 to 4``."""

    def read(self, value: object, path: KeyPath, reading: Reading) -> Any:
        try:
            return self.convert(value, reading.folder)
        except ValueError as error:
            reading.refuse(path, str(error))
            return UNREADABLE

    @abstractmethod
    def convert(self, value: object, folder: Path) -> Any:
        """Return what a value of the file stands for. Raises ValueError; the message begins with what is wrong."""

    def _misfit(self, value: object) -> ValueError:
        return ValueError(f"expected {self.expected}, got {describe(value)}")


class Boolean(Scalar):
    """``true`` or ``false``."""

    expected = "true or false"

    def convert(self, value: object, folder: Path) -> bool:
        if not isinstance(value, bool):
            raise self._misfit(value)
        return value

    def schema(self) -> Schema:
        return {"type": "boolean"}


class Integer(Scalar):
    """A whole number from ``least`` to ``most``."""

    def __init__(self, least: int, most: int) -> None:
        self.expected = f"a whole number from {least} to {most}"
        self._least = least
        self._most = most

    def convert(self, value: object, folder: Path) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not self._least <= value <= self._most:
            raise self._misfit(value)
        return value

    def schema(self) -> Schema:
        return {"type": "integer", "minimum": self._least, "maximum": self._most}


class String(Scalar):
    """Any string."""

    expected = "a string"

    def convert(self, value: object, folder: Path) -> str:
        if not isinstance(value, str):
            raise self._misfit(value)
        return value

    def schema(self) -> Schema:
        return {"type": "string"}


class Choice(Scalar):
    """One of several strings."""

    def __init__(self, *choices: str) -> None:
        *others, last = (f'"{choice}"' for choice in choices)
        self.expected = f"{', '.join(others)} or {last}" if others else last
        self._choices = choices

    def convert(self, value: object, folder: Path) -> str:
        if not isinstance(value, str) or value not in self._choices:
            raise self._misfit(value)
        return value

    def schema(self) -> Schema:
        return {"enum": list(self._choices)}


class Text(Scalar):
    """A string with a grammar of its own.

    ``parse`` returns what the string stands for, or raises ValueError with the reason. ``pattern`` is a regular
    expression of ECMA-262 that every valid string matches, for editors.
    """

    def __init__(
        self, parse: Callable[[str], Any], example: str, *, expected: str | None = None, pattern: str | None = None
    ) -> None:
        self.example = example
        self.expected = expected or f'a string such as "{example}"'
        self._parse = parse
        self._pattern = pattern

    def convert(self, value: object, folder: Path) -> Any:
        if not isinstance(value, str):
            raise self._misfit(value)
        return self._parse(value)

    def schema(self) -> Schema:
        return {"type": "string"} | ({"pattern": self._pattern} if self._pattern else {})


class PlacedText(Text):
    """A string with a grammar of its own, in which there may be a path relative to the file's folder."""

    def __init__(
        self,
        parse: Callable[[str, Path], Any],
        example: str,
        *,
        expected: str | None = None,
        pattern: str | None = None,
    ) -> None:
        super().__init__(str, example, expected=expected, pattern=pattern)
        self._parse_in = parse

    def convert(self, value: object, folder: Path) -> Any:
        if not isinstance(value, str):
            raise self._misfit(value)
        return self._parse_in(value, folder)


class FilePath(Scalar):
    """The path of a file or folder, which becomes absolute. ``what`` describes the file."""

    def __init__(self, what: str, convert: Callable[[Path], Any] = Path) -> None:
        self.expected = f"the path of {what}"
        self._convert = convert

    def convert(self, value: object, folder: Path) -> Any:
        if not isinstance(value, str) or not value or "\0" in value:
            raise self._misfit(value)
        return self._convert(folder / value)

    def schema(self) -> Schema:
        return {"type": "string"}


class Either(Scalar):
    """A value of one of several kinds."""

    def __init__(self, *kinds: Scalar) -> None:
        self.expected = ", or ".join(kind.expected for kind in kinds)
        self._kinds = kinds

    def convert(self, value: object, folder: Path) -> Any:
        for kind in self._kinds:
            with suppress(ValueError):
                return kind.convert(value, folder)
        raise self._misfit(value)

    def schema(self) -> Schema:
        return {"anyOf": [kind.schema() for kind in self._kinds]}


class Array(Kind):
    """An array of values of one kind, which becomes a tuple."""

    def __init__(self, item: Kind) -> None:
        self._item = item
        self._expected = f'an array such as ["{item.example}"]' if isinstance(item, Text) else "an array"

    def read(self, value: object, path: KeyPath, reading: Reading) -> Any:
        if not isinstance(value, list):
            reading.refuse(path, f"expected {self._expected}, got {describe(value)}")
            return UNREADABLE
        items = tuple([self._item.read(item, (*path, index), reading) for index, item in enumerate(value)])
        return UNREADABLE if any(item is UNREADABLE for item in items) else items

    def schema(self) -> Schema:
        return {"type": "array", "items": self._item.schema()}

    def render(self, value: Any) -> Any:
        return None if value is None else [self._item.render(item) for item in value]
