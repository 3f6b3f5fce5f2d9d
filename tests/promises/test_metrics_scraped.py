"""What Prometheus gets: all families of the table, right after it happened; and no counter ever decreases."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.harness import (
    Certificate,
    RawOrigin,
    Tunnel,
    connect_tcp,
    connect_tls,
    echo_bytes,
    eventually,
    receive_all,
    receive_exactly,
    upgrade,
)
from tests.metrics import Series, config_with_a_closed_origin, find_decreased, read_metrics, scrape
from tests.promises.versions import upgraded
from tlstunnel import __version__
from tlstunnel.metrics.families import (
    BUILD_INFO,
    CERTIFICATE_EXPIRY,
    EVENT_LOOP_LAG_SECONDS,
    FAMILIES,
    FIREWALL_CHECK_SECONDS,
    HANDSHAKE_SECONDS,
    HANDSHAKE_STAGE_SECONDS,
    HANDSHAKES,
    LEDGER_UP,
    ORIGIN_EJECTIONS,
    ORIGIN_FAILURES,
    ORIGIN_TUNNELS,
    ORIGIN_UP,
    PROCESS_EXITS,
    PROCESS_MEMORY,
    PROCESSES,
    SUM,
    TUNNEL_LIFETIME_SECONDS,
    TUNNELS,
    Family,
)

OF_OTHER_CONFIGURATIONS = {
    "tlstunnel_accept_pauses_total",
    "tlstunnel_connections_not_accepted_total",
    "tlstunnel_edge_requests_total",
    "tlstunnel_firewall_checks_failed_total",
    "tlstunnel_firewall_managed_rule_matches_total",
    "tlstunnel_firewall_managed_rules_total",
    "tlstunnel_ledger_failures_total",
    "tlstunnel_health_checks_total",
    "tlstunnel_valkey_up",
    "tlstunnel_config_reloads_total",
    "tlstunnel_process_exits_total",
}
"""Families without a value here. Their own tests have some: tests/unit/test_metrics.py, and the firewall's."""


@pytest.fixture(scope="module")
def origin() -> Iterator[RawOrigin]:
    with RawOrigin(echo_bytes) as origin:
        yield origin


@pytest.fixture(scope="module")
def tunnel(origin: RawOrigin, certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tunnel]:
    """Two processes, a ledger and a history; one origin of two does not listen."""
    folder = tmp_path_factory.mktemp("state")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        config = config_with_a_closed_origin(origin.address, port, certificate, folder, ejected="10m")
        with Tunnel(None, certificate, config=config, errors_expected=True) as tunnel:
            yield tunnel


def histogram_count(tunnel: Tunnel, family: Family, *labels: str) -> int:
    series = read_metrics(tunnel)[family]
    return sum(value for found, value in series.items() if found[:-1] == labels and found[-1] != SUM)


def use(tunnel: Tunnel, path: str = "/") -> bool:
    """Open a tunnel, move some bytes and end it. Return whether it was opened."""
    with connect_tls(tunnel) as client:
        opened = upgrade(client, path=path).status == 101
        if opened:
            client.sendall(b"ping")
            assert receive_exactly(client, 4) == b"ping"
        else:
            receive_all(client)
        return opened


def test_everything_that_happens_is_counted(tunnel: Tunnel, certificate: Certificate) -> None:
    with connect_tcp(tunnel) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        receive_all(client)
    with ExitStack() as stack:
        assert all(use(tunnel) for _ in range(6))
        assert not use(tunnel, "/admin")
        client = stack.enter_context(connect_tls(tunnel))
        assert upgrade(client).status == 101
        tunnel.wait_records(7)
        metrics = read_metrics(tunnel)
        assert metrics[HANDSHAKES]["localhost", "opened"] == 7
        assert metrics[HANDSHAKES]["localhost", "blocked"] == 1
        assert metrics[TUNNELS] == {("localhost",): 1}
        for stage, expected in (
            ("hello", 8),
            ("tls", 8),
            ("request", 8),
            ("firewall", 7),
            ("edge", 0),
            ("origin connect", 7),
            ("origin response", 7),
        ):
            assert histogram_count(tunnel, HANDSHAKE_STAGE_SECONDS, stage) == expected, stage
        assert histogram_count(tunnel, HANDSHAKE_SECONDS) == 7
        assert histogram_count(tunnel, TUNNEL_LIFETIME_SECONDS) == 6
        assert histogram_count(tunnel, FIREWALL_CHECK_SECONDS, "rules") == 8
        assert histogram_count(tunnel, FIREWALL_CHECK_SECONDS, "rate limits") == 7
        total = metrics[HANDSHAKE_SECONDS][SUM,]
        parts = sum(value for (_, bucket), value in metrics[HANDSHAKE_STAGE_SECONDS].items() if bucket == SUM)
        assert 0 < total <= parts  # those of the refused handshake are more
        assert sorted(metrics[ORIGIN_UP].values()) == [0, 1]
        assert metrics.total(ORIGIN_TUNNELS) == 1
        assert 1 <= metrics.total(ORIGIN_FAILURES, reason="unreachable") == metrics.total(ORIGIN_EJECTIONS) <= 2
        assert metrics[CERTIFICATE_EXPIRY].keys() == {(str(certificate.cert),)}
        assert metrics[LEDGER_UP] == {(): 1}
        assert metrics[PROCESSES]["serving", "serving"] == 2
        ((version, _, _),) = metrics[BUILD_INFO]
        assert version == __version__
        assert {role for role, _, _ in metrics[PROCESS_MEMORY]} == {"parent", "serving", "ledger"}
        assert all(value > 1 << 20 for value in metrics[PROCESS_MEMORY].values())
        eventually(lambda: histogram_count(tunnel, EVENT_LOOP_LAG_SECONDS))
        metrics = read_metrics(tunnel)
        missing = {name for name, family in FAMILIES.items() if not metrics[family]} - OF_OTHER_CONFIGURATIONS
        assert missing <= {"tlstunnel_unfinished_handshakes_evicted_total"}


def test_no_counter_decreases_while_processes_come_and_go(tunnel: Tunnel) -> None:
    before: Series = scrape(tunnel)

    def check() -> None:
        nonlocal before
        now = scrape(tunnel)
        assert find_decreased(before, now) == {}
        before = now

    number = 0
    with connect_tls(tunnel) as kept:
        assert upgrade(kept).status == 101
        for disturb in (
            lambda: os.kill(tunnel.pids[0], signal.SIGKILL),
            tunnel.reload,
            lambda: upgraded(tunnel),
            lambda: os.kill(tunnel.pids[-1], signal.SIGTERM),
        ):
            assert use(tunnel)
            number += 1
            eventually(lambda: histogram_count(tunnel, HANDSHAKE_SECONDS) >= 7)
            check()
            disturb()
            for _ in range(3):
                check()
            eventually(lambda: read_metrics(tunnel)[PROCESSES]["serving", "serving"] == 2)
            check()
    metrics = read_metrics(tunnel)
    assert metrics[HANDSHAKES]["localhost", "opened"] >= 7 + number
    assert metrics.total(PROCESS_EXITS, role="serving") >= 1
