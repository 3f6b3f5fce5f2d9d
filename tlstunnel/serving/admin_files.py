"""The files that `[admin]` names: tokens, which are compared in constant time, and certificates.

Serving processes check them with the rest of a configuration; the admin process uses them.
"""

import hashlib
import hmac
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tlstunnel.certificates.contexts import load_client_pair
from tlstunnel.config.admin import Access, Admin, Token
from tlstunnel.config.problems import Problems
from tlstunnel.errors import ConfigurationError
from tlstunnel.tls.policy import apply_to_server_context

SHORTEST = 24
"""Characters of a token at least: of base64, these are 18 bytes, too many to guess however fast one tries."""

LONGEST = 512

HOW = "openssl rand -base64 32 > token; chmod 600 token"
"""How to make one."""

_ALLOWED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~+/=")
"""The characters of a bearer token (RFC 6750 section 2.1)."""


@dataclass(frozen=True, slots=True)
class LoadedToken:
    """A token. `digest` is its SHA-256, so that the text itself is not kept."""

    name: str
    access: Access
    digest: bytes


@dataclass(frozen=True, slots=True)
class AdminFiles:
    """What can be used of the files. `context` is None without TLS, and refuses every client if it cannot be used."""

    tokens: tuple[LoadedToken, ...]
    context: ssl.SSLContext | None


def load_admin_files(admin: Admin, problems: Problems) -> AdminFiles:
    """Read the files; add what cannot be used to `problems`, by the keys of `admin`."""
    context = None
    if admin.cert is not None and admin.key is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with problems.collect("admin", "cert"):
            context = _make_context(admin.cert, admin.key)
        if admin.client_ca is not None:
            with problems.collect("admin", "client_ca"):
                _require_clients_of(context, admin.client_ca)
    tokens: list[LoadedToken] = []
    for index, token in enumerate(admin.tokens):
        with problems.collect("admin", "tokens", index, "file"):
            tokens.append(_load_token(token, tokens))
    return AdminFiles(tuple(tokens), context)


def _load_token(token: Token, others: Iterable[LoadedToken]) -> LoadedToken:
    """Raises ConfigurationError."""
    digest = make_digest(_read(token.file))
    for other in others:
        if other.digest == digest:
            raise ConfigurationError(f"{token.file}: the same token as that of {other.name}; each needs its own")
    return LoadedToken(token.name, token.access, digest)


def _make_context(cert: Path, key: Path) -> ssl.SSLContext:
    """Raises CertificateError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    apply_to_server_context(context)
    load_client_pair(context, cert, key)
    return context


def _require_clients_of(context: ssl.SSLContext, path: Path) -> None:
    """Verify certificates of clients that have one. Raises ConfigurationError."""
    try:
        context.load_verify_locations(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigurationError(f"{path}: cannot be used: {reason}") from None
    context.verify_mode = ssl.CERT_OPTIONAL


def make_digest(text: str) -> bytes:
    """Return what a token is known by."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def find_token(tokens: Iterable[LoadedToken], text: str) -> LoadedToken | None:
    """Return the token with this text. It takes the same time whichever token it is, and if it is none."""
    digest = make_digest(text)
    found = None
    for token in tokens:
        if hmac.compare_digest(token.digest, digest):
            found = token
    return found


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            line = file.read(LONGEST + 2).partition(b"\n")[0].strip()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}; to make a token: {HOW}") from None
    text = line.decode("latin-1")
    if not SHORTEST <= len(text) <= LONGEST or not _ALLOWED.issuperset(text):
        raise ConfigurationError(
            f"{path}: the first line should be a token of {SHORTEST} to {LONGEST} letters, digits or one of"
            f" - . _ ~ + / =; to make one: {HOW}"
        )
    return text
