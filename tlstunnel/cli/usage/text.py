"""What ``tlstunnel usage`` prints for people: a table of all sites, or one site with its days.

Tested by tests/unit/test_cli_usage.py.
"""

import time
from collections.abc import Iterator, Sequence

import click

from tlstunnel.cli.tables import UNKNOWN, align, count, group, render_duration, render_size
from tlstunnel.cli.usage.gather import Report, SiteReport, render_time
from tlstunnel.cli.usage.rows import Row
from tlstunnel.commands.usage import Throttled
from tlstunnel.escaping import printable
from tlstunnel.plans.values import Assessment, Resource, Standing
from tlstunnel.state.history.reader import Level

BARS = "▁▂▃▄▅▆▇█"
GAP = "·"

MOST_BARS = 60
"""Of a sparkline: hours of two days and a half. Each bar of a longer time is the highest of several steps."""

_COLOURS = {
    Standing.SPIKE: "cyan",
    Standing.REPEATED: "yellow",
    Standing.SUSTAINED: "yellow",
    Standing.DISPROPORTIONATE: "yellow",
    Standing.SUSPECTED_ABUSE: "red",
}

_RESOURCES: dict[Resource, str] = {"tunnels": "tunnels", "handshakes": "handshakes", "bytes": "bytes", "cpu": "CPU"}


def render_table(report: Report) -> Iterator[str]:
    """Return the lines about all sites: first those whose standing weighs most, then the largest of their guideline."""
    yield from _render_head(report)
    shown = [site for site in report.sites.values() if site.configured or site.peak]
    if not shown:
        yield "there are no sites yet"
        return
    shown.sort(key=_weigh)
    steps = count(len(report.times), report.period.step)
    headings = ("site", "plan", "guideline", "now", "peak", "p95", "share", "standing", steps if report.times else "")
    rows = [headings, *(_to_cells(site) for site in shown)]
    lines = iter(align(rows, right={2, 3, 4, 5, 6}))
    yield _style(next(lines), bold=True)
    for site, line in zip(shown, lines, strict=True):
        standing = site.assessment.standing if site.assessment is not None else None
        yield _colour(line, standing)
        yield from (f"  {detail}" for detail in _render_details(site))


def render_site(report: Report, site: SiteReport, rows: Sequence[Row], notices: Sequence[str]) -> Iterator[str]:
    """Return the lines about one site: its plan, where it stands and why, its steps, and its notices."""
    yield from _render_head(report)
    plan = _describe_plan(site)
    yield f"{_style(printable(site.site), bold=True)}: {plan}"
    if site.now is not None:
        yield f"{count(site.now, 'tunnel')} open now"
    assessment = site.assessment
    if assessment is not None:
        yield _colour(f"{assessment.standing} since {render_time(assessment.since)}", assessment.standing)
        yield f"  {printable(assessment.sentence)}"
        yield from (f"  {line}" for line in _render_figures(assessment))
    yield from _render_measures(site)
    if site.muted is not None:
        yield f"no notices until {render_time(site.muted.until)}"
    yield ""
    yield from _render_rows(rows, report, site)
    yield ""
    if notices:
        yield _style("notices", bold=True)
        yield from notices
    else:
        yield "no notices"


def _render_head(report: Report) -> Iterator[str]:
    if not report.running:
        when = f"those of {render_time(report.assessed)}" if report.assessed is not None else "not known"
        yield _style(f"no tunnel responds: standings are {when}", fg="yellow")
    for warning in report.warnings:
        yield _style(f"warning: {printable(warning)}", fg="red")
    if report.problem:
        yield _style(f"warning: {printable(report.problem)}", fg="red")


def _weigh(site: SiteReport) -> tuple[float, float, float, str]:
    weight = site.assessment.standing.weight if site.assessment is not None else -1
    peak = max(site.peak or 0, site.now or 0)
    return -weight, -peak / site.guideline if site.guideline else 0.0, -peak, site.site


def _to_cells(site: SiteReport) -> tuple[str, ...]:
    assessment = site.assessment
    share = UNKNOWN
    if assessment is not None and assessment.figures.share is not None and assessment.figures.resource is not None:
        share = f"{_percent(assessment.figures.share)} of {_RESOURCES[assessment.figures.resource]}"
    standing = str(assessment.standing) if assessment is not None else UNKNOWN
    if not site.configured:
        standing = "not configured"
    return (
        printable(site.site),
        printable(site.label) or UNKNOWN,
        group(site.guideline),
        group(site.now),
        group(site.peak),
        group(site.p95),
        share,
        standing,
        draw_sparkline(site.levels, site.guideline),
    )


def draw_sparkline(levels: Sequence[Level | None], guideline: int | None) -> str:
    """Return a bar for the peak of each step. The highest bar is the guideline, or what is higher. A dot is a gap."""
    size = -(-len(levels) // MOST_BARS) or 1
    peaks = [
        max((level.peak for level in levels[place : place + size] if level is not None), default=None)
        for place in range(0, len(levels), size)
    ]
    most = max([*(peak for peak in peaks if peak is not None), guideline or 0, 1])
    last = len(BARS) - 1
    return "".join(GAP if peak is None else BARS[-(-peak * last // most)] for peak in peaks)


def _render_details(site: SiteReport) -> Iterator[str]:
    """Return why a site does not just stand within its guideline, and what is done about it."""
    assessment = site.assessment
    if assessment is not None and assessment.standing is not Standing.WITHIN:
        yield printable(assessment.sentence)
    yield from _render_measures(site)


def _render_measures(site: SiteReport) -> Iterator[str]:
    for throttle in site.throttles:
        yield _style(describe_throttle(throttle), fg="red")


def describe_throttle(throttle: Throttled) -> str:
    """Return in one line what a throttle does, until when, and why."""
    who = f" from {count(len(throttle.addresses), 'address', 'addresses')}" if throttle.addresses else ""
    before = "against abuse" if throttle.abuse else f"after {throttle.notice}"
    return (
        f"throttled: new handshakes{who} above {printable(throttle.rate)} get 429 until {render_time(throttle.until)},"
        f" {before}, by {printable(throttle.who)}: {printable(throttle.why)}"
    )


def _describe_plan(site: SiteReport) -> str:
    if not site.configured:
        return "not configured any more"
    if not site.label and site.guideline is None:
        return "no plan, so its usage is measured, and nothing else"
    guideline = "no guideline" if site.guideline is None else f"a guideline of {count(site.guideline, 'tunnel')}"
    return f"{printable(site.label)}, {guideline}" if site.label else guideline


def _render_figures(assessment: Assessment) -> Iterator[str]:
    """Return the figures that a standing is based on."""
    figures = assessment.figures
    if figures.guideline is not None and figures.hours_measured:
        p95 = f", highest 95th percentile of a day {group(figures.p95)}" if figures.p95 is not None else ""
        yield (
            f"over the guideline in {group(figures.hours_over)} of {count(figures.hours_measured, 'measured hour')},"
            f" on {count(figures.days_over, 'day')}, for many hours on {count(figures.days_sustained, 'day')} of the"
            f" last week; peak {group(figures.peak)}{p95}"
        )
    if figures.share is not None and figures.suggested_share is not None and figures.resource is not None:
        yield (
            f"{_percent(figures.share)} of the {_RESOURCES[figures.resource]} of all sites, where its plan suggests"
            f" {_percent(figures.suggested_share)}"
        )
    others = [str(standing) for standing in assessment.holds if standing is not assessment.standing]
    if others:
        yield f"also: {', '.join(others)}"


def _render_rows(rows: Sequence[Row], report: Report, site: SiteReport) -> Iterator[str]:
    """Return a line for each step, the latest first. What was not measured is a gap, and not zero."""
    if not rows:
        yield "nothing was measured in this time"
        return
    day = report.period.step == "day"
    headings = (
        report.period.step,
        "peak",
        "mean",
        "p95" if day else "",
        "handshakes",
        "refused",
        "up",
        "down",
        "measured",
    )
    cells: list[tuple[str, ...]] = [headings]
    over = []
    for row in reversed(rows):
        over.append(row.peak is not None and site.guideline is not None and row.peak > site.guideline)
        moment = time.strftime("%Y-%m-%d" if day else "%Y-%m-%d %H:%M", time.gmtime(row.time))
        if row.peak is None:
            cells.append((moment, *[""] * 7, "gap"))
            continue
        figures = (
            *(group(row.peak), group(row.mean), group(row.p95) if day else ""),
            *(group(row.counts.handshakes), group(row.refused), render_size(row.counts.bytes_up)),
            *(render_size(row.counts.bytes_down), _describe_measured(row)),
        )
        cells.append((moment, *figures))
    if not day:
        cells = [(*one[:3], *one[4:]) for one in cells]
    lines = iter(align(cells, right=range(1, len(cells[0]) - 1)))
    yield _style(next(lines), bold=True)
    for line, high in zip(lines, over, strict=True):
        yield _style(line, fg="cyan") if high else line


def _describe_measured(row: Row) -> str:
    if not row.gap:
        return "all"
    return f"{row.measured / (row.measured + row.gap):.0%}, gap {render_duration(row.gap)}".replace("%", " %")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 or share == 0 else f"{100 * share:.2g} %"


def _colour(line: str, standing: Standing | None) -> str:
    colour = _COLOURS.get(standing) if standing is not None else None
    return _style(line, fg=colour) if colour else line


def _style(text: str, *, bold: bool = False, fg: str | None = None) -> str:
    """Colour a text. Where the output is no terminal, `click.echo` takes the colours away."""
    return click.style(text, bold=bold or None, fg=fg)
