"""What the sites have used, sent to the ledger every second, which makes the history of it.

Only what has changed is sent. A ledger that does not read gets nothing more until it does, and then everything that has
changed since.

Tested by tests/promises/test_history.py.
"""

import asyncio
import math
import time
from collections.abc import Callable

from tlstunnel.processes.children import Child
from tlstunnel.processes.messages import Sampled
from tlstunnel.processes.totals import SiteTotals

SAMPLE_SECONDS = 1.0


class Feed:
    """Sends `totals` to the ledger that `find_ledger` returns, None if there is none, while there is a history."""

    def __init__(self, totals: SiteTotals, find_ledger: Callable[[], Child | None]) -> None:
        self._totals = totals
        self._find_ledger = find_ledger
        self._ledger: Child | None = None
        self._wanted = asyncio.Event()

    def want(self, *, history: bool) -> None:
        """Send from now on, or no more."""
        if history:
            self._wanted.set()
        else:
            self._wanted.clear()

    async def run(self) -> None:
        """Send every second, until cancelled."""
        while True:
            await self._wanted.wait()
            now = time.time()
            await asyncio.sleep(math.floor(now / SAMPLE_SECONDS + 1.0) * SAMPLE_SECONDS - now)
            self.send()

    def send(self) -> None:
        """Send now."""
        ledger = self._find_ledger()
        if ledger is None or not self._wanted.is_set() or ledger.silent or ledger.link.closed or not ledger.link.idle:
            return
        changes = self._totals.take_changes()
        whole = ledger is not self._ledger
        self._ledger = ledger
        sites = dict(self._totals.sites) if whole else changes
        ledger.link.notify(Sampled(time=time.time(), age=self._totals.age, sites=sites, whole=whole))

    def send_whole(self) -> None:
        """Send all sites the next time, because some exist no more."""
        self._ledger = None
