"""Reports once a minute to the parent what a serving process sees of its connections.

Tested by tests/promises/test_plans.py.
"""

import asyncio
import time
from collections.abc import Collection

from tlstunnel.journal.journal import Journal
from tlstunnel.plans.observer import Observer
from tlstunnel.processes.link import Link
from tlstunnel.processes.messages import Seen

MINUTE = 60.0
"""Minutes of the clock, so that those of all processes, and of the history, are the same."""


class Observing:
    """Observes the connections in `journal` for the parent, once it has asked for that."""

    def __init__(self, journal: Journal, link: Link) -> None:
        self._journal = journal
        self._link = link
        self._observer: Observer | None = None
        self._timer: asyncio.TimerHandle | None = None

    def configure(self, key: bytes, sites: Collection[str]) -> None:
        """Observe these sites from now on."""
        if not sites:
            self.close()
        elif self._observer is None or self._observer.key != key:
            self._observer = self._journal.observer = Observer(key, sites)
        else:
            self._observer.configure(sites)
        if self._observer is not None and self._timer is None:
            self._wait()

    def close(self) -> None:
        """Observe nothing any more."""
        self._observer = self._journal.observer = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def report(self) -> None:
        """Report what was seen since the last time, if there is anything."""
        if self._observer is not None and (seen := self._observer.take()):
            self._link.notify(Seen(sites=seen))

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(MINUTE - time.time() % MINUTE, self._handle_minute)

    def _handle_minute(self) -> None:
        # A parent that reads nothing gets what is then the last minute: it must not pile up.
        if self._link.idle:
            self.report()
        self._wait()
