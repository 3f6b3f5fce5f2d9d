"""Tunnels end at their times and by request; what is planned for tunnels that end before is forgotten."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.journal.events import Reason
from tlstunnel.journal.journal import Journal
from tlstunnel.journal.record import Record
from tlstunnel.tunnel.lifetimes import (
    CLOSE_SECONDS,
    LOOK_AGAIN_SECONDS,
    MOST_REMEMBERED,
    REMEMBER_SECONDS,
    Ending,
    Endings,
    Expiries,
    Lifetimes,
)
from tlstunnel.tunnel.open_tunnel import OpenTunnel
from tlstunnel.tunnel.selection import Selection


class FakeTimer:
    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.at, self.call, self.cancelled = when, call, False

    def cancel(self) -> None:
        self.cancelled = True


class FakeLoop:
    """A loop whose time is set by the test. `now` is also the system's clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[FakeTimer] = []

    def call_later(self, seconds: float, call: Callable[[], None]) -> FakeTimer:
        assert 0 <= seconds <= LOOK_AGAIN_SECONDS
        self.timers.append(FakeTimer(self.now + seconds, call))
        return self.timers[-1]

    def call_soon(self, call: Callable[[], None]) -> FakeTimer:
        return self.call_later(0.0, call)

    @property
    def waiting(self) -> list[FakeTimer]:
        return [timer for timer in self.timers if not timer.cancelled]

    def move(self, to: float, *, jump: bool = False) -> None:
        """Let time pass, or set only the clock, with a `jump`."""
        while due := [timer for timer in self.waiting if timer.at <= to and not jump]:
            first = min(due, key=lambda timer: timer.at)
            self.timers.remove(first)
            self.now = max(self.now, first.at)
            first.call()
        self.now = to


class FakeSplice:
    def __init__(self, record: Record, ended: list[tuple[str, str]]) -> None:
        self.about = OpenTunnel(record, Journal(), None, None, lambda: None)
        self.closed = False
        self.draining_since = 0.0
        self._ended = ended

    def drain(self, reason: str, close_timeout: float) -> None:
        assert close_timeout == CLOSE_SECONDS
        self.draining_since = 1.0
        self._ended.append((self.about.record.id, reason))


class FakeSplices:
    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self.all: dict[FakeSplice, None] = {}


class Timeline:
    """Expiries with a clock that the test moves."""

    def __init__(self) -> None:
        self.loop = FakeLoop()
        self.ended: list[tuple[str, float]] = []
        splices = cast(Any, FakeSplices(self.loop))
        self.expiries = Expiries(
            splices, lambda name: self.ended.append((cast(str, name), self.loop.now)), lambda: self.loop.now
        )

    def add(self, name: str, until: float) -> Any:
        return self.expiries.add(cast(Any, name), until)


# --- expiries ---------------------------------------------------------------------------------------------------------


def test_each_ends_at_its_time() -> None:
    line = Timeline()
    for name, until in (("c", 1030.0), ("a", 1010.0), ("b", 1010.5), ("d", 5000.0)):
        line.add(name, until)
    line.loop.move(1009.9)
    assert line.ended == []
    line.loop.move(1031.0)
    assert line.ended == [("a", 1010.0), ("b", 1011.0), ("c", 1030.0)]
    line.loop.move(5001.0)
    assert line.ended[3:] == [("d", 5000.0)]
    assert line.loop.waiting == []


def test_a_time_that_is_over_ends_at_once() -> None:
    line = Timeline()
    line.add("a", 900.0)
    line.loop.move(1000.0)
    assert line.ended == [("a", 1000.0)]


def test_one_that_is_cancelled_leaves_nothing() -> None:
    line = Timeline()
    kept = line.add("kept", 2000.0)
    for number in range(100):
        line.add("gone", 1000.0 + number * 7).cancel()
    kept.cancel()
    kept.cancel()
    assert line.expiries._seconds == {}
    line.loop.move(5000.0)
    assert line.ended == []
    assert line.loop.waiting == []


def test_a_clock_that_is_set_is_noticed() -> None:
    """Or a machine that was suspended."""
    line = Timeline()
    line.add("a", 90_000.0)
    line.loop.move(90_000.0, jump=True)
    line.loop.move(90_000.0 + LOOK_AGAIN_SECONDS)
    assert [name for name, _ in line.ended] == ["a"]


def test_thousands_of_one_second_leave_others_a_turn() -> None:
    line = Timeline()
    for _ in range(10_000):
        line.add("a", 1010.0)
    turns: list[int] = []
    line.loop.timers.sort(key=lambda timer: timer.at)
    line.loop.now = 1010.0
    while waiting := line.loop.waiting:
        line.loop.timers.remove(waiting[0])
        waiting[0].call()
        turns.append(len(line.ended))
    assert turns[-1] == 10_000
    assert len(turns) > 2


def test_nothing_ends_after_a_close() -> None:
    line = Timeline()
    line.add("a", 1010.0)
    line.expiries.close()
    line.loop.move(2000.0)
    assert line.ended == []


@given(st.lists(st.tuples(st.floats(900, 2000), st.one_of(st.none(), st.floats(1000, 2000))), max_size=30))
def test_all_end_at_their_time_unless_they_end_before(planned: list[tuple[float, float | None]]) -> None:
    line = Timeline()
    added = [line.add(str(number), until) for number, (until, _) in enumerate(planned)]
    for at, number in sorted((end, number) for number, (_, end) in enumerate(planned) if end is not None):
        line.loop.move(at)
        added[number].cancel()
    line.loop.move(3000.0)
    for number, (until, end) in enumerate(planned):
        found = [at for name, at in line.ended if name == str(number)]
        if end is not None and end < until:
            assert found == []
        elif end is None or end > until + 1:
            assert len(found) == 1
            assert max(until, 1000.0) <= found[0] <= max(until + 1.0, 1000.0)
    assert line.expiries._seconds == {}


# --- endings ----------------------------------------------------------------------------------------------------------


def make_record(name: str = "1f", *tags: str, started: float = 100.0, site: str = "a.test") -> Record:
    return Record(id=name, peer="192.0.2.1", site=site, tags=tags, started=started)


def make_ending(at: float = 200.0, **filters: Any) -> Ending:
    return Ending(Selection(**filters), "ann", "why", at)


def test_an_ending_is_found_by_its_tag_and_its_filters() -> None:
    wanted = make_ending(tag="user=1", site="a.test")
    endings = Endings([make_ending(tag="user=2"), wanted, make_ending(tag="room")])
    assert endings.find(make_record("1f", "user=1"), 300.0) is wanted
    assert endings.find(make_record("1f", "user=1", site="b.test"), 300.0) is None
    assert endings.find(make_record("1f", "user=3"), 300.0) is None
    assert endings.find(make_record("1f"), 300.0) is None
    assert endings.find(make_record("1f", "other=1", "room=5"), 300.0) is not None
    endings.remove(wanted)
    assert endings.find(make_record("1f", "user=1"), 300.0) is None


def test_an_ending_without_a_tag_is_found() -> None:
    assert Endings([make_ending(id="1f")]).find(make_record("1f", "user=1"), 300.0) is not None


def test_who_came_later_is_not_meant() -> None:
    endings = Endings([make_ending(at=200.0, tag="user=1")])
    assert endings.find(make_record("1f", "user=1", started=200.0), 300.0) is not None
    assert endings.find(make_record("1f", "user=1", started=200.1), 300.0) is None


class Process:
    """Lifetimes of a process with some tunnels."""

    def __init__(self, *records: Record) -> None:
        splices = FakeSplices(asyncio.get_running_loop())
        self.ended: list[tuple[str, str]] = []
        self.splices = [FakeSplice(record, self.ended) for record in records]
        splices.all = dict.fromkeys(self.splices)
        self.lifetimes = Lifetimes(cast(Any, splices))

    def open(self, record: Record) -> bool:
        """Open one more tunnel; return whether it ends at once."""
        before = len(self.ended)
        self.lifetimes.catch(cast(Any, FakeSplice(record, self.ended)), record)
        return len(self.ended) > before


def test_those_that_match_end_once() -> None:
    async def run() -> None:
        records = [make_record(str(number), f"user={number % 2}") for number in range(4)]
        process = Process(*records)
        process.splices[0].closed = True
        assert await process.lifetimes.end([make_ending(tag="user=0")]) == 1
        assert process.ended == [("2", Reason.ENDED_BY_REQUEST)]
        assert (records[2].asked_by, records[2].why) == ("ann", "why")
        assert await process.lifetimes.end([make_ending(tag="user=0"), make_ending(id="3")]) == 1
        assert [name for name, _ in process.ended] == ["2", "3"]
        process.lifetimes.close()

    asyncio.run(run())


def test_a_tag_is_remembered_for_a_while() -> None:
    async def run() -> None:
        process = Process()
        now = time.monotonic()
        begun, later = make_record("1", "user=1", started=now - 5), make_record("2", "user=1", started=now + 5)
        assert not process.open(begun)
        await process.lifetimes.end([make_ending(now, tag="user=1"), make_ending(now, tag="user=2", older=1.0)])
        assert process.open(begun)
        assert not process.open(later)
        assert not process.open(make_record("3", "user=2", started=now - 5))
        process.lifetimes.remember_seconds = -1.0
        await process.lifetimes.end([make_ending(now, id="none")])
        assert not process.open(begun)
        process.lifetimes.close()

    asyncio.run(run())


def test_what_is_remembered_is_bounded() -> None:
    async def run() -> None:
        process = Process()
        now = time.monotonic()
        await process.lifetimes.end([make_ending(now, tag=f"user={n}") for n in range(MOST_REMEMBERED + 10)])
        assert len(process.lifetimes._in_order) == MOST_REMEMBERED
        assert len(process.lifetimes._remembered._by_tag) == MOST_REMEMBERED
        assert not process.open(make_record("1", "user=0", started=now - 1))
        assert process.open(make_record("1", f"user={MOST_REMEMBERED}", started=now - 1))
        await process.lifetimes.end([make_ending(now - REMEMBER_SECONDS - 1, tag="user=old")])
        assert not process.open(make_record("1", "user=old", started=now - 100))
        process.lifetimes.close()

    asyncio.run(run())
