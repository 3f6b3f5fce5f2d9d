"""Limits hold for all processes of a machine together, exactly, whatever happens to the process that counts."""

import contextlib
import itertools
import os
import signal
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import (
    TIMEOUT,
    Certificate,
    RawOrigin,
    Tunnel,
    accept_upgrade,
    client_context,
    eventually,
    handshake_request,
    read_response,
    upgrade,
)
from tests.promises.firewalled import config_for, connect_from
from tests.promises.versions import Versions, upgraded

PROCESSES = 4
CLIENTS = 100
LIMIT = 40

LIMITS = f"""
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

[[sites.rate_limits]]
name = "tunnels"
max_tunnels = {LIMIT}
when = 'path == "/tunnels"'
"""

BLOCKED = "127.0.0.3"
"""A client's address: a block is for all paths."""

TUNNELS = f"""
[[sites.rate_limits]]
name = "tunnels"
max_tunnels = {LIMIT}
when = 'path == "/tunnels"'
"""

WATCH = "0.1,60,90,90"
"""No process is reported as silent, unless a test says so."""


def _hold(sock: socket.socket) -> None:
    """Accept, and hold the tunnel until its client ends it."""
    accept_upgrade(sock)
    with contextlib.suppress(ConnectionError):
        while sock.recv(65_536):
            pass


@pytest.fixture(scope="module")
def origin() -> Iterator[RawOrigin]:
    with RawOrigin(_hold) as origin:
        yield origin


def _tunnel(
    origin: str,
    certificate: Certificate,
    *,
    processes: int = PROCESSES,
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
def _connected(tunnel: Tunnel, count: int, ip: str = "127.0.0.1") -> Iterator[list[ssl.SSLSocket]]:
    """Return so many clients whose TLS handshakes are done."""
    context = client_context(tunnel)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect_from(tunnel, ip, context)) for _ in range(count)]


def _asked_at_once(clients: list[ssl.SSLSocket], path: str) -> list[int]:
    """Send all requests before reading any response, and return the statuses."""
    for client in clients:
        client.sendall(handshake_request(path))
    return [read_response(client).status for client in clients]


def _ask(tunnel: Tunnel, path: str, ip: str = "127.0.0.1") -> int:
    """Try one handshake, and return the status. The connection is closed."""
    with connect_from(tunnel, ip) as client:
        return upgrade(client, path).status


def _ledger(tunnel: Tunnel) -> dict[str, Any]:
    found = tunnel.status()["ledger"]
    assert found is not None
    return dict(found)


def _answering(tunnel: Tunnel) -> Counter[str]:
    return Counter(one["counting"].partition(":")[0] for one in tunnel.status()["processes"])


def _kill_ledger(tunnel: Tunnel) -> None:
    """Kill the ledger, and wait until there is another one."""
    before = _ledger(tunnel)["process"]
    os.kill(before, signal.SIGKILL)
    eventually(lambda: tunnel.status()["ledger"] and _ledger(tunnel)["process"] != before)


def _kill_a_process(tunnel: Tunnel) -> None:
    """Kill a serving process, and wait until there is another one in its place."""
    before = {one["process"] for one in tunnel.status()["processes"]}
    os.kill(min(before), signal.SIGKILL)
    eventually(lambda: len({one["process"] for one in tunnel.status()["processes"]} - before) == 1)


def _used(tunnel: Tunnel) -> int:
    """Return how many processes have tunnels."""
    return sum(bool(one["tunnels"]) for one in tunnel.status()["processes"])


# --- exact ------------------------------------------------------------------------------------------------------------


def test_each_limit_is_exact_over_four_processes(origin: RawOrigin, certificate: Certificate) -> None:
    """Of 100 clients at once, 40 pass, whichever processes they reach."""
    with _tunnel(origin.address, certificate) as tunnel:
        assert _answering(tunnel) == {"ledger": PROCESSES}
        for path in ("/fixed", "/moving", "/sliding", "/blocking", "/tunnels"):
            with _connected(tunnel, CLIENTS, BLOCKED if path == "/blocking" else "127.0.0.1") as clients:
                assert Counter(_asked_at_once(clients, path)) == {101: LIMIT, 429: CLIENTS - LIMIT}, path
                assert _used(tunnel) > 1
            eventually(lambda: not any(one["tunnels"] for one in tunnel.status()["processes"]))
        assert {_ask(tunnel, path, BLOCKED) for path in ("/", "/blocking", "/tunnels")} == {429}
        assert _ask(tunnel, "/") == 101
        eventually(lambda: _ledger(tunnel)["leases"] == 0)
        with _connected(tunnel, LIMIT + 1) as clients:
            assert Counter(_asked_at_once(clients, "/tunnels")) == {101: LIMIT, 429: 1}


def test_an_origin_is_filled_exactly_over_four_processes(certificate: Certificate) -> None:
    """The next origin gets the rest, and what exceeds both is refused."""
    with RawOrigin(_hold) as first, RawOrigin(_hold) as second:
        both = (
            f'{{ address = "{first.address}", max_tunnels = 7 }}, {{ address = "{second.address}", max_tunnels = 9 }}'
        )
        config = config_for("REPLACED", certificate, top=f"processes = {PROCESSES}").replace('"REPLACED"', both)
        with Tunnel(None, certificate, config=config) as tunnel:
            for _ in range(2):
                before = first.connections, second.connections
                with _connected(tunnel, 40) as clients:
                    assert Counter(_asked_at_once(clients, "/")) == {101: 16, 503: 24}
                    assert (first.connections - before[0], second.connections - before[1]) == (7, 9)
                eventually(lambda: _ledger(tunnel)["leases"] == 0)


def test_the_fewest_tunnels_are_counted_over_four_processes(certificate: Certificate) -> None:
    with RawOrigin(_hold) as first, RawOrigin(_hold) as second:
        config = config_for(
            first.address, certificate, top=f"processes = {PROCESSES}", site='balance = "least_tunnels"'
        ).replace(f'"{first.address}"', f'"{first.address}", "{second.address}"')
        with Tunnel(None, certificate, config=config) as tunnel, contextlib.ExitStack() as stack:
            for _ in range(20):
                client = stack.enter_context(connect_from(tunnel, "127.0.0.1"))
                assert upgrade(client).status == 101
            assert _used(tunnel) > 1
            assert (first.connections, second.connections) == (10, 10)


def test_an_ejection_reaches_the_other_processes(certificate: Certificate) -> None:
    """One process finds that an origin is gone; the others use it no more, and use it again once it is back."""
    with RawOrigin(_hold) as good, socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))  # it refuses connections, and nobody else gets the port
        address = f"127.0.0.1:{gone.getsockname()[1]}"
        config = config_for(
            good.address,
            certificate,
            top=f"processes = {PROCESSES}",
            site='ejection = { failures = 1, delay = "1h", max_delay = "1h" }',
        ).replace(f'"{good.address}"', f'"{address}", "{good.address}"')
        with Tunnel(None, certificate, config=config) as tunnel:
            eventually(lambda: _ask(tunnel, "/") == 101 and tunnel.records("origin ejected"))
            with _connected(tunnel, 40) as clients:
                assert set(_asked_at_once(clients, "/")) == {101}
                assert _used(tunnel) > 1
            ejected = tunnel.records("origin ejected")
            assert len(ejected) == 1, "another process tried the origin"


def test_a_process_that_starts_later_learns_of_an_ejection(certificate: Certificate) -> None:
    """Also after the ledger that was told of it has been killed."""
    with RawOrigin(_hold) as good, socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{gone.getsockname()[1]}"
        config = config_for(
            good.address,
            certificate,
            top="processes = 2",
            site='ejection = { failures = 1, delay = "1h", max_delay = "1h" }',
        ).replace(f'"{good.address}"', f'"{address}", "{good.address}"')
        with Tunnel(None, certificate, config=config, errors_expected=True) as tunnel:
            eventually(lambda: _ask(tunnel, "/") == 101 and tunnel.records("origin ejected"))
            for kill_ledger in (False, True):
                if kill_ledger:
                    _kill_ledger(tunnel)
                    eventually(lambda: _answering(tunnel) == {"ledger": 2})
                _kill_a_process(tunnel)
                eventually(lambda: _answering(tunnel) == {"ledger": 2})
                with _connected(tunnel, 20) as clients:
                    assert set(_asked_at_once(clients, "/")) == {101}
                    assert _used(tunnel) > 1
                assert len(tunnel.records("origin ejected")) == 1, "a process tried the origin"


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_one_process_has_no_ledger(origin: RawOrigin, certificate: Certificate) -> None:
    """Nor have several that have nothing to count together. A reload starts one, and ends it."""
    with _tunnel(origin.address, certificate, processes=1) as tunnel:
        text = tunnel.file.read_text()
        assert tunnel.status()["ledger"] is None
        with _connected(tunnel, 5) as clients:
            assert Counter(_asked_at_once(clients, "/tunnels")) == {101: 5}
            tunnel.reload(text.replace("processes = 1", "processes = 2"))
            # The first process has declared the tunnels that it had before.
            eventually(lambda: _ledger(tunnel)["leases"] == 5)
            assert _answering(tunnel) == {"ledger": 2}
            with _connected(tunnel, CLIENTS) as more:
                assert Counter(_asked_at_once(more, "/tunnels"))[101] == LIMIT - 5
        tunnel.reload(text)
        eventually(lambda: tunnel.status()["ledger"] is None)
        assert _answering(tunnel) == {"": 1}
        assert _ask(tunnel, "/tunnels") == 101


def test_a_ledger_that_is_killed_is_replaced(origin: RawOrigin, certificate: Certificate) -> None:
    """No handshake fails, and the open tunnels are counted by the next one."""
    with _tunnel(origin.address, certificate, errors_expected=True) as tunnel:
        with _connected(tunnel, LIMIT - 3) as clients:
            assert set(_asked_at_once(clients, "/tunnels")) == {101}
            with _traffic(tunnel) as statuses:
                _kill_ledger(tunnel)
                eventually(lambda: _answering(tunnel) == {"ledger": PROCESSES})
                eventually(lambda: _ledger(tunnel)["leases"] == LIMIT - 3)
            assert set(statuses) == {101}
            with _connected(tunnel, CLIENTS) as more:
                assert Counter(_asked_at_once(more, "/tunnels")) == {101: 3, 429: CLIENTS - 3}
        reasons = [record["reason"] for record in tunnel.records("process exited")]
        assert len(reasons) == 1
        assert tunnel.records("process exited")[0]["role"] == "ledger"


def test_a_stopped_ledger_delays_a_handshake_by_the_timeout(origin: RawOrigin, certificate: Certificate) -> None:
    """Once: then each process counts alone. It counts with the others again when the ledger continues."""
    watch = {"TLSTUNNEL_WATCH": "0.1,0.5,90,90"}  # `status` does not wait for a process that is silent for 0.5 s
    with _tunnel(origin.address, certificate, environment=watch) as tunnel:
        text = tunnel.file.read_text()
        assert tunnel.reload(text.replace('"2s"', '"300ms"')) == ["state.timeout: 2s -> 0.3s"]
        ledger = _ledger(tunnel)["process"]
        os.kill(ledger, signal.SIGSTOP)
        try:
            with _connected(tunnel, CLIENTS) as clients:
                began = time.monotonic()
                passed = _asked_at_once(clients, "/fixed").count(101)
                assert time.monotonic() - began < 5.0
            assert LIMIT < passed <= PROCESSES * LIMIT
            assert {record["level"] for record in tunnel.records("counting")} == {"warning"}
            said = "\n".join(tunnel.run_command("status"))
            assert "counts alone: the ledger did not answer within 300 ms" in said
            assert "ledger: not responding" in said
        finally:
            os.kill(ledger, signal.SIGCONT)
        eventually(lambda: _answering(tunnel) == {"ledger": PROCESSES})
        # What was asked while it was stopped was not counted afterwards.
        with _connected(tunnel, CLIENTS) as clients:
            assert Counter(_asked_at_once(clients, "/fixed")) == {101: LIMIT, 429: CLIENTS - LIMIT}


def test_what_cannot_be_counted_is_refused(origin: RawOrigin, certificate: Certificate) -> None:
    """With on_failure = "refuse": only what a limit applies to, with Retry-After."""
    state = 'on_failure = "refuse"\n'
    with _tunnel(origin.address, certificate, site=TUNNELS, state=state) as tunnel:
        tunnel.reload(tunnel.file.read_text().replace('"2s"', '"100ms"'))
        ledger = _ledger(tunnel)["process"]
        os.kill(ledger, signal.SIGSTOP)
        try:
            for _ in range(8):
                with connect_from(tunnel, "127.0.0.1") as client:
                    response = upgrade(client, "/tunnels")
                    assert (response.status, response.headers["Retry-After"]) == (503, "1")
            assert _ask(tunnel, "/") == 101
        finally:
            os.kill(ledger, signal.SIGCONT)
        eventually(lambda: _answering(tunnel) == {"ledger": PROCESSES})
        assert _ask(tunnel, "/tunnels") == 101
        reasons = {record["reason"] for record in tunnel.records("connection") if record["status"] == 503}
        assert reasons == {"counts out of reach"}


def test_a_killed_process_returns_its_own_leases_and_no_others(origin: RawOrigin, certificate: Certificate) -> None:
    with _tunnel(origin.address, certificate, errors_expected=True) as tunnel, _connected(tunnel, LIMIT) as clients:
        assert set(_asked_at_once(clients, "/tunnels")) == {101}
        one = max(tunnel.status()["processes"], key=lambda process: int(process["tunnels"]))
        began = time.monotonic()
        os.kill(one["process"], signal.SIGKILL)
        eventually(lambda: _ledger(tunnel)["leases"] == LIMIT - one["tunnels"])
        assert time.monotonic() - began < 1.0
        with _connected(tunnel, CLIENTS) as more:
            assert Counter(_asked_at_once(more, "/tunnels"))[101] == one["tunnels"]


def test_counts_survive_an_upgrade_under_load(origin: RawOrigin, certificate: Certificate, tmp_path: Path) -> None:
    """Windows, blocks and open tunnels; no handshake fails meanwhile, and no process counts alone."""
    versions = Versions(tmp_path / "versions")
    with _tunnel(origin.address, certificate, environment=dict(versions.environment)) as tunnel:
        with _connected(tunnel, LIMIT) as fixed:
            assert Counter(_asked_at_once(fixed, "/fixed")) == {101: LIMIT}
        with _connected(tunnel, LIMIT + 1, BLOCKED) as blocked:
            assert Counter(_asked_at_once(blocked, "/blocking")) == {101: LIMIT, 429: 1}
        with _connected(tunnel, LIMIT - 3) as clients:
            assert set(_asked_at_once(clients, "/tunnels")) == {101}
            with _traffic(tunnel) as statuses:
                versions.install("2.0.0")
                assert upgraded(tunnel) == "1.0.0 -> 2.0.0, generation 2"
            assert set(statuses) == {101}
            ledger = _ledger(tunnel)
            assert (ledger["version"], ledger["generation"]) == ("2.0.0", 2)
            assert set(_answering(tunnel)) == {"ledger"}
            eventually(lambda: _ledger(tunnel)["leases"] == LIMIT - 3)
            assert {_ask(tunnel, "/fixed"), _ask(tunnel, "/", BLOCKED)} == {429}
            with _connected(tunnel, CLIENTS) as more:
                assert Counter(_asked_at_once(more, "/tunnels")) == {101: 3, 429: CLIENTS - 3}
        # The processes of the first generation have kept their connection.
        eventually(lambda: _ledger(tunnel)["leases"] == 0)
        assert tunnel.records("counting") == []
        assert [record["counts"] for record in tunnel.records("ledger replaced")] == [True]


def test_a_ledger_that_cannot_take_over_leaves_the_counts_to_the_previous_one(
    origin: RawOrigin, certificate: Certificate, tmp_path: Path
) -> None:
    """Its processes are connected to that one, and no handshake fails."""
    versions = Versions(tmp_path / "versions")
    environment = dict(versions.environment)
    with (
        _tunnel(origin.address, certificate, environment=environment, errors_expected=True) as tunnel,
        _connected(tunnel, LIMIT - 3) as clients,
    ):
        assert set(_asked_at_once(clients, "/tunnels")) == {101}
        before = _ledger(tunnel)["process"]
        module = versions.install("2.0.0") / "processes" / "succession.py"
        text = module.read_text()
        assert "\nFORMAT = 1\n" in text
        module.write_text(text.replace("\nFORMAT = 1\n", "\nFORMAT = 9\n"))
        with _traffic(tunnel) as statuses:
            assert "hands over in format 1, this release in 9" in upgraded(tunnel, status=1)
            tunnel.wait_record(lambda record: record["event"] == "upgraded")
        assert set(statuses) == {101}
        assert _ledger(tunnel)["process"] == before
        assert set(_answering(tunnel)) == {"ledger"}
        with _connected(tunnel, CLIENTS) as more:
            assert Counter(_asked_at_once(more, "/tunnels")) == {101: 3, 429: CLIENTS - 3}
        assert tunnel.records("counting") == []


def test_a_ledger_is_replaced_on_sigterm(origin: RawOrigin, certificate: Certificate) -> None:
    with _tunnel(origin.address, certificate) as tunnel, _connected(tunnel, LIMIT) as clients:
        assert set(_asked_at_once(clients, "/tunnels")) == {101}
        before = _ledger(tunnel)["process"]
        os.kill(before, signal.SIGTERM)
        eventually(lambda: _ledger(tunnel)["process"] != before)
        assert _ask(tunnel, "/tunnels") == 429
        assert tunnel.records("counting") == []


@contextlib.contextmanager
def _traffic(tunnel: Tunnel) -> Iterator[list[int]]:
    """Make one handshake after the other meanwhile, each of which is counted; return their statuses."""
    statuses: list[int] = []
    stop = threading.Event()

    def run() -> None:
        context = client_context(tunnel)
        while not stop.is_set():
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


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_counts_stay_exact_through_kills_and_upgrades(
    origin: RawOrigin, certificate: Certificate, tmp_path: Path
) -> None:
    """For a minute, under load: the ledger is killed, ended or stopped, a process is killed, the tunnel is upgraded."""
    versions = Versions(tmp_path / "versions")
    with _tunnel(
        origin.address,
        certificate,
        site=TUNNELS,
        environment={**versions.environment, "TLSTUNNEL_WATCH": "0.1,5,60,60"},
        errors_expected=True,
    ) as tunnel:
        until = time.monotonic() + 60.0
        for number in itertools.count():
            if time.monotonic() > until:
                break
            with _traffic(tunnel) as statuses:
                _disturb(tunnel, versions, number)
            assert set(statuses) == {101}, number
            eventually(lambda: set(_answering(tunnel)) == {"ledger"})
            eventually(lambda: _ledger(tunnel)["leases"] == 0)
            with _connected(tunnel, CLIENTS) as clients:
                assert Counter(_asked_at_once(clients, "/tunnels")) == {101: LIMIT, 429: CLIENTS - LIMIT}, number


def _disturb(tunnel: Tunnel, versions: Versions, number: int) -> None:
    ledger = _ledger(tunnel)["process"]
    match number % 4:
        case 0 | 1:
            os.kill(ledger, signal.SIGKILL if number % 4 else signal.SIGTERM)
            eventually(lambda: tunnel.status()["ledger"] and _ledger(tunnel)["process"] != ledger)
        case 2:
            os.kill(ledger, signal.SIGSTOP)
            time.sleep(0.5)
            os.kill(ledger, signal.SIGCONT)
        case 3:
            versions.install(f"{number}.0.0")
            upgraded(tunnel)
