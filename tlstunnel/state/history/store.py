"""What a minute changes in the file: rows of each resolution, percentiles, and the end of what is too old.

Hours and days are added up minute by minute, so they are never late, and a restart finds nothing to catch up on. The
clock may jump: a row belongs to the time it was sampled at, and what is old is deleted a little at a time.
"""

import sqlite3
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from tlstunnel.state.history.database import MAX_SITES, transaction
from tlstunnel.state.history.samples import MAX_ABSENT, Counts, Minute, SiteMinute

HOUR = 60
DAY = 1440
"""Minutes."""

PERCENT = 95
"""The percentile of a day: the level of tunnels that all but 72 of its minutes stay below or at."""

SITES_AT_ONCE = 100
"""Sites whose percentiles are computed in one transaction, which takes some 0.3 s and runs outside of Python's lock."""


@dataclass(frozen=True, slots=True)
class Keep:
    """How many minutes, hours and days are kept: a day, 60 days and 400 days.

    Raises ValueError if a resolution is kept for less time than the next finer one. Minutes are kept for a day at
    least, since the day's percentile is computed from them.
    """

    minutes: int = DAY
    hours: int = 60 * 24
    days: int = 400

    def __post_init__(self) -> None:
        if not DAY <= self.minutes <= self.hours * HOUR <= self.days * DAY:
            raise ValueError(f"must be kept for a day or more, and each at least as long as the one before: {self}")


@dataclass(frozen=True, slots=True)
class Resolution:
    """One kind of row. `length` is in minutes. At most `most_deleted` of them are deleted for each stored minute."""

    table: str
    length: int
    most_deleted: int


# If a clock is wrong by years for a minute, no more than these are lost. Twice as many minutes are deleted as are
# added, so those of a machine that was off are soon gone.
MINUTES = Resolution("minutes", 1, 2)
HOURS = Resolution("hours", HOUR, 1)
DAYS = Resolution("days", DAY, 1)
RESOLUTIONS = (MINUTES, HOURS, DAYS)

_Values = tuple[int | str | bytes, ...]


def _make_upsert(table: str) -> str:
    sums = ", ".join(f"{name} = {name} + excluded.{name}" for name in ("tunnels", *Counts._fields))
    names = ", ".join(("key", "peak", "tunnels", *Counts._fields))
    values = ", ".join("?" * (3 + len(Counts._fields)))
    return (
        f"INSERT INTO site_{table} ({names}) VALUES ({values})"  # noqa: S608 - names of ours
        f" ON CONFLICT (key) DO UPDATE SET peak = max(peak, excluded.peak), {sums}"
    )


_UPSERTS = {one: _make_upsert(one.table) for one in RESOLUTIONS}

_PERCENTILE = f"""
    UPDATE site_days SET p95 = coalesce((
        SELECT CAST(row.tunnels AS REAL) / minutes.samples AS level
        FROM minutes CROSS JOIN site_minutes AS row ON row.key = minutes.time * {MAX_SITES} + :site
        WHERE minutes.time >= :first AND minutes.time < :end ORDER BY level DESC LIMIT 1 OFFSET :higher
    ), 0)
    WHERE key = :day * {MAX_SITES} + :site
"""  # noqa: S608 - a number of ours


class Store:
    """Writes minutes through one connection. After an error, nothing of the transaction is stored."""

    def __init__(self, connection: sqlite3.Connection, keep: Keep) -> None:
        self.connection = connection
        self._keep = keep
        self._sites: dict[str, tuple[int, int]] = {}  # id and last day
        self._hour: int | None = None
        self._load_sites()

    def read_positions(self) -> dict[str, dict[str, Counts]]:
        """Return the totals up to which the stored rows count, of each instance and site."""
        decoder = msgspec.msgpack.Decoder(dict[str, Counts])
        rows = self.connection.execute("SELECT name, positions FROM instances ORDER BY rowid")
        return {name: decoder.decode(positions) for name, positions in rows}

    def read_last_minute(self) -> int | None:
        """Return the number of the last minute, None if there is none."""
        last: int | None = self.connection.execute("SELECT max(time) FROM minutes").fetchone()[0]
        return last

    def write(self, minutes: Sequence[Minute]) -> None:
        """Store these minutes, all or none. Durable when it returns."""
        try:
            with transaction(self.connection):
                for minute in minutes:
                    self._add(minute)
                self._write_positions({name: sites for minute in minutes for name, sites in minute.positions.items()})
        except BaseException:
            self._load_sites()
            raise

    def tidy(self, minutes: Sequence[Minute]) -> None:
        """Do what these minutes make due after they are stored: percentiles, and the end of old rows."""
        newest = minutes[-1].time
        if newest // HOUR != self._hour:
            self._update_percentiles()
            self._hour = newest // HOUR
        with transaction(self.connection):
            for one in RESOLUTIONS:
                self._delete_old(one, newest, one.most_deleted * len(minutes))

    def _update_percentiles(self) -> None:
        """Compute the percentiles of the days that have new samples.

        They are exact for a day whose minutes are all there, and stay as they are for one whose first are deleted.
        """
        query = """
            SELECT time, samples FROM days WHERE p95_samples != samples AND samples = (
                SELECT sum(samples) FROM minutes
                WHERE minutes.time >= days.time * :day AND minutes.time < (days.time + 1) * :day
            )
        """
        for day, samples in self.connection.execute(query, {"day": DAY}).fetchall():
            self._update_day(day, samples)

    def _update_day(self, day: int, samples: int) -> None:
        first, end = day * DAY, (day + 1) * DAY
        query = "SELECT time FROM minutes WHERE time >= ? AND time < ? ORDER BY time"
        times = [time for (time,) in self.connection.execute(query, (first, end))]
        query = f"SELECT id, since FROM sites JOIN site_days ON key = ? * {MAX_SITES} + id"  # noqa: S608 - a number
        all_values = []
        for site, since in self.connection.execute(query, (day,)):
            number = len(times) - bisect_left(times, since)
            higher = number * (100 - PERCENT) // 100
            all_values.append({"day": day, "site": site, "first": first, "end": end, "higher": higher})
        for place in range(0, len(all_values), SITES_AT_ONCE):
            with transaction(self.connection):
                self.connection.executemany(_PERCENTILE, all_values[place : place + SITES_AT_ONCE])
        with transaction(self.connection):
            self.connection.execute("UPDATE days SET p95_samples = ? WHERE time = ?", (samples, day))

    def _add(self, minute: Minute) -> None:
        ids = [self._find_site(row.site, minute.time) for row in minute.sites]
        rows = [(number, row) for number, row in zip(ids, minute.sites, strict=True) if not row.idle]
        for one in RESOLUTIONS:
            time = minute.time // one.length
            self.connection.execute(
                f"INSERT INTO {one.table} (time, samples) VALUES (?, ?)"  # noqa: S608 - names of ours
                " ON CONFLICT (time) DO UPDATE SET samples = samples + excluded.samples",
                (time, minute.samples),
            )
            self.connection.executemany(_UPSERTS[one], [_to_values(time, number, row) for number, row in rows])

    def _find_site(self, name: str, time: int) -> int:
        """Return the number of a site, and note on which day it was last sampled."""
        day = time // DAY
        number, last_day = self._sites.get(name, (0, 0))
        if not number:
            statement = "INSERT INTO sites (name, since, last_day) VALUES (?, ?, ?)"
            number = self.connection.execute(statement, (name, time, day)).lastrowid or 0
            if number >= MAX_SITES:
                raise ValueError(f"more than {MAX_SITES} sites")
        elif last_day < day:
            self.connection.execute("UPDATE sites SET last_day = ? WHERE id = ?", (day, number))
        else:
            return number
        self._sites[name] = number, day
        return number

    def _delete_old(self, one: Resolution, newest: int, most: int) -> None:
        kept: int = getattr(self._keep, one.table)
        query = f"SELECT time FROM {one.table} WHERE time < ? ORDER BY time LIMIT ?"  # noqa: S608 - names of ours
        old = self.connection.execute(query, (newest // one.length - kept, most)).fetchall()
        keys = [(time * MAX_SITES, (time + 1) * MAX_SITES) for (time,) in old]
        self.connection.executemany(f"DELETE FROM site_{one.table} WHERE key >= ? AND key < ?", keys)  # noqa: S608
        self.connection.executemany(f"DELETE FROM {one.table} WHERE time = ?", old)  # noqa: S608
        if old and one is DAYS:
            self._delete_sites()

    def _delete_sites(self) -> None:
        """Forget the sites that have no row left, since all rows are newer than their last day."""
        self.connection.execute("""
            DELETE FROM sites WHERE last_day < min(
                (SELECT min(time) FROM days),
                (SELECT min(time) / 24 FROM hours),
                (SELECT min(time) / 1440 FROM minutes)
            )
        """)
        self._load_sites()

    def _write_positions(self, positions: Mapping[str, Mapping[str, Counts]]) -> None:
        for name, sites in positions.items():
            self.connection.execute(
                "INSERT OR REPLACE INTO instances (name, positions) VALUES (?, ?)",
                (name, msgspec.msgpack.encode(sites)),
            )
        self.connection.execute(
            "DELETE FROM instances WHERE rowid NOT IN (SELECT rowid FROM instances ORDER BY rowid DESC LIMIT ?)",
            (MAX_ABSENT + len(positions),),
        )

    def _load_sites(self) -> None:
        rows = self.connection.execute("SELECT name, id, last_day FROM sites")
        self._sites = {name: (number, day) for name, number, day in rows}


def _to_values(time: int, site: int, row: SiteMinute) -> _Values:
    return (time * MAX_SITES + site, row.peak, row.tunnels, *row.counts)
