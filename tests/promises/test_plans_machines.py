"""What several machines tell each other is right again within a sample, whatever is killed; storms are known to all.

The ledgers are real processes, started by the parent's own code, and so is the server. The test sends the samples, one
in each minute of the history, so that each of them can be seen there.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from tests.harness import TIMEOUT
from tests.redis_server import RedisServer
from tlstunnel.config.invocation import Invocation
from tlstunnel.errors import StateError
from tlstunnel.plans.elsewhere import Sighting, Sightings
from tlstunnel.processes.children import Child, Role, Startup
from tlstunnel.processes.fleet import Fleet, Options
from tlstunnel.processes.messages import Sampled, SeenElsewhere, SeenHere
from tlstunnel.processes.slots import Slots
from tlstunnel.state.history.reader import HistoryReader
from tlstunnel.state.history.samples import MINUTE, Counts
from tlstunnel.state.history.store import MINUTES

SITE = "localhost"
START = 29_000_000 * MINUTE
PAUSE = 0.05
"""Real seconds between samples."""


class Parent(Fleet):
    """The parent's part that keeps a ledger running, and nothing else."""

    def __init__(self, startup: Startup, folder: Path) -> None:
        super().__init__(startup, Slots(), Options(processes=1), 1)
        self.folder = folder
        self.elsewhere: list[Sightings] = []
        self.tunnels = self.handshakes = 0
        self._notifications = {
            SeenElsewhere: self._note,
            **{kind: take for kind, take in self._notifications.items() if kind is not SeenElsewhere},
        }
        self._ledger: Child | None = None

    def count(self, role: Role = Role.SERVING) -> int:
        return int(role is Role.LEDGER)

    def _note(self, _: Child, seen: SeenElsewhere) -> None:
        self.elsewhere.append(seen.sites)

    def sample(self, number: int) -> None:
        """Send a sample, in a minute of its own, if there is a ledger."""
        ledger = self.wiring.ledger
        if ledger is not None:
            values = [self.tunnels, self.handshakes, *[0] * (len(Counts._fields) - 1)]
            whole = ledger is not self._ledger
            self._ledger = ledger
            ledger.link.notify(Sampled(START + number * MINUTE, 10.0 + number, {SITE: values}, whole))

    def read(self, number: int) -> tuple[int, int]:
        """Return the tunnels of the last sample that is stored, and all handshakes."""
        end = START + number * MINUTE
        with contextlib.suppress(StateError), HistoryReader(self.folder) as reader:
            totals = reader.read_totals(MINUTES, START, end).get(SITE)
            found = reader.read_usage(SITE, MINUTES, max(START, end - 30 * MINUTE), end)
            levels = [one.level.peak for one in found if one.level is not None]
            if totals is not None and levels:
                return levels[-1], totals.counts.handshakes
        return 0, 0

    @property
    def pid(self) -> int:
        assert self.wiring.ledger is not None
        return self.wiring.ledger.pid


class Machines:
    """Machines with ledgers that share a server."""

    def __init__(self, server: RedisServer, folder: Path) -> None:
        self._server = server
        self._folder = folder
        self.number = 0
        self.parents: list[Parent] = []
        self._ended: list[Parent] = []

    async def stop(self) -> None:
        for parent in (*self.parents, *self._ended):
            await parent.stop()

    async def start(self, name: str) -> Parent:
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        file = folder / "tlstunnel.toml"
        text = f'[state]\ndir = "{folder}"\nurl = "{self._server.url}"\n[[sites]]\nnames = ["{SITE}"]\n'
        text += 'origins = ["localhost:1"]\nguideline = 10\n'
        file.write_text(text)
        invocation = Invocation(file, folder=folder)
        instance = f"{name}{time.monotonic_ns()}"
        parent = Parent(Startup(invocation, text, invocation.configuration(text), "json", instance), folder)
        self.parents.append(parent)
        await asyncio.gather(*parent.start())
        parent.mark_started()
        return parent

    def end(self, parent: Parent) -> None:
        """Send no more samples to this machine, and have its parent start nothing any more."""
        self.parents.remove(parent)
        self._ended.append(parent)
        parent.ending = "killed"

    async def until(self, expected: tuple[int, int], *parents: Parent) -> float:
        """Send samples until the histories of these machines, or of all, have these figures. Return the seconds."""
        return await self.sample_until(
            lambda: all(parent.read(self.number) == expected for parent in parents or self.parents)
        )

    async def sample_until(self, condition: Callable[[], object]) -> float:
        """Send samples until the condition is true. Return the seconds."""
        began = time.monotonic()
        async with asyncio.timeout(TIMEOUT):
            while True:
                self.number += 1
                for parent in self.parents:
                    parent.sample(self.number)
                await asyncio.sleep(PAUSE)
                if condition():
                    return time.monotonic() - began


@contextlib.asynccontextmanager
async def machines(folder: Path) -> AsyncIterator[tuple[RedisServer, Machines]]:
    with RedisServer() as server:
        made = Machines(server, folder)
        try:
            yield server, made
        finally:
            await made.stop()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 4 * TIMEOUT))


def test_counts_are_right_within_a_sample_whatever_is_killed(tmp_path: Path) -> None:
    async def main() -> None:
        async with machines(tmp_path) as (server, every):
            one, two = await every.start("one"), await every.start("two")
            one.tunnels = one.handshakes = 3
            two.tunnels = two.handshakes = 4
            await every.until((7, 7))
            # The server: what was known counts on, and what has changed is known when it is back.
            server.kill()
            two.tunnels, two.handshakes = 9, 9
            await every.until((12, 12), two)
            server.start()
            assert await every.until((12, 12)) < 10.0, "a sample, on a machine that is not busy"
            # A ledger: the next one goes on, and nothing is counted twice.
            for victim, other in ((one, two), (two, one)):
                os.kill(victim.pid, signal.SIGKILL)
                victim.tunnels, victim.handshakes = victim.tunnels + 1, victim.handshakes + 1
                total = sum(parent.tunnels for parent in every.parents)
                await every.until((total, total))
                assert other.elsewhere == []
            # Both at once, and the server.
            server.kill()
            for parent in every.parents:
                os.kill(parent.pid, signal.SIGKILL)
                parent.tunnels -= 2
            server.start()
            await every.until((10, 14))

    run(main())


def test_counts_are_right_within_a_sample_when_a_parent_or_all_of_a_machine_is_killed(tmp_path: Path) -> None:
    """The tunnels of a killed parent are ended, and those of a killed machine are gone: they count no longer."""

    async def main() -> None:
        async with machines(tmp_path) as (_, every):
            one, two = await every.start("one"), await every.start("two")
            one.tunnels = one.handshakes = 5
            two.tunnels = two.handshakes = 1
            await every.until((6, 6))
            # Its parent: the ledger says so, since nobody will tell it how many tunnels there are.
            every.end(one)
            assert one.wiring.ledger is not None
            one.wiring.ledger.link.close()
            assert await every.until((1, 6), two) < 10.0, "a sample, on a machine that is not busy"
            # All of it at once: the next tunnel with this folder says so.
            one = await every.start("one")
            one.tunnels = one.handshakes = 2
            await every.until((3, 8), two)
            every.end(one)
            os.kill(one.pid, signal.SIGKILL)
            one = await every.start("one")
            one.tunnels = one.handshakes = 4
            assert await every.until((5, 12)) < 10.0, "a sample, on a machine that is not busy"

    run(main())


def test_what_one_machine_has_seen_reaches_the_other(tmp_path: Path) -> None:
    """Also that it is gone, with its tunnels."""

    async def main() -> None:
        async with machines(tmp_path) as (_, every):
            one, two = await every.start("one"), await every.start("two")
            one.tunnels = one.handshakes = 5
            await every.until((5, 5))
            assert one.wiring.ledger is not None
            sightings = {SITE: Sighting(lost=7, failing=True, addresses=30, known=20, heavy=400)}
            one.overseer.take_here(one.wiring.ledger, SeenHere(sites=sightings))
            await every.sample_until(lambda: two.elsewhere == [sightings])
            assert one.elsewhere == []
            every.parents.remove(one)
            await one.stop()
            await every.until((0, 5))
            await every.sample_until(lambda: two.elsewhere == [sightings, {SITE: Sighting(lost=5)}])

    run(main())
