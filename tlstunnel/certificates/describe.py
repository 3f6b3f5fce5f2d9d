"""Read PEM files, and describe certificates in text that is safe to display."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from tlstunnel.errors import CertificateError

# The usual names; OpenSSL and cryptography use those of SEC 2.
_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}


@dataclass(frozen=True, slots=True)
class CertificateDescription:
    """What a certificate says, escaped for display: anyone can request a certificate with any text in it.

    ``subject`` and ``issuer`` are RFC 4514 strings; ``names`` the DNS names, addresses, URIs and mailboxes of
    subjectAltName; ``not_before`` and ``not_after`` are aware (UTC); ``serial`` and ``sha256`` (the fingerprint of the
    DER form) are hexadecimal; ``key`` is like ``ECDSA P-256``, ``RSA 2048`` or ``Ed25519``.
    """

    subject: str
    issuer: str
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    serial: str
    sha256: str
    key: str
    is_ca: bool

    def days_left(self, now: datetime) -> int:
        """Return the whole days until ``not_after``, rounded down: negative once it has passed."""
        return (self.not_after - now).days


def describe(cert: x509.Certificate) -> CertificateDescription:
    """Describe ``cert``. Raises CertificateError if its names or extensions cannot be decoded."""
    try:
        return CertificateDescription(
            subject=_escape(cert.subject.rfc4514_string()),
            issuer=_escape(cert.issuer.rfc4514_string()),
            names=_list_names(cert),
            not_before=cert.not_valid_before_utc,
            not_after=cert.not_valid_after_utc,
            serial=f"{cert.serial_number:x}",
            sha256=cert.fingerprint(hashes.SHA256()).hex(),
            key=describe_key(cert),
            is_ca=is_ca(cert),
        )
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise CertificateError(f"a certificate cannot be decoded: {_escape(str(error))}") from error


def is_ca(cert: x509.Certificate) -> bool:
    """Return whether ``cert`` may sign others (RFC 5280 section 4.2.1.9)."""
    try:
        return cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def list_hosts(cert: x509.Certificate) -> frozenset[str]:
    """Return the DNS names, in lower case, and the IP addresses of ``cert``; none if they cannot be decoded."""
    try:
        alternative = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = {name.lower() for name in alternative.get_values_for_type(x509.DNSName)}
        return frozenset(names | {str(address) for address in alternative.get_values_for_type(x509.IPAddress)})
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return frozenset()


def allows(cert: x509.Certificate, purpose: x509.ObjectIdentifier) -> bool:
    """Return whether the extended key usage of ``cert`` (RFC 5280 section 4.2.1.12) allows this purpose.

    Without the extension, any purpose is allowed.
    """
    try:
        usages = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return True
    return purpose in usages or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usages


def read_certificates(path: Path) -> list[x509.Certificate]:
    """Read all certificates of a PEM file, in order.

    Raises CertificateError, naming the file, if it cannot be read or contains no certificate or a damaged one.
    """
    data = read_bytes(path)
    if b"-----BEGIN CERTIFICATE-----" not in data:
        what = "a private key, not a certificate" if b"PRIVATE KEY-----" in data else "no certificate in PEM form"
        raise CertificateError(f"{path}: contains {what}")
    try:
        found = x509.load_pem_x509_certificates(data)
    except (ValueError, x509.InvalidVersion) as error:
        raise CertificateError(f"{path}: contains a damaged certificate: {_escape(str(error))}") from error
    refuse_truncated(path, data, b"CERTIFICATE")
    return found


def read_key(path: Path, passphrase: bytes | None = None) -> PrivateKeyTypes:
    """Read the private key of a PEM file. ``passphrase`` is ignored if the key is not encrypted.

    Raises CertificateError, naming the file, if it cannot be read or contains no key, or one that is damaged, of an
    unknown type, or encrypted with another passphrase.
    """
    data = read_bytes(path)
    if b"PRIVATE KEY-----" not in data:
        what = "a certificate, not a private key" if b"-----BEGIN CERTIFICATE-----" in data else "no private key"
        raise CertificateError(f"{path}: contains {what} in PEM form")
    if passphrase is not None and not (b"ENCRYPTED PRIVATE KEY-----" in data or b"Proc-Type: 4,ENCRYPTED" in data):
        passphrase = None
    try:
        # The full validation of an RSA key tests primes, which takes 45 ms. `matches` checks what matters here.
        return load_pem_private_key(data, passphrase, unsafe_skip_rsa_key_validation=True)
    except TypeError as error:  # how cryptography asks for a passphrase
        raise CertificateError(
            f"{path}: the private key is encrypted; name its passphrase with passphrase_file or passphrase_env, or "
            f"decrypt it with `openssl pkey -in {path}`"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        if passphrase is not None:
            raise CertificateError(f"{path}: the passphrase is wrong, or the private key is damaged") from error
        raise CertificateError(f"{path}: contains a damaged or unsupported private key") from error


def matches(key: PrivateKeyTypes, cert: x509.Certificate) -> bool:
    """Return whether ``key`` is the private key of ``cert``."""
    try:
        return key.public_key() == cert.public_key()
    except (UnsupportedAlgorithm, ValueError):  # an unknown type of key
        return False


def read_bytes(path: Path) -> bytes:
    """Read a file that must not be empty. Raises CertificateError, naming the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path}: cannot be read: {error.strerror}") from error
    if not data.strip():
        raise CertificateError(f"{path}: is empty")
    return data


def refuse_truncated(path: Path, data: bytes, label: bytes) -> None:
    """Refuse PEM in which a block has no end. Raises CertificateError, naming the file.

    Parsers skip such a block. A chain would be served without an intermediate, and clients of an authority refused,
    while the file is being written, or until someone notices that the disk was full.
    """
    begun, ended = (data.count(b"-----%s %s-----" % (word, label)) for word in (b"BEGIN", b"END"))
    if begun != ended:
        what = label.decode()
        raise CertificateError(f"{path}: is incomplete: it has BEGIN {what} {begun}x, END {what} {ended}x")


def _list_names(cert: x509.Certificate) -> tuple[str, ...]:
    try:
        alternative = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    shown = (x509.DNSName, x509.IPAddress, x509.UniformResourceIdentifier, x509.RFC822Name)
    return tuple(_escape(str(name.value).replace("\\", "\\\\")) for name in alternative if isinstance(name, shown))


def describe_key(cert: x509.Certificate) -> str:
    """Return the type of the key in ``cert``: ``ECDSA P-256``, ``RSA 2048``, ``Ed25519``."""
    try:
        key = cert.public_key()
    except (UnsupportedAlgorithm, ValueError):
        return f"unknown ({cert.public_key_algorithm_oid.dotted_string})"
    match key:
        case rsa.RSAPublicKey():
            return f"RSA {key.key_size}"
        case ec.EllipticCurvePublicKey():
            return f"ECDSA {_CURVES.get(key.curve.name, key.curve.name)}"
        case ed25519.Ed25519PublicKey():
            return "Ed25519"
        case ed448.Ed448PublicKey():
            return "Ed448"
        case _:
            return type(key).__name__.removesuffix("PublicKey")


def _escape(text: str) -> str:
    r"""Escape unprintable characters (controls, line ends, direction marks) as in RFC 4514 section 2.4: ``\1B``."""
    return "".join(c if c.isprintable() else "".join(f"\\{byte:02X}" for byte in c.encode()) for c in text)
