"""With ``timeouts.idle`` an idle tunnel ends properly, and one in use continues; by default all continue."""

import time

import pytest

from tests.harness import Certificate, assert_below
from tests.promises.both_ends import BothEnds, Pair, receive_until_fin, ticks
from tests.promises.wire import cpu_share


def _ping(pair: Pair) -> None:
    pair.client.send(b"ping")
    assert pair.origin.recv(10) == b"ping"
    pair.origin.sendall(b"pong")
    assert pair.client.receive() == b"pong"


def test_idle_ends_and_busy_does_not(certificate: Certificate) -> None:
    with BothEnds(certificate, settings='[timeouts]\nidle = "1s"\n') as ends:
        idle, busy, upwards, downwards = (ends.open() for _ in range(4))
        begin = time.monotonic()
        for _ in ticks(3, 0.2):
            _ping(busy)
            upwards.client.send(b".")
            assert upwards.origin.recv(2) == b"."
            downwards.origin.sendall(b".")
            assert downwards.client.receive() == b"."
        (record,) = ends.tunnel.records("connection")
        assert (record["ended_by"], record["reason"]) == ("tunnel", "idle timeout")
        assert (record["up"], record["down"]) == (0, 0)
        assert 0.9 < record["seconds"] < 3, time.monotonic() - begin
        # Both sides see an orderly end.
        assert receive_until_fin(idle.origin) == b""
        assert idle.client.receive_all() == b""


@pytest.mark.parametrize("settings", ["", '[timeouts]\nidle = "off"\n', '[timeouts]\nclose = "1s"\n'])
def test_off_by_default(certificate: Certificate, settings: str) -> None:
    with BothEnds(certificate, settings=settings) as ends:
        pair = ends.open()
        time.sleep(1.5)
        _ping(pair)


def test_a_tunnel_costs_nothing_while_it_is_idle(certificate: Certificate) -> None:
    with BothEnds(certificate, measured=True) as ends:
        for _ in range(50):
            ends.open()
        assert_below(0.035, lambda: cpu_share(ends.tunnel, 1))  # three ticks of the clock in a second
