from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtensionOID, NameOID

from tlstunnel.certificates import describe
from tlstunnel.errors import CertificateError

START = datetime(2026, 1, 1, tzinfo=UTC)
END = datetime(2026, 4, 1, 12, tzinfo=UTC)
KEY = ec.generate_private_key(ec.SECP256R1())


def make(
    *extensions: x509.ExtensionType, name: str = "a", key: CertificateIssuerPrivateKeyTypes = KEY
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(0xABC)
        .not_valid_before(START)
        .not_valid_after(END)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    pure = isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    return builder.sign(key, None if pure else hashes.SHA256())


def pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(Encoding.PEM)


def test_describe() -> None:
    names = x509.SubjectAlternativeName(
        [
            x509.DNSName("*.example.com"),
            x509.IPAddress(ip_address("::1")),
            x509.UniformResourceIdentifier("spiffe://x/y"),
            x509.RFC822Name("a@example.com"),
            x509.RegisteredID(x509.ObjectIdentifier("1.2.3")),
        ]
    )
    cert = make(names, x509.BasicConstraints(ca=True, path_length=None), name="Ann, Co")
    facts = describe.describe(cert)
    assert facts == describe.CertificateDescription(
        subject="CN=Ann\\, Co",
        issuer="CN=Ann\\, Co",
        names=("*.example.com", "::1", "spiffe://x/y", "a@example.com"),
        not_before=START,
        not_after=END,
        serial="abc",
        sha256=cert.fingerprint(hashes.SHA256()).hex(),
        key="ECDSA P-256",
        is_ca=True,
    )


def test_a_certificate_without_extensions() -> None:
    facts = describe.describe(make())
    assert facts.names == ()
    assert not facts.is_ca


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (rsa.generate_private_key(65537, 2048), "RSA 2048"),
        (ec.generate_private_key(ec.SECP384R1()), "ECDSA P-384"),
        (ec.generate_private_key(ec.SECP256K1()), "ECDSA secp256k1"),
        (ed25519.Ed25519PrivateKey.generate(), "Ed25519"),
        (ed448.Ed448PrivateKey.generate(), "Ed448"),
        (dsa.generate_private_key(2048), "DSA"),
    ],
)
def test_types_of_keys(key: CertificateIssuerPrivateKeyTypes, text: str) -> None:
    assert describe.describe(make(key=key)).key == text


def test_an_unknown_type_of_key_is_shown_as_unknown() -> None:
    p256, unknown = bytes.fromhex("06082a8648ce3d030107"), bytes.fromhex("06082a8648ce3d030177")
    der = make().public_bytes(Encoding.DER)
    assert p256 in der
    cert = x509.load_der_x509_certificate(der.replace(p256, unknown))
    assert describe.describe(cert).key == "unknown (1.2.840.10045.2.1)"
    assert not describe.matches(KEY, cert)


def test_matches() -> None:
    assert describe.matches(KEY, make())
    assert not describe.matches(ec.generate_private_key(ec.SECP256R1()), make())
    assert not describe.matches(ed25519.Ed25519PrivateKey.generate(), make())


@pytest.mark.parametrize(
    ("now", "days"),
    [
        (END - timedelta(days=21), 21),
        (END - timedelta(days=21) + timedelta(seconds=1), 20),
        (END - timedelta(seconds=1), 0),
        (END, 0),
        (END + timedelta(seconds=1), -1),
        (END + timedelta(days=3), -3),
    ],
)
def test_days_left_rounds_down(now: datetime, days: int) -> None:
    assert describe.describe(make()).days_left(now) == days


def test_unprintable_characters_are_escaped() -> None:
    names = x509.SubjectAlternativeName([x509.DNSName("a\x1b[2J\n\\0A"), x509.UniformResourceIdentifier("x:\r\x7f")])
    facts = describe.describe(make(names, name="\x1b]0;own\x07\n\u202eé\x9b,\\"))
    assert facts.names == ("a\\1B[2J\\0A\\\\0A", "x:\\0D\\7F")
    assert facts.subject == "CN=\\1B]0\\;own\\07\\0A\\E2\\80\\AEé\\C2\\9B\\,\\\\"
    for text in (facts.subject, facts.issuer, *facts.names):
        assert text.isprintable()


def test_an_undecodable_name_is_an_error() -> None:
    broken = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"\x00\x01")
    with pytest.raises(CertificateError, match="a certificate cannot be decoded: "):
        describe.describe(make(broken))


def test_read_certificates_returns_all_in_order(tmp_path: Path) -> None:
    first, second = make(name="one"), make(name="two")
    path = tmp_path / "chain.pem"
    key = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(b"a comment\n" + pem(first) + key + pem(second))
    assert describe.read_certificates(path) == [first, second]
    assert describe.matches(describe.read_key(path), first)


DAMAGED = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b" \n", "is empty"),
        (b"hello", "contains no certificate in PEM form"),
        (make().public_bytes(Encoding.DER), "contains no certificate in PEM form"),
        (
            KEY.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()),
            "contains a private key, not a certificate",
        ),
        (DAMAGED, "contains a damaged certificate: "),
        (pem(make())[:200], "contains a damaged certificate: "),
        (pem(make()) + DAMAGED, "contains a damaged certificate: "),
        # The second one is skipped by parsers, so the chain would be served without it.
        (pem(make()) + pem(make())[:-5], "is incomplete: it has BEGIN CERTIFICATE 2x, END CERTIFICATE 1x"),
        (b"\xff\xfe-----BEGIN CERTIFICATE-----\n\xff", "contains a damaged certificate: "),
    ],
)
def test_read_certificates_names_the_file_and_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.pem"
    path.write_bytes(content)
    with pytest.raises(CertificateError) as caught:
        describe.read_certificates(path)
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"hello", "contains no private key in PEM form"),
        (pem(make()), "contains a certificate, not a private key in PEM form"),
        (
            b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
            "contains a damaged or unsupported private key",
        ),
        (
            b"-----BEGIN WEIRD PRIVATE KEY-----\nAAAA\n-----END WEIRD PRIVATE KEY-----\n",
            "contains a damaged or unsupported",
        ),
        (
            KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")),
            "the private key is encrypted; name its passphrase",
        ),
        (
            KEY.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"secret")),
            "the private key is encrypted; name its passphrase",
        ),
    ],
)
def test_read_key_names_the_file_and_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.pem"
    path.write_bytes(content)
    with pytest.raises(CertificateError) as caught:
        describe.read_key(path)
    assert str(caught.value).startswith(f"{path}: {reason}")


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=r"no\.pem: cannot be read: No such file or directory"):
        describe.read_certificates(tmp_path / "no.pem")
    with pytest.raises(CertificateError, match="cannot be read: Is a directory"):
        describe.read_key(tmp_path)
