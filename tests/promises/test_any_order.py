"""Clients, origins, reloads, upgrades and kills in any order: what a user may expect of it holds after every step.

Hypothesis chooses the steps, runs them with a real program, clients and origins, and compares with a small model:
which tunnels are open, and which status the next handshake has. A few steps here; ./scripts/soak runs many.
"""

import os
import random
import signal
import socket
import ssl
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, assume, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.harness import (
    Certificate,
    RawOrigin,
    Tunnel,
    client_context,
    connect_tls,
    echo_bytes,
    eventually,
    receive_exactly,
    reset,
    upgrade,
)
from tests.promises.firewalled import config_for

MAX_OPEN = 12
MAX_KILLS = 3
"""In one run: the delay before a process is replaced doubles with each one that dies soon."""
SEED = 27
"""Of the few steps in ./scripts/test: with it they have every rule. Most seeds leave some out."""
FORBIDDEN = '[[sites.rules]]\nname = "closed"\nwhen = \'path == "/closed"\'\naction = "block"\n'
BROKEN = "listen = [\n"


@dataclass(eq=False, slots=True)
class Open:
    """A tunnel that the model expects to work. `origin` is the number of the origin that it leads to."""

    sock: ssl.SSLSocket
    origin: int
    sent: int = 0

    def echo(self) -> None:
        self.sent += 1
        message = b"%08d" % self.sent
        self.sock.sendall(message)
        assert receive_exactly(self.sock, len(message)) == message

    def has_ended(self) -> bool:
        """Return whether the other side has ended it. The model sends nothing meanwhile."""
        self.sock.settimeout(0.2)
        try:
            return not self.sock.recv(1)
        except TimeoutError:
            return False
        except OSError:
            return True
        finally:
            self.sock.settimeout(20)


@dataclass(slots=True)
class Model:
    """What must be true of the program."""

    origin: int = 0
    up: list[bool] = field(default_factory=lambda: [True, True])
    forbids: bool = False
    open: list[Open] = field(default_factory=list)

    def expected_status(self, path: str) -> set[int]:
        if self.forbids and path == "/closed":
            return {403}
        return {101} if self.up[self.origin] else {502, 503}


class AnyOrder(RuleBasedStateMachine):
    """A program with two processes in front of two origins, of which its configuration uses one."""

    certificate: Certificate  # set by the test
    processes = 2

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.model = Model()
        self.kills = 0
        self.ports = [0, 0]
        self.origins = [ExitStack(), ExitStack()]

    @initialize(chosen=st.integers(0, 9))
    def start(self, chosen: int) -> None:
        # Hypothesis tries the simplest choices first: the first step of all, again and again.
        assume(chosen > 0)
        for number in (0, 1):
            self.begin_origin(number)
        arguments = ("--processes", str(self.processes))
        tunnel = Tunnel(None, self.certificate, config=self.config(), arguments=arguments, errors_expected=True)
        self.tunnel = self.stack.enter_context(tunnel)
        self.context = client_context(self.tunnel)

    def teardown(self) -> None:
        for one in self.model.open:
            one.sock.close()
        self.stack.close()
        for origin in self.origins:
            origin.close()

    def begin_origin(self, number: int) -> None:
        origin = self.origins[number].enter_context(RawOrigin(echo_bytes, port=self.ports[number]))
        self.ports[number] = origin.port

    def config(self) -> str:
        site = FORBIDDEN if self.model.forbids else ""
        return config_for(f"127.0.0.1:{self.ports[self.model.origin]}", self.certificate, site=site)

    # What clients do.

    @precondition(lambda self: len(self.model.open) < MAX_OPEN)
    @rule(path=st.sampled_from(["/", "/chat?a=b", "/closed"]))
    def connect(self, path: str) -> None:
        expected = self.model.expected_status(path)
        client = connect_tls(self.tunnel, context=self.context)
        status = upgrade(client, path).status
        assert status in expected
        if status == 101:
            self.model.open.append(Open(client, self.model.origin))
        else:
            client.close()

    @precondition(lambda self: self.model.open)
    @rule(data=st.data(), how=st.sampled_from(["close", "reset", "leave"]))
    def end(self, data: st.DataObject, how: str) -> None:
        one = self.model.open.pop(data.draw(st.integers(0, len(self.model.open) - 1)))
        if how == "close":
            one.sock.unwrap().close()
        elif how == "reset":
            reset(one.sock)
        else:
            one.sock.close()

    @rule(size=st.integers(0, 400))
    def send_garbage(self, size: int) -> None:
        with socket.create_connection(("127.0.0.1", self.tunnel.port), 20) as sock, suppress(OSError):
            sock.sendall(random.Random(size).randbytes(size))

    # What origins do.

    @precondition(lambda self: any(self.model.up))
    @rule(number=st.sampled_from([0, 1]))
    def stop_origin(self, number: int) -> None:
        if not self.model.up[number]:
            return
        self.origins[number].close()
        self.origins[number] = ExitStack()
        self.model.up[number] = False
        ended = [one for one in self.model.open if one.origin == number]
        for one in ended:
            eventually(one.has_ended)
            one.sock.close()
        self.model.open = [one for one in self.model.open if one not in ended]

    @rule(number=st.sampled_from([0, 1]))
    def start_origin(self, number: int) -> None:
        if not self.model.up[number]:
            self.begin_origin(number)
            self.model.up[number] = True

    # What operators do.

    @rule(origin=st.sampled_from([0, 1]), forbids=st.booleans())
    def reload(self, origin: int, forbids: bool) -> None:
        self.model.origin, self.model.forbids = origin, forbids
        self.tunnel.reload(self.config())

    @rule()
    def reload_a_broken_file(self) -> None:
        self.tunnel.reload(BROKEN, status=1)
        self.tunnel.file.write_text(self.config())

    @rule()
    def upgrade(self) -> None:
        self.tunnel.run_command("upgrade")

    # What goes wrong.

    @precondition(lambda self: self.kills < MAX_KILLS)
    @rule(data=st.data())
    def kill_a_process(self, data: st.DataObject) -> None:
        self.kills += 1
        processes = self.responding()
        victim = processes[data.draw(st.integers(0, len(processes) - 1))]
        os.kill(victim["process"], signal.SIGKILL)
        eventually(lambda: victim["process"] not in self.tunnel.pids)
        lost = [one for one in self.model.open if one.has_ended()]
        assert len(lost) == victim["tunnels"]
        for one in lost:
            one.sock.close()
        self.model.open = [one for one in self.model.open if one not in lost]
        eventually(lambda: len(self.serving()) == self.processes)

    def serving(self) -> list[object]:
        return [one for one in self.tunnel.status()["processes"] if one["state"] == "serving"]

    # What always holds.

    @invariant()
    def every_tunnel_echoes(self) -> None:
        for one in self.model.open:
            one.echo()

    @invariant()
    def every_tunnel_is_counted(self) -> None:
        if hasattr(self, "tunnel"):
            eventually(lambda: sum(one["tunnels"] for one in self.responding()) == len(self.model.open))

    def responding(self) -> list[dict[str, Any]]:
        """Return the processes, without one that is about to exit and no longer says how many tunnels it has."""
        return [one for one in self.tunnel.status()["processes"] if one["tunnels"] is not None]


@pytest.fixture
def machine(certificate: Certificate) -> type[AnyOrder]:
    return type("AnyOrderHere", (AnyOrder,), {"certificate": certificate})


def _run(machine: type[AnyOrder], steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=1,
            stateful_step_count=steps,
            deadline=None,
            # A failure is shown as it happened: to shrink it would take as long as the first run, many times.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.normal,
        ),
    )


def test_a_few_steps(machine: type[AnyOrder]) -> None:
    """The same steps at each run, with most of the rules, so that a failure is not a matter of chance."""
    _run(seed(SEED)(machine), steps=16)


@pytest.mark.soak
def test_many_steps(machine: type[AnyOrder]) -> None:
    until = time.monotonic() + float(os.environ.get("TLSTUNNEL_SOAK_SECONDS", "600")) / 2
    while time.monotonic() < until:
        _run(machine, steps=60)
