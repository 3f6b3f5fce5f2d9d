"""A test certificate authority in a folder, and certificates signed by it.

For development and tests. Keys are P-256, which browsers and all TLS libraries accept. Clients limit lifetimes: Apple
refuses leaf certificates of more than 825 days, and public authorities issue 398 days at most.
"""

import fcntl
import ipaddress
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tlstunnel.addresses import normalise_name, quoted
from tlstunnel.certificates import describe
from tlstunnel.errors import CertificateError

CA_LIFETIME = timedelta(days=3650)
LEAF_LIFETIME = timedelta(days=397)
# A client whose clock is behind must be able to use a certificate that has just been issued.
CLOCK_SKEW = timedelta(hours=1)
# ``ensure`` renews a certificate that has less than this left, so that none expires during a day of development.
RENEW_BEFORE = timedelta(days=1)

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")

MAX_COMMON_NAME = 64
"""Characters of a common name: ub-common-name of RFC 5280, appendix A.1."""

_San = x509.DNSName | x509.IPAddress
_SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True)
class Issued:
    """The files: the CA's certificate, the leaf with its chain, and the leaf's key; and whether the CA is new."""

    ca: Path
    cert: Path
    key: Path
    ca_created: bool


@dataclass(frozen=True, slots=True)
class _Authority:
    chain: tuple[x509.Certificate, ...]
    key: _SigningKey
    created: bool


@dataclass(frozen=True, slots=True)
class _Subject:
    """Whom a certificate is for, and what it may be used for."""

    common_name: str
    names: tuple[_San, ...]
    usage: x509.ObjectIdentifier


def _describe_server(names: tuple[_San, ...]) -> _Subject:
    # Clients only read subjectAltName (RFC 9525). The common name is for people.
    return _Subject(str(names[0].value)[:MAX_COMMON_NAME], names, ExtendedKeyUsageOID.SERVER_AUTH)


def _describe_client(name: str) -> _Subject:
    return _Subject(name, (), ExtendedKeyUsageOID.CLIENT_AUTH)


def create(names: Sequence[str], folder: Path, *, force: bool = False) -> Issued:
    """Issue a certificate for ``names`` (default: localhost) into ``folder``, by the CA there or by a new one.

    ``force`` replaces an existing certificate and key of that name, never the CA. Raises CertificateError for an
    invalid name, files that exist, a CA that cannot sign, or a folder that cannot be written.
    """
    wanted = tuple(dict.fromkeys(_parse_name(name) for name in names or LOCAL_NAMES))
    stem = _file_stem(wanted[0])
    with _lock(folder):
        return _issue(_describe_server(wanted), stem, folder, force=force)


def create_client(name: str, folder: Path, *, force: bool = False) -> Issued:
    """Issue a certificate for a client, with ``name`` as its common name, into ``folder`` as ``client-NAME.pem``.

    Otherwise as ``create``.
    """
    if not name.isprintable() or "/" in name or not 0 < len(name.strip()) == len(name) <= MAX_COMMON_NAME:
        raise CertificateError(
            f"{quoted(name)} cannot be the name of a client: 1 to {MAX_COMMON_NAME} printable characters, without /"
        )
    with _lock(folder):
        return _issue(_describe_client(name), f"client-{name}", folder, force=force)


def revoke(certs: Sequence[Path], folder: Path) -> Path:
    """Add certificates to the revocation list of the CA in ``folder``, ``ca.crl``, and renew the list.

    Without ``certs`` it is only renewed. Raises CertificateError for a certificate of another CA, and as ``create``.
    """
    with _lock(folder):
        if not (folder / "ca.pem").exists():
            raise CertificateError(f"{folder}: there is no test CA; tlstunnel certs create makes one")
        now = datetime.now(UTC).replace(microsecond=0)
        authority = _load_authority(folder, now)
        path = folder / "ca.crl"
        revoked = {entry.serial_number: entry for entry in _read_list(path, authority)}
        for cert in certs:
            leaf = describe.read_certificates(cert)[0]
            if not _is_issued_by(leaf, authority.chain[0]):
                raise CertificateError(f"{cert}: was not issued by {folder / 'ca.pem'}")
            if leaf == authority.chain[0]:
                raise CertificateError(f"{cert}: is the CA itself; to stop trusting it, remove it from client_ca")
            entry = x509.RevokedCertificateBuilder().serial_number(leaf.serial_number).revocation_date(now)
            revoked.setdefault(leaf.serial_number, entry.build())
        _replace_file(path, _sign_list(list(revoked.values()), authority, now), 0o644)
    return path


def _read_list(path: Path, authority: _Authority) -> x509.CertificateRevocationList | tuple[()]:
    if not path.exists():
        return ()
    try:
        found = x509.load_pem_x509_crl(describe.read_bytes(path))
        signed = found.is_signature_valid(authority.key.public_key())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        signed = False
    if not signed:
        raise CertificateError(f"{path}: is not a revocation list of the CA beside it; remove it")
    return found


def _is_issued_by(leaf: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        leaf.verify_directly_issued_by(ca)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False
    return True


def _sign_list(revoked: Sequence[x509.RevokedCertificate], authority: _Authority, now: datetime) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.chain[0].subject)
        .last_update(now - CLOCK_SKEW)
        .next_update(min(now + LEAF_LIFETIME, authority.chain[0].not_valid_after_utc))
        # It has to grow (RFC 5280 section 5.2.3).
        .add_extension(x509.CRLNumber(time.time_ns()), critical=False)
        .add_extension(_build_authority_identifier(authority), critical=False)
    )
    for entry in revoked:
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def ensure(folder: Path) -> Issued:
    """Return a usable ``localhost`` certificate in ``folder``: the existing one, else a new one.

    Raises CertificateError as ``create`` does.
    """
    with _lock(folder):
        issued = Issued(folder / "ca.pem", folder / "localhost.pem", folder / "localhost-key.pem", ca_created=False)
        if _is_usable(issued):
            return issued
        return _issue(_describe_server(tuple(map(_parse_name, LOCAL_NAMES))), "localhost", folder, force=True)


def _is_usable(issued: Issued) -> bool:
    try:
        ca, leaf = describe.read_certificates(issued.ca)[0], describe.read_certificates(issued.cert)[0]
        matches = _is_issued_by(leaf, ca) and describe.matches(describe.read_key(issued.key), leaf)
    except CertificateError:
        return False
    now = datetime.now(UTC)
    return matches and leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc - RENEW_BEFORE


def _parse_name(name: str) -> _San:
    try:
        host = normalise_name(name)
    except ValueError as error:
        raise CertificateError(str(error)) from None
    if host == "*":
        raise CertificateError('no certificate is valid for every name; write the names instead of "*"')
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    return x509.DNSName(host)


def _file_stem(name: _San) -> str:
    """Return the stem of the file names: without shell patterns or colons (scp), and not that of another pair."""
    stem = str(name.value).replace("*", "_wildcard").replace(":", "_")
    if stem == "ca" or stem.endswith("-key"):
        raise CertificateError(
            f"{stem!r} cannot be the first name: {stem}.pem may be another certificate's file; pass it second"
        )
    return stem


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Create ``folder`` and lock it, so that two tunnels that start at once do not both create a CA."""
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):  # some network file systems cannot lock a folder
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CertificateError(f"{error.filename or folder}: cannot be written: {error.strerror}") from error


def _issue(subject: _Subject, stem: str, folder: Path, *, force: bool) -> Issued:
    cert, key = folder / f"{stem}.pem", folder / f"{stem}-key.pem"
    for path in (cert, key):
        if path.exists() and not force:
            raise CertificateError(f"{path}: already exists; --force replaces it")
    now = datetime.now(UTC).replace(microsecond=0)
    authority = _load_authority(folder, now)
    leaf_key = ec.generate_private_key(ec.SECP256R1())
    leaf = _sign_leaf(subject, leaf_key.public_key(), authority, now)
    _write_pair(cert, (leaf, *authority.chain), key, leaf_key)
    return Issued(folder / "ca.pem", cert, key, ca_created=authority.created)


def _load_authority(folder: Path, now: datetime) -> _Authority:
    """Return the CA of ``folder``, a new one if there is none. An unusable CA is not replaced: clients trust it."""
    cert, key = folder / "ca.pem", folder / "ca-key.pem"
    if not cert.exists() and not key.exists():
        ca_key = ec.generate_private_key(ec.SECP256R1())
        ca = _sign_root(ca_key, now)
        _write_pair(cert, (ca,), key, ca_key)
        return _Authority((ca,), ca_key, created=True)
    chain, ca_key_read = tuple(describe.read_certificates(cert)), describe.read_key(key)
    remedy = f"remove {cert} and {key}, and a new CA will be created"
    if not isinstance(ca_key_read, _SigningKey):
        raise CertificateError(f"{key}: the key of a CA must be ECDSA or RSA; {remedy}")
    if not describe.matches(ca_key_read, chain[0]):
        raise CertificateError(f"{key}: is not the key of {cert}; {remedy}")
    if not describe.is_ca(chain[0]):
        raise CertificateError(f"{cert}: is not the certificate of a CA; {remedy}")
    if not chain[0].not_valid_before_utc <= now < chain[0].not_valid_after_utc:
        validity = f"{chain[0].not_valid_before_utc:%Y-%m-%d} to {chain[0].not_valid_after_utc:%Y-%m-%d}"
        raise CertificateError(f"{cert}: is valid from {validity} only; {remedy}")
    return _Authority(chain, ca_key_read, created=False)


def _sign_root(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # Trust stores look up an issuer by its name, so the CAs of two folders need different names.
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "tlstunnel"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"tlstunnel test CA {identifier.digest[:4].hex()}"),
        ]
    )
    return (
        _new_builder(name, name, key.public_key())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now - CLOCK_SKEW + CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_build_key_usage(ca=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )


def _sign_leaf(
    subject: _Subject, key: ec.EllipticCurvePublicKey, authority: _Authority, now: datetime
) -> x509.Certificate:
    ca = authority.chain[0]
    not_before = max(now - CLOCK_SKEW, ca.not_valid_before_utc)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject.common_name)])
    builder = (
        _new_builder(name, ca.subject, key)
        .not_valid_before(not_before)
        .not_valid_after(min(not_before + LEAF_LIFETIME, ca.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_build_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([subject.usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(_build_authority_identifier(authority), critical=False)
    )
    if subject.names:
        builder = builder.add_extension(x509.SubjectAlternativeName(subject.names), critical=False)
    return builder.sign(authority.key, hashes.SHA256())


def _new_builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
    )


def _build_authority_identifier(authority: _Authority) -> x509.AuthorityKeyIdentifier:
    """Return the CA's own identifier (RFC 5280 section 4.2.1.1), which need not be the hash of its key."""
    try:
        own = authority.chain[0].extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _build_key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_pair(cert: Path, chain: Sequence[x509.Certificate], key: Path, private: ec.EllipticCurvePrivateKey) -> None:
    """Write both files under other names, then rename them, so that no reader sees an incomplete one."""
    pem = b"".join(each.public_bytes(Encoding.PEM) for each in chain)
    secret = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    token = secrets.token_hex(8)
    new_cert, new_key = cert.parent / f".{token}.pem", cert.parent / f".{token}-key.pem"
    try:
        _write_new(new_key, secret, 0o600)
        _write_new(new_cert, pem, 0o644)
        new_key.replace(key)
        new_cert.replace(cert)
    finally:
        new_key.unlink(missing_ok=True)
        new_cert.unlink(missing_ok=True)


def _replace_file(path: Path, data: bytes, mode: int) -> None:
    new = path.parent / f".{secrets.token_hex(8)}"
    try:
        _write_new(new, data, mode)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
