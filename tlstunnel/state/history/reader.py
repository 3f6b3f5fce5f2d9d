"""Queries of the history, for any process but the one that writes it. They block, so they are for a thread.

Each is one short transaction on a connection that cannot write: it keeps no lock that would stop the writer. Times are
Unix times in seconds. Hours and days are those of UTC.
"""

import contextlib
import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from tlstunnel.errors import StateError
from tlstunnel.state.history.database import FILE_NAME, HISTORY, MAX_SITES, describe_damage, is_damage, open_for_reading
from tlstunnel.state.history.samples import MINUTE, NOTHING, Counts
from tlstunnel.state.history.store import DAYS, MINUTES, Resolution


class Site(msgspec.Struct, frozen=True):
    """A site in the history. `since` is when it was first sampled."""

    name: str
    since: int


class Level(msgspec.Struct, frozen=True):
    """The open tunnels of a site over a time: the most in one sample, and the mean of all samples.

    `p95` is that of the means of a day's minutes, and only in days: their 95th percentile (nearest rank), as of the
    last full hour for a day that is not over. None if the day's minutes were not all there to compute it from.
    """

    peak: int
    mean: float
    p95: float | None = None


class Usage(msgspec.Struct, frozen=True):
    """A site's usage of `seconds` from `time` on, by so many `samples`. Where there are none, it is a gap.

    A gap has no `level`. It has no counts either, since what was counted in it is in the first minute after it.
    """

    time: int
    seconds: int
    samples: int
    level: Level | None
    counts: Counts

    @property
    def is_gap(self) -> bool:
        """Whether nothing was sampled, or the site did not exist yet."""
        return self.level is None


class Levels(msgspec.Struct, frozen=True):
    """The levels of all sites, at the same times, each of which is `seconds` long. None is a gap."""

    times: tuple[int, ...]
    seconds: int
    sites: dict[str, tuple[Level | None, ...]]


_COUNTS = ", ".join(f"row.{name}" for name in Counts._fields)
_SUMS = ", ".join(f"sum(row.{name})" for name in Counts._fields)


class HistoryReader:
    """Reads the history in a state folder. For one thread at a time.

    Every method raises StateError if there is no file, or none that can be read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._connection: sqlite3.Connection | None = None
        self._identity = (0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Another query opens it again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def read_sites(self) -> tuple[Site, ...]:
        """Return all sites in the history, also those that are no longer configured, by name."""
        with self._reading() as connection:
            rows = connection.execute("SELECT name, since FROM sites ORDER BY name").fetchall()
        return tuple(Site(name, since * MINUTE) for name, since in rows)

    def read_usage(self, site: str, resolution: Resolution, since: float, until: float) -> tuple[Usage, ...]:
        """Return a site's usage: one value for each minute, hour or day that begins in this time, gaps included.

        An unknown site has only gaps.
        """
        seconds = resolution.length * MINUTE
        times = _find_times(resolution, since, until)
        p95 = "row.p95" if resolution is DAYS else "NULL"
        query = f"""
            SELECT measured.time, measured.samples, coalesce(row.peak, 0), coalesce(row.tunnels, 0), {p95}, {_COUNTS}
            FROM sites CROSS JOIN {resolution.table} AS measured
            LEFT JOIN site_{resolution.table} AS row ON row.key = measured.time * {MAX_SITES} + sites.id
            WHERE sites.name = ? AND measured.time >= ? AND measured.time < ?
            AND (measured.time >= sites.since / ? OR row.key IS NOT NULL)
        """  # noqa: S608 - names of ours
        with self._reading() as connection:
            rows = connection.execute(query, (site, times.start, times.stop, resolution.length)).fetchall()
        found = {row[0]: row for row in rows}
        return tuple(_to_usage(time, seconds, found.get(time), resolution is DAYS) for time in times)

    def read_sums(self, resolution: Resolution, since: float, until: float) -> tuple[Usage, ...]:
        """Return the usage of all sites together: one value for each time, as `read_usage` does for one site.

        How many tunnels of all sites were open at most is not kept: `peak` is the mean, rounded up.
        """
        seconds = resolution.length * MINUTE
        times = _find_times(resolution, since, until)
        table = resolution.table
        sums = _SUMS.replace("row.", "")
        with self._reading() as connection:
            _, measured = _read_sampled(connection, table, times)
            query = f"""
                SELECT key / {MAX_SITES}, sum(tunnels), {sums} FROM site_{table}
                WHERE key >= ? AND key < ? GROUP BY key / {MAX_SITES}
            """  # noqa: S608 - names of ours
            rows = connection.execute(query, (times.start * MAX_SITES, times.stop * MAX_SITES)).fetchall()
        samples = dict(measured)
        found = {row[0]: row[1:] for row in rows}
        usages = []
        for time in times:
            tunnels, *counts = found.get(time, (0, *NOTHING))
            sampled = samples.get(time, 0)
            level = Level(math.ceil(tunnels / sampled), tunnels / sampled) if sampled else None
            usages.append(Usage(time * seconds, seconds, sampled, level, Counts(*counts) if sampled else NOTHING))
        return tuple(usages)

    def read_totals(self, resolution: Resolution, since: float, until: float) -> dict[str, Usage]:
        """Return each site's usage of this time as a whole, from the rows of one resolution.

        Sites that did not exist in it are left out; a site that began in it has only the samples since then. If nothing
        was sampled at all, every site has a gap.
        """
        times = _find_times(resolution, since, until)
        begins = times.start * resolution.length * MINUTE
        seconds = len(times) * resolution.length * MINUTE
        table = resolution.table
        with self._reading() as connection:
            sites, measured = _read_sampled(connection, table, times)
            # Site by site, so that nothing has to be sorted.
            query = f"""
                SELECT sites.id, max(row.peak), sum(row.tunnels), min(measured.time), {_SUMS}
                FROM sites CROSS JOIN {table} AS measured
                CROSS JOIN site_{table} AS row ON row.key = measured.time * {MAX_SITES} + sites.id
                WHERE measured.time >= ? AND measured.time < ? GROUP BY sites.id
            """  # noqa: S608 - names of ours
            rows = {row[0]: row[1:] for row in connection.execute(query, (times.start, times.stop))}
        samples = _SamplesSince(measured)
        found = {}
        for number, name, minute in sites:
            peak, tunnels, first, *counts = rows.get(number, (0, 0, times.stop, *NOTHING))
            began = min(minute // resolution.length, first)
            if began < times.stop:
                sampled = samples.count(began)
                level = Level(peak, tunnels / sampled) if sampled else None
                found[name] = Usage(begins, seconds, sampled, level, Counts(*counts))
        return found

    def read_levels(self, resolution: Resolution, since: float, until: float) -> Levels:
        """Return the levels of all sites in this time, for each minute, hour or day that begins in it."""
        times = _find_times(resolution, since, until)
        table = resolution.table
        p95 = "p95" if resolution is DAYS else "NULL"
        with self._reading() as connection:
            sites, measured = _read_sampled(connection, table, times)
            rows = connection.execute(
                f"SELECT key, peak, tunnels, {p95} FROM site_{table} WHERE key >= ? AND key < ?",  # noqa: S608
                (times.start * MAX_SITES, times.stop * MAX_SITES),
            ).fetchall()
        samples = dict(measured)
        idle = Level(0, 0.0, 0.0 if resolution is DAYS else None)
        everywhere: list[Level | None] = [idle if time in samples else None for time in times]
        found: dict[int, list[Level | None]] = {}
        for number, _, minute in sites:
            first = min(max(minute // resolution.length - times.start, 0), len(times))
            found[number] = [*[None] * first, *everywhere[first:]]
        for key, peak, tunnels, percentile in rows:
            time, number = divmod(key, MAX_SITES)
            found[number][time - times.start] = Level(peak, tunnels / samples[time], percentile)
        seconds = resolution.length * MINUTE
        return Levels(
            tuple(time * seconds for time in times), seconds, {name: tuple(found[number]) for number, name, _ in sites}
        )

    def read_begin(self, resolution: Resolution) -> int | None:
        """Return when the first minute, hour or day that is kept began; None if there is none."""
        with self._reading() as connection:
            row = connection.execute(f"SELECT min(time) FROM {resolution.table}").fetchone()  # noqa: S608 - names of ours
        return None if row[0] is None else row[0] * resolution.length * MINUTE

    def read_percentile(self, site: str, since: float, until: float, percent: int = 95) -> float | None:
        """Return this percentile of the means of a site's minutes: the nearest rank. None if there is no minute."""
        times = _find_times(MINUTES, since, until)
        query = f"""
            SELECT coalesce(CAST(row.tunnels AS REAL) / minutes.samples, 0) AS level
            FROM sites CROSS JOIN minutes
            LEFT JOIN site_minutes AS row ON row.key = minutes.time * {MAX_SITES} + sites.id
            WHERE sites.name = ? AND minutes.time >= ? AND minutes.time < ?
            AND (minutes.time >= sites.since OR row.key IS NOT NULL)
            ORDER BY level DESC
        """  # noqa: S608 - a number of ours
        with self._reading() as connection:
            levels = connection.execute(query, (site, times.start, times.stop)).fetchall()
        level: float | None = levels[len(levels) * (100 - percent) // 100][0] if levels else None
        return level

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Begin a short transaction, in which the file does not change."""
        try:
            connection = self._find_connection()
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            self.close()
            if is_damage(error):
                raise describe_damage(self.path, str(error)) from error
            raise StateError(f"{self.path}: cannot be read: {error}") from error

    def _find_connection(self) -> sqlite3.Connection:
        """Return the connection to the file that is there now: it may have been moved away."""
        try:
            status = self.path.stat()
            identity = status.st_dev, status.st_ino
        except OSError:
            identity = 0, 0
        if self._connection is None or identity != self._identity:
            self.close()
            self._connection = open_for_reading(self.path, HISTORY)
            self._identity = identity
        return self._connection


class _SamplesSince:
    """The sums of samples from a time on."""

    def __init__(self, measured: list[tuple[int, int]]) -> None:
        self._measured = measured
        self._known: dict[int, int] = {}

    def count(self, first: int) -> int:
        """Return the samples of this time and later. Most sites share the first time: the begin of all."""
        first = max(first, self._measured[0][0]) if self._measured else first
        if first not in self._known:
            self._known[first] = sum(samples for time, samples in self._measured if time >= first)
        return self._known[first]


def _read_sampled(
    connection: sqlite3.Connection, table: str, times: range
) -> tuple[list[tuple[int, str, int]], list[tuple[int, int]]]:
    """Return all sites by name, each with its id and its first minute, and the samples of each of these times."""
    sites = connection.execute("SELECT id, name, since FROM sites ORDER BY name").fetchall()
    measured = connection.execute(
        f"SELECT time, samples FROM {table} WHERE time >= ? AND time < ?",  # noqa: S608 - names of ours
        (times.start, times.stop),
    ).fetchall()
    return sites, measured


def _find_times(resolution: Resolution, since: float, until: float) -> range:
    """Return the numbers of the minutes, hours or days that begin from `since` on and before `until`."""
    seconds = resolution.length * MINUTE
    return range(-int(-since // seconds), -int(-until // seconds))


def _to_usage(time: int, seconds: int, row: tuple[Any, ...] | None, days: bool) -> Usage:
    if row is None:
        return Usage(time * seconds, seconds, 0, None, NOTHING)
    _, samples, peak, tunnels, p95, *counts = row
    idle = counts[0] is None
    level = Level(peak, tunnels / samples, 0.0 if idle and days else p95)
    return Usage(time * seconds, seconds, samples, level, NOTHING if idle else Counts(*counts))
