"""Limits hold for all processes of a machine together, exactly, whatever happens to the process that counts."""

import contextlib
import itertools
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import (
    Certificate,
    RawOrigin,
    Tunnel,
    eventually,
    upgrade,
)
from tests.promises.counted import (
    BLOCKED,
    CLIENTS,
    FEW,
    LIMIT,
    PATIENT,
    PROCESSES,
    TUNNELS,
    answering,
    ask,
    asked_at_once,
    connected,
    hold,
    kill_a_process,
    kill_ledger,
    ledger_of,
    traffic,
    tunnel_to,
    used,
)
from tests.promises.firewalled import config_for, connect_from
from tests.promises.versions import Versions, upgraded


@pytest.fixture(scope="module")
def origin() -> Iterator[RawOrigin]:
    with RawOrigin(hold) as origin:
        yield origin


# --- exact ------------------------------------------------------------------------------------------------------------


def test_each_limit_is_exact_over_four_processes(origin: RawOrigin, certificate: Certificate) -> None:
    """Of 40 clients at once, 16 pass, whichever processes they reach."""
    with tunnel_to(origin.address, certificate, processes=PROCESSES) as tunnel:
        assert answering(tunnel) == {"ledger": PROCESSES}
        for path in ("/fixed", "/moving", "/sliding", "/blocking", "/tunnels"):
            with connected(tunnel, CLIENTS, BLOCKED if path == "/blocking" else "127.0.0.1") as clients:
                assert Counter(asked_at_once(clients, path)) == {101: LIMIT, 429: CLIENTS - LIMIT}, path
                assert used(tunnel) > 1
            eventually(lambda: not any(one["tunnels"] for one in tunnel.status()["processes"]))
        assert {ask(tunnel, path, BLOCKED) for path in ("/", "/blocking", "/tunnels")} == {429}
        assert ask(tunnel, "/") == 101
        eventually(lambda: ledger_of(tunnel)["leases"] == 0)
        with connected(tunnel, LIMIT + 1) as clients:
            assert Counter(asked_at_once(clients, "/tunnels")) == {101: LIMIT, 429: 1}


def test_an_origin_is_filled_exactly_over_four_processes(certificate: Certificate) -> None:
    """The next origin gets the rest, and what exceeds both is refused."""
    with RawOrigin(hold) as first, RawOrigin(hold) as second:
        both = (
            f'{{ address = "{first.address}", max_tunnels = 7 }}, {{ address = "{second.address}", max_tunnels = 9 }}'
        )
        config = config_for("REPLACED", certificate, top=f"processes = {PROCESSES}\n{PATIENT}").replace(
            '"REPLACED"', both
        )
        with Tunnel(None, certificate, config=config) as tunnel:
            for _ in range(2):
                before = first.connections, second.connections
                with connected(tunnel, 40) as clients:
                    assert Counter(asked_at_once(clients, "/")) == {101: 16, 503: 24}
                    assert (first.connections - before[0], second.connections - before[1]) == (7, 9)
                eventually(lambda: ledger_of(tunnel)["leases"] == 0)


def test_the_fewest_tunnels_are_counted_over_four_processes(certificate: Certificate) -> None:
    with RawOrigin(hold) as first, RawOrigin(hold) as second:
        config = config_for(
            first.address, certificate, top=f"processes = {PROCESSES}\n{PATIENT}", site='balance = "least_tunnels"'
        ).replace(f'"{first.address}"', f'"{first.address}", "{second.address}"')
        with Tunnel(None, certificate, config=config) as tunnel, contextlib.ExitStack() as stack:
            for _ in range(20):
                client = stack.enter_context(connect_from(tunnel, "127.0.0.1"))
                assert upgrade(client).status == 101
            assert used(tunnel) > 1
            assert (first.connections, second.connections) == (10, 10)


def test_an_ejection_reaches_the_other_processes(certificate: Certificate) -> None:
    """One process finds that an origin is gone; the others use it no more, and use it again once it is back."""
    with RawOrigin(hold) as good, socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))  # it refuses connections, and nobody else gets the port
        address = f"127.0.0.1:{gone.getsockname()[1]}"
        config = config_for(
            good.address,
            certificate,
            top=f"processes = {PROCESSES}",
            site='ejection = { failures = 1, delay = "1h", max_delay = "1h" }',
        ).replace(f'"{good.address}"', f'"{address}", "{good.address}"')
        with Tunnel(None, certificate, config=config) as tunnel:
            eventually(lambda: ask(tunnel, "/") == 101 and tunnel.records("origin ejected"))
            with connected(tunnel, 40) as clients:
                assert set(asked_at_once(clients, "/")) == {101}
                assert used(tunnel) > 1
            ejected = tunnel.records("origin ejected")
            assert len(ejected) == 1, "another process tried the origin"


def test_a_process_that_starts_later_learns_of_an_ejection(certificate: Certificate) -> None:
    """Also after the ledger that was told of it has been killed."""
    with RawOrigin(hold) as good, socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{gone.getsockname()[1]}"
        config = config_for(
            good.address,
            certificate,
            top="processes = 2",
            site='ejection = { failures = 1, delay = "1h", max_delay = "1h" }',
        ).replace(f'"{good.address}"', f'"{address}", "{good.address}"')
        with Tunnel(None, certificate, config=config, errors_expected=True) as tunnel:
            eventually(lambda: ask(tunnel, "/") == 101 and tunnel.records("origin ejected"))
            for killed in (False, True):
                if killed:
                    kill_ledger(tunnel)
                    eventually(lambda: answering(tunnel) == {"ledger": 2})
                kill_a_process(tunnel)
                eventually(lambda: answering(tunnel) == {"ledger": 2})
                with connected(tunnel, 20) as clients:
                    assert set(asked_at_once(clients, "/")) == {101}
                    assert used(tunnel) > 1
                assert len(tunnel.records("origin ejected")) == 1, "a process tried the origin"


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_one_process_has_no_ledger(origin: RawOrigin, certificate: Certificate) -> None:
    """Nor have several that have nothing to count together. A reload starts one, and ends it."""
    with tunnel_to(origin.address, certificate, processes=1) as tunnel:
        text = tunnel.file.read_text()
        assert tunnel.status()["ledger"] is None
        with connected(tunnel, 5) as clients:
            assert Counter(asked_at_once(clients, "/tunnels")) == {101: 5}
            tunnel.reload(text.replace("processes = 1", "processes = 2"))
            # The first process has declared the tunnels that it had before.
            eventually(lambda: ledger_of(tunnel)["leases"] == 5)
            assert answering(tunnel) == {"ledger": 2}
            with connected(tunnel, CLIENTS) as more:
                assert Counter(asked_at_once(more, "/tunnels"))[101] == LIMIT - 5
        tunnel.reload(text)
        eventually(lambda: tunnel.status()["ledger"] is None)
        assert answering(tunnel) == {"": 1}
        assert ask(tunnel, "/tunnels") == 101


def test_a_ledger_that_is_killed_is_replaced(origin: RawOrigin, certificate: Certificate) -> None:
    """No handshake fails, and the open tunnels are counted by the next one."""
    with tunnel_to(origin.address, certificate, errors_expected=True) as tunnel:
        with connected(tunnel, LIMIT - 3) as clients:
            assert set(asked_at_once(clients, "/tunnels")) == {101}
            with traffic(tunnel) as statuses:
                kill_ledger(tunnel)
                eventually(lambda: answering(tunnel) == {"ledger": FEW})
                eventually(lambda: ledger_of(tunnel)["leases"] == LIMIT - 3)
            assert set(statuses) == {101}
            with connected(tunnel, CLIENTS) as more:
                assert Counter(asked_at_once(more, "/tunnels")) == {101: 3, 429: CLIENTS - 3}
        reasons = [record["reason"] for record in tunnel.records("process exited")]
        assert len(reasons) == 1
        assert tunnel.records("process exited")[0]["role"] == "ledger"


def test_a_stopped_ledger_delays_a_handshake_by_the_timeout(origin: RawOrigin, certificate: Certificate) -> None:
    """Once: then each process counts alone. It counts with the others again when the ledger continues."""
    watch = {"TLSTUNNEL_WATCH": "0.1,0.5,90,90"}  # `status` does not wait for a process that is silent for 0.5 s
    with tunnel_to(origin.address, certificate, environment=watch) as tunnel:
        text = tunnel.file.read_text()
        assert tunnel.reload(text.replace('"2s"', '"300ms"')) == ["state.timeout: 2s -> 0.3s"]
        ledger = ledger_of(tunnel)["process"]
        os.kill(ledger, signal.SIGSTOP)
        try:
            with connected(tunnel, CLIENTS) as clients:
                began = time.monotonic()
                passed = asked_at_once(clients, "/fixed").count(101)
                assert time.monotonic() - began < 5.0
            assert LIMIT < passed <= FEW * LIMIT
            assert {record["level"] for record in tunnel.records("counting")} == {"warning"}
            said = "\n".join(tunnel.run_command("status"))
            assert "counts alone: the ledger did not answer within 300 ms" in said
            assert "ledger: not responding" in said
        finally:
            os.kill(ledger, signal.SIGCONT)
        eventually(lambda: answering(tunnel) == {"ledger": FEW})
        # What was asked while it was stopped was not counted afterwards.
        with connected(tunnel, CLIENTS) as clients:
            assert Counter(asked_at_once(clients, "/fixed")) == {101: LIMIT, 429: CLIENTS - LIMIT}


def test_what_cannot_be_counted_is_refused(origin: RawOrigin, certificate: Certificate) -> None:
    """With on_failure = "refuse": only what a limit applies to, with Retry-After."""
    state = 'on_failure = "refuse"\n'
    with tunnel_to(origin.address, certificate, site=TUNNELS, state=state) as tunnel:
        tunnel.reload(tunnel.file.read_text().replace('"2s"', '"100ms"'))
        ledger = ledger_of(tunnel)["process"]
        os.kill(ledger, signal.SIGSTOP)
        try:
            for _ in range(8):
                with connect_from(tunnel, "127.0.0.1") as client:
                    response = upgrade(client, "/tunnels")
                    assert (response.status, response.headers["Retry-After"]) == (503, "1")
            assert ask(tunnel, "/") == 101
        finally:
            os.kill(ledger, signal.SIGCONT)
        eventually(lambda: answering(tunnel) == {"ledger": FEW})
        assert ask(tunnel, "/tunnels") == 101
        reasons = {record["reason"] for record in tunnel.records("connection") if record["status"] == 503}
        assert reasons == {"counts out of reach"}


def test_a_killed_process_returns_its_own_leases_and_no_others(origin: RawOrigin, certificate: Certificate) -> None:
    with tunnel_to(origin.address, certificate, errors_expected=True) as tunnel, connected(tunnel, LIMIT) as clients:
        assert set(asked_at_once(clients, "/tunnels")) == {101}
        one = max(tunnel.status()["processes"], key=lambda process: int(process["tunnels"]))
        began = time.monotonic()
        os.kill(one["process"], signal.SIGKILL)
        eventually(lambda: ledger_of(tunnel)["leases"] == LIMIT - one["tunnels"])
        assert time.monotonic() - began < 1.0
        with connected(tunnel, CLIENTS) as more:
            assert Counter(asked_at_once(more, "/tunnels"))[101] == one["tunnels"]


def test_counts_survive_an_upgrade_under_load(origin: RawOrigin, certificate: Certificate, tmp_path: Path) -> None:
    """Windows, blocks and open tunnels; no handshake fails meanwhile, and no process counts alone."""
    versions = Versions(tmp_path / "versions")
    with tunnel_to(origin.address, certificate, environment=dict(versions.environment)) as tunnel:
        with connected(tunnel, LIMIT) as fixed:
            assert Counter(asked_at_once(fixed, "/fixed")) == {101: LIMIT}
        with connected(tunnel, LIMIT + 1, BLOCKED) as blocked:
            assert Counter(asked_at_once(blocked, "/blocking")) == {101: LIMIT, 429: 1}
        with connected(tunnel, LIMIT - 3) as clients:
            assert set(asked_at_once(clients, "/tunnels")) == {101}
            with traffic(tunnel) as statuses:
                versions.install("2.0.0")
                assert upgraded(tunnel) == "1.0.0 -> 2.0.0, generation 2"
            assert set(statuses) == {101}
            ledger = ledger_of(tunnel)
            assert (ledger["version"], ledger["generation"]) == ("2.0.0", 2)
            assert set(answering(tunnel)) == {"ledger"}
            eventually(lambda: ledger_of(tunnel)["leases"] == LIMIT - 3)
            assert {ask(tunnel, "/fixed"), ask(tunnel, "/", BLOCKED)} == {429}
            with connected(tunnel, CLIENTS) as more:
                assert Counter(asked_at_once(more, "/tunnels")) == {101: 3, 429: CLIENTS - 3}
        # The processes of the first generation have kept their connection.
        eventually(lambda: ledger_of(tunnel)["leases"] == 0)
        assert tunnel.records("counting") == []
        assert [record["counts"] for record in tunnel.records("ledger replaced")] == [True]


@pytest.mark.soak
def test_a_ledger_that_cannot_take_over_leaves_the_counts_to_the_previous_one(
    origin: RawOrigin, certificate: Certificate, tmp_path: Path
) -> None:
    """Its processes are connected to that one, and no handshake fails."""
    versions = Versions(tmp_path / "versions")
    environment = dict(versions.environment)
    with (
        tunnel_to(origin.address, certificate, environment=environment, errors_expected=True) as tunnel,
        connected(tunnel, LIMIT - 3) as clients,
    ):
        assert set(asked_at_once(clients, "/tunnels")) == {101}
        before = ledger_of(tunnel)["process"]
        module = versions.install("2.0.0") / "processes" / "succession.py"
        text = module.read_text()
        assert "\nFORMAT = 1\n" in text
        module.write_text(text.replace("\nFORMAT = 1\n", "\nFORMAT = 9\n"))
        with traffic(tunnel) as statuses:
            assert "hands over in format 1, this release in 9" in upgraded(tunnel, status=1)
            tunnel.wait_record(lambda record: record["event"] == "upgraded")
        assert set(statuses) == {101}
        assert ledger_of(tunnel)["process"] == before
        assert set(answering(tunnel)) == {"ledger"}
        with connected(tunnel, CLIENTS) as more:
            assert Counter(asked_at_once(more, "/tunnels")) == {101: 3, 429: CLIENTS - 3}
        assert tunnel.records("counting") == []


def test_a_ledger_is_replaced_on_sigterm(origin: RawOrigin, certificate: Certificate) -> None:
    with tunnel_to(origin.address, certificate) as tunnel, connected(tunnel, LIMIT) as clients:
        assert set(asked_at_once(clients, "/tunnels")) == {101}
        before = ledger_of(tunnel)["process"]
        os.kill(before, signal.SIGTERM)
        eventually(lambda: ledger_of(tunnel)["process"] != before)
        assert ask(tunnel, "/tunnels") == 429
        assert tunnel.records("counting") == []


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_counts_stay_exact_through_kills_and_upgrades(
    origin: RawOrigin, certificate: Certificate, tmp_path: Path
) -> None:
    """For a minute, under load: the ledger is killed, ended or stopped, a process is killed, the tunnel is upgraded."""
    versions = Versions(tmp_path / "versions")
    with tunnel_to(
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
            with traffic(tunnel) as statuses:
                _disturb(tunnel, versions, number)
            assert set(statuses) == {101}, number
            eventually(lambda: set(answering(tunnel)) == {"ledger"})
            eventually(lambda: ledger_of(tunnel)["leases"] == 0)
            with connected(tunnel, CLIENTS) as clients:
                assert Counter(asked_at_once(clients, "/tunnels")) == {101: LIMIT, 429: CLIENTS - LIMIT}, number


def _disturb(tunnel: Tunnel, versions: Versions, number: int) -> None:
    ledger = ledger_of(tunnel)["process"]
    match number % 4:
        case 0 | 1:
            os.kill(ledger, signal.SIGKILL if number % 4 else signal.SIGTERM)
            eventually(lambda: tunnel.status()["ledger"] and ledger_of(tunnel)["process"] != ledger)
        case 2:
            os.kill(ledger, signal.SIGSTOP)
            time.sleep(0.5)
            os.kill(ledger, signal.SIGCONT)
        case 3:
            versions.install(f"{number}.0.0")
            upgraded(tunnel)
