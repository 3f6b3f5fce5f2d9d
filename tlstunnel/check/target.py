"""The target of `tlstunnel check`, what is sent to it, and which certificates are trusted.

Tested by tests/unit/test_check_steps.py.
"""

import ipaddress
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

import idna
from cryptography.hazmat.primitives.serialization import Encoding

from tlstunnel.certificates.contexts import load_client_pair
from tlstunnel.certificates.describe import read_certificates
from tlstunnel.tls.policy import apply_to_client_context

# RFC 6455 section 4.1: the check sets these itself; RFC 9112 section 6: a handshake has no body.
_OWN_FIELDS: Final = frozenset({"connection", "content-length", "transfer-encoding", "upgrade"})
# RFC 9110 section 5.6.2.
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# RFC 1123 has no underscores in host names, but private zones have them, and getaddrinfo() accepts them.
_ASCII_NAME: Final = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*")
# RFC 3986 section 3.2, without the user.
_AUTHORITY: Final = re.compile(r"(?:\[(?P<six>[^\]]*)\]|(?P<name>[^:\[\]]+))(?::(?P<port>[0-9]{0,6}))?")


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed ``wss://`` URL. `host` is an IP address, or a name in lower case as A-labels (RFC 5891)."""

    url: str
    host: str
    port: int
    resource: str
    """Path and query, as the request line has them (RFC 6455 section 3)."""
    connect: tuple[str, int | None] | None = None
    """A host, and perhaps a port, to connect to instead of the URL's, whose name the server gets all the same."""

    @property
    def place(self) -> tuple[str, int]:
        """The host and the port to connect to."""
        host, port = self.connect or (self.host, None)
        return host, self.port if port is None else port

    @property
    def authority(self) -> str:
        """The Host field's value (RFC 9110 section 7.2): the port only if it is not 443."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == 443 else f"{host}:{self.port}"

    @classmethod
    def parse(cls, url: str) -> Self:
        """Check a URL against RFC 6455 section 3. Raises ValueError with one line that says what to change."""
        if not url.isprintable() or " " in url:
            raise ValueError("the URL contains spaces or control characters; write them percent-encoded")
        scheme, separator, rest = url.partition("://")
        if not separator or scheme.lower() != "wss":
            raise ValueError(f"check needs a URL like wss://HOST[:PORT]/PATH, not {url!r}")
        if "#" in rest:
            raise ValueError("a WebSocket URL has no fragment; write # in a path as %23")
        end = next((at for at, char in enumerate(rest) if char in "/?"), len(rest))
        authority, resource = rest[:end], rest[end:]
        if "@" in authority:
            raise ValueError("a WebSocket URL has no user or password; use --header 'Authorization: ...'")
        host, port = parse_connect(authority)
        resource = resource if resource.startswith("/") else f"/{resource}"
        return cls(url, host, 443 if port is None else port, quote(resource, safe="!$%&'()*+,/:;=?@~[]"))


def _parse_ipv6(host: str) -> str:
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        raise ValueError(f"[{host}] is not an IPv6 address") from None
    if address.scope_id is not None:
        raise ValueError(f"[{host}] contains a zone, which is only valid on its own machine")
    return str(address)


def _parse_name(host: str) -> str:
    name = host.removesuffix(".")
    try:
        ascii_name = name if name.isascii() else idna.encode(name, uts46=True).decode("ascii")
    except idna.IDNAError as error:
        raise ValueError(f"{host!r} is not a host name: {error}") from None
    if len(ascii_name) > 253 or not _ASCII_NAME.fullmatch(ascii_name):
        raise ValueError(f"{host!r} is not a host name")
    return ascii_name.lower()


def parse_connect(text: str) -> tuple[str, int | None]:
    """Return host and port of ``HOST[:PORT]``; the port may be None. Raises ValueError."""
    parts = _AUTHORITY.fullmatch(text)
    if parts is None:
        raise ValueError(f"{text!r} is not HOST[:PORT]; write an IPv6 address in brackets")
    port = int(parts["port"]) if parts["port"] else None
    if port is not None and not 1 <= port <= 65_535:
        raise ValueError("the port must be a number from 1 to 65535")
    return _parse_name(parts["name"]) if parts["six"] is None else _parse_ipv6(parts["six"]), port


def parse_field(text: str) -> tuple[str, str]:
    """Split ``NAME: VALUE`` into a field (RFC 9110 section 5). Raises ValueError, naming what is wrong."""
    name, colon, value = text.partition(":")
    if not colon or not _TOKEN.fullmatch(name):
        raise ValueError(f"a header is written 'Name: value', not {text!r}")
    if name.lower() in _OWN_FIELDS or name.lower().startswith("sec-websocket-"):
        raise ValueError(f"{name} is set by the check itself")
    value = value.strip(" \t")
    if not value.isprintable():
        raise ValueError(f"the value of {name} contains control characters")
    return name, value


def check_subprotocols(names: Sequence[str]) -> tuple[str, ...]:
    """Check that each is a token and occurs once (RFC 6455 section 4.1). Raises ValueError, naming the wrong one."""
    for index, name in enumerate(names):
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"{name!r} is not a subprotocol's name")
        if name in names[:index]:
            raise ValueError(f"{name!r} is given twice")
    return tuple(names)


@dataclass(frozen=True, slots=True)
class Trust:
    """A client's TLS context, and the file of the authorities that it trusts, if there is one.

    With ``presents``, it has a certificate for a server that asks for one.
    """

    context: ssl.SSLContext
    ca: Path | None
    presents: bool = False

    @classmethod
    def load(cls, ca: Path | None, cert: Path | None = None, key: Path | None = None) -> Self:
        """Return TLS 1.2 or later, trusting only the certificates in `ca`, or the system's store.

        A server that asks for a certificate gets `cert`; its private key is in `key`, or in the same file. Raises
        CertificateError, naming the file, if one cannot be read or lacks what it should contain.
        """
        given = (
            b"".join(certificate.public_bytes(Encoding.DER) for certificate in read_certificates(ca)) if ca else None
        )
        # It writes keys to SSLKEYLOGFILE if that is set, which helps when debugging a connection.
        context = ssl.create_default_context(cadata=given)
        # Python 3.13 turned both on: the result must not depend on the Python version. No browser is strict about the
        # form of extensions, and a certificate given with --ca is trusted even if it is not a root.
        context.verify_flags = (context.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN) & ~ssl.VERIFY_X509_STRICT
        apply_to_client_context(context)
        if cert is not None:
            load_client_pair(context, cert, key or cert)
        return cls(context, ca, presents=cert is not None)
