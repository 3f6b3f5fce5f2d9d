"""Usage for programs: CSV, which is complete enough to bill from, and JSON (docs/cli.md).

Tested by tests/unit/test_cli_usage.py.
"""

import csv
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

import msgspec

from tlstunnel.cli.usage.gather import Report, SiteReport
from tlstunnel.cli.usage.rows import Row
from tlstunnel.state.history.samples import Counts

COLUMNS = (
    *("site", "plan", "guideline", "time", "seconds", "measured", "gap", "peak", "mean", "p95"),
    *(name for name in Counts._fields if name != "cpu"),
    "cpu_seconds",
)
"""Of the CSV. Their order and names stay; new ones are added at the end."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def write_csv(file: TextIO, sites: Iterable[tuple[SiteReport, Iterable[Row]]]) -> None:
    """Write a line for each site and step. What is not known is empty."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for site, rows in sites:
        first = (to_cell(site.site), to_cell(site.plan), "" if site.guideline is None else site.guideline)
        writer.writerows((*first, *_to_values(row)) for row in rows)


def to_cell(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula, by an apostrophe (OWASP, "CSV Injection")."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _to_values(row: Row) -> Iterator[object]:
    yield time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(row.time))
    yield from (row.seconds, row.measured, row.gap)
    if row.peak is None:
        yield from [""] * (3 + len(Counts._fields))
        return
    yield row.peak
    yield _round(row.mean)
    yield "" if row.p95 is None else _round(row.p95)
    yield from row.counts[:-1]
    yield f"{row.counts.cpu / 1e6:.6f}"


def _round(number: float | None) -> float | None:
    return None if number is None else round(number, 3)


def to_json(report: Report, sites: Iterable[SiteReport]) -> dict[str, Any]:
    """Return what `--json` prints about these sites."""
    return {
        "running": report.running,
        "now": report.now,
        "assessed": report.assessed,
        "step": report.period.step,
        "seconds": report.seconds,
        "times": list(report.times),
        "warnings": [*report.warnings, *([report.problem] if report.problem else [])],
        "sites": [_site_to_json(site) for site in sites],
    }


def _site_to_json(site: SiteReport) -> dict[str, Any]:
    assessment = site.assessment
    figures = assessment.figures if assessment is not None else None
    return {
        "site": site.site,
        "configured": site.configured,
        "plan": site.plan,
        "label": site.label,
        "guideline": site.guideline,
        "now": site.now,
        "peak": site.peak,
        "p95": _round(site.p95),
        "share": figures.share if figures is not None else None,
        "suggested_share": figures.suggested_share if figures is not None else None,
        "resource": figures.resource if figures is not None else None,
        "standing": assessment.standing if assessment is not None else None,
        "since": assessment.since if assessment is not None else None,
        "sentence": assessment.sentence if assessment is not None else "",
        "figures": msgspec.to_builtins(figures) if figures is not None else {},
        "throttles": msgspec.to_builtins(site.throttles),
        "muted_until": site.muted.until if site.muted is not None else None,
        "peaks": [level.peak if level is not None else None for level in site.levels],
    }


def row_to_json(row: Row) -> dict[str, Any]:
    """Return a step of one site. A gap has no figures."""
    fields: dict[str, Any] = {
        name: getattr(row, name) for name in ("time", "seconds", "measured", "gap", "peak", "mean", "p95")
    }
    counts: Mapping[str, int] = row.counts._asdict()
    known = row.peak is not None
    fields |= {name: number if known else None for name, number in counts.items() if name != "cpu"}
    return fields | {"cpu_seconds": row.counts.cpu / 1e6 if known else None}
