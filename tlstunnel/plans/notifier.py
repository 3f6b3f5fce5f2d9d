"""Notices from assessments: decided, stored, then delivered. What the process that assesses sites needs of them.

Tested by tests/unit/test_plans_delivery.py.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tlstunnel.plans.channels import Channels
from tlstunnel.plans.decisions import MOST_DECISIONS, Acknowledgement, Mute, SiteThrottle
from tlstunnel.plans.delivery import Clock, Courier, Draw, draw_nothing
from tlstunnel.plans.duty import Duty
from tlstunnel.plans.notice_file import NoticeFile
from tlstunnel.plans.notice_store import NoticeStore
from tlstunnel.plans.notices import DAY, HOUR, NewId, Notices, make_id
from tlstunnel.plans.values import Assessment

TIDY_SECONDS = HOUR

TELL_SECONDS = DAY
"""How often machines tell each other again what was decided. The server forgets it after two weeks."""


class Notifier:
    """Sends notices, and takes what people say about them. Every method raises StateError if that was not stored."""

    def __init__(self, store: NoticeStore, notices: Notices, courier: Courier, duty: Duty, clock: Clock) -> None:
        """Use `open` instead."""
        self.store = store
        self._notices = notices
        self._courier = courier
        self._duty = duty
        self._clock = clock
        self._tidied = 0.0
        self._told = 0.0
        self._making = asyncio.Lock()
        self._delivering = asyncio.create_task(courier.run())

    @classmethod
    async def open(  # noqa: PLR0913 - the dependencies
        cls,
        folder: Path,
        channels: Channels,
        *,
        lock_wait: float = 0.0,
        duty: Duty | None = None,
        new_id: NewId = make_id,
        clock: Clock = time.time,
        draw: Draw = draw_nothing,
    ) -> Self:
        """Open the notices in the state folder, and go on delivering. Raises StateError if they cannot be used.

        While another process has them, `lock_wait` is how many seconds to wait for its end. With a `duty`, this
        is one of several machines.
        """
        store = NoticeStore(folder, lock_wait)
        try:
            sent = await store.run(NoticeFile.read_sent)
            mutes = await store.run(NoticeFile.read_mutes, clock())
        except BaseException:
            await store.close()
            raise
        notices = Notices(sent, {mute.site: mute.until for mute in mutes}, new_id=new_id)
        duty = duty or Duty(alone=True)
        return cls(store, notices, Courier(store, channels, duty, clock=clock, draw=draw), duty, clock)

    def reconfigure(self, channels: Channels) -> None:
        """Use these channels from now on."""
        self._courier.channels = channels
        self._courier.wake()

    def wake(self) -> None:
        """Look for deliveries now: the duty has changed."""
        self._courier.wake()

    async def assess(self, assessments: Sequence[Assessment]) -> int:
        """Make the notices that are due by these assessments, and return how many. To be called once a minute."""
        if self._delivering.done():
            self._delivering.result()  # a bug, which must not stay hidden
        # What is stored has to be taken into account, even if the caller is cancelled.
        number = await asyncio.shield(self._make_due(assessments))
        now = self._clock()
        if abs(now - self._tidied) > TIDY_SECONDS:
            await self.store.run(NoticeFile.tidy, now)
            self._tidied = now
        if not self._duty.alone and abs(now - self._told) > TELL_SECONDS:
            self._duty.tell(await self.store.run(NoticeFile.read_decisions, MOST_DECISIONS, now))
            self._told = now
        return number

    async def follow(self) -> None:
        """Do what was decided on other machines."""
        if self._duty.decisions:
            async with self._making:
                await self._follow()

    async def _follow(self) -> None:
        for decision in self._duty.decisions:
            if isinstance(decision, Acknowledgement):
                await self.store.run(NoticeFile.acknowledge_same, decision)
                self._notices.acknowledge_same(decision.site, decision.standing, decision.created)
            elif isinstance(decision, SiteThrottle):
                await self.store.run(NoticeFile.follow_throttle, decision, self._clock())
            elif await self.store.run(NoticeFile.follow_mute, decision):
                self._notices.mute(decision.site, decision.until)
            self._duty.note_followed(decision)

    async def _make_due(self, assessments: Sequence[Assessment]) -> int:
        async with self._making:
            await self._follow()
            channels = self._courier.channels
            due = self._notices.decide(assessments, channels.addresses, self._clock())
            if due:
                targets = {notice.id: channels.list_targets(notice) for notice in due.notices}
                await self.store.run(NoticeFile.record, due, targets)
                self._notices.apply(due)
                self._courier.wake()
            return len(due.notices)

    async def acknowledge(self, notice: str, who: str) -> bool:
        """Send no more about the standing of this notice while it lasts. Return whether there is such a notice."""
        found = await self.store.run(NoticeFile.acknowledge, notice, who, self._clock())
        self._notices.acknowledge(notice)
        if found is not None:
            self._duty.tell([found])
        return found is not None

    async def mute(self, site: str, seconds: float, who: str) -> Mute:
        """Send nothing about a site for so long; 0 ends that."""
        now = self._clock()
        mute = await self.store.run(NoticeFile.mute, Mute(site, now + seconds, now, who))
        self._notices.mute(site, mute.until)
        self._duty.tell([mute])
        return mute

    async def close(self) -> None:
        """End. What is not delivered is, after the next start."""
        self._delivering.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._delivering
        await self.store.close()
