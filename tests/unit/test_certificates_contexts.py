import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from tests.pki import NOW, Key, client_context, key_pem, read_until, s_client, tls_client, tls_server, typing
from tlstunnel.certificates import issue
from tlstunnel.certificates.contexts import ServerContext, make_context
from tlstunnel.certificates.pairs import PairFiles, read_pair
from tlstunnel.errors import CertificateError


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> issue.Issued:
    return issue.create([], tmp_path_factory.mktemp("certs"))


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def serve_pair(cert: Path, key: Path) -> ServerContext:
    """Return the context that serves `cert` with `key`."""
    return make_context((read_pair(PairFiles(cert, key)),))


def write(folder: Path, key: Key, *, start: datetime = NOW, end: datetime = NOW + timedelta(days=90)) -> Path:
    """Write a self-signed certificate for localhost, and its key next to it."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "x.pem").write_bytes(cert.public_bytes(Encoding.PEM))
    (folder / "x-key.pem").write_bytes(key_pem(key))
    return folder / "x.pem"


@pytest.mark.parametrize(
    ("version", "name"), [(ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")]
)
def test_both_versions_work_and_resume(issued: issue.Issued, version: ssl.TLSVersion, name: str) -> None:
    client = client_context(issued.ca, version)
    client.set_alpn_protocols(["h2", "http/1.1"])
    with tls_server(serve_pair(issued.cert, issued.key)) as address:
        with tls_client(address, client) as first:
            assert first.version() == name
            assert first.selected_alpn_protocol() == "http/1.1"
            assert first.compression() is None
            assert not first.session_reused
            session = first.session
        with tls_client(address, client, session) as second:
            assert second.session_reused
            assert second.version() == name


def test_an_rsa_certificate_works(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    cert = write(tmp_path, rsa_key)
    with (
        tls_server(serve_pair(cert, tmp_path / "x-key.pem")) as address,
        tls_client(address, client_context(cert, ssl.TLSVersion.TLSv1_2)) as client,
    ):
        cipher = client.cipher()
        assert cipher is not None
        assert cipher[0].startswith("ECDHE-RSA-")


def test_tls_1_1_is_refused(issued: issue.Issued) -> None:
    old = client_context(issued.ca, ssl.TLSVersion.TLSv1_1, "DEFAULT:@SECLEVEL=0")
    with (
        tls_server(serve_pair(issued.cert, issued.key)) as address,
        pytest.raises(ssl.SSLError, match="TLSV1_ALERT_PROTOCOL_VERSION"),
        tls_client(address, old),
    ):
        pass


@pytest.mark.parametrize("ciphers", ["ECDHE-ECDSA-AES128-SHA256", "ECDHE-ECDSA-AES128-SHA", "ECDHE-ECDSA-AES128-CCM"])
def test_a_client_without_a_common_suite_is_refused(issued: issue.Issued, ciphers: str) -> None:
    with (
        tls_server(serve_pair(issued.cert, issued.key)) as address,
        pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"),
        tls_client(address, client_context(issued.ca, ssl.TLSVersion.TLSv1_2, ciphers)),
    ):
        pass


@pytest.mark.parametrize("ciphers", ["AES128-GCM-SHA256", "DHE-RSA-AES128-GCM-SHA256", "ECDHE-RSA-AES128-SHA256"])
def test_an_rsa_certificate_offers_forward_secret_aead_only(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey, ciphers: str
) -> None:
    cert = write(tmp_path, rsa_key)
    with (
        tls_server(serve_pair(cert, tmp_path / "x-key.pem")) as address,
        pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"),
        tls_client(address, client_context(cert, ssl.TLSVersion.TLSv1_2, ciphers)),
    ):
        pass


@pytest.mark.parametrize(
    "order",
    [
        ("ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES128-GCM-SHA256"),
        ("ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305"),
        ("ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384"),
    ],
)
def test_the_client_chooses_among_good_suites(issued: issue.Issued, order: tuple[str, str]) -> None:
    client = client_context(issued.ca, ssl.TLSVersion.TLSv1_2, ":".join(order))
    with tls_server(serve_pair(issued.cert, issued.key)) as address, tls_client(address, client) as connection:
        cipher = connection.cipher()
        assert cipher is not None
        assert cipher[0] == order[0]


@pytest.mark.parametrize(
    "suites",
    ["TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256:TLS_AES_256_GCM_SHA384"],
)
def test_the_client_chooses_in_tls_1_3_too(issued: issue.Issued, suites: str) -> None:
    with tls_server(serve_pair(issued.cert, issued.key)) as address:
        output, _ = s_client(address, "-tls1_3", "-ciphersuites", suites).communicate("Q\n", 20)
    assert f"Cipher is {suites.split(':', maxsplit=1)[0]}" in output


def test_there_is_exactly_one_ticket(issued: issue.Issued) -> None:
    with (
        tls_server(serve_pair(issued.cert, issued.key)) as address,
        typing(process := s_client(address, "-tls1_3", "-msg")) as type_line,
    ):
        # Tickets come before the first data, so an echo shows that all of them have arrived.
        output = read_until(process, "^hello")
        type_line("echo")
        output += read_until(process, "^echo")
    assert output.endswith("echo\n")
    assert output.count("NewSessionTicket") == 1


@pytest.mark.parametrize("allowed", [False, True])
def test_renegotiation_is_refused(issued: issue.Issued, allowed: bool) -> None:
    context = serve_pair(issued.cert, issued.key)
    if allowed:  # verify that the test would notice one
        context.options &= ~ssl.OP_NO_RENEGOTIATION
        context.options |= 0x100  # OpenSSL 3's SSL_OP_ALLOW_CLIENT_RENEGOTIATION, which ssl does not name
    with tls_server(context) as address, typing(process := s_client(address, "-tls1_2")) as type_line:
        read_until(process, "^hello")
        type_line("R")
        read_until(process, "^RENEGOTIATING")
        type_line("still here")
        output = read_until(process, "no renegotiation|^still here")
    assert ("no renegotiation" in output) is not allowed
    assert ("still here" in output) is allowed


def test_session_keys_are_not_logged(issued: issue.Issued, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    with (
        tls_server(serve_pair(issued.cert, issued.key)) as address,
        tls_client(address, client_context(issued.ca)),
    ):
        pass
    assert not (tmp_path / "keys").exists()


def reason(cert: Path, key: Path) -> str:
    with pytest.raises(CertificateError) as caught:
        serve_pair(cert, key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file_is_named(issued: issue.Issued, tmp_path: Path) -> None:
    absent = tmp_path / "no.pem"
    assert reason(absent, issued.key) == f"{absent}: cannot be read: No such file or directory"
    assert reason(issued.cert, absent) == f"{absent}: cannot be read: No such file or directory"


@contextmanager
def unprivileged() -> Iterator[None]:
    """Drop root privileges, so that file modes apply."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("which", ["cert", "key"])
def test_an_unreadable_file_is_named(
    issued: issue.Issued, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    monkeypatch.chdir(tmp_path)  # relative paths: the test cannot open the parent folders to other users
    tmp_path.chmod(0o755)
    paths = {"cert": Path("cert.pem"), "key": Path("key.pem")}
    for name, source in (("cert", issued.cert), ("key", issued.key)):
        paths[name].write_bytes(source.read_bytes())
        paths[name].chmod(0o644)
    with unprivileged():
        serve_pair(paths["cert"], paths["key"])
    paths[which].chmod(0)
    with unprivileged():
        assert reason(paths["cert"], paths["key"]) == f"{paths[which]}: cannot be read: Permission denied"


@pytest.mark.parametrize(
    ("content", "why_cert", "why_key"),
    [
        ("", "is empty", "is empty"),
        ("hello", "contains no certificate in PEM form", "contains no private key in PEM form"),
    ],
)
def test_a_file_that_is_not_pem_is_named(
    issued: issue.Issued, tmp_path: Path, content: str, why_cert: str, why_key: str
) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text(content)
    assert reason(bad, issued.key) == f"{bad}: {why_cert}"
    assert reason(issued.cert, bad) == f"{bad}: {why_key}"


def test_swapped_files_are_named(issued: issue.Issued) -> None:
    assert reason(issued.key, issued.cert) == f"{issued.key}: contains a private key, not a certificate"
    assert reason(issued.cert, issued.cert) == f"{issued.cert}: contains a certificate, not a private key in PEM form"


def test_a_key_of_another_certificate_is_named(
    issued: issue.Issued, tmp_path: Path, rsa_key: rsa.RSAPrivateKey
) -> None:
    key = tmp_path / "other-key.pem"
    for other in (ec.generate_private_key(ec.SECP256R1()), rsa_key):
        key.write_bytes(key_pem(other))
        assert reason(issued.cert, key) == f"{key}: the private key does not match the certificate in {issued.cert}"


def test_a_chain_in_the_wrong_order_is_named(issued: issue.Issued, tmp_path: Path) -> None:
    cert = tmp_path / "chain.pem"
    cert.write_bytes(issued.ca.read_bytes() + issued.cert.read_bytes())
    assert reason(cert, issued.key) == f"{cert}: must begin with the certificate of {issued.key}, which is number 2"


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_an_encrypted_key_is_an_error_and_no_prompt_appears(tmp_path: Path, form: PrivateFormat) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    cert, key = write(tmp_path, private), tmp_path / "x-key.pem"
    key.write_bytes(private.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"secret")))
    assert reason(cert, key).startswith(f"{key}: the private key is encrypted; name its passphrase")


def test_an_error_that_only_openssl_finds_has_its_reason(tmp_path: Path) -> None:
    cert = write(tmp_path, rsa.generate_private_key(65537, 1024))
    assert reason(cert, tmp_path / "x-key.pem") == f"{cert}: OpenSSL refuses it: EE_KEY_TOO_SMALL"


def test_an_expired_certificate_is_served(tmp_path: Path) -> None:
    cert = write(
        tmp_path, ec.generate_private_key(ec.SECP256R1()), start=NOW - timedelta(days=9), end=NOW - timedelta(days=1)
    )
    with (
        tls_server(serve_pair(cert, tmp_path / "x-key.pem")) as address,
        pytest.raises(ssl.SSLCertVerificationError, match="expired"),
        tls_client(address, client_context(cert)),
    ):
        pass
