"""The corpus of configurations, and the files that they name."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.pki import DAY, NOW, Authority, cert_pem, key_pem, new_key, subject_name

FOLDER = Path(__file__).with_name("configurations")
PASSPHRASE_VARIABLE = "TLSTUNNEL_TEST_PASSPHRASE"


@dataclass(frozen=True)
class Configuration:
    """A file of the corpus, and what it says is to be reported: the key and a part of the reason."""

    file: Path
    problems: Sequence[tuple[str, str]]
    warnings: Sequence[tuple[str, str]]

    @property
    def name(self) -> str:
        return self.file.stem

    def copy_to(self, folder: Path, referenced: Path) -> Path:
        """Copy it and the files that it names into a folder, and return its path there."""
        shutil.copytree(referenced, folder, dirs_exist_ok=True)
        return Path(shutil.copyfile(self.file, folder / "t.toml"))


def read_corpus(kind: str) -> list[Configuration]:
    return [_read(file) for file in sorted((FOLDER / kind).glob("*.toml"))]


def _read(file: Path) -> Configuration:
    lines = file.read_text("utf-8-sig").splitlines()
    return Configuration(file, _expected(lines, "# problem: "), _expected(lines, "# warning: "))


def _expected(lines: Sequence[str], mark: str) -> list[tuple[str, str]]:
    found = []
    for line in lines:
        if line.startswith(mark):
            key, colon, part = line.removeprefix(mark).partition(": ")
            found.append((key, part) if colon else ("", key))
    return found


def write_named_files(folder: Path) -> None:
    """Write everything that files of the corpus name."""
    _write_certificates(folder)
    _write_lists_and_rules(folder)
    _write_workers(folder)
    _write_notices(folder)


def _write_notices(folder: Path) -> None:
    (folder / "webhook.secret").write_text("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYo=\n")
    (folder / "webhook.password").write_text("hunter2\n")
    for name, text in (("texts", "${site}\n\n${peak}\n"), ("bad-texts", "${site}\n\n${peek}\n")):
        (folder / name / "de").mkdir(parents=True)
        (folder / name / "de" / "sustained.txt").write_text(text)


def _write_certificates(folder: Path) -> None:
    authority, other = Authority(), Authority("Another CA")
    names = [x509.DNSName(name) for name in ("localhost", "a.example", "b.example", "*.b.example")]
    authority.pair(folder, "chat", names=names)
    authority.pair(folder, "other")
    authority.pair(folder, "rsa", key=rsa.generate_private_key(65537, 2048))
    authority.pair(folder, "expired", names=names, start=NOW - 9 * DAY, end=NOW - DAY)
    authority.pair(folder, "early", start=NOW + 9 * DAY)
    authority.pair(folder, "soon", names=names, start=NOW - 87 * DAY, end=NOW + 3 * DAY)
    for name, usage in (("server", ExtendedKeyUsageOID.SERVER_AUTH), ("client", ExtendedKeyUsageOID.CLIENT_AUTH)):
        private = new_key()
        (folder / f"{name}.pem").write_bytes(cert_pem(authority.sign(private, usage=usage)))
        (folder / f"{name}-key.pem").write_bytes(key_pem(private))
    chat, key = (folder / "chat.pem").read_bytes(), (folder / "chat-key.pem").read_bytes()
    (folder / "wrong-order.pem").write_bytes(cert_pem(authority.cert) + chat)
    (folder / "damaged.pem").write_bytes(chat.replace(b"M", b"N", 40))
    (folder / "damaged-key.pem").write_bytes(key.replace(b"M", b"N", 40))
    (folder / "empty.pem").touch()
    (folder / "folder").mkdir()
    _write_dsa_pair(folder, authority)
    _write_locked_key(folder)
    (folder / "ca.pem").write_bytes(cert_pem(authority.cert))
    (folder / "expired-ca.pem").write_bytes(cert_pem(Authority("Old CA", end=NOW - DAY).cert))
    for name, crl in (
        ("ca", authority.revoke()),
        ("soon", authority.revoke(end=NOW + DAY / 8)),
        ("old", authority.revoke(end=NOW - DAY)),
        ("foreign", other.revoke()),
        ("forged", authority.revoke(key=new_key())),
    ):
        (folder / f"{name}.crl").write_bytes(crl.public_bytes(Encoding.PEM))


def _write_dsa_pair(folder: Path, authority: Authority) -> None:
    """DSA has no place in TLS 1.3, and none in the suites of TLS 1.2 that are offered."""
    key = dsa.generate_private_key(2048)
    builder: Any = x509.CertificateBuilder().subject_name(subject_name("dsa")).issuer_name(authority.name)
    builder = builder.public_key(key.public_key()).serial_number(1).not_valid_before(NOW - DAY)
    cert = builder.not_valid_after(NOW + 90 * DAY).sign(authority.key, hashes.SHA256())
    (folder / "dsa.pem").write_bytes(cert_pem(cert))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "dsa-key.pem").write_bytes(private)


def _write_locked_key(folder: Path) -> None:
    """The key of chat.pem once more, encrypted."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    key: Any = load_pem_private_key((folder / "chat-key.pem").read_bytes(), None)
    (folder / "locked-key.pem").write_bytes(key_pem(key, BestAvailableEncryption(b"secret")))
    (folder / "passphrase").write_text("secret\n")
    (folder / "wrong-passphrase").write_text("wrong\n")
    os.environ[PASSPHRASE_VARIABLE] = "secret"


def _write_lists_and_rules(folder: Path) -> None:
    (folder / "botnets.txt").write_text("# addresses\n192.0.2.0/24\n2001:db8::/32\n")
    (folder / "wrong.txt").write_text("10.0.0.0/8\n10.0.0.0/33\n10.0.0.1/8\n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "own-1.conf").write_text('SecRule ARGS "@contains evil" "id:1,phase:1,deny,status:403"\n')
    (folder / "wrong.conf").write_text(
        'SecRule ARGS "@nothing x" "id:1,phase:1,deny"\nSecRule ARGS "@rx (" "id:2,phase:1,deny"\n'
    )
    (folder / "refused.conf").write_text('SecRule NO_SUCH_VARIABLE "@contains x" "id:1,phase:1,deny"\n')


def _write_workers(folder: Path) -> None:
    (folder / "worker.py").write_text("async def fetch(request, env): ...\n")
    (folder / "sync.py").write_text("def fetch(request, env): ...\n")
    (folder / "syntax.py").write_text("async def fetch(request, env)\n")
    (folder / "raises.py").write_text("async def fetch(request, env): ...\nraise ValueError('no')\n")
