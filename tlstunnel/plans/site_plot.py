"""The plot of a site from what is stored: its history, notices and throttles. For the command line, and for notices.

Tested by tests/unit/test_plans_plot.py.
"""

import asyncio
import contextlib
from pathlib import Path

from tlstunnel.errors import StateError
from tlstunnel.plans.notice_file import reading
from tlstunnel.plans.plot import ENGLISH, Labels, Mark, Plot, draw_plot
from tlstunnel.plans.values import Notice
from tlstunnel.state.history.reader import HistoryReader
from tlstunnel.state.history.samples import MINUTE
from tlstunnel.state.history.store import DAYS, HOURS, MINUTES, Resolution

MOST_STEPS = 1500
"""Of a plot: the minutes of a day, or the hours of 60 days."""

NOTICE_SECONDS = 28 * 86_400
"""What the plot of a notice shows: as long as repeated use is looked at by default."""

SETTLE_SECONDS = 65
"""How old a second is at most until it is in the history: its minute has to be over, and written."""

_DAY = 86_400


def read_plot(  # noqa: PLR0913 - what is drawn
    folder: Path,
    site: str,
    since: float,
    until: float,
    *,
    plan: str = "",
    guideline: int | None = None,
    labels: Labels = ENGLISH,
) -> Plot:
    """Return what to draw of a site, in the finest steps that are kept of this time.

    It begins with the first day of the history, or of the site. The last minute is not stored yet, so it ends before.
    Raises StateError, also if nothing was measured.
    """
    until -= SETTLE_SECONDS
    with HistoryReader(folder) as reader:
        first = max(reader.read_begin(DAYS) or 0, _find_begin(reader, site)) // _DAY * _DAY
        since = max(since, float(first))
        resolution = choose_resolution(reader, since, until, first)
        usages = reader.read_usage(site, resolution, since, until)
    if all(usage.is_gap for usage in usages):
        raise StateError(f"{site}: nothing was measured in this time, so there is nothing to draw")
    marks = read_marks(folder, site)
    return Plot(site=site, plan=plan, guideline=guideline, usages=usages, marks=marks, labels=labels)


def _find_begin(reader: HistoryReader, site: str) -> int:
    return next((one.since for one in reader.read_sites() if one.name == site), 0)


def choose_resolution(reader: HistoryReader, since: float, until: float, first: float) -> Resolution:
    """Return the finest resolution that has this time in at most `MOST_STEPS`. There is nothing before `first`."""
    for resolution in (MINUTES, HOURS):
        seconds = resolution.length * MINUTE
        begin = reader.read_begin(resolution)
        if begin is None or until - since > MOST_STEPS * seconds:
            continue
        if begin <= since + seconds or begin < first + _DAY:
            return resolution
    return DAYS


def read_marks(folder: Path, site: str) -> list[Mark]:
    """Return the notices about a site, and when it was throttled; nothing if that was not stored."""
    marks: list[Mark] = []
    with contextlib.suppress(StateError), reading(folder) as notices:
        for record in notices.read_notices(site):
            created = record.notice.created
            marks.append(Mark("notice", created, created, record.notice.standing))
        for throttle in notices.read_throttles_of(site):
            until = throttle.until if throttle.released is None else min(throttle.released, throttle.until)
            marks.append(Mark("throttle", throttle.since, until, throttle.rate))
    return marks


class NoticePlots:
    """Draws the plots of notices, one at a time, in a thread. `draw` is what `tlstunnel.plans.delivery` needs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._drawing = asyncio.Lock()

    async def draw(self, notice: Notice, labels: Labels) -> bytes | None:
        """Return a PNG with these labels; None if there is no matplotlib.

        Raises StateError, also if nothing was measured yet.
        """
        async with self._drawing:
            return await asyncio.to_thread(self._draw, notice, labels)

    def _draw(self, notice: Notice, labels: Labels) -> bytes | None:
        assessment = notice.assessment
        created = notice.created
        try:
            plot = read_plot(
                *(self._folder, notice.site, created - NOTICE_SECONDS, created),
                plan=assessment.label,
                guideline=assessment.figures.guideline,
                labels=labels,
            )
            return draw_plot(plot, "png")
        except ModuleNotFoundError:
            return None
