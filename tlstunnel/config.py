"""The configuration file as types: what it may hold, the defaults, and errors that say where.

``load`` reads a file; ``decode`` does the rest without I/O. ``docs/configuration.md`` describes every key.
"""

import difflib
import re
import tomllib
import typing
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec

from tlstunnel.addresses import ListenAddress, Networks, OriginAddress, canonical_name, quoted
from tlstunnel.errors import ConfigurationError

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")
# A longer one is a slip of the unit, and far below what timers and system calls can hold.
_LONGEST = 366 * _UNITS["d"]

# msgspec's names of types, in the words of TOML.
_WORDS = {"array": "an array", "bool": "true or false", "int": "a whole number", "object": "a table", "str": "a string"}

# From a table's key or an array's index to the next: ("sites", 0, "names").
_Path = tuple[str | int, ...]


class Duration(float):
    """A time in seconds, written with its unit: ``"250ms"``, ``"1.5s"``, ``"15m"``, ``"24h"``, ``"7d"``."""

    __slots__ = ()
    expected: ClassVar[str] = 'a duration such as "10s"'
    zero: ClassVar[bool] = True

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a number with its unit. Raises ValueError."""
        match = _DURATION.fullmatch(text)
        if not match:
            raise ValueError(f"expected {cls.expected}, got {quoted(text)}")
        seconds = float(match[1]) * _UNITS[match[2]]
        if seconds > _LONGEST:
            raise ValueError(f"expected {cls.expected}, of 366 days at most, got {quoted(text)}")
        if not seconds and not cls.zero:
            raise ValueError(f"expected {cls.expected}, longer than zero, got {quoted(text)}")
        return cls(seconds)

    def __str__(self) -> str:
        unit = next((unit for unit in "dhm" if self > _UNITS[unit] and not self % _UNITS[unit]), "s")
        return f"{float(self) / _UNITS[unit]:.15g}{unit}"


class Timeout(Duration):
    """A duration of more than zero."""

    __slots__ = ()
    zero: ClassVar[bool] = False


class IdleTimeout(Timeout):
    """A timeout that the file can switch off."""

    __slots__ = ()
    expected: ClassVar[str] = 'a duration such as "15m", or "off"'


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file."""


class Timeouts(_Table, frozen=True):
    """How long each step of a connection may take. ``idle`` is None when it is off."""

    tls_handshake: Timeout = Timeout(10)
    request: Timeout = Timeout(10)
    origin_connect: Timeout = Timeout(5)
    origin_answer: Timeout = Timeout(30)
    idle: IdleTimeout | None = None
    close: Timeout = Timeout(30)


class Limits(_Table, frozen=True):
    """How much of the process's means others may take."""

    unfinished_handshakes: Annotated[int, msgspec.Meta(ge=10, le=1_000_000)] = 4096


class Release(_Table, frozen=True):
    """How tunnels end when this process is asked to leave."""

    drain_wait: Duration = Duration(0)
    drain_over: Duration = Duration(60)


class Log(_Table, frozen=True):
    """What is logged, and how."""

    format: Literal["text", "json"] = "text"
    opened: bool = False


class SiteConfig(_Table, frozen=True):
    """A set of names with one certificate and one origin.

    ``names`` are as ``addresses.canonical_name`` gives them, ``cert`` and ``key`` absolute and either both None or both
    set, ``origins`` exactly one.
    """

    names: tuple[str, ...] = ("*",)
    default: bool = False
    cert: Path | None = None
    key: Path | None = None
    origins: tuple[OriginAddress, ...] = ()


class Config(_Table, frozen=True):
    """The whole file."""

    listen: tuple[ListenAddress, ...] = ()
    trusted_proxies: Networks = Networks()
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    release: Release = Release()
    log: Log = Log()
    sites: tuple[SiteConfig, ...] = ()


def load(path: Path) -> Config:
    """Read and decode a configuration file. Raises ConfigurationError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        # With a byte order mark or without: some editors write one, and TOML does not allow it.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"{path}:{line}: the file is not UTF-8") from None
    return decode(text, path.parent, str(path))


def decode(text: str, folder: Path, source: str) -> Config:
    """Decode the text of a configuration file. Raises ConfigurationError, its message ``SOURCE:LINE: KEY: ...``.

    Relative paths are taken from ``folder``.
    """
    document = _parse(text, source)
    try:
        _refuse_unknown_keys(document, Config, ())
        _read_addresses(document, folder.absolute())
        config = _convert(document, folder.absolute())
        _refuse_contradictions(config)
    except _MisfitError as misfit:
        place = f"{source}:{_line(text, misfit.inside)}"
        key = _written(misfit.path)
        raise ConfigurationError(f"{place}: {key}: {misfit.reason}" if key else f"{place}: {misfit.reason}") from None
    return config


class _MisfitError(Exception):
    """What is wrong at ``path``; it becomes a ConfigurationError once its line is known.

    For an unknown key, ``path`` is its table's; ``inside``, the path whose line is wanted, has the key too.
    """

    def __init__(self, path: _Path, reason: str, key: str | None = None) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason
        self.inside = path if key is None else (*path, key)


def _parse(text: str, source: str) -> dict[str, Any]:
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
        raise ConfigurationError(f"{source}: a number has thousands of digits") from None


def _refuse_unknown_keys(table: dict[str, Any], struct: type[_Table], path: _Path) -> None:
    """Look for them before msgspec does: its message names one without a suggestion, and unescaped."""
    types = _types(struct)
    for key, value in table.items():
        if key not in types:
            near = difflib.get_close_matches(key[:100], types, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"the keys here are {', '.join(types)}"
            raise _MisfitError(path, f"unknown key {quoted(key)}; {hint}", key)
        inner = (*typing.get_args(types[key]), types[key])[0]
        if isinstance(inner, type) and issubclass(inner, _Table):
            for inner_table, inner_path in _tables(value, (*path, key)):
                _refuse_unknown_keys(inner_table, inner, inner_path)


@cache
def _types(struct: type[_Table]) -> dict[str, Any]:
    return typing.get_type_hints(struct)


def _tables(value: object, path: _Path) -> Iterator[tuple[dict[str, Any], _Path]]:
    """Give the tables of an array of tables, or a table alone, each with its path; nothing for any other value."""
    if isinstance(value, dict):
        yield value, path
    elif isinstance(value, list):
        yield from ((item, (*path, index)) for index, item in enumerate(value) if isinstance(item, dict))


def _read_addresses(document: dict[str, Any], folder: Path) -> None:
    """Put values in the place of their texts.

    msgspec takes them as they are; for a dataclass it would want a table, and never call its hook.
    """
    _read_each(document, (), "listen", ListenAddress.parse, "127.0.0.1:8443")
    _read_each(document, (), "trusted_proxies", lambda text: Networks.parse([text]), "10.0.0.0/8")
    if "trusted_proxies" in document:
        document["trusted_proxies"] = Networks(chain.from_iterable(document["trusted_proxies"]))
    if isinstance(document.get("sites"), dict):
        raise _MisfitError(("sites",), "expected an array of tables, got a table; write [[sites]], in double brackets")
    for site, path in _tables(document.get("sites"), ("sites",)):
        _read_each(site, path, "names", canonical_name, "chat.example.com")
        _read_each(site, path, "origins", partial(OriginAddress.parse, folder=folder), "localhost:3000")


def _read_each(table: dict[str, Any], path: _Path, key: str, parse: Callable[[str], object], example: str) -> None:
    values = table.get(key, [])
    if not isinstance(values, list):
        raise _MisfitError((*path, key), f'expected an array such as ["{example}"], got {_shown(values)}')
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise _MisfitError((*path, key, index), f'expected a string such as "{example}", got {_shown(value)}')
        try:
            values[index] = parse(value)
        except ValueError as error:
            raise _MisfitError((*path, key, index), str(error)) from None


def _convert(document: dict[str, Any], folder: Path) -> Config:
    timeouts = document.get("timeouts")
    if isinstance(timeouts, dict) and timeouts.get("idle") == "off":
        timeouts["idle"] = None
    try:
        return msgspec.convert(document, Config, dec_hook=partial(_read_custom, folder))
    except msgspec.ValidationError as error:
        message, _, place = str(error).rpartition(" - at `$")
        path = tuple(int(index) if index else key for key, index in re.findall(r"(\w+)|\[([0-9]+)\]", place))
        raise _MisfitError(path, _explained(message, _at(document, path))) from None


def _read_custom(folder: Path, kind: type, value: object) -> object:
    """Make what msgspec does not know from a value of the file: msgspec's ``dec_hook``."""
    if isinstance(value, kind):  # Networks, read before
        return value
    if issubclass(kind, Duration):
        if not isinstance(value, str):
            raise ValueError(f"expected {kind.expected}, got {_shown(value)}")
        return kind.parse(value)
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"expected the path of a PEM file, got {_shown(value)}")
    return folder / value


def _explained(message: str, value: object) -> str:
    """Turn msgspec's message into this program's words; one that a hook raised stays as it is."""
    if message.startswith("Invalid enum value"):
        return f'expected "text" or "json", got {_shown(value)}'
    match = re.fullmatch(r"Expected `(\w+)`(?:, got .*)?( [<>]= [0-9]+)?", message)
    return f"expected {_WORDS[match[1]]}{match[2] or ''}, got {_shown(value)}" if match else message


def _shown(value: object) -> str:
    """Show a value of the file in a message."""
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


def _refuse_contradictions(config: Config) -> None:
    """Check what no single value shows."""
    for index, address in enumerate(config.listen):
        if address in config.listen[:index]:
            raise _MisfitError(("listen", index), f"{address} stands here twice")
    for index, site in enumerate(config.sites):
        _refuse_incomplete(site, ("sites", index))
    _refuse_shared(config.sites)


def _refuse_incomplete(site: SiteConfig, path: _Path) -> None:
    if not site.names:
        raise _MisfitError(
            (*path, "names"), 'expected at least one name; leave names out, or write ["*"], for any name'
        )
    if site.cert and not site.key:
        raise _MisfitError(
            (*path, "cert"), "a certificate needs its key; write key = beside it, with the PEM file of the key"
        )
    if site.key and not site.cert:
        raise _MisfitError(
            (*path, "key"), "a key needs its certificate; write cert = beside it, with the PEM file of the chain"
        )
    if not site.origins:
        raise _MisfitError((*path, "origins"), 'expected one origin, such as origins = ["localhost:3000"]')
    if len(site.origins) > 1:
        raise _MisfitError(
            (*path, "origins"), "expected one origin; several origins of a site come with a later version"
        )


def _refuse_shared(sites: tuple[SiteConfig, ...]) -> None:
    """Refuse a name, or being the default, that more than one site has."""
    owners: dict[str, int] = {}
    default: int | None = None
    for number, site in enumerate(sites):
        for index, name in enumerate(site.names):
            if name in owners:
                hint = ", and of every site without names" if name == "*" else ""
                taken = f'"{name}" is a name of sites[{owners[name]}] already{hint}'
                raise _MisfitError(("sites", number, "names", index), taken)
            owners[name] = number
        if site.default and default is not None:
            raise _MisfitError(
                ("sites", number, "default"), f"sites[{default}] is the default already; there can be one"
            )
        default = number if site.default else default


def _written(path: _Path) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def _at(document: Any, path: _Path) -> Any:
    """Give what stands at the path. Raises LookupError."""
    for step in path:
        document = document[step]
    return document


def _line(text: str, path: _Path) -> int:
    """Give the line on which the value at the path begins, or the innermost of its tables that the text holds.

    tomllib keeps no positions. But a prefix of whole lines is TOML again (inside an array, with its end put back), so a
    binary search finds the first line without which the value is not there. This costs some parses, on an error only.
    """
    lines = text.split("\n")

    def holds(count: int, path: _Path) -> bool:
        try:
            _at(_first_parsed(lines, count), path)
        except LookupError:
            return False
        return True

    while not holds(len(lines), path):
        path = path[:-1]
    return bisect_left(range(1, len(lines) + 1), True, key=lambda count: holds(count, path)) + 1


def _first_parsed(lines: list[str], count: int) -> dict[str, Any]:
    """Parse the first ``count`` lines, or as many more as it takes to end what the last of them began."""
    for end in range(count, len(lines)):
        for closing in ("\n", "\n]"):  # the line's end is needed too: the line may end in CR
            with suppress(ValueError):
                return tomllib.loads("\n".join(lines[:end]) + closing)
    return tomllib.loads("\n".join(lines))
