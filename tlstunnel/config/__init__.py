"""The configuration file as types: what it may hold, the defaults, and errors that say where.

``load`` reads a file; ``decode`` does the rest without I/O. ``docs/configuration.md`` describes every key.
"""

import difflib
import json
import re
import tomllib
import typing
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from http import HTTPStatus
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

# The names of rules, limits and lists stand in logs, counters and expressions.
_NAME_LENGTH = 100
# A response's text: more is a page, which no client of a WebSocket shows.
_BODY_LENGTH = 4096
_STATUSES = frozenset(status.value for status in HTTPStatus)
_BALANCE = re.compile(r"round_robin|least_tunnels|hash:ip|hash:(?:header|cookie):[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}")
_BALANCES = '"round_robin", "least_tunnels", "hash:ip", "hash:header:NAME" or "hash:cookie:NAME"'
_HEALTH_PATH = re.compile(r"/[!-~]{0,1000}")
FIELD_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}")
"""The name of a field (RFC 9110 section 5.1)."""
_FIELD_VALUE = re.compile(r"(?:[!-~](?:[ -~]{0,4094}[!-~])?)?")
KEPT_FIELD = re.compile(
    r"host|connection|keep-alive|proxy-connection|te|trailer|transfer-encoding|upgrade|content-length|sec-websocket-.*"
)
"""The names, in lower case, of fields that nobody may set: the handshake or the connection rests on them."""

_WORKER = re.compile(r"(?:(?P<file>[^\0]+\.py)|[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<inside>[^\W\d]\w*)")
_LIST_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_WEB_ORIGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*?)(?::([0-9]{1,5}))?", re.DOTALL)
_OPAQUE_HOST = re.compile(r"[A-Za-z0-9._~-]*")
WEB_PORTS = {"http": 80, "https": 443}
"""The port that an origin of this scheme has when none is written (RFC 6454 section 4)."""

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
    origin_response: Timeout = Timeout(30)
    idle: IdleTimeout | None = None
    close: Timeout = Timeout(30)


class Limits(_Table, frozen=True):
    """How much of the process's means others may take."""

    unfinished_handshakes: Annotated[int, msgspec.Meta(ge=10, le=1_000_000)] = 4096


class Release(_Table, frozen=True):
    """How tunnels end when this process is asked to leave."""

    drain_after: IdleTimeout | None = IdleTimeout(86_400)
    drain_wait: Duration = Duration(0)
    drain_over: Duration = Duration(60)
    upgrade_timeout: Timeout = Timeout(30)


class Log(_Table, frozen=True):
    """What is logged, and how."""

    format: Literal["text", "json"] = "text"
    opened: bool = False


Mode = Literal["block", "log"]
"""Whether a part of the firewall acts, or only counts and logs what it would have done."""

Skippable = Literal["rate_limits", "managed_rules"]
"""The stages behind the rules that a rule can switch off for a request."""

Profile = Literal["kubernetes", "signalr", "grafana", "keycloak", "proxmox", "guacamole", "nextjs"]
"""Exclusions for a kind of origin whose ordinary handshakes the managed rules take for attacks."""


class Lists(dict[str, str | tuple[str, ...]]):
    """Named lists: a name's absolute path of a text file, or its entries. Nobody changes it."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class Headers(dict[str, str]):
    """Fields for the origin by name. Nobody changes it."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class WorkerTable(dict[str, Any]):
    """What a file says to an edge worker; any of TOML's values. Nobody changes it."""

    @property
    def canonical(self) -> str:
        """The same text for the same table, in whatever order it is written."""
        return json.dumps(self, sort_keys=True, default=str)

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self.canonical)


class RuleConfig(_Table, frozen=True):
    """A rule of the firewall. ``status`` and ``body`` are of the refusal, ``skip`` of the action ``skip``."""

    name: str
    when: str
    action: Literal["block", "allow", "log", "skip"]
    status: Annotated[int, msgspec.Meta(ge=400, le=599)] = 403
    body: str | None = None
    skip: tuple[Skippable, ...] = ()
    on_error: Literal["ignore", "block"] = "ignore"
    mode: Mode = "block"


class RateLimitConfig(_Table, frozen=True):
    """How often a key may ask (``limit``), or how many tunnels it may hold (``max_tunnels``); at least one of them.

    ``limit`` is in the notation of the ``limits`` library, ``when`` a CEL expression.
    """

    name: str
    key: tuple[str, ...] = ("ip",)
    limit: str | None = None
    strategy: Literal["fixed", "moving", "sliding"] = "fixed"
    max_tunnels: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    when: str | None = None
    block_for: Timeout | None = None
    mode: Mode = "block"
    ipv6_prefix: Annotated[int, msgspec.Meta(ge=1, le=128)] = 64


class SiteManagedRules(_Table, frozen=True):
    """The managed rules of a site. ``rules`` is an absolute path or glob, ``crs`` the folder of a CRS release."""

    owasp_crs: bool = False
    paranoia: Annotated[int, msgspec.Meta(ge=1, le=4)] = 1
    mode: Mode = "block"
    threshold: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    exclude: tuple[Annotated[int, msgspec.Meta(ge=1, le=999_999_999)], ...] = ()
    profiles: tuple[Profile, ...] = ()
    rules: str | None = None
    crs: Path | None = None
    timeout: Timeout = Timeout(0.05)
    on_failure: Literal["block", "allow"] = "block"


class ManagedRules(_Table, frozen=True):
    """The processes that evaluate managed rules, and how many requests may wait for them."""

    processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    queue: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 256


class CertificateConfig(_Table, frozen=True):
    """A certificate with its chain, and its key, which a passphrase may lock."""

    cert: Path
    key: Path
    passphrase_file: Path | None = None
    passphrase_env: str | None = None


class OriginConfig(_Table, frozen=True):
    """An origin, and its part in the whole. A ``backup`` is asked while no other can be."""

    address: OriginAddress
    weight: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    backup: bool = False
    max_tunnels: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None


class Ejection(_Table, frozen=True):
    """After how many failures in a row an origin is left alone, and for how long: doubled up to ``max_delay``."""

    failures: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3
    delay: Timeout = Timeout(1)
    max_delay: Timeout = Timeout(60)


class Health(_Table, frozen=True):
    """How each origin is asked, unasked for, whether it is well."""

    type: Literal["tcp", "websocket", "http"] = "tcp"
    path: str = "/"
    interval: Timeout = Timeout(10)
    timeout: Timeout = Timeout(2)


class RouteConfig(_Table, frozen=True):
    """Origins of their own for requests whose path begins with ``path``."""

    path: str
    origins: tuple[OriginConfig, ...] = ()
    balance: str = "round_robin"
    health: Health | None = None
    ejection: Ejection = Ejection()


class SiteConfig(_Table, frozen=True):
    """A set of names with one certificate, its origins and one policy.

    ``names`` are as ``addresses.canonical_name`` gives them, ``cert`` and ``key`` absolute and either both None or
    both set, ``balance`` one of those that ``origins/balance.py`` has. Address lists hold networks in their shortest
    form and ``@NAME`` of lists that exist; ``web_origins`` is None where origins are not looked at, else ``same``,
    ``null``, or scheme, host and any port that is not the scheme's, such as ``https://*.example.com:8443``.
    ``worker`` is ``FILE:FUNCTION``, the file's path absolute and ending in ``.py``, or ``PACKAGE.MODULE:FUNCTION``;
    ``worker_origins`` are networks in their shortest form, and names as ``addresses.canonical_name`` gives them.
    """

    names: tuple[str, ...] = ("*",)
    default: bool = False
    cert: Path | None = None
    key: Path | None = None
    passphrase_file: Path | None = None
    passphrase_env: str | None = None
    certificates: tuple[CertificateConfig, ...] = ()
    client_ca: Path | None = None
    client_auth: Literal["require", "request"] = "require"
    client_allow: tuple[str, ...] = ()
    client_crl: Path | None = None
    client_subject_header: str = "X-Client-Subject"
    origins: tuple[OriginConfig, ...] = ()
    balance: str = "round_robin"
    health: Health | None = None
    ejection: Ejection = Ejection()
    routes: tuple[RouteConfig, ...] = ()
    origin_ca: Path | None = None
    origin_name: str | None = None
    origin_cert: Path | None = None
    origin_key: Path | None = None
    origin_verify: Literal["on", "off"] = "on"
    origin_host: str = "keep"
    set_headers: Headers = Headers()
    remove_headers: tuple[str, ...] = ()
    send_proxy_protocol: Literal["off", "v1", "v2", "v2-tls"] = "off"
    max_age: IdleTimeout | None = None
    max_age_jitter: Duration = Duration(0)
    allow_addresses: tuple[str, ...] = ()
    block_addresses: tuple[str, ...] = ()
    addresses_mode: Mode = "block"
    web_origins: tuple[str, ...] | None = None
    require_web_origin: bool = False
    web_origins_mode: Mode = "block"
    strict_path: bool = True
    http: Literal["refuse", "pass"] = "refuse"
    rules: tuple[RuleConfig, ...] = ()
    rate_limits: tuple[RateLimitConfig, ...] = ()
    managed_rules: SiteManagedRules | None = None
    worker: str | None = None
    worker_config: WorkerTable = WorkerTable()
    worker_origins: tuple[str, ...] = ()
    worker_timeout: Timeout = Timeout(1)
    worker_on_error: Literal["refuse", "forward"] = "refuse"

    @property
    def pairs(self) -> tuple[CertificateConfig, ...]:
        """Every certificate with its key."""
        if not (self.cert and self.key):
            return self.certificates
        own = CertificateConfig(
            cert=self.cert, key=self.key, passphrase_file=self.passphrase_file, passphrase_env=self.passphrase_env
        )
        return (own, *self.certificates)


_NO_WORKER = SiteConfig()


class Config(_Table, frozen=True):
    """The whole file."""

    listen: tuple[ListenAddress, ...] = ()
    processes: Annotated[int, msgspec.Meta(ge=1, le=256)] | Literal["auto"] = 1
    trusted_proxies: Networks = Networks()
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    release: Release = Release()
    log: Log = Log()
    lists: Lists = Lists()
    allow_addresses: tuple[str, ...] = ()
    block_addresses: tuple[str, ...] = ()
    addresses_mode: Mode = "block"
    rules: tuple[RuleConfig, ...] = ()
    rate_limits: tuple[RateLimitConfig, ...] = ()
    managed_rules: ManagedRules = ManagedRules()
    proxy_protocol: Literal["off", "required"] = "off"
    proxy_protocol_listen: tuple[ListenAddress, ...] = ()
    resolve_interval: Timeout = Timeout(30)
    drain_removed: bool = False
    sites: tuple[SiteConfig, ...] = ()


def load(path: Path) -> Config:
    """Read and decode a configuration file. Raises ConfigurationError."""
    return decode(read(path), path.parent, str(path))


def read(path: Path) -> str:
    """Read the text of a configuration file. Raises ConfigurationError."""
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
    for key in ("listen", "proxy_protocol_listen"):
        _read_each(document, (), key, ListenAddress.parse, "127.0.0.1:8443")
    _read_each(document, (), "trusted_proxies", lambda text: Networks.parse([text]), "10.0.0.0/8")
    if "trusted_proxies" in document:
        document["trusted_proxies"] = Networks(chain.from_iterable(document["trusted_proxies"]))
    _refuse_single_brackets(document, (), "sites")
    lists = _read_lists(document, folder)
    _read_policy(document, (), lists)
    for site, path in _tables(document.get("sites"), ("sites",)):
        _read_each(site, path, "names", canonical_name, "chat.example.com")
        _read_origins(site, path, folder)
        _read_headers(site, path)
        _refuse_single_brackets(site, path, "routes")
        for route, route_path in _tables(site.get("routes"), (*path, "routes")):
            _read_origins(route, route_path, folder)
        _read_each(site, path, "web_origins", _web_origin, "https://chat.example.com")
        _read_worker(site, path, folder)
        _read_policy(site, path, lists)
        for managed, managed_path in _tables(site.get("managed_rules"), (*path, "managed_rules")):
            _read_path(managed, managed_path, "rules", folder, "a file of rules, or a glob")
            _read_path(managed, managed_path, "crs", folder, "the folder of a Core Rule Set release")
            if "crs" in managed:
                managed["crs"] = Path(managed["crs"])


def _read_origins(table: dict[str, Any], path: _Path, folder: Path) -> None:
    """Read ``origins``: an address each, or a table with one in it."""
    values = table.get("origins", [])
    if not isinstance(values, list):
        raise _MisfitError((*path, "origins"), f'expected an array such as ["localhost:3000"], got {_shown(values)}')
    for index, value in enumerate(values):
        place: _Path = (*path, "origins", index)
        text = value.get("address") if isinstance(value, dict) else value
        if isinstance(value, dict):
            if "address" not in value:
                raise _MisfitError(place, "the key address is missing")
            place = (*place, "address")
        if not isinstance(text, str):
            raise _MisfitError(place, f'expected a string such as "localhost:3000", got {_shown(text)}')
        try:
            address = OriginAddress.parse(text, folder)
        except ValueError as error:
            raise _MisfitError(place, str(error)) from None
        values[index] = (value if isinstance(value, dict) else {}) | {"address": address}


def _read_headers(site: dict[str, Any], path: _Path) -> None:
    """Read ``set_headers`` and ``remove_headers``: what may be said of a field, and what the handshake rests on."""
    headers = site.get("set_headers", {})
    if not isinstance(headers, dict):
        raise _MisfitError(
            (*path, "set_headers"), f'expected a table such as {{ X-Site = "chat" }}, got {_shown(headers)}'
        )
    for name, value in headers.items():
        place: _Path = (*path, "set_headers")
        _refuse_field_name(name, place, name)
        if not isinstance(value, str) or not _FIELD_VALUE.fullmatch(value):
            raise _MisfitError((*place, name), f"expected a text of printable characters, got {_shown(value)}")
    if "set_headers" in site:
        site["set_headers"] = Headers(headers)
    removed = site.get("remove_headers", [])
    if isinstance(removed, list):
        for index, name in enumerate(removed):
            _refuse_field_name(name, (*path, "remove_headers", index))


def _read_worker(site: dict[str, Any], path: _Path, folder: Path) -> None:
    """Read ``worker``, what it is told and where it may send."""
    if "worker" in site:
        try:
            site["worker"] = worker_reference(site["worker"], folder)
        except ValueError as error:
            raise _MisfitError((*path, "worker"), str(error)) from None
    table = site.get("worker_config", {})
    if not isinstance(table, dict):
        raise _MisfitError(
            (*path, "worker_config"), f'expected a table such as {{ url = "valkey://localhost" }}, got {_shown(table)}'
        )
    if "worker_config" in site:
        site["worker_config"] = WorkerTable(table)
    _read_each(site, path, "worker_origins", _worker_origin, "*.shards.internal")


def worker_reference(text: object, folder: Path) -> str:
    """Give a worker's reference with its file's path absolute, taken from `folder`. Raises ValueError."""
    reference = _WORKER.fullmatch(text) if isinstance(text, str) else None
    if reference is None:
        raise ValueError(f'expected "edge/chat.py:fetch" or "package.module:fetch", got {_shown(text)}')
    return f"{folder / reference['file']}:{reference['inside']}" if reference["file"] else reference[0]


def _worker_origin(text: str) -> str:
    """Give a network, an address or a name the one form in which it is compared. Raises ValueError."""
    if text == "*":
        raise ValueError('"*" would make the worker an open relay; write networks such as 10.0.0.0/8, or names')
    if "/" in text or text.count(":") > 1 or text.replace(".", "").isdecimal():
        return str(next(iter(Networks.parse([text]))))
    return canonical_name(text)


def _refuse_field_name(name: object, path: _Path, key: str | None = None) -> None:
    if not isinstance(name, str) or not FIELD_NAME.fullmatch(name):
        raise _MisfitError(path, f"expected the name of a field, such as X-Site, got {_shown(name)}", key)
    if KEPT_FIELD.fullmatch(name.lower()):
        hint = "; origin_host sets it" if name.lower() == "host" else ""
        raise _MisfitError(path, f"{name} belongs to the handshake or to the connection{hint}", key)


def _read_policy(table: dict[str, Any], path: _Path, lists: Lists) -> None:
    """Read what the top of the file and a site have in common."""
    for key in ("allow_addresses", "block_addresses"):
        _read_each(table, path, key, partial(_network_or_list, lists), "10.0.0.0/8")
    for key in ("rules", "rate_limits"):
        _refuse_single_brackets(table, path, key)


def _refuse_single_brackets(table: dict[str, Any], path: _Path, key: str) -> None:
    if isinstance(table.get(key), dict):
        name = ".".join(step for step in (*path, key) if isinstance(step, str))
        reason = f"expected an array of tables, got a table; write [[{name}]], in double brackets"
        raise _MisfitError((*path, key), reason)


def _read_lists(document: dict[str, Any], folder: Path) -> Lists:
    """Read ``lists``, a file's path or the entries of each. What an entry may be, the firewall says."""
    tables = document.get("lists", {})
    if not isinstance(tables, dict):
        raise _MisfitError(
            ("lists",), f'expected a table such as {{ partners = "partners.txt" }}, got {_shown(tables)}'
        )
    for name, value in tables.items():
        path = ("lists", name)
        if not _LIST_NAME.fullmatch(name):
            raise _MisfitError(
                ("lists",), f"{quoted(name)} is no name of a list; letters, digits, _ . and - make one", name
            )
        if isinstance(value, list):
            _read_each(tables, ("lists",), name, str, "10.0.0.0/8")
            tables[name] = tuple(value)
        elif isinstance(value, str):
            _read_path(tables, ("lists",), name, folder, "a text file")
        else:
            raise _MisfitError(path, f"expected the path of a text file, or an array of entries, got {_shown(value)}")
    lists = document["lists"] = Lists(tables)
    return lists


def _read_path(table: dict[str, Any], path: _Path, key: str, folder: Path, what: str) -> None:
    value = table.get(key)
    if key in table and (not isinstance(value, str) or not value or "\0" in value):
        raise _MisfitError((*path, key), f"expected the path of {what}, got {_shown(value)}")
    if isinstance(value, str):
        table[key] = str(folder / value)


def _network_or_list(lists: Lists, text: str) -> str:
    if not text.startswith("@"):
        return str(next(iter(Networks.parse([text]))))
    if text[1:] not in lists:
        near = difflib.get_close_matches(text[1:101], lists, n=1)
        hint = f'did you mean "@{near[0]}"?' if near else "lists = { NAME = ... } at the top of the file makes one"
        raise ValueError(f"there is no list {quoted(text[1:])}; {hint}")
    return text


def _web_origin(text: str) -> str:
    """Give an entry of ``web_origins`` the form in which browsers send origins (RFC 6454 section 6.2).

    Raises ValueError.
    """
    if text in ("same", "null"):
        return text
    match = _WEB_ORIGIN.fullmatch(text)
    if not match:
        raise ValueError(f'{quoted(text)} is not an origin, such as "https://chat.example.com", nor "same" or "null"')
    scheme, host, port = match[1].lower(), match[2], match[3]
    if port and int(port) > 65535:
        raise ValueError(f"{quoted(port)} in {quoted(text)} is not a port, which is a number up to 65535")
    if scheme not in WEB_PORTS:  # of an extension or an app, whose hosts are no names of the DNS
        if not _OPAQUE_HOST.fullmatch(host):
            raise ValueError(f"{quoted(text)} is not an origin: scheme, host and port, and nothing behind them")
        return f"{scheme}://{host.lower()}{f':{int(port)}' if port else ''}"
    if "/" in host:
        raise ValueError(f"{quoted(text)} has a path; an origin is scheme, host and port, and nothing behind them")
    if host == "*":
        raise ValueError(f"{quoted(text)} would let every site in; leave web_origins out to look at no origin")
    name = canonical_name(host)
    name = f"[{name}]" if ":" in name else name
    return f"{scheme}://{name}" + (f":{int(port)}" if port and int(port) != WEB_PORTS[scheme] else "")


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
    off = [(document.get("timeouts"), "idle")]
    off += [(site, "max_age") for site, _ in _tables(document.get("sites"), ())]
    for table, key in off:
        if isinstance(table, dict) and table.get(key) == "off":
            table[key] = None
    try:
        return msgspec.convert(document, Config, dec_hook=partial(_read_custom, folder))
    except msgspec.ValidationError as error:
        message, _, place = str(error).rpartition(" - at `$")
        path = tuple(int(index) if index else key for key, index in re.findall(r"(\w+)|\[([0-9]+)\]", place))
        raise _MisfitError(path, _explained(message, _at(document, path), path)) from None


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


def _explained(message: str, value: object, path: _Path) -> str:
    """Turn msgspec's message into this program's words; one that a hook raised stays as it is."""
    if message.startswith("Invalid enum value"):
        *others, last = (f'"{choice}"' for choice in _choices(path))
        return f"expected {', '.join(others)} or {last}, got {_shown(value)}"
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", message):
        return f"the key {missing[1]} is missing"
    match = re.fullmatch(r"Expected `(\w+)(?: \| null)?`(?:, got .*)?( [<>]= [0-9]+)?", message)
    return f"expected {_WORDS[match[1]]}{match[2] or ''}, got {_shown(value)}" if match else message


def _choices(path: _Path) -> tuple[str, ...]:
    """Give the strings that the key at the path may be."""
    kind: Any = Config
    for step in path:
        kind = typing.get_args(kind)[0] if isinstance(step, int) else _types(kind)[step]
        kind = typing.get_args(kind)[0] if type(None) in typing.get_args(kind) else kind
    return typing.get_args(kind)


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
    _refuse_unsound_policy(config.rules, config.rate_limits, ())
    for index, address in enumerate(config.proxy_protocol_listen):
        if address not in config.listen:
            raise _MisfitError(("proxy_protocol_listen", index), f"{address} is not among listen")
    if config.proxy_protocol_listen and config.proxy_protocol == "off":
        raise _MisfitError(("proxy_protocol_listen",), 'this needs proxy_protocol = "required"')
    if config.proxy_protocol == "required" and not config.trusted_proxies:
        reason = "nobody may connect: name the proxies that send the header in trusted_proxies"
        raise _MisfitError(("proxy_protocol",), reason)
    for index, site in enumerate(config.sites):
        _refuse_incomplete(site, ("sites", index))
        _refuse_unsound_policy(site.rules, site.rate_limits, ("sites", index))
        _refuse_idle(site, ("sites", index))
    _refuse_shared(config.sites)


def _refuse_unsound_policy(
    rules: tuple[RuleConfig, ...], rate_limits: tuple[RateLimitConfig, ...], path: _Path
) -> None:
    _refuse_unsound_names([rule.name for rule in rules], (*path, "rules"))
    _refuse_unsound_names([limit.name for limit in rate_limits], (*path, "rate_limits"))
    for index, rule in enumerate(rules):
        _refuse_unsound_rule(rule, (*path, "rules", index))
    for index, limit in enumerate(rate_limits):
        if limit.limit is None and limit.max_tunnels is None:
            example = 'such as limit = "30/minute", or max_tunnels = 50'
            raise _MisfitError((*path, "rate_limits", index), f"a rate limit needs limit or max_tunnels, {example}")
        if limit.block_for is not None and limit.limit is None:
            raise _MisfitError((*path, "rate_limits", index, "block_for"), "block_for goes with limit only")


def _refuse_unsound_names(names: list[str], path: _Path) -> None:
    for index, name in enumerate(names):
        if not name.isprintable() or not 0 < len(name) <= _NAME_LENGTH:
            reason = f"a name has 1 to {_NAME_LENGTH} printable characters, not {quoted(name)}"
            raise _MisfitError((*path, index, "name"), reason)
        if (first := names.index(name)) != index:
            reason = f"{quoted(name)} is the name of {_written(path)}[{first}] already"
            raise _MisfitError((*path, index, "name"), reason)


def _refuse_unsound_rule(rule: RuleConfig, path: _Path) -> None:
    if rule.action == "skip" and not rule.skip:
        raise _MisfitError((*path, "action"), 'say what is skipped: skip = ["rate_limits", "managed_rules"], or one')
    if rule.action != "skip" and rule.skip:
        raise _MisfitError((*path, "skip"), 'skip goes with action = "skip" only')
    if rule.status not in _STATUSES:
        raise _MisfitError((*path, "status"), f"{rule.status} is no status of HTTP; 403 is the usual one")
    if (rule.status != 403 or rule.body is not None) and "block" not in (rule.action, rule.on_error):
        key = "status" if rule.status != 403 else "body"
        raise _MisfitError((*path, key), f'{key} goes with action = "block" or on_error = "block" only')
    if rule.body is not None and len(rule.body) > _BODY_LENGTH:
        raise _MisfitError((*path, "body"), f"expected a text of at most {_BODY_LENGTH} characters")


def _refuse_idle(site: SiteConfig, path: _Path) -> None:
    """Refuse what a person believes to be a protection, and is none."""
    if site.web_origins is None and site.require_web_origin:
        raise _MisfitError((*path, "require_web_origin"), 'require_web_origin needs web_origins, such as ["same"]')
    managed = site.managed_rules
    if managed and not managed.owasp_crs and managed.rules is None:
        raise _MisfitError((*path, "managed_rules"), "no rules; write owasp_crs = true, or rules = with a file of them")


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
    _refuse_unsound_certificates(site, path)
    _refuse_unsound_trust(site, path)
    _refuse_unsound_origins(site, path)
    _refuse_unsound_worker(site, path)
    if site.origin_host not in ("keep", "origin") and not _is_host(site.origin_host):
        reason = f'expected "keep", "origin" or a host name, got {quoted(site.origin_host)}'
        raise _MisfitError((*path, "origin_host"), reason)
    if site.max_age_jitter and site.max_age is None:
        raise _MisfitError((*path, "max_age_jitter"), "this goes with max_age only")
    for index, route in enumerate(site.routes):
        place: _Path = (*path, "routes", index)
        if not route.path.startswith("/") or len(route.path) > 1000:
            raise _MisfitError(
                (*place, "path"), f'expected the beginning of a path, such as "/ws/", got {quoted(route.path)}'
            )
        _refuse_unsound_origins(route, place)
        shadow = next((i for i in range(index) if route.path.startswith(site.routes[i].path)), None)
        if shadow is not None:
            first = f"the first that matches counts, and that is {_written((*path, 'routes', shadow))} for all of these"
            raise _MisfitError((*place, "path"), f"this route is never taken: {first}")


def _refuse_unsound_certificates(site: SiteConfig, path: _Path) -> None:
    locked = [(site.passphrase_file, site.passphrase_env, path)]
    locked += [
        (c.passphrase_file, c.passphrase_env, (*path, "certificates", i)) for i, c in enumerate(site.certificates)
    ]
    for file, variable, place in locked:
        if file and variable:
            raise _MisfitError((*place, "passphrase_env"), "there is passphrase_file already; write one of them")
    if site.key is None and (site.passphrase_file or site.passphrase_env):
        raise _MisfitError(path, "a passphrase needs its key; write key = beside it")
    for key in ("client_allow", "client_crl"):
        if getattr(site, key) and site.client_ca is None:
            raise _MisfitError((*path, key), "this needs client_ca, the authorities whose certificates clients have")
    if site.client_auth != "require" and site.client_ca is None:
        raise _MisfitError((*path, "client_auth"), "this needs client_ca, the authorities of the clients' certificates")
    for index, allowed in enumerate(site.client_allow):
        kind, _, name = allowed.partition(":")
        if kind not in ("cn", "dns", "uri") or not name:
            reason = f'expected "cn:NAME", "dns:NAME" or "uri:URI", got {quoted(allowed)}'
            raise _MisfitError((*path, "client_allow", index), reason)
    _refuse_field_name(site.client_subject_header, (*path, "client_subject_header"))


def _refuse_unsound_worker(site: SiteConfig, path: _Path) -> None:
    if site.worker is not None:
        return
    for key in ("worker_config", "worker_origins", "worker_timeout", "worker_on_error"):
        if getattr(site, key) != getattr(_NO_WORKER, key):
            raise _MisfitError((*path, key), 'this goes with worker only, such as worker = "edge/chat.py:fetch"')


def _refuse_unsound_trust(site: SiteConfig, path: _Path) -> None:
    """Refuse what is said of TLS to origins where there is none, or what would say nothing."""
    pools = (site.origins, *(route.origins for route in site.routes))
    # Where a worker sends elsewhere, that may be a wss:// origin too.
    if not site.worker_origins and not any(origin.address.tls for origins in pools for origin in origins):
        for key in ("origin_ca", "origin_name", "origin_cert", "origin_key"):
            if getattr(site, key) is not None:
                raise _MisfitError((*path, key), "this is about origins with TLS, wss://, and there is none")
        if site.origin_verify == "off":
            raise _MisfitError((*path, "origin_verify"), "this is about origins with TLS, wss://, and there is none")
    if site.origin_verify == "off" and site.origin_ca is not None:
        raise _MisfitError((*path, "origin_verify"), 'with "off" nobody looks at origin_ca; leave one of them out')
    if (site.origin_cert is None) != (site.origin_key is None):
        missing = "origin_key" if site.origin_key is None else "origin_cert"
        raise _MisfitError(path, f"origin_cert and origin_key go together; write {missing} = too")
    if site.origin_name is not None and not _is_name(site.origin_name):
        reason = f"expected the name that the origins' certificates have, got {quoted(site.origin_name)}"
        raise _MisfitError((*path, "origin_name"), reason)


def _is_name(text: str) -> bool:
    try:
        return "*" not in canonical_name(text)
    except ValueError:
        return False


def _is_host(text: str) -> bool:
    """Whether it can stand in Host: a name or an address, with a port or without."""
    host, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if colon and port.isascii() and port.isdecimal() and int(port) <= 65535:
        text = host
    try:
        return "*" not in canonical_name(text) and text.isascii()
    except ValueError:
        return False


def _refuse_unsound_origins(table: SiteConfig | RouteConfig, path: _Path) -> None:
    if not table.origins:
        raise _MisfitError((*path, "origins"), 'expected at least one origin, such as origins = ["localhost:3000"]')
    if all(origin.backup for origin in table.origins):
        raise _MisfitError((*path, "origins"), "every origin is a backup, of none; one must not be")
    addresses = [origin.address for origin in table.origins]
    for index, address in enumerate(addresses):
        if (first := addresses.index(address)) != index:
            raise _MisfitError((*path, "origins", index), f"{address} is origins[{first}] already; give it a weight")
    if not _BALANCE.fullmatch(table.balance):
        raise _MisfitError((*path, "balance"), f"expected {_BALANCES}, got {quoted(table.balance)}")
    if table.health is not None:
        health = table.health
        if not _HEALTH_PATH.fullmatch(health.path):
            raise _MisfitError(
                (*path, "health", "path"), f'expected a path such as "/healthz", got {quoted(health.path)}'
            )
        if health.type == "tcp" and health.path != "/":
            raise _MisfitError((*path, "health", "path"), 'a path goes with type = "websocket" or "http" only')
    if table.ejection.max_delay < table.ejection.delay:
        raise _MisfitError((*path, "ejection", "max_delay"), f"shorter than delay, which is {table.ejection.delay}")


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
