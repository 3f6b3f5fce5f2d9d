"""Takes deliveries that are due from the store, makes an attempt at each, and stores the result.

At most `CONCURRENCY` at once, and one for each target: a server that hangs keeps others from nothing, and gets no
hundred connections when it is back. An attempt is stored before it begins. So after a kill at any moment, what has no
stored result is delivered again, with the same id.

Of several machines, only the one whose duty it is makes attempts. The others note what it has delivered, so that they
do not deliver it when their turn comes.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from tlstunnel.errors import StateError
from tlstunnel.escaping import printable
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.plans.channels import Channels
from tlstunnel.plans.decisions import MOST_DECISIONS
from tlstunnel.plans.duty import Duty
from tlstunnel.plans.notice_file import Channel, Delivery, NoticeFile, State, Target
from tlstunnel.plans.notice_store import NoticeStore
from tlstunnel.plans.notices import RETRIES, RETRY_SECONDS, SAME_SECONDS, Outcome, Result, find_delay, plan_retry
from tlstunnel.plans.plot import Labels
from tlstunnel.plans.values import Notice

CONCURRENCY = 8

POLL_SECONDS = 60.0
"""How long to sleep at most: a clock that jumps ahead makes deliveries due."""

GRACE_SECONDS = 2.0
"""How long deliveries that have begun may take at the end. What has no result by then is delivered again."""

ELSEWHERE = "another machine has delivered it"
"""The reason of a delivery that was accepted although this machine has not delivered it."""

TOO_LATE = "no machine has delivered it within three days"

MOST_SETTLED = 1000
"""Deliveries that are looked at at once, for what other machines have delivered."""

STORE_SECONDS = 5.0
"""How long to wait before the store is tried again."""

Clock = Callable[[], float]
Draw = Callable[[Notice, Labels], Awaitable[bytes | None]]
"""Returns the plot for a notice with these labels, a PNG, or None."""


async def draw_nothing(_: Notice, __: Labels) -> bytes | None:
    """Return no plot."""
    return None


class Courier:
    """Delivers. `run` lasts until it is cancelled; `wake` says that something may be due."""

    def __init__(
        self,
        store: NoticeStore,
        channels: Channels,
        duty: Duty,
        *,
        clock: Clock = time.time,
        draw: Draw = draw_nothing,
    ) -> None:
        self.channels = channels
        self._duty = duty
        self._was_ours = False
        self._store = store
        self._clock = clock
        self._draw = draw
        self._busy: dict[Target, asyncio.Task[None]] = {}
        self._awake = asyncio.Event()
        self._log = structlog.get_logger()

    def wake(self) -> None:
        """Look for deliveries now."""
        self._awake.set()

    async def run(self) -> None:
        """Deliver what is due, for ever."""
        try:
            while True:
                self._awake.clear()
                try:
                    pause = await self._start_due()
                except StateError:  # the store has logged it
                    pause = STORE_SECONDS
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._awake.wait()
        finally:
            tasks = list(self._busy.values())
            if tasks:
                await asyncio.wait(tasks, timeout=GRACE_SECONDS)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _start_due(self) -> float:
        """Start what is due, and return how many seconds later more of it is."""
        free = CONCURRENCY - len(self._busy)
        if not free:
            return POLL_SECONDS  # the first that ends wakes us
        now = self._clock()
        if not self._duty.alone and not await self._settle(now):
            return POLL_SECONDS  # news wakes us
        deliveries, following = await self._store.run(NoticeFile.read_due, now, list(self._busy), free)
        for delivery in deliveries:
            self._busy[delivery.target] = asyncio.create_task(self._deliver(delivery))
        return POLL_SECONDS if following is None else min(max(following - now, 0.0), POLL_SECONDS)

    async def _settle(self, now: float) -> bool:
        """Note what needs no attempt of this machine. Return whether it is to make any."""
        is_ours = self._duty.is_ours
        if is_ours and not self._was_ours:  # the server may have lost what was told before
            since = now - SAME_SECONDS
            for one in await self._store.run(NoticeFile.read_accepted, since, ELSEWHERE, MOST_SETTLED):
                self._duty.note_delivered(one.notice, one.target)
            self._duty.tell(await self._store.run(NoticeFile.read_decisions, MOST_DECISIONS, self._clock()))
        self._was_ours = is_ours
        for one in await self._store.run(NoticeFile.read_pending, MOST_SETTLED):
            if one.target in self._busy:
                continue
            if self._duty.was_delivered(one):
                await self._store.run(NoticeFile.finish, one, State.ACCEPTED, ELSEWHERE)
            elif one.notice.created + RETRY_SECONDS < now:
                # A single machine tries once more, since it may have been off all this time.
                await self._store.run(NoticeFile.finish, one, State.GIVEN_UP, TOO_LATE)
                fields = {"id": one.notice.id, "site": one.notice.site, "channel": one.target.channel.value}
                self._log.warning(Event.NOTICE_NOT_DELIVERED, **fields, attempts=one.attempts, reason=TOO_LATE)
        return is_ours

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            now = self._clock()
            again = now + RETRIES.spread(find_delay(delivery.attempts + 1))
            await self._store.run(NoticeFile.begin, delivery, now, again)
            result = await self._attempt(delivery)
            await self._finish(delivery, result)
        except StateError:  # it did not begin
            await asyncio.sleep(STORE_SECONDS)
        finally:
            del self._busy[delivery.target]
            self.wake()

    async def _attempt(self, delivery: Delivery) -> Result:
        url = self.channels.find_url(delivery.target)
        if url and url in await self._store.run(NoticeFile.read_closed):
            return Result(Outcome.REFUSED, "its receiver has responded with 410 before")
        try:
            plot = None
            if self.channels.wants_plot(delivery.target):
                plot = await self._draw(delivery.notice, self.channels.find_labels(delivery.notice))
        except Exception as error:
            self._log.warning(Event.NOTICE_PLOT_FAILED, id=delivery.notice.id, reason=printable(str(error)))
            plot = None
        if not self._duty.is_ours:  # drawing takes time
            return Result(Outcome.FAILED, "it is up to another machine now")
        if self._duty.was_delivered(delivery):
            return Result(Outcome.ACCEPTED, ELSEWHERE)
        try:
            result = await self.channels.deliver(delivery.notice, delivery.target, plot)
        except Exception as error:
            self._log.exception(Event.NOTICE_FAILED, notice=delivery.notice.id)
            result = Result(Outcome.FAILED, printable(f"internal error: {error!r}"))
        if result.outcome is Outcome.ACCEPTED:
            self._duty.note_delivered(delivery.notice, delivery.target)
        if url and result.outcome is Outcome.GONE:
            await self._insist(NoticeFile.close_url, url, delivery.notice.id, self._clock())
        return result

    async def _finish(self, delivery: Delivery, result: Result) -> None:
        now, attempts = self._clock(), delivery.attempts + 1
        state, again = State.GIVEN_UP, None
        if result.outcome is Outcome.ACCEPTED:
            state = State.ACCEPTED
        elif result.outcome is Outcome.FAILED:
            again = plan_retry(attempts, delivery.notice.created, now, result.wait)
            state = State.GIVEN_UP if again is None else State.PENDING
        await self._insist(NoticeFile.finish, delivery, state, result.reason, again)
        notice, channel = delivery.notice, delivery.target.channel
        fields = {"id": notice.id, "site": notice.site, "channel": channel.value, "attempts": attempts}
        if state is not State.ACCEPTED:
            retry = {} if again is None else {"retry_in": round(again - now)}
            self._log.warning(Event.NOTICE_NOT_DELIVERED, **fields, reason=result.reason, **retry)
        elif channel is not Channel.LOG:
            self._log.info(Event.NOTICE_DELIVERED, **fields, response=result.reason)

    async def _insist(self, action: Callable[..., None], *args: object) -> None:
        """Store a result as soon as that is possible: without it, the notice would be delivered again."""
        while True:
            try:
                return await self._store.run(action, *args)
            except StateError:
                await asyncio.sleep(STORE_SECONDS)
