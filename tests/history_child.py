"""A process that writes a history, for tests that kill it or take its disk away.

python -m tests.history_child write FOLDER    writes minutes until it is killed, and prints each that is on the disk
python -m tests.history_child fill FOLDER     writes until the disk is full, and goes on when there is room again
"""

import asyncio
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from tlstunnel.state.history.reader import HistoryReader
from tlstunnel.state.history.samples import MINUTE, Counts, Minute, SiteMinute
from tlstunnel.state.history.store import DAYS, MINUTES
from tlstunnel.state.history.writer import History

START = 20_000 * 1440
SITES = 400
INSTANCE = "one"


def make_minute(number: int, sites: int = SITES) -> Minute:
    """Return a minute whose every value follows from its number, so that a reader knows what must be there."""
    rows = tuple(SiteMinute(str(site), number % 100 + 1, number % 50 + 1, Counts(number % 7)) for site in range(sites))
    return Minute(START + number, 1, rows, {INSTANCE: {"number": Counts(number)}})


async def write(folder: Path) -> None:
    history = await History.open(folder)
    number = history.positions.get(INSTANCE, {"number": Counts()})["number"].handshakes
    while True:
        number += 1
        history.append(make_minute(number))
        await asyncio.wrap_future(history.flush())
        print(number, flush=True)


async def fill(folder: Path) -> None:
    """Exits with an AssertionError if anything is wrong."""
    history = await History.open(folder, max_waiting_rows=20 * SITES)
    take_room, give_room = find_limit(folder)
    number = 0
    history.append(make_minute(number))
    await asyncio.wrap_future(history.flush())
    take_room()
    flushed = asyncio.wrap_future(history.flush())
    while not history.stats().problem:
        if flushed.done():
            number += 1
            assert history.append(make_minute(number))
            flushed = asyncio.wrap_future(history.flush())
        await asyncio.sleep(0)  # the loop goes on, whatever the disk does
    accepted = number
    while history.append(make_minute(number + 1)):
        number += 1
        accepted = number
    number += 3
    for lost in (number - 1, number):
        assert not history.append(make_minute(lost))
    assert history.stats().lost == 3
    give_room()
    await asyncio.wait_for(asyncio.wrap_future(history.flush()), 60)
    assert history.append(make_minute(number + 1))
    await asyncio.wrap_future(history.flush())
    assert await history.close()
    with HistoryReader(folder) as reader:
        found = reader.read_usage("7", MINUTES, START * MINUTE, (START + number + 2) * MINUTE)
        gaps = [place for place, usage in enumerate(found) if usage.is_gap]
        assert gaps == list(range(accepted + 1, number + 1)), gaps
        total = reader.read_totals(DAYS, 0, 1e12)["7"]
        assert total.counts.handshakes == sum(place % 7 for place in range(number + 2))


def find_limit(folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return what fills the disk and what frees it: a large file on a small file system, else a limit on files."""
    ballast = folder / "ballast"
    if folder.is_mount():

        def take_room() -> None:
            with ballast.open("wb", buffering=0) as file:
                for size in (65536, 4096):
                    while True:
                        try:
                            file.write(bytes(size))
                        except OSError:
                            break

        return take_room, ballast.unlink
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    return (
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard)),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)),
    )


if __name__ == "__main__":
    asyncio.run({"write": write, "fill": fill}[sys.argv[1]](Path(sys.argv[2])))
