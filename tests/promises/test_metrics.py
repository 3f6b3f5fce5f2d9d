"""Metrics add up over all processes, and a total never decreases when a process ends or is replaced."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness import (
    Certificate,
    RawOrigin,
    Tunnel,
    assert_below,
    connect_tls,
    echo_bytes,
    eventually,
    receive_all,
    receive_exactly,
    upgrade,
)
from tests.promises.versions import upgraded

TWO = ("--processes", "2")
Totals = dict[str, int]


@pytest.fixture(scope="module")
def origin() -> Iterator[RawOrigin]:
    with RawOrigin(echo_bytes) as origin:
        yield origin


def totals(tunnel: Tunnel) -> Totals:
    """Return the sum of each family, and of each value of a label that has one."""
    found: Totals = {}
    for name, series in tunnel.status()["metrics"].items():
        for one in series:
            for key in (name, *(f"{name} {label}={value}" for label, value in one["labels"].items())):
                found[key] = found.get(key, 0) + one["value"]
    return found


def counters(found: Totals) -> Totals:
    return {key: value for key, value in found.items() if "_total" in key}


def assert_none_decreased(before: Totals, after: Totals) -> None:
    decreased = {key: (value, after.get(key)) for key, value in counters(before).items() if after.get(key, 0) < value}
    assert not decreased


def use(tunnel: Tunnel, times: int) -> None:
    """Open tunnels, one after the other, move 4 bytes both ways, and end them."""
    for _ in range(times):
        with connect_tls(tunnel) as client:
            assert upgrade(client).status == 101
            client.sendall(b"ping")
            assert receive_exactly(client, 4) == b"ping"
    tunnel.wait_records(times)


def refuse(tunnel: Tunnel, times: int) -> None:
    for _ in range(times):
        with connect_tls(tunnel) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert receive_all(client).startswith(b"HTTP/1.1 426 ")


def test_counts_of_two_processes_add_up(origin: RawOrigin, certificate: Certificate) -> None:
    with Tunnel(origin.address, certificate, arguments=(*TWO, "--http", "refuse")) as tunnel, ExitStack() as stack:
        use(tunnel, 20)
        refuse(tunnel, 5)
        tunnel.wait_records(25)
        for _ in range(10):
            client = stack.enter_context(connect_tls(tunnel))
            assert upgrade(client).status == 101
            client.sendall(b"open")
            assert receive_exactly(client, 4) == b"open"
        found = totals(tunnel)
    assert found["tlstunnel_connections_accepted_total"] == 35
    assert found["tlstunnel_tunnels_opened_total"] == 30
    assert found["tlstunnel_connections_total"] == 25
    assert found["tlstunnel_connections_total reason=no upgrade"] == 5
    assert found["tlstunnel_connections_total ended_by=tunnel"] == 5
    assert found["tlstunnel_tunnels"] == 10
    assert found["tlstunnel_unfinished_handshakes"] == 0
    assert found["tlstunnel_bytes_total direction=up"] == 120  # those of open tunnels included
    assert found["tlstunnel_bytes_total direction=down"] == 120


def test_a_killed_process_takes_at_most_the_last_second_with_it(origin: RawOrigin, certificate: Certificate) -> None:
    with Tunnel(origin.address, certificate, arguments=TWO, errors_expected=True) as tunnel:
        use(tunnel, 20)
        time.sleep(2)  # each has sent its counts, unprompted
        victims = tunnel.pids
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        eventually(lambda: len(tunnel.status()["processes"]) == 2 and not set(victims) & set(tunnel.pids))
        found = totals(tunnel)
        assert found["tlstunnel_tunnels_opened_total"] == found["tlstunnel_connections_total"] == 20
        assert found["tlstunnel_tunnels"] == 0
        use(tunnel, 5)
        assert totals(tunnel)["tlstunnel_tunnels_opened_total"] == 25


def test_a_process_reports_before_it_exits(origin: RawOrigin, certificate: Certificate) -> None:
    """This includes what it has counted within its last second."""
    with Tunnel(origin.address, certificate, arguments=TWO) as tunnel:
        use(tunnel, 10)
        leaving = tunnel.pids
        for pid in leaving:
            os.kill(pid, signal.SIGTERM)
        eventually(lambda: len(tunnel.status()["processes"]) == 2 and not set(leaving) & set(tunnel.pids))
        found = totals(tunnel)
        assert found["tlstunnel_tunnels_opened_total"] == found["tlstunnel_connections_total"] == 10


def test_totals_continue_through_upgrades_and_reloads(origin: RawOrigin, certificate: Certificate) -> None:
    with Tunnel(origin.address, certificate, arguments=TWO) as tunnel, connect_tls(tunnel) as kept:
        assert upgrade(kept).status == 101
        before: Totals = {}
        for times in (1, 2):
            use(tunnel, 10)
            upgraded(tunnel)
            tunnel.reload()
            found = totals(tunnel)
            assert_none_decreased(before, found)
            before = found
            tunnel.wait_records(10 * times)
        eventually(lambda: totals(tunnel)["tlstunnel_connections_total"] == 20)
        found = totals(tunnel)
        assert found["tlstunnel_tunnels_opened_total"] == 21
        assert found["tlstunnel_tunnels"] == 1


def test_totals_never_decrease_while_processes_come_and_go(origin: RawOrigin, certificate: Certificate) -> None:
    with Tunnel(origin.address, certificate, arguments=TWO, errors_expected=True) as tunnel:
        before: Totals = {}
        for number in range(4):
            use(tunnel, 5)
            os.kill(tunnel.pids[number % 2], (signal.SIGTERM, signal.SIGKILL)[number % 2])
            for _ in range(3):
                found = totals(tunnel)
                assert_none_decreased(before, found)
                before = found


def test_an_idle_process_sends_nothing(origin: RawOrigin, certificate: Certificate) -> None:
    """Without changes nothing wakes up: neither an open tunnel nor passing time costs CPU."""

    def ticks(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    with Tunnel(origin.address, certificate, measured=True) as tunnel, connect_tls(tunnel) as client:
        assert upgrade(client).status == 101
        pids = (tunnel.parent, *tunnel.pids)

        def measure() -> float:
            before = [(ticks(pid), _switches(pid)) for pid in pids]
            time.sleep(2)
            now = [(ticks(pid), _switches(pid)) for pid in pids]
            # A tick is 10 ms: the certificates' files are checked meanwhile.
            return max(
                max((after[0] - first[0]) / 2, (after[1] - first[1]) / 6)
                for after, first in zip(now, before, strict=True)
            )

        assert_below(1, measure)


def _switches(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
