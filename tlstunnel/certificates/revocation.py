"""Revocation lists as sets of serial numbers, so that the length of a list does not matter to a TLS handshake.

OpenSSL verifies the signature of a list, and so hashes all of it, in every TLS handshake, before it verifies that the
client's certificate comes from the authority that it names: 5 ms for 3.5 MB, for anyone who can connect. Here the
signature is verified once, when the list is read.

Only what is easy to get right is done here: complete lists of the authorities that a site names. Any other set of lists
(delta lists, lists of a part of the certificates, lists of further intermediate authorities) is left to OpenSSL.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from tlstunnel.certificates.validity import Validity
from tlstunnel.journal.events import Reason

MAX_CACHED = 1024
"""Certificates for which the issuer that was found is remembered: 0.1 ms each, for the signature."""

_IssuerKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey

# Extensions that do not change what a list covers (RFC 5280 section 5.2).
_HARMLESS = (x509.AuthorityKeyIdentifier, x509.CRLNumber, x509.IssuerAlternativeName, x509.AuthorityInformationAccess)


@dataclass(frozen=True, slots=True)
class _RevocationList:
    """The last list of ``authority``, whose DER is ``der``. ``above`` is the number of its issuer's list, if needed."""

    authority: x509.Certificate
    der: bytes = field(repr=False)
    validity: Validity
    serials: frozenset[int] = field(repr=False)
    above: int | None


@dataclass(frozen=True, slots=True)
class Revocations:
    """The revocation lists of a site's authorities."""

    lists: tuple[_RevocationList, ...]

    @classmethod
    def build(
        cls,
        lists: Sequence[x509.CertificateRevocationList],
        authorities: Sequence[x509.Certificate],
        *,
        whole_chain: bool,
    ) -> Self | None:
        """Index ``lists``; None if they have to be left to OpenSSL.

        With ``whole_chain``, the authority that issued a certificate must not be on the list of its own issuer.
        """
        last: dict[x509.Certificate, tuple[Validity, frozenset[int]]] = {}
        for each in sorted(lists, key=lambda one: find_validity(one).end):
            signers = find_signers(each, authorities)
            if not signers or not _is_complete(each):
                return None
            found = find_validity(each), frozenset(entry.serial_number for entry in each)
            last.update(dict.fromkeys(signers, found))
        numbers = {authority: number for number, authority in enumerate(last)}
        return cls(
            tuple(
                _RevocationList(
                    authority,
                    authority.public_bytes(Encoding.DER),
                    validity,
                    serials,
                    _find_above(authority, numbers) if whole_chain else None,
                )
                for authority, (validity, serials) in last.items()
            )
        )

    def find_refusal(self, der: bytes, now: datetime) -> Reason | None:
        """Return why a verified certificate is refused, None if it is not.

        It takes 2 us, and 0.1 ms more for a certificate that is new.
        """
        cert = _load(der)
        number = next((n for n, each in enumerate(self.lists) if _is_issued_by(der, each.der)), None)
        if number is None:
            return Reason.CLIENT_NO_CRL
        # Authorities may have certified each other, so there is no more than one step for each list.
        for _ in self.lists:
            found = self.lists[number]
            if cert.serial_number in found.serials:
                return Reason.CLIENT_REVOKED
            if not found.validity.is_current(now):
                return Reason.CLIENT_CRL_EXPIRED
            if found.above is None:
                break
            cert, number = found.authority, found.above
        return None


def find_validity(revoked: x509.CertificateRevocationList) -> Validity:
    """Return the validity of a list. RFC 5280 section 5.1.2.5 requires nextUpdate; one without it does not expire."""
    return Validity(revoked.last_update_utc, revoked.next_update_utc or datetime.max.replace(tzinfo=UTC))


def find_signers(
    revoked: x509.CertificateRevocationList, authorities: Sequence[x509.Certificate]
) -> list[x509.Certificate]:
    """Return the authorities that a list names and whose key has signed it: several, if a key was certified again."""
    return [each for each in authorities if each.subject == revoked.issuer and _has_signed(each, revoked)]


def _has_signed(authority: x509.Certificate, revoked: x509.CertificateRevocationList) -> bool:
    try:
        key = authority.public_key()
        return isinstance(key, _IssuerKey) and revoked.is_signature_valid(key)
    except (UnsupportedAlgorithm, ValueError, TypeError):
        return False


def _is_complete(revoked: x509.CertificateRevocationList) -> bool:
    """Return whether a list covers every certificate of its issuer, and can be read without knowing more."""
    try:
        return all(isinstance(each.value, _HARMLESS) and not each.critical for each in revoked.extensions)
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return False


def _find_above(authority: x509.Certificate, numbers: dict[x509.Certificate, int]) -> int | None:
    der = authority.public_bytes(Encoding.DER)
    above = (
        number
        for other, number in numbers.items()
        if other.subject != authority.subject and _is_issued_by(der, other.public_bytes(Encoding.DER))
    )
    return next(above, None)


@lru_cache(maxsize=MAX_CACHED)
def _is_issued_by(der: bytes, authority: bytes) -> bool:
    try:
        _load(der).verify_directly_issued_by(_load(authority))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False
    return True


@lru_cache(maxsize=MAX_CACHED)
def _load(der: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(der)
