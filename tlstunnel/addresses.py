"""Parse addresses as people write them: to listen on, of origins, of trusted networks, and the names of sites.

Nothing here opens a socket or uses the DNS. Every parser raises ``ValueError`` with a message for the person who wrote
the text. The caller adds the place.
"""

import ipaddress
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import idna

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

# sockaddr_un.sun_path has 108 bytes, the last of them NUL (unix(7)).
_UNIX_PATH_BYTES = 107
# RFC 1035 section 2.3.4. RFC 1123 allows no underscores in host names, but container and service names have them.
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NAME_BYTES = 253
# Resolvers read a name that ends with such a label as an old form of an IPv4 address: 127.1, 0x7f.1, 2130706433.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_ZONE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_PORT = re.compile(r"[0-9]{1,5}")
_WITHOUT_HOST = re.compile(r"(?:\*?:)?([0-9]{1,5})")
_BRACKETED = re.compile(r"\[([^\[\]]*)\](?::(.*))?", re.DOTALL)
_QUOTED_LENGTH = 100


def quoted(text: str) -> str:
    """Quote a text for a one-line message. Unprintable characters are escaped, and a long text is cut."""
    cut = text if len(text) <= _QUOTED_LENGTH else text[:_QUOTED_LENGTH] + "…"
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut) + '"'


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """An address to listen on: ``host`` and ``port``, or the ``path`` of a Unix socket (``host`` None, ``port`` 0).

    ``host`` is an IP address in its shortest form, without brackets, or a host name in lower case. With port 0,
    the system chooses one.
    """

    host: str | None
    port: int
    path: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``HOST:PORT``, ``[IPV6]:PORT`` or ``unix:/absolute/path``. Raises ValueError."""
        if text.startswith("unix:"):
            return cls(None, 0, _parse_unix_path(text, None))
        if alone := _WITHOUT_HOST.fullmatch(text):
            every = f"0.0.0.0:{alone[1]} for every IPv4 address, [::]:{alone[1]} for every IPv6 address"
            raise ValueError(f"{quoted(text)} has no host; write 127.0.0.1:{alone[1]} for this machine only, {every}")
        host, port = _parse_host_and_port(text, "127.0.0.1:8443")
        return cls(host, port)

    def __str__(self) -> str:
        return _format(self.host, self.port, self.path)


@dataclass(frozen=True, slots=True)
class OriginAddress:
    """An origin's address: ``host`` and ``port``, or the ``path`` of a Unix socket (``host`` None, ``port`` 0).

    ``host`` is an IP address in its shortest form, without brackets, or a host name in lower case with A-labels.
    ``tls`` means that the connection uses TLS (``wss://``). ``text`` is the address as written, which comparisons
    ignore.
    """

    host: str | None
    port: int
    path: str | None = None
    text: str = field(default="", compare=False)
    tls: bool = False

    @classmethod
    def parse(cls, text: str, folder: Path | None = None) -> Self:
        """Parse ``HOST:PORT``, ``ws://HOST[:PORT][/]``, ``wss://HOST[:PORT][/]`` or ``unix:PATH``. Raises ValueError.

        A relative path is relative to ``folder``, that of the configuration file. Without ``folder`` it is refused.
        """
        if text.startswith("unix:"):
            return cls(None, 0, _parse_unix_path(text, folder), text)
        scheme, separator, rest = text.partition("://")
        if not separator:
            if alone := _WITHOUT_HOST.fullmatch(text):
                raise ValueError(f"{quoted(text)} has no host; write localhost:{alone[1]}")
            host, port = _parse_host_and_port(text, "localhost:3000")
        else:
            authority = _split_url(text, scheme.lower(), rest)
            tls = scheme.lower() == "wss"
            host, port = _parse_host_and_port(authority, "ws://localhost:3000", default_port=443 if tls else 80)
        if not port:
            raise ValueError(f"{quoted(text)}: the port of an origin is a number from 1 to 65535")
        return cls(host, port, None, text, tls=separator != "" and scheme.lower() == "wss")

    def __str__(self) -> str:
        written = _format(self.host, self.port, self.path)
        return f"wss://{written}" if self.tls else written


class Networks:
    """An immutable set of IPv4 and IPv6 networks, for ``address in networks``.

    An address is a string or an object of ``ipaddress``. An IPv4-mapped IPv6 address counts as the IPv4 address. Text
    that is not an address is in no network.
    """

    __slots__ = ("_networks",)

    def __init__(self, networks: Iterable[IPNetwork] = ()) -> None:
        self._networks = tuple(dict.fromkeys(networks))

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Self:
        """Parse networks such as ``10.0.0.0/8``, and single addresses. Raises ValueError."""
        return cls(map(_parse_network, texts))

    def __contains__(self, address: object) -> bool:
        if isinstance(address, str):
            try:
                address = ipaddress.ip_address(address)
            except ValueError:
                return False
        if isinstance(address, ipaddress.IPv6Address):
            address = address.ipv4_mapped or address
        return isinstance(address, IPAddress) and any(address in network for network in self._networks)

    def __iter__(self) -> Iterator[IPNetwork]:
        return iter(self._networks)

    def __len__(self) -> int:
        return len(self._networks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Networks) and frozenset(self._networks) == frozenset(other._networks)

    def __hash__(self) -> int:
        return hash(frozenset(self._networks))

    def __repr__(self) -> str:
        return f"Networks.parse({[str(network) for network in self._networks]})"


def to_client_key(ip: str) -> str:
    """Return what identifies a client at the address `ip` where clients are counted: the address, for IPv6 its /64.

    Whoever has an IPv6 address usually has a whole /64. An IPv4-mapped address counts as the IPv4 address: all of them
    are in one /64. Proxies name their clients that way, and so does a dual-stack socket from systemd.
    """
    if ":" not in ip:
        return ip
    address = ipaddress.IPv6Address(ip)
    return str(address.ipv4_mapped) if address.ipv4_mapped is not None else address.packed[:8].hex()


def normalise_name(text: str) -> str:
    """Return a site's name in the form in which names are compared: lower case, A-labels, no trailing dot.

    `text` is a host name, a host name after ``*.`` (any one label), ``*`` (any name), or an IP address. An IPv6 address
    may be in brackets, which are removed. Raises ValueError.
    """
    if text == "*":
        return text
    if text.startswith("*."):
        return "*." + _parse_host_name(text[2:])
    if text.startswith("[") and text.endswith("]"):
        return _parse_ipv6(text[1:-1], zone=False)
    if text.count(":") == 1:
        raise ValueError(f"{quoted(text)} has a port; write the name without it")
    return _parse_ipv6(text, zone=False) if ":" in text else _parse_host(text)


def _format(host: str | None, port: int, path: str | None) -> str:
    if host is None:
        return f"unix:{path}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _parse_unix_path(text: str, folder: Path | None) -> str:
    path = Path(text.removeprefix("unix:"))
    if not path.name or "\0" in text:
        raise ValueError(f"{quoted(text)} does not name a socket file; write unix:/run/chat.sock")
    if not path.is_absolute():
        if folder is None:
            raise ValueError(f"{quoted(text)} is a relative path; write an absolute one, such as unix:/run/chat.sock")
        path = folder.absolute() / path
    try:
        length = len(os.fsencode(path))
    except UnicodeEncodeError:
        raise ValueError(f"{quoted(text)} is not a valid file name") from None
    if length > _UNIX_PATH_BYTES:
        raise ValueError(f"{quoted(text)}: the path has more than {_UNIX_PATH_BYTES} bytes, the most for a Unix socket")
    return str(path)


def _split_url(text: str, scheme: str, rest: str) -> str:
    """Return the ``HOST[:PORT]`` of an origin's URL, and refuse other parts that a URL may have."""
    if scheme not in ("ws", "wss"):
        hint = {"http": "; write ws:// for it", "https": "; write wss:// for it"}.get(scheme, "")
        raise ValueError(f"{quoted(text)}: an origin is host:port, ws://host:port, wss://host:port or unix:/path{hint}")
    if "@" in rest:  # the text is not shown, since it may contain a password
        raise ValueError("an origin cannot have a user or a password; write ws://host:port")
    if "?" in rest or "#" in rest:
        raise ValueError(
            f"{quoted(text)}: an origin cannot have a query or a fragment; those of the client's request are used"
        )
    authority, _, path = rest.partition("/")
    if path:
        raise ValueError(f"{quoted(text)}: an origin cannot have a path; that of the client's request is used")
    return authority


def _parse_host_and_port(text: str, example: str, default_port: int | None = None) -> tuple[str, int]:
    if bracketed := _BRACKETED.fullmatch(text):
        host, port = _parse_ipv6(bracketed[1], zone=True), bracketed[2]
    elif text.count(":") > 1:
        raise ValueError(f"{quoted(text)} is not HOST:PORT; write an IPv6 address in brackets, such as [::1]:8443")
    else:
        name, separator, after = text.partition(":")
        host, port = _parse_host(name), after if separator else None
    if port is None:
        if default_port is None:
            raise ValueError(f"{quoted(text)} has no port; add one, such as {example}")
        return host, default_port
    if not _PORT.fullmatch(port) or int(port) > 65535:
        raise ValueError(f"{quoted(port)} in {quoted(text)} is not a port; ports are numbers up to 65535")
    return host, int(port)


def _parse_host(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        return _parse_host_name(text)


def _parse_ipv6(text: str, *, zone: bool) -> str:
    _, separator, name = text.partition("%")
    try:
        if separator and not (zone and _ZONE.fullmatch(name)):
            raise ValueError
        return str(ipaddress.IPv6Address(text))
    except ValueError:
        raise ValueError(f"{quoted(text)} is not an IPv6 address") from None


def _parse_host_name(text: str) -> str:
    """Return a host name in lower case with A-labels (IDNA 2008 after the mapping of UTS 46) and no trailing dot."""
    try:
        # Punycode is never shorter than the name that it encodes. Check this first, before work on a long text.
        if len(text) > _NAME_BYTES + 1:
            raise ValueError
        name = text.lower() if text.isascii() else idna.encode(text, uts46=True).decode()
        name = name.removesuffix(".")
        labels = name.split(".")
        if len(name) > _NAME_BYTES or not all(map(_LABEL.fullmatch, labels)) or _NUMBER.fullmatch(labels[-1]):
            raise ValueError
        for label in labels:
            if label.startswith("xn--"):
                idna.ulabel(label)
    except ValueError:
        raise ValueError(f"{quoted(text)} is not a host name or an IP address") from None
    return name


def _parse_network(text: str) -> IPNetwork:
    address, slash, length = text.partition("/")
    try:
        if "%" in text or (slash and not length.isdecimal()):
            raise ValueError
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{quoted(text)} is not a network, such as 10.0.0.0/8 or 2001:db8::/32") from None
    if ipaddress.ip_address(address) != network.network_address:
        raise ValueError(
            f"{quoted(text)} has bits set after the /{length}; write {network}, or {address} for that address alone"
        )
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96 and network.network_address.ipv4_mapped:
        inner = f"{network.network_address.ipv4_mapped}/{network.prefixlen - 96}"
        raise ValueError(f"{quoted(text)}: IPv4-mapped addresses count as IPv4 addresses; write {inner}")
    return network
