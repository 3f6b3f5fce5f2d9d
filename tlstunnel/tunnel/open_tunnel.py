"""What is kept of an open tunnel besides its splice: its record, and what it returns at its end.

Tested by tests/promises/test_ending.py.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tlstunnel.journal.journal import Journal
from tlstunnel.journal.record import Record
from tlstunnel.origins.place import Place
from tlstunnel.tunnel.splice import Splice

if TYPE_CHECKING:  # it imports libraries that most sites do not need
    from tlstunnel.firewall.rate_limits import Lease


class OpenTunnel:
    """What is needed at the end of a tunnel, and to list it. Its turn and its client are freed: they have 1 KiB.

    `until` is the Unix time at which the edge worker wants it to end. `max_age` is the timer that ends it, if its site
    has one.
    """

    __slots__ = ("_journal", "_lease", "_on_end", "_place", "max_age", "record", "until")

    def __init__(
        self, record: Record, journal: Journal, lease: "Lease | None", place: Place | None, on_end: Callable[[], None]
    ) -> None:
        self.record = record
        self._journal = journal
        self._lease, self._place = lease, place
        self._on_end = on_end
        self.max_age: asyncio.TimerHandle | None = None
        self.until: float | None = None

    def find_end(self) -> float | None:
        """Return the Unix time at which the tunnel will be ended, None if that is not planned."""
        if self.max_age is None:
            return self.until
        aged = time.time() + self.max_age.when() - time.monotonic()
        return aged if self.until is None else min(aged, self.until)

    def end(self, splice: Splice) -> None:
        """Write the record, and return what the tunnel held."""
        if self.max_age is not None:
            self.max_age.cancel()
        self.record.ended_by, self.record.reason = splice.ended_by, splice.reason
        self._journal.ended(self.record, splice.up, max(splice.down, 0))
        if self._lease is not None:
            self._lease.close()
        if self._place is not None:
            self._place.close()
        self._on_end()
