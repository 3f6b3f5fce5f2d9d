"""A ClientHello may arrive in any pieces; half of one uses no CPU time and ends after timeouts.tls_handshake."""

import socket
import time
from collections.abc import Callable, Iterator

import pytest

from tests.harness import (
    TIMEOUT,
    Certificate,
    RawOrigin,
    Tunnel,
    connect_tcp,
    echo_bytes,
    eventually,
    receive_all,
)
from tests.promises.wire import (
    ILLEGAL_PARAMETER,
    MemoryTlsClient,
    alert,
    assert_does_not_spin,
    client_hello,
    has_ended,
    read_until_end,
    split_into_records,
    unverified_context,
)

Connect = Callable[[], socket.socket]

WRITES_ON_UNIX = 60
"""A Unix socket counts some 768 bytes a write against its sender's buffer until they are taken, and a peek takes none:
behind 70 of them, with Linux's 208 KiB, it is writable no more."""


@pytest.fixture(scope="module")
def tunnel(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tunnel]:
    """Over TCP and over a Unix socket, where peeking works differently."""
    listen = ["127.0.0.1:0", f"unix:{tmp_path_factory.mktemp('hello') / 'tunnel.sock'}"]
    with RawOrigin(echo_bytes) as origin, Tunnel(origin.address, certificate, listen=listen, measured=True) as tunnel:
        yield tunnel


@pytest.fixture(params=["tcp", "unix"])
def connect(request: pytest.FixtureRequest, tunnel: Tunnel) -> Connect:
    def unix() -> socket.socket:
        path = next(address for address in tunnel.addresses if address.startswith("unix:")).removeprefix("unix:")
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT)
        sock.connect(path)
        return sock

    def tcp() -> socket.socket:
        sock = connect_tcp(tunnel)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # one write per segment
        return sock

    return unix if request.param == "unix" else tcp


def _many_protocols(size: int) -> MemoryTlsClient:
    """A client whose hello has about this many bytes."""
    names = [f"protocol-{number:03}".ljust(250, "-") for number in range(size // 251)]
    return MemoryTlsClient(unverified_context(alpn=("http/1.1", *names)))


def _pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("records", [None, 1, 7, 200], ids=lambda size: f"records-of-{size}" if size else "one-record")
@pytest.mark.parametrize("segments", [1, 5, 100, 1 << 20], ids=lambda size: f"segments-of-{size}")
def test_any_pieces_make_a_hello(connect: Connect, records: int | None, segments: int) -> None:
    tls = MemoryTlsClient()
    hello = tls.step()
    sent = split_into_records(hello, records) if records else hello
    with connect() as client:
        if client.family == socket.AF_UNIX:
            segments = max(segments, len(sent) // WRITES_ON_UNIX + 1)
        for piece in _pieces(sent, segments):
            client.sendall(piece)
        tls.finish(client)


@pytest.mark.parametrize("size", [2_000, 8_000, 14_000])
def test_large_hellos_are_served(connect: Connect, size: int) -> None:
    tls = _many_protocols(size)
    hello = tls.step()
    assert len(hello) >= size - 300
    with connect() as client:
        for piece in _pieces(hello, 1_000):
            client.sendall(piece)
        tls.finish(client)


def test_a_pause_within_a_hello_is_waited_out(connect: Connect) -> None:
    tls = MemoryTlsClient()
    hello = tls.step()
    with connect() as client:
        for piece in (hello[:3], hello[3:100], hello[100:-1], hello[-1:]):
            client.sendall(piece)
            time.sleep(0.1)  # the pause under test
        tls.finish(client)


@pytest.mark.parametrize("at_once", [True, False], ids=["whole", "in-pieces"])
def test_a_hello_over_16_kib_is_an_alert(connect: Connect, *, at_once: bool) -> None:
    hello = _many_protocols(17_000).step()
    assert len(hello) > 16_384
    with connect() as client:
        for piece in [hello] if at_once else _pieces(hello, 300):
            try:
                client.sendall(piece)
            except ConnectionError:
                break  # the tunnel has seen enough
        assert read_until_end(client) == alert(ILLEGAL_PARAMETER)


def test_a_hello_over_16_kib_is_an_alert_as_soon_as_it_is_known(connect: Connect) -> None:
    """Its first bytes contain its length: the tunnel does not wait for the rest."""
    with connect() as client:
        client.sendall(_many_protocols(17_000).step()[:9])
        assert receive_all(client) == alert(ILLEGAL_PARAMETER)


@pytest.mark.parametrize("length", [0, 1, 4, 5, 8, 9, 100, -1], ids=str)
def test_part_of_a_hello_and_the_end_is_the_end(tunnel: Tunnel, connect: Connect, length: int) -> None:
    hello = client_hello()
    with connect() as client:
        client.sendall(hello[:length])
        client.shutdown(socket.SHUT_WR)
        began = time.monotonic()
        assert receive_all(client) == b""
        assert time.monotonic() - began < 8, "10 s is timeouts.tls_handshake: the end was not noticed"


def test_ends_within_hellos_leave_no_load_behind(tunnel: Tunnel, connect: Connect) -> None:
    """Seen elsewhere: a level-triggered wait for more, after a peek, wakes up 375 000 times a second."""
    hello = client_hello()
    for _ in range(20):
        with connect() as client:
            client.sendall(hello[:100])
            client.shutdown(socket.SHUT_WR)
            assert receive_all(client) == b""
    assert_does_not_spin(tunnel)


def test_silence_within_a_hello_costs_no_processor_time(tunnel: Tunnel, connect: Connect) -> None:
    hello = client_hello()
    clients = [connect() for _ in range(20)]
    try:
        for number, client in enumerate(clients):
            client.sendall(hello[: number * 10])
        assert_does_not_spin(tunnel)
        assert not any(has_ended(client) for client in clients)
    finally:
        for client in clients:
            client.close()


@pytest.mark.parametrize("trickle", [False, True], ids=["silent", "trickling"])
def test_half_a_hello_is_closed_after_timeouts_tls_handshake(certificate: Certificate, *, trickle: bool) -> None:
    """Counted from the accept: bytes do not restart it."""
    settings = '[timeouts]\ntls_handshake = "1s"\n'
    with Tunnel(None, certificate, settings=settings) as tunnel, connect_tcp(tunnel) as client:
        hello = client_hello()
        began = time.monotonic()
        for byte in _pieces(hello[:-1], 1):
            client.sendall(byte)
            if trickle:
                time.sleep(0.02)  # the slowness under test: over 4 s in all
            if has_ended(client):
                break
        eventually(lambda: has_ended(client))
        assert time.monotonic() - began >= 0.9
        if trickle:
            assert time.monotonic() - began < 4, "bytes extend the deadline"
        failed = tunnel.wait_records(1, "no TLS handshake")[0]
        assert failed["reason"] == "hello: timed out"


def test_half_a_tls_handshake_is_closed_in_the_same_time(certificate: Certificate) -> None:
    settings = '[timeouts]\ntls_handshake = "1s"\n'
    with Tunnel(None, certificate, settings=settings) as tunnel, connect_tcp(tunnel) as client:
        began = time.monotonic()
        client.sendall(client_hello())
        assert len(receive_all(client)) > 500, "the server's flight came, and then the end"
        assert time.monotonic() - began >= 0.9
        assert tunnel.wait_records(1, "no TLS handshake")[0]["reason"] == "tls: timed out"
