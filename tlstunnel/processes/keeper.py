"""The history in the ledger's process: opens it, samples it every second, and closes it for the next ledger.

Samples are added in a thread: with ten thousand sites that takes longer, once a minute, than a question may. While the
history cannot be opened, the ledger counts on without it, and it is tried again.

Tested by tests/unit/test_processes_keeper.py and tests/promises/test_history.py.
"""

import asyncio
import contextlib
import functools
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, Self

from tlstunnel.backoff import Backoff
from tlstunnel.config import Config
from tlstunnel.errors import StateError
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.processes.messages import HistoryLoad, Sampled
from tlstunnel.state.folder import find_state_folder, replace_instance
from tlstunnel.state.history.samples import MAX_ABSENT_SITES, MINUTE, Counts, Instance, Sampler, Totals
from tlstunnel.state.history.store import DAYS, HOURS, MINUTES, Keep
from tlstunnel.state.history.writer import History

LOCK_SECONDS = 10.0
"""How long to wait for the ledger before, which writes its last minute."""

CLOSE_SECONDS = 3.0
"""How long to wait for the disk at the end: less than the parent waits for the ledger's exit."""

RETRIES = Backoff(first=1.0, longest=60.0)
"""The delays after which it is tried again to open a history that could not be opened."""

MOST_WAITING = 60
"""Samples that wait while the history is being opened. Of older ones only the totals are used."""

LISTED_WITHIN = 50
"""Samples in which each site is listed at least once."""

Sites = Mapping[str, Totals]


class Exchange(Protocol):
    """Tells other machines what the sites of this one use, and knows what they have told."""

    def start(self) -> None:
        """Connect to them."""

    def publish(self, age: float, sites: Sites) -> None:
        """Tell the totals. Sites that are left out have no tunnels. Called in the thread of the samples."""

    def tell(self, text: bytes) -> None:
        """Tell them this once. What they tell in this way comes by a callback."""

    def list_others(self) -> Sequence[tuple[str, bytes]]:
        """Return what the others have told last, by instance. Those that are away are left out."""

    def decode(self, instance: str, text: bytes) -> Instance | None:
        """Return what another machine has told, None if it is not understood."""

    def withdraw(self, instance: str) -> None:
        """Tell them that this instance, which was killed, has no tunnels any more."""

    async def close(self, *, withdraw: bool) -> None:
        """Disconnect. With `withdraw`, this machine has no tunnels any more."""


class _Machine:
    """What another machine had lately. It drains before it ends, so what it had last would be too little."""

    def __init__(self, now: float, sites: Sites) -> None:
        self._earlier: Sites = {}
        self._noted: Sites = sites
        self._noted_at = now
        self._last: Sites = sites

    def note(self, now: float, sites: Sites) -> None:
        """Note what it has now."""
        self._last = sites
        if not 0 <= now - self._noted_at < MINUTE:
            self._earlier, self._noted, self._noted_at = self._noted, sites, now

    def count_lost(self) -> dict[str, int]:
        """Return the tunnels of each site that are gone with it: the most of the last two minutes."""
        most: dict[str, int] = {}
        for sites in (self._earlier, self._noted, self._last):
            for site, totals in sites.items():
                if totals.tunnels > most.get(site, 0):
                    most[site] = totals.tunnels
        return most


class _Samples:
    """The totals, and the rows that become of them. For one thread."""

    def __init__(self, instance: str, exchange: Exchange | None, on_lost: Callable[[Mapping[str, int]], None]) -> None:
        self._instance = instance
        self._exchange = exchange
        self._on_lost = on_lost
        self._machines: dict[str, _Machine] = {}
        self._history: History | None = None
        self._sampler: Sampler | None = None
        self._sites: dict[str, Totals] = {}
        """The last totals of all sites."""
        self._open: dict[str, Totals] = {}
        """Those of them that have tunnels."""
        self._listing: list[str] = []
        """Sites that are not listed yet in this round."""
        self._waiting: deque[tuple[float, list[Instance]]] = deque(maxlen=MOST_WAITING)

    def begin(self, history: History) -> None:
        """Sample for this history from now on, and what has waited for it."""
        self._history, self._sampler = history, Sampler(history.positions)
        while self._waiting:
            self._sample(*self._waiting.popleft())

    def add(self, sampled: Sampled, others: Sequence[tuple[str, bytes]]) -> None:
        """Add a sample. Sites that are idle are listed once a minute, so that the history knows them."""
        changed = self._apply(sampled)
        sites: Sites = dict(self._sites)
        if not sampled.whole and len(self._sites) <= MAX_ABSENT_SITES:
            sites = {**self._list_some(), **self._open, **changed}
        instances = [Instance(self._instance, sampled.age, sites)]
        if self._exchange is not None:
            self._exchange.publish(sampled.age, sites)
            found = [self._exchange.decode(name, text) for name, text in others]
            known = [instance for instance in found if instance is not None]
            self._note_machines(sampled.time, known)
            instances += known
        if self._sampler is None:
            self._waiting.append((sampled.time, instances))
        else:
            self._sample(sampled.time, instances)

    def finish(self) -> None:
        """Give the history what was sampled in this minute."""
        if self._history is not None and self._sampler is not None and (minute := self._sampler.take()) is not None:
            self._history.append(minute)

    def _sample(self, now: float, instances: list[Instance]) -> None:
        assert self._sampler is not None
        assert self._history is not None
        if (minute := self._sampler.sample(now, instances)) is not None:
            self._history.append(minute)

    def _note_machines(self, now: float, machines: Sequence[Instance]) -> None:
        """Note the tunnels of other machines, and report those of machines that are gone."""
        before, self._machines = self._machines, {}
        for instance in machines:
            machine = before.pop(instance.name, None) or _Machine(now, instance.sites)
            machine.note(now, instance.sites)
            self._machines[instance.name] = machine
        for machine in before.values():
            if lost := machine.count_lost():
                self._on_lost(lost)

    def _apply(self, sampled: Sampled) -> Sites:
        """Note totals that have changed, and return them."""
        if sampled.whole:
            self._sites, self._open = {}, {}
        changed = {}
        for site, (tunnels, *counts) in sampled.sites.items():
            totals = changed[site] = Totals(tunnels, Counts(*counts[: len(Counts._fields)]))
            if tunnels:
                self._open[site] = totals
            else:
                self._open.pop(site, None)
        self._sites.update(changed)
        return changed

    def _list_some(self) -> Sites:
        """Return some sites, another part of them each time."""
        if not self._listing:
            self._listing = list(self._sites)
        part = math.ceil(len(self._sites) / LISTED_WITHIN)
        names, self._listing = self._listing[-part:], self._listing[:-part] if part else []
        return {name: self._sites[name] for name in names if name in self._sites}


class Keeper:
    """Keeps the history in `folder`, or in the default folder if that is None.

    `instance` names the totals of this tunnel, which an upgrade continues. With an `exchange` the history is that of
    all machines. `on_lost` gets the tunnels that are gone with another machine, by site.
    """

    def __init__(
        self,
        folder: Path | None,
        keep: Keep,
        instance: str,
        exchange: Exchange | None = None,
        on_lost: Callable[[Mapping[str, int]], None] = lambda _: None,
    ) -> None:
        self._configured = folder
        self._keep = keep
        self._exchange = exchange
        self._log = structlog.get_logger()
        self._task: asyncio.Task[None] | None = None
        self._history: History | None = None
        self._problem = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_lost = on_lost
        self._instance = instance
        self._samples = _Samples(instance, exchange, self._report_lost)
        self._thread = ThreadPoolExecutor(1, "samples")

    @classmethod
    def configured(
        cls,
        config: Config,
        folder: Path | None,
        instance: str,
        exchange: Exchange | None = None,
        on_lost: Callable[[Mapping[str, int]], None] = lambda _: None,
    ) -> Self:
        """Return the keeper of the history that the configuration describes."""
        keep = config.usage.keep
        minutes, hours, days = (
            math.ceil(seconds / (one.length * MINUTE))
            for seconds, one in ((keep.minutes, MINUTES), (keep.hours, HOURS), (keep.days, DAYS))
        )
        return cls(folder, Keep(minutes, hours, days), instance, exchange, on_lost)

    def start(self) -> None:
        """Open the history in the background."""
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.ensure_future(self._keep_open())
        if self._exchange is not None:
            self._exchange.start()

    def take(self, sampled: Sampled) -> None:
        """Take the totals of this second."""
        others = self._exchange.list_others() if self._exchange is not None else ()
        self._run(lambda: self._samples.add(sampled, others))

    def tell(self, text: bytes) -> None:
        """Tell other machines this once."""
        if self._exchange is not None:
            self._exchange.tell(text)

    async def close(self, *, withdraw: bool = False) -> None:
        """Store what was sampled, and close the file, so that another process can open it.

        With `withdraw`, other machines are told that this one has no tunnels any more.
        """
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._run(self._samples.finish)
        await asyncio.to_thread(self._thread.shutdown)
        if self._exchange is not None:
            await self._exchange.close(withdraw=withdraw)
        history, self._history = self._history, None
        if history is not None and not await history.close(CLOSE_SECONDS):
            self._log.warning(Event.HISTORY_NOT_CLOSED, path=str(history.path), waiting=history.stats().waiting)

    def describe(self) -> HistoryLoad:
        """Return how it is doing, for `status`."""
        history = self._history
        if history is None:
            return HistoryLoad(path="", problem=self._problem or "it is being opened")
        stats = history.stats()
        return HistoryLoad(
            path=str(history.path),
            problem=stats.problem,
            bytes=_measure(history.path),
            last=stats.last * MINUTE if stats.last is not None else None,
            waiting=stats.waiting,
            lost=stats.lost,
        )

    async def _keep_open(self) -> None:
        delay = 0.0
        while self._history is None:
            try:
                folder = await asyncio.to_thread(find_state_folder, self._configured, os.environ)
                history = self._history = await History.open(folder, self._keep, lock_wait=LOCK_SECONDS)
                self._run(functools.partial(self._samples.begin, history))
                await self._withdraw_killed(folder)
            except (StateError, OSError) as error:
                if str(error) != self._problem:
                    self._problem = str(error)
                    self._log.warning(Event.HISTORY_NOT_OPENED, reason=self._problem)
                delay = RETRIES.after(delay)
                await asyncio.sleep(delay)
        self._problem = ""

    async def _withdraw_killed(self, folder: Path) -> None:
        """Tell other machines that the tunnel is gone that kept this history before, if it could not do so itself."""
        before = await asyncio.to_thread(replace_instance, folder, self._instance)
        if before and self._exchange is not None:
            self._exchange.withdraw(before)

    def _report_lost(self, lost: Mapping[str, int]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it is being closed
                self._loop.call_soon_threadsafe(self._on_lost, lost)

    def _run(self, action: Callable[[], None]) -> None:
        """Do something in the thread, after what it does already."""
        with contextlib.suppress(RuntimeError):  # it is being closed
            self._thread.submit(action).add_done_callback(self._report)

    def _report(self, future: "Future[None]") -> None:
        if (error := future.exception()) is not None:
            self._log.error(Event.NOTIFICATION_FAILED, notification="sampled", exc_info=error)


def _measure(path: Path) -> int:
    """Return the size of the history's files."""
    size = 0
    for name in (path, path.with_name(path.name + "-wal")):
        with contextlib.suppress(OSError):
            size += name.stat().st_size
    return size
