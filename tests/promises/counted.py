"""A tunnel of several processes with limits, and clients that reach them at once."""

import contextlib
import os
import signal
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.harness import (
    TIMEOUT,
    Certificate,
    Tunnel,
    accept_upgrade,
    client_context,
    eventually,
    handshake_request,
    read_response,
    upgrade,
)
from tests.promises.firewalled import config_for, connect_from

PROCESSES = 4
FEW = 2
"""Processes where the number does not matter."""
CLIENTS = 40
LIMIT = 16

TUNNELS = f"""
[[sites.rate_limits]]
name = "tunnels"
max_tunnels = {LIMIT}
when = 'path == "/tunnels"'
"""

LIMITS = f"""{TUNNELS}
[[sites.rate_limits]]
name = "fixed"
limit = "{LIMIT}/year"
when = 'path == "/fixed"'

[[sites.rate_limits]]
name = "moving"
limit = "{LIMIT}/day"
strategy = "moving"
when = 'path == "/moving"'

[[sites.rate_limits]]
name = "sliding"
limit = "{LIMIT}/day"
strategy = "sliding"
when = 'path == "/sliding"'

[[sites.rate_limits]]
name = "blocking"
limit = "{LIMIT}/second"
block_for = "1h"
when = 'path == "/blocking"'
"""

BLOCKED = "127.0.0.3"
"""A client's address: a block is for all paths."""

PATIENT = 'state.timeout = "2s"'
"""The processes of a busy machine may need more than 50 ms for an answer, and would then count alone."""

WATCH = "0.1,60,90,90"
"""No process is reported as silent, unless a test says so."""


def hold(sock: socket.socket) -> None:
    """Accept, and hold the tunnel until its client ends it."""
    accept_upgrade(sock)
    with contextlib.suppress(ConnectionError):
        while sock.recv(65_536):
            pass


def tunnel_to(
    origin: str,
    certificate: Certificate,
    *,
    processes: int = FEW,
    site: str = LIMITS,
    state: str = "",
    environment: dict[str, str] | None = None,
    errors_expected: bool = False,
) -> Tunnel:
    top = f'processes = {processes}\nrelease.drain_over = "0s"\n[state]\ntimeout = "2s"\n{state}'
    return Tunnel(
        None,
        certificate,
        config=config_for(origin, certificate, top=top, site=site),
        environment={"TLSTUNNEL_WATCH": WATCH, **(environment or {})},
        errors_expected=errors_expected,
    )


@contextlib.contextmanager
def connected(tunnel: Tunnel, count: int, ip: str = "127.0.0.1") -> Iterator[list[ssl.SSLSocket]]:
    """Return so many clients whose TLS handshakes are done."""
    context = client_context(tunnel)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect_from(tunnel, ip, context)) for _ in range(count)]


def asked_at_once(clients: list[ssl.SSLSocket], path: str) -> list[int]:
    """Send all requests before reading any response, and return the statuses."""
    for client in clients:
        client.sendall(handshake_request(path))
    return [read_response(client).status for client in clients]


def ask(tunnel: Tunnel, path: str, ip: str = "127.0.0.1") -> int:
    """Try one handshake, and return the status. The connection is closed."""
    with connect_from(tunnel, ip) as client:
        return upgrade(client, path).status


def ledger_of(tunnel: Tunnel) -> dict[str, Any]:
    found = tunnel.status()["ledger"]
    assert found is not None
    return dict(found)


def answering(tunnel: Tunnel) -> Counter[str]:
    return Counter(one["counting"].partition(":")[0] for one in tunnel.status()["processes"])


def kill_ledger(tunnel: Tunnel) -> None:
    """Kill the ledger, and wait until there is another one."""
    before = ledger_of(tunnel)["process"]
    os.kill(before, signal.SIGKILL)
    eventually(lambda: tunnel.status()["ledger"] and ledger_of(tunnel)["process"] != before)


def kill_a_process(tunnel: Tunnel) -> None:
    """Kill a serving process, and wait until there is another one in its place."""
    before = {one["process"] for one in tunnel.status()["processes"]}
    os.kill(min(before), signal.SIGKILL)
    eventually(lambda: len({one["process"] for one in tunnel.status()["processes"]} - before) == 1)


def used(tunnel: Tunnel) -> int:
    """Return how many processes have tunnels."""
    return sum(bool(one["tunnels"]) for one in tunnel.status()["processes"])


@contextlib.contextmanager
def traffic(tunnel: Tunnel) -> Iterator[list[int]]:
    """Make one handshake after the other meanwhile, each of which is counted; return their statuses."""
    statuses: list[int] = []
    stop = threading.Event()

    def run() -> None:
        context = client_context(tunnel)
        while not stop.wait(0.01):
            with connect_from(tunnel, "127.0.0.2", context) as client:
                statuses.append(upgrade(client, "/tunnels").status)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield statuses
        eventually(lambda: len(statuses) > 5)
    finally:
        stop.set()
        thread.join(TIMEOUT)
