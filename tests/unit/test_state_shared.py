"""`SharedCounters` and a real ledger, over real socket pairs."""

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from tlstunnel.sockets.readiness import TunnelLoop
from tlstunnel.state.counters import LimitCheck, LimitResult
from tlstunnel.state.memory import MemoryCounters
from tlstunnel.state.server import LedgerServer
from tlstunnel.state.shared import SharedCounters

NINE = LimitCheck("nine", 9, 3600)
THREE_TUNNELS = LimitCheck("three", max_tunnels=3)


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in the loop of a serving process."""

    @functools.wraps(test)
    def run() -> None:
        with asyncio.Runner(loop_factory=TunnelLoop) as runner:
            runner.run(asyncio.wait_for(test(), 30))

    return run


@dataclass
class Running:
    """A ledger on this loop, and what it and its askers have reported."""

    server: LedgerServer
    counters: MemoryCounters
    reports: list[str] = field(default_factory=list)

    def connect(self, asker: SharedCounters | None = None) -> SharedCounters:
        ours, theirs = socket.socketpair()
        self.server.add(ours)
        asker = SharedCounters(report=self.reports.append) if asker is None else asker
        asker.attach(theirs)
        return asker


@contextlib.asynccontextmanager
async def ledger() -> AsyncIterator[Running]:
    reports: list[str] = []
    counters = MemoryCounters()
    server = LedgerServer(counters, report=reports.append)
    try:
        yield Running(server, counters, reports)
    finally:
        server.close()


@in_loop
async def test_askers_count_together() -> None:
    async with ledger() as running:
        askers = [running.connect() for _ in range(3)]
        results = await asyncio.gather(*(asker.check([NINE]) for _ in range(5) for asker in askers))
        assert [result.exceeded for (result,) in results].count("") == 9
        for asker in askers:
            asker.close()


@in_loop
async def test_leases_are_returned_one_by_one_and_with_their_holder() -> None:
    async with ledger() as running:
        first, second = running.connect(), running.connect()
        for asker in (first, second, first):
            assert await asker.check([THREE_TUNNELS]) == [LimitResult()]
        (refused,) = await second.check([THREE_TUNNELS])
        assert refused.exceeded == "tunnels"
        assert await second.count_tunnels(["three", "other"]) == [3, 0]
        first.return_tunnels(["three"])
        assert await first.count_tunnels(["three"]) == [2]
        first.close()
        while running.counters.open_tunnels("three") != 1:
            await asyncio.sleep(0)
        second.close()
