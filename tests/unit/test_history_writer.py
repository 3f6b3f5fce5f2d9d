"""The thread that writes: what is acknowledged survives, full and damaged disks, several writers, and a busy loop."""

import asyncio
import contextlib
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.harness import eventually, missing
from tests.history_child import INSTANCE, SITES, START, make_minute
from tlstunnel.errors import StateError
from tlstunnel.state.history.database import FILE_NAME, LockedError
from tlstunnel.state.history.reader import HistoryReader
from tlstunnel.state.history.samples import MINUTE, NOTHING, Counts, Minute, SiteMinute
from tlstunnel.state.history.store import MINUTES, Keep
from tlstunnel.state.history.writer import History

SECONDS = 30.0


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, SECONDS))


async def flush(history: History) -> None:
    await asyncio.wrap_future(history.flush())


def minutes_in(folder: Path, site: str = "7", first: int = 0, number: int = 100) -> list[int]:
    """Return the numbers of the minutes in the file."""
    with HistoryReader(folder) as reader:
        found = reader.read_usage(site, MINUTES, (START + first) * MINUTE, (START + first + number) * MINUTE)
    return [usage.time // MINUTE - START for usage in found if not usage.is_gap]


@contextlib.contextmanager
def holding_writers_up(folder: Path) -> Iterator[None]:
    """Keep the history from being written, as a hung disk does, until the end."""
    with contextlib.closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def test_what_was_flushed_is_in_the_file(tmp_path: Path) -> None:
    async def main() -> None:
        history = await History.open(tmp_path)
        assert history.positions == {}
        for number in range(5):
            assert history.append(make_minute(number))
        await flush(history)
        assert minutes_in(tmp_path) == [0, 1, 2, 3, 4]
        stats = history.stats()
        assert (stats.problem, stats.written, stats.waiting, stats.lost) == ("", 5, 0, 0)
        history.append(make_minute(5))
        assert await history.close()
        assert minutes_in(tmp_path) == [0, 1, 2, 3, 4, 5]
        again = await History.open(tmp_path)
        assert again.positions == {INSTANCE: {"number": Counts(5)}}
        assert await again.close()

    run(main())


def test_after_the_end_nothing_is_accepted(tmp_path: Path) -> None:
    async def main() -> None:
        history = await History.open(tmp_path)
        await history.close()
        assert not history.append(make_minute(1))
        with pytest.raises(StateError, match="closed"):
            await flush(history)

    run(main())


def test_a_second_tunnel_keeps_no_history(tmp_path: Path) -> None:
    async def main() -> None:
        history = await History.open(tmp_path)
        with pytest.raises(LockedError, match=r"process \d+ keeps its history there.*set state\.dir"):
            await History.open(tmp_path)
        history.append(make_minute(1))
        await flush(history)
        waiting = asyncio.create_task(History.open(tmp_path, lock_wait=SECONDS))  # as in an upgrade
        await asyncio.sleep(0)
        await history.close()
        await (await waiting).close()

    run(main())


def test_who_gives_up_waiting_leaves_no_thread(tmp_path: Path) -> None:
    async def main() -> None:
        history = await History.open(tmp_path)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(History.open(tmp_path, lock_wait=SECONDS), 0.01)
        await history.close()
        await (await History.open(tmp_path, lock_wait=SECONDS)).close()

    run(main())


def test_a_file_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("not ours")

    async def main() -> None:
        with pytest.raises(StateError, match="is not an SQLite database"):
            await History.open(tmp_path)

    run(main())
    assert (tmp_path / FILE_NAME).read_text() == "not ours"


def test_minutes_wait_for_a_file_that_another_program_has_locked(tmp_path: Path) -> None:
    async def main() -> None:
        history = await History.open(tmp_path)
        with capture_logs() as logs:
            with holding_writers_up(tmp_path):
                history.append(make_minute(1))
                while not history.stats().problem:
                    await asyncio.sleep(0.01)
                history.append(make_minute(2))
                assert history.stats().waiting == 2
            await flush(history)
            await history.close()
        assert [log["event"] for log in logs] == ["history not written", "history written again"]
        assert "locked" in logs[0]["reason"]
        assert logs[1]["lost"] == 0
        assert minutes_in(tmp_path) == [1, 2]

    run(main())


def test_what_does_not_fit_is_a_gap_that_loses_no_counts(tmp_path: Path) -> None:
    async def main() -> None:
        history = await History.open(tmp_path, max_waiting_rows=2 * (SITES + 1))
        with capture_logs() as logs:
            with holding_writers_up(tmp_path):
                assert [history.append(make_minute(number)) for number in range(1, 5)] == [True, True, False, False]
            await flush(history)
            gone = Minute(START + 5, 1, (SiteMinute("new", 1, 1, Counts(1)),), {})
            assert history.append(gone)
            await flush(history)
            await history.close()
        lost = next(log for log in logs if log["event"] == "history minutes lost")
        assert lost["waiting"] == 2
        assert sum(log["lost"] for log in logs if log["event"] == "history written again") == 2
        assert history.stats().lost == 2
        assert minutes_in(tmp_path) == [1, 2, 5]
        with HistoryReader(tmp_path) as reader:
            total = reader.read_totals(MINUTES, 0, 1e12)
        assert total["7"].counts.handshakes == 1 + 2 + 3 + 4
        assert total["new"].counts.handshakes == 1

    run(main())


def test_a_minute_that_cannot_be_stored_does_not_stop_the_next(tmp_path: Path) -> None:
    async def main() -> None:
        history = await History.open(tmp_path)
        history.append(Minute(START, 1, (SiteMinute("a", 2**70, 1, NOTHING),), {}))
        with pytest.raises(StateError, match="cannot be written: Python int too large"):
            await flush(history)
        history.append(make_minute(1))
        await flush(history)
        assert history.stats().lost == 1
        await history.close()
        assert minutes_in(tmp_path) == [1]

    run(main())


def test_a_damaged_file_is_left_alone_until_another_is_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME

    async def main() -> None:
        history = await History.open(tmp_path)
        history.append(make_minute(1))
        await flush(history)
        with capture_logs() as logs:
            with contextlib.closing(sqlite3.connect(path)) as connection:
                connection.execute("DROP TABLE site_hours")
            for _ in range(2):
                history.append(make_minute(2))
                with pytest.raises(StateError, match=r"is damaged \(no such table: site_hours\): move it away"):
                    await flush(history)
            assert history.stats().problem.startswith(f"{path} is damaged")
            path.rename(tmp_path / "damaged")
            history.append(make_minute(3))
            await flush(history)
            await history.close()
        assert [log["event"] for log in logs] == ["history not written", "history written again"]
        assert logs[1]["lost"] == 2
        assert minutes_in(tmp_path) == [3]

    run(main())


def test_damaged_pages_are_found_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME

    async def main() -> None:
        history = await History.open(tmp_path)
        for number in range(1, 30):
            history.append(make_minute(number))
        await history.close()
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\xff" * 4096)
        before = path.read_bytes()
        with capture_logs() as logs:
            history = await History.open(tmp_path)
            history.append(make_minute(31))
            with pytest.raises(StateError, match="is damaged"):
                await flush(history)
            assert not await history.close()
        assert [log["event"] for log in logs] == ["history opened", "history not written"]
        assert f"{path} is damaged" in logs[1]["reason"]
        assert path.read_bytes() == before

    run(main())


def test_a_file_that_is_moved_away_is_not_written_any_more(tmp_path: Path) -> None:
    async def main() -> None:
        history = await History.open(tmp_path)
        history.append(make_minute(1))
        await flush(history)
        with HistoryReader(tmp_path) as reader:
            assert len(reader.read_sites()) == SITES
            (tmp_path / FILE_NAME).rename(tmp_path / "moved")
            history.append(Minute(START, 1, (SiteMinute("new", 1, 1, NOTHING),), {}))
            await flush(history)
            assert [site.name for site in reader.read_sites()] == ["new"]
        await history.close()

    run(main())


def test_the_end_does_not_wait_for_a_disk_for_ever(tmp_path: Path) -> None:
    async def main() -> None:
        history = await History.open(tmp_path)
        with holding_writers_up(tmp_path):
            history.append(make_minute(1))
            assert not await history.close(0.05)
        await asyncio.to_thread(history._thread.join)

    run(main())


def test_appending_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    """While nothing can be written, a loop appends as many minutes as fit, and never waits."""

    async def main() -> None:
        history = await History.open(tmp_path)
        minute = make_minute(1)
        with holding_writers_up(tmp_path):
            began = time.thread_time()
            accepted = 0
            while history.append(minute):
                accepted += 1
            assert accepted == 100_000 // (SITES + 1)
            assert time.thread_time() - began < 1
        await history.close()

    run(main())


def test_old_minutes_are_deleted(tmp_path: Path) -> None:
    async def main() -> None:
        history = await History.open(tmp_path, Keep(minutes=1440, hours=24, days=2))
        for number in (0, 1, 2, 1500, 1501):
            history.append(make_minute(number, sites=8))
        await flush(history)
        await history.close()

    run(main())
    assert minutes_in(tmp_path, number=1600) == [1500, 1501]


def run_child(command: str, folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.history_child", command, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
def test_what_was_acknowledged_survives_a_kill(tmp_path: Path, kills: int) -> None:
    chosen = random.Random(kills)
    acknowledged = 0
    for _ in range(kills):
        with run_child("write", tmp_path) as child:
            assert child.stdout is not None
            for _ in range(chosen.randrange(1, 12)):
                while not (line := child.stdout.readline()).strip().isdecimal():
                    assert "history opened" in line
                acknowledged = int(line)
            time.sleep(chosen.random() * 0.02)  # anywhere within the next transactions
            child.kill()
            acknowledged = max([acknowledged, *map(int, child.stdout.read().split())])
        found = minutes_in(tmp_path, number=acknowledged + 2)
        assert found in (list(range(1, acknowledged + 1)), list(range(1, acknowledged + 2)))
    with HistoryReader(tmp_path) as reader:
        every = reader.read_usage(str(SITES - 1), MINUTES, START * MINUTE, (START + acknowledged + 1) * MINUTE)[1:]
    for number, usage in enumerate(every, 1):
        assert usage.level is not None
        assert (usage.samples, usage.level.peak, usage.counts.handshakes) == (1, number % 100 + 1, number % 7)


@pytest.mark.parametrize("kind", ["limit", "file system"])
def test_a_full_disk_makes_a_gap_and_loses_no_counts(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if kind == "file system" and subprocess.run(mount, check=False).returncode:
        missing("only root can mount a small file system")
    try:
        with run_child("fill", folder) as child:
            assert child.stdout is not None
            output = child.stdout.read()
        assert child.returncode == 0, output
    finally:
        if kind == "file system":
            subprocess.run(["umount", "--lazy", folder], check=True)
    events = [event for event in ("not written", "minutes lost", "written again") if f"history {event}" in output]
    assert events == ["not written", "minutes lost", "written again"], output
    assert output.count("history not written") == output.count("history minutes lost") == 1


def test_a_stopped_reader_does_not_stop_the_writer(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from tlstunnel.state.history.reader import HistoryReader\n"
        "reader = HistoryReader(pathlib.Path(sys.argv[1]))\n"
        "with reader._reading() as connection:\n"
        "    print(len(connection.execute('SELECT * FROM sites').fetchall()), flush=True)\n"
        "    sys.stdin.read()\n"
    )

    async def main() -> None:
        history = await History.open(tmp_path)
        history.append(make_minute(1))
        await flush(history)
        child = subprocess.Popen(
            [sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with child:
            assert child.stdout is not None
            assert child.stdout.readline() == f"{SITES}\n"
            for number in range(2, 100):
                history.append(make_minute(number))
            await flush(history)
            assert not history.stats().problem
            child.kill()
        await history.close()

    run(main())
    eventually(lambda: minutes_in(tmp_path) == list(range(1, 100)))
