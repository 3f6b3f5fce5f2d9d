"""A plan never cuts anyone off; only a throttle refuses, and only where somebody was told, or against abuse."""

import asyncio
import contextlib
import os
import signal
import ssl
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Certificate, RawOrigin, Tunnel, eventually, read_response
from tests.promises.counted import ask, asked_at_once, connected, hold
from tests.promises.firewalled import config_for
from tests.promises.versions import Versions, upgraded
from tlstunnel.errors import ControlError
from tlstunnel.plans.assessments import store_assessments
from tlstunnel.plans.values import Assessment, Figures, Standing
from tlstunnel.processes.reach import send_command
from tlstunnel.state.history.samples import Counts, Minute, SiteMinute
from tlstunnel.state.history.writer import History

SITE = "localhost"
WATCH = "0.1,60,90,90"
"""No process is reported as silent, unless a test says so."""


@pytest.fixture(scope="module")
def origin() -> Iterator[RawOrigin]:
    with RawOrigin(hold) as origin:
        yield origin


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


def tunnel_to(
    origin: RawOrigin,
    certificate: Certificate,
    folder: Path,
    *,
    processes: int = 2,
    site: str = "guideline = 10",
    top: str = "",
    environment: dict[str, str] | None = None,
    errors_expected: bool = False,
) -> Tunnel:
    top = f'processes = {processes}\nrelease.drain_over = "0s"\nstate.dir = "{folder}"\nstate.timeout = "2s"\n{top}'
    return Tunnel(
        None,
        certificate,
        config=config_for(origin.address, certificate, top=top, site=site),
        environment={"TLSTUNNEL_WATCH": WATCH, **(environment or {})},
        errors_expected=errors_expected,
    )


def run(tunnel: Tunnel, command: str, **fields: Any) -> dict[str, Any]:
    """Carry out a command about usage, as soon as there is an admin process."""

    def attempt() -> dict[str, Any] | None:
        try:
            return send_command(tunnel.control, {"do": command, **fields})
        except ControlError as error:
            if "being started" in str(error) or "being opened" in str(error):
                return None
            raise

    found = eventually(attempt)
    assert found is not None
    return found


def assess(tunnel: Tunnel) -> dict[str, Any]:
    """Return where the site stands."""
    found = eventually(lambda: run(tunnel, "usage", site=SITE)["assessments"])
    return dict(found[0])


def find_standing(assessment: dict[str, Any]) -> Standing:
    return Standing(assessment.get("standing", Standing.WITHIN))


def now_of(tunnel: Tunnel) -> int:
    return int(assess(tunnel)["figures"].get("now", 0))


def admin_of(tunnel: Tunnel) -> dict[str, Any] | None:
    found = tunnel.status()["admin"]
    return dict(found) if found is not None else None


def wait_for_another(tunnel: Tunnel, role: str, before: int) -> None:
    """Wait until another process has taken the place of this one."""
    eventually(lambda: (tunnel.status()[role] or {}).get("process") not in {before, None})


def throttle(tunnel: Tunnel, rate: str = "3/hour", seconds: float = 600.0, **fields: Any) -> dict[str, Any]:
    """Throttle the site against abuse, and wait until all processes know."""
    fields = {"abuse": True, **fields}
    found = run(tunnel, "throttle", site=SITE, rate=rate, seconds=seconds, why="a test", **fields)
    eventually(lambda: tunnel.status()["throttles"])
    return found


# --- nothing is refused -----------------------------------------------------------------------------------------------


def test_a_hundred_tunnels_on_a_guideline_of_ten(origin: RawOrigin, certificate: Certificate, folder: Path) -> None:
    with tunnel_to(origin, certificate, folder) as tunnel:
        assert admin_of(tunnel) is not None
        with connected(tunnel, 100) as clients:
            assert Counter(asked_at_once(clients, "/")) == {101: 100}
            eventually(lambda: now_of(tunnel) == 100)
            found = assess(tunnel)
            assert (found["standing"], found["figures"]["guideline"]) == ("spike", 10)
            assert any("spike" in line and "100" in line for line in tunnel.run_command("usage"))
            assert "up to 100" in found["sentence"]
            assert ask(tunnel, "/") == 101
        eventually(lambda: now_of(tunnel) == 0)
        assert tunnel.status()["throttles"] == []
    assert {record["status"] for record in tunnel.records("connection")} == {101}


def test_whatever_the_standing_every_handshake_is_answered(
    origin: RawOrigin, certificate: Certificate, folder: Path
) -> None:
    """The admin process continues with each standing, as it does after a restart."""
    figures = Figures(guideline=10, now=30, peak=30, flood_rate=100.0)
    with tunnel_to(origin, certificate, folder, top='usage.on_abuse = "throttle"', errors_expected=True) as tunnel:
        for standing in Standing:
            run(tunnel, "usage")
            before = Assessment(
                site=SITE, standing=standing, holds=(standing,), since=1.0, figures=figures, sentence="It was so."
            )
            store_assessments(folder, [before])
            process = (admin_of(tunnel) or {})["process"]
            os.kill(process, signal.SIGKILL)
            wait_for_another(tunnel, "admin", process)
            result = run(tunnel, "usage", site=SITE)
            assert result["assessed"] is not None or find_standing(result["assessments"][0]) == standing
            with connected(tunnel, 30) as clients:
                assert Counter(asked_at_once(clients, "/")) == {101: 30}
                eventually(lambda: now_of(tunnel) == 30)
                assert ask(tunnel, "/") == 101
                assert all(is_open(client) for client in clients[:5])
            eventually(lambda: now_of(tunnel) == 0)
            assert tunnel.status()["throttles"] == []
    assert {record["status"] for record in tunnel.records("connection")} == {101}


def test_use_above_the_guideline_for_weeks_cuts_nobody_off(
    origin: RawOrigin, certificate: Certificate, folder: Path
) -> None:
    """The history has four weeks of it, so the first minute finds that it is sustained."""
    asyncio.run(_write_history(folder))
    with tunnel_to(origin, certificate, folder) as tunnel, connected(tunnel, 30) as clients:
        assert Counter(asked_at_once(clients, "/")) == {101: 30}
        eventually(lambda: find_standing(assess(tunnel)) is Standing.SUSTAINED, timeout=90.0, interval=0.5)
        found = assess(tunnel)
        assert "for many hours of 7 of the last 7 measured days" in found["sentence"]
        assert ask(tunnel, "/") == 101
        assert all(is_open(client) for client in clients)


async def _write_history(folder: Path) -> None:
    folder.mkdir()
    history = await History.open(folder)
    hour = int(time.time() // 3600) * 60
    for number in range(28 * 24, 0, -1):
        history.append(Minute(hour - number * 60, 1, (SiteMinute(SITE, 40, 40, Counts(1)),), {}))
    await asyncio.wrap_future(history.flush())
    assert await history.close()


def test_without_a_plan_there_is_no_admin_process(origin: RawOrigin, certificate: Certificate, folder: Path) -> None:
    with tunnel_to(origin, certificate, folder, site="") as tunnel:
        assert admin_of(tunnel) is None
        assert run(tunnel, "usage")["tunnels"] == {SITE: 0}
        with pytest.raises(ControlError, match="no site has a plan"):
            send_command(tunnel.control, {"do": "release", "site": SITE})


def test_counts_are_right_after_any_process_was_killed(
    origin: RawOrigin, certificate: Certificate, folder: Path
) -> None:
    with tunnel_to(origin, certificate, folder, errors_expected=True) as tunnel, connected(tunnel, 30) as clients:
        assert Counter(asked_at_once(clients, "/")) == {101: 30}
        eventually(lambda: now_of(tunnel) == 30)
        for role in ("admin", "ledger"):
            before = tunnel.status()[role]["process"]
            os.kill(before, signal.SIGKILL)
            wait_for_another(tunnel, role, before)
            eventually(lambda: now_of(tunnel) == 30)
            assert ask(tunnel, "/") == 101
        eventually(lambda: now_of(tunnel) == 30)
        victim = max(tunnel.status()["processes"], key=lambda one: one["tunnels"])
        os.kill(victim["process"], signal.SIGKILL)
        left = 30 - victim["tunnels"]
        began = time.monotonic()
        eventually(lambda: now_of(tunnel) == left)
        assert time.monotonic() - began < 5.0
        assert ask(tunnel, "/") == 101


def test_counts_are_right_after_the_parent_was_killed(
    origin: RawOrigin, certificate: Certificate, folder: Path
) -> None:
    """The next tunnel goes on with the same history, although a ledger and processes of the one before may be left."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(AssertionError, match="it exited with -9"))
        killed = stack.enter_context(tunnel_to(origin, certificate, folder, errors_expected=True))
        clients = stack.enter_context(connected(killed, 8))
        assert Counter(asked_at_once(clients, "/")) == {101: 8}
        eventually(lambda: now_of(killed) == 8)
        killed.send_signal(signal.SIGKILL)
        tunnel = stack.enter_context(tunnel_to(origin, certificate, folder))
        eventually(lambda: (tunnel.status()["ledger"] or {}).get("history", {}).get("path"))
        with connected(tunnel, 3) as others:
            assert Counter(asked_at_once(others, "/")) == {101: 3}
            began = time.monotonic()
            eventually(lambda: now_of(tunnel) == 3)
            assert time.monotonic() - began < 5.0


# --- throttles --------------------------------------------------------------------------------------------------------


def test_nobody_is_throttled_who_was_not_told(origin: RawOrigin, certificate: Certificate, folder: Path) -> None:
    with tunnel_to(origin, certificate, folder) as tunnel:
        run(tunnel, "usage")
        with pytest.raises(ControlError, match="talk to its owner first; against an attack, add --abuse"):
            run(tunnel, "throttle", site=SITE, rate="3/hour", seconds=60.0, why="too many")
        for fields, message in (
            ({"rate": "3"}, "expected a rate such as"),
            ({"rate": "0/second"}, "expected a rate such as"),
            ({"why": "  "}, "say why"),
            ({"seconds": 0.0}, "expected a time"),
            ({"site": "lokalhost"}, 'did you mean "localhost"'),
            ({"addresses": ["nonsense"]}, "nonsense"),
        ):
            values = {"site": SITE, "rate": "3/hour", "seconds": 60.0, "why": "x", "abuse": True, **fields}
            with pytest.raises(ControlError, match=message):
                run(tunnel, "throttle", **values)
        with connected(tunnel, 10) as clients:
            assert Counter(asked_at_once(clients, "/")) == {101: 10}


def test_a_throttle_is_exact_over_all_processes_and_can_be_released(
    origin: RawOrigin, certificate: Certificate, folder: Path
) -> None:
    with tunnel_to(origin, certificate, folder, processes=4) as tunnel:
        found = throttle(tunnel, "7/hour")
        assert (found["site"], found["abuse"], found["notice"]) == (SITE, True, "")
        assert found["who"].endswith(f"(uid {os.getuid()})")
        with connected(tunnel, 40) as clients:
            for client in clients:
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n")
                client.sendall(b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
            responses = [read_response(client) for client in clients]
            assert Counter(one.status for one in responses) == {101: 7, 429: 33}
            refused = next(one for one in responses if one.status == 429)
            assert 0 < int(refused.headers["Retry-After"]) <= 3600
        reasons = {record["reason"] for record in tunnel.wait_records(40) if record["status"] == 429}
        assert reasons == {"throttled"}
        (shown,) = tunnel.status()["throttles"]
        assert (shown["site"], shown["amount"], shown["window"]) == (SITE, 7, 3600)
        (shown,) = run(tunnel, "usage", site=SITE)["throttles"]
        assert (shown["rate"], shown["why"]) == ("7/hour", "a test")
        assert any("throttled: localhost" in line for line in tunnel.run_command("status"))
        assert run(tunnel, "release", site=SITE)["throttles"] == 1
        eventually(lambda: ask(tunnel, "/") == 101)
        with connected(tunnel, 20) as clients:
            assert Counter(asked_at_once(clients, "/")) == {101: 20}
        assert tunnel.records("site throttled")[0]["why"] == "a test"
        assert tunnel.records("throttle released")[0]["throttles"] == 1


def test_a_throttle_of_addresses_leaves_others_alone(origin: RawOrigin, certificate: Certificate, folder: Path) -> None:
    with tunnel_to(origin, certificate, folder) as tunnel:
        throttle(tunnel, "2/hour", addresses=["127.0.0.9"])
        assert Counter(ask(tunnel, "/", "127.0.0.9") for _ in range(5)) == {101: 2, 429: 3}
        assert Counter(ask(tunnel, "/") for _ in range(5)) == {101: 5}


def test_a_throttle_ends_by_itself_and_open_tunnels_stay(
    origin: RawOrigin, certificate: Certificate, folder: Path
) -> None:
    with tunnel_to(origin, certificate, folder) as tunnel, connected(tunnel, 5) as clients:
        assert Counter(asked_at_once(clients, "/")) == {101: 5}
        throttle(tunnel, "1/hour", seconds=4.0)
        assert Counter(ask(tunnel, "/") for _ in range(4)) == {101: 1, 429: 3}
        eventually(lambda: ask(tunnel, "/") == 101, interval=0.2)
        assert tunnel.status()["throttles"] == []
        assert all(is_open(client) for client in clients)


def test_a_throttle_survives_kills_a_reload_and_a_restart(
    origin: RawOrigin, certificate: Certificate, folder: Path
) -> None:
    with tunnel_to(origin, certificate, folder, errors_expected=True) as tunnel:
        throttle(tunnel, "2/hour")
        assert Counter(ask(tunnel, "/") for _ in range(4)) == {101: 2, 429: 2}
        processes = tunnel.status()["processes"]
        for one in processes:
            os.kill(one["process"], signal.SIGKILL)
        killed = {one["process"] for one in processes}
        eventually(lambda: len({one["process"] for one in tunnel.status()["processes"]} - killed) == 2)
        assert Counter(ask(tunnel, "/") for _ in range(4)) == {429: 4}
        before = (admin_of(tunnel) or {})["process"]
        os.kill(before, signal.SIGKILL)
        wait_for_another(tunnel, "admin", before)
        tunnel.reload(tunnel.file.read_text().replace("guideline = 10", "guideline = 20"))
        assert ask(tunnel, "/") == 429
        eventually(lambda: len(run(tunnel, "usage")["throttles"]) == 1)  # it opens them in the background
    with tunnel_to(origin, certificate, folder) as tunnel:
        eventually(lambda: tunnel.status()["throttles"])
        assert Counter(ask(tunnel, "/") for _ in range(6)) == {101: 2, 429: 4}


def test_a_reload_gives_and_takes_plans(origin: RawOrigin, certificate: Certificate, folder: Path) -> None:
    with tunnel_to(origin, certificate, folder) as tunnel:
        assert assess(tunnel)["figures"]["guideline"] == 10
        config = tunnel.file.read_text()
        before = (admin_of(tunnel) or {})["process"]
        tunnel.reload(config.replace("guideline = 10", 'plan = "pro"'))
        with connected(tunnel, 1) as clients:
            assert asked_at_once(clients, "/") == [101]
            assert run(tunnel, "usage")["problem"] == ""
        assert (admin_of(tunnel) or {})["process"] == before
        tunnel.reload(config.replace("guideline = 10", ""))
        eventually(lambda: admin_of(tunnel) is None)
        tunnel.reload(config)
        eventually(lambda: admin_of(tunnel) is not None)
        assert assess(tunnel)["site"] == SITE


@pytest.mark.soak
def test_an_admin_process_that_hangs_holds_nothing_up(
    origin: RawOrigin, certificate: Certificate, folder: Path
) -> None:
    with tunnel_to(origin, certificate, folder, errors_expected=True) as tunnel:
        run(tunnel, "usage")
        before = (admin_of(tunnel) or {})["process"]
        os.kill(before, signal.SIGSTOP)
        began = time.monotonic()
        with connected(tunnel, 10) as clients:
            assert Counter(asked_at_once(clients, "/")) == {101: 10}
        tunnel.reload(tunnel.file.read_text().replace("guideline = 10", "guideline = 20"))
        assert time.monotonic() - began < 5.0
        wait_for_another(tunnel, "admin", before)  # it has not taken the configuration
        eventually(lambda: assess(tunnel)["figures"]["guideline"] == 20)


def is_open(client: ssl.SSLSocket) -> bool:
    client.settimeout(0.05)
    try:
        return client.recv(1) != b""
    except TimeoutError:
        return True


def test_an_upgrade_keeps_throttles_and_starts_another_admin_process(
    origin: RawOrigin, certificate: Certificate, folder: Path, tmp_path: Path
) -> None:
    versions = Versions(tmp_path / "versions")
    with tunnel_to(origin, certificate, folder, environment=dict(versions.environment)) as tunnel:
        throttle(tunnel, "2/hour")
        assert Counter(ask(tunnel, "/") for _ in range(4)) == {101: 2, 429: 2}
        before = (admin_of(tunnel) or {})["process"]
        versions.install("2.0.0")
        upgraded(tunnel)
        assert Counter(ask(tunnel, "/") for _ in range(4)) == {429: 4}
        wait_for_another(tunnel, "admin", before)
        assert len(run(tunnel, "usage")["throttles"]) == 1
