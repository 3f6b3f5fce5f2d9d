"""The client context for origins, the errors if files are wrong, and the sessions that are kept."""

import asyncio
import socket
import ssl
import threading
from pathlib import Path

import pytest

from tests.harness import Certificate
from tests.promises.secure import Authority, server_context
from tlstunnel.addresses import OriginAddress
from tlstunnel.errors import CertificateError
from tlstunnel.journal.events import Reason
from tlstunnel.origins import tls
from tlstunnel.origins.errors import OriginTLSFailed
from tlstunnel.origins.tls import Contexts, OriginTLS, create_client_context, explain
from tlstunnel.sockets.channel import Channel
from tlstunnel.sockets.deadlines import Wakeup
from tlstunnel.sockets.readiness import readiness
from tlstunnel.tls.truncation import Truncated


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def test_it_verifies_unless_configured_otherwise(authority: Authority) -> None:
    for context in (create_client_context(), create_client_context(ca=authority.file)):
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert not context.hostname_checks_common_name
        assert not context.options & ssl.OP_IGNORE_UNEXPECTED_EOF
    off = create_client_context(verify=False)
    assert (off.verify_mode, off.check_hostname) == (ssl.CERT_NONE, False)


def test_it_trusts_only_the_given_authority(authority: Authority) -> None:
    assert create_client_context(ca=authority.file).cert_store_stats()["x509"] == 1


def test_it_writes_no_keys(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    assert create_client_context(ca=authority.file).keylog_filename is None
    assert not (tmp_path / "keys").exists()


def test_contexts_are_shared_if_their_settings_are_equal(authority: Authority) -> None:
    contexts = Contexts()
    first = contexts.get(ca=authority.file)
    assert contexts.get(ca=authority.file) is first
    assert contexts.get(ca=authority.file, verify=False) is not first
    assert Contexts().get(ca=authority.file) is not first


def test_an_error_in_a_file_names_it(authority: Authority, tmp_path: Path) -> None:
    pair, other = authority.issue("one"), authority.issue("two")
    absent, empty = tmp_path / "absent.pem", tmp_path / "empty.pem"
    empty.write_text("")
    damaged = tmp_path / "damaged.pem"
    damaged.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for ca in (absent, empty, damaged, pair.key):
        with pytest.raises(CertificateError, match=ca.name):
            create_client_context(ca=ca)
    for cert, key, named in (
        (absent, pair.key, absent),
        (pair.cert, absent, absent),
        (pair.cert, pair.cert, pair.cert),
    ):
        with pytest.raises(CertificateError, match=named.name):
            create_client_context(cert=cert, key=key)
    with pytest.raises(CertificateError, match="does not match"):
        create_client_context(cert=pair.cert, key=other.key)


def test_a_pair_in_one_file(authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue("one")
    both = tmp_path / "both.pem"
    both.write_bytes(pair.key.read_bytes() + pair.cert.read_bytes())
    create_client_context(cert=both)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("WRONG_VERSION_NUMBER", "not TLS"),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "handshake failure; it may ask for a client certificate"),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "origin_cert and origin_key"),
        ("TLSV1_ALERT_UNKNOWN_CA", "the alert: unknown ca"),
        ("TLSV1_UNRECOGNIZED_NAME", "unrecognized name"),
        ("UNSUPPORTED_PROTOCOL", "UNSUPPORTED_PROTOCOL"),
    ],
)
def test_openssl_errors_have_readable_messages(reason: str, words: str) -> None:
    error = ssl.SSLError(1, reason)
    error.reason = reason
    assert words in explain(error)


def test_an_end_without_close_notify_has_a_readable_message() -> None:
    assert "closed the connection" in explain(Truncated())


def test_other_errors_have_the_messages_of_the_system() -> None:
    assert explain(ConnectionResetError(104, "Connection reset by peer")) == "Connection reset by peer"


class _Server:
    """Sends one byte on each connection, in TLS."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = OriginAddress("localhost", self._listener.getsockname()[1])
        self.resumed: list[bool] = []

    def serve(self, count: int) -> threading.Thread:
        thread = threading.Thread(target=self._serve, args=(count,))
        thread.start()
        return thread

    def close(self) -> None:
        self._listener.close()

    def _serve(self, count: int) -> None:
        for _ in range(count):
            plain, _ = self._listener.accept()
            plain.settimeout(10)
            try:
                with self._context.wrap_socket(plain, server_side=True) as sock:
                    self.resumed.append(bool(sock.session_reused))
                    sock.sendall(b"x")
                    sock.recv(1)
            except OSError:
                plain.close()


async def _once(how: OriginTLS, address: OriginAddress) -> None:
    loop = asyncio.get_running_loop()
    watched = readiness(loop)
    client, other = socket.socketpair()
    sock = socket.create_connection(("127.0.0.1", address.port))
    for each in (client, sock):
        each.setblocking(False)
    wakeup = Wakeup(loop, loop.time() + 10)
    channel, of_client = Channel(sock, watched, wakeup), Channel(client, watched, wakeup)
    try:
        await how.begin(channel, address, of_client)
        await channel.send(b"y")  # with the last flight of the TLS handshake
        assert await channel.recv() == b"x"
        how.remember(channel, address)
        channel.release()
        channel.sock.close()
    finally:
        assert channel.sock.fileno() < 0
        of_client.release()
        client.close()
        other.close()
        watched.close()


def test_sessions_are_kept_by_origin_and_name(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "RETRY_SECONDS", 0.0)
    server = _Server(server_context(authority.issue("localhost")))
    serving = server.serve(5)
    context = create_client_context(ca=authority.file)
    how = OriginTLS(context)
    for _ in range(3):
        asyncio.run(_once(how, server.address))
    asyncio.run(_once(OriginTLS(context), server.address))  # another site: only the context is shared
    monkeypatch.setattr(tls, "SESSION_SECONDS", 0.0)
    asyncio.run(_once(how, server.address))
    serving.join()
    server.close()
    assert server.resumed == [False, True, True, False, False]


def test_sessions_are_bounded(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "SESSIONS", 1)
    context = server_context(authority.issue("localhost"))
    servers = [_Server(context), _Server(context)]
    threads = [server.serve(2) for server in servers]
    how = OriginTLS(create_client_context(ca=authority.file))
    for _ in range(2):
        for server in servers:
            asyncio.run(_once(how, server.address))
    for thread, server in zip(threads, servers, strict=True):
        thread.join()
        server.close()
        assert server.resumed == [False, False]


def test_a_failure_closes_the_socket_and_has_the_reason(authority: Authority) -> None:
    server = _Server(server_context(authority.issue("other.example")))
    serving = server.serve(1)
    with pytest.raises(OriginTLSFailed) as caught:
        asyncio.run(_once(OriginTLS(create_client_context(ca=authority.file)), server.address))
    serving.join()
    server.close()
    assert caught.value.kind == Reason.ORIGIN_WRONG_NAME
    assert caught.value.reason.startswith(f"localhost:{server.address.port}: ")


def test_an_address_with_a_zone_is_verified_without_it(certificate: Certificate) -> None:
    """A zone selects an interface, and is in no certificate."""
    server = _Server(server_context(certificate))
    address = OriginAddress("::1%lo", server.address.port)
    serving = server.serve(1)
    asyncio.run(_once(OriginTLS(create_client_context(ca=certificate.ca)), address))
    serving.join()
    server.close()
