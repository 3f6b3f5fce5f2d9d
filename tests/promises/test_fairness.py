"""A tunnel that moves bulk data both ways at full speed does not slow the others down noticeably."""

import contextlib
import time
from collections.abc import Callable

import pytest

from tests.harness import Certificate, assert_below, eventually
from tests.promises.both_ends import BothEnds, Pair, Threads

TUNNELS = 50
ECHOES = 1000
BUSY = 32 << 20
"""Bytes that the busy tunnel has to move each way meanwhile: beside an idle one, all are quick."""
P99 = 0.25
"""Seconds. The tunnel moves a quarter of a megabyte of the busy one a turn, in half a millisecond; the rest of what
is measured comes from the test's own five threads under one interpreter lock (5 ms a switch) and other programs. A
tunnel served only when the busy one pauses would take seconds."""
BULK = bytes(1 << 20)


@pytest.mark.alone
def test_echoes_beside_bulk(certificate: Certificate) -> None:
    with BothEnds(certificate, measured=True) as ends, Threads() as threads:
        pairs = [ends.open() for _ in range(TUNNELS)]
        busy = ends.open()
        moved = {"up": 0, "down": 0}
        over = False

        def send(sender: Callable[[bytes], object]) -> None:
            with contextlib.suppress(OSError):
                while not over:
                    sender(BULK)

        def receive(receiver: Callable[[], bytes], direction: str) -> None:
            with contextlib.suppress(OSError):
                while some := receiver():
                    moved[direction] += len(some)

        threads.do(send, busy.client.send)
        threads.do(send, busy.origin.sendall)
        threads.do(receive, lambda: busy.origin.recv(1 << 18), "up")
        threads.do(receive, busy.client.receive, "down")
        eventually(lambda: min(moved.values()) > BUSY)
        try:
            assert_below(P99, lambda: _p99(pairs, moved))
        finally:
            over = True
            for sock in (busy.client.sock, busy.origin):
                with contextlib.suppress(OSError):  # the tunnel may have passed on the end of the other
                    sock.shutdown(2)


def _p99(pairs: list[Pair], moved: dict[str, int]) -> float:
    begin, before = time.monotonic(), dict(moved)
    latencies: list[float] = []
    while len(latencies) < ECHOES or min(moved[way] - before[way] for way in moved) < BUSY:
        latencies += [_echo(pair) for pair in pairs]
        assert time.monotonic() - begin < 30, ("the busy tunnel is starved", moved, len(latencies))
    latencies.sort()
    seconds = time.monotonic() - begin
    after = dict(moved)
    p99 = latencies[len(latencies) * 99 // 100]
    figures = f"p50 {latencies[len(latencies) // 2] * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms, in {seconds:.1f} s"
    print(figures, {way: f"{(after[way] - before[way]) / seconds / 1e6:.0f} MB/s" for way in moved})
    return p99


def _echo(pair: Pair) -> float:
    begin = time.perf_counter()
    pair.client.send(b"x" * 64)
    assert pair.origin.recv(100) == b"x" * 64
    pair.origin.sendall(b"y" * 64)
    assert pair.client.receive() == b"y" * 64
    return time.perf_counter() - begin
