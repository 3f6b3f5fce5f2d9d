"""Sends records of connections that have ended to the parent, while they are watched.

While they are not, it costs nothing. What a slow parent does not take is left out and counted.

Tested by tests/unit/test_processes_recording.py.
"""

import asyncio
import time
from typing import Any

from tlstunnel.commands.records import Watched, WatchRecords
from tlstunnel.journal.events import Event
from tlstunnel.journal.journal import Journal
from tlstunnel.journal.record import Record
from tlstunnel.processes.link import Link
from tlstunnel.processes.messages import Recorded

BATCH_SECONDS = 0.5

MOST_SECONDS = 60.0
"""How long records are sent at most, unless they are asked for again."""

MOST_RECORDS = 500
"""Records per second, at most: 50 us of CPU each."""


class Recording:
    """Sends the records of `journal` over `link`, for a while after each command."""

    def __init__(self, journal: Journal, link: Link) -> None:
        self._journal = journal
        self._link = link
        self._until = 0.0
        self._limit = 0
        self._records: list[dict[str, Any]] = []
        self._left_out = 0
        self._timer: asyncio.TimerHandle | None = None

    async def watch(self, command: WatchRecords, _: str) -> Watched:
        """Send records from now on."""
        loop = asyncio.get_running_loop()
        self._until = loop.time() + min(max(command.seconds, 0.0), MOST_SECONDS)
        self._limit = max(round(min(max(command.limit, 1), MOST_RECORDS) * BATCH_SECONDS), 1)
        if self._timer is None:
            self._journal.listeners.append(self._take)
            self._timer = loop.call_later(BATCH_SECONDS, self._send)
        return Watched(1)

    def close(self) -> None:
        """Send no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._journal.listeners.remove(self._take)
        self._records, self._left_out = [], 0

    def _take(self, event: Event, record: Record) -> None:
        if len(self._records) >= self._limit:
            self._left_out += 1
            return
        facts = record.all_facts(self._journal.style.show)
        self._records.append({"event": str(event), "at": round(time.time(), 3), **facts})

    def _send(self) -> None:
        loop = asyncio.get_running_loop()
        if (self._records or self._left_out) and self._link.idle:
            self._link.notify(Recorded(records=self._records, left_out=self._left_out))
            self._records, self._left_out = [], 0
        if loop.time() >= self._until:
            self.close()
        else:
            self._timer = loop.call_later(BATCH_SECONDS, self._send)
