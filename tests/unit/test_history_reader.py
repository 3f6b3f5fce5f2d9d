"""Queries: what they cost with everything that is kept, and what they say when there is nothing to read.

What they return is compared with a model in test_history_store.py.
"""

import contextlib
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.harness import assert_below
from tlstunnel.errors import StateError
from tlstunnel.state.history.database import HISTORY, MAX_SITES, open_for_writing, transaction
from tlstunnel.state.history.reader import HistoryReader
from tlstunnel.state.history.samples import MINUTE, Counts, Minute, SiteMinute
from tlstunnel.state.history.store import _UPSERTS, DAY, DAYS, HOUR, HOURS, MINUTES, Keep, Store

NOW = 20_000 * DAY + 700
"""The newest minute."""

MOST_BYTES = 200_000_000
"""For 1 000 sites."""

MOST_SECONDS = 0.1
"""For a query, in CPU time."""


def make_row(chosen: random.Random, site: int, minutes: int) -> SiteMinute:
    """Return a row of a busy site: no minute is idle, and in each one several kinds of requests are refused."""
    level = chosen.randrange(1, 4 * site + 2)
    rare = [chosen.randrange(1, 100) * minutes if kind in {0, 1, 4, 7} else 0 for kind in range(8)]
    counts = Counts(level * minutes, *rare, *(chosen.randrange(most) * minutes for most in (10**8, 10**8, 10**6)))
    return SiteMinute(f"site-{site}.example.com", level, level * 60 * minutes, counts)


def fill_all(connection: sqlite3.Connection, sites: int) -> None:
    """Fill everything that is kept by default. Each row of an hour or a day grows, as it does when it is written."""
    chosen = random.Random(1)
    store = Store(connection, Keep())
    begin, parts = NOW - DAY + 1, 4
    store.write([make_minute(chosen, begin - Keep().days * DAY, sites)])
    for resolution, number in ((DAYS, Keep().days), (HOURS, Keep().hours)):
        newest = begin // resolution.length
        for place in range(newest - number + 2, newest):
            with transaction(connection):
                for _ in range(parts):
                    connection.executemany(
                        _UPSERTS[resolution],
                        (
                            (place * MAX_SITES + site + 1, row.peak, row.tunnels, *row.counts)
                            for site in range(sites)
                            for row in [make_row(chosen, site, resolution.length // parts)]
                        ),
                    )
                connection.execute(f"INSERT INTO {resolution.table} (time, samples) VALUES (?, 1)", (place,))
    for number in range(DAY):
        store.write([make_minute(chosen, begin + number, sites)])


def make_minute(chosen: random.Random, number: int, sites: int) -> Minute:
    rows = tuple(make_row(chosen, site, 1) for site in range(sites))
    return Minute(number, 60, rows, {"instance": {row.site: row.counts for row in rows}})


def measure(action: Callable[[], object]) -> float:
    """Return the CPU seconds, which other processes change least. The file is in memory, so there is nothing else."""
    began = time.process_time()
    action()
    return time.process_time() - began


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(open_for_writing(folder / "history.db", HISTORY)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        yield connection


@pytest.mark.alone
@pytest.mark.parametrize("sites", [20, pytest.param(1000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_everything_that_is_kept_is_small_and_quickly_read(tmp_path: Path, sites: int) -> None:
    with opened(tmp_path) as connection:
        fill_all(connection, sites)
    size = (tmp_path / "history.db").stat().st_size
    site = f"site-{sites // 2}.example.com"
    now = (NOW + 1) * MINUTE
    day, hour = DAY * MINUTE, HOUR * MINUTE
    with HistoryReader(tmp_path) as reader:
        figures: dict[str, Callable[[], object]] = {
            "one site, 24 hours": lambda: reader.read_usage(site, MINUTES, now - day, now),
            "one site, 60 days": lambda: reader.read_usage(site, HOURS, now - 60 * day, now),
            "one site, 400 days": lambda: reader.read_usage(site, DAYS, now - 400 * day, now),
            "all sites, an hour": lambda: reader.read_totals(HOURS, now // hour * hour, now),
            "all sites, 30 minutes": lambda: reader.read_totals(MINUTES, now - 1800, now),
            "all sites, a day": lambda: reader.read_totals(HOURS, now - day, now),
            "all sites, a month": lambda: reader.read_totals(DAYS, now - 30 * day, now),
            "levels of all sites, a week": lambda: reader.read_levels(DAYS, now - 7 * day, now),
            "levels of all sites, 24 hours": lambda: reader.read_levels(HOURS, now - day, now),
            "one site, percentile of a day": lambda: reader.read_percentile(site, now - day, now),
        }
        assert len(reader.read_usage(site, MINUTES, now - day, now)) == DAY
        assert len(reader.read_totals(DAYS, now - 30 * day, now)) == sites
        print(f"{size / 1e6:.1f} MB with {sites} sites")
        for name, action in figures.items():
            print(f"{name}: {1000 * measure(action):.1f} ms")
            assert_below(MOST_SECONDS, partial(measure, action))
    assert (size - 400_000) * 1000 / sites < MOST_BYTES  # 100 pages that do not depend on the sites


def test_without_a_file(tmp_path: Path) -> None:
    with HistoryReader(tmp_path) as reader, pytest.raises(StateError, match=r"history\.db: no history yet"):
        reader.read_sites()


def test_a_file_without_a_row(tmp_path: Path) -> None:
    with opened(tmp_path), HistoryReader(tmp_path) as reader:
        assert reader.read_begin(DAYS) is None
        assert reader.read_levels(DAYS, 0, 2 * DAY * MINUTE).sites == {}


def test_a_reader_waits_for_the_file(tmp_path: Path) -> None:
    with HistoryReader(tmp_path) as reader:
        with pytest.raises(StateError, match="no history yet"):
            reader.read_sites()
        with opened(tmp_path) as connection:
            Store(connection, Keep()).write([Minute(NOW, 1, (SiteMinute("a", 1, 1, Counts()),), {})])
            assert [site.name for site in reader.read_sites()] == ["a"]
        assert [site.since for site in reader.read_sites()] == [NOW * MINUTE]


def test_a_damaged_page_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    chosen = random.Random(1)
    with opened(tmp_path) as connection:
        store = Store(connection, Keep())
        for number in range(100):
            store.write([make_minute(chosen, NOW + number, 40)])
    with path.open("r+b") as file:
        file.seek(10 * 4096)
        file.write(b"\xff" * (path.stat().st_size - 10 * 4096))
    before = path.read_bytes()
    with (
        HistoryReader(tmp_path) as reader,
        pytest.raises(StateError, match=rf"^{path} is damaged \(.+\): move it away"),
    ):
        reader.read_totals(MINUTES, 0, 1e12)
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "history.db").mkdir()
    with HistoryReader(tmp_path) as reader, pytest.raises(StateError, match="not a file"):
        reader.read_sites()


def test_a_file_that_another_program_has_for_itself(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    with contextlib.closing(sqlite3.connect(tmp_path / "history.db", isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN IMMEDIATE")
        with HistoryReader(tmp_path) as reader, pytest.raises(StateError, match="cannot be read: database is locked"):
            reader.read_sites()


def test_times_are_those_that_begin_in_the_range(tmp_path: Path) -> None:
    with opened(tmp_path) as connection:
        Store(connection, Keep()).write([Minute(NOW, 1, (SiteMinute("a", 1, 1, Counts()),), {})])
    begin = NOW * MINUTE
    with HistoryReader(tmp_path) as reader:
        for since, until, expected in ((0, 60, [0]), (1, 61, [60]), (0, 61, [0, 60]), (1, 60, []), (5, 1, [])):
            found = reader.read_usage("a", MINUTES, begin + since, begin + until)
            assert [usage.time - begin for usage in found] == expected
