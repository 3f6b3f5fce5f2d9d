"""Read a certificate chain and its private key, and check that they match."""

import hashlib
import os
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from tlstunnel.certificates import describe
from tlstunnel.certificates.validity import Validity, find_ending, find_outdated
from tlstunnel.errors import CertificateError

# The types of key that our cipher suites of TLS 1.2 and 1.3 use. OpenSSL serves one certificate of each.
_KINDS = frozenset({"RSA", "ECDSA", "Ed25519", "Ed448"})

# OpenSSL's PEM_BUFSIZE: `openssl` cannot create a key with a longer one.
_MAX_PASSPHRASE = 1023


@dataclass(frozen=True, slots=True)
class PairFiles:
    """The PEM files of a pair, and the file or environment variable with its passphrase."""

    cert: Path
    key: Path
    passphrase_file: Path | None = None
    passphrase_env: str | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of the pair."""
        return (self.cert, self.key) if self.passphrase_file is None else (self.cert, self.key, self.passphrase_file)


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate chain and the matching key, in memory: they are still served if the files are damaged later.

    ``cert`` is the file. ``pem`` is the decrypted key and the chain, leaf first; ``digest`` is its SHA-256.
    ``validity`` and ``hosts``, its names and addresses, are the leaf's; ``for_servers`` is whether its extended key
    usage allows a server to use it. ``kind`` is ``RSA``, ``ECDSA``, ``Ed25519`` or ``Ed448``. ``shape`` is what a TLS
    library checks in a chain, apart from its validity: the type and size of each certificate's key, and the algorithm
    of its signature.
    """

    cert: Path
    pem: bytes = field(repr=False)
    digest: bytes
    validity: Validity
    kind: str
    shape: tuple[str, ...]
    hosts: frozenset[str]
    for_servers: bool

    def days_left(self, now: datetime) -> int:
        """Return the whole days until it expires, rounded down: negative once it has expired."""
        return (self.validity.end - now).days

    def covers(self, name: str) -> bool:
        """Return whether clients accept it for ``name``; a wildcard covers one label (RFC 9525 section 6.3)."""
        _, _, parent = name.partition(".")
        return name in self.hosts or f"*.{parent}" in self.hosts

    def find_warning(self, now: datetime) -> str | None:
        """Return a warning if it is not valid now, or should have been renewed by now, else None."""
        if outdated := find_outdated("the certificate", (self.validity,), now):
            return f"{self.cert}: {outdated}: clients refuse it{'' if now < self.validity.begin else '; renew it'}"
        if ending := find_ending("the certificate", (self.validity,), now):
            return f"{self.cert}: {ending}; renew it"
        return None

    def find_objection(self, present: "Pair", now: datetime) -> str | None:
        """Return why it must not replace ``present``, None if it may."""
        if not present.validity.is_current(now):
            return None
        outdated = find_outdated("the new certificate", (self.validity,), now)
        return f"{self.cert}: {outdated}, and the current one is valid" if outdated else None

    def describe_renewal(self, now: datetime) -> str:
        """Return a text for the log: this pair is served now."""
        return f"{self.cert}: a new certificate is served, with {self.days_left(now)} days left"


def read_pair(files: PairFiles) -> Pair:
    """Read a pair and check that the key matches. The period of validity is not checked.

    Takes 0.1 ms if the key is not encrypted. Raises CertificateError with the file and the reason.
    """
    chain = describe.read_certificates(files.cert)
    key = describe.read_key(files.key, _read_passphrase(files))
    place = next((place for place, cert in enumerate(chain) if describe.matches(key, cert)), None)
    if place is None:
        raise CertificateError(f"{files.key}: the private key does not match the certificate in {files.cert}")
    if place:
        raise CertificateError(
            f"{files.cert}: must begin with the certificate of {files.key}, which is number {place + 1}"
        )
    leaf, *issuers = chain
    kind, shape = _describe_shape(leaf)
    if kind not in _KINDS:
        raise CertificateError(f"{files.cert}: unsupported key type {kind}; use ECDSA or RSA")
    issuer_parts = [_describe_issuer(cert) for cert in issuers]
    pem = b"".join(
        (
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            leaf.public_bytes(Encoding.PEM),
            *(pem for _, pem in issuer_parts),
        )
    )
    return Pair(
        cert=files.cert,
        pem=pem,
        digest=hashlib.sha256(pem).digest(),
        validity=Validity(leaf.not_valid_before_utc, leaf.not_valid_after_utc),
        kind=kind,
        shape=(shape, *(shape for shape, _ in issuer_parts)),
        hosts=describe.list_hosts(leaf),
        for_servers=describe.allows(leaf, ExtendedKeyUsageOID.SERVER_AUTH),
    )


def find_problems(files: PairFiles) -> list[tuple[str, str]]:
    """Return each problem of a pair that was refused, with the key of the configuration that it is about."""
    found = []
    try:
        describe.read_certificates(files.cert)
    except CertificateError as error:
        found.append(("cert", str(error)))
    source = "passphrase_env" if files.passphrase_file is None else "passphrase_file"
    try:
        passphrase = _read_passphrase(files)
        source = "key"
        describe.read_key(files.key, passphrase)
    except CertificateError as error:
        found.append((source, str(error)))
    if not found:
        try:
            read_pair(files)
        except CertificateError as error:
            found.append(("key" if str(error).startswith(f"{files.key}: ") else "cert", str(error)))
    return found


@lru_cache(maxsize=64)
def _describe_issuer(cert: x509.Certificate) -> tuple[str, bytes]:
    """Return shape and PEM of an issuer. Cached, because thousands of leaf certificates may share one."""
    return _describe_shape(cert)[1], cert.public_bytes(Encoding.PEM)


def _describe_shape(cert: x509.Certificate) -> tuple[str, str]:
    key = describe.describe_key(cert)
    return key.partition(" ")[0], f"{key} signed {cert.signature_algorithm_oid.dotted_string}"


def _read_passphrase(files: PairFiles) -> bytes | None:
    if files.passphrase_file is not None:
        # The first line of the file, as with nginx's ssl_password_file and `openssl -passin file:`.
        source, lines = str(files.passphrase_file), describe.read_bytes(files.passphrase_file).splitlines()
        passphrase = lines[0]
    elif files.passphrase_env is not None:
        source, passphrase = f"${files.passphrase_env}", os.environb.get(os.fsencode(files.passphrase_env), b"")
    else:
        return None
    if not passphrase:
        raise CertificateError(f"{files.key}: {source} contains no passphrase for the private key")
    if len(passphrase) > _MAX_PASSPHRASE:
        raise CertificateError(f"{files.key}: the passphrase in {source} has more than {_MAX_PASSPHRASE} bytes")
    return passphrase
