"""Turns are fair, bounded, and passed on whatever becomes of those who wait."""

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from tlstunnel.admin.checks import Unacceptable
from tlstunnel.admin.turns import MOST_AT_ONCE, MOST_WAITING, Recent, Turns


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Reader:
    """Takes a turn, and keeps it until `go_on`."""

    def __init__(self, turns: Turns, who: str = "anybody", *, gone: bool = False) -> None:
        self.has_turn = False
        self.go_on = asyncio.Event()
        self.gone = gone
        self.task = asyncio.ensure_future(self._read(turns, who))

    async def _read(self, turns: Turns, who: str) -> None:
        async with turns.take(who, lambda: self.gone):
            self.has_turn = True
            await self.go_on.wait()
        self.has_turn = False


def count(readers: list[Reader]) -> int:
    return sum(reader.has_turn for reader in readers)


def test_two_at_once_and_others_in_order() -> None:
    async def run() -> None:
        turns = Turns()
        readers = [Reader(turns) for _ in range(4)]
        await settle()
        assert [reader.has_turn for reader in readers] == [True, True, False, False]
        readers[1].go_on.set()
        await asyncio.sleep(0.05)
        assert [reader.has_turn for reader in readers] == [True, False, True, False]
        for reader in readers:
            reader.go_on.set()
        await asyncio.gather(*(reader.task for reader in readers))
        await asyncio.sleep(0.2)
        assert len(turns) == 0

    asyncio.run(run())


def test_who_asks_much_stops_nobody_else() -> None:
    async def run() -> None:
        turns = Turns()
        many = [Reader(turns) for _ in range(MOST_AT_ONCE + MOST_WAITING + 5)]
        await settle()
        assert count(many) == MOST_AT_ONCE
        refused = [reader.task.exception() for reader in many if reader.task.done()]
        assert [one.status for one in refused if isinstance(one, Unacceptable)] == [503] * 5
        alice = Reader(turns, "token alice")
        await settle()
        assert alice.has_turn
        for reader in many:
            reader.task.cancel()

    asyncio.run(run())


def test_a_pause_as_long_as_the_command_took(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        now = iter([0.0, 0.25])
        asked = []
        monkeypatch.setattr(loop, "time", lambda: next(now))
        monkeypatch.setattr(loop, "call_later", lambda seconds, *_: asked.append(seconds))
        async with Turns().take("anybody", lambda: False):
            pass
        monkeypatch.undo()
        assert asked == [0.25]

    asyncio.run(run())


def test_a_turn_of_who_has_gone_is_passed_on() -> None:
    async def run() -> None:
        turns = Turns()
        readers = [Reader(turns) for _ in range(5)]
        await settle()
        readers[2].task.cancel()
        readers[3].gone = True
        for reader in readers[:2]:
            reader.go_on.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                while not readers[4].has_turn:
                    await asyncio.sleep(0.01)
        assert readers[4].has_turn
        assert isinstance(readers[3].task.exception(), Unacceptable)
        # One that is cancelled just when it gets its turn.
        late = [Reader(turns), Reader(turns)]
        await settle()
        readers[4].go_on.set()
        await settle()
        for reader in late:
            reader.task.cancel()
        await asyncio.sleep(0.2)
        assert len(turns) == 0

    asyncio.run(run())


def test_what_is_recent_is_made_once() -> None:
    made = iter(range(10))

    async def run() -> None:
        async def make() -> int:
            await asyncio.sleep(0.05)
            return next(made)

        recent = Recent(make, 0.0)
        assert await asyncio.gather(*(recent.get() for _ in range(5))) == [0] * 5
        assert await recent.get() == 0  # for as long as it took
        await asyncio.sleep(0.1)
        assert await recent.get() == 1
        await recent.close()

    asyncio.run(run())


def test_a_failure_is_shared_and_then_tried_again() -> None:
    answers: Iterator[Exception | int] = iter([ValueError(), 5])

    async def run() -> None:
        async def make() -> int:
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

        recent = Recent(make, 0.02)
        results = await asyncio.gather(recent.get(), recent.get(), return_exceptions=True)
        assert [type(result) for result in results] == [ValueError, ValueError]
        await asyncio.sleep(0.05)
        assert await recent.get() == 5

    asyncio.run(run())
