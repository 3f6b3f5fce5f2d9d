"""A configuration file as text: reading it, parsing its TOML, and finding the line of a key."""

import re
import tomllib
from bisect import bisect_left
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from tlstunnel.errors import ConfigurationError

KeyPath = tuple[str | int, ...]
"""The keys and indexes that lead to a value, such as ``("sites", 0, "names")``."""


def read(path: Path) -> str:
    """Return the text of a configuration file. Raises ConfigurationError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        # With a byte order mark or without: some editors write one, and TOML does not allow it.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"{path}:{line}: the file is not UTF-8") from None


def parse(text: str, source: str) -> dict[str, Any]:
    """Return the tables of a TOML document. Raises ConfigurationError."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        reason, _, place = str(error).partition(" (at ")
        number = re.match(r"line ([0-9]+)", place)
        line = number[1] if number else text.rstrip().count("\n") + 1
        raise ConfigurationError(f"{source}:{line}: not TOML: {reason[:1].lower()}{reason[1:]}") from None
    except RecursionError:
        raise ConfigurationError(f"{source}: arrays or tables are nested too deeply") from None
    except ValueError:  # int()'s own
        raise ConfigurationError(f"{source}: a number has too many digits") from None


def render_path(path: KeyPath) -> str:
    """Return a path as messages show it: ``sites[0].names``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


class Lines:
    """Finds the lines of values in the text of a TOML document.

    tomllib keeps no positions. But a prefix of whole lines is TOML again (inside an array, once the array is closed),
    so a binary search finds the first line without which the value is missing. This costs some parses, only when there
    is a problem to report.
    """

    def __init__(self, text: str) -> None:
        self._lines = text.split("\n")
        self._parse = cache(self._parse_lines)

    def find(self, path: KeyPath) -> int:
        """Return the line on which the value at the path begins, or the innermost table around it that exists."""
        while not self._has(len(self._lines), path):
            path = path[:-1]
        counts = range(1, len(self._lines) + 1)
        return bisect_left(counts, True, key=lambda count: self._has(count, path)) + 1

    def _has(self, count: int, path: KeyPath) -> bool:
        found: Any = self._parse(count)
        try:
            for step in path:
                found = found[step]
        except LookupError:
            return False
        return True

    def _parse_lines(self, count: int) -> dict[str, Any]:
        """Parse the first ``count`` lines, or as many more as it takes to end what the last of them began."""
        for end in range(count, len(self._lines)):
            for closing in ("\n", "\n]"):  # the line's end is needed too: the line may end in CR
                with suppress(ValueError):
                    return tomllib.loads("\n".join(self._lines[:end]) + closing)
        return tomllib.loads("\n".join(self._lines))
