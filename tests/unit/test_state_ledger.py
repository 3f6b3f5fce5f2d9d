"""The ledger beside a simple model, and with counters that answer late."""

import asyncio
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tlstunnel.state import wire
from tlstunnel.state.counters import CountersUnavailable, LimitCheck, LimitResult
from tlstunnel.state.ledger import MAX_CHECKS, MAX_PENDING, MAX_PENDING_ITEMS, Holder, Ledger
from tlstunnel.state.memory import MemoryCounters

KEYS = st.sampled_from(["a", "b", "c"])
LEASES = st.dictionaries(KEYS, st.integers(0, 3))
WHICH = st.integers(0, 3)
WINDOW = 60
PATIENCE = 0.5


class Clock:
    """A clock that the test advances, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def never_later(coroutine: Coroutine[Any, Any, None]) -> None:
    coroutine.close()
    raise AssertionError("counts in memory never wait")


class LedgerMachine(RuleBasedStateMachine):
    """Four askers do anything in any order, and the ledger moves to another process or crashes now and then."""

    @initialize()
    def begin(self) -> None:
        self.clock = Clock()
        self.counters = MemoryCounters(clock=self.clock)
        self.ledger = Ledger(self.counters, never_later, self.clock)
        self.inboxes: list[list[wire.LedgerMessage]] = [[] for _ in range(4)]
        self.holders: list[Holder] = [self.ledger.open(inbox.extend) for inbox in self.inboxes]
        self.number = 0
        self.paused = (0.0, 0.0)
        # The model.
        self.held: list[Counter[str]] = [Counter() for _ in range(4)]
        self.windows: dict[tuple[str, int], tuple[float, int]] = {}

    def open_tunnels(self, key: str) -> int:
        return sum(held[key] for held in self.held)

    def send(self, which: int, message: wire.AskerMessage, deadline: float = 0.0) -> list[wire.LedgerMessage]:
        self.ledger.receive(self.holders[which], wire.Batch(deadline, [message]))
        replies = self.inboxes[which].copy()
        self.inboxes[which].clear()
        return replies

    @rule(which=WHICH, key=KEYS, amount=st.sampled_from([0, 1, 3]), tunnels=st.integers(0, 4), late=st.floats(-1, 1))
    def ask(self, which: int, key: str, amount: int, tunnels: int, late: float) -> None:
        self.number += 1
        deadline = self.clock.now - late
        replies = self.send(which, wire.Ask(self.number, [LimitCheck(key, amount, WINDOW, "fixed", tunnels)]), deadline)
        paused_at, patience = self.paused
        if self.clock.now > deadline and not (deadline >= paused_at and self.clock.now <= patience):
            assert replies == []
            return
        began, count = self.windows.get((key, amount), (-1e9, 0))
        if self.clock.now - began >= WINDOW:
            began, count = self.clock.now, 0
        (answer,) = replies
        assert isinstance(answer, wire.Answer)
        assert answer.number == self.number
        exceeded = answer.results[0].exceeded if answer.results else ""
        if amount and count >= amount:
            assert exceeded == "limit"
        elif tunnels and self.open_tunnels(key) >= tunnels:
            assert exceeded == "tunnels"
        else:
            assert exceeded == ""
            if amount:
                self.windows[key, amount] = began, count + 1
            if tunnels:
                self.held[which][key] += 1

    @rule(which=WHICH, keys=st.lists(KEYS, max_size=4))
    def return_some(self, which: int, keys: list[str]) -> None:
        assert self.send(which, wire.Return(keys)) == []
        for key in keys:
            self.held[which][key] = max(self.held[which][key] - 1, 0)

    @rule(which=WHICH, leases=LEASES)
    def take(self, which: int, leases: dict[str, int]) -> None:
        assert self.send(which, wire.Take(leases)) == []
        self.held[which].update(leases)

    @rule(which=WHICH, leases=LEASES)
    def declare(self, which: int, leases: dict[str, int]) -> None:
        assert self.send(which, wire.Declare(leases)) == []
        self.held[which] = Counter(leases)

    @rule(which=WHICH, keys=st.lists(KEYS))
    def count(self, which: int, keys: list[str]) -> None:
        self.number += 1
        counted = wire.Counted(self.number, [self.open_tunnels(key) for key in keys])
        assert self.send(which, wire.Count(self.number, keys), self.clock.now) == [counted]

    @rule(which=WHICH)
    def announce_and_probe(self, which: int) -> None:
        batch = wire.Batch(0.0, [wire.Announce("origin", "down"), wire.Probe()])
        self.ledger.receive(self.holders[which], batch)
        for other, inbox in enumerate(self.inboxes):
            assert inbox == [wire.Alive() if other == which else wire.Announced("origin", "down")]
            inbox.clear()

    @rule(which=WHICH)
    def die_and_reconnect(self, which: int) -> None:
        self.ledger.close(self.holders[which])
        self.held[which].clear()
        self.holders[which] = self.ledger.open(self.inboxes[which].extend)

    @rule(seconds=st.sampled_from([0.1, 0.4, 1.0, 59.0, 60.0]))
    def advance(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(seconds=st.sampled_from([0.0, 0.3, 1.0]))
    def hand_over(self, seconds: float) -> None:
        """Move to another process, which takes some time."""
        self.paused = self.clock.now, self.clock.now + PATIENCE
        self.ledger.pause(self.paused[1])
        assert [inbox.pop() for inbox in self.inboxes] == [wire.Pausing(self.paused[1])] * 4
        snapshot, leases = self.counters.snapshot(), [holder.leases for holder in self.holders]
        self.clock.now += seconds
        self.restart()
        self.counters.restore(snapshot)
        self.holders = [self.ledger.open(inbox.extend, held) for inbox, held in zip(self.inboxes, leases, strict=True)]
        self.ledger.resume(*self.paused)
        assert [inbox.pop() for inbox in self.inboxes] == [wire.Resumed()] * 4

    @rule()
    def resume_after_a_failed_hand_over(self) -> None:
        self.paused = self.clock.now, self.clock.now + PATIENCE
        self.ledger.pause(self.paused[1])
        self.ledger.resume(*self.paused)
        for inbox in self.inboxes:
            inbox.clear()

    @rule()
    def crash(self) -> None:
        """Start anew. Each asker declares what it holds; windows begin empty."""
        self.restart()
        self.paused = 0.0, 0.0
        self.windows.clear()
        self.holders = [self.ledger.open(inbox.extend) for inbox in self.inboxes]
        for which, held in enumerate(self.held):
            self.send(which, wire.Declare(dict(held)))

    def restart(self) -> None:
        self.counters = MemoryCounters(clock=self.clock)
        self.ledger = Ledger(self.counters, never_later, self.clock)

    @invariant()
    def tunnels_are_exact(self) -> None:
        if not hasattr(self, "ledger"):
            return
        assert self.counters.tunnels == +sum(self.held, Counter())
        assert [holder.leases for holder in self.holders] == [+held for held in self.held]
        assert all(not inbox for inbox in self.inboxes)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(stateful_step_count=60)


# Counters that answer late, as those of a server elsewhere.


class SlowCounters:
    """Counts in memory, after `release`."""

    def __init__(self) -> None:
        self.memory = MemoryCounters()
        self.release = asyncio.Event()
        self.failure = ""

    async def check(self, checks: Sequence[LimitCheck]) -> list[LimitResult]:
        await self.release.wait()
        if self.failure:
            raise CountersUnavailable(self.failure)
        return self.memory.check_now(checks)

    async def count_tunnels(self, keys: Sequence[str]) -> list[int]:
        await self.release.wait()
        return await self.memory.count_tunnels(keys)

    def return_tunnels(self, keys: Sequence[str]) -> None:
        self.memory.return_tunnels(keys)

    def take_tunnels(self, keys: Sequence[str]) -> None:
        self.memory.take_tunnels(keys)

    def change_tunnels(self, changes: Mapping[str, int]) -> None:
        self.memory.change_tunnels(changes)


class SlowLedger:
    """A ledger with slow counters and one asker."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.counters = SlowCounters()
        self.tasks: list[asyncio.Task[None]] = []
        self.ledger = Ledger(self.counters, self.start, self.clock)
        self.replies: list[wire.LedgerMessage] = []
        self.holder = self.ledger.open(self.replies.extend)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.ensure_future(coroutine))

    def ask(self, *messages: wire.AskerMessage) -> None:
        self.ledger.receive(self.holder, wire.Batch(self.clock.now + 0.05, list(messages)))

    async def answer(self) -> list[wire.LedgerMessage]:
        self.counters.release.set()
        await asyncio.gather(*self.tasks)
        return self.replies


ONE = [LimitCheck("a", max_tunnels=1)]


def test_answers_that_take_time() -> None:
    async def run() -> None:
        slow = SlowLedger()
        slow.ask(wire.Ask(1, ONE), wire.Ask(2, ONE), wire.Count(3, ["a"]))
        assert slow.replies == []
        assert await slow.answer() == [
            wire.Answer(1),
            wire.Answer(2, [LimitResult("tunnels", 10.0)]),
            wire.Counted(3, [1]),
        ]
        assert slow.holder.leases == {"a": 1}
        assert (slow.ledger.tally.answered, slow.ledger.tally.expired) == (3, 0)

    asyncio.run(run())


@pytest.mark.parametrize("what", ["late", "declared", "died"])
def test_tunnels_of_an_answer_that_comes_too_late_are_given_back(what: str) -> None:
    async def run() -> None:
        slow = SlowLedger()
        slow.ask(wire.Ask(1, ONE))
        await asyncio.sleep(0)
        if what == "late":
            slow.clock.now += 1
        elif what == "declared":
            slow.ask(wire.Declare({"b": 1}))
        else:
            slow.ledger.close(slow.holder)
        assert await slow.answer() == []
        assert slow.counters.memory.tunnels == ({"b": 1} if what == "declared" else {})
        assert "a" not in slow.holder.leases
        assert slow.ledger.tally.expired == 1

    asyncio.run(run())


def test_counts_that_cannot_be_reached_fail_their_questions() -> None:
    async def run() -> None:
        slow = SlowLedger()
        slow.counters.failure = "the server is away"
        slow.ask(wire.Ask(1, ONE))
        assert await slow.answer() == [wire.Failed(1, "the server is away")]
        assert slow.ledger.tally.failed == 1
        assert slow.holder.waiting == 0

    asyncio.run(run())


def test_questions_that_wait_are_bounded() -> None:
    async def run() -> None:
        slow = SlowLedger()
        slow.ask(*(wire.Ask(number, ONE) for number in range(MAX_PENDING + 10)))
        assert len(slow.tasks) == slow.holder.waiting == MAX_PENDING
        assert slow.replies == [wire.Failed(MAX_PENDING + n, "too many questions wait") for n in range(10)]
        assert len(await slow.answer()) == MAX_PENDING + 10
        for number in range(MAX_PENDING_ITEMS // MAX_CHECKS + 1):
            slow.ask(wire.Ask(number, ONE * MAX_CHECKS))
        assert slow.ledger.tally.failed == 11
        await slow.answer()
        assert slow.holder.waiting == slow.holder.waiting_items == 0

    asyncio.run(run())


def test_leases_of_a_holder_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlstunnel.state.ledger.MAX_KEYS_HELD", 9)
    ledger = Ledger(MemoryCounters(), never_later)
    holder = ledger.open(list[wire.LedgerMessage]().extend)
    many = {str(number): 1 for number in range(9)}
    ledger.receive(holder, wire.Batch(0.0, [wire.Declare(many)]))
    with pytest.raises(wire.WireError, match="tunnels under more than 9 keys"):
        ledger.receive(holder, wire.Batch(0.0, [wire.Take({"another": 1})]))
