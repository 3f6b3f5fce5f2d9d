"""The secrets of webhooks and the password of a mail server, from their files. No message shows them."""

import base64
import binascii
import hashlib
import hmac
from pathlib import Path

from tlstunnel.errors import ConfigurationError

SECRET_PREFIX = "whsec_"  # noqa: S105 - what each secret begins with
SECRET_BYTES = range(24, 65)
MAX_SECRETS = 4

_MOST_READ = 4096


def load_secrets(path: Path) -> tuple[bytes, ...]:
    """Return the secrets in a file, one a line: a second one is for the time of a rotation.

    Each is `whsec_` and 24 to 64 bytes in base64. Raises ConfigurationError.
    """
    try:
        with path.open("rb") as file:
            lines = file.read(_MOST_READ).splitlines()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    secrets = tuple(_parse_secret(line.strip(), number, path) for number, line in enumerate(lines, 1) if line.strip())
    if not 1 <= len(secrets) <= MAX_SECRETS:
        raise ConfigurationError(f"{path}: expected 1 to {MAX_SECRETS} secrets, one a line, got {len(secrets)}")
    return secrets


def derive_secret(secret: bytes, url: str) -> bytes:
    """Return the secret for the URL of a contact, so that no contact can sign for another one."""
    return hmac.digest(secret, b"contact " + url.encode(), hashlib.sha256)


def load_password(path: Path) -> str:
    """Return the first line of a file. Raises ConfigurationError."""
    try:
        with path.open("rb") as file:
            password = file.read(_MOST_READ).partition(b"\n")[0].removesuffix(b"\r").decode()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: not UTF-8") from None
    if not password:
        raise ConfigurationError(f"{path}: the first line, which should be the password, is empty")
    return password


def _parse_secret(line: bytes, number: int, path: Path) -> bytes:
    try:
        secret = base64.b64decode(line.removeprefix(SECRET_PREFIX.encode()), validate=True)
    except binascii.Error:
        secret = b""
    if not line.startswith(SECRET_PREFIX.encode()) or len(secret) not in SECRET_BYTES:
        raise ConfigurationError(
            f"{path}: line {number}: expected a secret: {SECRET_PREFIX} and {SECRET_BYTES.start} to"
            f" {SECRET_BYTES.stop - 1} bytes in base64; for one, run"
            f' echo "{SECRET_PREFIX}$(openssl rand -base64 32)"'
        )
    return secret
