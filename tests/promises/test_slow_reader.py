"""A side that does not read holds back the other side of its own tunnel, and nothing else.

The tunnel's memory stays bounded, other tunnels are undisturbed, and every byte arrives once that side reads again.
"""

import hashlib
import random
import selectors
import socket
import time
from collections.abc import Callable

import pytest

from tests.harness import Certificate, assert_below
from tests.promises.both_ends import BothEnds, Pair, Threads
from tests.promises.wire import assert_does_not_spin

MIB = 1 << 20
TUNNELS = 20
GROWTH = 32 * MIB
"""A tunnel may hold 256 KiB and as much again in OpenSSL; these are three times that for each."""
TOO_MUCH = 256 * MIB
"""The kernel's buffers hold far less for one connection: a side that reads this much is not held back."""
NOISE = random.Random(7).randbytes(MIB)


class Flood:
    """Sends as fast as the socket takes it, and counts the bytes."""

    def __init__(self, sock: socket.socket, sealed: Callable[[bytes], bytes]) -> None:
        self.sock = sock
        self._sealed = sealed
        self._left = b""
        self._digest = hashlib.sha256()
        self.size = 0

    def go_on(self) -> None:
        """Send until the socket is full."""
        self.sock.setblocking(False)
        try:
            while True:
                if not self._left:
                    self._digest.update(NOISE)
                    self.size += len(NOISE)
                    self._left = self._sealed(NOISE)
                self._left = self._left[self.sock.send(self._left) :]
                assert self.size < TOO_MUCH, "never held back"
        except BlockingIOError:
            pass

    def end(self, sealed_end: bytes) -> str:
        """Send the rest, and return the digest of everything."""
        self.sock.settimeout(60)
        self.sock.sendall(self._left + sealed_end)
        self.sock.shutdown(socket.SHUT_WR)
        return self._digest.hexdigest()


def _until_held_back(floods: list[Flood]) -> None:
    """Send on all of them until none has taken a byte for a while."""
    with selectors.DefaultSelector() as selector:
        for flood in floods:
            selector.register(flood.sock, selectors.EVENT_WRITE, flood)
        while ready := selector.select(0.5):
            for key, _ in ready:
                key.data.go_on()


def _echo_latency(pair: Pair) -> float:
    begin = time.perf_counter()
    pair.client.send(b"?")
    assert pair.origin.recv(2) == b"?"
    pair.origin.sendall(b"!")
    assert pair.client.receive() == b"!"
    return time.perf_counter() - begin


def _digest(receive: Callable[[], bytes]) -> str:
    digest = hashlib.sha256()
    while some := receive():
        digest.update(some)
    return digest.hexdigest()


@pytest.mark.alone
@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_side_that_does_not_read(certificate: Certificate, direction: str) -> None:
    # A turn is 256 KiB for each of the twenty; only a tunnel that waits for a slow side would take seconds.
    assert_below(0.25, lambda: _p95_beside_slow_sides(certificate, direction))


def _p95_beside_slow_sides(certificate: Certificate, direction: str) -> float:
    with BothEnds(certificate, measured=True) as ends, Threads() as threads:
        other = ends.open()
        pairs = [ends.open(buffers=65_536) for _ in range(TUNNELS)]
        for _ in range(20):
            _echo_latency(other)
        before = ends.tunnel.rss()
        ends.tunnel.reset_peak_rss()
        if direction == "down":
            floods = [Flood(pair.origin, lambda data: data) for pair in pairs]
        else:
            floods = [Flood(pair.client.sock, pair.client.encrypt) for pair in pairs]
        flooding = threads.do(_until_held_back, floods)
        latencies: list[float] = []
        while not flooding.done() or len(latencies) < 100:
            latencies.append(_echo_latency(other))
        flooding.result()
        assert_does_not_spin(ends.tunnel)
        for pair, flood in zip(pairs, floods, strict=True):
            client, origin = pair
            sent = threads.do(flood.end, b"" if direction == "down" else client.close_notify())
            received = _digest(client.receive if direction == "down" else lambda: origin.recv(1 << 18))  # noqa: B023
            assert received == sent.result()
        assert ends.tunnel.peak_rss() - before < GROWTH
        return sorted(latencies)[len(latencies) * 95 // 100]
