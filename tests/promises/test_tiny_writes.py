"""The smallest writes arrive whole and in order: a byte a TLS record, a byte a segment, one way or both at once."""

import random
from collections.abc import Callable, Iterator

import pytest

from tests.harness import Certificate, receive_exactly
from tests.promises.both_ends import BothEnds, Threads

COUNT = 3000
UP = random.Random(1).randbytes(COUNT)
DOWN = random.Random(2).randbytes(COUNT)


def _byte_by_byte(send: Callable[[bytes], object], data: bytes) -> None:
    for place in range(len(data)):
        send(data[place : place + 1])


@pytest.fixture(scope="module")
def ends(certificate: Certificate) -> Iterator[BothEnds]:
    """One tunnel process for all of this file."""
    with BothEnds(certificate) as running:
        yield running


def test_a_byte_a_record_from_the_client(ends: BothEnds) -> None:
    with Threads() as threads:
        client, origin = ends.open()
        threads.do(_byte_by_byte, client.send, UP)
        assert receive_exactly(origin, COUNT) == UP


def test_a_byte_a_write_from_the_origin(ends: BothEnds) -> None:
    with Threads() as threads:
        client, origin = ends.open()
        threads.do(_byte_by_byte, origin.sendall, DOWN)
        assert client.receive_exactly(COUNT) == DOWN


def test_both_at_once(ends: BothEnds) -> None:
    with Threads() as threads:
        client, origin = ends.open()
        threads.do(_byte_by_byte, client.send, UP)
        threads.do(_byte_by_byte, origin.sendall, DOWN)
        upwards = threads.do(receive_exactly, origin, COUNT)
        assert client.receive_exactly(COUNT) == DOWN
        assert upwards.result() == UP


def test_a_byte_there_and_a_byte_back(ends: BothEnds) -> None:
    """Nothing is delayed to be sent with more."""
    client, origin = ends.open()
    for place in range(500):
        client.send(UP[place : place + 1])
        assert origin.recv(2) == UP[place : place + 1]
        origin.sendall(DOWN[place : place + 1])
        assert client.receive() == DOWN[place : place + 1]


def test_thousands_of_one_byte_records_in_one_segment(ends: BothEnds) -> None:
    client, origin = ends.open()
    client.sock.sendall(b"".join(client.encrypt(UP[place : place + 1]) for place in range(COUNT)))
    assert receive_exactly(origin, COUNT) == UP


def test_a_record_a_byte_at_a_time(ends: BothEnds) -> None:
    """A record that arrives in one-byte segments is delivered when it is complete, and so is the next."""
    client, origin = ends.open()
    sealed = client.encrypt(b"first") + client.encrypt(b"second")
    for place in range(len(sealed)):
        client.sock.sendall(sealed[place : place + 1])
    assert receive_exactly(origin, 11) == b"firstsecond"
