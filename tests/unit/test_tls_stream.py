"""TLS without sockets: streams that share a pair of BIOs, driven by peers with pairs of their own."""

import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness import Certificate
from tests.promises.secure import Sealing
from tests.promises.test_key_update import DATA, HANDSHAKE, KEY_UPDATE
from tlstunnel.tls.policy import apply_to_client_context, apply_to_server_context
from tlstunnel.tls.stream import (
    FREE,
    LARGE,
    MAX_OUTPUT,
    MAX_RENEGOTIATION,
    MAX_USELESS,
    PIECE,
    RECORD,
    SMALL,
    Flood,
    NotEmpty,
    Pair,
    TlsStream,
)

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
ROOM = memoryview(bytearray(LARGE + 2 * RECORD))


@dataclass
class Contexts:
    server: ssl.SSLContext
    client: ssl.SSLContext


@pytest.fixture(scope="module", params=VERSIONS, ids=["1.2", "1.3"])
def contexts(request: pytest.FixtureRequest, certificate: Certificate) -> Contexts:
    return make_contexts(certificate, request.param)


def make_contexts(certificate: Certificate, version: ssl.TLSVersion) -> Contexts:
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    apply_to_server_context(server)
    apply_to_client_context(client)
    server.load_cert_chain(certificate.cert, certificate.key)
    client.load_verify_locations(certificate.ca)
    client.maximum_version = version
    return Contexts(server, client)


@dataclass
class Peer:
    """A client with BIOs of its own, and the stream that serves it."""

    stream: TlsStream
    tls: ssl.SSLObject
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO
    sent: bytearray = field(default_factory=bytearray)
    received: bytearray = field(default_factory=bytearray)
    on_the_way: bytearray = field(default_factory=bytearray)

    def flush(self) -> None:
        """Put what the client has encrypted on the way."""
        self.on_the_way += self.outgoing.read()

    def take(self, data: bytes) -> bytes:
        """Decrypt what the stream has sent to the client."""
        self.incoming.write(data)
        found = b""
        try:
            while self.incoming.pending:
                found += self.tls.read(RECORD)
        except ssl.SSLWantReadError:
            pass
        return found


def begin(pair: Pair, contexts: Contexts) -> Peer:
    stream = TlsStream(contexts.server, pair=pair)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    return Peer(stream, contexts.client.wrap_bio(incoming, outgoing, server_hostname="localhost"), incoming, outgoing)


def connect(pair: Pair, contexts: Contexts, behind: bytes = b"") -> Peer:
    peer = begin(pair, contexts)
    complete = client_complete = False
    while not (complete and client_complete):
        try:
            peer.tls.do_handshake()
            if not client_complete and behind:
                peer.tls.write(behind)
            client_complete = True
        except ssl.SSLWantReadError:
            pass
        if not complete:
            complete = peer.stream.handshake(peer.outgoing.read())
        peer.incoming.write(peer.stream.output)
        peer.stream.output = b""
    assert peer.take(b"") == b""
    return peer


def test_data_in_both_directions(contexts: Contexts) -> None:
    peer = connect(Pair(), contexts)
    peer.tls.write(b"to the server")
    n = peer.stream.receive(memoryview(peer.outgoing.read()), ROOM)
    assert bytes(ROOM[:n]) == b"to the server"
    assert peer.take(peer.stream.send(b"to the client")) == b"to the client"


def test_what_came_behind_the_handshake_is_kept(contexts: Contexts) -> None:
    peer = connect(Pair(), contexts, behind=b"GET / HTTP/1.1")
    n = peer.stream.receive(memoryview(peer.stream.surplus or peer.outgoing.read()), ROOM)
    assert bytes(ROOM[:n]) == b"GET / HTTP/1.1"


def test_a_close_notify_ends_one_direction(contexts: Contexts) -> None:
    peer = connect(Pair(), contexts)
    peer.tls.write(b"last")
    with pytest.raises(ssl.SSLWantReadError):
        peer.tls.unwrap()
    n = peer.stream.receive(memoryview(peer.outgoing.read() + b"behind"), ROOM)
    assert (bytes(ROOM[:n]), peer.stream.ended) == (b"last", True)
    assert peer.take(peer.stream.send(b"still open")) == b"still open"
    peer.incoming.write(peer.stream.close())
    peer.tls.unwrap()


def test_our_close_notify_leaves_the_other_direction_open(contexts: Contexts) -> None:
    peer = connect(Pair(), contexts)
    record = peer.stream.close()
    assert record
    peer.tls.write(b"still open")
    n = peer.stream.receive(memoryview(peer.outgoing.read()), ROOM)
    assert bytes(ROOM[:n]) == b"still open"
    peer.incoming.write(record)
    peer.tls.unwrap()
    assert peer.stream.receive(memoryview(peer.outgoing.read()), ROOM) == 0
    assert peer.stream.ended


def test_a_failure_comes_behind_the_data_before_it(contexts: Contexts) -> None:
    peer = connect(Pair(), contexts)
    peer.tls.write(b"good")
    n = peer.stream.receive(memoryview(peer.outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32)), ROOM)
    assert bytes(ROOM[:n]) == b"good"
    assert peer.stream.failure is not None
    with pytest.raises(ssl.SSLError, match="ALERT"):
        peer.take(peer.stream.output)


def test_a_handshake_that_fails_leaves_its_alert(contexts: Contexts) -> None:
    pair = Pair()
    stream = TlsStream(contexts.server, pair=pair)
    with pytest.raises(ssl.SSLError):
        stream.handshake(b"\x16\x03\x01\x00\x05" + bytes(5))
    assert stream.output[:1] == b"\x15"
    pair.check_empty()


def test_bytes_of_another_connection_are_dropped(contexts: Contexts) -> None:
    pair = Pair()
    first, second = connect(pair, contexts), connect(pair, contexts)
    first.tls.write(b"of the first")
    pair.incoming.write(first.outgoing.read())  # as a bug would leave it
    second.tls.write(b"of the second")
    with pytest.raises(NotEmpty):
        second.stream.receive(memoryview(second.outgoing.read()), ROOM)
    third = connect(pair, contexts)
    third.tls.write(b"of the third")
    n = third.stream.receive(memoryview(third.outgoing.read()), ROOM)
    assert bytes(ROOM[:n]) == b"of the third"


@pytest.mark.parametrize("pieces", [1, 2], ids=["one record", "several"])
def test_an_operation_that_fails_in_any_way_leaves_nothing_behind(
    contexts: Contexts, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair()
    first, second = connect(pair, contexts), connect(pair, contexts)

    def fail(*_: object) -> int:
        raise MemoryError

    monkeypatch.setattr(first.stream, "_read", fail)
    for _ in range(pieces):
        first.tls.write(b"of the first")
    with pytest.raises(MemoryError):
        first.stream.receive(memoryview(first.outgoing.read()), ROOM)
    second.tls.write(b"of the second")
    n = second.stream.receive(memoryview(second.outgoing.read()), ROOM)
    assert bytes(ROOM[:n]) == b"of the second"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_order_of_connections_delivers_to_each_its_own(contexts: Contexts, data: st.DataObject) -> None:
    pair = Pair()
    peers = [connect(pair, contexts) for _ in range(3)]
    for _ in range(data.draw(st.integers(1, 25))):
        peer = peers[data.draw(st.integers(0, 2))]
        match data.draw(st.sampled_from(["write", "deliver", "send", "connect"])):
            case "write":
                content = data.draw(st.binary(min_size=1, max_size=40)) * data.draw(st.sampled_from([1, 500]))
                peer.tls.write(content)
                peer.sent += content
                peer.flush()
            case "deliver":
                size = data.draw(st.integers(1, SMALL))
                part, peer.on_the_way = peer.on_the_way[:size], peer.on_the_way[size:]
                n = peer.stream.receive(memoryview(bytes(part)), ROOM)
                peer.received += ROOM[:n]
            case "send":
                content = data.draw(st.binary(min_size=1, max_size=100))
                assert peer.take(peer.stream.send(content)) == content
            case "connect":
                connect(pair, contexts)
    for peer in peers:
        while peer.on_the_way:
            part, peer.on_the_way = peer.on_the_way[:SMALL], peer.on_the_way[SMALL:]
            n = peer.stream.receive(memoryview(bytes(part)), ROOM)
            peer.received += ROOM[:n]
        assert peer.received == peer.sent


def read_secret(keys: Path, side: str) -> bytes:
    """Return the secret of a side's application data from a key log."""
    label, _, secret = next(
        line.split() for line in keys.read_text().splitlines() if line.startswith(f"{side}_TRAFFIC_SECRET_0")
    )
    assert label
    return bytes.fromhex(secret)


@pytest.fixture
def key_updates(certificate: Certificate, tmp_path: Path) -> tuple[Peer, Sealing]:
    """A peer, and what seals its KeyUpdates, which only TLS 1.3 has."""
    contexts = make_contexts(certificate, ssl.TLSVersion.TLSv1_3)
    contexts.client.keylog_filename = str(tmp_path / "keys")
    peer = connect(Pair(), contexts)
    return peer, Sealing(peer.stream.cipher, read_secret(tmp_path / "keys", "CLIENT"), 0)


def test_key_updates_alone_are_a_flood(key_updates: tuple[Peer, Sealing]) -> None:
    peer, sealing = key_updates
    fed = 0
    while peer.stream.failure is None:
        record = sealing.record(KEY_UPDATE, HANDSHAKE)
        sealing.next_secret()
        assert peer.stream.receive(memoryview(record), ROOM) == 0
        fed += 1
        assert fed <= MAX_USELESS + 1
    assert isinstance(peer.stream.failure, Flood)


def test_a_flood_ends_before_all_that_was_received_is_fed(key_updates: tuple[Peer, Sealing]) -> None:
    peer, sealing = key_updates
    records = []
    for _ in range(4 * MAX_USELESS):
        records.append(sealing.record(KEY_UPDATE, HANDSHAKE))
        sealing.next_secret()
    assert peer.stream.receive(memoryview(b"".join(records)), ROOM) == 0
    assert isinstance(peer.stream.failure, Flood)
    assert len(peer.stream.output) < PIECE + len(records[0])  # as long as what it responds to


def test_a_key_update_now_and_then_is_no_flood(key_updates: tuple[Peer, Sealing]) -> None:
    peer, sealing = key_updates
    for _ in range(MAX_USELESS + 10):
        records = sealing.record(KEY_UPDATE, HANDSHAKE)
        sealing.next_secret()
        records += b"".join(sealing.record(b"x", DATA) for _ in range(FREE))
        assert peer.stream.receive(memoryview(records), ROOM) == FREE
        peer.stream.output = b""
    assert peer.stream.failure is None


def test_responses_that_are_never_sent_are_bounded(key_updates: tuple[Peer, Sealing]) -> None:
    peer, sealing = key_updates
    for _ in range(MAX_OUTPUT // 20):
        records = sealing.record(KEY_UPDATE, HANDSHAKE)
        sealing.next_secret()
        records += b"".join(sealing.record(b"x", DATA) for _ in range(FREE))
        peer.stream.receive(memoryview(records), ROOM)
        if peer.stream.failure is not None:
            break
    assert isinstance(peer.stream.failure, Flood)
    assert len(peer.stream.output) < 2 * MAX_OUTPUT


@pytest.mark.parametrize("split", [0, 3], ids=["whole", "in its header"])
def test_a_long_record_of_the_handshake_is_not_read(contexts: Contexts, split: int) -> None:
    """TLS 1.2 sends a warning for each of the thousands of messages in it; TLS 1.3 has no such record."""
    peer = connect(Pair(), contexts)
    record = b"\x16\x03\x03" + (MAX_RENEGOTIATION + 1).to_bytes(2) + bytes(MAX_RENEGOTIATION + 1)
    assert peer.stream.receive(memoryview(record[:split]), ROOM) == 0
    assert peer.stream.receive(memoryview(record[split:]), ROOM) == 0
    assert isinstance(peer.stream.failure, Flood)


def test_small_messages_are_no_flood(contexts: Contexts) -> None:
    peer = connect(Pair(), contexts)
    for _ in range(5_000):
        peer.tls.write(b"x")
        assert peer.stream.receive(memoryview(peer.outgoing.read()), ROOM) == 1


@pytest.mark.parametrize(
    ("sizes", "behind"),
    [([7] * 566, 0), ([1] * 715, 3)],  # a few bytes in the last part, and one part with nearly all of the records
    ids=["just above a part", "before large ones"],
)
def test_small_messages_behind_a_large_one_are_no_flood(contexts: Contexts, sizes: list[int], behind: int) -> None:
    peer = connect(Pair(), contexts)
    peer.tls.write(bytes(RECORD))
    assert peer.stream.receive(memoryview(peer.outgoing.read()), ROOM) == RECORD
    assert peer.stream.limit == LARGE
    for size in [*sizes, *[RECORD] * behind]:
        peer.tls.write(bytes(size))
    data, received = peer.outgoing.read(), 0
    for begin in range(0, len(data), LARGE):
        received += peer.stream.receive(memoryview(data[begin : begin + LARGE]), ROOM)
    assert peer.stream.failure is None
    assert received == sum(sizes) + behind * RECORD


def test_large_records_are_taken_at_once(contexts: Contexts) -> None:
    peer = connect(Pair(), contexts)
    assert peer.stream.limit == SMALL
    peer.tls.write(bytes(RECORD))
    peer.stream.receive(memoryview(peer.outgoing.read()), ROOM)
    assert peer.stream.limit == LARGE


@pytest.fixture(autouse=True)
def _clear() -> Iterator[None]:
    yield
    ROOM[:] = bytes(len(ROOM))
