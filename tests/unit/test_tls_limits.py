"""What a client's certificates and sessions may take."""

import contextlib
import ssl
from pathlib import Path

import pytest

from tests.pki import Authority, cert_pem, client_context, key_pem, new_key
from tests.unit.test_certificates_clients import shake_hands
from tlstunnel.certificates.clients import ClientFiles, explain_failure, read_policy
from tlstunnel.certificates.contexts import ServerContext, make_context
from tlstunnel.certificates.pairs import PairFiles, read_pair
from tlstunnel.tls import limits

CA = Authority()


@pytest.fixture
def server(tmp_path: Path) -> ServerContext:
    (tmp_path / "ca.pem").write_bytes(cert_pem(CA.cert))
    pair = read_pair(PairFiles(*CA.pair(tmp_path, "server")))
    return make_context((pair,), read_policy(ClientFiles(tmp_path / "ca.pem", required=False)))


def test_this_python_can_set_them() -> None:
    """If not, the layout of contexts may have changed: see the module before adding a version."""
    assert limits.apply_limits(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


def test_without_openssl_in_reach_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_control", None)
    assert not limits.apply_limits(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    monkeypatch.setattr(limits, "_KNOWN", False)
    assert limits._find_control() is None
    monkeypatch.setattr(limits, "_KNOWN", True)
    monkeypatch.setattr("_ssl.__file__", "/nowhere/_ssl.so")
    assert limits._find_control() is None
    monkeypatch.delattr("_ssl.__file__")
    assert limits._find_control() is None


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_long_chain_is_refused_before_it_is_parsed(
    server: ServerContext, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    key = new_key()
    leaf = CA.sign(key, "ann", ())
    fake = Authority("fake").cert
    for count, reason in ((20, None), (40, "tls: client certificate chain too long")):
        (tmp_path / "client.pem").write_bytes(cert_pem(leaf, *[fake] * count) + key_pem(key))
        client = client_context(tmp_path / "ca.pem", version)
        client.load_cert_chain(tmp_path / "client.pem")
        error = shake_hands(server, client)
        assert (None if error is None else explain_failure(error)[0]) == reason


def open_and_close(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Make a TLS handshake in memory, and end the connection properly: OpenSSL does not keep the session otherwise."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    there = server.wrap_bio(up, down, server_side=True)
    here = client.wrap_bio(down, up, server_hostname="localhost")
    for act in (here.do_handshake, there.do_handshake, here.do_handshake, there.do_handshake, there.unwrap):
        with contextlib.suppress(ssl.SSLWantReadError):
            act()


def test_clients_without_tickets_do_not_fill_the_memory(
    server: ServerContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_SESSIONS", 16)
    limits.apply_limits(server)
    client = client_context(tmp_path / "ca.pem", ssl.TLSVersion.TLSv1_2)
    client.options |= ssl.OP_NO_TICKET
    for _ in range(20):
        open_and_close(server, client)
    assert 0 < server.session_stats()["number"] <= 16
