"""What is kept of an open tunnel besides its splice: its record, and what it returns at its end.

Tested by tests/promises/test_ending.py.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from tlstunnel.journal.journal import Journal
from tlstunnel.journal.record import Record
from tlstunnel.origins.place import Place
from tlstunnel.tunnel.splice import Splice

if TYPE_CHECKING:  # it imports libraries that most sites do not need
    from tlstunnel.firewall.rate_limits import Lease


class Expiry(Protocol):
    """The planned end of a tunnel at a Unix time."""

    until: float

    def cancel(self) -> None:
        """Forget it: the tunnel has ended."""


class OpenTunnel:
    """What is needed at the end of a tunnel, and to list it. Its turn and its client are freed: they have 1 KiB.

    `expiry` is its end at the time that the edge worker has set, None without one. `max_age` is the timer that ends it,
    if its site has one.
    """

    __slots__ = ("_journal", "_lease", "_on_end", "_place", "expiry", "max_age", "record")

    def __init__(
        self, record: Record, journal: Journal, lease: "Lease | None", place: Place | None, on_end: Callable[[], None]
    ) -> None:
        self.record = record
        self._journal = journal
        self._lease, self._place = lease, place
        self._on_end = on_end
        self.max_age: asyncio.TimerHandle | None = None
        self.expiry: Expiry | None = None

    def find_end(self) -> float | None:
        """Return the Unix time at which the tunnel will be ended, None if that is not planned."""
        until = self.expiry.until if self.expiry is not None else None
        if self.max_age is None:
            return until
        aged = time.time() + self.max_age.when() - time.monotonic()
        return aged if until is None else min(aged, until)

    def end(self, splice: Splice) -> None:
        """Write the record, and return what the tunnel held."""
        if self.max_age is not None:
            self.max_age.cancel()
        if self.expiry is not None:
            self.expiry.cancel()
        self.record.ended_by, self.record.reason = splice.ended_by, splice.reason
        self._journal.ended(self.record, splice.up, max(splice.down, 0))
        if self._lease is not None:
            self._lease.close()
        if self._place is not None:
            self._place.close()
        self._on_end()
