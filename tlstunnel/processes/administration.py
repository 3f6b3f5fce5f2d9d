"""What the admin process does: assesses sites, sends notices, keeps throttles, and carries out commands about them.

Nothing here knows of links and processes, and the caller has the clock. What blocks runs in a thread of its own. While
the history or the notices cannot be used, it is tried again each minute, and everything else goes on.
"""

import asyncio
import contextlib
import difflib
import functools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import msgspec

from tlstunnel.addresses import quoted
from tlstunnel.commands import usage
from tlstunnel.config import Config
from tlstunnel.config.urls import hide_key
from tlstunnel.errors import ControlError, StateError
from tlstunnel.escaping import printable, shorten
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.plans.assessor import Assessor, Step
from tlstunnel.plans.channels import Channels
from tlstunnel.plans.decisions import Mute
from tlstunnel.plans.duty import Duty
from tlstunnel.plans.elsewhere import Sightings
from tlstunnel.plans.notice_file import NotContactedError, NoticeFile, NoticeRecord, Throttle
from tlstunnel.plans.notices import make_id, make_shared_id
from tlstunnel.plans.notifier import Notifier
from tlstunnel.plans.observer import Observed
from tlstunnel.plans.site_plot import NoticePlots
from tlstunnel.plans.standing import MachineLoad
from tlstunnel.plans.throttling import Throttling
from tlstunnel.plans.values import Assessment
from tlstunnel.state.counters import MAX_SECONDS
from tlstunnel.state.throttles import ThrottleRule

LOCK_SECONDS = 10.0
"""How long to wait for the admin process before, which ends."""

LONGEST_WHY = 500
"""Characters of the reason for a throttle."""

MOST_NOTICES = 10_000

QUICK_SECONDS = 0.1
"""How long a report on usage waits for the thread that assesses sites. Then it has what was known before."""

BUSY = "the history is being read; where sites stand is from before"
"""Why a report has only what was known before."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Command = Callable[[Any, str, Mapping[str, int]], Awaitable[msgspec.Struct]]


class Administration:
    """Administers the sites of a configuration, with its state in `folder`.

    `key` is the one that serving processes count addresses with. `on_throttles` gets the throttles that hold, whenever
    they change. `on_sightings` gets each minute what to tell other machines. `show` returns a network of clients as it
    may be shown.
    """

    def __init__(  # noqa: PLR0913 - the dependencies
        self,
        folder: Path,
        config: Config,
        channels: Channels,
        key: bytes,
        on_throttles: Callable[[Sequence[ThrottleRule]], None],
        *,
        duty: Duty | None = None,
        on_sightings: Callable[[Sightings], None] = lambda _: None,
        show: Callable[[str], str] = str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._config = config
        self._channels = channels
        self._on_throttles = on_throttles
        self._on_sightings = on_sightings
        self._show = show
        self._clock = clock
        self._plots = NoticePlots(folder)
        self._duty = Duty(alone=True) if duty is None else duty
        self._thread = ThreadPoolExecutor(1, "assessor")
        self._assessor = Assessor(folder, config, key)
        self._known: Mapping[str, Assessment] = self._assessor.assessments
        """Where each site stood when that was known last."""
        self._notifier: Notifier | None = None
        self._throttling: Throttling | None = None
        self._problem = ""
        """Why the history cannot be read, "" if it can."""
        self._notice_problem = "they are being opened"
        self._opening = asyncio.Lock()
        self._log = structlog.get_logger()
        self._names: Mapping[str, str] = {}
        self._name_sites()
        self._commands: Mapping[type[msgspec.Struct], _Command] = {
            usage.Usage: self._report_usage,
            usage.Notices: self._list_notices,
            usage.AckNotice: self._acknowledge,
            usage.MuteSite: self._mute,
            usage.ThrottleSite: self._throttle,
            usage.ReleaseSite: self._release,
        }

    async def start(self) -> None:
        """Read what was before. What cannot be read yet is read later."""
        await self._ensure_open(LOCK_SECONDS)
        with contextlib.suppress(StateError):  # there is no history at the first start, until a minute is over
            await self._run(self._assessor.start, self._clock())

    async def configure(self, config: Config, channels: Channels) -> None:
        """Go on with another configuration."""
        self._config, self._channels = config, channels
        self._name_sites()
        if self._notifier is not None:
            self._notifier.reconfigure(channels)
        await self._run(self._assessor.configure, config)

    async def learn_duty(self, until: float, delivered: Sequence[str]) -> None:
        """Take what was learned in the election of the machine that delivers notices."""
        is_news = self._duty.learn(until, delivered)
        if self._notifier is not None:
            if is_news:
                self._notifier.wake()
            with contextlib.suppress(StateError):  # the store has logged it; it is tried again each minute
                await self._notifier.follow()
                await self._refresh_throttles()

    async def take(self, seen: Mapping[str, Observed]) -> None:
        """Take what a serving process has seen in the last minute."""
        await self._run(self._assessor.take, seen)

    async def take_elsewhere(self, sightings: Sightings) -> None:
        """Take what another machine has seen in a minute."""
        await self._run(self._assessor.take_elsewhere, sightings)

    async def handle_minute(self, tunnels: Mapping[str, int], load: MachineLoad) -> None:
        """Assess all sites, now that a minute is over, and do what follows from that."""
        await self._ensure_open(0.0)
        try:
            step = await self._run(self._assessor.step, self._clock(), tunnels, load)
        except StateError as error:
            if str(error) != self._problem:
                self._log.warning(Event.NOT_ASSESSED, reason=str(error))
            self._problem = str(error)
        else:
            self._problem = ""
            self._known = step.assessments
            if step.sightings and not self._duty.alone:
                self._on_sightings(step.sightings)
            await self._follow(step)

    async def close(self) -> None:
        """End. What is not delivered is, after the next start."""
        if self._notifier is not None:
            await self._notifier.close()
        await self._run(self._assessor.close)
        self._thread.shutdown()

    async def _follow(self, step: Step) -> None:
        notifier, throttling = self._notifier, self._throttling
        if notifier is None or throttling is None:
            return
        try:
            await notifier.assess(list(step.assessments.values()))
            await self._refresh_throttles()
            config = self._config.usage
            if config.on_abuse == "throttle":
                sentences = {name: one.sentence for name, one in step.assessments.items() if name in step.suspicions}
                for throttle in await throttling.react(step.suspicions, config.abuse, sentences):
                    self._log_throttle(throttle)
        except StateError:
            pass  # the store has logged it
        throttling.expire()

    async def _refresh_throttles(self) -> None:
        """Learn of the throttles of other machines. Raises StateError."""
        if self._throttling is not None and not self._duty.alone:
            for throttle in await self._throttling.refresh():
                self._log_throttle(throttle)

    async def _ensure_open(self, lock_wait: float) -> None:
        """Open the notices and throttles, unless they are open."""
        async with self._opening:
            if self._throttling is not None:
                return
            try:
                if self._notifier is None:
                    prefix = self._config.state.prefix
                    self._notifier = await Notifier.open(
                        self._folder,
                        self._channels,
                        lock_wait=lock_wait,
                        duty=self._duty,
                        new_id=make_id if self._duty.alone else functools.partial(make_shared_id, prefix),
                        clock=self._clock,
                        draw=self._plots.draw,
                    )
                throttling = Throttling(self._notifier.store, self._on_throttles, self._clock, self._duty.tell)
                await throttling.refresh()
            except StateError as error:
                self._notice_problem = str(error)
            else:
                self._throttling = throttling

    async def _run(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run something of the assessor in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))

    # --- commands -----------------------------------------------------------------------------------------------------

    async def carry_out(self, command: msgspec.Struct, who: str, tunnels: Mapping[str, int]) -> msgspec.Struct:
        """Carry out a command of `tlstunnel.commands.usage`, and return its result. Raises ControlError.

        `tunnels` are open at the moment, by site.
        """
        try:
            return await self._commands[type(command)](command, who, tunnels)
        except (ValueError, StateError) as error:
            raise ControlError(str(error)) from None

    async def _report_usage(self, command: usage.Usage, _: str, tunnels: Mapping[str, int]) -> usage.UsageResult:
        now = self._clock()
        site = self._find_site(command.site) if command.site else ""
        problem = self._problem if self._assessor.assessed is None else ""
        try:
            async with asyncio.timeout(QUICK_SECONDS):
                self._known = await self._run(self._assessor.refresh, now, tunnels)
            found = self._known
        except TimeoutError:
            found = self._assessor.update(self._known, tunnels)
            problem = problem or BUSY
        load = self._assessor.load
        mutes: list[Mute] = []
        throttles: Sequence[Throttle] = ()
        try:
            notifier, throttling = self._opened
            throttles = throttling.holding
            mutes = await notifier.store.run(NoticeFile.read_mutes, now)
        except (ControlError, StateError) as error:
            problem = problem or str(error)
        return usage.UsageResult(
            now=now,
            assessed=self._assessor.assessed,
            assessments=tuple(one for name, one in sorted(found.items()) if site in ("", name)),
            throttles=tuple(_describe_throttle(one, self._show) for one in throttles if site in ("", one.site)),
            mutes=tuple(_describe_mute(one) for one in mutes if site in ("", one.site)),
            machine=usage.MachineUse(*load) if load is not None else None,
            problem=problem,
            folder=str(self._folder),
            tunnels={name: number for name, number in tunnels.items() if site in ("", name)},
        )

    async def _list_notices(self, command: usage.Notices, _: str, __: Mapping[str, int]) -> usage.NoticesResult:
        site = self._names.get(command.site, command.site) or None
        most = min(max(command.most, 1), MOST_NOTICES)
        found = await self._opened[0].store.run(NoticeFile.read_notices, site, most)
        return usage.NoticesResult(now=self._clock(), notices=tuple(map(_describe_notice, found)))

    async def _acknowledge(self, command: usage.AckNotice, who: str, _: Mapping[str, int]) -> usage.Acknowledged:
        if not await self._opened[0].acknowledge(command.id, who):
            raise ControlError(f"there is no notice {quoted(command.id)}; tlstunnel usage notices lists them")
        return usage.Acknowledged(command.id)

    async def _mute(self, command: usage.MuteSite, who: str, _: Mapping[str, int]) -> usage.Muted:
        if not 0.0 <= command.seconds <= MAX_SECONDS:
            raise ControlError("a site can be muted for 366 days at most")
        site = self._find_site(command.site)
        return _describe_mute(await self._opened[0].mute(site, command.seconds, who))

    async def _throttle(self, command: usage.ThrottleSite, who: str, _: Mapping[str, int]) -> usage.Throttled:
        site = self._find_site(command.site)
        why = shorten(printable(command.why.strip()), LONGEST_WHY)
        if not why:
            raise ControlError("say why the site is throttled: the record keeps it")
        try:
            throttle = await self._opened[1].throttle(
                site,
                command.rate,
                command.seconds,
                why=why,
                who=who,
                abuse=command.abuse,
                addresses=command.addresses,
            )
        except NotContactedError as error:
            raise ControlError(str(error)) from None
        self._log_throttle(throttle)
        return _describe_throttle(throttle, self._show)

    async def _release(self, command: usage.ReleaseSite, who: str, _: Mapping[str, int]) -> usage.Released:
        site = self._names.get(command.site, command.site)
        number = await self._opened[1].release(site, who)
        if not number:
            self._find_site(command.site)  # whether it is misspelt
        else:
            self._log.warning(Event.THROTTLE_RELEASED, site=site, throttles=number, who=who)
        return usage.Released(site, number)

    @property
    def _opened(self) -> tuple[Notifier, Throttling]:
        if self._notifier is None or self._throttling is None:
            raise ControlError(f"notices and throttles cannot be used now: {self._notice_problem}")
        return self._notifier, self._throttling

    def _find_site(self, name: str) -> str:
        """Return the first name of a site. Raises ControlError."""
        found = self._names.get(name)
        if found is None:
            near = difflib.get_close_matches(name[:300], self._names, n=1)
            hint = f"; did you mean {quoted(near[0])}?" if near else ""
            raise ControlError(f"there is no site {quoted(name)}{hint}")
        return found

    def _name_sites(self) -> None:
        self._names = {name: site.names[0] for site in self._config.sites for name in site.names}

    def _log_throttle(self, throttle: Throttle) -> None:
        self._log.warning(
            Event.SITE_THROTTLED,
            site=throttle.site,
            addresses=len(throttle.addresses),
            rate=throttle.rate,
            seconds=round(throttle.until - throttle.since),
            why=throttle.why,
            who=throttle.who,
            notice=throttle.notice,
        )


def _describe_throttle(throttle: Throttle, show: Callable[[str], str]) -> usage.Throttled:
    return usage.Throttled(
        site=throttle.site,
        addresses=tuple(map(show, throttle.addresses)),
        rate=throttle.rate,
        since=throttle.since,
        until=throttle.until,
        why=throttle.why,
        who=throttle.who,
        notice=throttle.notice,
        abuse=throttle.abuse,
    )


def _describe_mute(mute: Mute) -> usage.Muted:
    return usage.Muted(mute.site, mute.until, mute.since, mute.who)


def _describe_notice(record: NoticeRecord) -> usage.NoticeStatus:
    return usage.NoticeStatus(
        notice=msgspec.structs.replace(record.notice, address=hide_key(record.notice.address)),
        accepted=record.accepted,
        acknowledged=record.acknowledged,
        acknowledged_by=record.acknowledged_by,
        deliveries=tuple(
            usage.DeliveryStatus(
                channel=one.target.channel.value,
                address=hide_key(one.target.address),
                state=one.state.value,
                attempts=one.attempts,
                attempted=one.attempted,
                next_at=one.next_at,
                reason=one.reason,
            )
            for one in record.deliveries
        ),
    )
