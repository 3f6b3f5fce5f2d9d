"""Certificates of a site and of its clients.

Tested by tests/unit/test_config.py.
"""

from pathlib import Path
from typing import Annotated

from tlstunnel.addresses import quoted
from tlstunnel.config.kinds import FilePath, Text
from tlstunnel.config.tables import Findings, Table

PemFile = Annotated[Path, FilePath("a PEM file")]
PassphraseFile = Annotated[Path, FilePath("a file whose first line is the passphrase")]


def parse_client_name(text: str) -> str:
    """Return a name that client certificates may have. Raises ValueError."""
    kind, _, name = text.partition(":")
    if kind not in ("cn", "dns", "uri") or not name:
        raise ValueError(f'expected "cn:NAME", "dns:NAME" or "uri:URI", got {quoted(text)}')
    return text


ClientName = Annotated[str, Text(parse_client_name, "cn:NAME", pattern="^(cn|dns|uri):.+$")]


class CertificateConfig(Table, frozen=True):
    """A certificate with its chain and its key, which may be encrypted with a passphrase."""

    cert: PemFile
    key: PemFile
    passphrase_file: PassphraseFile | None = None
    passphrase_env: str | None = None

    def check_passphrase(self) -> Findings:
        """The passphrase comes from one place."""
        if self.passphrase_file and self.passphrase_env:
            yield ("passphrase_env",), "passphrase_file is set too; keep one of them"
