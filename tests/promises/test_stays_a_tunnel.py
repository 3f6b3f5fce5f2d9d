"""After the 101 nothing is inspected: bytes that are not WebSocket frames, or invalid ones, pass unchanged."""

import random
from collections.abc import Iterator

import pytest

from tests.harness import Certificate, receive_exactly
from tests.promises.both_ends import BothEnds, receive_until_fin

PAYLOADS = {
    "every byte": bytes(range(256)) * 4,
    "zeros": bytes(5000),
    "noise": random.Random(0).randbytes(50_000),
    "a request": b"GET /private HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "another upgrade": (
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ),
    "an answer": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "another 101": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "a ping": bytes.fromhex("8980 00000000"),
    "a close": bytes.fromhex("8882 00000000 03e8"),
    "an unmasked text": bytes.fromhex("8105") + b"hello",
    "a masked text": bytes.fromhex("8185 37fa213d 7f9f4d5158"),
    "all reserved bits": bytes.fromhex("f100"),
    "a compressed text": bytes.fromhex("c107 f248cdc9c90700"),
    "a reserved opcode": bytes.fromhex("8b00"),
    "a fragmented ping": bytes.fromhex("0900"),
    "a frame of 8 EiB": bytes.fromhex("82ff 7fffffffffffffff 00000000") + b"and no more",
    "a length of the wrong size": bytes.fromhex("827e 0001 00"),
    "invalid UTF-8": bytes.fromhex("8102 fffe"),
    "a TLS record": bytes.fromhex("1503030002 0100"),
}


@pytest.fixture(scope="module")
def ends(certificate: Certificate) -> Iterator[BothEnds]:
    """One tunnel for all tests of this file."""
    with BothEnds(certificate) as running:
        yield running


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_passes_through_both_ways(ends: BothEnds, payload: bytes) -> None:
    client, origin = ends.open()
    client.send(payload)
    assert receive_exactly(origin, len(payload)) == payload
    origin.sendall(payload)
    assert client.receive_exactly(len(payload)) == payload
    # The tunnel did not respond to it, add to it, or end because of it.
    client.send(b"end")
    client.end()
    assert receive_until_fin(origin) == b"end"
    origin.sendall(b"end")
    origin.close()
    assert client.receive_all() == b"end"
