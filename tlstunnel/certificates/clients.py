"""Client certificates: which ones a site requires and accepts, and the subject that the origin gets.

OpenSSL verifies that a certificate comes from an authority of the site and is valid now. The rest, such as revocation,
is checked here, for every connection, including resumed ones, whose tickets carry the certificate.
"""

import hashlib
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from tlstunnel.certificates import describe
from tlstunnel.certificates.revocation import Revocations, find_signers, find_validity
from tlstunnel.certificates.validity import Validity, find_ending, find_outdated
from tlstunnel.errors import CertificateError
from tlstunnel.journal.events import Reason

MAX_CACHED = 1024
"""Client certificates whose parsed form is cached. A million tunnels share few certificates, or each has its own."""

MAX_SUBJECT = 4096
"""Characters: half of what Apache, Tomcat and node.js accept as a whole field. A longer subject is refused, not cut,
because a cut one could equal another subject."""

_CRL = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)


# X509_V_ERR_... of OpenSSL's x509_vfy.h. All of OpenSSL 3 have these numbers, but their texts differ.
_DISTRUST = {
    2: Reason.TLS_CLIENT_UNKNOWN_ISSUER,
    3: Reason.TLS_CLIENT_NO_CRL,
    9: Reason.TLS_CLIENT_NOT_YET_VALID,
    10: Reason.TLS_CLIENT_EXPIRED,
    12: Reason.TLS_CLIENT_CRL_EXPIRED,
    18: Reason.TLS_CLIENT_UNKNOWN_ISSUER,
    19: Reason.TLS_CLIENT_UNKNOWN_ISSUER,
    20: Reason.TLS_CLIENT_UNKNOWN_ISSUER,
    21: Reason.TLS_CLIENT_UNKNOWN_ISSUER,
    23: Reason.TLS_CLIENT_REVOKED,
    26: Reason.TLS_CLIENT_OTHER_PURPOSE,
}


class ClientRefused(Exception):
    """The client has no certificate, or one that the site does not accept, for this ``reason`` of the record."""

    def __init__(self, text: str, reason: Reason = Reason.CLIENT_CERTIFICATE) -> None:
        super().__init__(text)
        self.reason = reason


_REFUSALS = {
    Reason.CLIENT_REVOKED: "the client certificate has been revoked",
    Reason.CLIENT_CRL_EXPIRED: "the revocation list for the client certificate has expired",
    Reason.CLIENT_NO_CRL: "there is no revocation list for the client certificate",
}


@dataclass(frozen=True, slots=True)
class ClientFiles:
    """What a site requires of clients, as configured.

    ``ca`` and ``crl`` are files. Unless ``required``, a client may connect without a certificate. ``allow`` has entries
    ``cn:NAME``, ``dns:NAME`` and ``uri:URI``; if it is empty, every certificate from the authorities is allowed.
    """

    ca: Path
    crl: Path | None = None
    required: bool = True
    allow: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of the policy."""
        return (self.ca,) if self.crl is None else (self.ca, self.crl)


@dataclass(frozen=True, slots=True)
class ClientPolicy:
    """What a site requires of clients, with the content of the files.

    ``ca`` is DER, one certificate after another. ``revocations`` are the revocation lists; if they are left to OpenSSL,
    that is None and ``crl`` has them as PEM. With ``whole_chain``, intermediates are looked up in
    the revocation lists too. ``authorities`` has the validity of each authority, and ``lists`` that of the last
    revocation list of each issuer. ``digest`` covers everything that affects a decision.
    """

    files: ClientFiles
    ca: bytes = field(repr=False)
    crl: bytes = field(repr=False)
    revocations: Revocations | None = field(repr=False)
    whole_chain: bool
    authorities: tuple[Validity, ...]
    lists: tuple[Validity, ...]
    digest: bytes

    def find_warning(self, now: datetime) -> str | None:
        """Return a warning if an authority or a revocation list is not valid now, or only for a short time."""
        outdated = self._find_outdated(now)
        if outdated is not None:
            return outdated
        if ending := find_ending("a revocation list", self.lists, now):
            return f"{self.files.crl}: {ending}, and its authority's clients will be refused; renew it"
        if ending := find_ending("an authority", self.authorities, now):
            return f"{self.files.ca}: {ending}, and its clients will be refused; replace it"
        return None

    def find_objection(self, present: "ClientPolicy", now: datetime) -> str | None:
        """Return why it must not replace ``present``, None if it may."""
        return self._find_outdated(now) if present._find_outdated(now) is None else None

    def _find_outdated(self, now: datetime) -> str | None:
        if outdated := find_outdated("an authority", self.authorities, now):
            return f"{self.files.ca}: {outdated}: its clients are refused"
        if outdated := find_outdated("a revocation list", self.lists, now):
            return f"{self.files.crl}: {outdated}: the clients of its authority are refused; renew it"
        return None

    def describe_renewal(self, now: datetime) -> str:
        """Return a text for the log: this policy is in use now."""
        return f"{self.files.ca}: new authorities or revocation lists are in use"


def read_policy(files: ClientFiles) -> ClientPolicy:
    """Read authorities and revocation lists. Raises CertificateError with the file and the reason."""
    authorities = describe.read_certificates(files.ca)
    lists = _read_lists(files.crl) if files.crl is not None else []
    for each in lists:
        _refuse_foreign(each, authorities, files)
    issuers = {each.issuer for each in lists}
    if lists and not issuers & {authority.subject for authority in authorities}:
        raise CertificateError(
            f"{files.crl}: contains no revocation list of an authority in {files.ca}: every client would be refused"
        )
    ca = b"".join(authority.public_bytes(Encoding.DER) for authority in authorities)
    crl = b"".join(each.public_bytes(Encoding.PEM) for each in lists)
    digest = hashlib.sha256()
    for part in (ca, crl, repr((files.required, files.allow)).encode()):
        digest.update(hashlib.sha256(part).digest())
    # A list of each issuer in the chain is then needed, and every client is refused if one is missing.
    whole_chain = all(authority.issuer in issuers for authority in authorities)
    revocations = Revocations.build(lists, authorities, whole_chain=whole_chain) if lists else None
    return ClientPolicy(
        files=files,
        ca=ca,
        crl=crl if revocations is None else b"",
        revocations=revocations,
        whole_chain=whole_chain,
        authorities=tuple(Validity(each.not_valid_before_utc, each.not_valid_after_utc) for each in authorities),
        lists=_find_validities(lists),
        digest=digest.digest(),
    )


def _find_validities(lists: Sequence[x509.CertificateRevocationList]) -> tuple[Validity, ...]:
    """Return the validity of the last list of each issuer, which is used instead of the others."""
    last: dict[x509.Name, Validity] = {}
    for each in lists:
        found = find_validity(each)
        if each.issuer not in last or last[each.issuer].end < found.end:
            last[each.issuer] = found
    return tuple(last.values())


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
    describe.refuse_truncated(path, data, b"X509 CRL")
    try:
        if blocks := _CRL.findall(data):
            return [x509.load_pem_x509_crl(block) for block in blocks]
        return [x509.load_der_x509_crl(data)]
    except (ValueError, x509.InvalidVersion) as error:
        raise CertificateError(f"{path}: contains no certificate revocation list, or a damaged one") from error


def _refuse_foreign(
    revoked: x509.CertificateRevocationList, authorities: list[x509.Certificate], files: ClientFiles
) -> None:
    """Refuse a list that its authority has not signed. OpenSSL would only notice later, and refuse every client."""
    if any(each.subject == revoked.issuer for each in authorities) and not find_signers(revoked, authorities):
        raise CertificateError(
            f"{files.crl}: a revocation list is not signed by the authority in {files.ca} that it names"
        )


def check_client(der: bytes | None, policy: ClientPolicy | None) -> str:
    """Return the subject of a client with this certificate, after the TLS handshake; "" for one without (None).

    Raises ClientRefused if ``policy`` does not accept the client. Takes 3 us for a certificate in the cache.
    """
    if policy is None:
        return ""
    if der is None:
        if policy.files.required:
            raise ClientRefused("no client certificate")
        return ""
    try:
        # OpenSSL checks this in a full TLS handshake only; a resumed one may take place hours later.
        now = datetime.now(UTC)
        if _read_expiry(der) < now:
            raise ClientRefused("the client certificate has expired", Reason.CLIENT_EXPIRED)
        if policy.revocations is not None and (reason := policy.revocations.find_refusal(der, now)) is not None:
            raise ClientRefused(_REFUSALS[reason], reason)
        if not is_allowed(der, policy.files.allow):
            raise ClientRefused("the client certificate is not in client_allow")
        return read_subject(der)
    except CertificateError as error:
        raise ClientRefused(str(error)) from None


def explain_failure(error: ssl.SSLError) -> tuple[Reason, str]:
    """Return why OpenSSL failed a TLS handshake with a client, and its own words for it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _DISTRUST.get(error.verify_code, Reason.TLS_CLIENT_NOT_TRUSTED), str(error.verify_message)
    name = error.reason or str(error)
    if name == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return Reason.TLS_NO_CLIENT_CERTIFICATE, ""
    if name == "EXCESSIVE_MESSAGE_SIZE":
        return Reason.TLS_CLIENT_CHAIN_TOO_LONG, ""
    return Reason.TLS_FAILED, name


@lru_cache(maxsize=MAX_CACHED)
def read_subject(der: bytes) -> str:
    r"""Return the subject of a certificate as an RFC 4514 string of visible ASCII: ``CN=M\C3\BCller,O=Example``.

    Other characters are escaped as hexadecimal pairs (RFC 4514 section 2.4), so that a subject cannot end the line of a
    field, and no two subjects look alike. Raises CertificateError if it cannot be decoded, or has more than 4 096
    characters.
    """
    try:
        text = _load(der).subject.rfc4514_string()
        ascii_ = "".join(c if " " <= c <= "~" else "".join(f"\\{byte:02X}" for byte in c.encode()) for c in text)
    except ValueError as error:
        raise CertificateError("the subject of a client certificate cannot be decoded") from error
    if len(ascii_) > MAX_SUBJECT:
        raise CertificateError(f"the subject of a client certificate has more than {MAX_SUBJECT} characters")
    return ascii_


@lru_cache(maxsize=MAX_CACHED)
def find_common_name(der: bytes) -> str:
    """Return the common name of a certificate; "" if it has none, several, or one with unprintable characters.

    It is read as an attribute, not from the text of the subject, in which another attribute could imitate it. A
    receiver may take the first of several or the last, and may end a name at a NUL.
    """
    try:
        found = _load(der).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except (ValueError, CertificateError):
        return ""
    value = found[0].value if len(found) == 1 else ""
    return value if isinstance(value, str) and value.isprintable() else ""


def is_allowed(der: bytes, client_allow: tuple[str, ...]) -> bool:
    """Return whether ``client_allow`` allows a verified certificate. If it is empty, it allows any.

    Entries are ``cn:NAME``, ``dns:NAME`` and ``uri:URI``. They are compared whole, and ``*`` is an ordinary character;
    ``dns:`` ignores case. A subject with several common names matches no ``cn:``.
    """
    return not client_allow or not _list_claims(der).isdisjoint(_fold_case(client_allow))


@lru_cache(maxsize=MAX_CACHED)
def _fold_case(client_allow: tuple[str, ...]) -> frozenset[str]:
    return frozenset(entry.lower() if entry.startswith("dns:") else entry for entry in client_allow)


@lru_cache(maxsize=MAX_CACHED)
def _list_claims(der: bytes) -> frozenset[str]:
    """Return all entries of an allow list that a certificate would match; none if it cannot be decoded."""
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
