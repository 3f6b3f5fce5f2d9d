"""Records without data cost much more than messages. They stall no other tunnel, and their sender is cut off.

OpenSSL handles all that it has inside one read: KeyUpdates of TLS 1.3, and in TLS 1.2 the ClientHellos of a client and
the HelloRequests of an origin, each of which it answers with a warning because renegotiation is disabled. A test seals
them in advance, so that they arrive as fast as the socket takes them.
"""

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import (
    Certificate,
    Record,
    assert_below,
    client_context,
    connect_tcp,
    eventually,
    receive_exactly,
)
from tests.promises.both_ends import READ, BothEnds, Threads, TlsEnd
from tests.promises.secure import OldSealing, Sealing, SecureEnds
from tests.promises.test_key_update import DATA, HANDSHAKE, KEY_UPDATE
from tests.promises.wire import split_into_records
from tests.unit.test_hello import TLS13, groups, message, record, server_name, vector

LONGEST = 0.02
"""Seconds that the echo of another tunnel takes at most."""

KEY_UPDATES, OLD_RECORDS = 1 << 20, 4 << 20
"""Bytes of a flood, which take OpenSSL half a second. To seal a KeyUpdate takes 50 us: each has its own key."""

CLIENT_HELLO, HELLO_REQUEST = b"\x01\x00\x00\x00", b"\x00\x00\x00\x00"
"""Headers of messages without a body: OpenSSL does not look at it."""

SERVER_HELLO = 2
RECORD = 16_384
OLD_CIPHERS = "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256"
REASON = "TLS error: TOO_MANY_RECORDS_WITHOUT_DATA"


class Keys:
    """What the last connection of a context has agreed on, so that its records can be sealed."""

    def __init__(self, context: ssl.SSLContext, file: Path) -> None:
        context.keylog_filename = str(file)
        # There is no public way to the server's random.
        context._msg_callback = self._on_message  # type: ignore[attr-defined]
        self._file = file
        self._server_random = b""

    def _on_message(self, *about: Any) -> None:
        _, _, _, content_type, message_type, message = about
        if (content_type, message_type) == (HANDSHAKE, SERVER_HELLO):
            self._server_random = message[6:38]  # RFC 5246 section 7.4.1.3

    def sealing(self, end: TlsEnd, side: str, sent: int) -> Sealing:
        """Return what seals records of TLS 1.3 for a `side` (CLIENT, SERVER) that has sent so many with data."""
        cipher = end._tls.cipher()
        assert cipher is not None
        return Sealing(cipher[0], self._find(f"{side}_TRAFFIC_SECRET_0")[1], sent)

    def old_sealing(self, side: str, sent: int) -> OldSealing:
        """Return what seals records of TLS 1.2, in the same way; the Finished is one more."""
        client_random, secret = self._find("CLIENT_RANDOM")
        return OldSealing(secret, client_random, self._server_random, server=side == "SERVER", sent=sent + 1)

    def _find(self, label: str) -> tuple[bytes, bytes]:
        lines = [line.split() for line in self._file.read_text().splitlines()]
        _, client_random, secret = next(line for line in reversed(lines) if line[0] == label)
        return bytes.fromhex(client_random), bytes.fromhex(secret)

    def flood(self, end: TlsEnd, side: str, sent: int) -> bytes:
        """Return the records of a flood."""
        if end.version == "TLSv1.2":
            return seal_all(self.old_sealing(side, sent), CLIENT_HELLO if side == "CLIENT" else HELLO_REQUEST)
        sealing, records, size = self.sealing(end, side, sent), [], 0
        while size < KEY_UPDATES:
            records.append(sealing.record(KEY_UPDATE, HANDSHAKE))
            sealing.next_secret()
            size += len(records[-1])
        return b"".join(records)


def seal_all(sealing: OldSealing, content: bytes) -> bytes:
    """Return a flood of records with `content`."""
    size = len(content) + 29
    return b"".join(sealing.record(content, HANDSHAKE) for _ in range(OLD_RECORDS // size))


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
        running.origin_context.set_ciphers(OLD_CIPHERS)
        yield running


@pytest.fixture(params=["1.2", "1.3"])
def version(request: pytest.FixtureRequest) -> str:
    """Return a version of TLS."""
    return str(request.param)


def context_and_keys(ends: BothEnds, folder: Path, version: str) -> tuple[ssl.SSLContext, Keys]:
    """Return a client's context for that version of TLS, and the keys of its connections."""
    context = client_context(ends.tunnel)
    if version == "1.2":
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(OLD_CIPHERS)
    return context, Keys(context, folder / "keys")


def plain_echo(ends: BothEnds) -> Callable[[], None]:
    """Open a tunnel; return a function that sends a message through it and back."""
    client, origin = ends.open()

    def echo() -> None:
        client.send(b"x" * 64)
        origin.sendall(receive_exactly(origin, 64))
        client.receive_exactly(64)

    return echo


def secure_echo(secure: SecureEnds) -> Callable[[], None]:
    """Do the same with TLS to the origin."""
    client, origin = secure.open_secure()

    def echo() -> None:
        client.send(b"x" * 64)
        origin.send(origin.receive_exactly(64))
        client.receive_exactly(64)

    return echo


def longest_echo(echo: Callable[[], None], sock: socket.socket, flood: bytes) -> float:
    """Send `flood` on `sock`, and return how long the longest echo takes until its sender is cut off."""

    def send() -> float:
        begin = time.perf_counter()
        with contextlib.suppress(ConnectionError):
            sock.sendall(flood)
            while sock.recv(READ):
                pass
        return time.perf_counter() - begin

    def timed() -> float:
        begin = time.perf_counter()
        echo()
        return time.perf_counter() - begin

    times = [timed()]
    with Threads() as threads:
        sending = threads.do(send)
        while not sending.done():
            times.append(timed())
    times += [timed() for _ in range(20)]
    print(f"longest of {len(times)} echoes {max(times) * 1e3:.1f} ms, cut off after {sending.result() * 1e3:.1f} ms")
    return max(times)


@pytest.mark.alone
def test_within_the_handshake(ends: BothEnds) -> None:
    """A second ClientHello, which may be longer than the first, in records of one byte."""
    echo = plain_echo(ends)
    without_share = message(
        [
            server_name(b"localhost"),
            TLS13,
            groups(0x001D),
            (b"\x00\x0d", vector(b"\x04\x03\x08\x04", 2)),
            (b"\x00\x33", vector(b"", 2)),
        ]
    )
    longest_hello = b"\x01" + vector(bytes(131_000), 3)

    def measure() -> float:
        with connect_tcp(ends.tunnel) as sock:
            sock.sendall(record(without_share))
            assert sock.recv(READ)[5] == SERVER_HELLO  # it asks for a key share
            return longest_echo(echo, sock, split_into_records(record(longest_hello[:60_000]), 1))

    assert_below(LONGEST, measure)
    assert ends.tunnel.wait_records(1, "no TLS handshake")[0]["detail"] == "TOO_MANY_RECORDS_WITHOUT_DATA"


@pytest.mark.alone
def test_before_the_request(ends: BothEnds, tmp_path: Path, version: str) -> None:
    context, keys = context_and_keys(ends, tmp_path, version)
    echo = plain_echo(ends)

    def cut_off() -> list[Record]:
        records = ends.tunnel.records("connection")
        return [ended for ended in records if (ended["path"], ended["reason"]) == ("", REASON)]

    def measure() -> float:
        before = len(cut_off())
        client = ends.connect(context=context)
        longest = longest_echo(echo, client.sock, keys.flood(client, "CLIENT", 0))
        eventually(lambda: len(cut_off()) > before)
        return longest

    assert_below(LONGEST, measure)


@pytest.mark.alone
def test_in_the_splice(ends: BothEnds, tmp_path: Path, version: str) -> None:
    context, keys = context_and_keys(ends, tmp_path, version)
    echo = plain_echo(ends)

    def measure() -> float:
        client, _ = ends.open(context=context)
        longest = longest_echo(echo, client.sock, keys.flood(client, "CLIENT", 1))
        ended = ends.record(client)
        assert (ended["ended_by"], ended["reason"]) == ("client", REASON)
        return longest

    assert_below(LONGEST, measure)


@pytest.mark.alone
@pytest.mark.parametrize("messages", [200, 4_000])
def test_many_messages_in_a_record(ends: BothEnds, tmp_path: Path, messages: int) -> None:
    """OpenSSL would send a warning for each of them."""
    context, keys = context_and_keys(ends, tmp_path, "1.2")
    echo = plain_echo(ends)

    def measure() -> float:
        client, _ = ends.open(context=context)
        flood = seal_all(keys.old_sealing("CLIENT", 1), CLIENT_HELLO * messages)
        longest = longest_echo(echo, client.sock, flood)
        assert ends.record(client)["reason"] == REASON
        return longest

    assert_below(LONGEST, measure)


@pytest.mark.alone
def test_from_the_origin(secure: SecureEnds, tmp_path: Path, version: str) -> None:
    keys = Keys(secure.origin_context, tmp_path / "keys")
    echo = secure_echo(secure)

    def measure() -> float:
        client, origin = secure.open_secure(tls_1_2=version == "1.2")
        longest = longest_echo(echo, origin.sock, keys.flood(origin, "SERVER", 1))
        ended = secure.record(client)
        assert (ended["ended_by"], ended["reason"]) == ("origin", REASON)
        return longest

    assert_below(LONGEST, measure)


def test_a_key_update_for_each_eight_records(ends: BothEnds, tmp_path: Path) -> None:
    context, keys = context_and_keys(ends, tmp_path, "1.3")
    client, origin = ends.open(context=context)
    sealing = keys.sealing(client, "CLIENT", 1)
    for number in range(2_000):
        records = sealing.record(KEY_UPDATE, HANDSHAKE)
        sealing.next_secret()
        client.sock.sendall(records + b"".join(sealing.record(b"%d" % at, DATA) for at in range(8)))
        if number % 100 == 0:
            # The responses are read along with that.
            assert receive_exactly(origin, 8) == b"01234567"
            origin.sendall(b"x")
            assert client.receive_exactly(1) == b"x"
        else:
            assert receive_exactly(origin, 8) == b"01234567"


def test_records_that_are_mostly_padding(ends: BothEnds, tmp_path: Path) -> None:
    context, keys = context_and_keys(ends, tmp_path, "1.3")
    client, origin = ends.open(context=context)
    sealing = keys.sealing(client, "CLIENT", 1)
    data = bytes(number % 256 for number in range(2_000))
    with Threads() as threads:
        threads.do(client.sock.sendall, b"".join(sealing.record(bytes([one]), DATA, RECORD - 1) for one in data))
        assert receive_exactly(origin, len(data)) == data


def test_messages_of_one_byte(ends: BothEnds, tmp_path: Path) -> None:
    context, keys = context_and_keys(ends, tmp_path, "1.3")
    client, origin = ends.open(context=context)
    sealing = keys.sealing(client, "CLIENT", 1)
    data = bytes(number % 256 for number in range(5_000))
    # More is received at once after large records.
    records = [sealing.record(bytes(RECORD), DATA) for _ in range(8)]
    records += [sealing.record(bytes([one]), DATA) for one in data]
    records += [sealing.record(bytes(RECORD), DATA) for _ in range(8)]
    with Threads() as threads:
        threads.do(client.sock.sendall, b"".join(records))
        assert receive_exactly(origin, 16 * RECORD + len(data)) == bytes(8 * RECORD) + data + bytes(8 * RECORD)
