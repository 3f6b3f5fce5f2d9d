"""Parse the URL of a Valkey or Redis server. No I/O, and no password in any message."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal
from urllib.parse import unquote

from tlstunnel.addresses import ListenAddress, quoted
from tlstunnel.errors import ConfigurationError

Kind = Literal["single", "unix", "sentinel", "cluster"]

PORT: Final = 6379
SENTINEL_PORT: Final = 26379

_TLS_SCHEMES: Final = ("valkeys", "rediss")
_SCHEMES: Final = ("valkey", "redis", *_TLS_SCHEMES)
_KINDS: Final[tuple[Kind, ...]] = ("single", "unix", "sentinel", "cluster")
_FILES: Final = ("ca", "cert", "key")
_EXAMPLES: Final = {
    "single": "valkey://HOST:6379/0",
    "unix": "valkey+unix:///run/valkey/valkey.sock",
    "sentinel": "valkey+sentinel://HOST1:26379,HOST2:26379/SERVICE/0",
    "cluster": "valkey+cluster://HOST1:6379,HOST2:6379",
}
_MOST_HOSTS = 64
_DATABASE = re.compile(r"[0-9]{1,5}")
_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A socket: `host` and `port`, or the `path` of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A server, and how to log in.

    `endpoints` are those of the server, of the sentinels that know where `service` is, or of nodes of a cluster. `str`
    returns it as a URL without the password.
    """

    kind: Kind
    endpoints: tuple[Endpoint, ...]
    tls: bool = False
    user: str = ""
    password: str = field(default="", repr=False)
    database: int = 0
    service: str = ""
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __str__(self) -> str:
        scheme = ("valkeys" if self.tls else "valkey") + ("" if self.kind == "single" else f"+{self.kind}")
        path = f"/{self.service}" if self.service else ""
        if self.database:
            path += f"?db={self.database}" if self.kind == "unix" else f"/{self.database}"
        return f"{scheme}://{','.join(map(str, self.endpoints))}{path}"


def parse_url(url: str, folder: Path | None = None) -> ServerAddress:
    """Parse the URL of a server.

    The schemes are ``valkey`` and ``redis``, with TLS ``valkeys`` and ``rediss``. ``+sentinel``, ``+cluster`` or
    ``+unix`` after the scheme says what is there. Files of the query (``ca``, ``cert``, ``key``) are relative to
    `folder`. Raises ConfigurationError, which says what to write.
    """
    try:
        return _parse(url, folder)
    except ValueError as error:
        raise ConfigurationError(f"state.url: {error}") from None


def _parse(url: str, folder: Path | None) -> ServerAddress:
    scheme, separator, rest = url.partition("://")
    family, plus, kind_name = scheme.lower().partition("+")
    if not separator or family not in _SCHEMES:
        # Without a scheme the text may begin with a password.
        shown = f", not {quoted(scheme)}" if separator and "@" not in scheme else ""
        raise ValueError(f"a URL begins with valkey://, valkeys://, redis:// or rediss://{shown}; {_advise('single')}")
    kind = next((kind for kind in _KINDS if kind == (kind_name if plus else "single")), None)
    if kind is None or (plus and kind == "single"):
        raise ValueError(f"{quoted('+' + kind_name)} is unknown; write +sentinel, +cluster or +unix, or nothing")
    if "#" in rest:
        raise ValueError("a URL of a server has no fragment; write %23 for a # in the password")
    rest, _, query = rest.partition("?")
    if "@" in query:
        raise ValueError("there is an @ after a ?; in the password, write %3F for ? and %40 for @")
    authority, slash, path = rest.partition("/")
    if "@" in path:
        raise ValueError("there is an @ after the first /; in the password, write %2F for / and %40 for @")
    credentials, _, hosts = authority.rpartition("@")
    if "@" in credentials:
        raise ValueError("there are two @; in the password, write %40 for @")
    user, colon, password = credentials.partition(":")
    if _ESCAPE.search(credentials):
        raise ValueError("there is a % in the user or the password that begins no escape; write %25 for it")
    tls = family in _TLS_SCHEMES
    options = _parse_query(query, kind)
    if tls and kind == "unix":
        raise ValueError(f"there is no TLS over a Unix socket; {_advise(kind)}")
    if not tls and any(name in options for name in _FILES):
        raise ValueError("ca, cert and key are for TLS; begin the URL with valkeys://")
    if ("cert" in options) != ("key" in options):
        raise ValueError("cert and key belong together; write both")
    service, database = _parse_path(path, options, kind)
    files = {name: _resolve(options[name], folder) for name in _FILES if name in options}
    return ServerAddress(
        kind,
        (_parse_socket(hosts, slash + path),) if kind == "unix" else _parse_hosts(hosts, kind),
        tls,
        _decode(user, "user"),
        _decode(password, "password") if colon else "",
        database,
        service,
        files.get("ca"),
        files.get("cert"),
        files.get("key"),
    )


def _advise(kind: Kind) -> str:
    return f'write "{_EXAMPLES[kind]}"'


def _parse_query(query: str, kind: Kind) -> dict[str, str]:
    known = ("db",) if kind == "unix" else _FILES
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, _, value = part.partition("=")
        if name not in known:
            hint = "; a password belongs before the host, or in state.password_file" if "pass" in name else ""
            raise ValueError(f"{quoted(name)} is unknown after ?; known are {', '.join(known)}{hint}")
        if name in options or not value:
            raise ValueError(f"{name} is {'repeated' if name in options else 'empty'} after ?")
        options[name] = _decode(value, name)
    return options


def _parse_path(path: str, options: dict[str, str], kind: Kind) -> tuple[str, int]:
    """Return the service of the sentinels, and the number of the database."""
    service = ""
    if kind == "unix":
        number = options.get("db", "")
    elif kind == "sentinel":
        encoded, _, number = path.partition("/")
        service = _decode(encoded, "service")
        if not service or not service.isprintable() or " " in service:
            raise ValueError(f"the name of the service that the sentinels watch is missing; {_advise(kind)}")
    else:
        number = path
    if number and not _DATABASE.fullmatch(number):
        raise ValueError(f"{quoted(number)} is not the number of a database; {_advise(kind)}")
    if kind == "cluster" and int(number or 0):
        raise ValueError(f"a cluster has only database 0; {_advise(kind)}")
    return service, int(number or 0)


def _parse_socket(hosts: str, path: str) -> Endpoint:
    if hosts or path in ("", "/"):
        raise ValueError(f"the path of a Unix socket begins with a third /; {_advise('unix')}")
    decoded = _decode(path, "path")
    if not decoded.isprintable():
        raise ValueError("the path has unprintable characters")
    return Endpoint(path=ListenAddress.parse(f"unix:{decoded}").path or "")


def _parse_hosts(hosts: str, kind: Kind) -> tuple[Endpoint, ...]:
    texts: Sequence[str] = hosts.split(",")
    if not hosts:
        raise ValueError(f"there is no host; {_advise(kind)}")
    if kind == "single" and len(texts) > 1:
        raise ValueError("several hosts need +sentinel or +cluster after the scheme")
    if len(texts) > _MOST_HOSTS:
        raise ValueError(f"there are more than {_MOST_HOSTS} hosts")
    return tuple(_parse_host(text, kind) for text in texts)


def _parse_host(text: str, kind: Kind) -> Endpoint:
    """Parse ``HOST[:PORT]``. Nothing of it is in the error, since it may be a password without its @."""
    has_port = "]:" in text if text.startswith("[") else ":" in text
    port = SENTINEL_PORT if kind == "sentinel" else PORT
    try:
        address = ListenAddress.parse(text if has_port else f"{text}:{port}")
        if not address.host or not address.port:
            raise ValueError
    except ValueError:
        raise ValueError(f"a host is not HOST or HOST:PORT; {_advise(kind)}") from None
    return Endpoint(address.host, address.port)


def _resolve(text: str, folder: Path | None) -> Path:
    if "\0" in text:
        raise ValueError(f"{quoted(text)} is not the name of a file")
    return Path(text) if folder is None else folder / text


def _decode(text: str, what: str) -> str:
    """Undo the percent-encoding (RFC 3986 section 2.1)."""
    try:
        decoded = unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError(f"the {what} is not UTF-8 after its percent-encoding is undone") from None
    if "\0" in decoded:
        raise ValueError(f"there is a NUL in the {what}")
    return decoded
