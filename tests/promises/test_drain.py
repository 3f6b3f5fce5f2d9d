"""A drain ends tunnels one after another, so that their clients reconnect one after another."""

import itertools
import os
import signal
import subprocess
import time
from contextlib import ExitStack
from datetime import datetime

import pytest

from scripts.load.drain import measure
from tests.harness import (
    Certificate,
    RawOrigin,
    Tunnel,
    assert_below,
    connect_tls,
    echo_bytes,
    eventually,
    receive_all,
    upgrade,
)


@pytest.mark.alone
@pytest.mark.parametrize("clients", [200, pytest.param(5000, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
def test_the_rate_of_reconnects_is_bounded(clients: int) -> None:
    """When tunnels are ended, their clients reconnect, spread evenly over the period of the drain."""
    over = 4.0 if clients == 200 else 60.0
    peaks = []

    def peak() -> int:
        spread = measure(clients, over)
        assert len(spread.back) == clients
        assert spread.attempts == clients, "every client reconnects at its first attempt"
        assert spread.ended[-1] > 0.9 * over
        peaks.append(spread.peak())
        return peaks[-1]

    # Jitter moves each by one interval at most, and the machine is busy with other things.
    assert_below(2 * clients / over, peak)
    at_once = measure(clients, 0.0)
    assert len(at_once.back) == clients
    assert at_once.peak() > 1.5 * peaks[-1]


def test_oldest_first(certificate: Certificate) -> None:
    settings = '[release]\ndrain_over = "3s"\n'
    with RawOrigin(echo_bytes) as origin, Tunnel(origin.address, certificate, settings=settings) as tunnel:
        with ExitStack() as stack:
            for _ in range(20):
                answer = upgrade(stack.enter_context(connect_tls(tunnel)))
                assert answer.status == 101
                time.sleep(0.01)  # so that their ages differ in the log
            tunnel.send_signal(signal.SIGTERM)
            records = tunnel.wait_records(20)
        # Each ends at its place with a jitter of one interval: neighbours may swap places, no more.
        starts = [_at(record) - record["seconds"] for record in records]
        places = [sorted(starts).index(start) for start in starts]
        assert all(abs(place - wanted) <= 1 for wanted, place in enumerate(places)), places


def _at(record: dict[str, object]) -> float:
    return datetime.fromisoformat(str(record["timestamp"])).timestamp()


def test_bytes_in_flight_are_delivered(certificate: Certificate) -> None:
    """A slow reader gets everything that was sent before its tunnel's end, then an orderly end."""
    settings = '[release]\ndrain_over = "0s"\n'
    with (
        RawOrigin(echo_bytes) as origin,
        Tunnel(origin.address, certificate, settings=settings) as tunnel,
        connect_tls(tunnel) as client,
    ):
        assert upgrade(client).status == 101
        client.sendall(bytes(200_000))
        eventually(lambda: tunnel.status()["processes"][0]["tunnels"] == 1)
        tunnel.send_signal(signal.SIGTERM)
        assert len(receive_all(client)) == 200_000


def test_commands(certificate: Certificate) -> None:
    for command in ("drain", "stop"):
        with RawOrigin(echo_bytes) as origin, Tunnel(origin.address, certificate) as tunnel:
            assert tunnel.run_command(command) == ["ended"]
            assert tunnel.wait() == 0


def test_stop_ends_a_drain(certificate: Certificate) -> None:
    with (
        RawOrigin(echo_bytes) as origin,
        Tunnel(origin.address, certificate) as tunnel,
        connect_tls(tunnel) as client,
    ):
        assert upgrade(client).status == 101
        tunnel.send_signal(signal.SIGTERM)
        tunnel.wait_record(lambda record: record["event"] == "draining")
        status = tunnel.status()
        assert status["ending"] == "SIGTERM"
        assert status["processes"][0]["state"] == "draining"
        assert tunnel.run_command("reload", status=1) == [
            "tlstunnel: nothing was changed: the tunnel is shutting down (SIGTERM)"
        ]
        assert "the tunnel is shutting down (SIGTERM)" in tunnel.run_command("upgrade", status=1)[0]
        assert tunnel.run_command("stop") == ["ended"]


ACTIONS = ("reload", "SIGHUP", "SIGUSR2", "status", "kill a process")


@pytest.mark.parametrize("order", list(itertools.permutations(ACTIONS, 3))[::22], ids=" ".join)
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_signals_and_commands_in_every_order(
    certificate: Certificate, order: tuple[str, ...], end: signal.Signals
) -> None:
    """In every order it exits cleanly, and leaves no process and no client behind (`Tunnel` checks that)."""
    with RawOrigin(echo_bytes) as origin, Tunnel(origin.address, certificate, errors_expected=True) as tunnel:
        beside: list[subprocess.Popen[str]] = []
        for action in order:
            match action:
                case "kill a process":
                    for pid in tunnel.pids[-1:]:
                        os.kill(pid, signal.SIGKILL)
                case "reload" | "status":
                    beside.append(tunnel.start_command(action))
                case number:
                    tunnel.send_signal(signal.Signals[number])
        if order[0] != "SIGUSR2":
            tunnel.send_signal(end)
            assert tunnel.wait() == 0
        for process in beside:
            assert process.wait(60) in (0, 1)
        if order[0] == "SIGUSR2":
            eventually(lambda: tunnel.records("upgraded") or tunnel.records("not upgraded"))
            with connect_tls(tunnel) as client:
                assert upgrade(client).status == 101
