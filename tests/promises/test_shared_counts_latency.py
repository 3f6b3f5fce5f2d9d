"""Established tunnels do not notice what happens to the ledger, since they never ask it."""

import contextlib
import itertools
import os
import signal
import ssl
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.harness import (
    TIMEOUT,
    Certificate,
    RawOrigin,
    Tunnel,
    assert_below,
    client_context,
    echo_bytes,
    eventually,
    receive_exactly,
    upgrade,
)
from tests.promises.counted import TUNNELS, answering, connected, ledger_of
from tests.promises.firewalled import config_for, connect_from
from tests.promises.versions import Versions, upgraded

MORE = 0.002
"""Seconds by which the 99th percentile of an echo may be longer."""

ROUNDS = 3
SECONDS = 1.0
PAUSE = 0.4
"""Seconds between two events. The start of a process is work, which the comparison has too."""

Event = Callable[[], object]


@contextlib.contextmanager
def _echoing(
    certificate: Certificate, more: Mapping[str, str] | None = None
) -> Iterator[tuple[Tunnel, list[ssl.SSLSocket]]]:
    """Return a tunnel of two processes, and clients with established tunnels."""
    top = 'processes = 2\nrelease.drain_over = "0s"\n'
    environment = {"TLSTUNNEL_WATCH": "0.1,60,90,90", **(more or {})}
    with RawOrigin(echo_bytes) as origin:
        config = config_for(origin.address, certificate, top=top, site=TUNNELS)
        with (
            Tunnel(
                None, certificate, config=config, measured=True, environment=environment, errors_expected=True
            ) as tunnel,
            connected(tunnel, 4) as clients,
        ):
            for client in clients:
                assert upgrade(client, "/tunnels").status == 101
            yield tunnel, clients


def _measure(tunnel: Tunnel, clients: list[ssl.SSLSocket], happen: Event, seconds: float) -> float:
    """Return the 99th percentile of echoes, in seconds, while something happens and handshakes are made."""
    over = threading.Event()
    context = client_context(tunnel)

    def run() -> None:
        while not over.is_set():
            happen()
            with connect_from(tunnel, "127.0.0.2", context) as client:
                assert upgrade(client, "/tunnels").status == 101
            over.wait(PAUSE)

    thread = threading.Thread(target=run)
    thread.start()
    latencies: list[float] = []
    began = time.monotonic()
    try:
        while time.monotonic() < began + seconds:
            for client in clients:
                sent = time.perf_counter()
                client.sendall(b"x" * 64)
                receive_exactly(client, 64)
                latencies.append(time.perf_counter() - sent)
            time.sleep(0.0005)
    finally:
        over.set()
        thread.join(2 * TIMEOUT)
    return statistics.quantiles(latencies, n=100)[98]


def _compare(
    tunnel: Tunnel, clients: list[ssl.SSLSocket], happen: Event, otherwise: Event, seconds: float = SECONDS
) -> None:
    """Compare the medians of interleaved rounds of so many seconds."""

    def measure_more() -> float:
        rounds = [
            (_measure(tunnel, clients, otherwise, seconds), _measure(tunnel, clients, happen, seconds))
            for _ in range(ROUNDS)
        ]
        without, with_it = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"p99 {without * 1e3:.2f} ms without, {with_it * 1e3:.2f} ms with it")
        return float(with_it - without)

    assert_below(MORE, measure_more)


def _start_another_process(tunnel: Tunnel) -> None:
    """Do the work of starting a ledger, and of asking for the status."""
    subprocess.run([sys.executable, "-c", "import tlstunnel.processes.ledger"], check=True)
    tunnel.status()


@pytest.mark.alone
@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGKILL, id="killed"), pytest.param(signal.SIGTERM, id="replaced", marks=pytest.mark.soak)],
)
def test_a_ledger_that_is(number: signal.Signals, certificate: Certificate) -> None:
    """With SIGTERM it hands over as at an upgrade."""
    with _echoing(certificate) as (tunnel, clients):

        def end() -> None:
            before = ledger_of(tunnel)["process"]
            os.kill(before, number)
            eventually(lambda: (tunnel.status()["ledger"] or {}).get("process", before) != before, interval=0.3)

        _compare(tunnel, clients, end, lambda: _start_another_process(tunnel))


@pytest.mark.alone
def test_a_ledger_that_is_stopped_and_continues(certificate: Certificate) -> None:
    with _echoing(certificate) as (tunnel, clients):
        ledger = ledger_of(tunnel)["process"]

        def stop() -> None:
            os.kill(ledger, signal.SIGSTOP)
            time.sleep(0.1)
            os.kill(ledger, signal.SIGCONT)
            eventually(lambda: set(answering(tunnel)) == {"ledger"}, interval=0.1)

        _compare(tunnel, clients, stop, tunnel.status)


@pytest.mark.soak
@pytest.mark.alone
def test_a_tunnel_that_is_upgraded(certificate: Certificate, tmp_path: Path) -> None:
    """The parent, the ledger and the serving processes are replaced; established tunnels stay where they are."""
    versions = Versions(tmp_path / "versions")
    versions.install("2.0.0")
    next_version = itertools.cycle(["2.0.0", "1.0.0"])
    with _echoing(certificate, versions.environment) as (tunnel, clients):

        def replace_all() -> None:
            versions.choose(next(next_version))
            upgraded(tunnel)

        def start_as_many() -> None:
            modules = ("parent", "child", "child", "ledger")
            commands = [[sys.executable, "-c", f"import tlstunnel.processes.{module}"] for module in modules]
            for process in [subprocess.Popen(command) for command in commands]:
                assert process.wait() == 0

        _compare(tunnel, clients, replace_all, start_as_many, seconds=3.0)
