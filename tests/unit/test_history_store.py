"""Rows of each resolution beside plain sums, percentiles, and the end of what is old, wherever the clock jumps."""

import contextlib
import random
import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.state.history.database import HISTORY, open_for_writing
from tlstunnel.state.history.reader import HistoryReader, Usage
from tlstunnel.state.history.samples import MAX_ABSENT, MINUTE, NOTHING, Counts, Minute, SiteMinute, add_counts
from tlstunnel.state.history.store import DAY, DAYS, HOUR, HOURS, MINUTES, RESOLUTIONS, Keep, Store

START = 20_000 * DAY


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(open_for_writing(folder / "history.db", HISTORY)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        yield connection


def make_minute(time: int, samples: int = 60, **levels: int) -> Minute:
    """Return a minute in which each site had so many tunnels all the time."""
    rows = tuple(SiteMinute(site, level, level * samples, Counts(handshakes=level)) for site, level in levels.items())
    return Minute(time, samples, rows, {})


def store(connection: sqlite3.Connection, minutes: list[Minute], keep: Keep | None = None) -> None:
    one = Store(connection, keep or Keep())
    for minute in minutes:
        one.write([minute])
        one.tidy([minute])


def read_days(folder: Path, first: int, last: int, site: str = "a") -> list[Usage]:
    with HistoryReader(folder) as reader:
        return list(reader.read_usage(site, DAYS, first * DAY * MINUTE, (last + 1) * DAY * MINUTE))


def find_percentile(levels: list[float], percent: int = 95) -> float:
    """Return the nearest rank, as textbooks have it."""
    return sorted(levels)[max(ceil(len(levels) * percent / 100), 1) - 1]


times = st.one_of(st.integers(0, 200), st.integers(-HOUR, DAY + HOUR)).map(lambda offset: START + offset)
rows = st.dictionaries(
    st.sampled_from("abc"),
    st.tuples(st.integers(0, 50), st.integers(0, 3000), st.integers(0, 5), st.integers(0, 10**15)),
)
minutes = st.tuples(times, st.integers(1, 60), rows).map(
    lambda given: Minute(
        given[0],
        given[1],
        tuple(
            SiteMinute(site, peak, tunnels if peak else 0, Counts(limited=limited, bytes_down=size))
            for site, (peak, tunnels, limited, size) in given[2].items()
        ),
        {},
    )
)


@given(st.lists(minutes, max_size=25), st.integers(1, 5))
def test_every_resolution_has_the_sums_of_the_minutes(given_minutes: list[Minute], batch: int) -> None:
    """In any order, several for the same minute, in transactions of any size, over restarts."""
    with tempfile.TemporaryDirectory() as name, opened(Path(name)) as connection:
        for first in range(0, len(given_minutes), batch):
            Store(connection, Keep()).write(given_minutes[first : first + batch])
        with HistoryReader(Path(name)) as reader:
            sites = {site.name: site.since for site in reader.read_sites()}
            assert set(sites) == {row.site for minute in given_minutes for row in minute.sites}
            for resolution in RESOLUTIONS:
                measured: defaultdict[int, int] = defaultdict(int)
                expected: defaultdict[tuple[str, int], SiteMinute] = defaultdict(lambda: SiteMinute("", 0, 0, NOTHING))
                for minute in given_minutes:
                    time = minute.time // resolution.length
                    measured[time] += minute.samples
                    for row in minute.sites:
                        old = expected[row.site, time]
                        expected[row.site, time] = SiteMinute(
                            "",
                            max(old.peak, row.peak),
                            old.tunnels + row.tunnels,
                            add_counts(old.counts, row.counts),
                        )
                seconds = resolution.length * MINUTE
                since, until = (START - DAY) * MINUTE, (START + 2 * DAY) * MINUTE
                if resolution is MINUTES:
                    since, until = (START - HOUR) * MINUTE, (START + DAY + HOUR + 1) * MINUTE
                for site, begins in sites.items():
                    for usage in reader.read_usage(site, resolution, since, until):
                        sums = expected[site, usage.time // seconds]
                        existed = usage.time // seconds >= begins // seconds or not sums.idle
                        samples = measured[usage.time // seconds] if existed else 0
                        assert usage.samples == samples
                        assert usage.counts == (sums.counts if samples else NOTHING)
                        assert usage.is_gap == (samples == 0)
                        if usage.level is not None:
                            assert (usage.level.peak, usage.level.mean) == (sums.peak, sums.tunnels / samples)
                levels = reader.read_levels(resolution, since, until)
                assert levels.seconds == seconds
                for site in sites:
                    found = reader.read_usage(site, resolution, since, until)
                    assert levels.times == tuple(usage.time for usage in found)
                    assert levels.sites[site] == tuple(usage.level for usage in found)
                assert reader.read_begin(resolution) == (min(measured) * seconds if given_minutes else None)
                whole = reader.read_totals(resolution, -1e12, 1e12)
                for site in sites:
                    parts = [sums for (name, _), sums in expected.items() if name == site]
                    assert whole[site].counts == Counts(
                        limited=sum(part.counts.limited for part in parts),
                        bytes_down=sum(part.counts.bytes_down for part in parts),
                    )
                    level = whole[site].level
                    assert level is not None
                    assert level.peak == max(part.peak for part in parts)


def test_a_gap_is_not_zero(tmp_path: Path) -> None:
    with opened(tmp_path) as connection:
        store(connection, [make_minute(START, a=3), make_minute(START + 1, a=0), make_minute(START + 3, 30, b=1)])
        with HistoryReader(tmp_path) as reader:
            since, until = START * MINUTE, (START + 5) * MINUTE
            found = reader.read_usage("a", MINUTES, since, until)
            assert [usage.samples for usage in found] == [60, 60, 0, 30, 0]
            assert [usage.level and usage.level.mean for usage in found] == [3, 0, None, 0, None]
            assert [usage.is_gap for usage in reader.read_usage("b", MINUTES, since, until)] == [
                True, True, True, False, True,
            ]  # fmt: skip
            assert all(usage.is_gap for usage in reader.read_usage("unknown", MINUTES, since, until))
            total = reader.read_totals(MINUTES, since, until)
            assert {site: usage.samples for site, usage in total.items()} == {"a": 150, "b": 30}
            assert total["a"].level is not None
            assert total["a"].level.mean == pytest.approx(180 / 150)
            gap = reader.read_totals(MINUTES, until, until + 600)
            assert [usage.is_gap for usage in gap.values()] == [True, True]
            assert reader.read_totals(MINUTES, since - 600, since) == {}


def test_a_days_percentile_is_that_of_its_minutes(tmp_path: Path) -> None:
    """Exactly, with idle minutes, minutes that were not sampled, and sites that begin during the day."""
    chosen = random.Random(5)
    levels: dict[str, list[float]] = {"a": [], "b": [], "idle": []}
    given_minutes = []
    for number in range(DAY + HOUR):
        if number in range(300, 360):
            continue
        row = {"a": chosen.randrange(100), "idle": int(number < 20)}
        if number >= 700:
            row["b"] = chosen.choice([0, 5, 9])
        for site in row if number < DAY else ():
            levels[site].append(row[site])
        given_minutes.append(make_minute(START + number, chosen.randrange(1, 60), **row))
    with opened(tmp_path) as connection:
        store(connection, given_minutes)
        for site, expected in levels.items():
            today, tomorrow = read_days(tmp_path, START // DAY, START // DAY + 1, site)
            assert today.level is not None
            assert today.level.p95 == find_percentile(expected)
            assert today.level.peak == max(expected)
            assert tomorrow.level is not None
            assert tomorrow.level.p95 is not None


def test_a_percentile_stays_when_the_minutes_of_its_day_are_gone(tmp_path: Path) -> None:
    with opened(tmp_path) as connection:
        store(connection, [make_minute(START + number, a=number % 100) for number in range(2 * DAY)])
        first = read_days(tmp_path, START // DAY, START // DAY)[0].level
        assert first is not None
        assert first.p95 == find_percentile([number % 100 for number in range(DAY)])
        store(connection, [make_minute(START, a=500)])  # the clock was set back for a minute
        level = read_days(tmp_path, START // DAY, START // DAY)[0].level
        assert level is not None
        assert (level.peak, level.p95) == (500, first.p95)


@pytest.mark.parametrize("percent", [50, 95, 99])
@pytest.mark.parametrize("number", [1, 2, 19, 20, 21, 100, 333])
def test_a_percentile_of_any_time(tmp_path: Path, number: int, percent: int) -> None:
    chosen = random.Random(number)
    levels = [chosen.randrange(50) for _ in range(number)]
    with opened(tmp_path) as connection:
        Store(connection, Keep()).write([make_minute(START + place, a=level) for place, level in enumerate(levels)])
    with HistoryReader(tmp_path) as reader:
        found = reader.read_percentile("a", START * MINUTE, (START + DAY) * MINUTE, percent)
    assert found == find_percentile([float(level) for level in levels], percent)


def count_rows(connection: sqlite3.Connection) -> dict[str, int]:
    tables = ("minutes", "hours", "days", "site_minutes", "site_hours", "site_days", "sites")
    return {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}


def test_old_rows_are_deleted(tmp_path: Path) -> None:
    with opened(tmp_path) as connection:
        store(connection, [make_minute(START - 9 * DAY, gone=1), make_minute(START - 2 * DAY, a=1)])
        assert count_rows(connection)["sites"] == 2
        store(
            connection,
            [make_minute(START + number, a=1, b=2) for number in range(DAY + 90)],
            Keep(minutes=DAY, hours=25, days=3),
        )
        found = count_rows(connection)
        assert found == {
            "minutes": DAY + 1, "site_minutes": 2 * (DAY + 1),
            "hours": 26, "site_hours": 52,
            "days": 3, "site_days": 5,
            "sites": 2,
        }  # fmt: skip
        with HistoryReader(tmp_path) as reader:
            assert [site.name for site in reader.read_sites()] == ["a", "b"]
        store(connection, [make_minute(START + DAY + 90, gone=1)])  # it begins anew
        with HistoryReader(tmp_path) as reader:
            assert {site.name: site.since for site in reader.read_sites()}["gone"] == (START + DAY + 90) * MINUTE


def test_a_clock_that_is_wrong_for_a_moment_deletes_little(tmp_path: Path) -> None:
    with opened(tmp_path) as connection:
        store(connection, [make_minute(START + number * HOUR, a=1) for number in range(24)])
        before = count_rows(connection)
        store(connection, [make_minute(START + 5000 * DAY, a=1), make_minute(0, a=1), make_minute(-5, a=1)])
        after = count_rows(connection)
        assert after["minutes"] >= before["minutes"] - 2 + 2
        assert after["hours"] >= before["hours"] - 1
        assert after["days"] >= before["days"] - 1
        store(connection, [make_minute(START + DAY + number, a=1) for number in range(3)])
        with HistoryReader(tmp_path) as reader:
            found = reader.read_usage("a", MINUTES, (START + DAY) * MINUTE, (START + DAY + 3) * MINUTE)
            assert [usage.samples for usage in found] == [60, 60, 60]


def test_what_is_written_is_all_or_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as connection:
        one = Store(connection, Keep())
        huge = Minute(START, 60, (SiteMinute("b", 2**70, 1, NOTHING),), {})
        with pytest.raises(OverflowError):
            one.write([make_minute(START, a=1), huge])
        assert set(count_rows(connection).values()) == {0}
        one.write([make_minute(START, a=1, b=1)])
        assert count_rows(connection)["sites"] == 2


def test_positions_are_those_of_the_last_minute(tmp_path: Path) -> None:
    with opened(tmp_path) as connection:
        one = Store(connection, Keep())
        old = [Minute(START, 1, (), {f"old {number}": {"a": Counts(number)}}) for number in range(MAX_ABSENT + 5)]
        for minute in old:
            one.write([minute])
        for total in (1, 2):
            one.write([Minute(START, 1, (), {"x": {"a": Counts(total)}, "y": {}})])
        found = Store(connection, Keep()).read_positions()
    assert found["x"] == {"a": Counts(2)}
    assert isinstance(found["x"]["a"], Counts)
    assert len(found) == MAX_ABSENT + 2
    assert "old 0" not in found


@pytest.mark.parametrize("values", [(DAY - 1, 1440, 400), (DAY, 23, 400), (DAY, 1440, 59), (10 * DAY, 24, 400)])
def test_what_can_be_kept(values: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="each at least as long as the one before"):
        Keep(*values)
    assert Keep(DAY, 24, 1) == Keep(minutes=DAY, hours=24, days=1)


def test_means_are_those_of_the_samples(tmp_path: Path) -> None:
    """Not those of the minutes: a minute with half of its samples counts half."""
    with opened(tmp_path) as connection:
        store(connection, [make_minute(START, 60, a=10), make_minute(START + 1, 30, a=40)])
        with HistoryReader(tmp_path) as reader:
            (hour,) = reader.read_usage("a", HOURS, START * MINUTE, (START + 1) * MINUTE)
    assert hour.level is not None
    assert hour.level.mean == fmean([10] * 60 + [40] * 30)
