"""The plot of a site: its concurrent tunnels over time, compared with its guideline. Needs matplotlib.

matplotlib takes half a second to import, and is an extra. So it is imported when there is something to draw.
"""

import importlib
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import Annotated, Any, Literal

import msgspec

from tlstunnel.state.history.reader import Level, Usage
from tlstunnel.state.history.samples import NOTHING

Format = Literal["png", "svg"]

WIDTH, HEIGHT = 9.6, 4.6
"""Inches: wide enough for a month, and as large as a mail shows without scrolling."""

DOTS_PER_INCH = 120

MOST_STEPS = 336
"""Steps of the curves: hours of two weeks. More would be a blur at this width."""

# Okabe and Ito's colours, which most colour-blind people can distinguish. Shapes and hatches say the same.
_TUNNELS, _OVER, _NOTICE, _THROTTLE = "#0072b2", "#d55e00", "#8a4f7d", "#b8860b"
_PAPER, _INK, _FAINT, _GAP = "#ffffff", "#24292f", "#d8dee4", "#8c959f"

_DARK = {
    _PAPER: "#15191e",
    _INK: "#e6e9ed",
    _FAINT: "#39414a",
    _TUNNELS: "#56b4e9",
    _OVER: "#ff8a3c",
    _NOTICE: "#d69ac9",
}
"""Colours of an SVG where the reader prefers dark pages."""

# For ticks at years, months, days, hours, minutes and seconds, and for the first of each.
_DATES = ["%Y", "%b", "%-d", "%H:%M", "%H:%M", "%H:%M:%S"]
_ZERO_DATES = ["", "%Y", "%-d %b", "%-d %b", "%H:%M", "%H:%M"]

_SIGNS = 0.915
"""How high the signs of notices are, as a part of the height: below the bars of throttles, above the curves."""

_DAY = 86_400


class Mark(msgspec.Struct, frozen=True):
    """Something that happened to a site: a notice at a time, or a throttle over a time. `text` is a few words."""

    kind: Literal["notice", "throttle"]
    since: float
    until: float
    text: str


_Months = Annotated[tuple[str, ...], msgspec.Meta(min_length=12, max_length=12)]

_MONTHS = "January February March April May June July August September October November December"


class Labels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The words on a plot in a language, English unless they are given.

    `day` is how a day is written, with `{day}`, `{month}` and `{year}`; `short_day` has no year. `days` is the time
    from `{first}` to `{last}`. `standings` are what notices are about.
    """

    tunnels: str = "concurrent tunnels"
    mean: str = "mean"
    peak: str = "peak"
    guideline: str = "guideline"
    over: str = "over the guideline"
    spike: str = "spike"
    gap: str = "not measured"
    notice: str = "notice"
    throttled: str = "throttled"
    time: str = "time (UTC)"
    day: str = "{day} {month} {year}"
    short_day: str = "{day} {month}"
    days: str = "{first} to {last}"
    months: _Months = tuple(_MONTHS.split())
    short_months: _Months = tuple(month[:3] for month in _MONTHS.split())
    standings: dict[str, str] = {}

    def render_days(self, first: datetime, last: datetime) -> str:
        """Return the days from the first to the last, which may be the same."""
        days = [
            self.day.replace("{day}", f"{one:%-d}")
            .replace("{month}", self.months[one.month - 1])
            .replace("{year}", f"{one:%Y}")
            for one in (first, last)
        ]
        return days[0] if days[0] == days[1] else self.days.replace("{first}", days[0]).replace("{last}", days[1])

    def translate_months(self, text: str) -> str:
        """Return a date of `strftime`, which has short English months, in this language."""

        def translate(found: re.Match[str]) -> str:
            month = self.short_months[_SHORT_MONTHS.index(found["month"])]
            day = found["day"]
            return month if day is None else self.short_day.replace("{day}", day).replace("{month}", month)

        return _SHORT_MONTH.sub(translate, text)


ENGLISH = Labels()

_SHORT_MONTHS = tuple(month[:3] for month in _MONTHS.split())
_SHORT_MONTH = re.compile(rf"(?:(?P<day>\d+) )?(?P<month>{'|'.join(_SHORT_MONTHS)})")


class Plot(msgspec.Struct, frozen=True, kw_only=True):
    """What to draw. `usages` follow one another without a hole; a gap is a usage that `is_gap`."""

    site: str
    plan: str = ""
    guideline: int | None = None
    usages: Sequence[Usage]
    marks: Sequence[Mark] = ()
    labels: Labels = ENGLISH


def draw_plot(plot: Plot, kind: Format) -> bytes:
    """Return the file. For one thread at a time, since matplotlib's settings are global.

    Raises ModuleNotFoundError if there is no matplotlib, and ValueError if there is no usage to draw.
    """
    if not plot.usages:
        raise ValueError("there is no usage to draw")
    matplotlib = importlib.import_module("matplotlib")
    # The same figures make the same file, so it has no random ids and no date.
    settings = {
        "font.family": ["DejaVu Sans", "sans-serif"],
        "font.size": 9.0,
        "hatch.linewidth": 0.6,
        "svg.fonttype": "none",
        "svg.hashsalt": "tlstunnel",
        "text.parse_math": False,  # a label may have a dollar sign
    }
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # not where it has its fonts, or that it looks for some
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # characters that the font lacks are drawn as boxes
        figure = importlib.import_module("matplotlib.figure").Figure(
            (WIDTH, HEIGHT), dpi=DOTS_PER_INCH, facecolor=_PAPER, layout="constrained"
        )
        _Drawing(figure.add_subplot(facecolor=_PAPER), plot).draw()
        file = io.BytesIO()
        figure.savefig(file, format=kind, metadata={"Software": None} if kind == "png" else {"Date": None})
    return _reduce_colours(file) if kind == "png" else _add_dark_colours(file.getvalue())


def _reduce_colours(file: io.BytesIO) -> bytes:
    """Return a PNG with 256 colours: 40 kB instead of 160 kB, since some webhooks take 100 kB at most."""
    reduced = io.BytesIO()
    # Pillow is what matplotlib writes PNG files with.
    importlib.import_module("PIL.Image").open(file).convert("RGB").quantize(256).save(reduced, "PNG", optimize=True)
    return reduced.getvalue()


class _Drawing:
    """Draws one plot, from what is behind to what is in front."""

    def __init__(self, axes: Any, plot: Plot) -> None:
        self._axes = axes
        self._plot = plot
        self._dates = importlib.import_module("matplotlib.dates")
        self._ticker = importlib.import_module("matplotlib.ticker")
        usages = condense(plot.usages, MOST_STEPS)
        self._usages = usages
        self._begin, self._end = usages[0].time, usages[-1].time + usages[-1].seconds
        self._edges = [_to_date(time) for time in (*(usage.time for usage in usages), self._end)]
        self._peaks = [math.nan if usage.level is None else float(usage.level.peak) for usage in usages]
        self._means = [math.nan if usage.level is None else usage.level.mean for usage in usages]
        known = [peak for peak in self._peaks if not math.isnan(peak)]
        self._most = max([*known, float(plot.guideline or 0), 1.0])
        self._words = plot.labels
        self._named: set[str] = set()

    def draw(self) -> None:
        """Draw everything."""
        self._draw_gaps()
        self._draw_levels()
        self._draw_guideline()
        self._draw_marks()
        self._draw_surroundings()

    def _name(self, label: str) -> str | None:
        """Return the label for the legend the first time, so that it is there once."""
        if label in self._named:
            return None
        self._named.add(label)
        return label

    def _draw_gaps(self) -> None:
        for begin, end in find_gaps(self._plot.usages):
            self._axes.axvspan(
                *(_to_date(begin), _to_date(end)),
                facecolor="none",
                edgecolor=_GAP,
                hatch="////",
                linewidth=0.0,
                alpha=0.8,
                label=self._name(self._words.gap),
                zorder=1,
            )

    def _draw_levels(self) -> None:
        stairs = self._axes.stairs
        stairs(self._means, self._edges, fill=True, color=_TUNNELS, alpha=0.22, linewidth=0.0, zorder=2)
        stairs(self._means, self._edges, baseline=None, color=_TUNNELS, linewidth=1.4, label=self._words.mean, zorder=4)
        stairs(
            *(self._peaks, self._edges),
            baseline=None,
            color=_TUNNELS,
            linewidth=0.8,
            linestyle=(0, (1, 1)),
            label=self._words.peak,
            zorder=3,
        )

    def _draw_guideline(self) -> None:
        guideline = self._plot.guideline
        if guideline is None:
            return
        over = [peak if peak > guideline else math.nan for peak in self._peaks]
        if any(not math.isnan(peak) for peak in over):
            # In an SVG, the opacity of a face would be that of its hatch too.
            shape: dict[str, Any] = {"baseline": guideline, "fill": True, "linewidth": 0.0, "zorder": 3}
            self._axes.stairs(over, self._edges, color=_OVER, alpha=0.25, **shape)
            hatch = {"facecolor": "none", "edgecolor": _OVER, "hatch": "xxxx", "label": self._words.over}
            self._axes.stairs(over, self._edges, **hatch, **shape)
        spikes = find_spikes(self._usages, guideline, (self._end - self._begin) / 24)
        places = [(_to_date(usage.time + usage.seconds / 2), peak) for usage, peak in spikes]
        if places:
            self._axes.scatter(
                *zip(*places, strict=True), marker="^", s=26, color=_OVER, label=self._words.spike, zorder=6
            )
            place, peak = max(places, key=lambda one: one[1])
            self._axes.annotate(
                _group(peak),
                (place, peak),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                color=_INK,
                zorder=7,
            )
        self._axes.axhline(
            guideline, color=_INK, linewidth=1.2, linestyle=(0, (6, 3)), label=self._words.guideline, zorder=5
        )
        self._axes.annotate(
            *(f"{self._words.guideline}\n{_group(guideline)}", (1.0, guideline)),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=_INK,
            annotation_clip=False,
        )

    def _draw_marks(self) -> None:
        """Draw those of the time shown: notices as lines with a sign, throttles as bars on top."""
        top = self._axes.get_xaxis_transform()
        for mark in self._plot.marks:
            since, until = max(mark.since, self._begin), min(mark.until, self._end)
            if until < since or mark.since > self._end:
                continue
            if mark.kind == "throttle":
                self._axes.axvspan(
                    *(_to_date(since), _to_date(until)),
                    *(0.965, 1.0),
                    color=_THROTTLE,
                    label=self._name(self._words.throttled),
                    zorder=6,
                )
                continue
            place = _to_date(since)
            self._axes.axvline(place, color=_NOTICE, linewidth=1.2, linestyle=(0, (3, 2)), zorder=5)
            self._axes.plot(
                *([place], [_SIGNS]),
                transform=top,
                marker="v",
                markersize=8,
                color=_NOTICE,
                linestyle="none",
                label=self._name(self._words.notice),
                zorder=8,
            )
            left = since > (self._begin + self._end) / 2
            self._axes.annotate(
                *(self._words.standings.get(mark.text, mark.text), (place, _SIGNS)),
                xycoords=top,
                xytext=(-7 if left else 7, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                color=_INK,
                bbox={"facecolor": _PAPER, "edgecolor": "none", "pad": 1.0, "alpha": 0.75},
                zorder=8,
            )

    def _draw_surroundings(self) -> None:
        axes, plot = self._axes, self._plot
        axes.set_xlim(self._edges[0], self._edges[-1])
        axes.set_ylim(0, self._most * 1.28)  # room for what is marked above
        locator = self._dates.AutoDateLocator(minticks=4, maxticks=9, tz=UTC)
        axes.xaxis.set_major_locator(locator)
        formatter = self._dates.ConciseDateFormatter(
            locator, tz=UTC, formats=_DATES, zero_formats=_ZERO_DATES, show_offset=False
        )
        write = formatter.format_ticks
        formatter.format_ticks = lambda values: list(map(self._words.translate_months, write(values)))
        axes.xaxis.set_major_formatter(formatter)
        axes.yaxis.set_major_locator(self._ticker.MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_major_formatter(lambda value, _: _group(value))
        begin, last = (datetime.fromtimestamp(time, UTC) for time in (self._begin, self._end - 1))
        axes.set_xlabel(f"{self._words.time}, {self._words.render_days(begin, last)}", color=_INK)
        axes.set_ylabel(self._words.tunnels, color=_INK)
        axes.tick_params(colors=_INK, length=3)
        axes.grid(axis="y", color=_FAINT, linewidth=0.7, zorder=0)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side in {"left", "bottom"})
            spine.set_color(_FAINT)
        plan = f" ({plot.plan})" if plot.plan else ""
        axes.set_title(f"{plot.site}{plan}", loc="left", color=_INK, fontsize=11, fontweight="bold", pad=26)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            *(handles, labels),
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=len(labels),
            frameon=False,
            fontsize=8.5,
            labelcolor=_INK,
            borderaxespad=0.3,
            handlelength=1.8,
            columnspacing=1.4,
        )


def find_gaps(usages: Sequence[Usage]) -> Iterator[tuple[int, int]]:
    """Return when each gap begins and ends."""
    for gap, group in groupby(usages, key=lambda usage: usage.is_gap):
        if gap:
            parts = list(group)
            yield parts[0].time, parts[-1].time + parts[-1].seconds


def find_spikes(usages: Sequence[Usage], guideline: int, apart: float = 0.0) -> list[tuple[Usage, int]]:
    """Return the highest peak of each time over the guideline. Times less than `apart` seconds apart are one."""
    spikes: list[tuple[Usage, int]] = []
    end = -math.inf
    for usage in usages:
        if usage.level is None or usage.level.peak <= guideline:
            continue
        spike = usage, usage.level.peak
        if usage.time - end > apart:
            spikes.append(spike)
        elif spike[1] > spikes[-1][1]:
            spikes[-1] = spike
        end = usage.time + usage.seconds
    return spikes


def condense(usages: Sequence[Usage], most: int) -> list[Usage]:
    """Return at most so many usages, each of which is the sum of some that follow one another."""
    size = -(-len(usages) // most)
    return [_add(usages[place : place + size]) for place in range(0, len(usages), size)]


def _add(usages: Sequence[Usage]) -> Usage:
    levels = [(usage.level, usage.samples) for usage in usages if usage.level is not None]
    samples = sum(number for _, number in levels)
    level = None
    if levels:
        mean = sum(level.mean * number for level, number in levels) / samples
        level = Level(max(level.peak for level, _ in levels), mean)
    return Usage(usages[0].time, sum(usage.seconds for usage in usages), samples, level, NOTHING)


def _to_date(time: float) -> float:
    """Return a Unix time as matplotlib's dates are: days since 1970."""
    return time / _DAY


def _group(number: float) -> str:
    """Group the digits as the notices do."""
    return f"{number:,.0f}".replace(",", " ")


def _add_dark_colours(svg: bytes) -> bytes:
    """Give an SVG other colours where the reader prefers dark pages. matplotlib writes colours into `style`."""
    rules = "".join(
        f'[style*="{name}: {colour}"]{{{name}:{dark}!important}}'
        for colour, dark in _DARK.items()
        for name in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    return re.sub(rb"(<svg\b[^>]*>)", lambda found: found[1] + style.encode(), svg, count=1)
