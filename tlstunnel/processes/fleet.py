"""The fleet of children: starts and restarts them, assigns them listening sockets, drains and stops them.

Tested by tests/promises/test_processes.py.
"""

import asyncio
import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from tlstunnel import __version__
from tlstunnel.backoff import Backoff
from tlstunnel.config import Config
from tlstunnel.config.admin import Admin
from tlstunnel.config.together import counts_together, keeps_history, shares_notices
from tlstunnel.errors import ProcessError, TlstunnelError
from tlstunnel.journal.events import Event
from tlstunnel.journal.lines import count_lost_lines, reopen_log
from tlstunnel.journal.logger import structlog
from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Registry
from tlstunnel.metrics.shown_sites import ShownSites
from tlstunnel.metrics.snapshot import Snapshot, Totals
from tlstunnel.processes import cores
from tlstunnel.processes.admin_socket import AdminSocket
from tlstunnel.processes.children import CarryOut, Child, ChildHandover, ChildNotifications, Role, Startup
from tlstunnel.processes.election import Election
from tlstunnel.processes.feed import Feed
from tlstunnel.processes.guard import Guard
from tlstunnel.processes.messages import (
    AnnounceDrain,
    Delivered,
    Elected,
    LedgerLoad,
    LedgerLost,
    Load,
    Measured,
    MinuteOver,
    Recorded,
    ReopenLog,
    Seen,
    SeenElsewhere,
    SeenHere,
    Serve,
    TagsEnded,
    Throttled,
)
from tlstunnel.processes.overseer import Overseer
from tlstunnel.processes.resources import MEASURE_SECONDS, Resource, Resources, measure_memory
from tlstunnel.processes.slots import Slots
from tlstunnel.processes.totals import SiteTotals, TotalsHandover
from tlstunnel.processes.watch import WatchTimes
from tlstunnel.processes.wiring import Wiring
from tlstunnel.state.throttles import ThrottleRule
from tlstunnel.supervisor import describe_exit, start_with_retries

RESTARTS = Backoff(first=0.5, longest=30.0)
"""The delays between starts of a child that keeps exiting early; the first restart is immediate."""

QUICK_SECONDS = 10.0
"""A child that exits within this time of its start has exited early."""

_STARTED = (Role.LEDGER, Role.SERVING, Role.ADMIN)
"""In which order children are started."""

KILL_SECONDS = 10.0
"""How long a child may take to exit after the time that it was given to drain; then it is killed."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the command line about the processes; None for one that was not given."""

    control: Path | None = None
    processes: int | Literal["auto"] | None = None

    def count(self, config: Config) -> int:
        """Return how many processes serve. The command line takes precedence over the file."""
        count = config.processes if self.processes is None else self.processes
        return cores.count_usable() if count == "auto" else count


class Fleet:
    """Keeps the configured number of children of each role running, until it is stopped.

    `startup` is what new children are started with. `generation` counts the programs that the parent has run, from 1.
    `ending` is the reason for a shutdown, during which no child is started; empty otherwise. `totals` are the metrics
    of all children, including those that have exited, `metrics` those of the parent itself, and `usage` is what sites
    have used of the children. `shown_sites` are the sites that Prometheus sees one by one, and `config_loaded` is when
    the configuration was loaded, in Unix time. `carry_out` is for the commands that the admin process passes on.
    """

    def __init__(  # noqa: PLR0913 - what an upgrade hands over
        self,
        startup: Startup,
        slots: Slots,
        options: Options,
        generation: int,
        *,
        totals: Totals | None = None,
        usage: TotalsHandover | None = None,
        observer_key: str = "",
        throttles: Iterable[ThrottleRule] = (),
        carry_out: CarryOut | None = None,
        admin_socket: AdminSocket | None = None,
    ) -> None:
        self._carry_out = carry_out
        self.startup = startup
        self.generation = generation
        self.ending = ""
        self._slots = slots
        self._options = options
        self.totals = Totals() if totals is None else totals
        self.usage = SiteTotals(usage)
        self.metrics = Registry()
        self.shown_sites = ShownSites(Admin().metric_sites)
        self.metrics.collect(lambda: [(families.LOG_LINES_LOST, (), count_lost_lines())])
        self.config_loaded = time.time()
        self.last_reload_succeeded = True
        self.feed = Feed(self.usage, lambda: self.wiring.ledger)
        self.resources = Resources()
        self._shares: dict[int, float] = {}
        """The share of the connections that each serving child can have, by pid."""
        self._children: dict[int, Child] = {}
        self._keepers: dict[tuple[Role, int], asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self.wiring = Wiring(lambda: self, self._run_in_background)
        self.overseer = Overseer(
            lambda: self,
            lambda: self.config,
            self.measure_minute,
            lambda: self.wiring.ledger,
            self._run_in_background,
            observer_key,
            throttles,
            admin_socket,
        )
        self.election = Election(lambda: self.wiring.ledger, lambda: self.overseer.admin)
        self._notifications: ChildNotifications = {
            Measured: self._take_metrics,
            LedgerLost: self._reconnect,
            Seen: self.overseer.take_seen,
            SeenElsewhere: self.overseer.take_elsewhere,
            SeenHere: self.overseer.take_here,
            Throttled: self.overseer.take_throttles,
            Recorded: self.overseer.take_records,
            Elected: self.election.take_news,
            Delivered: self.election.take_delivered,
            TagsEnded: self._pass_on_ended_tags,
        }
        self._guard = Guard(WatchTimes.from_environment(), self._handle_silence, self._run_in_background)
        self._revision = 0
        self._may_start = asyncio.Event()
        self._may_start.set()
        self._started = generation > 1
        self._configure_history()
        self._log = structlog.get_logger()

    def __iter__(self) -> Iterator[Child]:
        """Iterate over the children that have not exited, of every role and generation."""
        return iter([child for child in self._children.values() if not child.exited])

    @property
    def config(self) -> Config:
        """The configuration that is served."""
        return self.startup.config

    def count(self, role: Role = Role.SERVING) -> int:
        """Return how many children of a role should run."""
        match role:
            case Role.SERVING:
                return self._options.count(self.config)
            case Role.LEDGER:
                return int(self._needs_ledger())
            case Role.ADMIN:
                return int(self.overseer.is_needed)

    def reopen_logs(self) -> None:
        """Have every process open the log's file again."""
        reopen_log()
        for child in self:
            child.link.notify(ReopenLog())

    def list_options(self) -> dict[str, Any]:
        """Return the options of the command line about the processes."""
        processes = self._options.processes
        return {"log_format": self.startup.log_format} | ({} if processes is None else {"processes": processes})

    def list_overridden(self) -> list[str]:
        """Return the paths of the keys that the command line decides."""
        invocation, config = self.startup.invocation, self.config
        given = {
            "listen": bool(invocation.listen),
            "processes": self._options.processes is not None,
            "log.format": self.startup.log_format != config.log.format,
            "admin.listen": invocation.admin is not None,
            "sites": invocation.origin is not None or invocation.echo is not None,
        }
        return [path for path, is_given in given.items() if is_given]

    def serving(self) -> list[Child]:
        """Return the children that serve or drain."""
        return [child for child in self if child.identity.role is Role.SERVING]

    def _needs_ledger(self) -> bool:
        """Return whether several processes or machines count together, or a history is kept.

        A ledger that runs is kept until there is one process left: those that drain have tunnels that count.
        """
        if self.config.state.url is not None or self._keeps_history():
            return True
        if self.wiring.ledger is not None and len(self.serving()) > 1:
            return counts_together(self.config)
        return self.count() > 1 and counts_together(self.config)

    def _keeps_history(self) -> bool:
        return keeps_history(self.config, os.environ)

    def _configure_history(self) -> None:
        self.usage.configure(site.names[0] for site in self.config.sites)
        self.feed.want(history=self._keeps_history())

    def accepting(self) -> list[Child]:
        """Return the children that accept connections, by place."""
        found = [
            child
            for child in self
            if child.identity.role is Role.SERVING
            and child.identity.generation == self.generation
            and child.ready
            and not child.draining
            and not child.silent
        ]
        return sorted(found, key=lambda child: child.identity.place)

    # --- starting -----------------------------------------------------------------------------------------------------

    def restore(self, kept: Iterable[ChildHandover]) -> None:
        """Take over the children of the previous program."""
        for one in kept:
            child = Child.restore(one, self._notifications, self._carry_out)
            self._add(child)
            if child.identity.role is Role.LEDGER:
                self.wiring.restore(child)
            if one.pulse is not None and one.stacks is not None:
                self._guard.restore(child, one.pulse, one.stacks)
            else:
                self._run_in_background(self._try_to_watch(child))
            if one.metrics is not None:
                self.totals.update(one.pid, one.metrics)

    def start(self) -> list["asyncio.Future[None]"]:
        """Start the children that are missing, and keep them running.

        Each future is done once its child is ready, and fails with ProcessError if it could not be started.
        """
        # The ledger first, because the others wait for it.
        places = [(role, place) for role in _STARTED for place in range(1, self.count(role) + 1)]
        return [self._keep_at(*place) for place in places if place not in self._keepers or self._keepers[place].done()]

    def sum_metrics(self) -> Snapshot:
        """Return the sum over all processes, this one included."""
        self.totals.update(os.getpid(), self.metrics.snapshot())
        return self.totals.sum()

    def hand_over_metrics(self) -> Snapshot:
        """Return what the next program continues with, besides those of the children that it takes over."""
        totals = Totals(self.totals.base)
        totals.update(os.getpid(), self.metrics.snapshot())
        totals.ended(os.getpid())
        return totals.base

    def note_reload(self, *, succeeded: bool) -> None:
        """Count a reload."""
        self.last_reload_succeeded = succeeded
        if succeeded:
            self.config_loaded = time.time()
        self.metrics[families.CONFIG_RELOADS].add("succeeded" if succeeded else "failed")

    def mark_started(self) -> None:
        """Restart a child that exits before it is ready, from now on; until now, that makes the whole start fail."""
        self._started = True

    def replace_startup(self, text: str | None, config: Config, current: Collection[Child]) -> None:
        """Start new children with this configuration. The children in `current` have it already."""
        for child in self:
            child.outdated = child not in current
        before, ledger = _list_ledger_settings(self.config), self.wiring.ledger
        self.startup = dataclasses.replace(self.startup, text=text, config=config)
        self._revision += 1
        self._configure_history()
        self.usage.forget_idle()
        self.feed.send_whole()
        if ledger is not None and before != _list_ledger_settings(config):
            ledger.leaving.set()  # another one takes over from it

    async def pause_starts(self) -> None:
        """Stop starting children, and kill those that are not ready: they have not accepted anything yet."""
        self._may_start.clear()
        for child in self:
            if not child.ready:
                child.kill()
                await child.process.wait()

    def resume_starts(self) -> None:
        """Start children again."""
        self._may_start.set()

    def _keep_at(self, role: Role, place: int) -> "asyncio.Future[None]":
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keepers[role, place] = asyncio.ensure_future(self._keep(role, place, first))
        return first

    async def _keep(self, role: Role, place: int, first: "asyncio.Future[None]") -> None:
        """Keep a child running at `place`. `first` is done once it is ready, and fails if it could not be started."""
        delay = 0.0
        restarted = False
        while (child := await self._start_one(role, place, first)) is not None:
            began = time.monotonic()
            revision = self._revision
            problems = await self._prepare_child(child)
            outdated = child.ready and first.done() and revision != self._revision
            if outdated or not child.ready:
                child.kill()
            elif first.done():
                await self.assign()
            else:
                first.set_result(None)  # the caller of `start` assigns all of them together
            await child.wait_until_leaving()
            if child.leaving.is_set() and not self.ending:
                if role is Role.SERVING:
                    await self.assign()
                continue
            code = await child.process.wait()
            if not first.done():
                failure = child.problem or f"a process failed at its start: {describe_exit(code)}"
                first.set_exception(ProcessError(*(problems or (failure,))))
            if self.ending or child.draining or not (self._started or child.ready):
                return
            if outdated:
                continue
            seconds = time.monotonic() - began
            if seconds >= QUICK_SECONDS:
                delay = 0.0
            elif restarted or problems:
                delay = RESTARTS.after(delay)
            restarted = True
            self.metrics[families.PROCESS_EXITS].add(role.value)
            self._log.error(
                Event.PROCESS_EXITED,
                **child.describe(),
                reason="; ".join(problems) or child.problem or describe_exit(code),
                seconds=round(seconds, 1),
                retry_in=delay,
            )
            await self.assign()
            await asyncio.sleep(delay)

    async def _start_one(self, role: Role, place: int, first: "asyncio.Future[None]") -> Child | None:
        """Start a child as soon as possible; return None if it is no longer needed."""

        async def start() -> Child | None:
            await self._may_start.wait()
            if self.ending or place > self.count(role):
                return None
            child = Child.start(role, place, self.generation, self._notifications, self._carry_out)
            self._add(child)
            return child

        def report(error: Exception, delay: float) -> None:
            why = getattr(error, "strerror", None)
            if not first.done():
                first.set_exception(ProcessError(f"no process can be started: {why}"))
            self._log.error(Event.PROCESS_NOT_STARTED, place=place, reason=why, retry_in=delay)

        return await start_with_retries(start, RESTARTS, report, (OSError,))

    async def _prepare_child(self, child: Child) -> tuple[str, ...]:
        """Have a child load its configuration, and send it the listeners.

        Return the problems; none if it is ready, or if it exited, since its exit status then says more.
        """
        try:
            await child.begin(self.startup)
            if child.identity.version != __version__:
                hint = "the package on disk was replaced; run tlstunnel upgrade"
                self._log.warning(Event.PACKAGE_REPLACED, process=child.pid, version=child.identity.version, hint=hint)
            if child.identity.role is Role.SERVING:
                await child.send_listeners(list(self._slots))
            await self._guard.watch(child)
            match child.identity.role:
                case Role.LEDGER:
                    await self.wiring.begin(child)
                    self.election.begin_ledger(child, f"{self.config.state.url} {self.config.state.prefix}")
                case Role.ADMIN:
                    await self.overseer.begin(child)
                    self.election.begin_admin(child)
                case Role.SERVING:
                    if self.count(Role.LEDGER):
                        await self.wiring.connect(child)
                    await self.overseer.prepare(child)
        except TlstunnelError as error:
            child.kill()
            return () if child.link.closed else error.problems
        child.ready = True
        return ()

    def _add(self, child: Child) -> None:
        self._children[child.pid] = child
        child.process.exited.add_done_callback(functools.partial(self._remove, child))

    def _remove(self, child: Child, _: "asyncio.Future[int | None]") -> None:
        del self._children[child.pid]
        self.totals.ended(child.pid)
        self.overseer.note_lost(self.usage.count_tunnels_of(child.pid))
        self.usage.ended(child.pid)
        self._shares.pop(child.pid, None)
        if child.identity.role is not Role.SERVING:
            return
        generation = child.identity.generation
        if generation < self.generation or child.draining:
            self._log.info(Event.PROCESS_DRAINED, process=child.pid, generation=generation)
        if self.wiring.ledger is not None and not self.ending:
            self._run_in_background(self._dismiss_needless_ledger())

    # --- while they run -----------------------------------------------------------------------------------------------

    async def assign(self) -> None:
        """Assign the slots to the children that accept. A child takes a slot over before another one leaves it."""
        children = self.accepting()
        numbers = self._slots.assign([child.pid for child in children])
        kept = [slot.number for slot in self._slots]
        await asyncio.gather(
            *(child.try_request(Serve(kept=kept, numbers=sorted(numbers[child.pid]))) for child in children)
        )

    def _pass_on_ended_tags(self, _: Child, ended: TagsEnded) -> None:
        """Have serving processes end what other machines have ended, also those that do not respond now."""
        for child in self.serving():
            if not child.link.closed:
                child.link.notify(ended)

    async def watch(self) -> None:
        """Watch the children, and send the ledger what they report, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._guard.run())
            group.create_task(self.feed.run())
            group.create_task(self._watch_resources())
            group.create_task(self.overseer.run())

    async def _watch_resources(self) -> None:
        while True:
            await asyncio.sleep(MEASURE_SECONDS)
            busy = self.config.usage.busy
            thresholds: Mapping[Resource, float] = {"descriptors": busy.descriptors / 100, "memory": busy.memory / 100}
            new, over = self.resources.measure(thresholds, self._shares, measure_memory(), self.usage.count_tunnels())
            for shortage in new:
                self._log.warning(Event.RUNNING_SHORT, **shortage.describe())
            for resource in over:
                self._log.info(Event.NO_LONGER_SHORT, resource=resource)

    async def _try_to_watch(self, child: Child) -> None:
        with contextlib.suppress(ProcessError):
            await self._guard.watch(child)

    def _handle_silence(self, child: Child) -> None:
        """Have others accept at the sockets of a child that is silent, or itself again once it responds."""
        if self.ending or child.draining or child.identity.generation != self.generation:
            return
        if child.identity.role is not Role.SERVING:
            return  # processes notice by themselves
        if child.silent or not (child.outdated or child.identity.place > self.count()):
            self._run_in_background(self.assign())
            return
        self._run_in_background(self._dismiss(child))  # it has missed a reload

    async def _dismiss(self, child: Child) -> None:
        """Drain a child, and free its place at once, for another one if it is needed: draining may take a day."""
        child.draining = True
        child.leaving.set()
        await self.assign()
        await self.retire(child)

    async def resize(self) -> None:
        """Start the children that are missing, and drain those in excess; their slots go to the others."""
        for start in self.start():
            with contextlib.suppress(TlstunnelError):  # it is retried after a delay
                await start
        for child in self.accepting():
            if child.identity.place > self.count():
                await self._dismiss(child)
        await self._dismiss_needless_ledger()

    async def end_ledger(self) -> None:
        """End the ledger, for a release that has none. Another one starts when starts are resumed."""
        ledger = self.wiring.ledger
        await self.wiring.dismiss()
        if ledger is not None:
            await ledger.process.wait()

    async def _dismiss_needless_ledger(self) -> None:
        if not self.ending and not self.count(Role.LEDGER):
            await self.wiring.dismiss()

    async def retire(self, child: Child) -> None:
        """Drain a child as configured in ``[release]``."""
        release = self.config.release
        after = release.drain_after
        await child.drain(float(after) if after is not None else None, float(release.drain_over))

    def _reconnect(self, child: Child, lost: LedgerLost) -> None:
        if not self.ending:
            self._run_in_background(self.wiring.reconnect(child, lost.connection))

    def measure_minute(self) -> MinuteOver:
        """Return the open tunnels of each site, and of what the machine uses how much."""
        tunnels = dict.fromkeys((site.names[0] for site in self.config.sites), 0) | self.usage.count_tunnels()
        shares = self.resources.shares
        return MinuteOver(tunnels, shares.get("descriptors", 0.0), shares.get("memory", 0.0))

    def _take_metrics(self, child: Child, measured: Measured) -> None:
        self.totals.update(child.pid, measured.metrics)
        if child.identity.role is Role.SERVING:
            self.usage.update(child.pid, measured.sites, measured.cpu)
        if measured.most_connections:
            self._shares[child.pid] = measured.connections / measured.most_connections

    async def loads(self, *, scraped: bool = False) -> list[tuple[Child, Load | None]]:
        """Return the load of each serving child, None if it does not respond, and bring `totals` up to date.

        With `scraped`, the children measure the lag of their loops for a while.
        """
        children = [child for child in self.serving() if child.ready]
        loads = await asyncio.gather(*(self._request_load(child, scraped=scraped) for child in children))
        for child, load in zip(children, loads, strict=True):
            # For a child that has exited, the totals already hold the metrics that it sent last.
            if load is not None and load.metrics is not None and not child.exited:
                self.totals.update(child.pid, load.metrics)
        return [(child, load) for child, load in zip(children, loads, strict=True) if not child.exited]

    async def request_ledger_load(self) -> LedgerLoad | None:
        """Return what the ledger does, None if there is none or it does not respond, and bring `totals` up to date."""
        ledger = self.wiring.ledger
        load = await self.wiring.request_load()
        if ledger is not None and load is not None and not ledger.exited:
            self.totals.update(ledger.pid, load.metrics)
        return load

    async def _request_load(self, child: Child, *, scraped: bool) -> Load | None:
        if child.silent:
            return None
        try:
            return await child.request_load(scraped=scraped)
        except ProcessError:
            return None

    async def quiesce(self, seconds: float) -> None:
        """Wait until no message is half sent. Raises ProcessError if a child does not read one within `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not all(child.link.idle for child in self):  # noqa: ASYNC110 - for a moment, at an upgrade
                    await asyncio.sleep(0.01)
        for child in self:
            if not child.link.idle:
                raise ProcessError(f"process {child.pid} does not respond")

    def hand_over(self) -> list[ChildHandover]:
        """Return what `restore` takes in the next program."""
        return [
            msgspec.structs.replace(child.hand_over(), metrics=self.totals.last(child.pid))
            for child in self
            if child.ready and child.identity.role is not Role.ADMIN
        ]

    # --- shutdown -----------------------------------------------------------------------------------------------------

    async def announce_drain(self) -> None:
        """Have all serving children tell load balancers that a shutdown has begun."""
        await asyncio.gather(*(child.try_request(AnnounceDrain()) for child in self.serving() if child.ready))

    async def drain(self, over: float) -> None:
        """Drain all serving children over so many seconds; return when they have exited, or are overdue."""
        children = self.serving()
        for child in children:
            if child.ready:
                self._run_in_background(child.drain(0.0, over))
            else:
                child.kill()  # it has not accepted anything yet
        if children:
            longest = over + self.config.timeouts.close + KILL_SECONDS
            await asyncio.wait([child.process.exited for child in children], timeout=longest)

    async def stop(self) -> None:
        """Stop the remaining children at once; those that respond still log a record of each connection."""
        self.ending = self.ending or "start failed"
        for keeper in self._keepers.values():
            keeper.cancel()
        await self._stop(self.serving())
        self.feed.send()  # what they have sent at their end
        await self._stop([child for child in self if child.identity.role is Role.ADMIN])  # it tells what it delivered
        await self._stop(list(self))  # the ledger, which counts until the others have exited
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, *self._keepers.values(), return_exceptions=True)

    async def _stop(self, children: Collection[Child]) -> None:
        for child in children:
            if child.ready:
                self._run_in_background(child.stop())
            else:
                child.kill()
        if children:
            await asyncio.wait([child.process.exited for child in children], timeout=KILL_SECONDS)
            for child in children:
                child.kill()
            await asyncio.wait([child.process.exited for child in children])

    def _run_in_background(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _list_ledger_settings(config: Config) -> tuple[object, ...]:
    """Return everything that the ledger uses of the configuration."""
    state = config.state
    timeout = state.timeout if state.url is not None else None
    keep = config.usage.keep if keeps_history(config, os.environ) else None
    return state.url, state.password_file, state.prefix, state.dir, timeout, keep, shares_notices(config)
