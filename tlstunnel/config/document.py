"""A configuration file as text: reading it, parsing its TOML, and finding the line of a key."""

import os
import re
import stat
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tlstunnel.addresses import quoted
from tlstunnel.errors import ConfigurationError

KeyPath = tuple[str | int, ...]
"""The keys and indexes that lead to a value, such as ``("sites", 0, "names")``."""


DEFAULT_FILE = Path("tlstunnel.toml")
"""The file that ``start`` and ``config check`` use if none is named: the one in the current folder."""


def read(path: Path, *, trusted_only: bool = False) -> str:
    """Return the text of a configuration file. Raises ConfigurationError.

    With `trusted_only` also if another user may have written it or its folder, because it can name edge workers, which
    are executed: in a folder that others can write, a link to a file of yours would execute their workers.
    """
    try:
        with path.open("rb") as file:
            if trusted_only:
                _refuse_untrusted(path, "it", os.fstat(file.fileno()))
                _refuse_untrusted(path, "its folder", path.parent.stat())
            content = file.read()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        # With a byte order mark or without: some editors write one, and TOML does not allow it.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"{path}:{line}: the file is not UTF-8") from None


def _refuse_untrusted(path: Path, what: str, found: os.stat_result) -> None:
    if found.st_uid not in {os.geteuid(), 0}:
        why = f"{what} belongs to another user"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        why = f"other users can write {what} (chmod go-w)"
    else:
        return
    raise ConfigurationError(f"{path}: is not used unless you name it on the command line, because {why}")


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
    """Return a path as messages show it: ``sites[0].names``. A key that is not a bare one is quoted, on one line."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{_render_key(step)}" for step in path)
    return "".join(steps).removeprefix(".")


def _render_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else quoted(key)


def find_lines(text: str, paths: Sequence[KeyPath]) -> list[int]:
    """Return the line on which each value begins, or the innermost table around it that the document has.

    ``text`` is valid TOML. tomllib keeps no positions, so this reads the text once more, only to report a problem.
    """
    known = _Positions(text).lines
    return [next(known[path[:end]] for end in range(len(path), -1, -1) if path[:end] in known) for path in paths]


# Not compiled here: every start imports this, and only an error needs it.
_LEXEME = (
    r'''(?P<string>"""(?:\\.|[^\\])*?"{3,5}|"(?:\\.|[^"\\\n])*"|'''
    r"""'''.*?'{3,5}|'[^'\n]*')"""
    r"|(?P<mark>[\[\]{},=.\n])|(?P<space>[ \t\r]+|#[^\n]*)|(?P<bare>[^\s\[\]{},=.#\"']+)"
)
_END = ("", "end", 0)


class _Positions:
    """The lines on which the keys and items of a valid TOML document begin."""

    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {(): 1}
        self._tokens = _tokenize(text)
        self._text, self._kind, self._line = next(self._tokens, _END)
        # The last index of each array of tables so far.
        self._last: dict[KeyPath, int] = {}
        self._read_document()

    def _advance(self) -> None:
        self._text, self._kind, self._line = next(self._tokens, _END)

    def _skip(self, marks: str) -> None:
        while self._kind == "mark" and self._text in marks:
            self._advance()

    def _read_document(self) -> None:
        table: KeyPath = ()
        self._skip("\n")
        while self._kind != "end":
            if self._kind == "mark" and self._text == "[":
                table = self._read_header()
            else:
                self._read_pair(table)
            self._skip("\n")

    def _read_header(self) -> KeyPath:
        """Read ``[table]`` or ``[[table]]``; return its path."""
        line = self._line
        self._advance()
        is_array = self._text == "["
        self._skip("[")
        *outer, last = self._read_key()
        self._skip("]")
        path: KeyPath = ()
        for step in outer:
            path = self._inner((*path, step), line)
        path = (*path, last)
        if is_array:
            self._last[path] = self._last.get(path, -1) + 1
        return self._inner(path, line)

    def _inner(self, path: KeyPath, line: int) -> KeyPath:
        """Return the path of a table, or of the last table of an array."""
        self.lines.setdefault(path, line)
        if path in self._last:
            path = (*path, self._last[path])
            self.lines.setdefault(path, line)
        return path

    def _read_key(self) -> list[str]:
        steps = []
        while self._kind in ("bare", "string"):
            quoted = self._kind == "string"
            steps.append(next(iter(tomllib.loads(f"{self._text} = 0"))) if quoted else self._text)
            self._advance()
            self._skip(".")
        return steps

    def _read_pair(self, table: KeyPath) -> None:
        line = self._line
        for step in self._read_key():
            table = (*table, step)
            self.lines.setdefault(table, line)
        self._skip("=")
        self._read_value(table)

    def _read_value(self, path: KeyPath) -> None:
        if self._kind == "mark" and self._text == "[":
            self._advance()
            self._read_items(path)
        elif self._kind == "mark" and self._text == "{":
            self._advance()
            self._skip("\n")
            while not (self._kind == "mark" and self._text == "}"):
                self._read_pair(path)
                self._skip(",\n")
            self._advance()
        elif self._kind == "string":
            self._advance()
        else:  # a number or a date, which may have several words
            while self._kind == "bare" or self._text == ".":
                self._advance()

    def _read_items(self, path: KeyPath) -> None:
        self._skip("\n")
        index = 0
        while not (self._kind == "mark" and self._text == "]"):
            self.lines[*path, index] = self._line
            self._read_value((*path, index))
            self._skip(",\n")
            index += 1
        self._advance()


def _tokenize(text: str) -> Iterator[tuple[str, str, int]]:
    """Yield the text, the kind and the line of each token."""
    line = 1
    for match in re.finditer(_LEXEME, text, re.DOTALL):
        if match.lastgroup != "space":
            yield match[0], match.lastgroup or "", line
        line += match[0].count("\n")
