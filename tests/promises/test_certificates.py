"""Certificates of sites and clients, through a tunnel: renewal, several keys, accepted clients, resumed sessions."""

import contextlib
import os
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding
from cryptography.x509.oid import NameOID

from tests.harness import (
    TIMEOUT,
    Tunnel,
    WebsocketsOrigin,
    eventually,
    handshake_request,
    receive_exactly,
    switching_protocols,
    upgrade,
)
from tests.pki import DAY, NOW, Authority, cert_pem, client_context, key_pem, new_key, read_until, s_client, typing
from tests.promises.scripted_origin import ScriptedOrigin
from tests.promises.wire import read_until_end


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def ca(authority: Authority, tmp_path: Path) -> Path:
    file = tmp_path / "ca.pem"
    file.write_bytes(cert_pem(authority.cert))
    return file


@pytest.fixture(scope="module")
def origin() -> Iterator[WebsocketsOrigin]:
    with WebsocketsOrigin() as origin:
        yield origin


def site(
    origin: WebsocketsOrigin | ScriptedOrigin, folder: Path, more: str = "", name: str = "localhost", stem: str = "a"
) -> str:
    return (
        f'[[sites]]\nnames = ["{name}"]\norigins = ["{origin.address}"]\n'
        f'cert = "{folder}/{stem}.pem"\nkey = "{folder}/{stem}-key.pem"\n{more}\n'
    )


def serving(*sites: str, environment: dict[str, str] | None = None) -> Tunnel:
    return Tunnel(None, None, config='listen = ["127.0.0.1:0"]\n' + "".join(sites), environment=environment)


@contextlib.contextmanager
def connected(
    tunnel: Tunnel, context: ssl.SSLContext, name: str = "localhost", session: ssl.SSLSession | None = None
) -> Iterator[ssl.SSLSocket]:
    with (
        socket.create_connection(("127.0.0.1", tunnel.port), TIMEOUT) as plain,
        context.wrap_socket(plain, server_hostname=name, session=session) as client,
    ):
        yield client


def served(tunnel: Tunnel, context: ssl.SSLContext, name: str = "localhost") -> x509.Certificate:
    with connected(tunnel, context, name) as client:
        der = client.getpeercert(binary_form=True)
        assert der is not None
        return x509.load_der_x509_certificate(der)


def status(tunnel: Tunnel, context: ssl.SSLContext, name: str = "localhost") -> int:
    with connected(tunnel, context, name) as client:
        answer = upgrade(client, host=name)
        if answer.status != 101:
            read_until_end(client)
        return answer.status


def test_a_renewed_pair_is_served_and_tunnels_stay_open(
    origin: WebsocketsOrigin, authority: Authority, ca: Path, tmp_path: Path
) -> None:
    authority.pair(tmp_path, "a")
    context = client_context(ca)
    with serving(site(origin, tmp_path)) as tunnel, connected(tunnel, context) as client:
        assert upgrade(client).status == 101
        first = served(tunnel, context)
        # One file after the other, as programs write them, perhaps with a check by the watcher in between.
        key = new_key()
        (tmp_path / "a.pem").write_bytes(cert_pem(authority.sign(key)))
        assert served(tunnel, context).serial_number == first.serial_number
        (tmp_path / "a-key.pem").write_bytes(key_pem(key))
        eventually(lambda: served(tunnel, context).serial_number != first.serial_number)
        assert tunnel.wait_records(1, "certificate replaced")
        client.sendall(b"\x81\x85\0\0\0\0hello")
        assert receive_exactly(client, 7) == b"\x81\x05hello"


def test_an_invalid_pair_replaces_nothing(
    origin: WebsocketsOrigin, authority: Authority, ca: Path, tmp_path: Path
) -> None:
    """Four sites have a pair each, and each pair becomes invalid in another way."""
    names = ("nonsense", "another-key", "expired", "gone")
    certs = {name: authority.pair(tmp_path, name, names=(x509.DNSName(f"{name}.example"),))[0] for name in names}
    context = client_context(ca)

    def numbers() -> list[int]:
        return [served(tunnel, context, f"{name}.example").serial_number for name in names]

    with serving(*(site(origin, tmp_path, name=f"{name}.example", stem=name) for name in names)) as tunnel:
        first = numbers()
        certs["nonsense"].write_text("this is no certificate")
        certs["another-key"].write_bytes(
            cert_pem(authority.sign(new_key(), names=(x509.DNSName("another-key.example"),)))
        )
        authority.pair(
            tmp_path, "expired", names=(x509.DNSName("expired.example"),), start=NOW - 9 * DAY, end=NOW - DAY
        )
        certs["gone"].unlink()
        reasons = [record["reason"] for record in tunnel.wait_records(4, "certificate not replaced")]
        assert all(any(f"{tmp_path}/{name}" in reason for reason in reasons) for name in names), reasons
        assert numbers() == first
        # A reload reports the same, and is not refused.
        lines = tunnel.reload()
        assert all(any(f"{tmp_path}/{name}" in line for line in lines) for name in names), lines
        assert numbers() == first
        for name in names:
            authority.pair(tmp_path, name, names=(x509.DNSName(f"{name}.example"),))
        eventually(lambda: not set(numbers()) & set(first))


def test_an_expired_certificate_is_a_warning_at_the_start(
    origin: WebsocketsOrigin, authority: Authority, tmp_path: Path
) -> None:
    authority.pair(tmp_path, "a", start=NOW - 9 * DAY, end=NOW - DAY)
    authority.pair(tmp_path, "b", start=NOW - 85 * DAY, end=NOW + 5 * DAY)
    with serving(site(origin, tmp_path), site(origin, tmp_path, name="b.example", stem="b")) as tunnel:
        reasons = [record["reason"] for record in tunnel.wait_records(2, "certificate warning")]
        assert any("a.pem" in reason and "expired" in reason for reason in reasons)
        assert any("b.pem" in reason and "expires on" in reason for reason in reasons)
        (days,) = tunnel.wait_records(1, "certificates")
        assert days["count"] == 2
        assert days["days_left"] < 0


def test_rsa_and_ecdsa_and_encrypted_keys(
    origin: WebsocketsOrigin, authority: Authority, ca: Path, tmp_path: Path
) -> None:
    key = rsa.generate_private_key(65537, 2048)
    authority.pair(tmp_path, "a")
    (tmp_path / "rsa.pem").write_bytes(cert_pem(authority.sign(key)))
    (tmp_path / "rsa-key.pem").write_bytes(key_pem(key, BestAvailableEncryption(b"open sesame")))
    ec_key = (tmp_path / "a-key.pem").read_bytes()
    assert ec_key.startswith(b"-----BEGIN PRIVATE KEY")
    more = (
        f'[[sites.certificates]]\ncert = "{tmp_path}/rsa.pem"\nkey = "{tmp_path}/rsa-key.pem"\n'
        'passphrase_env = "RSA_PASSPHRASE"\n'
    )
    with serving(site(origin, tmp_path, more), environment={"RSA_PASSPHRASE": "open sesame"}) as tunnel:
        for kind, ciphers in (("RSA", "ECDHE-RSA-AES128-GCM-SHA256"), ("ECDSA", "ECDHE-ECDSA-AES128-GCM-SHA256")):
            context = client_context(ca, ssl.TLSVersion.TLSv1_2, ciphers)
            found = served(tunnel, context).public_key()
            assert isinstance(found, rsa.RSAPublicKey) == (kind == "RSA")


@pytest.fixture
def clients(tmp_path: Path) -> tuple[Authority, Path]:
    authority = Authority("Devices CA")
    (tmp_path / "devices.pem").write_bytes(cert_pem(authority.cert))
    return authority, tmp_path / "devices.pem"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_only_clients_of_the_authority_are_accepted(  # noqa: PLR0917
    origin: WebsocketsOrigin,
    authority: Authority,
    clients: tuple[Authority, Path],
    ca: Path,
    tmp_path: Path,
    version: ssl.TLSVersion,
) -> None:
    authority.pair(tmp_path, "a")
    ann = clients[0].pair(tmp_path, "ann", "ann", names=())
    stranger = authority.pair(tmp_path, "stranger", "ann", names=())
    with serving(site(origin, tmp_path, f'client_ca = "{clients[1]}"\n')) as tunnel:
        assert status(tunnel, client_context(ca, version, pair=ann)) == 101
        for pair in (None, stranger):
            with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
                status(tunnel, client_context(ca, version, pair=pair))


def test_the_subject_reaches_the_origin_and_cannot_be_claimed(
    authority: Authority, clients: tuple[Authority, Path], ca: Path, tmp_path: Path
) -> None:
    authority.pair(tmp_path, "a")
    ann = clients[0].pair(tmp_path, "ann", "ann, of sales", names=())
    forged = [("X-Client-Subject", "CN=root"), ("x_client_subject", "CN=root"), ("X-CLIENT-SUBJECT", "CN=root")]
    rule = '[[sites.rules]]\nname = "who"\nwhen = \'client_subject.contains("nobody")\'\naction = "block"\n'
    more = f'client_ca = "{clients[1]}"\nclient_auth = "request"\n{rule}'
    with ScriptedOrigin() as origin, serving(site(origin, tmp_path, more)) as tunnel:
        for pair, expected in ((ann, [b"CN=ann\\, of sales"]), (None, [])):
            traffic = origin.play(switching_protocols)
            with connected(tunnel, client_context(ca, pair=pair)) as client:
                assert upgrade(client, headers=forged).status == 101
            eventually(lambda sent=traffic: sent.heads)  # type: ignore[misc]
            found = re.findall(rb"(?i)\r\nx[-_]client[-_]subject: ([^\r]*)", traffic.heads[0])
            assert found == expected


def test_the_origin_gets_no_forged_common_name(
    authority: Authority, clients: tuple[Authority, Path], ca: Path, tmp_path: Path
) -> None:
    authority.pair(tmp_path, "a")
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, "alice"), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "x,CN=admin")]
    )
    pair = clients[0].pair(tmp_path, "alice", subject, names=())
    more = f'client_ca = "{clients[1]}"\nsend_proxy_protocol = "v2-tls"\n'
    with ScriptedOrigin() as origin, serving(site(origin, tmp_path, more)) as tunnel:
        traffic = origin.play(b"")
        with connected(tunnel, client_context(ca, pair=pair)) as client:
            client.sendall(handshake_request("/"))
            eventually(lambda: traffic.heads)
        # The signature of the header looks like the end of a head.
        header = traffic.surplus_at_end().partition(b"GET / ")[0]
        assert b"\x22\0\x05alice" in header
        assert b"admin" not in header


def test_the_allow_list_and_the_revocation_list(
    origin: WebsocketsOrigin, authority: Authority, clients: tuple[Authority, Path], ca: Path, tmp_path: Path
) -> None:
    authority.pair(tmp_path, "a")
    devices, file = clients
    ann = devices.pair(tmp_path, "ann", "ann", names=())
    bob = devices.pair(tmp_path, "bob", "bob", names=(x509.DNSName("bob.example"),))
    eve = devices.pair(tmp_path, "eve", "eve", names=())
    crl = tmp_path / "crl.pem"
    crl.write_bytes(devices.revoke().public_bytes(Encoding.PEM))
    more = f'client_ca = "{file}"\nclient_crl = "{crl}"\nclient_allow = ["cn:ann", "dns:bob.example"]\n'
    with serving(site(origin, tmp_path, more)) as tunnel:
        assert status(tunnel, client_context(ca, pair=ann)) == 101
        assert status(tunnel, client_context(ca, pair=bob)) == 101
        assert status(tunnel, client_context(ca, pair=eve)) == 403
        record = tunnel.wait_record(lambda record: record.get("reason") == "client certificate")
        assert record["status"] == 403
        revoked = x509.load_pem_x509_certificate(ann[0].read_bytes())
        new = crl.with_suffix(".new")
        new.write_bytes(devices.revoke(revoked).public_bytes(Encoding.PEM))
        os.replace(new, crl)  # noqa: PTH105

        def refused() -> bool:
            try:
                return status(tunnel, client_context(ca, pair=ann)) == 403
            except (OSError, AssertionError):
                return False

        eventually(refused)
        # Each cause has a reason of its own.
        for _ in range(3):
            with contextlib.suppress(OSError, AssertionError):
                status(tunnel, client_context(ca))
        for reason in ("client certificate revoked", "tls: no client certificate"):
            tunnel.wait_record(lambda record, reason=reason: record.get("reason") == reason)  # type: ignore[misc]
        assert status(tunnel, client_context(ca, pair=bob)) == 101
    # What was suppressed is logged at the end at the latest.
    samples = [
        record["suppressed"] for record in tunnel.records() if record.get("reason") == "tls: no client certificate"
    ]
    assert len(samples) + sum(samples) == 3


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_a_ticket_of_an_open_site_does_not_open_a_closed_one(
    origin: WebsocketsOrigin,
    authority: Authority,
    clients: tuple[Authority, Path],
    tmp_path: Path,
    version: str,
) -> None:
    """With the client of openssl, which offers any session that it is given."""
    names = (x509.DNSName("localhost"), x509.DNSName("closed.example"))
    authority.pair(tmp_path, "a", names=names)
    session = tmp_path / "session.pem"
    closed = site(origin, tmp_path, f'client_ca = "{clients[1]}"\n', name="closed.example")
    with serving(site(origin, tmp_path), closed) as tunnel:
        where = ("127.0.0.1", tunnel.port)

        def ask(name: str, *options: str) -> str:
            process = s_client(where, "-servername", name, version, "-ign_eof", *options)
            with typing(process) as type_line:
                type_line(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r")
                return read_until(process, "426 Upgrade Required|alert|:error:|closed")

        assert "426" in ask("localhost", "-sess_out", str(session))
        # The ticket is valid where it was issued.
        again = ask("localhost", "-sess_in", str(session))
        assert "Reused, " in again
        assert "426" in again
        elsewhere = ask("closed.example", "-sess_in", str(session))
        assert "Reused, " not in elsewhere
        assert "426" not in elsewhere
