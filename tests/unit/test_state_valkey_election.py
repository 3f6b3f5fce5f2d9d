"""The election of the machine that sends notices, against a real server, with processes that are stopped and killed."""

import asyncio
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.harness import REPOSITORY, TIMEOUT, child_environment
from tests.redis_server import RedisServer, find_free_port, wait_for
from tlstunnel.state.clock import read_clock
from tlstunnel.state.valkey import election as module
from tlstunnel.state.valkey.address import parse_url
from tlstunnel.state.valkey.election import (
    LEASE,
    MARGIN,
    RENEWALS,
    VARIABLE,
    Candidate,
    Election,
    News,
    Request,
    read_lease,
)
from tlstunnel.state.valkey.scripts import SCRIPTS, Script, decode_election
from tlstunnel.testing.program import start_process

SHORT = 0.9
"""Seconds of a lease where a test waits for its end."""

KEYS = [b"{test}:election", b"{test}:deliveries"]


# By the test's clock: what a candidate believes, and what the server knows.


class Simulation:
    """Machines whose clocks neither agree nor run equally fast, and a server whose clock the test sets."""

    def __init__(self, server: RedisServer, script: Script, lease: float = LEASE) -> None:
        self._server = server
        self._script = script
        self._lease = lease
        self.now = 1_000_000.0
        self.candidates = [Candidate(f"m{number}", lease) for number in range(3)]
        self.asked: list[list[Request]] = [[], [], []]
        self.answers: list[list[tuple[Request, bytes]]] = [[], [], []]
        server.command("FLUSHALL")
        self.saved = self._read()

    def local(self, number: int) -> float:
        """Return what the clock of a machine shows. The fastest is 4 % faster than the slowest."""
        return (0.0, 5e8, 12345.0)[number] + self.now * (0.98, 1.0, 1.02)[number]

    def ask(self, number: int, *, wanted: bool = True) -> None:
        """Send a request, on a new connection if there is no answer to the one before."""
        self.answers[number].clear()
        self.asked[number].append(self.candidates[number].ask(self.local(number), wanted=wanted))

    def execute(self, number: int) -> None:
        """Let the server execute the oldest request of a machine, however old it is."""
        if not self.asked[number]:
            return
        request = self.asked[number].pop(0)
        self._server.command("SET", "clock", round(self.now * 1e6))
        self._server.command(b"SCRIPT", b"LOAD", self._script.source)
        reply = self._server.command(*self._script.build_call(KEYS, request.fields))
        assert isinstance(reply, bytes)
        if not self.asked[number]:  # those before it were sent on connections that were given up
            self.answers[number].append((request, reply))

    def answer(self, number: int) -> News | None:
        """Let the answer arrive."""
        if not self.answers[number]:
            return None
        request, reply = self.answers[number].pop()
        return self.candidates[number].learn(request, decode_election(reply))

    def exchange(self, number: int, *, wanted: bool = True) -> News:
        """Ask, and get the answer at once."""
        self.ask(number, wanted=wanted)
        while self.asked[number]:
            self.execute(number)
        news = self.answer(number)
        assert news is not None
        return news

    def restart(self, number: int) -> None:
        """Kill the process of a machine. The next one has the same instance."""
        self.candidates[number] = Candidate(f"m{number}", self._lease)
        self.answers[number].clear()

    def flush(self) -> None:
        """Lose all data."""
        self._server.command("FLUSHALL")

    def save(self) -> None:
        """Let a replica have what the server has now."""
        self.saved = self._read()

    def fail_over(self) -> None:
        """Let the replica take the server's place."""
        self._server.command("FLUSHALL")
        if self.saved:
            self._server.command("HSET", KEYS[0], *self.saved, b"server", b"another one")

    def list_elected(self) -> list[int]:
        """Return the machines that are certain to have the lease."""
        return [number for number, one in enumerate(self.candidates) if self.local(number) < one.until]

    def _read(self) -> Sequence[bytes]:
        fields = self._server.command("HGETALL", KEYS[0])
        assert isinstance(fields, list)
        return fields


@pytest.fixture(scope="module")
def clocked() -> Script:
    """Return the script with the time in a key."""
    source = SCRIPTS["elect"].source.replace(b'redis.call("TIME")', b'{0, tonumber(redis.call("GET", "clock"))}')
    assert source.count(b'"clock"') == 1
    return Script.make(source)


def begin(server: RedisServer, clocked: Script) -> Simulation:
    """Return machines of which the first is elected."""
    simulation = Simulation(server, clocked)
    assert simulation.exchange(0).until == 0.0
    simulation.now += LEASE
    assert simulation.exchange(0).until > simulation.local(0)
    return simulation


MACHINES = st.integers(0, 2)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("advance"), st.sampled_from([0.5, 5.0, 10.0, 26.0, 31.0])),
        st.tuples(st.sampled_from(["ask", "execute", "answer", "exchange", "give back", "restart"]), MACHINES),
        st.tuples(st.sampled_from(["flush", "save", "fail over"]), st.none()),
    ),
    max_size=40,
)


@given(STEPS)
@example([("advance", 26.0), ("exchange", 1), ("advance", 5.0), ("exchange", 1)])
@example([("flush", None), ("exchange", 1), ("advance", 26.0), ("exchange", 1), ("advance", 5.0), ("exchange", 1)])
@example([("fail over", None), ("exchange", 1), ("advance", 10.0), ("exchange", 1)])
@example([*[("advance", 5.0)] * 5, ("exchange", 1)])
@example([*[("advance", 5.0)] * 6, ("exchange", 1)])
def test_never_two_are_elected(shared_server: RedisServer, clocked: Script, steps: list[tuple[str, Any]]) -> None:
    simulation = begin(shared_server, clocked)
    for action, value in steps:
        match action:
            case "advance":
                simulation.now += value
            case "give back":
                simulation.ask(value, wanted=False)
            case "flush" | "save":
                getattr(simulation, action)()
            case "fail over":
                simulation.fail_over()
            case _:
                getattr(simulation, action)(value)
        assert len(simulation.list_elected()) <= 1
    # Whatever has happened, there is one again, and it stays.
    for _ in range(9):
        simulation.now += LEASE / RENEWALS
        for number in range(3):
            simulation.exchange(number)
    (elected,) = simulation.list_elected()
    for _ in range(4):
        simulation.now += LEASE / RENEWALS
        for number in range(3):
            simulation.exchange(number)
        assert simulation.list_elected() == [elected]


def test_other_is_elected_when_the_lease_has_ended(server: RedisServer, clocked: Script) -> None:
    simulation = begin(server, clocked)
    simulation.now += LEASE * (1 - MARGIN) / 0.97
    assert simulation.list_elected() == []
    assert simulation.exchange(1).until == 0.0
    simulation.now += LEASE
    assert simulation.exchange(1).until > simulation.local(1)
    assert simulation.exchange(0).until == 0.0


def test_lease_that_is_given_back_is_free(server: RedisServer, clocked: Script) -> None:
    simulation = begin(server, clocked)
    assert simulation.exchange(1, wanted=False).until == 0.0
    assert simulation.exchange(1).until == 0.0
    assert simulation.exchange(0, wanted=False).until == 0.0
    assert simulation.exchange(1).until > 0.0
    assert simulation.exchange(0).until == 0.0


def test_answer_that_comes_late_is_worth_nothing(server: RedisServer, clocked: Script) -> None:
    simulation = begin(server, clocked)
    simulation.ask(0)
    simulation.execute(0)
    simulation.now += LEASE
    simulation.answer(0)
    assert simulation.list_elected() == []


def test_next_process_of_an_instance_has_the_lease(server: RedisServer, clocked: Script) -> None:
    simulation = begin(server, clocked)
    simulation.ask(0, wanted=False)  # of the process before, which arrives too late
    simulation.restart(0)
    late = simulation.asked[0].pop()
    assert simulation.exchange(0).until > 0.0
    simulation.asked[0].append(late)
    simulation.execute(0)
    assert simulation.exchange(1).until == 0.0


@pytest.mark.parametrize("hours", [-24, 24])
def test_clock_of_the_server_that_is_set(server: RedisServer, clocked: Script, hours: int) -> None:
    simulation = begin(server, clocked)
    until = simulation.local(1) + LEASE
    simulation.now += hours * 3600
    assert simulation.exchange(0, wanted=hours > 0).until >= 0.0
    simulation.restart(0)
    simulation.now += LEASE
    assert simulation.exchange(1).until > 0.0, "a clock that was set back must not prolong a lease"
    assert until != simulation.candidates[1].until


def test_clock_that_is_set_back_by_less_than_since_the_beginning(server: RedisServer, clocked: Script) -> None:
    simulation = begin(server, clocked)
    simulation.now += 86_400
    assert simulation.exchange(0).until > 0.0
    simulation.now -= 3600
    assert simulation.exchange(1).until == 0.0
    simulation.now += LEASE
    assert simulation.exchange(1).until > 0.0


def test_all_learn_what_was_delivered(server: RedisServer, clocked: Script) -> None:
    simulation = begin(server, clocked)
    simulation.candidates[0].publish(["a", "b"])
    assert sorted(simulation.exchange(0).delivered) == ["a", "b"]
    assert sorted(simulation.exchange(1).delivered) == ["a", "b"]
    simulation.now += 1
    assert simulation.exchange(1).delivered == []
    simulation.candidates[0].publish(["c"])
    simulation.exchange(0)
    simulation.now += 1
    assert simulation.exchange(1).delivered == ["c"]
    simulation.candidates[1].begin_anew()
    assert sorted(simulation.exchange(1).delivered) == ["a", "b", "c"]
    simulation.now += 15 * 86_400
    simulation.candidates[1].publish(["d"])
    simulation.exchange(1)
    assert simulation.exchange(2).delivered == ["d"], "they are forgotten in time"


def test_what_was_not_published_is_published_later(server: RedisServer, clocked: Script) -> None:
    simulation = begin(server, clocked)
    simulation.candidates[0].publish(["a"])
    simulation.ask(0)
    simulation.asked[0].clear()
    assert simulation.exchange(0).delivered == ["a"]
    assert simulation.exchange(1).delivered == ["a"]


def test_none_is_elected_before_it_has_read_everything(server: RedisServer, clocked: Script) -> None:
    simulation = begin(server, clocked)
    names = [f"delivery {number}" for number in range(2300)]
    simulation.candidates[0].publish(names)
    simulation.exchange(0)
    while simulation.candidates[0].behind:
        simulation.now += 0.001
        simulation.exchange(0)
    simulation.exchange(0, wanted=False)
    found: set[str] = set()
    while not simulation.candidates[1].until:
        found.update(simulation.exchange(1).delivered)
    assert sorted(found) == sorted(names)


def test_all_know_who_has_the_lease(server: RedisServer, clocked: Script) -> None:
    simulation = Simulation(server, clocked)
    for number, shown in enumerate(["a.example", "b.example", "c\n" + "x" * 200]):
        simulation.candidates[number] = Candidate(f"m{number}", LEASE, shown)
    assert simulation.exchange(0).holder == ""
    simulation.now += LEASE
    assert [simulation.exchange(number).holder for number in (0, 1, 2)] == ["a.example"] * 3
    assert simulation.exchange(0, wanted=False).holder == ""
    assert simulation.exchange(1).holder == "b.example"
    server.command("HSET", KEYS[0], "holder", "m7")  # of an earlier release, which does not say how it is shown
    assert simulation.exchange(1).holder == "m7"
    simulation.now += 2 * LEASE
    assert simulation.exchange(2, wanted=False).holder == ""
    shown = simulation.exchange(2).holder
    assert shown.startswith("c\\nxxx")
    assert len(shown) <= 100


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, LEASE),
        ({VARIABLE: "2.5"}, 2.5),
        ({VARIABLE: "x"}, LEASE),
        ({VARIABLE: "nan"}, LEASE),
        ({VARIABLE: "90"}, LEASE),
    ],
)
def test_a_lease_of_tests_is_shorter(environ: dict[str, str], seconds: float) -> None:
    assert read_lease(environ) == seconds


def test_what_is_unpublished_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_UNPUBLISHED", 3)
    candidate = Candidate("one")
    candidate.publish("abcd")
    candidate.publish("d")
    assert candidate.ask(0.0).fields[5] == ["b", "c", "d"]


# Connections to a real server, in real time.


class Machine:
    """What an `Election` says."""

    def __init__(self, server: RedisServer | str, instance: str, lease: float = SHORT) -> None:
        self.news: list[News] = []
        self.reports: list[str] = []
        self.election = Election(
            parse_url(server if isinstance(server, str) else server.url),
            prefix="test",
            instance=instance,
            on_news=self.news.append,
            report=lambda line, _: self.reports.append(line.partition(" ")[2]),
            lease=lease,
        )

    @property
    def elected(self) -> bool:
        return bool(self.news) and read_clock() < self.news[-1].until

    def is_elected_at(self, when: float) -> bool:
        """Return whether the lease was renewed for long enough."""
        return self.news[-1].until > when

    @property
    def delivered(self) -> set[str]:
        return {one for news in self.news for one in news.delivered}


@contextlib.asynccontextmanager
async def taking_part(server: RedisServer | str, *instances: str) -> AsyncIterator[list[Machine]]:
    machines = [Machine(server, instance) for instance in instances]
    for machine in machines:
        machine.election.start()
    try:
        yield machines
    finally:
        for machine in machines:
            await machine.election.close(give_back=False)


def test_one_of_two_is_elected_and_the_other_when_it_stops(server: RedisServer) -> None:
    async def main() -> None:
        async with taking_part(server, "one", "two") as machines:
            await wait_for(lambda: any(machine.elected for machine in machines))
            first, second = sorted(machines, key=lambda machine: not machine.elected)
            assert not second.elected
            first.election.publish(["a"])
            await wait_for(lambda: second.delivered == {"a"})
            began = time.monotonic()
            await first.election.close(give_back=True)
            await wait_for(lambda: second.elected)
            assert time.monotonic() - began < SHORT + TIMEOUT / 2
            assert first.reports == second.reports == []

    asyncio.run(main())


def test_server_that_is_away(shared_server: RedisServer) -> None:
    with RedisServer() as server:

        async def main() -> None:
            async with taking_part(server, "one") as (one,):
                await wait_for(lambda: one.elected)
                server.kill()
                assert one.elected, "it goes on while it is certain"
                await wait_for(lambda: not one.elected)
                one.election.publish(["a"])
                await wait_for(lambda: one.reports)
                server.start()
                await wait_for(lambda: one.elected)
                await wait_for(lambda: one.delivered == {"a"})
                assert len(one.reports) == 2
                assert one.reports[0].startswith("does not elect: ")
                assert one.reports[1] == "elects again"

        asyncio.run(main())


def test_scripts_that_were_flushed_and_connections_that_were_closed(server: RedisServer) -> None:
    async def main() -> None:
        async with taking_part(server, "one") as (one,):
            await wait_for(lambda: one.elected)
            for commands in ([("SCRIPT", "FLUSH")], [("CLIENT", "KILL", "TYPE", "normal")]):
                for command in commands:
                    server.command(*command)
                until = one.news[-1].until + SHORT
                await wait_for(partial(one.is_elected_at, until))
                assert one.elected
            assert one.reports == []

    asyncio.run(main())


def test_keys_that_are_not_ours(server: RedisServer) -> None:
    async def main() -> None:
        server.command("SET", KEYS[0], "x")
        async with taking_part(server, "one") as (one,):
            await wait_for(lambda: one.reports)
            assert "it answers: WRONGTYPE" in one.reports[0]
            assert one.news == []

    asyncio.run(main())


def test_without_permission_to_ask_who_the_server_is(server: RedisServer) -> None:
    async def main() -> None:
        async with taking_part(server, "one") as (one,):
            await wait_for(lambda: one.elected)

    server.command("ACL", "SETUSER", "default", "-info")
    try:
        asyncio.run(main())
        server.command("ACL", "SETUSER", "default", "+info")
        asyncio.run(main())
    finally:
        server.command("ACL", "SETUSER", "default", "+info")


def test_failover_to_a_replica(server: RedisServer) -> None:
    """A replica that has not got the lease, but knows that there was an election before."""

    async def main() -> None:
        port = find_free_port()
        with RedisServer(port=port) as primary, RedisServer("repl-ping-replica-period 1") as replica:
            replica.command("REPLICAOF", "127.0.0.1", port)
            async with taking_part(primary, "one") as (one,):
                await wait_for(lambda: one.elected)
                await wait_for(lambda: replica.command("HGET", KEYS[0], "holder") == b"one")
                replica.command("REPLICAOF", "NO", "ONE")
                replica.command("HDEL", KEYS[0], "holder", "ends")
                promoted = read_clock()
                async with taking_part(replica, "two") as (two,):
                    await wait_for(lambda: two.elected)
                    assert two.news[-1].until - SHORT * (1 - MARGIN) > promoted + SHORT

    asyncio.run(main())


def test_nobody_cares_what_time_a_machine_has(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    days = count()
    monkeypatch.setattr(time, "time", lambda: next(days) * 86_400.0)

    async def main() -> None:
        async with taking_part(server, "one", "two") as machines:
            await wait_for(lambda: any(machine.elected for machine in machines))
            assert [machine.elected for machine in machines].count(True) == 1

    asyncio.run(main())


# Processes that are stopped and killed.


class Process:
    """A process that takes part. `news` are the lines that it has written: when, until when, deliveries."""

    def __init__(self, server: RedisServer, instance: str) -> None:
        command = [sys.executable, "-m", "tests.election_child", server.url, instance, str(SHORT)]
        self._process = start_process(command, env=child_environment(), cwd=REPOSITORY, stdout=subprocess.PIPE)
        self.news: list[tuple[float, float]] = []
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def wait_for_news(self, *, elected: bool) -> tuple[float, float]:
        """Return the first line that says so and that was not read before."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            line = self._lines.get(timeout=deadline - time.monotonic())
            if line == "started\n":
                continue
            learned, until = map(float, line.split()[:2])
            self.news.append((learned, until))
            if bool(until) == elected:
                return learned, until

    def wait_until_started(self) -> None:
        """Wait for its first line."""
        assert self._lines.get(timeout=TIMEOUT) == "started\n"

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self._process.pid, number)

    def end(self, number: signal.Signals) -> None:
        """End it, and read what it has written."""
        if self._process.poll() is None:
            self.send(number)
            self.send(signal.SIGCONT)
        self._process.wait(TIMEOUT)
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def running(server: RedisServer, instance: str) -> Iterator[Process]:
    process = Process(server, instance)
    try:
        yield process
    finally:
        process.end(signal.SIGKILL)


def test_process_that_is_killed(server: RedisServer) -> None:
    with running(server, "one") as one:
        one.wait_for_news(elected=True)
        with running(server, "two") as two:
            two.wait_until_started()
            one.end(signal.SIGKILL)
            learned, _ = two.wait_for_news(elected=True)
            while not one._lines.empty():
                one.wait_for_news(elected=True)
            assert learned > one.news[-1][1]


@pytest.mark.alone  # it must start before its lease ends
def test_process_that_is_killed_and_started_again_keeps_the_lease(server: RedisServer) -> None:
    with running(server, "one") as one:
        one.wait_for_news(elected=True)
        with running(server, "two") as two:
            two.wait_until_started()
            one.end(signal.SIGHUP)  # as at an upgrade: it is not given back
            with running(server, "one") as again:
                again.wait_for_news(elected=True)
                again.end(signal.SIGTERM)
            learned, _ = two.wait_for_news(elected=True)
            while not again._lines.empty():
                again.wait_for_news(elected=True)
            assert learned > again.news[-1][0]


def test_process_that_was_stopped_knows_that_it_may_have_lost(server: RedisServer) -> None:
    with running(server, "one") as one:
        one.wait_for_news(elected=True)
        with running(server, "two") as two:
            two.wait_until_started()
            one.send(signal.SIGSTOP)
            learned, _ = two.wait_for_news(elected=True)
            while not one._lines.empty():
                one.wait_for_news(elected=True)
            assert one.news[-1][1] < learned, "what it knew while it was stopped is no longer valid"
            one.send(signal.SIGCONT)
            stopped, _ = one.wait_for_news(elected=False)
            assert stopped > learned
            assert all(until < learned for _, until in one.news), "it believes nothing else when it continues"
