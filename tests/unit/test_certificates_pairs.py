"""A certificate and its key, read from files."""

import ssl
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from tests.pki import DAY, NOW, Authority, Key, cert_pem, client_context, key_pem, new_key, tls_client, tls_server
from tlstunnel.certificates.contexts import make_context
from tlstunnel.certificates.pairs import PairFiles, read_pair
from tlstunnel.errors import CertificateError

CA = Authority()


@cache
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def reason(files: PairFiles) -> str:
    with pytest.raises(CertificateError) as caught:
        read_pair(files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["ECDSA", "RSA", "Ed25519"])
def test_a_pair_with_any_type_of_key_is_served_from_memory(tmp_path: Path, kind: str) -> None:
    key: Key = new_key()
    if kind != "ECDSA":
        key = rsa_key() if kind == "RSA" else ed25519.Ed25519PrivateKey.generate()
    files = CA.pair(tmp_path, "x", key=key)
    pair = read_pair(PairFiles(*files))
    for file in files:
        file.unlink()
    assert pair.kind == kind
    assert pair.shape[0].startswith(kind)
    (tmp_path / "ca.pem").write_bytes(cert_pem(CA.cert))
    with (
        tls_server(make_context((pair,))) as address,
        tls_client(address, client_context(tmp_path / "ca.pem", ssl.TLSVersion.TLSv1_3)),
    ):
        pass
    assert sorted(tmp_path.iterdir()) == [tmp_path / "ca.pem"]  # no other file was created


def test_the_key_is_not_shown(tmp_path: Path) -> None:
    pair = read_pair(PairFiles(*CA.pair(tmp_path, "x")))
    assert b"PRIVATE KEY" in pair.pem
    assert "PRIVATE" not in repr(pair)


def test_the_chain_is_served(tmp_path: Path) -> None:
    middle = Authority("Middle", CA)
    cert, key = middle.pair(tmp_path, "x")
    cert.write_bytes(b"some words\n" + cert.read_bytes() + cert_pem(middle.cert) + key.read_bytes())
    (tmp_path / "ca.pem").write_bytes(cert_pem(CA.cert))
    pair = read_pair(PairFiles(cert, cert))  # all in one file, as HAProxy has it
    assert len(pair.shape) == 2
    with tls_server(make_context((pair,))) as address, tls_client(address, client_context(tmp_path / "ca.pem")):
        pass


def test_rsa_and_ecdsa_in_one_context(tmp_path: Path) -> None:
    pairs = [
        read_pair(PairFiles(*CA.pair(tmp_path, "ec"))),
        read_pair(PairFiles(*CA.pair(tmp_path, "rsa", key=rsa_key()))),
    ]
    (tmp_path / "ca.pem").write_bytes(cert_pem(CA.cert))
    for order in (pairs, pairs[::-1]):
        with tls_server(make_context(order)) as address:
            for suite in ("ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES128-GCM-SHA256"):
                client = client_context(tmp_path / "ca.pem", ssl.TLSVersion.TLSv1_2, suite)
                with tls_client(address, client) as connection:
                    cipher = connection.cipher()
                    assert cipher is not None
                    assert cipher[0] == suite


FORMS = [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("written", [b"open sesame", b"open sesame\n", b"open sesame\r\n", b"open sesame\nanother\n"])
def test_a_passphrase_from_a_file(tmp_path: Path, form: PrivateFormat, written: bytes) -> None:
    private = new_key()
    cert, key = CA.pair(tmp_path, "x", key=private)
    plain = read_pair(PairFiles(cert, key))
    key.write_bytes(private.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"open sesame")))
    (tmp_path / "words").write_bytes(written)
    assert read_pair(PairFiles(cert, key, passphrase_file=tmp_path / "words")) == plain


def test_a_passphrase_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = new_key()
    cert, key = CA.pair(tmp_path, "x", key=private)
    plain = read_pair(PairFiles(cert, key))
    key.write_bytes(key_pem(private, BestAvailableEncryption("öffne".encode())))
    monkeypatch.setenv("TLSTUNNEL_TEST_WORDS", "öffne")
    assert read_pair(PairFiles(cert, key, passphrase_env="TLSTUNNEL_TEST_WORDS")) == plain


def test_a_passphrase_for_a_key_that_is_not_encrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLSTUNNEL_TEST_WORDS", "x")
    assert read_pair(PairFiles(*CA.pair(tmp_path, "x"), passphrase_env="TLSTUNNEL_TEST_WORDS")).kind == "ECDSA"


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_passphrase_is_named(tmp_path: Path, form: PrivateFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    private = new_key()
    cert, key = CA.pair(tmp_path, "x", key=private)
    key.write_bytes(private.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"right")))
    assert reason(PairFiles(cert, key)).startswith(f"{key}: the private key is encrypted; name its passphrase")
    monkeypatch.setenv("TLSTUNNEL_TEST_WORDS", "wrong")
    files = PairFiles(cert, key, passphrase_env="TLSTUNNEL_TEST_WORDS")
    assert reason(files) == f"{key}: the passphrase is wrong, or the private key is damaged"
    monkeypatch.setenv("TLSTUNNEL_TEST_WORDS", "w" * 1024)
    assert reason(files) == f"{key}: the passphrase in $TLSTUNNEL_TEST_WORDS has more than 1023 bytes"
    for value in ("", None):
        monkeypatch.setenv("TLSTUNNEL_TEST_WORDS", value) if value is not None else monkeypatch.delenv(
            "TLSTUNNEL_TEST_WORDS"
        )
        assert reason(files) == f"{key}: $TLSTUNNEL_TEST_WORDS contains no passphrase for the private key"
    missing = tmp_path / "missing"
    assert (
        reason(PairFiles(cert, key, passphrase_file=missing)) == f"{missing}: cannot be read: No such file or directory"
    )
    missing.write_bytes(b"\nsecond line\n")
    assert (
        reason(PairFiles(cert, key, passphrase_file=missing))
        == f"{key}: {missing} contains no passphrase for the private key"
    )


def test_a_key_of_another_certificate_is_named(tmp_path: Path) -> None:
    cert, _ = CA.pair(tmp_path, "x")
    others: tuple[Key, Key] = new_key(), rsa_key()
    for number, other in enumerate(others):
        _, key = CA.pair(tmp_path, f"other{number}", key=other)
        assert reason(PairFiles(cert, key)) == f"{key}: the private key does not match the certificate in {cert}"


def test_an_unsupported_type_of_key_is_named(tmp_path: Path) -> None:
    key = dsa.generate_private_key(2048)
    cert = tmp_path / "x.pem"
    cert.write_bytes(
        cert_pem(CA.sign(key)) + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())  # type: ignore[arg-type]
    )
    assert reason(PairFiles(cert, cert)).startswith(f"{cert}: unsupported key type DSA")


def test_which_pair_may_replace_which(tmp_path: Path) -> None:
    valid = read_pair(PairFiles(*CA.pair(tmp_path, "valid")))
    newer = read_pair(PairFiles(*CA.pair(tmp_path, "newer", end=NOW + 200 * DAY)))
    expired = read_pair(PairFiles(*CA.pair(tmp_path, "expired", start=NOW - 9 * DAY, end=NOW - DAY)))
    early = read_pair(PairFiles(*CA.pair(tmp_path, "early", start=NOW + DAY)))
    assert newer.find_objection(valid, NOW) is None
    assert valid.find_objection(newer, NOW) is None  # a user may want to return to an older one
    assert valid.find_objection(expired, NOW) is None
    assert early.find_objection(expired, NOW) is expired.find_objection(early, NOW) is None
    assert str(expired.find_objection(valid, NOW)).startswith(f"{tmp_path}/expired.pem: the new certificate expired ")
    assert str(early.find_objection(valid, NOW)).startswith(
        f"{tmp_path}/early.pem: the new certificate is not valid before"
    )
    assert early.find_objection(valid, NOW + DAY) is None


def test_days_left_and_warnings(tmp_path: Path) -> None:
    end = NOW + 21 * DAY
    pair = read_pair(PairFiles(*CA.pair(tmp_path, "x", start=end - 90 * DAY, end=end)))
    second = timedelta(seconds=1)
    assert pair.days_left(NOW) == 21
    assert pair.find_warning(NOW) is None
    assert pair.find_warning(NOW + second) == (
        f"{tmp_path}/x.pem: the certificate expires on {end:%Y-%m-%d %H:%M} UTC; renew it"
    )
    assert pair.find_warning(end + second) == (
        f"{tmp_path}/x.pem: the certificate expired on {end:%Y-%m-%d %H:%M} UTC: clients refuse it; renew it"
    )
    early = str(pair.find_warning(end - 91 * DAY))
    assert early.startswith(f"{tmp_path}/x.pem: the certificate is not valid before")
    assert early.endswith("clients refuse it")
    assert pair.describe_renewal(NOW) == f"{tmp_path}/x.pem: a new certificate is served, with 21 days left"
