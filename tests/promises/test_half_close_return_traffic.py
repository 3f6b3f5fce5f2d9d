"""When one side has ended its direction, the other may continue without a time limit, and loses nothing.

A client's ``close_notify`` becomes a FIN to the origin, an origin's FIN ``close_notify`` and FIN to the client.
"""

import hashlib
import random
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from tests.harness import Certificate, receive_exactly
from tests.promises.both_ends import BothEnds, Threads, TlsEnd, receive_until_fin

MIB = 1 << 20
DATA = random.Random(5).randbytes(8 * MIB)
VERSIONS = pytest.mark.parametrize("version", ["TLSv1.3", "TLSv1.2"])


@VERSIONS
def test_the_origin_continues_after_the_client_has_ended(ends: BothEnds, version: str) -> None:
    with Threads() as threads:
        client, origin = ends.open(context=ends.tls_1_2() if version == "TLSv1.2" else None)
        threads.do(_in_turn, lambda: client.send(DATA), client.end)
        assert receive_until_fin(origin) == DATA
        for number in range(20):
            origin.sendall(b"%3d" % number)
            assert client.receive() == b"%3d" % number
        threads.do(_in_turn, lambda: origin.sendall(DATA), origin.close)
        assert client.receive_all() == DATA
        record = ends.record(client)
        assert (record["ended_by"], record["reason"]) == ("client", "closed")
        assert (record["up"], record["down"]) == (len(DATA), len(DATA) + 60)


@pytest.fixture(scope="module")
def ends(certificate: Certificate) -> Iterator[BothEnds]:
    """One tunnel process for all of this file."""
    with BothEnds(certificate) as running:
        yield running


def test_a_close_notify_without_a_fin_is_an_end_too(ends: BothEnds) -> None:
    client, origin = ends.open()
    client.send(b"all of it")
    client.sock.sendall(client.close_notify())
    assert receive_until_fin(origin) == b"all of it"
    origin.sendall(b"and back")
    assert client.receive() == b"and back"
    origin.close()
    assert client.receive_all() == b""


@VERSIONS
def test_the_client_continues_after_the_origin_has_ended(ends: BothEnds, version: str) -> None:
    client, origin = ends.open(context=ends.tls_1_2() if version == "TLSv1.2" else None)
    origin.sendall(b"all of it")
    origin.shutdown(socket.SHUT_WR)
    assert client.receive_all() == b"all of it"
    for number in range(20):
        client.send(b"%3d" % number)
        assert receive_exactly(origin, 3) == b"%3d" % number
    client.end()
    assert receive_until_fin(origin) == b""
    record = ends.record(client)
    assert (record["ended_by"], record["reason"]) == ("origin", "closed")
    assert (record["up"], record["down"]) == (60, 9)


@VERSIONS
@pytest.mark.parametrize("reads", ["at once", "slowly"])
def test_the_client_sends_while_the_origin_ends(ends: BothEnds, version: str, reads: str) -> None:
    """``close_notify`` is written while the client's records wait in the socket and half of one in the TLS library.

    `ssl.SSLSocket.unwrap` reads after it has sent, and would lose them and the connection.
    """
    with Threads() as threads:
        for _ in range(3):
            client, origin = ends.open(context=ends.tls_1_2() if version == "TLSv1.2" else None, buffers=65_536)
            sending = threads.do(_send_all, client)
            received = _received(origin, MIB)
            origin.shutdown(socket.SHUT_WR)
            if reads == "slowly":
                # The upward direction waits for the origin by now, or soon will, while the end is sent to the client.
                assert client.receive_all() == b""
            received += _received(origin, None, lambda: time.sleep(0.002 if reads == "slowly" else 0))
            sending.result()
            assert len(received) == len(DATA)
            assert hashlib.sha256(received).digest() == hashlib.sha256(DATA).digest()
            assert client.receive_all() == b""


def test_half_a_record_when_the_origin_ends(ends: BothEnds) -> None:
    """The rest of a record that the TLS library has begun to read comes after the tunnel's ``close_notify``."""
    for cut in (1, 3, 5, 6, 500, -1):
        client, origin = ends.open()
        client.send(b"before ")
        record = client.encrypt(b"x" * 1000)
        client.sock.sendall(record[:cut])
        assert receive_exactly(origin, 7) == b"before "
        origin.shutdown(socket.SHUT_WR)
        assert client.receive_all() == b""
        client.sock.sendall(record[cut:])
        client.send(b" after")
        client.end()
        assert receive_until_fin(origin) == b"x" * 1000 + b" after"


def test_both_end_at_once(ends: BothEnds) -> None:
    with Threads() as threads:
        for _ in range(20):
            client, origin = ends.open()
            threads.do(lambda end: (end.send(DATA[:300_000]), end.end()), client)
            threads.do(lambda end: (end.sendall(DATA[:300_000]), end.shutdown(socket.SHUT_WR)), origin)
            upwards = threads.do(receive_until_fin, origin)
            assert client.receive_all() == DATA[:300_000]
            assert upwards.result() == DATA[:300_000]
            assert ends.record(client)["reason"] == "closed"


def _in_turn(*works: Callable[[], object]) -> None:
    for work in works:
        work()


def _send_all(client: TlsEnd) -> None:
    for start in range(0, len(DATA), 100_000):
        client.send(DATA[start : start + 100_000])
    client.end()


def _received(origin: socket.socket, at_least: int | None, pause: Callable[[], object] = lambda: None) -> bytes:
    received = bytearray()
    while (at_least is None or len(received) < at_least) and (some := origin.recv(1 << 17)):
        received += some
        pause()
    return bytes(received)
