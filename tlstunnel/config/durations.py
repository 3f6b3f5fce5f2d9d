"""Durations: their grammar, and ``"off"`` in place of one.

Tested by tests/unit/test_config.py.
"""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from tlstunnel.addresses import quoted
from tlstunnel.config.kinds import Scalar, Schema, Text

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")
# A longer one has the wrong unit by mistake; timers and system calls could hold far more.
_LONGEST = 366 * _UNITS["d"]


class Duration(float):
    """A time in seconds, written with its unit: ``"250ms"``, ``"1.5s"``, ``"15m"``, ``"24h"``, ``"7d"``."""

    __slots__ = ()
    expected: ClassVar[str] = 'a duration such as "10s"'
    may_be_zero: ClassVar[bool] = True
    longest: ClassVar[float] = _LONGEST

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a number with its unit. Raises ValueError."""
        match = _DURATION.fullmatch(text)
        if not match:
            raise ValueError(f"expected {cls.expected}, got {quoted(text)}")
        seconds = float(match[1]) * _UNITS[match[2]]
        if seconds > cls.longest:
            most = round(cls.longest / _UNITS["d"])
            raise ValueError(f"expected {cls.expected}, of at most {most} days, got {quoted(text)}")
        if not seconds and not cls.may_be_zero:
            raise ValueError(f"expected {cls.expected}, longer than zero, got {quoted(text)}")
        return cls(seconds)

    @classmethod
    def kind(cls) -> Text:
        """Return the kind of this value in the file."""
        return Text(cls.parse, "10s", expected=cls.expected, pattern=f"^{_DURATION.pattern}$")

    def __str__(self) -> str:
        unit = next((unit for unit in "dhm" if self > _UNITS[unit] and not self % _UNITS[unit]), "s")
        return f"{float(self) / _UNITS[unit]:.15g}{unit}"


class Timeout(Duration):
    """A duration of more than zero."""

    __slots__ = ()
    may_be_zero: ClassVar[bool] = False


class Off(Scalar):
    """``"off"``, which becomes None, or a value of another kind."""

    def __init__(self, kind: Scalar) -> None:
        self.expected = f'"off" or {kind.expected}'
        self._kind = kind

    def convert(self, value: object, folder: Path) -> Any:
        if value == "off":
            return None
        try:
            return self._kind.convert(value, folder)
        except ValueError as error:
            reason = str(error).removeprefix("expected ")
            raise ValueError(f'expected "off" or {reason}') from None

    def schema(self) -> Schema:
        return {"anyOf": [self._kind.schema(), {"const": "off"}]}

    def render(self, value: Any) -> Any:
        return "off" if value is None else self._kind.render(value)


_T = TypeVar("_T")

OffOr = Annotated[_T | None, Off]
"""The type of a key that can be switched off: ``OffOr[Timeout]``."""
