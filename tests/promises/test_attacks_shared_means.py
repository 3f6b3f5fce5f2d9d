"""What one client or origin can occupy is limited: the time of the loop, descriptors, and the time to exit."""

import contextlib
import signal
import socket
import ssl
import threading
import time

import pytest

from tests.harness import (
    TIMEOUT,
    Certificate,
    RawOrigin,
    Tunnel,
    assert_below,
    connect_tls,
    eventually,
    handshake_request,
    read_request,
    read_response,
    receive_all,
    switching_protocols,
    upgrade,
)


@pytest.mark.alone
def test_endless_response_does_not_block_the_loop(certificate: Certificate) -> None:
    """An origin responds 200 with a large file, to a client that reads it as fast as it arrives."""

    def handle(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            sock.sendall(bytes(1 << 20))

    over = threading.Event()

    def take(client: ssl.SSLSocket) -> None:
        buffer = bytearray(1 << 18)
        with client, contextlib.suppress(OSError):
            client.sendall(handshake_request("/file"))
            while not over.is_set() and client.recv_into(buffer):
                pass

    def slowest_of_a_second(tunnel: Tunnel) -> float:
        slowest = 0.0
        end = time.monotonic() + 1
        while time.monotonic() < end:
            began = time.monotonic()
            with connect_tls(tunnel) as client:
                client.sendall(b"no request\r\n\r\n")
                assert read_response(client).status == 400
            slowest = max(slowest, time.monotonic() - began)
        return slowest

    # Not in debug mode: the tunnel must be the slowest of the three.
    with RawOrigin(handle) as origin, Tunnel(origin.address, certificate, measured=True) as tunnel:
        takers = [threading.Thread(target=take, args=(connect_tls(tunnel),)) for _ in range(3)]
        for taker in takers:
            taker.start()
        try:
            assert_below(0.5, lambda: slowest_of_a_second(tunnel))
        finally:
            over.set()
            for taker in takers:
                taker.join(TIMEOUT)


def test_closing_sockets_release_their_descriptors(certificate: Certificate) -> None:
    """Clients that do not read the refusal sent to them do not keep descriptors from others."""
    body = bytes(300_000)

    def handle(sock: socket.socket) -> None:
        request = read_request(sock)
        if "/refused" in request.line:
            sock.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        else:
            sock.sendall(switching_protocols(request))
            sock.recv(1)
            sock.sendall(b"bye")

    with (
        RawOrigin(handle) as origin,
        Tunnel(origin.address, certificate, settings='[timeouts]\nclose = "3s"\n', descriptors=100) as tunnel,
        contextlib.ExitStack() as stack,
    ):
        client = stack.enter_context(connect_tls(tunnel))
        assert upgrade(client).status == 101
        for _ in range(90):
            refused = stack.enter_context(connect_tls(tunnel))
            refused.sendall(handshake_request("/refused"))
            if tunnel.descriptors() >= 98:
                break
        # The remaining descriptors are taken by connections that wait, and the tunnel still exits cleanly.
        for _ in range(5):
            stack.enter_context(socket.create_connection(("127.0.0.1", tunnel.port), TIMEOUT))
        client.sendall(b"x")
        assert receive_all(client) == b"bye"  # with close_notify: without it, this raises
        with connect_tls(tunnel) as other:
            assert upgrade(other).status == 101


def test_trickling_reader_does_not_delay_the_exit(certificate: Certificate) -> None:
    body = bytes(2_000_000)

    def handle(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    with (
        RawOrigin(handle) as origin,
        Tunnel(origin.address, certificate, settings='[timeouts]\nclose = "2s"\n') as tunnel,
        socket.socket() as plain,
    ):
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.connect(("127.0.0.1", tunnel.port))
        context = ssl.create_default_context(cafile=tunnel.ca)
        with context.wrap_socket(plain, server_hostname="localhost") as client:
            client.sendall(handshake_request())
            for _ in range(200):  # part of it, so that the rest fits into the tunnel's send buffer
                client.recv(16_384)
                if tunnel.records("connection"):
                    break
            tunnel.send_signal(signal.SIGINT)
            end = time.monotonic() + TIMEOUT
            while not tunnel.records("stopped") and time.monotonic() < end:
                with contextlib.suppress(OSError):
                    socket.socket.recv(client, 2000, socket.MSG_DONTWAIT)
                with contextlib.suppress(AssertionError):
                    eventually(lambda: tunnel.records("stopped"), timeout=0.25)
            assert tunnel.records("stopped")
            assert tunnel.wait() == 0
