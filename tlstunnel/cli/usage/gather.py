"""What ``tlstunnel usage`` shows: the history, which it reads from the state folder, and what the running tunnel says.

If no tunnel is running, plans are those of the configuration file, and standings those that were stored last.

Tested by tests/unit/test_cli_usage.py and tests/e2e/test_usage.py.
"""

import contextlib
import difflib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from tlstunnel.addresses import quoted
from tlstunnel.cli.usage.period import Period
from tlstunnel.commands.usage import Muted, Throttled, UsageResult
from tlstunnel.errors import ControlError, StateError
from tlstunnel.plans.values import Assessment
from tlstunnel.processes.reach import NoTunnelRunning, find_control_socket, send_command
from tlstunnel.state.history.database import FILE_NAME
from tlstunnel.state.history.reader import HistoryReader, Level, Usage
from tlstunnel.state.history.samples import MINUTE
from tlstunnel.state.history.store import DAYS

if TYPE_CHECKING:  # imported when it is needed
    from tlstunnel.plans.notice_file import NoticeRecord

DEFAULT_FILE = Path("tlstunnel.toml")

_DAY = 86_400


def config_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option ``--config``, whose parameter is `file`."""
    text = "The configuration file, if no tunnel is running.  [default: tlstunnel.toml, if it is there]"
    return click.option("--config", "file", type=click.Path(path_type=Path), help=text)(command)


class SiteReport(msgspec.Struct, frozen=True, kw_only=True):
    """A site: its plan, where it stands, and its levels at the times of the report. None is what is not known.

    `p95` is the highest 95th percentile of a day of the period. `since` is when the site was first sampled.
    """

    site: str
    plan: str = ""
    label: str = ""
    guideline: int | None = None
    configured: bool = True
    now: int | None = None
    since: int | None = None
    assessment: Assessment | None = None
    throttles: tuple[Throttled, ...] = ()
    muted: Muted | None = None
    levels: tuple[Level | None, ...] = ()
    p95: float | None = None

    @property
    def peak(self) -> int | None:
        """The most open tunnels of the period, or now."""
        return max((*(level.peak for level in self.levels if level is not None), *self._open_now), default=None)

    @property
    def _open_now(self) -> tuple[int, ...]:
        return (self.now,) if self.now is not None else ()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All sites, by name. `times` are when the steps begin, each of which has `seconds`.

    `assessed` is when sites were assessed last. `running` is whether a tunnel has answered. `folder` is the state
    folder; None if the running tunnel keeps no history. `problem` is why something is not known, or "".
    """

    now: float
    running: bool
    assessed: float | None
    period: Period
    folder: Path | None
    times: tuple[int, ...] = ()
    seconds: int = 0
    sites: Mapping[str, SiteReport] = {}
    warnings: tuple[str, ...] = ()
    problem: str = ""

    def find(self, site: str) -> SiteReport:
        """Return the report of a site. Raises StateError that names the nearest one."""
        if site not in self.sites:
            raise StateError(describe_unknown_site(site, self.sites))
        return self.sites[site]


def describe_unknown_site(site: str, known: Sequence[str] | Mapping[str, object]) -> str:
    """Return why nothing can be said about a site of this name."""
    near = difflib.get_close_matches(site, known, n=1, cutoff=0.5)
    if near:
        return f"there is no site {quoted(site)}; did you mean {quoted(near[0])}?"
    return f"there is no site {quoted(site)}; tlstunnel usage lists all, each by the first of its names"


class Source:
    """The state folder, what the tunnel has said about its sites, and what else is known of them.

    `folder` is None if the running tunnel keeps no history.
    """

    def __init__(
        self, folder: Path | None, result: UsageResult, *, running: bool, plans: Mapping[str, SiteReport]
    ) -> None:
        self.folder = folder
        self.result = result
        self.running = running
        self.plans = plans


def ask_tunnel(control: Path | None) -> UsageResult:
    """Return what the running tunnel says about usage: the only one, without `control`.

    Raises ControlError, which is NoTunnelRunning if none responds.
    """
    response = send_command(control or find_control_socket(), {"do": "usage"})
    try:
        return msgspec.convert(response, UsageResult)
    except msgspec.ValidationError as error:
        raise ControlError(f"the tunnel's response is of another release: {error}") from None


def find_source(control: Path | None, file: Path | None) -> Source:
    """Ask the running tunnel, or read what it has left. Raises ControlError, StateError and ConfigurationError."""
    try:
        result = ask_tunnel(control)
    except NoTunnelRunning as error:
        if control is not None and file is None:  # whose state folder could be anywhere
            raise NoTunnelRunning(f"{error}; to look at what it has stored, use --config instead") from None
        place, configured = _read_configuration(file)
        return Source(place, _read_stored(place), running=False, plans=configured)
    plans = {name: SiteReport(site=name, now=number) for name, number in result.tunnels.items()}
    folder = Path(result.folder) if result.folder else None
    if result.problem and not result.assessments and folder is not None:
        stored = _read_stored(folder)
        kept = {name: getattr(stored, name) for name in ("assessed", "assessments", "throttles", "mutes")}
        result = msgspec.structs.replace(result, **kept)
    return Source(folder, result, running=True, plans=plans)


def _read_configuration(file: Path | None) -> tuple[Path, dict[str, SiteReport]]:
    """Return the state folder and the plans of a configuration file."""
    # Only needed if no tunnel is running, and half of what such a command has to import.
    from tlstunnel.config import load  # noqa: PLC0415
    from tlstunnel.plans.guidelines import find_plans  # noqa: PLC0415
    from tlstunnel.state.folder import locate_state_folder  # noqa: PLC0415

    if file is None and not DEFAULT_FILE.exists():
        return locate_state_folder(None, os.environ), {}
    config = load(file or DEFAULT_FILE)
    plans = {
        name: SiteReport(site=name, plan=plan.plan, label=plan.label, guideline=plan.guideline)
        for name, plan in find_plans(config).items()
    }
    return locate_state_folder(config.state.dir, os.environ), plans


def _read_stored(folder: Path) -> UsageResult:
    """Return what is known of the sites when no tunnel is running."""
    from tlstunnel.plans.assessments import read_assessments  # noqa: PLC0415 - as above
    from tlstunnel.plans.notice_file import reading  # noqa: PLC0415 - as above

    now = time.time()
    stored, assessed = read_assessments(folder)
    throttles: tuple[Throttled, ...] = ()
    mutes: tuple[Muted, ...] = ()
    with contextlib.suppress(StateError), reading(folder) as notices:
        throttles = tuple(msgspec.convert(one, Throttled, from_attributes=True) for one in notices.read_throttles(now))
        mutes = tuple(Muted(one.site, one.until, one.since, one.who) for one in notices.read_mutes(now))
    return UsageResult(now=now, assessed=assessed, assessments=stored, throttles=throttles, mutes=mutes)


def gather(source: Source, period: Period) -> Report:
    """Return the report. Without a history it has only what the tunnel says. Raises StateError if there is neither."""
    result = source.result
    reports = dict(source.plans)
    for assessment in result.assessments:
        reports[assessment.site] = _add_assessment(reports.get(assessment.site), assessment, running=source.running)
    problem = result.problem
    times: tuple[int, ...] = ()
    try:
        with open_history(source.folder) as reader:
            period = clip(reader, period)
            levels = reader.read_levels(period.resolution, period.since, period.until)
            days = reader.read_levels(DAYS, period.since // _DAY * _DAY, period.until)
            since = {site.name: site.since for site in reader.read_sites()}
        times = levels.times
        for name, found in levels.sites.items():
            report = reports.get(name) or SiteReport(site=name, configured=not reports)
            p95 = max((day.p95 for day in days.sites.get(name, ()) if day and day.p95 is not None), default=None)
            reports[name] = msgspec.structs.replace(report, levels=found, p95=p95, since=since.get(name))
    except StateError as error:
        if not reports and not source.running:
            there = source.folder is None or (source.folder / FILE_NAME).exists()
            hint = "" if there else "; is it the state folder? --config FILE says where"
            raise StateError(f"{error}{hint}") from None
        problem = problem or str(error)
    _add_measures(reports, result)
    return Report(
        now=result.now,
        running=source.running,
        assessed=result.assessed,
        period=period,
        folder=source.folder,
        times=times,
        seconds=period.resolution.length * MINUTE,
        sites=dict(sorted(reports.items())),
        warnings=result.warnings,
        problem=problem,
    )


def _add_assessment(report: SiteReport | None, assessment: Assessment, *, running: bool) -> SiteReport:
    """Add an assessment. The plan of a tunnel that is not running is that of its file, which may have changed."""
    if report is None or running:
        report = SiteReport(
            site=assessment.site,
            plan=assessment.plan,
            label=assessment.label,
            guideline=assessment.figures.guideline,
            now=(report.now if report is not None else None) if running else None,
        )
        if running and report.now is None:
            report = msgspec.structs.replace(report, now=assessment.figures.now)
    return msgspec.structs.replace(report, assessment=assessment)


def _add_measures(reports: dict[str, SiteReport], result: UsageResult) -> None:
    """Add what is done about sites: throttles and mutes."""
    throttles: dict[str, list[Throttled]] = {}
    for throttle in result.throttles:
        throttles.setdefault(throttle.site, []).append(throttle)
    for name, found in throttles.items():
        report = reports.get(name) or SiteReport(site=name)
        reports[name] = msgspec.structs.replace(report, throttles=tuple(found))
    for mute in result.mutes:
        if mute.site in reports:
            reports[mute.site] = msgspec.structs.replace(reports[mute.site], muted=mute)


def clip(reader: HistoryReader, period: Period) -> Period:
    """Return the part of a period of which the history has something, and say if it is only a part."""
    begin = reader.read_begin(period.resolution)
    if begin is None or period.since >= begin:
        return period
    days = reader.read_begin(DAYS)
    if days is not None and days < begin // _DAY * _DAY and period.since < begin // _DAY * _DAY:
        click.echo(f"{period.step}s are kept since {render_time(begin)}; --by day shows more", err=True)
    return Period(float(begin), period.until, period.step)


def read_usages(reader: HistoryReader, site: str, period: Period, since: int | None) -> tuple[Usage, ...]:
    """Return the usage of a site, from its first sample on."""
    seconds = period.resolution.length * MINUTE
    begin = max(period.since, (since or 0) // seconds * seconds)
    return reader.read_usage(site, period.resolution, begin, period.until)


def open_history(folder: Path | None) -> HistoryReader:
    """Return a reader, which opens the file when it is used. Raises StateError if there is no history at all."""
    if folder is None:
        raise StateError("the tunnel keeps no history: give a site a plan, or set state.dir")
    return HistoryReader(folder)


def read_notices(folder: Path | None, site: str | None) -> "list[NoticeRecord]":
    """Return the latest notices, of all sites or of one; none if nothing was stored yet. Raises StateError."""
    from tlstunnel.plans.notice_file import FILE_NAME, reading  # noqa: PLC0415 - the table is faster without

    if folder is None or not (folder / FILE_NAME).exists():
        return []
    with reading(folder) as notices:
        return notices.read_notices(site)


def render_time(moment: float) -> str:
    """Return a Unix time as people read it, in UTC."""
    return time.strftime("%-d %b %Y, %H:%M UTC", time.gmtime(moment))
