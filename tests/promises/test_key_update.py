"""A TLS 1.3 KeyUpdate at a bad moment: in pieces, or when no response can be written. No spin, and no byte lost."""

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Certificate, receive_exactly
from tests.promises.both_ends import BothEnds, TlsEnd
from tests.promises.secure import Sealing, SecureEnds
from tests.promises.wire import assert_does_not_spin

HANDSHAKE, DATA = 22, 23
KEY_UPDATE = b"\x18\x00\x00\x01\x01"
"""A KeyUpdate that requests one in response (RFC 8446 section 4.6.3)."""


@pytest.fixture(scope="module")
def ends(certificate: Certificate) -> Iterator[BothEnds]:
    """A tunnel to an origin without TLS."""
    with BothEnds(certificate, measured=True) as running:
        yield running


@pytest.fixture(scope="module")
def secure(certificate: Certificate) -> Iterator[SecureEnds]:
    """A tunnel to an origin with TLS."""
    with SecureEnds(certificate, measured=True) as running:
        running.origin_context.num_tickets = 0
        yield running


def _sealing(end: TlsEnd, keys: Path, side: str) -> Sealing:
    """Return a KeyUpdate for an ``end`` that has sent one record."""
    line = next(line for line in keys.read_text().splitlines() if line.startswith(f"{side}_TRAFFIC_SECRET_0"))
    cipher = end._tls.cipher()
    assert cipher is not None
    return Sealing(cipher[0], bytes.fromhex(line.split()[2]), 1)


def _client_context(ends: BothEnds, keys: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ends.tunnel.ca)
    context.keylog_filename = str(keys)
    return context


def test_half_a_key_update_of_the_client(ends: BothEnds, tmp_path: Path) -> None:
    """TLS writes nothing until the other half arrives; the socket is writable all the time, and must not be polled."""
    client, origin = ends.open(context=_client_context(ends, tmp_path / "keys"))
    sealing = _sealing(client, tmp_path / "keys", "CLIENT")
    client.sock.sendall(sealing.record(b"before", DATA) + sealing.record(KEY_UPDATE[:4], HANDSHAKE))
    assert receive_exactly(origin, 6) == b"before"
    origin.sendall(b"x" * 100_000)
    assert_does_not_spin(ends.tunnel)
    client.sock.sendall(sealing.record(KEY_UPDATE[4:], HANDSHAKE))
    sealing.next_secret()
    client.sock.sendall(sealing.record(b"after", DATA))
    assert client.receive_exactly(100_000) == b"x" * 100_000
    assert receive_exactly(origin, 5) == b"after"


def test_half_a_key_update_of_the_origin(secure: SecureEnds, tmp_path: Path) -> None:
    secure.origin_context.keylog_filename = str(tmp_path / "keys")
    client, origin = secure.open_secure()
    sealing = _sealing(origin, tmp_path / "keys", "SERVER")
    origin.sock.sendall(sealing.record(b"before", DATA) + sealing.record(KEY_UPDATE[:4], HANDSHAKE))
    assert client.receive_exactly(6) == b"before"
    client.send(b"x" * 100_000)
    assert_does_not_spin(secure.tunnel)
    origin.sock.sendall(sealing.record(KEY_UPDATE[4:], HANDSHAKE))
    sealing.next_secret()
    origin.sock.sendall(sealing.record(b"after", DATA))
    assert origin.receive_exactly(100_000) == b"x" * 100_000
    assert client.receive_exactly(5) == b"after"


def test_half_a_key_update_and_the_end(ends: BothEnds, tmp_path: Path) -> None:
    client, origin = ends.open(context=_client_context(ends, tmp_path / "keys"))
    sealing = _sealing(client, tmp_path / "keys", "CLIENT")
    client.sock.sendall(sealing.record(b"before", DATA) + sealing.record(KEY_UPDATE[:4], HANDSHAKE))
    assert receive_exactly(origin, 6) == b"before"
    origin.sendall(b"x" * 100_000)
    client.sock.shutdown(1)
    assert ends.record(client)["ended_by"] == "client"


def test_a_key_update_that_cannot_be_answered(ends: BothEnds, tmp_path: Path) -> None:
    """The client reads nothing, so the response waits for room, while more of the client's data waits to be read."""
    client, origin = ends.open(context=_client_context(ends, tmp_path / "keys"), buffers=65_536)
    sealing = _sealing(client, tmp_path / "keys", "CLIENT")
    # No more than the tunnel takes at once and the kernel's buffers hold, or a write is pending.
    origin.settimeout(0.5)
    sent = 0
    try:
        while True:
            origin.sendall(bytes(4096))
            sent += 4096
    except TimeoutError:
        pass
    client.sock.sendall(sealing.record(KEY_UPDATE, HANDSHAKE))
    sealing.next_secret()
    client.sock.sendall(sealing.record(b"after", DATA))
    assert_does_not_spin(ends.tunnel)
    received = 0
    while received < sent:
        received += len(client.receive())
    assert receive_exactly(origin, 5) == b"after"
