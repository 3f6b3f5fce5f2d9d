"""While one ledger takes over from another, either may die or stop, at any message: counts stay right.

Never do two answer, what processes hold is counted exactly afterwards, and no question waits for ever. The ledgers are
real processes. What a serving process counts with runs here, so that a test can stop between two messages.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from tests.harness import Certificate, RawOrigin, eventually
from tests.promises import counted
from tests.promises.counted import (
    CLIENTS,
    TUNNELS,
    answering,
    asked_at_once,
    connected,
    hold,
    ledger_of,
    traffic,
    tunnel_to,
)
from tests.promises.versions import Versions, upgraded
from tests.redis_server import RedisServer, retry, wait_for
from tlstunnel.config import Config
from tlstunnel.config.invocation import Invocation
from tlstunnel.errors import ProcessError
from tlstunnel.processes import wiring as module
from tlstunnel.processes.children import Child, Identity, Role, Startup
from tlstunnel.processes.link import Link
from tlstunnel.processes.messages import Count, Done, HandOver, LedgerLost, Stop, TakeOver
from tlstunnel.processes.wiring import Wiring
from tlstunnel.sockets.readiness import TunnelLoop
from tlstunnel.state.counters import CountersUnavailable, LimitCheck
from tlstunnel.state.shared import LEDGER, SharedCounters
from tlstunnel.state.valkey.address import parse_url
from tlstunnel.state.valkey.counters import ValkeyCounters

ASKERS = 3
LIMIT = 50
LIMITED = [LimitCheck("limited", max_tunnels=LIMIT)]
OTHER = [LimitCheck("other", max_tunnels=1 << 20)]

MOMENTS: list[tuple[type[Any], str]] = [
    (HandOver, "before"),
    (TakeOver, "before"),
    (TakeOver, "after"),
    (Stop, "after"),
]
"""When something happens: before a message of a hand-over is sent, or after the reply."""


class Parent:
    """The parent, as far as it connects serving processes with a ledger. `moment` is when `act` is called, once."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.children: list[Child] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.moment: tuple[type[Any], str] | None = None
        self.act: Callable[[], None] = lambda: None
        self.wiring = Wiring(lambda: [child for child in self.children if not child.exited], self.run_in_background)
        self._stack = stack

    def run_in_background(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def start_ledger(self) -> Child:
        """Start a ledger process, which does not answer yet."""
        ledger = Child.start(Role.LEDGER, 1, 1, {})
        self._stack.push_async_callback(end, ledger)
        self.children.append(ledger)
        request = ledger.request

        async def watched(message: Any, seconds: float = 5.0, descriptors: Sequence[int] = ()) -> Any:
            self._reach(type(message), "before")
            try:
                return await request(message, seconds, descriptors)
            finally:
                self._reach(type(message), "after")

        cast("Any", ledger).request = watched  # to act between two messages
        await ledger.begin(Startup(Invocation(), None, Config(), "json"))
        ledger.ready = True
        return ledger

    def _reach(self, message: type[Any], when: str) -> None:
        if self.moment == (message, when):
            self.moment = None
            self.act()

    async def begin(self) -> Child:
        """Start ledgers until one answers, as the fleet does."""
        while True:
            ledger = await self.start_ledger()
            try:
                await self.wiring.begin(ledger)
            except ProcessError:
                await ledger.process.wait()
            else:
                return ledger

    def handle_lost(self, child: Child, lost: LedgerLost) -> None:
        self.run_in_background(self.wiring.reconnect(child, lost.connection))


class Asker:
    """What a serving process counts with, its link to the parent, and a process in its place."""

    def __init__(self, parent: Parent, stack: AsyncExitStack) -> None:
        self.reports: list[str] = []
        self.held = self.connection = 0
        self.counters = SharedCounters(timeout=0.05, report=self.reports.append)
        process = stack.enter_context(subprocess.Popen(["sleep", "600"]))
        stack.callback(process.kill)
        ours, theirs = socket.socketpair()
        self.link = Link(ours, {Count: self._count}, lambda: None)
        self.counters.on_lost = lambda: self.link.notify(LedgerLost(connection=self.connection))
        self.child = Child(process.pid, Identity(Role.SERVING, 1, 1), theirs, {LedgerLost: parent.handle_lost})
        self.child.ready = True
        parent.children.append(self.child)
        stack.callback(self.link.close)
        stack.callback(self.child.link.close)
        stack.callback(self.counters.close)

    async def _count(self, request: Count, descriptors: list[int]) -> Done:
        self.connection = request.connection
        self.counters.attach(socket.socket(fileno=descriptors[0]))
        return Done()

    async def load(self) -> None:
        """Take tunnels, return some, and never wait for long."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            (result,) = await self.counters.check(OTHER)
            assert loop.time() - began < 2.0
            assert not result.exceeded
            self.held += 1
            if self.held > 20:
                self.counters.return_tunnels(["other"] * 5)
                self.held -= 5
            await asyncio.sleep(0.001)


async def end(ledger: Child) -> None:
    ledger.kill()
    await ledger.process.wait()
    ledger.link.close()


@asynccontextmanager
async def started() -> AsyncIterator[tuple[Parent, list[Asker], Child]]:
    """Return a parent, askers that count, and the ledger that answers them."""
    async with AsyncExitStack() as stack:
        parent = Parent(stack)
        askers = [Asker(parent, stack) for _ in range(ASKERS)]
        ledger = await parent.begin()
        assert {asker.counters.answering for asker in askers} == {LEDGER}
        loads = [asyncio.ensure_future(asker.load()) for asker in askers]
        try:
            yield parent, askers, ledger
        finally:
            for load in loads:
                load.cancel()
            failures = await asyncio.gather(*loads, return_exceptions=True)
            assert {type(failure) for failure in failures} == {asyncio.CancelledError}, failures


async def assert_right(parent: Parent, askers: list[Asker]) -> None:
    """Check that all count together, exactly, and that only one ledger is left."""
    await wait_for(lambda: all(asker.counters.answering == LEDGER for asker in askers))
    await wait_for(lambda: [c.identity.role for c in parent.children if not c.exited].count(Role.LEDGER) == 1)

    async def is_exact() -> bool:
        (counted,) = await askers[0].counters.count_tunnels(["other"])
        return counted == sum(asker.held for asker in askers)

    while not await is_exact():  # each asker changes it every millisecond
        await asyncio.sleep(0)
    results = await asyncio.gather(*(asker.counters.check(LIMITED) for asker in askers for _ in range(LIMIT)))
    assert [result.exceeded for (result,) in results].count("") == LIMIT


@pytest.fixture
def hand_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HAND_OVER_SECONDS", 0.7)
    monkeypatch.setattr(module, "EXIT_SECONDS", 0.3)
    monkeypatch.setattr(module, "REPLY_SECONDS", 0.3)


def run(test: Any) -> None:
    with asyncio.Runner(loop_factory=TunnelLoop) as runner:
        runner.run(asyncio.wait_for(test, 50))


@pytest.mark.usefixtures("hand_over_seconds")
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.soak)])
@pytest.mark.parametrize("victim", ["old", "new"])
@pytest.mark.parametrize("moment", MOMENTS, ids=[f"{when} {message.__name__}" for message, when in MOMENTS])
def test_either_ledger_dies_or_stops(moment: tuple[type[Any], str], victim: str, number: signal.Signals) -> None:
    async def test() -> None:
        async with started() as (parent, askers, old):
            new = await parent.start_ledger()
            pid = (old if victim == "old" else new).pid
            reached = False

            def act() -> None:
                nonlocal reached
                reached = True
                os.kill(pid, number)

            parent.moment, parent.act = moment, act
            try:
                await parent.wiring.begin(new)
            except ProcessError:
                assert victim == "new"
                assert new.exited
                await parent.begin()
            if victim == "new" and moment in MOMENTS[2:]:  # nothing watches it here
                await wait_for(lambda: old.exited)
                new.kill()
                await new.process.wait()
                await parent.begin()
            await assert_right(parent, askers)
            assert reached

    run(test())


@pytest.mark.usefixtures("hand_over_seconds")
def test_a_new_ledger_has_answered_before_it_is_given_up() -> None:
    """Its reply came too late. What it has granted is not forgotten by the previous one, nor half a question taken."""

    async def test() -> None:
        async with started() as (parent, askers, old):
            new = await parent.start_ledger()
            late = new.link.request

            async def reply_late(message: Any, descriptors: Sequence[int] = ()) -> Any:
                reply = await late(message, descriptors)
                if isinstance(message, TakeOver):
                    await asyncio.sleep(10)
                return reply

            cast("Any", new.link).request = reply_late  # as if the parent had no time
            with pytest.raises(ProcessError, match="the previous ledger remains"):
                await parent.wiring.begin(new)
            assert parent.wiring.ledger is old
            await assert_right(parent, askers)

    run(test())


@pytest.mark.usefixtures("hand_over_seconds")
def test_several_in_a_row_lose_nothing() -> None:
    async def test() -> None:
        async with started() as (parent, askers, _):
            for _ in range(3):
                await parent.begin()
            await assert_right(parent, askers)
            assert not any(asker.reports for asker in askers)

    run(test())


def test_a_ledger_that_has_paused_ends_with_its_parent() -> None:
    """Another one may have taken over: then two would answer."""

    async def test() -> None:
        async with started() as (parent, _, ledger):
            sending, receiving = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with sending, receiving:
                await ledger.request(HandOver(), 5.0, [sending.fileno()])
            ledger.link.close()
            assert await asyncio.wait_for(ledger.process.wait(), 5) == 0
            assert parent.wiring.ledger is None

    run(test())


def test_a_lost_connection_is_replaced_once() -> None:
    """Whatever a process says, and however often."""

    async def test() -> None:
        async with started() as (parent, askers, ledger):
            asker = askers[0]
            before = asker.connection
            for number in [before] * 1000 + [1] * 1000:
                parent.handle_lost(asker.child, LedgerLost(connection=number))
            await wait_for(lambda: asker.connection != before)
            await wait_for(lambda: not parent.tasks)
            load = await parent.wiring.request_load()
            assert load is not None
            assert load.connections <= ASKERS + 1
            replaced = asker.connection
            parent.handle_lost(asker.child, LedgerLost(connection=before))
            await wait_for(lambda: not parent.tasks)
            assert asker.connection == replaced
            assert ledger.exited is False

    run(test())


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_million_keys_need_bounded_memory() -> None:
    """Each of another client. The second million needs no more, and the ledger is idle afterwards."""

    async def test() -> None:
        async with started() as (_, askers, ledger):
            sizes = []
            for million in range(2):
                for start in range(0, 1_000_000, 3_000):
                    checks = [[LimitCheck(f"{million}{start + n:031}", 10, 86_400)] for n in range(3_000)]
                    await asyncio.gather(
                        *(askers[n % ASKERS].counters.check(check) for n, check in enumerate(checks)),
                    )
                sizes.append(measure_rss(ledger.pid))
            before = cpu_seconds(ledger.pid)
            await asyncio.sleep(1)
            print(f"{sizes[0] >> 20} MiB after a million keys, {sizes[1] >> 20} MiB after two")
            assert sizes[1] < 200 << 20
            assert sizes[1] < sizes[0] * 1.1
            assert cpu_seconds(ledger.pid) - before < 0.7  # the load of three askers goes on

    with asyncio.Runner(loop_factory=TunnelLoop) as runner:
        runner.run(test())


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_million_keys_in_a_server_expire() -> None:
    """Its memory is bounded by the requests of a window, whatever clients send."""

    async def test(server: RedisServer) -> None:
        counters = ValkeyCounters(
            parse_url(server.url), prefix="test", instance="one", timeout=30.0, report=lambda *_: None
        )
        counters.start()
        await retry(lambda: counters.count_tunnels(["k"]), CountersUnavailable)
        before, own, largest = used_memory(server), measure_rss(os.getpid()), 0
        for start in range(0, 1_000_000, 1_000):
            checks = [[LimitCheck(f"{start + n:032}", 10, 5)] for n in range(1_000)]
            await asyncio.gather(*map(counters.check, checks))
            if start % 50_000 == 0:
                largest = max(largest, used_memory(server))
        await wait_for(lambda: server.command("DBSIZE") in range(10))
        print(f"{(largest - before) >> 20} MiB in the server at most, {measure_rss(os.getpid()) - own >> 20} MiB here")
        assert used_memory(server) - before < 20 << 20
        assert measure_rss(os.getpid()) - own < 50 << 20
        await counters.close()

    with RedisServer() as server:
        asyncio.run(test(server))


def measure_rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def used_memory(server: RedisServer) -> int:
    reply = server.command("INFO", "memory")
    assert isinstance(reply, bytes)
    return int(reply.partition(b"used_memory:")[2].split()[0])


# --- the whole tunnel -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def origin() -> Iterator[RawOrigin]:
    with RawOrigin(hold) as origin:
        yield origin


@pytest.mark.soak
def test_upgrades_while_the_ledger_is_stopped(origin: RawOrigin, certificate: Certificate, tmp_path: Path) -> None:
    """Twice in a row. The status does not wait for it, and open tunnels are counted afterwards."""
    versions = Versions(tmp_path / "versions")
    environment = {**versions.environment, "TLSTUNNEL_WATCH": "0.1,2,90,90"}
    with (
        tunnel_to(origin.address, certificate, site=TUNNELS, processes=2, environment=environment) as tunnel,
        connected(tunnel, counted.LIMIT - 3) as clients,
    ):
        assert set(asked_at_once(clients, "/tunnels")) == {101}
        tunnel.reload(tunnel.file.read_text().replace('"2s"', '"100ms"'))
        stopped = ledger_of(tunnel)["process"]
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        assert ledger_of(tunnel)["state"] == "not responding"
        assert time.monotonic() - began < 3.0
        with traffic(tunnel) as statuses:
            for number in (2, 3):
                versions.install(f"{number}.0.0")
                upgraded(tunnel)
        assert set(statuses) == {101}
        assert (ledger_of(tunnel)["version"], ledger_of(tunnel)["generation"]) == ("3.0.0", 3)
        eventually(lambda: set(answering(tunnel)) == {"ledger"})
        with connected(tunnel, CLIENTS) as more:
            assert Counter(asked_at_once(more, "/tunnels")) == {101: 3, 429: CLIENTS - 3}
        (lost,) = tunnel.records("ledger")
        assert lost["process"] == stopped
        assert lost["reason"].startswith("its counts are lost: process ")
        assert [record["counts"] for record in tunnel.records("ledger replaced")] == [False, True]


def test_reloads_that_add_and_remove_shared_counts_under_load(origin: RawOrigin, certificate: Certificate) -> None:
    """No handshake fails, and open tunnels stay counted by whatever counts."""
    with tunnel_to(origin.address, certificate, site=TUNNELS, processes=2) as tunnel:
        text = tunnel.file.read_text()
        away = text.replace("[state]", '[state]\nurl = "valkey://127.0.0.1:1/0"')
        with connected(tunnel, counted.LIMIT - 3) as clients:
            assert set(asked_at_once(clients, "/tunnels")) == {101}
            with traffic(tunnel) as statuses:
                for changed in (away, text, text.replace("processes = 2", "processes = 1"), text):
                    tunnel.reload(changed)
            assert set(statuses) == {101}
            eventually(lambda: set(answering(tunnel)) == {"ledger"})
            eventually(lambda: ledger_of(tunnel)["leases"] == counted.LIMIT - 3)
            with connected(tunnel, CLIENTS) as more:
                assert Counter(asked_at_once(more, "/tunnels")) == {101: 3, 429: CLIENTS - 3}


def test_without_the_parent_the_ledger_is_the_last_to_exit(origin: RawOrigin, certificate: Certificate) -> None:
    """The serving processes drain, and their tunnels stay until their clients end them."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(AssertionError, match="it exited with -9"))
        tunnel = stack.enter_context(tunnel_to(origin.address, certificate, site=TUNNELS, processes=2))
        pids = [one["process"] for one in tunnel.status()["processes"]]
        ledger = ledger_of(tunnel)["process"]
        tunnel.reload(tunnel.file.read_text().replace('drain_over = "0s"', 'drain_over = "1s"'))
        with connected(tunnel, 10) as clients:
            assert set(asked_at_once(clients, "/tunnels")) == {101}
            tunnel.send_signal(signal.SIGKILL)
            tunnel.wait_records(2, "parent exited")
            assert is_running(ledger)
            eventually(lambda: not is_running(ledger))
            assert len(tunnel.records("connection")) == 10, "it has left others that had tunnels"
        eventually(lambda: not any(map(is_running, pids)))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
