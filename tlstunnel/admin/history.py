"""The history for charts: at most so many points, each a part of the time, with gaps where nothing was sampled.

Tested by tests/unit/test_admin_history.py.
"""

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import msgspec

from tlstunnel.admin.checks import Unacceptable
from tlstunnel.errors import StateError
from tlstunnel.state.history.reader import HistoryReader, Usage
from tlstunnel.state.history.samples import MINUTE, NOTHING, Counts
from tlstunnel.state.history.store import HOURS, MINUTES, Resolution

Since = Literal["24h", "7d", "30d"]

SECONDS: dict[Since, int] = {"24h": 86_400, "7d": 7 * 86_400, "30d": 30 * 86_400}

MOST_POINTS = 1_440

MOST_WAITING = 8
"""Queries that wait for the thread. More are refused."""

KEEP_SECONDS = 20.0
"""How long a result is kept for the next who asks: the history has a new minute once a minute."""

MOST_KEPT = 64

STILL_WRITTEN = 62
"""So many of the latest minutes or hours may still change: an hour of minutes can wait to be written."""


class HistoryQuery(msgspec.Struct, frozen=True):
    """What is asked for: of a site, or of all together."""

    site: str = ""
    since: Since = "24h"
    points: int = 300


class HistoryPoint(msgspec.Struct, frozen=True):
    """A part of the time, which begins at `time`.

    `tunnels` is the mean of those open and `peak` the most, None in a gap. `refused` has the connections that ended
    without a tunnel, by kind. `cpu` is in seconds.
    """

    time: int
    tunnels: float | None = None
    peak: int | None = None
    handshakes: int | None = None
    refused: dict[str, int] | None = None
    up: int | None = None
    down: int | None = None
    cpu: float | None = None


class HistoryResult(msgspec.Struct, frozen=True, kw_only=True):
    """Points of `seconds` each, the oldest first."""

    now: float
    site: str
    since: Since
    seconds: int
    points: list[HistoryPoint]


class _AllSites:
    """The sums over all sites. Only what is new is read again: a day of a thousand sites takes a second."""

    def __init__(self, reader: HistoryReader) -> None:
        self._reader = reader
        self._known: dict[Resolution, dict[int, Usage]] = {MINUTES: {}, HOURS: {}}

    def read(self, resolution: Resolution, since: float, until: float) -> list[Usage]:
        """Return one value for each time. Raises StateError."""
        known, length = self._known[resolution], resolution.length * MINUTE
        # What is the latest may not have been complete, and is read again.
        latest = max((time for time, usage in known.items() if not usage.is_gap), default=0)
        begin = max(since, latest - STILL_WRITTEN * length) if known and min(known) <= since + length else since
        try:
            found = self._reader.read_sums(resolution, begin, until)
        except StateError:
            known.clear()
            raise
        known.update((usage.time, usage) for usage in found)
        for time_ in [one for one in known if not since <= one < until]:
            del known[time_]
        return [usage for _, usage in sorted(known.items())]


class Histories:
    """Answers queries from the history in `folder`, in a thread of its own."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "history")
        self._reader = HistoryReader(folder)
        self._all_sites = _AllSites(self._reader)
        self._waiting = 0
        self._kept: dict[HistoryQuery, HistoryResult] = {}

    async def read(self, query: HistoryQuery) -> HistoryResult:
        """Return the points. Raises Unacceptable."""
        if not 1 <= query.points <= MOST_POINTS:
            raise Unacceptable(400, f"points should be a number from 1 to {MOST_POINTS}")
        now = self._clock()
        kept = self._kept.get(query)
        if kept is not None and 0.0 <= now - kept.now < KEEP_SECONDS:
            return kept
        if self._waiting >= MOST_WAITING:
            raise Unacceptable(503, "too many queries of the history at once", headers={"Retry-After": "1"})
        self._waiting += 1
        try:
            result = await asyncio.get_running_loop().run_in_executor(
                self._thread, functools.partial(_read, self._reader, self._all_sites, query, now)
            )
        except StateError as error:
            raise Unacceptable(503, str(error)) from None
        finally:
            self._waiting -= 1
        self._kept.pop(query, None)
        self._kept[query] = result
        while len(self._kept) > MOST_KEPT:
            self._kept.pop(next(iter(self._kept)))
        return result

    def close(self) -> None:
        """Close the file, once the thread is done with it."""
        self._thread.submit(self._reader.close)
        self._thread.shutdown(wait=False)


def _read(reader: HistoryReader, all_sites: _AllSites, query: HistoryQuery, now: float) -> HistoryResult:
    resolution = _choose(query)
    length = resolution.length * MINUTE
    until = now
    since = until - SECONDS[query.since]
    if query.site:
        rows = list(reader.read_usage(query.site, resolution, since, until))
    else:
        rows = all_sites.read(resolution, since, until)
    if rows and rows[-1].is_gap:
        rows.pop()  # the minute or hour that is not over
    parts = -(-SECONDS[query.since] // length)
    size = max(-(-parts // query.points), 1)
    # Aligned, so that the points stay the same from one query to the next.
    first = rows[0].time // (size * length) * (size * length) if rows else 0
    groups: dict[int, list[Usage]] = {}
    for row in rows:
        groups.setdefault((row.time - first) // (size * length), []).append(row)
    points = [_merge(first + number * size * length, group) for number, group in sorted(groups.items())]
    return HistoryResult(
        now=now, site=query.site, since=query.since, seconds=size * length, points=points[-query.points :]
    )


def _choose(query: HistoryQuery) -> Resolution:
    return MINUTES if query.since == "24h" else HOURS


def _merge(time_: int, rows: Sequence[Usage]) -> HistoryPoint:
    sampled = [row for row in rows if row.level is not None]
    if not sampled:
        return HistoryPoint(time_)
    samples = sum(row.samples for row in sampled)
    levels = [(row.level, row.samples) for row in sampled if row.level is not None]
    counts = NOTHING
    for row in sampled:
        counts = Counts(*(one + other for one, other in zip(counts, row.counts, strict=True)))
    named = counts._asdict()
    kinds = ("unfinished", "invalid", "blocked", "limited", "worker", "origin", "declined")
    return HistoryPoint(
        time=time_,
        tunnels=round(sum(level.mean * weight for level, weight in levels) / samples, 2),
        peak=max(level.peak for level, _ in levels),
        handshakes=named["handshakes"],
        refused={kind: named[kind] for kind in kinds},
        up=named["bytes_up"],
        down=named["bytes_down"],
        cpu=round(named["cpu"] / 1e6, 3),
    )
