"""What a site used in one step, ready to be printed or exported: what was measured, and what was not.

Tested by tests/unit/test_cli_usage.py.
"""

from collections.abc import Iterator, Sequence

import msgspec

from tlstunnel.state.history.reader import Usage
from tlstunnel.state.history.samples import MINUTE, Counts

SETTLE_SECONDS = 65
"""How old a second is at most until it is in the history: its minute has to be over, and written."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A step of `seconds` from `time` on, of which so many were `measured`, and the others are the `gap`.

    There is one sample per second. `seconds` of the present step are those that have passed. A step that is all gap has
    no `peak` and no `mean`, and only days have a `p95`.
    """

    time: int
    seconds: int
    measured: int
    gap: int
    peak: int | None
    mean: float | None
    p95: float | None
    counts: Counts

    @property
    def refused(self) -> int:
        """Requests that got no tunnel."""
        counts = self.counts
        return counts.invalid + counts.blocked + counts.limited + counts.worker + counts.origin + counts.declined


def make_rows(usages: Sequence[Usage], since: int | None, now: float) -> Iterator[Row]:
    """Return a row for each step that has begun. `since` is the minute in which the site was first sampled.

    Nothing is known about how much of this minute was before it, so that is no gap.
    """
    for usage in usages:
        begin = usage.time if since is None or since < usage.time else since + MINUTE
        end = min(usage.time + usage.seconds, int(now - SETTLE_SECONDS))
        seconds = max(end - begin, min(usage.samples, usage.seconds), 0)
        measured = min(usage.samples, seconds)
        level = usage.level
        if not seconds and level is None:
            continue
        yield Row(
            time=usage.time,
            seconds=seconds,
            measured=measured,
            gap=seconds - measured,
            peak=level.peak if level is not None else None,
            mean=level.mean if level is not None else None,
            p95=level.p95 if level is not None else None,
            counts=usage.counts,
        )
