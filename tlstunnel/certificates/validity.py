"""Periods of validity, of certificates and of revocation lists, and when the end of one deserves a warning."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

MARGIN = timedelta(days=1)
"""ACME clients renew when a third of the lifetime is left, and look once or twice a day."""

MAX_NOTICE = timedelta(days=21)
"""Notice of what lives for months. Let's Encrypt used to send its first mail about a 90-day certificate this early."""


@dataclass(frozen=True, slots=True)
class Validity:
    """A period, from ``begin`` to ``end``; both are aware."""

    begin: datetime
    end: datetime

    @property
    def notice(self) -> timedelta:
        """How long before its end a warning is due: a third of the lifetime, less a margin for the renewal.

        The margin is a day, and for lifetimes of less than six days half of that third. At most 21 days.
        """
        third = (self.end - self.begin) / 3
        return min(third - min(MARGIN, third / 2), MAX_NOTICE)

    def is_current(self, now: datetime) -> bool:
        """Return whether ``now`` is within the period."""
        return self.begin <= now <= self.end

    def is_ending(self, now: datetime) -> bool:
        """Return whether it is late enough for a warning, or over."""
        return now > self.end - self.notice


def find_outdated(what: str, validities: Sequence[Validity], now: datetime) -> str | None:
    """Return a sentence about the first that is not current, None if all are. ``what`` is such as ``an authority``."""
    for one in validities:
        if now < one.begin:
            return f"{what} is not valid before {one.begin:%Y-%m-%d %H:%M} UTC"
        if now > one.end:
            return f"{what} expired on {one.end:%Y-%m-%d %H:%M} UTC"
    return None


def find_ending(what: str, validities: Sequence[Validity], now: datetime) -> str | None:
    """Return a sentence about the first that ends soon, None if none does."""
    for one in validities:
        if one.is_ending(now):
            return f"{what} expires on {one.end:%Y-%m-%d %H:%M} UTC"
    return None
