"""URLs of web and mail servers. Whatever may be a secret in them is not shown.

Tested by tests/unit/test_config_plans.py.
"""

import re
from typing import NamedTuple
from urllib.parse import quote, unquote

import msgspec

from tlstunnel.addresses import normalise_name, quoted
from tlstunnel.config.secrets import HIDDEN

_MOST = 2000
_WEB_URL = re.compile(r"(https?)://([^/?#\s]+)([/?][!-~]*)?", re.IGNORECASE)
_MAIL_URL = re.compile(r"(smtps?)://(?:([!-~]*)@)?([^/?#@\s]+)/?", re.IGNORECASE)
# A part of a path that is as long as this is no word, but a key: those of Slack have 24 characters.
_KEY = re.compile(r"[A-Za-z0-9_.~%-]{20,}")
_LOOPBACK = re.compile(r"localhost|127(?:\.[0-9]+){3}|::1")
_PORT = re.compile(r"[0-9]{1,5}")
_LOCAL_PART = re.compile(r"[A-Za-z0-9!$'*+/=^_{|}~-]+(?:\.[A-Za-z0-9!$'*+/=^_{|}~-]+)*")
_LOCAL_PART_LENGTH = 64  # RFC 5321 section 4.5.3.1.1


class WebURL(msgspec.Struct, frozen=True):
    """The URL of a web server. `str` has no query, and nothing in its path that looks like a key."""

    text: str

    def __str__(self) -> str:
        shown, question, _ = self.text.partition("?")
        origin, path = shown[: shown.find("/", 8)], shown[shown.find("/", 8) :]
        return f"{origin}{_KEY.sub(HIDDEN, path)}{question and f'?{HIDDEN}'}"

    def __repr__(self) -> str:
        return f"<WebURL {self}>"

    @classmethod
    def parse(cls, text: str) -> "WebURL":
        """Parse an `https:` URL, or an `http:` URL of this machine. Raises ValueError."""
        match = _WEB_URL.fullmatch(text)
        if match is None or len(text) > _MOST:
            shown = quoted(text.partition("?")[0]) if "@" not in text else "something else"
            raise ValueError(f'expected a URL such as "https://example.com/notices", got {shown}')
        scheme, authority, rest = match[1].lower(), match[2], match[3] or "/"
        if "@" in authority:  # not quoted, since it may be a password
            raise ValueError("this URL cannot have a user or a password")
        server = parse_server(authority)
        if scheme == "http" and not _LOOPBACK.fullmatch(server.host):
            raise ValueError(f"{quoted(authority)} is on another machine, so its URL has to begin with https://")
        return cls(f"{scheme}://{server}{rest if rest.startswith('/') else f'/{rest}'}")


def hide_key(address: str) -> str:
    """Return a `mailto:` or `https:` URL as it may be shown."""
    return str(WebURL(address)) if address.startswith("http") else address


class Server(NamedTuple):
    """A host, which is a name or an IP address without brackets, and a port; 0 if there is none."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" if self.port else host


class MailServer(msgspec.Struct, frozen=True):
    """A mail server. Its connection is encrypted: from the start with `smtps`, and by STARTTLS with `smtp`.

    `str` has no password.
    """

    scheme: str
    host: str
    port: int
    user: str = ""
    password: str = ""

    def __str__(self) -> str:
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        return f"{self.scheme}://{user}{Server(self.host, self.port)}"

    def __repr__(self) -> str:
        return f"<MailServer {self}>"

    @classmethod
    def parse(cls, text: str) -> "MailServer":
        """Parse `smtp://USER:PASSWORD@HOST:PORT` or `smtps://...`. Raises ValueError."""
        match = _MAIL_URL.fullmatch(text)
        if match is None or len(text) > _MOST:  # not quoted, since there may be a password in it
            raise ValueError(f"expected a URL such as {MAIL_EXAMPLE}, of printable ASCII characters without spaces")
        scheme, credentials, server = match[1].lower(), match[2] or "", parse_server(match[3])
        user, colon, password = credentials.partition(":")
        user, password = unquote(user), unquote(password)
        if not (user + password).isprintable():
            raise ValueError("the user or the password has a control character in it")
        if colon and not user:
            raise ValueError("there is a password without a user")
        return cls(scheme, server.host, server.port or (465 if scheme == "smtps" else 587), user, password)


MAIL_EXAMPLE = '"smtp://USER@HOST:587"'


def parse_server(text: str) -> Server:
    """Parse `HOST` or `HOST:PORT`, with an IPv6 address in brackets. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, ""
    if (colon and not port and not text.endswith("]")) or (port and not _is_port(port)):
        raise ValueError(f"{quoted(port)} in {quoted(text)} is not a port, which is a number from 1 to 65535")
    name = normalise_name(host)
    if "*" in name:
        raise ValueError(f"{quoted(host)} is not a host name or an IP address")
    return Server(name, int(port) if port else 0)


def _is_port(text: str) -> bool:
    return _PORT.fullmatch(text) is not None and 0 < int(text) <= 65535


def parse_mailbox(text: str) -> str:
    """Return one e-mail address, its domain in A-labels.

    What would need quotes in a header, or percent signs in a URL, is refused. Raises ValueError.
    """
    local, at, domain = text.rpartition("@")
    if not at or not _LOCAL_PART.fullmatch(local) or len(local) > _LOCAL_PART_LENGTH:
        raise ValueError(f"expected one address such as ops@example.com, got {quoted(text)}")
    domain = normalise_name(domain)
    if "*" in domain or ":" in domain:
        raise ValueError(f"expected one address such as ops@example.com, got {quoted(text)}")
    return f"{local}@{domain}"
