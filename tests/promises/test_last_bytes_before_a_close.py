"""What a side sent before it closed is delivered, however slowly the other side reads and whatever it still sends."""

import contextlib
import random
import socket
import ssl
import time
from collections.abc import Iterator

import pytest

from tests.harness import Certificate, handshake_request, read_request, switching_protocols
from tests.promises.both_ends import (
    BothEnds,
    Threads,
    TlsEnd,
    receive_until_fin,
    receive_until_reset,
    wait_until_acknowledged,
)

MIB = 1 << 20
DATA = random.Random(16).randbytes(16 * MIB)


@pytest.fixture(scope="module")
def ends(certificate: Certificate) -> Iterator[BothEnds]:
    """One tunnel process for all of this file."""
    with BothEnds(certificate) as running:
        yield running


def _slowly(client: TlsEnd) -> bytes:
    """Read up to ``close_notify``, with pauses, so that most of it is still in flight when the sender closes."""
    received = bytearray()
    pause_at = 0
    while some := client.receive():
        received += some
        if len(received) >= pause_at:
            time.sleep(0.005)
            pause_at = len(received) + 256 * 1024
    assert client.sock.recv(1) == b"", "bytes after close_notify"
    return bytes(received)


def test_16_mib_and_a_close_by_the_origin(ends: BothEnds) -> None:
    with Threads() as threads:
        client, origin = ends.open(buffers=65_536)

        def send_and_close() -> None:
            origin.sendall(DATA)
            origin.close()

        threads.do(send_and_close)
        assert _slowly(client) == DATA
        client.end()
        record = ends.record(client)
        assert (record["ended_by"], record["reason"], record["down"]) == ("origin", "closed", len(DATA))


@pytest.mark.parametrize("version", ["TLSv1.3", "TLSv1.2"])
def test_16_mib_and_a_close_by_the_client(ends: BothEnds, version: str) -> None:
    with Threads() as threads:
        client, origin = ends.open(context=ends.tls_1_2() if version == "TLSv1.2" else None, buffers=65_536)

        def send_and_close() -> None:
            client.send(DATA)
            client.sock.sendall(client.close_notify())
            client.sock.close()

        threads.do(send_and_close)
        received = bytearray()
        while some := origin.recv(256 * 1024):
            received += some
            time.sleep(0.001)
        assert received == DATA
        origin.close()
        record = ends.record(client)
        assert (record["ended_by"], record["reason"], record["up"]) == ("client", "closed", len(DATA))


@pytest.mark.parametrize("sends", ["now and then", "all the time"])
def test_a_full_close_by_the_origin_while_the_client_sends(ends: BothEnds, sends: str) -> None:
    """The origin's kernel answers data after close() with RST, which must not overtake what the origin sent before.

    The origin's own kernel discards what it has not sent by then, so it closes when everything has been sent.
    """
    data = DATA[: 2 * MIB]
    with Threads() as threads:
        client, origin = ends.open()
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        more = True

        def send() -> None:
            with contextlib.suppress(ConnectionError):
                while more:
                    client.send(b"x" * (65_536 if sends == "all the time" else 1))
                    time.sleep(0 if sends == "all the time" else 0.01)

        origin.sendall(data)
        wait_until_acknowledged(origin)
        origin.close()
        threads.do(send)
        try:
            assert _slowly(client) == data
        finally:
            more = False
            with contextlib.suppress(OSError):  # the sender has seen a reset
                client.sock.shutdown(socket.SHUT_RDWR)  # wakes the sender


def test_a_reset_by_the_origin_right_after_data(ends: BothEnds) -> None:
    """An origin that closes with unread input resets; what it sent before is still delivered."""
    data = DATA[: 2 * MIB]
    client, origin = ends.open()
    client.send(b"never read")
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    origin.sendall(data)
    wait_until_acknowledged(origin)
    origin.close()

    def slowly() -> bytes:
        time.sleep(0.001)
        return client.receive()

    assert receive_until_reset(slowly) == data


@pytest.mark.parametrize("size", [1, 1000, 300_000])
def test_data_and_a_close_right_behind_the_101(ends: BothEnds, size: int) -> None:
    client = ends.connect()
    client.send(handshake_request())
    origin = ends.accept()
    origin.sendall(switching_protocols(read_request(origin)) + DATA[:size])
    origin.close()
    head, _, rest = client.receive_all().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert rest == DATA[:size]


@pytest.mark.parametrize("size", [1, 1000, 300_000])
def test_data_and_an_end_right_behind_the_request(ends: BothEnds, size: int) -> None:
    with Threads() as threads:
        client = ends.connect()
        threads.do(client.sock.sendall, client.encrypt(handshake_request() + DATA[:size]) + client.close_notify())
        origin = ends.accept()
        request = read_request(origin)
        assert request.leftover == b"", "sent before the 101"
        origin.sendall(switching_protocols(request))
        assert receive_until_fin(origin) == DATA[:size]
        origin.sendall(b"until the end")
        origin.close()
        assert client.receive_all().endswith(b"\r\n\r\nuntil the end")


def test_a_client_with_pythons_ssl_sees_no_truncation(ends: BothEnds) -> None:
    """`ssl.SSLSocket`, which most Python clients use, sees an orderly end."""
    with Threads() as threads:
        plain = socket.create_connection(("127.0.0.1", ends.tunnel.port), 15)
        with ends.context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False) as client:
            client.sendall(handshake_request())
            origin = ends.accept()

            def answer() -> None:
                origin.sendall(switching_protocols(read_request(origin)) + DATA[:MIB])
                origin.close()

            threads.do(answer)
            received = bytearray()
            try:
                while some := client.recv(65_536):
                    received += some
            except ssl.SSLEOFError:
                pytest.fail("a FIN without close_notify")
            assert received.partition(b"\r\n\r\n")[2] == DATA[:MIB]
