"""``tlstunnel usage show``: all sites or one, as a table, CSV, JSON or a plot.

Tested by tests/unit/test_cli_usage.py and tests/e2e/test_usage.py.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tlstunnel.cli.control import FOLDERS
from tlstunnel.cli.examples import render_examples
from tlstunnel.cli.usage import export, text
from tlstunnel.cli.usage.gather import (
    Report,
    SiteReport,
    config_option,
    find_source,
    gather,
    open_history,
    read_notices,
    read_usages,
)
from tlstunnel.cli.usage.period import STEPS, parse_period
from tlstunnel.cli.usage.rows import Row, make_rows
from tlstunnel.errors import StateError

PLOT_FORMATS = ("png", "svg")


@click.command(
    short_help="Show how much each site uses (the default).",
    epilog=render_examples(
        "tlstunnel usage show chat.example.com --since 24h",
        "tlstunnel usage show chat.example.com --plot chat.svg",
        "tlstunnel usage show --csv --by hour > usage.csv",
    ),
)
@click.argument("site", default="", metavar="[SITE]")
@click.option(
    "--since",
    default="7d",
    show_default=True,
    metavar="TIME",
    help="How far back: 7d, 24h, 90m, or a date such as 2026-11-01 (UTC).",
)
@click.option(
    "--by",
    type=click.Choice(list(STEPS)),
    help="The length of a step.  [default: day; hour up to 2d; minute up to 2h]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV: a line for each site and step.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw a plot of SITE into FILE, which ends in .png or .svg.",
)
@config_option
@click.option(
    "--control",
    type=click.Path(path_type=Path),
    help=f"The control socket of the tunnel.  [default: the only one that responds in {FOLDERS}]",
)
def command(  # noqa: PLR0913 - the command's options
    *,
    site: str,
    since: str,
    by: str | None,
    as_json: bool,
    as_csv: bool,
    plot_file: Path | None,
    file: Path | None,
    control: Path | None,
) -> None:
    """Show what all sites use, or one site with its days, where each stands compared with its guideline, and why.

    It reads the history, and asks the running tunnel what is now. If none is running, standings are those stored last.
    """
    if as_json + as_csv + (plot_file is not None) > 1:
        raise click.UsageError("--json, --csv and --plot exclude each other")
    if plot_file is not None and (not site or plot_file.suffix[1:].lower() not in PLOT_FORMATS):
        reason = "requires a site" if not site else f"expected a file that ends in .png or .svg, got {plot_file}"
        raise click.BadParameter(reason, param_hint="--plot")
    try:
        period = parse_period(since, by, time.time())
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--since") from None
    source = find_source(control, file)
    report = gather(source, period)
    if plot_file is not None:
        _write_plot(plot_file, report, report.find(site))
    elif as_csv:
        _print_csv(report, [report.find(site)] if site else [one for one in report.sites.values() if one.levels])
    elif as_json:
        click.echo(json.dumps(_to_json(report, site)))
    else:
        _print_text(report, site)


def _print_text(report: Report, site: str) -> None:
    if not site:
        lines = text.render_table(report)
    else:
        from tlstunnel.cli.usage.notices import render_notice  # noqa: PLC0415 - not for the table, which is fast

        found = report.find(site)
        notices = [
            line for record in read_notices(report.folder, site) for line in render_notice(record, with_site=False)
        ]
        rows = list(_read_rows(report, found))
        lines = text.render_site(report, found, rows, notices)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an old terminal has no bars
    click.echo("\n".join(lines))


def _print_csv(report: Report, sites: list[SiteReport]) -> None:
    """Print site by site, since there may be a million lines. Raises StateError rather than print an empty bill."""
    if not report.times:
        raise StateError(report.problem)
    export.write_csv(sys.stdout, ((site, _read_rows(report, site)) for site in sites))


def _to_json(report: Report, site: str) -> dict[str, Any]:
    if not site:
        return export.to_json(report, report.sites.values())
    from tlstunnel.cli.usage.notices import to_json  # noqa: PLC0415 - as above

    found = report.find(site)
    steps = [export.row_to_json(row) for row in _read_rows(report, found)]
    notices = [to_json(record) for record in read_notices(report.folder, site)]
    return export.to_json(report, [found]) | {"steps": steps, "notices": notices}


def _read_rows(report: Report, site: SiteReport) -> Iterator[Row]:
    if site.levels:  # otherwise it is not in the history yet
        with open_history(report.folder) as reader:
            usages = read_usages(reader, site.site, report.period, site.since)
        yield from make_rows(usages, site.since, report.period.until)


def _write_plot(file: Path, report: Report, site: SiteReport) -> None:
    """Raise StateError if there is no matplotlib, nothing to draw, or the file cannot be written."""
    from tlstunnel.plans.plot import draw_plot  # noqa: PLC0415 - only for plots
    from tlstunnel.plans.site_plot import read_plot  # noqa: PLC0415 - as above

    if report.folder is None:
        raise StateError(report.problem)
    period = report.period
    plot = read_plot(*(report.folder, site.site, period.since, period.until), plan=site.label, guideline=site.guideline)
    try:
        content = draw_plot(plot, "svg" if file.suffix.lower() == ".svg" else "png")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise StateError("--plot needs matplotlib: pip install 'tlstunnel[plot]'") from None
    try:
        file.write_bytes(content)
    except OSError as error:
        raise StateError(f"{file}: cannot be written: {error.strerror}") from None
    click.echo(f"wrote {file}", err=True)
