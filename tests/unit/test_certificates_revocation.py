"""Revocation lists that are looked up by serial number, and those that are left to OpenSSL."""

from collections.abc import Sequence

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from tests.pki import DAY, NOW, Authority, new_key
from tlstunnel.certificates.revocation import Revocations
from tlstunnel.journal.events import Reason

CA, KEY = Authority(), new_key()
GOOD, BAD = CA.sign(KEY, "good"), CA.sign(KEY, "bad")


def refusal(
    cert: x509.Certificate,
    lists: Sequence[x509.CertificateRevocationList],
    *authorities: Authority,
    whole_chain: bool = True,
) -> Reason | None:
    certs = [authority.cert for authority in authorities or [CA]]
    revocations = Revocations.build(lists, certs, whole_chain=whole_chain)
    assert revocations is not None
    return revocations.find_refusal(cert.public_bytes(Encoding.DER), NOW)


def test_a_revoked_certificate_is_refused() -> None:
    lists = [CA.revoke(BAD)]
    assert refusal(GOOD, lists) is None
    assert refusal(BAD, lists) == Reason.CLIENT_REVOKED


def test_an_expired_or_early_list_refuses_everyone() -> None:
    assert refusal(GOOD, [CA.revoke(end=NOW - DAY)]) == Reason.CLIENT_CRL_EXPIRED
    early = x509.CertificateRevocationListBuilder().issuer_name(CA.name)
    early = early.last_update(NOW + DAY).next_update(NOW + 2 * DAY)
    assert refusal(GOOD, [early.sign(CA.key, hashes.SHA256())]) == Reason.CLIENT_CRL_EXPIRED


def test_the_last_list_counts() -> None:
    lists = [CA.revoke(), CA.revoke(BAD, end=NOW - DAY)]
    assert refusal(BAD, lists) is None  # as after the end of a certificateHold
    assert refusal(BAD, lists[::-1]) is None


def test_a_certificate_of_another_issuer_has_no_list() -> None:
    middle, impostor = Authority("Middle", CA), Authority()
    for other in (middle, impostor):  # an impostor has the name of the authority
        assert refusal(other.sign(KEY), [CA.revoke()]) == Reason.CLIENT_NO_CRL
    assert refusal(middle.sign(KEY), [CA.revoke()], CA, middle, whole_chain=False) == Reason.CLIENT_NO_CRL


def test_serial_numbers_belong_to_one_authority() -> None:
    """Two authorities of the same name, as after a change of keys, may use the same numbers."""
    second = Authority()
    assert second.name == CA.name
    lists = [CA.revoke(BAD), second.revoke(GOOD)]
    assert refusal(GOOD, lists, CA, second) is None
    assert refusal(BAD, lists, CA, second) == Reason.CLIENT_REVOKED
    assert refusal(second.sign(KEY), lists, CA, second) is None


@pytest.mark.parametrize("whole_chain", [True, False])
def test_an_authority_may_be_revoked_by_its_own_issuer(whole_chain: bool) -> None:
    middle = Authority("Middle", CA)
    leaf = middle.sign(KEY)
    assert refusal(leaf, [CA.revoke(), middle.revoke()], CA, middle, whole_chain=whole_chain) is None
    refused = refusal(leaf, [CA.revoke(middle.cert), middle.revoke()], CA, middle, whole_chain=whole_chain)
    assert refused == (Reason.CLIENT_REVOKED if whole_chain else None)
    refused = refusal(leaf, [CA.revoke(end=NOW - DAY), middle.revoke()], CA, middle, whole_chain=whole_chain)
    assert refused == (Reason.CLIENT_CRL_EXPIRED if whole_chain else None)


def test_authorities_that_certified_each_other_are_no_endless_chain() -> None:
    first = Authority("First")
    second = Authority("Second", first)
    leaf = second.sign(KEY)
    again = Authority("First", second)
    again.key = first.key
    first.cert = second.sign(first.key, first.name, ())
    lists = [first.revoke(), second.revoke()]
    assert refusal(leaf, lists, first, second) is None


def test_a_renewed_authority_with_the_same_key_has_the_same_list() -> None:
    renewed = Authority()
    renewed.key = CA.key
    renewed.cert = CA.sign(CA.key, CA.name, ())
    assert refusal(BAD, [CA.revoke(BAD)], renewed, CA) == Reason.CLIENT_REVOKED


def test_what_is_not_a_complete_list_of_a_known_authority_is_left_to_openssl() -> None:
    delta = x509.CertificateRevocationListBuilder().issuer_name(CA.name).last_update(NOW - DAY).next_update(NOW + DAY)
    delta = delta.add_extension(x509.DeltaCRLIndicator(1), critical=True)
    part = x509.CertificateRevocationListBuilder().issuer_name(CA.name).last_update(NOW - DAY).next_update(NOW + DAY)
    point = x509.IssuingDistributionPoint(None, None, True, False, None, False, False)
    for left in (
        CA.revoke(unusual=True),
        Authority("Middle", CA).revoke(),
        CA.revoke(key=KEY),
        delta.sign(CA.key, hashes.SHA256()),
        part.add_extension(point, critical=True).sign(CA.key, hashes.SHA256()),
    ):
        assert Revocations.build([CA.revoke(), left], [CA.cert], whole_chain=True) is None


def test_the_usual_extensions_are_no_obstacle() -> None:
    builder = x509.CertificateRevocationListBuilder().issuer_name(CA.name).last_update(NOW - DAY)
    builder = builder.next_update(NOW + DAY).add_extension(x509.CRLNumber(7), critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(CA.key.public_key())
    found = builder.add_extension(identifier, critical=False).sign(CA.key, hashes.SHA256())
    assert refusal(GOOD, [found]) is None
