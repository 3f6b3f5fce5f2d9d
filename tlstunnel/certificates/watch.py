"""Renew certificates while they are served: check their files regularly, and read them when they have changed."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from tlstunnel.certificates.store import Certificates, FileChange, Source
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog

ROUND_SECONDS = 2.0
"""Seconds in which every file is checked once, unless there are very many."""

SOURCES_A_SECOND = 2000
"""Pairs that are checked in a second at most: ten thousand in 5 s, which takes 2 % of a core (9 us for two files)."""

SOURCES_AT_ONCE = 250
"""Pairs that are checked without a pause: two milliseconds of the thread."""

DAY = 86_400.0
"""Seconds between two warnings of the same certificate."""

HOUR = 3600.0
"""Seconds between two looks for what expires soon: the notice of a certificate of one day is four hours."""

MAX_WARNINGS = 100
"""Warnings that are logged one by one; of the rest only the number is logged."""


class Watch:
    """Serves what is in the files, on the running loop, from `start` to `close`.

    Errors in files are logged, and the previous certificate is still served. With `quiet`, the days that certificates
    have left are not logged, because another process does so for the same files.
    """

    def __init__(self, certificates: Certificates, *, quiet: bool = False) -> None:
        self._certificates = certificates
        self._quiet = quiet
        self._log = structlog.get_logger()
        # A thread of its own: a file system that hangs must block neither the tunnels nor the resolver.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="certificates")
        self._task: asyncio.Task[None] | None = None
        self._warned: set[str] = set()

    def start(self) -> None:
        """Start checking, and log how many days the certificates have left."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    def switch_to(self, certificates: Certificates) -> None:
        """Watch another store from now on, and discard the contexts that it does not use."""
        self._certificates = certificates
        certificates.activate()
        for complaint in certificates.complaints():
            self._log_refusal(complaint)
        self.log_expiry(datetime.now(UTC))

    async def close(self) -> None:
        """Stop checking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def check(self, sources: Sequence[Source[Any]]) -> None:
        """Check the files of `sources` once, and serve what is new in them."""
        certificates = self._certificates
        changes = await asyncio.get_running_loop().run_in_executor(self._thread, _check_all, sources)
        for change in changes if certificates is self._certificates else ():
            replaced, complaint = change.source.apply(change)
            if complaint:
                self._log_refusal(complaint)
            elif replaced:
                certificates.apply_renewal(change.source)
                self._log.info(
                    Event.CERTIFICATE_REPLACED, detail=change.source.value.describe_renewal(datetime.now(UTC))
                )
                self._warn([change.source.value.find_warning(datetime.now(UTC))])

    def log_expiry(self, now: datetime) -> None:
        """Log how many days are left, and warn of what is not valid or expires soon."""
        if self._quiet:
            return
        pairs = list(self._certificates.pairs())
        if pairs:
            first = min(pairs, key=lambda pair: pair.validity.end)
            self._log.info(Event.CERTIFICATES, count=len(pairs), first=str(first.cert), days_left=first.days_left(now))
        self.warn_of_expiry(now)

    def warn_of_expiry(self, now: datetime) -> None:
        """Warn of what is not valid or expires soon, once a day each."""
        if not self._quiet:
            self._warn(self._certificates.warnings(now))

    async def _run(self) -> None:
        logged_at = warned_at = -DAY
        while True:
            now = time.monotonic()
            if now - logged_at >= DAY:
                logged_at = warned_at = now
                self._warned.clear()
                self.log_expiry(datetime.now(UTC))
            elif now - warned_at >= HOUR:
                warned_at = now
                self.warn_of_expiry(datetime.now(UTC))
            try:
                await self._round()
            except Exception:
                self._log.exception(Event.CERTIFICATE_CHECK_FAILED)
                await asyncio.sleep(ROUND_SECONDS)

    async def _round(self) -> None:
        """Check all sources, spread evenly over the time."""
        certificates = self._certificates
        sources = list(certificates.sources())
        if not sources:
            return await asyncio.sleep(ROUND_SECONDS)
        seconds = max(ROUND_SECONDS, len(sources) / SOURCES_A_SECOND)
        for first in range(0, len(sources), SOURCES_AT_ONCE):
            some = sources[first : first + SOURCES_AT_ONCE]
            await asyncio.sleep(seconds * len(some) / len(sources))
            if certificates is not self._certificates:
                return
            await self.check(some)

    def _log_refusal(self, complaint: str) -> None:
        self._log.warning(Event.CERTIFICATE_NOT_REPLACED, reason=complaint, hint="the previous one is still served")

    def _warn(self, warnings: Sequence[str | None]) -> None:
        new = [warning for warning in warnings if warning and warning not in self._warned]
        self._warned.update(new)
        for warning in new[:MAX_WARNINGS]:
            self._log.warning(Event.CERTIFICATE_WARNING, reason=warning)
        if len(new) > MAX_WARNINGS:
            self._log.warning(Event.CERTIFICATE_WARNING, reason=f"{len(new) - MAX_WARNINGS} more of these warnings")


def _check_all(sources: Sequence[Source[Any]]) -> list[FileChange[Any]]:
    """Find changed files and read them. This may take time, so it runs in a thread, and it modifies nothing."""
    return [change for source in sources if (change := source.check()) is not None]
