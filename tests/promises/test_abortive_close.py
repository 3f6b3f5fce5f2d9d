"""A reset (RST) of one side resets the other, after everything sent before it; FIN without close_notify truncates.

In every case the tunnel ends, releases its descriptors and does not spin.
"""

import random
import socket
import ssl
from collections.abc import Iterator

import pytest

from tests.harness import Certificate, Record, eventually, receive_exactly, reset
from tests.promises.both_ends import (
    BothEnds,
    Pair,
    Threads,
    receive_until_fin,
    receive_until_reset,
    wait_until_acknowledged,
)
from tests.promises.wire import assert_does_not_spin

MIB = 1 << 20
DATA = random.Random(3).randbytes(2 * MIB)


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


def _who_and_why(record: Record) -> tuple[str, str]:
    return record["ended_by"], record["reason"]


def _full(pair: Pair, direction: str) -> int:
    """Send in ``direction`` until its tunnel is full; return how many bytes of `DATA`, repeated, were taken."""
    sock = pair.client.sock if direction == "up" else pair.origin
    sealed = pair.client.encrypt if direction == "up" else bytes
    sock.settimeout(0.5)
    size = 0
    try:
        while True:
            sock.sendall(sealed(DATA[size % MIB :][:16_384]))
            size += 16_384
    except TimeoutError:
        return size


def test_a_reset_by_the_client(ends: BothEnds) -> None:
    client, origin = ends.open()
    reset(client.sock)
    with pytest.raises(ConnectionResetError):
        origin.recv(1)
    assert _who_and_why(ends.record(client)) == ("client", "reset")


def test_a_reset_by_the_origin(ends: BothEnds) -> None:
    client, origin = ends.open()
    reset(origin)
    with pytest.raises(ConnectionResetError):
        client.receive()
    assert _who_and_why(ends.record(client)) == ("origin", "reset")


@pytest.mark.parametrize("size", [1, 5000, 200_000])
def test_data_and_then_a_reset_by_the_client(ends: BothEnds, size: int) -> None:
    for number in range(10):
        client, origin = ends.open()
        client.send(DATA[:size])
        wait_until_acknowledged(client.sock)
        reset(client.sock)
        assert receive_exactly(origin, size) == DATA[:size], f"the {number}th"
        with pytest.raises(ConnectionResetError):
            origin.recv(1)
        record = ends.record(client)
        assert (record["ended_by"], record["reason"], record["up"]) == ("client", "reset", size)


@pytest.mark.parametrize("size", [1, 5000, 200_000])
def test_data_and_then_a_reset_by_the_origin(ends: BothEnds, size: int) -> None:
    for number in range(10):
        client, origin = ends.open()
        origin.sendall(DATA[:size])
        wait_until_acknowledged(origin)
        reset(origin)
        assert client.receive_exactly(size) == DATA[:size], f"the {number}th"
        with pytest.raises(ConnectionResetError):
            client.receive()
        record = ends.record(client)
        assert (record["ended_by"], record["reason"], record["down"]) == ("origin", "reset", size)


@pytest.mark.parametrize("version", ["TLSv1.3", "TLSv1.2"])
def test_a_fin_without_close_notify_is_a_truncation(ends: BothEnds, version: str) -> None:
    client, origin = ends.open(context=ends.tls_1_2() if version == "TLSv1.2" else None)
    client.send(DATA)
    client.sock.shutdown(socket.SHUT_WR)
    assert receive_until_fin(origin) == DATA
    assert _who_and_why(ends.record(client)) == ("client", "truncated")


def test_a_record_cut_by_a_fin_is_a_truncation(ends: BothEnds) -> None:
    client, origin = ends.open()
    client.sock.sendall(client.encrypt(b"whole") + client.encrypt(b"never whole")[:-3])
    client.sock.shutdown(socket.SHUT_WR)
    assert receive_until_fin(origin) == b"whole"
    assert _who_and_why(ends.record(client)) == ("client", "truncated")


def test_a_client_that_continues_unencrypted_is_an_error(ends: BothEnds) -> None:
    client, origin = ends.open()
    client.send(b"sealed")
    client.sock.sendall(b"in clear, which is no record")
    assert receive_exactly(origin, 6) == b"sealed"
    with pytest.raises(ConnectionResetError):
        origin.recv(1)
    who, why = _who_and_why(ends.record(client))
    assert who == "client"
    assert why.startswith("TLS error: ")


def test_a_client_that_resets_while_the_tunnel_waits_for_the_origin(measured: BothEnds) -> None:
    """The client's socket is not read at that time, and epoll still reports its error, again and again."""
    idle = measured.tunnel.descriptors()
    client, origin = measured.open(buffers=65_536)
    size = _full(Pair(client, origin), "up")
    reset(client.sock)
    assert_does_not_spin(measured.tunnel)
    received = receive_until_reset(lambda: origin.recv(65_536))
    # The reset discards what was in the client's kernel; what arrives is a prefix of what it sent.
    assert received == (DATA[:MIB] * (size // MIB + 1))[: len(received)]
    record = measured.record(client)
    assert (record["ended_by"], record["reason"], record["up"]) == ("client", "reset", len(received))
    eventually(lambda: measured.tunnel.descriptors() <= idle)


def test_an_origin_that_resets_while_the_tunnel_waits_for_the_client(measured: BothEnds) -> None:
    idle = measured.tunnel.descriptors()
    client, origin = measured.open(buffers=65_536)
    size = _full(Pair(client, origin), "down")
    reset(origin)
    assert_does_not_spin(measured.tunnel)
    received = receive_until_reset(client.receive)
    assert received == (DATA[:MIB] * (size // MIB + 1))[: len(received)]
    record = measured.record(client)
    assert (record["ended_by"], record["reason"]) == ("origin", "reset")
    eventually(lambda: measured.tunnel.descriptors() <= idle)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_side_that_stops_reading_does_not_hold_up_a_closing_tunnel(certificate: Certificate, direction: str) -> None:
    """The sender closes with bytes still to deliver: no spin, and ``timeouts.close`` ends the tunnel."""
    with BothEnds(certificate, settings='[timeouts]\nclose = "1s"\n', measured=True) as ends:
        idle = ends.tunnel.descriptors()
        pair = ends.open(buffers=65_536)
        _full(pair, direction)
        reset(pair.client.sock if direction == "up" else pair.origin)
        assert_does_not_spin(ends.tunnel)
        assert _who_and_why(ends.record(pair.client)) == ("tunnel", "close timeout")
        eventually(lambda: ends.tunnel.descriptors() == idle)


@pytest.mark.parametrize("side", ["client", "origin"])
def test_a_reset_by_the_side_that_does_not_read(measured: BothEnds, side: str) -> None:
    """The tunnel is waiting until it can write to this side when it resets: the other side is reset at once."""
    idle = measured.tunnel.descriptors()
    pair = measured.open(buffers=65_536)
    _full(pair, "down" if side == "client" else "up")
    reset(pair.client.sock if side == "client" else pair.origin)
    other = pair.origin if side == "client" else pair.client.sock
    other.settimeout(5)
    with pytest.raises(ConnectionResetError):
        other.recv(1)
    assert _who_and_why(measured.record(pair.client)) == (side, "reset")
    eventually(lambda: measured.tunnel.descriptors() <= idle)


@pytest.mark.parametrize("side", ["client", "origin"])
def test_a_reset_by_the_side_that_had_ended(measured: BothEnds, side: str) -> None:
    """It had ended its direction and awaited a response: when it resets now, the tunnel ends."""
    idle = measured.tunnel.descriptors()
    client, origin = measured.open()
    if side == "client":
        client.end()
        assert receive_until_fin(origin) == b""
        origin.sendall(b"half an ans")
        assert client.receive() == b"half an ans"
        reset(client.sock)
    else:
        origin.shutdown(socket.SHUT_WR)
        assert client.receive_all() == b""
        client.send(b"half a ques")
        assert receive_exactly(origin, 11) == b"half a ques"
        reset(origin)
    assert_does_not_spin(measured.tunnel)
    eventually(lambda: measured.tunnel.descriptors() <= idle)
    assert measured.record(client)["ended_by"] == side


def test_both_reset_at_once(ends: BothEnds) -> None:
    with Threads() as threads:
        idle = ends.tunnel.descriptors()
        for number in range(30):
            client, origin = ends.open()
            if number % 2:
                client.send(DATA[:1000])
                origin.sendall(DATA[:1000])
            threads.do(reset, origin)
            reset(client.sock)
            who, why = _who_and_why(ends.record(client))
            assert who in ("client", "origin")
            assert why == "reset"
        eventually(lambda: ends.tunnel.descriptors() <= idle)


def test_other_tunnels_are_unaffected(ends: BothEnds) -> None:
    witness = ends.open()
    for number in range(40):
        client, origin = ends.open()
        client.send(b"some")
        reset(client.sock if number % 2 else origin)
        witness.client.send(b"%2d" % number)
        assert receive_exactly(witness.origin, 2) == b"%2d" % number
        ends.record(client)
    witness.origin.sendall(b"still here")
    assert witness.client.receive() == b"still here"


def test_an_abort_is_not_an_orderly_end_for_the_client(ends: BothEnds) -> None:
    """What the origin broke off must not look complete: no close_notify, so no `ssl.SSLSocket` reads an end."""
    client, origin = ends.open()
    origin.sendall(b"half of")
    assert client.receive() == b"half of"
    reset(origin)
    with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
        client.receive()
