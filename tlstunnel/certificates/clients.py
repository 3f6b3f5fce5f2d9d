"""Client certificates: whom a site asks for one, which it takes, and what it tells the origin of them.

OpenSSL verifies that a certificate comes from an authority of the site, is in its time and is not revoked; the rest is
decided here, on every connection, also on a resumed one, whose ticket carries the certificate.
"""

import hashlib
import re
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from tlstunnel.certificates import describe
from tlstunnel.errors import CertificateError

MAX_CACHED = 1024
"""Client certificates whose subject is kept: a million tunnels have few subjects, or each its own."""

MAX_SUBJECT = 4096
"""Characters; half of what Apache, Tomcat and node.js take in a whole field. One that is cut would be another's."""

_CRL = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)
_IssuerKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey


_COMMON_NAME = re.compile(r"(?:^|[,+])CN=((?:[^,+\\]|\\.)*)")


class ClientRefused(Exception):
    """The certificate of a client, or its absence, is not what the site asks for."""


@dataclass(frozen=True, slots=True)
class ClientFiles:
    """What a site asks of clients, as it is configured.

    ``ca`` and ``crl`` are files. Without ``required`` a client may come without a certificate. ``allow`` holds
    ``cn:NAME``, ``dns:NAME`` and ``uri:URI``; where it is empty, whoever the authorities have signed is allowed.
    """

    ca: Path
    crl: Path | None = None
    required: bool = True
    allow: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that the policy is made of."""
        return (self.ca,) if self.crl is None else (self.ca, self.crl)


@dataclass(frozen=True, slots=True)
class ClientPolicy:
    """What a site asks of clients, with the files read.

    ``ca`` is DER, one certificate behind the other; ``crl`` is PEM. With ``whole_chain`` intermediates are looked for
    in the revocation lists too. The times, aware, are those at which the first authority expires and at which the
    first revocation list ought to have been replaced. ``digest`` is of everything that decides.
    """

    files: ClientFiles
    ca: bytes = field(repr=False)
    crl: bytes = field(repr=False)
    whole_chain: bool
    ca_expiry: datetime
    crl_expiry: datetime | None
    digest: bytes

    def find_warning(self, now: datetime) -> str | None:
        """Say that an authority has expired, or a revocation list is out of date; None when all is well."""
        if self.ca_expiry < now:
            return f"{self.files.ca}: an authority expired on {self.ca_expiry:%Y-%m-%d %H:%M} UTC: it lets nobody in"
        if self.crl_expiry is not None and self.crl_expiry < now:
            return (
                f"{self.files.crl}: a list was to be replaced by {self.crl_expiry:%Y-%m-%d %H:%M} UTC: "
                "its authority's clients are refused"
            )
        return None

    def find_objection(self, present: "ClientPolicy", now: datetime) -> str | None:
        """Say why it must not replace ``present``; None when it may."""
        return self.find_warning(now) if present.find_warning(now) is None else None

    def describe_renewal(self, now: datetime) -> str:
        """Say that it decides from now on."""
        return f"{self.files.ca}: new authorities or revocation lists decide about clients"


def read_policy(files: ClientFiles) -> ClientPolicy:
    """Read authorities and revocation lists. Raises CertificateError, naming the file and the reason."""
    authorities = describe.read_certificates(files.ca)
    lists = _read_lists(files.crl) if files.crl is not None else []
    for each in lists:
        _refuse_foreign(each, authorities, files)
    issuers = {each.issuer for each in lists}
    if lists and not issuers & {authority.subject for authority in authorities}:
        raise CertificateError(f"{files.crl}: holds no list of an authority in {files.ca}: no client could pass")
    ca = b"".join(authority.public_bytes(Encoding.DER) for authority in authorities)
    crl = b"".join(each.public_bytes(Encoding.PEM) for each in lists)
    digest = hashlib.sha256()
    for part in (ca, crl, repr((files.required, files.allow)).encode()):
        digest.update(hashlib.sha256(part).digest())
    updates = [each.next_update_utc for each in lists if each.next_update_utc is not None]
    return ClientPolicy(
        files=files,
        ca=ca,
        crl=crl,
        # OpenSSL then wants a list of the issuer of each, and refuses everybody where one is missing.
        whole_chain=all(authority.issuer in issuers for authority in authorities),
        ca_expiry=min(authority.not_valid_after_utc for authority in authorities),
        crl_expiry=min(updates, default=None),
        digest=digest.digest(),
    )


def find_problems(files: ClientFiles) -> list[tuple[str, str]]:
    """Return each problem of files that were refused, with the key of the configuration that it is about."""
    found = []
    for key, path, read in (
        ("client_ca", files.ca, describe.read_certificates),
        ("client_crl", files.crl, _read_lists),
    ):
        if path is None:
            continue
        try:
            read(path)
        except CertificateError as error:
            found.append((key, str(error)))
    if not found:
        try:
            read_policy(files)
        except CertificateError as error:
            found.append(("client_ca" if files.crl is None else "client_crl", str(error)))
    return found


def _read_lists(path: Path) -> list[x509.CertificateRevocationList]:
    """Read revocation lists: PEM, or one in DER, which is what authorities publish (RFC 5280 section 4.2.1.13)."""
    data = describe.read_bytes(path)
    try:
        if blocks := _CRL.findall(data):
            return [x509.load_pem_x509_crl(block) for block in blocks]
        return [x509.load_der_x509_crl(data)]
    except (ValueError, x509.InvalidVersion) as error:
        raise CertificateError(f"{path}: holds no certificate revocation list, or a damaged one") from error


def _refuse_foreign(
    revoked: x509.CertificateRevocationList, authorities: list[x509.Certificate], files: ClientFiles
) -> None:
    """Find out now that a list is not of the authority it says: OpenSSL would refuse every client later."""
    keys = [authority.public_key() for authority in authorities if authority.subject == revoked.issuer]
    try:
        signed = not keys or any(isinstance(key, _IssuerKey) and revoked.is_signature_valid(key) for key in keys)
    except (UnsupportedAlgorithm, ValueError, TypeError):
        signed = False
    if not signed:
        raise CertificateError(f"{files.crl}: a list is not signed by the authority of its name in {files.ca}")


def check_client(tls: ssl.SSLSocket, policy: ClientPolicy | None) -> str:
    """Give the subject of the client at ``tls``, TLS handshake done; "" for one without a certificate.

    Raises ClientRefused where ``policy`` does not let it in. 3 us for a certificate seen before.
    """
    if policy is None:
        return ""
    der = tls.getpeercert(binary_form=True)
    if der is None:
        if policy.files.required:
            raise ClientRefused("no client certificate")
        return ""
    try:
        # Looked at by OpenSSL in a full TLS handshake only; a resumed one may be hours later.
        if _read_expiry(der) < datetime.now(UTC):
            raise ClientRefused("the client certificate has expired")
        if not is_allowed(der, policy.files.allow):
            raise ClientRefused("the client certificate is not among those allowed")
        return read_subject(der)
    except CertificateError as error:
        raise ClientRefused(str(error)) from None


@lru_cache(maxsize=MAX_CACHED)
def read_subject(der: bytes) -> str:
    r"""Give the subject of a certificate as an RFC 4514 string of visible ASCII: ``CN=M\C3\BCller,O=Example``.

    Other characters are pairs of hexadecimal digits (RFC 4514 section 2.4), so nothing in it ends a field's line, and
    no two subjects look alike. Raises CertificateError for one that cannot be decoded, or is longer than 4 096.
    """
    try:
        text = _load(der).subject.rfc4514_string()
        ascii_ = "".join(c if " " <= c <= "~" else "".join(f"\\{byte:02X}" for byte in c.encode()) for c in text)
    except ValueError as error:
        raise CertificateError("the subject of a client certificate cannot be decoded") from error
    if len(ascii_) > MAX_SUBJECT:
        raise CertificateError(f"the subject of a client certificate has more than {MAX_SUBJECT} characters")
    return ascii_


def find_common_name(text: str) -> str:
    """The common name of a subject as `subject` gives it; "" where it has none."""
    found = _COMMON_NAME.search(text)
    return found[1] if found else ""


def is_allowed(der: bytes, client_allow: tuple[str, ...]) -> bool:
    """Whether a verified certificate is among ``client_allow``: ``cn:NAME``, ``dns:NAME``, ``uri:URI``; empty: any.

    Names are compared whole: a ``*`` stands for itself. ``dns:`` does not tell case. A subject with several common
    names has none.
    """
    return not client_allow or not _list_claims(der).isdisjoint(_fold_case(client_allow))


@lru_cache(maxsize=MAX_CACHED)
def _fold_case(client_allow: tuple[str, ...]) -> frozenset[str]:
    return frozenset(entry.lower() if entry.startswith("dns:") else entry for entry in client_allow)


@lru_cache(maxsize=MAX_CACHED)
def _list_claims(der: bytes) -> frozenset[str]:
    """All entries of an allow list that a certificate would fulfil; of one that cannot be decoded, none."""
    try:
        cert = _load(der)
        common = cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        claims = {f"cn:{name.value}" for name in common if len(common) == 1 and isinstance(name.value, str)}
        for extension in cert.extensions:
            if isinstance(extension.value, x509.SubjectAlternativeName):
                claims.update(f"dns:{name.lower()}" for name in extension.value.get_values_for_type(x509.DNSName))
                claims.update(
                    f"uri:{uri}" for uri in extension.value.get_values_for_type(x509.UniformResourceIdentifier)
                )
    except (ValueError, CertificateError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return frozenset()
    return frozenset(claims)


@lru_cache(maxsize=MAX_CACHED)
def _read_expiry(der: bytes) -> datetime:
    return _load(der).not_valid_after_utc


def _load(der: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except (ValueError, x509.InvalidVersion) as error:
        raise CertificateError("a client certificate cannot be decoded") from error
