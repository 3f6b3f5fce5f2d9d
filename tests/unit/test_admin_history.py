"""The history for charts: so many points, and gaps stay gaps."""

import asyncio
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest

from tlstunnel.admin.checks import Unacceptable
from tlstunnel.admin.history import MOST_POINTS, MOST_WAITING, SECONDS, Histories, HistoryQuery, HistoryResult
from tlstunnel.state.history.samples import Counts, Minute, SiteMinute
from tlstunnel.state.history.writer import History

NOW = 1_800_000_000 // 86_400 * 86_400 + 3600 * 12
"""Noon."""


async def write(folder: Path, minutes: Iterable[int]) -> None:
    """Write minutes in which two sites have 3 and 1 tunnels; each has 2 samples."""
    history = await History.open(folder)
    try:
        for minute in minutes:
            sites = (
                SiteMinute("a.test", 4, 6, Counts(handshakes=2, blocked=1, bytes_up=10)),
                SiteMinute("b.test", 1, 2, Counts(handshakes=1, cpu=500_000)),
            )
            history.append(Minute(minute, 2, sites, {}))
    finally:
        await history.close(5.0)


def read(folder: Path, query: HistoryQuery, now: float = NOW) -> HistoryResult:
    async def run() -> HistoryResult:
        histories = Histories(folder, lambda: now)
        try:
            return await histories.read(query)
        finally:
            histories.close()

    return asyncio.run(run())


def test_points_of_a_site_and_of_all(tmp_path: Path) -> None:
    first = NOW // 60 - 20
    asyncio.run(write(tmp_path, [*range(first, first + 5), *range(first + 10, first + 20)]))
    one = read(tmp_path, HistoryQuery(site="a.test", points=MOST_POINTS))
    assert (one.seconds, one.since, one.site) == (60, "24h", "a.test")
    assert len(one.points) <= MOST_POINTS
    sampled = [point for point in one.points if point.tunnels is not None]
    assert [point.time // 60 for point in sampled] == [*range(first, first + 5), *range(first + 10, first + 20)]
    assert {(point.tunnels, point.peak, point.handshakes, point.up) for point in sampled} == {(3.0, 4, 2, 10)}
    assert sampled[0].refused is not None
    assert sampled[0].refused["blocked"] == 1

    both = read(tmp_path, HistoryQuery(points=MOST_POINTS))
    sampled = [point for point in both.points if point.tunnels is not None]
    assert {(point.tunnels, point.peak, point.handshakes, point.cpu) for point in sampled} == {(4.0, 4, 3, 0.5)}
    assert [point.time for point in both.points] == [point.time for point in one.points]
    gap = next(point for point in both.points if point.time // 60 == first + 7)
    assert (gap.tunnels, gap.peak, gap.handshakes, gap.refused) == (None, None, None, None)


@pytest.mark.parametrize("since", ["24h", "7d", "30d"])
@pytest.mark.parametrize("points", [1, 7, 300])
def test_there_are_at_most_so_many_points(tmp_path: Path, since: str, points: int) -> None:
    first = NOW // 60 - 90
    asyncio.run(write(tmp_path, range(first, first + 90)))
    result = read(tmp_path, HistoryQuery(since=since, points=points))  # type: ignore[arg-type]
    assert 1 <= len(result.points) <= points
    times = [point.time for point in result.points]
    assert all(after - before == result.seconds for before, after in pairwise(times))
    assert sum(point.handshakes or 0 for point in result.points) == 90 * 3 or points == 1 or since != "24h"


def test_what_is_read_again_is_the_same_as_what_is_read_anew(tmp_path: Path) -> None:
    first = NOW // 60 - 700
    asyncio.run(write(tmp_path, range(first, first + 500)))
    now = float((first + 500) * 60)

    async def read_anew(query: HistoryQuery) -> HistoryResult:
        histories = Histories(tmp_path, lambda: now)
        try:
            return await histories.read(query)
        finally:
            histories.close()

    async def run() -> None:
        nonlocal now
        histories = Histories(tmp_path, lambda: now)
        try:
            await histories.read(HistoryQuery(points=MOST_POINTS))
            for minutes in (range(500, 560), range(560, 561), range(600, 601), range(699, 700)):
                await write(tmp_path, [first + minute for minute in minutes])
                now = float((first + minutes.stop) * 60)
                for since in SECONDS:
                    query = HistoryQuery(since=since, points=MOST_POINTS)
                    assert (await histories.read(query)).points == (await read_anew(query)).points
        finally:
            histories.close()

    asyncio.run(run())


@pytest.mark.parametrize("points", [0, -1, MOST_POINTS + 1])
def test_other_numbers_of_points_are_refused(tmp_path: Path, points: int) -> None:
    with pytest.raises(Unacceptable):
        read(tmp_path, HistoryQuery(points=points))


def test_without_a_history(tmp_path: Path) -> None:
    with pytest.raises(Unacceptable) as caught:
        read(tmp_path, HistoryQuery())
    assert caught.value.status == 503


def test_a_result_is_kept_for_a_while_and_few_queries_wait(tmp_path: Path) -> None:
    asyncio.run(write(tmp_path, [NOW // 60 - 5]))

    async def run() -> None:
        now = float(NOW)
        histories = Histories(tmp_path, lambda: now)
        try:
            first = await histories.read(HistoryQuery())
            assert await histories.read(HistoryQuery()) is first
            now += 60.0
            assert await histories.read(HistoryQuery()) is not first
            queries = [histories.read(HistoryQuery(points=number)) for number in range(1, MOST_WAITING + 20)]
            results = await asyncio.gather(*queries, return_exceptions=True)
            refused = [one for one in results if isinstance(one, Unacceptable)]
            assert len(refused) == len(queries) - MOST_WAITING
            assert {one.status for one in refused} == {503}
        finally:
            histories.close()

    asyncio.run(run())
