import ipaddress
import os
import stat
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store

from tlstunnel.addresses import normalise_name
from tlstunnel.certificates import describe, issue
from tlstunnel.errors import CertificateError

NOW = datetime.now(UTC)


def verify(ca: Path, cert: Path, subject: x509.DNSName | x509.IPAddress) -> None:
    verifier = PolicyBuilder().store(Store(describe.read_certificates(ca))).build_server_verifier(subject)
    leaf, *rest = describe.read_certificates(cert)
    verifier.verify(leaf, rest)


def pem(key: PrivateKeyTypes) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def write_ca(
    folder: Path,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    *,
    ca: bool = True,
    start: timedelta = timedelta(days=-10),
    end: timedelta = timedelta(days=10),
) -> x509.Certificate:
    """Write a CA as another program creates it, without a subject key identifier."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody's CA")])
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + start)
        .not_valid_after(NOW + end)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(cert.public_bytes(Encoding.PEM))
    (folder / "ca-key.pem").write_bytes(pem(key))
    return cert


def test_the_default_name_is_localhost(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "certs"
    issued = issue.create([], folder)
    assert issued == issue.Issued(
        folder / "ca.pem", folder / "localhost.pem", folder / "localhost-key.pem", ca_created=True
    )
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert sorted(path.name for path in folder.iterdir()) == [
        "ca-key.pem",
        "ca.pem",
        "localhost-key.pem",
        "localhost.pem",
    ]
    chain = describe.read_certificates(issued.cert)
    assert chain[1:] == describe.read_certificates(issued.ca)
    assert describe.describe(chain[0]).names == ("localhost", "127.0.0.1", "::1")
    assert describe.matches(describe.read_key(issued.key), chain[0])


def test_openssl_and_cryptography_verify_every_name(tmp_path: Path) -> None:
    issued = issue.create(["*.example.com", "bücher.example", "10.0.0.5", "fe80::1"], tmp_path)
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", str(issued.ca)]
    for check in (
        ["-verify_hostname", "a.example.com"],
        ["-verify_hostname", "xn--bcher-kva.example"],
        ["-verify_ip", "10.0.0.5"],
        ["-verify_ip", "fe80::1"],
    ):
        subprocess.run([*command, *check, str(issued.cert)], check=True, capture_output=True)
    refused = subprocess.run(
        [*command, "-verify_hostname", "a.b.example.com", str(issued.cert)], check=False, capture_output=True
    )
    assert refused.returncode != 0
    verify(issued.ca, issued.cert, x509.DNSName("a.example.com"))
    verify(issued.ca, issued.cert, x509.IPAddress(ipaddress.ip_address("fe80::1")))
    with pytest.raises(x509.verification.VerificationError):
        verify(issued.ca, issued.cert, x509.DNSName("example.com"))


def test_ca_and_leaf_have_only_their_own_usages(tmp_path: Path) -> None:
    leaf, ca = describe.read_certificates(issue.create([], tmp_path).cert)
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert (usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature) == (True, True, False)
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature) == (False, False, True)
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.SERVER_AUTH]
    own = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert (
        leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier == own.key_identifier
    )
    for cert in (leaf, ca):
        key = cert.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert key.curve.name == "secp256r1"
        assert timedelta(minutes=50) < datetime.now(UTC) - cert.not_valid_before_utc < timedelta(minutes=70)
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == timedelta(days=397)
    assert ca.not_valid_after_utc - ca.not_valid_before_utc == timedelta(days=3650)


def test_keys_are_private_even_with_an_open_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[tuple[bool, int]] = []
    real_open = os.open

    def recording_open(path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = real_open(path, flags, mode)
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL
            modes.append((path.name.endswith("-key.pem"), stat.S_IMODE(os.fstat(descriptor).st_mode)))
        return descriptor

    monkeypatch.setattr(os, "open", recording_open)
    before = os.umask(0)
    try:
        issue.create([], tmp_path)
    finally:
        os.umask(before)
    assert modes == [(True, 0o600), (False, 0o644)] * 2
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {
        "ca.pem": 0o644,
        "ca-key.pem": 0o600,
        "localhost.pem": 0o644,
        "localhost-key.pem": 0o600,
    }


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("Example.COM", "example.com"),
        ("*.example.com", "_wildcard.example.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("*.bücher.example", "_wildcard.xn--bcher-kva.example"),
        ("XN--bcher-kva.example", "xn--bcher-kva.example"),
        ("::1", "__1"),
        ("2001:DB8:0::5", "2001_db8__5"),
        ("127.0.0.1", "127.0.0.1"),
        ("r3---sn-x.example", "r3---sn-x.example"),
    ],
)
def test_the_first_name_names_the_files(tmp_path: Path, name: str, stem: str) -> None:
    issued = issue.create([name, "second.example"], tmp_path)
    assert issued.cert == tmp_path / f"{stem}.pem"
    assert issued.key == tmp_path / f"{stem}-key.pem"
    assert issued.cert.exists()
    assert issued.key.exists()


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../evil",
        "a/b",
        "a\x00b",
        "a\nb",
        "a b",
        "a..b",
        ".a",
        "-a.example",
        "a-.example",
        "a/é",
        "xn--zz.example",
        "*",
        "*.",
        "*a.example",
        "a.*.example",
        "*.*.example",
        "*.10.0.0.1",
        "1.2.3.999",
        "10.0.0.0/8",
        "[fe80::1%eth0]",
        "fe80::1%eth0",
        "a.example:443",
        "http://example.com",
        "a" * 64 + ".example",
        ".".join(["a" * 49] * 5) + ".example",
    ],
)
def test_an_invalid_name_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "certs"
    with pytest.raises(CertificateError, match=r"is not a|no certificate is valid|has a port") as caught:
        issue.create(["fine.example", name], folder)
    assert str(caught.value).isprintable()
    assert "\n" not in str(caught.value)
    assert not folder.exists()


@pytest.mark.parametrize(
    "name", ["a_b.example", "_acme.Example.", "[::1]", "*.a_b.example", "b\u00fccher.example", "10.0.0.5"]
)
def test_what_a_site_can_be_named_can_be_in_a_certificate(tmp_path: Path, name: str) -> None:
    issued = issue.create([name], tmp_path)
    assert describe.list_hosts(describe.read_certificates(issued.cert)[0]) == {normalise_name(name)}


def test_a_client_certificate_can_be_used_by_clients_only(tmp_path: Path) -> None:
    issued = issue.create_client("M\u00fcller, of sales", tmp_path)
    assert issued.cert == tmp_path / "client-M\u00fcller, of sales.pem"
    leaf = describe.read_certificates(issued.cert)[0]
    assert describe.matches(describe.read_key(issued.key), leaf)
    assert stat.S_IMODE(issued.key.stat().st_mode) == 0o600
    assert leaf.subject == x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "M\u00fcller, of sales")])
    assert describe.allows(leaf, ExtendedKeyUsageOID.CLIENT_AUTH)
    assert not describe.allows(leaf, ExtendedKeyUsageOID.SERVER_AUTH)
    command = ["openssl", "verify", "-x509_strict", "-CAfile", str(issued.ca), "-purpose"]
    assert subprocess.run([*command, "sslclient", issued.cert], check=False, capture_output=True).returncode == 0
    assert subprocess.run([*command, "sslserver", issued.cert], check=False, capture_output=True).returncode != 0
    with pytest.raises(CertificateError, match="--force"):
        issue.create_client("M\u00fcller, of sales", tmp_path)
    longest = issue.create_client("a" * 64, tmp_path)
    assert not longest.ca_created


@pytest.mark.parametrize("name", ["", " ", "ann ", "../ann", "a/b", "a\nb", "a\0b", "\u202eann", "a" * 65])
def test_a_name_that_is_no_file_name_is_refused_for_a_client(tmp_path: Path, name: str) -> None:
    with pytest.raises(CertificateError, match="cannot be the name of a client") as caught:
        issue.create_client(name, tmp_path / "certs")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "certs").exists()


def test_openssl_refuses_what_was_revoked(tmp_path: Path) -> None:
    ann, bob = (issue.create_client(name, tmp_path) for name in ("ann", "bob"))
    command = ["openssl", "verify", "-crl_check", "-CAfile", str(ann.ca), "-CRLfile", str(tmp_path / "ca.crl")]

    def is_accepted(issued: issue.Issued) -> bool:
        return subprocess.run([*command, issued.cert], check=False, capture_output=True).returncode == 0

    assert issue.revoke([], tmp_path) == tmp_path / "ca.crl"
    assert is_accepted(ann)
    issue.revoke([ann.cert], tmp_path)
    assert (is_accepted(ann), is_accepted(bob)) == (False, True)
    issue.revoke([bob.cert, ann.cert], tmp_path)
    assert (is_accepted(ann), is_accepted(bob)) == (False, False)
    found = x509.load_pem_x509_crl((tmp_path / "ca.crl").read_bytes())
    assert len(found) == 2
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_only_certificates_of_the_ca_are_revoked(tmp_path: Path) -> None:
    other = issue.create_client("ann", tmp_path / "other")
    with pytest.raises(CertificateError, match="there is no test CA"):
        issue.revoke([other.cert], tmp_path)
    issue.create([], tmp_path)
    with pytest.raises(CertificateError, match="was not issued by"):
        issue.revoke([other.cert], tmp_path)
    # Programs that look the whole chain up in the list, as OpenSSL can, would refuse every client.
    with pytest.raises(CertificateError, match="is the CA itself"):
        issue.revoke([tmp_path / "ca.pem"], tmp_path)
    assert not (tmp_path / "ca.crl").exists()
    for content in (b"hello", issue.revoke([], tmp_path / "other").read_bytes()):
        (tmp_path / "ca.crl").write_bytes(content)
        with pytest.raises(CertificateError, match="is not a revocation list of the CA beside it"):
            issue.revoke([], tmp_path)


def test_the_longest_dns_name_is_accepted(tmp_path: Path) -> None:
    name = ".".join(["a" * 49] * 5) + ".exa"
    assert len(name) == 253
    issued = issue.create(["short.example", name], tmp_path)
    verify(issued.ca, issued.cert, x509.DNSName(name))
    long = issue.create([name[100:]], tmp_path)
    verify(long.ca, long.cert, x509.DNSName(name[100:]))


@pytest.mark.parametrize("name", ["ca", "CA", "ca-key", "a.example-key"])
def test_a_name_whose_files_could_be_another_pairs_cannot_be_first(tmp_path: Path, name: str) -> None:
    before = issue.create([], tmp_path).ca.read_bytes()
    with pytest.raises(CertificateError, match="cannot be the first name"):
        issue.create([name], tmp_path, force=True)
    assert (tmp_path / "ca.pem").read_bytes() == before
    assert (
        describe.describe(describe.read_certificates(issue.create(["a", name], tmp_path).cert)[0]).names[1]
        == name.lower()
    )


def test_duplicate_names_are_used_once(tmp_path: Path) -> None:
    issued = issue.create(["a.example", "A.example", "::1", "0:0::1"], tmp_path)
    assert describe.describe(describe.read_certificates(issued.cert)[0]).names == ("a.example", "::1")


@pytest.mark.parametrize("left", ["localhost.pem", "localhost-key.pem"])
def test_an_existing_file_is_kept_without_force(tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_text("mine")
    with pytest.raises(CertificateError, match=f"{left}: already exists; --force"):
        issue.create([], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [left]
    assert (tmp_path / left).read_text() == "mine"


def test_force_replaces_the_leaf_and_never_the_ca(tmp_path: Path) -> None:
    first = issue.create([], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    second = issue.create([], tmp_path, force=True)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert (first.ca_created, second.ca_created) == (True, False)
    assert {name for name in before if before[name] != after[name]} == {"localhost.pem", "localhost-key.pem"}
    assert stat.S_IMODE(second.key.stat().st_mode) == 0o600
    verify(second.ca, second.cert, x509.DNSName("localhost"))


def test_a_ca_from_elsewhere_is_used_and_outlives_its_leaves(tmp_path: Path) -> None:
    ca = write_ca(tmp_path, rsa.generate_private_key(65537, 2048), start=timedelta(minutes=-5))
    issued = issue.create([], tmp_path)
    leaf = describe.read_certificates(issued.cert)[0]
    assert not issued.ca_created
    assert leaf.not_valid_before_utc == ca.not_valid_before_utc
    assert leaf.not_valid_after_utc == ca.not_valid_after_utc
    subprocess.run(["openssl", "verify", "-CAfile", issued.ca, issued.cert], check=True, capture_output=True)


def refused(folder: Path, reason: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CertificateError, match=reason) as caught:
        issue.create([], folder)
    assert str(folder / "ca") in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("missing", ["ca.pem", "ca-key.pem"])
def test_half_a_ca_is_refused(tmp_path: Path, missing: str) -> None:
    write_ca(tmp_path, ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / missing).unlink()
    refused(tmp_path, f"{missing}: cannot be read: No such file")


def test_a_key_that_does_not_match_the_ca_is_refused(tmp_path: Path) -> None:
    write_ca(tmp_path, ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "ca-key.pem").write_bytes(pem(ec.generate_private_key(ec.SECP256R1())))
    refused(tmp_path, r"ca-key.pem: is not the key of .*ca.pem; remove")


@pytest.mark.parametrize("key", [x25519.X25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()])
def test_a_ca_key_of_an_unsupported_type_is_refused(tmp_path: Path, key: PrivateKeyTypes) -> None:
    write_ca(tmp_path, ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "ca-key.pem").write_bytes(pem(key))
    refused(tmp_path, "the key of a CA must be ECDSA or RSA")


def test_a_damaged_ca_key_is_refused(tmp_path: Path) -> None:
    write_ca(tmp_path, ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "ca-key.pem").write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    refused(tmp_path, "ca-key.pem: contains a damaged or unsupported private key")


def test_a_leaf_instead_of_the_ca_is_refused(tmp_path: Path) -> None:
    write_ca(tmp_path, ec.generate_private_key(ec.SECP256R1()), ca=False)
    refused(tmp_path, "ca.pem: is not the certificate of a CA")


@pytest.mark.parametrize(
    ("start", "end"), [(timedelta(days=-9), timedelta(days=-1)), (timedelta(days=1), timedelta(days=9))]
)
def test_a_ca_that_is_not_valid_now_is_refused(tmp_path: Path, start: timedelta, end: timedelta) -> None:
    write_ca(tmp_path, ec.generate_private_key(ec.SECP256R1()), start=start, end=end)
    refused(tmp_path, "ca.pem: is valid from 2.* only; remove")


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CertificateError, match="file/certs: cannot be written: Not a directory"):
        issue.create([], tmp_path / "file" / "certs")
    with pytest.raises(CertificateError, match="file: cannot be written: File exists"):
        issue.create([], tmp_path / "file")


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    issue.create([], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CertificateError, match="No space left on device"):
        issue.create([], tmp_path, force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_ensure_creates_once(tmp_path: Path) -> None:
    first = issue.ensure(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    second = issue.ensure(tmp_path)
    assert (first.ca_created, second.ca_created) == (True, False)
    assert (first.ca, first.cert, first.key) == (second.ca, second.cert, second.key)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_ensure_renews_a_certificate_that_expires_within_a_day(tmp_path: Path) -> None:
    write_ca(tmp_path, ec.generate_private_key(ec.SECP256R1()), end=timedelta(hours=23))
    first = issue.ensure(tmp_path).cert.read_bytes()
    assert issue.ensure(tmp_path).cert.read_bytes() != first
    key = describe.read_key(tmp_path / "ca-key.pem")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    write_ca(tmp_path, key, end=timedelta(hours=26))
    first = issue.ensure(tmp_path).cert.read_bytes()
    assert issue.ensure(tmp_path).cert.read_bytes() == first


@pytest.mark.parametrize("name", ["localhost.pem", "localhost-key.pem"])
def test_ensure_replaces_half_a_pair(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(issue.ensure(tmp_path / "other").cert.with_name(name).read_bytes())
    issued = issue.ensure(tmp_path)
    assert describe.matches(describe.read_key(issued.key), describe.read_certificates(issued.cert)[0])
    issued.cert.with_name(name).write_bytes((tmp_path / "other" / name).read_bytes())
    issued = issue.ensure(tmp_path)
    assert describe.matches(describe.read_key(issued.key), describe.read_certificates(issued.cert)[0])
    verify(issued.ca, issued.cert, x509.DNSName("localhost"))


def test_ensure_follows_a_new_ca(tmp_path: Path) -> None:
    issue.ensure(tmp_path)
    (tmp_path / "ca.pem").unlink()
    (tmp_path / "ca-key.pem").unlink()
    assert issue.create(["other.example"], tmp_path).ca_created
    issue.ensure(tmp_path)
    verify(tmp_path / "ca.pem", tmp_path / "localhost.pem", x509.DNSName("localhost"))


def test_two_processes_at_once_share_one_ca(tmp_path: Path) -> None:
    issued: list[issue.Issued] = []
    folder = tmp_path / "certs"
    threads = [threading.Thread(target=lambda: issued.append(issue.ensure(folder))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sum(each.ca_created for each in issued) == 1
    assert len(issued) == 8
    verify(folder / "ca.pem", folder / "localhost.pem", x509.DNSName("localhost"))


def test_a_file_system_without_locks_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", unsupported)
    assert issue.create([], tmp_path).cert.exists()
