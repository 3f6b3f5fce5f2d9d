import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.harness import TIMEOUT, Certificate, reset
from tlstunnel.tls.policy import apply_to_client_context, apply_to_server_context
from tlstunnel.tls.tls_socket import TlsSocket, clear_error_queue


class Pairs:
    """Opens connected pairs of TLS sockets, client and server; the server does not block."""

    def __init__(self, certificate: Certificate, stack: ExitStack) -> None:
        self._server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        apply_to_server_context(self._server_context)
        self._server_context.load_cert_chain(certificate.cert, certificate.key)
        self._client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        apply_to_client_context(self._client_context)
        self._client_context.load_verify_locations(certificate.ca)
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._pool = stack.enter_context(ThreadPoolExecutor(1))
        self._stack = stack

    def open_plain(self) -> tuple[socket.socket, socket.socket]:
        client = self._stack.enter_context(socket.create_connection(self._listener.getsockname(), TIMEOUT))
        server = self._stack.enter_context(self._listener.accept()[0])
        return client, server

    def open(self) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
        plain_client, plain_server = self.open_plain()
        wrapping = self._pool.submit(self._client_context.wrap_socket, plain_client, server_hostname="localhost")
        server = self._stack.enter_context(
            self._server_context.wrap_socket(plain_server, server_side=True, suppress_ragged_eofs=False)
        )
        client = self._stack.enter_context(wrapping.result(TIMEOUT))
        # The first read after the handshake would empty the queue.
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        server.setblocking(False)
        return client, server

    def begin(self) -> tuple[socket.socket, ssl.SSLSocket]:
        """Open a connection whose TLS handshake has not begun."""
        client, server = self.open_plain()
        tls = self._server_context.wrap_socket(server, server_side=True, do_handshake_on_connect=False)
        tls.setblocking(False)
        return client, self._stack.enter_context(tls)


@pytest.fixture
def pairs(certificate: Certificate) -> Iterator[Pairs]:
    with ExitStack() as stack:
        yield Pairs(certificate, stack)


def test_contexts_make_such_sockets(pairs: Pairs) -> None:
    for side in pairs.open():
        assert isinstance(side, TlsSocket)


@pytest.mark.parametrize(
    "operation",
    [
        lambda sock: sock.send(b"x"),
        lambda sock: sock.recv_into(bytearray(1)),
        lambda sock: sock.unwrap(),
    ],
    ids=["send", "receive", "unwrap"],
)
def test_a_failed_system_call_affects_no_other_connection(
    pairs: Pairs, operation: Callable[[ssl.SSLSocket], object]
) -> None:
    client, server = pairs.open()
    _, other = pairs.open()
    reset(client)
    with pytest.raises(OSError):  # noqa: PT011 - SSLEOFError before Python 3.12, ConnectionResetError since
        operation(server)
    with pytest.raises(ssl.SSLWantReadError):
        other.recv_into(bytearray(1))


def test_a_reset_during_the_tls_handshake_affects_no_other_connection(pairs: Pairs) -> None:
    client, server = pairs.begin()
    _, other = pairs.open()
    reset(client)
    with pytest.raises(OSError):  # noqa: PT011 - as above
        server.do_handshake()
    with pytest.raises(ssl.SSLWantReadError):
        other.recv_into(bytearray(1))


def test_the_queue_can_be_emptied_at_any_time(pairs: Pairs) -> None:
    _, server = pairs.open()
    clear_error_queue()
    with pytest.raises(ssl.SSLWantReadError):
        server.recv_into(bytearray(1))
