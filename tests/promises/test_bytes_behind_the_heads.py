"""Bytes that follow either head, in the same record or segment, are not lost, reordered or sent early."""

import os
import random
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from tests.harness import Certificate, handshake_request, read_request, receive_exactly, switching_protocols
from tests.promises.both_ends import BothEnds, Threads, random_pieces

SIZES = [1, 2, 1000, 16_000, 16_384, 16_385, 65_536, 200 * 1024]
UP = random.Random(11).randbytes(200 * 1024)
DOWN = random.Random(12).randbytes(200 * 1024)


@pytest.fixture(scope="module")
def ends(certificate: Certificate) -> Iterator[BothEnds]:
    """One tunnel process for all of this file."""
    with BothEnds(certificate) as running:
        yield running


@pytest.mark.parametrize("size", SIZES)
def test_in_the_same_segment_as_the_heads(ends: BothEnds, size: int) -> None:
    with Threads() as threads:
        client = ends.connect()
        threads.do(client.sock.sendall, client.encrypt(handshake_request() + UP[:size]))
        origin = ends.accept()
        request = read_request(origin)
        assert request.leftover == b"", "sent before the 101"
        threads.do(origin.sendall, switching_protocols(request) + DOWN[:size])
        upwards = threads.do(receive_exactly, origin, size)
        head, _, received = _received(client.receive, size).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert received == DOWN[:size]
        assert upwards.result() == UP[:size]


def test_not_a_byte_before_the_101(ends: BothEnds) -> None:
    """The origin takes a while to respond; what the client has sent must not reach it before its response."""
    client = ends.connect()
    client.send(handshake_request() + UP[:1000])
    origin = ends.accept()
    request = read_request(origin)
    client.send(UP[1000:2000])
    origin.settimeout(0.3)
    with pytest.raises(TimeoutError):
        origin.recv(1)
    assert request.leftover == b""
    origin.settimeout(15)
    origin.sendall(switching_protocols(request))
    assert receive_exactly(origin, 2000) == UP[:2000]


@pytest.mark.parametrize("run", range(3))
def test_in_random_pieces(ends: BothEnds, run: int) -> None:
    seed = os.environ.get("TLSTUNNEL_TEST_SEED") or f"{time.time_ns()}/{run}"
    print(f"TLSTUNNEL_TEST_SEED={seed}")  # pytest shows it when the test fails
    chooses = random.Random(seed)

    def in_pieces(sock: socket.socket, data: bytes, most: int) -> None:
        for piece in random_pieces(data, chooses.randrange, most):
            sock.sendall(piece)

    with Threads() as threads:
        for _ in range(8):
            size, most = chooses.choice(SIZES), chooses.choice([3, 100, 2000, 70_000])
            up, down = UP[: max(1, size // (2000 // min(most, 2000)))], DOWN[: chooses.choice(SIZES[:5])]
            client = ends.connect()
            records = b"".join(
                client.encrypt(piece) for piece in random_pieces(handshake_request() + up, chooses.randrange, most)
            )
            threads.do(in_pieces, client.sock, records, max(most, len(records) // 2000))
            origin = ends.accept()
            request = read_request(origin)
            assert request.leftover == b""
            answer = switching_protocols(request) + down
            threads.do(in_pieces, origin, answer, max(most, len(answer) // 2000))
            upwards = threads.do(receive_exactly, origin, len(up))
            received = _received(client.receive, len(down)).partition(b"\r\n\r\n")[2]
            assert received == down, seed
            assert upwards.result() == up, seed


def _received(receive: Callable[[], bytes], size: int) -> bytes:
    received = b""
    while len(received.partition(b"\r\n\r\n")[2]) < size or b"\r\n\r\n" not in received:
        some = receive()
        assert some, "ended early"
        received += some
    return received
