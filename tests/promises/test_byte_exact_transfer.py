"""Every byte arrives as it was sent: 256 MiB of random data each way at once, equal by SHA-256 on both sides."""

import hashlib
import random
import ssl
from collections.abc import Callable, Iterator

import pytest

from tests.harness import Certificate
from tests.promises.both_ends import BothEnds, Threads

MIB = 1 << 20
_NOISE = random.Random(6455).randbytes(MIB) * 2


@pytest.fixture(scope="module")
def ends(certificate: Certificate) -> Iterator[BothEnds]:
    """One tunnel process for all of this file."""
    with BothEnds(certificate) as running:
        yield running


@pytest.fixture(scope="module")
def measured(certificate: Certificate) -> Iterator[BothEnds]:
    """The same without coverage and the interpreter's debug modes, which change what is measured."""
    with BothEnds(certificate, measured=True) as running:
        yield running


def _blocks(count: int, step: int) -> Iterator[memoryview]:
    """Yield ``count`` pieces of one MiB, each from another offset of the noise, so that no two are alike."""
    noise = memoryview(_NOISE)
    for number in range(count):
        start = number * step % MIB
        yield noise[start : start + MIB]


def _send(send: Callable[[memoryview], object], end: Callable[[], object], count: int, step: int) -> str:
    digest = hashlib.sha256()
    for block in _blocks(count, step):
        digest.update(block)
        send(block)
    end()
    return digest.hexdigest()


def _receive(receive: Callable[[], bytes]) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    while some := receive():
        digest.update(some)
        size += len(some)
    return size, digest.hexdigest()


@pytest.mark.parametrize(("version", "count"), [("TLSv1.3", 256), ("TLSv1.2", 64)])
def test_random_data_both_ways_at_once(measured: BothEnds, version: str, count: int) -> None:
    # Measured, that is without the interpreter's debug modes and coverage, only because it is half a gigabyte.
    with Threads() as threads:
        client, origin = measured.open(context=measured.tls_1_2() if version == "TLSv1.2" else None)
        assert client.version == version
        upwards = threads.do(_receive, lambda: origin.recv(1 << 18))
        downwards = threads.do(_receive, client.receive)
        sent_up = threads.do(_send, client.send, client.end, count, 4099)
        sent_down = threads.do(_send, origin.sendall, lambda: origin.shutdown(1), count, 7919)
        assert upwards.result() == (count * MIB, sent_up.result())
        assert downwards.result() == (count * MIB, sent_down.result())
        record = measured.record(client)
        assert (record["up"], record["down"], record["tls_version"]) == (count * MIB, count * MIB, version)
        assert record["reason"] == "closed"


@pytest.mark.parametrize("size", [1, 16_383, 16_384, 16_385, 65_536, 262_143, 262_144, 262_145])
def test_sizes_about_those_of_records_and_buffers(ends: BothEnds, size: int) -> None:
    data = random.Random(size).randbytes(size)
    with Threads() as threads:
        client, origin = ends.open()
        for _ in range(3):
            threads.do(client.send, data)
            threads.do(origin.sendall, data)
            assert client.receive_exactly(size) == data
            received = b""
            while len(received) < size:
                received += origin.recv(size - len(received))
            assert received == data


def test_any_size_of_record_arrives(ends: BothEnds) -> None:
    """Records of every length a client may choose, many to a segment: none is left behind in the TLS library."""
    seed = ssl.RAND_bytes(4).hex()
    print(f"seed {seed}")
    chooses = random.Random(seed)
    data = chooses.randbytes(2 * MIB)
    with Threads() as threads:
        client, origin = ends.open()

        def send() -> None:
            start, sealed = 0, b""
            while start < len(data):
                size = chooses.choice((1, 2, 100, 1500, 4096, 16_384))
                sealed += client.encrypt(data[start : start + size])
                start += size
                if len(sealed) > chooses.randrange(200_000):
                    client.sock.sendall(sealed)
                    sealed = b""
            client.sock.sendall(sealed)
            client.end()

        threads.do(send)
        received = b""
        while some := origin.recv(1 << 18):
            received += some
        assert received == data
