"""Limits hold for several machines together if they use one Valkey server, whatever happens to that server."""

import contextlib
import re
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.harness import (
    TIMEOUT,
    Certificate,
    RawOrigin,
    Tunnel,
    client_context,
    eventually,
)
from tests.promises.counted import (
    CLIENTS,
    LIMIT,
    LIMITS,
    TUNNELS,
    ask,
    asked_at_once,
    connected,
    hold,
    ledger_of,
    traffic,
)
from tests.promises.firewalled import config_for
from tests.promises.machines import Machine, connected_machines
from tests.redis_server import RedisServer, find_free_port

BY_PATH = re.sub(r'(?m)^name = "(\w+)"$', r'name = "\1"\nkey = ["path"]', LIMITS)
"""The limits, for all clients together: each machine is reached from another address."""


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawOrigin]:
    with RawOrigin(hold, path=tmp_path_factory.mktemp("origin") / "sock") as origin:
        yield origin


# --- two machines -----------------------------------------------------------------------------------------------------


def connect(tunnel: Tunnel, machine: Machine, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection((machine.own, tunnel.port), TIMEOUT)
    return context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False)


@contextlib.contextmanager
def on_both(tunnels: list[tuple[Tunnel, Machine]], count: int) -> Iterator[list[ssl.SSLSocket]]:
    """Return so many clients, of each machine by turns."""
    with contextlib.ExitStack() as stack:
        context = client_context(tunnels[0][0])
        yield [stack.enter_context(connect(*tunnels[number % len(tunnels)], context)) for number in range(count)]


def test_each_limit_is_exact_over_two_machines(origin: RawOrigin, certificate: Certificate) -> None:
    """Each has two processes."""
    port = find_free_port()
    with (
        connected_machines() as machines,
        RedisServer("bind 0.0.0.0", "protected-mode no", port=port) as server,
        contextlib.ExitStack() as stack,
    ):
        tunnels = []
        for machine in machines:
            top = f'processes = 2\nrelease.drain_over = "0s"\n[state]\ntimeout = "2s"\nurl = "redis://{machine.host}:{port}/0"'
            config = config_for(origin.address, certificate, top=top, site=BY_PATH)
            config = config.replace('"127.0.0.1:0"', f'"{machine.own}:0"')
            tunnel = Tunnel(None, certificate, config=config, wrapper=machine.wrapper)
            tunnels.append((stack.enter_context(tunnel), machine))
        for path in ("/fixed", "/moving", "/sliding", "/blocking", "/tunnels"):
            with on_both(tunnels, LIMIT // 2) as first, on_both(tunnels, CLIENTS) as clients:
                assert asked_at_once(first, path) == [101] * (LIMIT // 2), path
                passed = asked_at_once(clients, path).count(101)
                assert passed == LIMIT - LIMIT // 2, path
            for tunnel, _ in tunnels:
                eventually(lambda tunnel=tunnel: ledger_of(tunnel)["leases"] == 0)  # type: ignore[misc]
        with on_both(tunnels, 2) as clients:
            assert asked_at_once(clients, "/blocking") == [429, 429]
        keys = server.command("KEYS", "*")
        assert isinstance(keys, list)
        assert keys
        assert all(key.startswith(b"{tlstunnel}:") for key in keys)
        for tunnel, _ in tunnels:
            assert tunnel.records("counting") == []


# --- one machine, and what happens to the server ----------------------------------------------------------------------


def tunnel_with(origin: RawOrigin, certificate: Certificate, url: str, on_failure: str = "local") -> Tunnel:
    top = (
        f'processes = 2\nrelease.drain_over = "0s"\n[state]\ntimeout = "500ms"\nurl = "{url}"\n'
        f'on_failure = "{on_failure}"'
    )
    environment = {"TLSTUNNEL_WATCH": "0.1,60,90,90"}
    config = config_for(origin.address, certificate, top=top, site=TUNNELS)
    return Tunnel(None, certificate, config=config, environment=environment)


def counts(tunnel: Tunnel) -> bool:
    return "out of reach" not in ledger_of(tunnel)["answering"]


Change = Callable[[RedisServer], object]

FAILURES: dict[str, tuple[Change, Change]] = {
    "killed": (RedisServer.kill, RedisServer.start),
    "paused": (lambda server: server.command("CLIENT", "PAUSE", 1_500, "ALL"), lambda _: None),
    "read-only": (
        lambda server: server.command("REPLICAOF", "127.0.0.1", 1),
        lambda server: server.command("REPLICAOF", "NO", "ONE"),
    ),
    "out of memory": (
        lambda server: server.command("CONFIG", "SET", "maxmemory", 1),
        lambda server: server.command("CONFIG", "SET", "maxmemory", 0),
    ),
}


@pytest.mark.parametrize(
    ("on_failure", "failures"), [("local", list(FAILURES)), ("refuse", ["killed"])], ids=["local", "refuse"]
)
def test_a_server_that_fails_and_comes_back(
    origin: RawOrigin, certificate: Certificate, on_failure: str, failures: list[str]
) -> None:
    """Under load: no handshake fails, or only with 503. There is a line for each change, and counts are right again."""
    meanwhile = 101 if on_failure == "local" else 503
    with (
        RedisServer() as server,
        tunnel_with(origin, certificate, server.url, on_failure) as tunnel,
        connected(tunnel, LIMIT - 3) as clients,
    ):
        assert set(asked_at_once(clients, "/tunnels")) == {101}
        said = 0
        for name in failures:
            fail, recover = FAILURES[name]
            with traffic(tunnel) as statuses:
                fail(server)
                eventually(lambda: not counts(tunnel))
                wait_for_status(statuses, meanwhile)
                recover(server)
                eventually(lambda: counts(tunnel))
                wait_for_status(statuses, 101)
            assert set(statuses) == {101, meanwhile}, name
            lines = tunnel.records("counting")[said:]
            said += len(lines)
            assert [line["level"] for line in lines] in (["warning", "info"], ["warning", "warning", "info"]), lines
            assert_three_are_left(tunnel)
            eventually(lambda: ledger_of(tunnel)["leases"] == LIMIT - 3)


def wait_for_status(statuses: list[int], status: int) -> None:
    before = len(statuses)
    eventually(lambda: len(statuses) > before + 1 and statuses[-1] == status)


def assert_three_are_left(tunnel: Tunnel) -> None:
    """Check that what is open is counted."""
    with connected(tunnel, CLIENTS // 2) as more:
        assert Counter(asked_at_once(more, "/tunnels")) == {101: 3, 429: CLIENTS // 2 - 3}


def test_a_server_that_is_flushed(origin: RawOrigin, certificate: Certificate) -> None:
    """No handshake fails, and open tunnels are counted again at once."""
    with (
        RedisServer() as server,
        tunnel_with(origin, certificate, server.url) as tunnel,
        connected(tunnel, LIMIT - 3) as clients,
    ):
        assert set(asked_at_once(clients, "/tunnels")) == {101}
        with traffic(tunnel) as statuses:
            for _ in range(3):
                server.command("FLUSHALL")
                wait_for_status(statuses, 101)
        assert set(statuses) == {101}
        eventually(lambda: counts(tunnel))
        assert_three_are_left(tunnel)


def test_a_failover_by_sentinels(origin: RawOrigin, certificate: Certificate) -> None:
    """The replica becomes the primary under load. Open tunnels are counted there."""
    first, second, watcher = (find_free_port() for _ in range(3))
    watching = (
        f"sentinel monitor main 127.0.0.1 {first} 1",
        "sentinel down-after-milliseconds main 300",
        "sentinel failover-timeout main 2000",
    )
    with (
        RedisServer(port=first) as primary,
        RedisServer(f"replicaof 127.0.0.1 {first}", "repl-diskless-sync-delay 0", port=second) as replica,
        RedisServer(*watching, port=watcher, mode=["--sentinel"]) as sentinel,
        tunnel_with(origin, certificate, f"redis+sentinel://127.0.0.1:{watcher}/main") as tunnel,
        connected(tunnel, LIMIT - 3) as clients,
    ):
        eventually(lambda: b"slaves=1" in info(sentinel, "sentinel"))
        eventually(lambda: b"master_link_status:up" in info(replica, "replication"))
        assert set(asked_at_once(clients, "/tunnels")) == {101}
        with traffic(tunnel) as statuses:
            primary.kill()
            eventually(lambda: tunnel.records("counting"))
            eventually(lambda: b"role:master" in info(replica, "replication"))
            eventually(lambda: counts(tunnel))
        assert set(statuses) == {101}
        assert_three_are_left(tunnel)
        assert tunnel.records("counting")[-1]["reason"].endswith("counts again")
        assert ask(tunnel, "/") == 101


def info(server: RedisServer, section: str) -> bytes:
    reply = server.command("INFO", section)
    assert isinstance(reply, bytes)
    return reply
