"""The tokens of the API: read from their files, and compared in constant time.

Tested by tests/unit/test_admin_access.py.
"""

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tlstunnel.config.admin import Access, Token
from tlstunnel.errors import ConfigurationError

SHORTEST = 24
"""Characters of a token: of base64, these are 18 bytes. Nobody guesses them, so guesses need not be slowed down."""

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


def load_tokens(configured: Iterable[Token]) -> tuple[tuple[LoadedToken, ...], list[str]]:
    """Read the tokens; return those that can be used, and the problems of the others."""
    loaded: list[LoadedToken] = []
    problems: list[str] = []
    for token in configured:
        try:
            digest = make_digest(_read(token.file))
        except ConfigurationError as error:
            problems += error.problems
            continue
        same = next((other.name for other in loaded if other.digest == digest), None)
        if same is None:
            loaded.append(LoadedToken(token.name, token.access, digest))
        else:
            problems.append(f"{token.file}: the token {token.name} is the same as {same}; each needs its own")
    return tuple(loaded), problems


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
