"""Thousands of connections that fail leave nothing behind: no memory, no descriptor, no flood of log lines."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice

from tests.harness import (
    Certificate,
    RawOrigin,
    Tunnel,
    client_context,
    connect_tcp,
    connect_tls,
    echo_bytes,
    eventually,
    receive_exactly,
    reset,
    upgrade,
)
from tests.promises.wire import ABRUPT_ENDS, client_hello, read_until_end, wait_for_descriptors

FLOOD = 3_000
AT_ONCE = 20
MIB = 1 << 20
SLACK = 8 * MIB
"""The most that RSS may change: the allocator's own, for some tens of connections. A leak of 3 KiB each is more."""


def _reset_at_once(tunnel: Tunnel) -> None:
    reset(connect_tcp(tunnel))


def _end_at_once(tunnel: Tunnel) -> None:
    connect_tcp(tunnel).close()


def _garbage(tunnel: Tunnel) -> None:
    with connect_tcp(tunnel) as client:
        client.sendall(bytes(100))
        read_until_end(client)


def _half_a_hello(tunnel: Tunnel) -> None:
    with connect_tcp(tunnel) as client:
        client.sendall(HELLO[:200])


def _half_a_handshake(tunnel: Tunnel) -> None:
    client = connect_tcp(tunnel)
    client.sendall(HELLO)
    client.recv(1)
    reset(client)


def _distrust(tunnel: Tunnel) -> None:
    """An alert by the client, which does not trust the authority."""
    with connect_tcp(tunnel) as client, contextlib.suppress(ssl.SSLCertVerificationError):
        DISTRUSTFUL.wrap_socket(client, server_hostname="localhost").close()
        raise AssertionError("trusted without reason")


def _wrong_handshake_data(tunnel: Tunnel) -> None:
    with connect_tcp(tunnel) as client:
        client.sendall(HELLO)
        client.recv(1)
        client.sendall(b"\x16\x03\x03\x00\x10" + bytes(16))
        read_until_end(client)


HELLO = client_hello()
DISTRUSTFUL = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
WITHOUT_A_REQUEST: list[Callable[[Tunnel], None]] = [
    _reset_at_once,
    _end_at_once,
    _garbage,
    _half_a_hello,
    _half_a_handshake,
    _distrust,
    _wrong_handshake_data,
]


def _flood(tunnel: Tunnel, count: int) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for each in [pool.submit(how, tunnel) for how in islice(cycle(WITHOUT_A_REQUEST), count)]:
            each.result()


def _bad_requests(tunnel: Tunnel, context: ssl.SSLContext, count: int) -> None:
    def ask() -> None:
        with connect_tls(tunnel, context=context) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"405" in client.recv(64)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for each in [pool.submit(ask) for _ in range(count)]:
            each.result()


class _GoodClient(threading.Thread):
    """Opens a tunnel, echoes and closes, again and again."""

    def __init__(self, tunnel: Tunnel) -> None:
        super().__init__(daemon=True)
        self._tunnel = tunnel
        self._context = client_context(tunnel)
        self.enough = threading.Event()
        self.served = 0
        self.failures: list[str] = []

    def run(self) -> None:
        while not self.enough.is_set():
            try:
                with connect_tls(self._tunnel, context=self._context) as client:
                    assert upgrade(client).status == 101
                    client.sendall(b"good")
                    assert receive_exactly(client, 4) == b"good"
                self.served += 1
            except (AssertionError, TimeoutError, *ABRUPT_ENDS) as error:
                self.failures.append(repr(error))
                return


def test_a_flood_of_failures_leaves_nothing_behind(certificate: Certificate) -> None:
    with (
        RawOrigin(echo_bytes) as origin,
        Tunnel(origin.address, certificate, arguments=("--http", "refuse"), measured=True) as tunnel,
    ):
        context = client_context(tunnel)
        _flood(tunnel, 400)  # warm up allocators and caches
        _bad_requests(tunnel, context, 100)
        idle = wait_for_descriptors(tunnel, 30)
        warm = tunnel.rss()

        good = _GoodClient(tunnel)
        good.start()
        began = time.monotonic()
        _flood(tunnel, FLOOD)
        _bad_requests(tunnel, context, 300)
        elapsed = time.monotonic() - began
        good.enough.set()
        good.join(20)
        assert not good.failures
        assert good.served > 3

        wait_for_descriptors(tunnel, idle)
        eventually(lambda: tunnel.rss() < warm + SLACK)
        print(f"RSS {warm / MIB:.1f} MiB before, {tunnel.rss() / MIB:.1f} MiB after {elapsed:.1f} s of flood")

        # Each that sent a request has its record; the others are summed up in one line per kind every 10 s.
        eventually(lambda: len(tunnel.records("connection")) == 400 + good.served)
        sampled = tunnel.records("no TLS handshake")
        kinds = {record["reason"] for record in sampled}
        assert len(kinds) <= 10, kinds
        assert len(sampled) <= len(kinds) * (elapsed / 10 + 3), "one line each would flood the log"
        assert any(record["suppressed"] for record in sampled) or elapsed < 10
        assert not [record for record in tunnel.records() if record["level"] == "error"]


def test_a_backlog_full_of_dead_connections_is_emptied(certificate: Certificate) -> None:
    """Reset before they were accepted: accept returns them anyway, and each ends at once."""
    with RawOrigin(echo_bytes) as origin, Tunnel(origin.address, certificate) as tunnel:
        idle = tunnel.descriptors()
        for _ in range(500):
            sock = socket.create_connection(("127.0.0.1", tunnel.port))
            reset(sock)
        with connect_tls(tunnel) as client:
            assert upgrade(client).status == 101
        wait_for_descriptors(tunnel, idle)
