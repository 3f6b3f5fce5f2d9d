"""A half-closed tunnel may take any time while it makes progress; without progress, ``timeouts.close`` ends it.

Progress is any byte that a side reads, even if the tunnel has long since handed it to the kernel.
"""

import contextlib
import random
import socket
import time
from collections.abc import Callable

import pytest

from tests.harness import Certificate, receive_exactly
from tests.promises.both_ends import BothEnds, Pair, Threads, receive_until_fin, ticks, wait_until_acknowledged

SETTINGS = '[timeouts]\nclose = "1s"\n'
DATA = random.Random(9).randbytes(4 << 20)
LATE = 6.0
"""Allows for a busy machine; the default close timeout would be 30 s."""


def _client_ends(pair: Pair) -> None:
    pair.client.end()
    assert receive_until_fin(pair.origin) == b""


def _origin_ends(pair: Pair) -> None:
    pair.origin.shutdown(socket.SHUT_WR)
    assert pair.client.receive_all() == b""


@pytest.mark.parametrize("end", [_client_ends, _origin_ends], ids=["client", "origin"])
def test_a_half_closed_tunnel_without_progress_ends(certificate: Certificate, end: Callable[[Pair], None]) -> None:
    with BothEnds(certificate, settings=SETTINGS) as ends:
        pair = ends.open()
        begin = time.monotonic()
        end(pair)
        record = ends.tunnel.wait_records(1)[0]
        assert 0.8 < time.monotonic() - begin < LATE
        assert (record["ended_by"], record["reason"]) == ("tunnel", "close timeout")
        # The side that may still send has received the other's end, so only sending shows the reset.
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            (pair.origin if end is _client_ends else pair.client.sock).send(b".")


def test_a_tunnel_whose_last_bytes_are_not_read_ends(certificate: Certificate) -> None:
    with BothEnds(certificate, settings=SETTINGS) as ends, Threads() as threads:
        client, origin = ends.open(buffers=65_536)

        def send() -> None:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                while True:
                    client.send(DATA)

        threads.do(send)
        origin.shutdown(socket.SHUT_WR)
        record = ends.tunnel.wait_records(1)[0]
        assert (record["ended_by"], record["reason"]) == ("tunnel", "close timeout")


def test_the_close_timeout_does_not_apply_to_an_open_tunnel(certificate: Certificate) -> None:
    with BothEnds(certificate, settings=SETTINGS) as ends:
        client, origin = ends.open()
        time.sleep(1.5)
        client.send(b"still here")
        assert origin.recv(20) == b"still here"


def _origin_drips(pair: Pair) -> None:
    """The client has ended; the origin sends a byte now and then."""
    _client_ends(pair)
    for _ in ticks(2, 0.2):
        pair.origin.sendall(b".")
        assert pair.client.receive() == b"."
    pair.origin.close()
    assert pair.client.receive_all() == b""


def _client_drips(pair: Pair) -> None:
    """The origin has ended; the client sends a byte now and then."""
    _origin_ends(pair)
    for _ in ticks(2, 0.2):
        pair.client.send(b".")
        assert receive_exactly(pair.origin, 1) == b"."
    pair.client.end()
    assert receive_until_fin(pair.origin) == b""


def _client_sips(pair: Pair) -> None:
    """The origin has sent everything and closed; the client reads it slowly."""
    pair.origin.sendall(DATA[:400_000])
    wait_until_acknowledged(pair.origin)
    pair.origin.shutdown(socket.SHUT_WR)
    received = bytearray()
    for _ in ticks(2, 0.2):
        received += pair.client.sock.recv(8192)
    while some := pair.client.sock.recv(65_536):
        received += some
    assert len(received) > 400_000  # records, and therefore slightly more than their contents
    pair.client.sock.close()


def _origin_sips(pair: Pair) -> None:
    """The client has sent everything and ended; the origin reads it slowly."""
    pair.client.send(DATA[:400_000])
    pair.client.end()
    received = bytearray()
    for _ in ticks(2, 0.2):
        received += pair.origin.recv(8192)
    received += receive_until_fin(pair.origin)
    assert received == DATA[:400_000]
    pair.origin.close()


def test_slow_but_steady_progress_continues(certificate: Certificate) -> None:
    """All at once, since each takes three seconds: three times the timeout, which is therefore not a limit in all."""
    with BothEnds(certificate, settings=SETTINGS) as ends, Threads() as threads:
        threads.do(_origin_drips, ends.open())
        threads.do(_client_drips, ends.open())
        # Small windows: a window opens again only when half of it is free, and this should happen soon.
        threads.do(_client_sips, ends.open(buffers=8192))
        threads.do(_origin_sips, ends.open(buffers=8192))
        assert {record["reason"] for record in ends.tunnel.wait_records(4)} == {"closed"}
