"""`tlstunnel usage`: what it prints of a real history, while a tunnel responds and while none does."""

import asyncio
import contextlib
import csv
import io
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from tests.commands import run_main
from tests.harness import REPOSITORY, assert_below
from tests.unit.test_plans_plot import draw_texts
from tlstunnel.cli import usage
from tlstunnel.cli.tables import render_size
from tlstunnel.cli.usage.export import COLUMNS, to_cell
from tlstunnel.cli.usage.period import STEPS, Period, parse_period
from tlstunnel.cli.usage.rows import make_rows
from tlstunnel.cli.usage.text import BARS, GAP, MOST_BARS, draw_sparkline
from tlstunnel.commands.usage import Acknowledged, Muted, Released, Throttled, UsageResult
from tlstunnel.errors import ControlError
from tlstunnel.plans.assessments import store_assessments
from tlstunnel.plans.notice_file import FILE_NAME as NOTICE_FILE
from tlstunnel.plans.notice_file import NOTICES, Channel, Delivery, NoticeFile, State, Target, Throttle
from tlstunnel.plans.notices import Due
from tlstunnel.plans.plot import Plot
from tlstunnel.plans.values import Assessment, Figures, Notice, Standing
from tlstunnel.processes.control import ControlSocket
from tlstunnel.state.history.database import FILE_NAME, HISTORY, MAX_SITES, open_for_writing, transaction
from tlstunnel.state.history.reader import Level, Usage
from tlstunnel.state.history.samples import NOTHING, Counts, Minute, SiteMinute
from tlstunnel.state.history.store import _UPSERTS, DAYS, HOURS, Keep, Store

MINUTE, HOUR, DAY = 60, 3600, 86_400

CHAT, EVIL = "chat.example.com", "=cmd.example.com"

GAP_HOURS = range(30, 42)
"""Hours before the present one in which nothing was measured."""

CONFIGURATION = """
state.dir = "."

[[sites]]
names = ["chat.example.com", "alias.example.com"]
origins = ["localhost:3000"]
plan = "free"
guideline = 20

[[sites]]
names = ["idle.example.com"]
origins = ["localhost:3000"]
"""


def make_assessment(standing: Standing = Standing.REPEATED, **figures: Any) -> Assessment:
    return Assessment(
        site=CHAT,
        plan="free",
        label="Free",
        standing=standing,
        holds=(Standing.SPIKE, standing),
        since=time.time() - 2 * DAY,
        figures=Figures(guideline=20, now=17, hours_measured=60, hours_over=9, days_over=5, **figures),
        sentence="More tunnels than the guideline of 20 were open.",
    )


def make_notice(now: float) -> Notice:
    return Notice(
        id="notice-0123456789abcdef",
        site=CHAT,
        standing=Standing.REPEATED,
        created=now - 3 * HOUR,
        recipient="contact",
        address="https://hooks.example.com/a-secret-token",
        assessment=make_assessment(),
        language="en",
    )


@pytest.fixture
def now() -> float:
    return time.time()


@pytest.fixture
def folder(tmp_path: Path, now: float) -> Path:
    """A state folder with three days of two sites, one row for each hour, and 12 hours without any."""
    present = int(now // HOUR)
    minutes = []
    for hour in range(present - 72, present + 1):
        if present - hour in GAP_HOURS:
            continue
        samples = HOUR if hour < present else 1
        level = 30 if hour % 24 == 12 else 10
        counts = Counts(level, 1, 2, 3, 4, 5, 6, 7, 8, 1000, 2_000_000, 1_500_000)
        sites = (SiteMinute(CHAT, level, level * samples, counts), SiteMinute(EVIL, 1, samples, NOTHING))
        minutes.append(Minute(hour * 60, samples, sites, {}))
    with contextlib.closing(open_for_writing(tmp_path / FILE_NAME, HISTORY)) as connection:
        Store(connection, Keep()).write(minutes)
    (tmp_path / "tlstunnel.toml").write_text(CONFIGURATION)
    return tmp_path


def add_notice(folder: Path, now: float) -> None:
    notice = make_notice(now)
    hook, mail = Target(Channel.WEBHOOK, notice.address), Target(Channel.MAIL, "owner@example.com")
    with contextlib.closing(open_for_writing(folder / NOTICE_FILE, NOTICES)) as connection:
        file = NoticeFile(connection)
        file.record(Due((notice,)), {notice.id: (hook, mail)})
        file.begin(Delivery(notice, hook, 0), now - DAY, now)
        file.finish(Delivery(notice, hook, 0), State.ACCEPTED, "200 OK")
        file.begin(Delivery(notice, mail, 0), now - DAY, now + HOUR)
        file.finish(Delivery(notice, mail, 0), State.PENDING, "no \x1b[2J connection", now + HOUR)
        file.acknowledge(notice.id, "root", now)
        throttle = Throttle(site=CHAT, rate="10/second", since=now - HOUR, until=now + HOUR, why="loops", who="root")
        file.add_throttle(throttle)


@contextlib.contextmanager
def answering(path: Path, answers: Mapping[str, msgspec.Struct | ControlError]) -> Iterator[list[Mapping[str, Any]]]:
    """Respond on a real control socket with these. Yields the requests."""
    requests: list[Mapping[str, Any]] = []
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    done = asyncio.Event()

    async def handle(request: Mapping[str, Any], _: int) -> Mapping[str, Any]:
        requests.append(request)
        answer = answers[request["do"]]
        if isinstance(answer, ControlError):
            raise answer
        fields: Mapping[str, Any] = msgspec.to_builtins(answer)
        return fields

    async def serve() -> None:
        server = ControlSocket.bind(path)
        await server.serve(dict.fromkeys(answers, handle))
        ready.set()
        await done.wait()
        await server.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield requests
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(10)
        loop.close()


def use(folder: Path, *words: str, status: int = 0) -> Result:
    """Run the command while no tunnel responds."""
    result = run_main("usage", *words, "--config", str(folder / "tlstunnel.toml"), "--control", str(folder / "none"))
    assert result.exit_code == status, result.output
    return result


@contextlib.contextmanager
def running(folder: Path, now: float, /, **values: Any) -> Iterator[list[str]]:
    """Yield the options for a tunnel that responds."""
    figures: dict[str, Any] = {"resource": "bytes", "share": 0.123, "suggested_share": 0.05}
    result = UsageResult(
        now=now,
        assessed=now - 20,
        assessments=(make_assessment(Standing.REPEATED, **figures),),
        folder=str(folder),
        tunnels={CHAT: 18, "idle.example.com": 0},
    )
    path = folder / "c.sock"
    with answering(path, {"usage": msgspec.structs.replace(result, **values)}):
        yield ["--control", str(path)]


# Periods


@pytest.mark.parametrize(
    ("text", "step", "count"),
    [("7d", "day", 7), ("3d", "day", 3), ("2d", "hour", 48), ("24h", "hour", 24), ("2h", "minute", 120)],
)
def test_the_last_step_is_the_present_one(text: str, step: str, count: int) -> None:
    now = 1_795_943_957.7
    period = parse_period(text, None, now)
    seconds = STEPS[step].length * MINUTE
    assert period == Period(float((now // seconds - count + 1) * seconds), now, step)


@given(st.integers(1, 9999), st.sampled_from("mhd"), st.sampled_from([None, *STEPS]), st.floats(1e9, 4e9))
def test_a_period_begins_with_a_step_and_is_as_long_as_asked(
    number: int, unit: str, by: str | None, now: float
) -> None:
    period = parse_period(f"{number}{unit}", by, now)
    seconds = period.resolution.length * MINUTE
    span = number * {"m": MINUTE, "h": HOUR, "d": DAY}[unit]
    assert period.since % seconds == 0
    assert period.since == 0 or span - seconds <= now - period.since <= span + seconds
    assert by in {None, period.step}


def test_a_date_is_a_day_of_utc() -> None:
    assert parse_period("2026-11-01", None, 1_795_943_957.0) == Period(1_793_491_200.0, 1_795_943_957.0, "day")
    assert parse_period("2026-11-29", None, 1_795_943_957.0).step == "hour"


@pytest.mark.parametrize(
    "text", ["", "7", "d", "7y", "-7d", "7 d", "0d", "2026-13-01", "2999-01-01", "\u0661d", "7d\n"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a time such as 7d|there is no date|not in the past"):
        parse_period(text, None, 1_795_943_957.0)


# Rows


def make_usage(begin: int, seconds: int, samples: int, peak: int = 3) -> Usage:
    return Usage(begin, seconds, samples, Level(peak, peak / 2) if samples else None, NOTHING)


def test_what_was_not_measured_is_a_gap() -> None:
    begin = 1_795_910_400
    usages = [make_usage(begin + place * HOUR, HOUR, samples) for place, samples in enumerate((3600, 0, 1200, 3601))]
    rows = list(make_rows(usages, None, begin + 10 * HOUR))
    assert [(row.seconds, row.measured, row.gap) for row in rows] == [
        *((3600, 3600, 0), (3600, 0, 3600), (3600, 1200, 2400), (3600, 3600, 0))
    ]
    assert [row.peak for row in rows] == [3, None, 3, 3]
    assert [row.mean for row in rows] == [1.5, None, 1.5, 1.5]


def test_neither_what_is_to_come_nor_what_was_before_the_site_is_a_gap() -> None:
    begin = 1_795_910_400
    usages = [make_usage(begin, HOUR, 1800), make_usage(begin + HOUR, HOUR, 600), make_usage(begin + 2 * HOUR, HOUR, 0)]
    rows = list(make_rows(usages, begin + HOUR // 2, begin + HOUR + 10 * MINUTE + 65))
    assert [(row.time, row.seconds, row.gap) for row in rows] == [(begin, 1800, 0), (begin + HOUR, 600, 0)]


@given(st.lists(st.integers(0, 3700), max_size=5), st.integers(0, 6 * HOUR), st.none() | st.integers(0, 6 * HOUR))
def test_what_was_measured_and_the_gap_are_the_whole(samples: list[int], passed: int, since: int | None) -> None:
    begin = 1_795_910_400
    usages = [make_usage(begin + place * HOUR, HOUR, number) for place, number in enumerate(samples)]
    for row in make_rows(usages, None if since is None else begin + since, begin + passed):
        assert row.measured + row.gap == row.seconds <= HOUR
        assert min(row.measured, row.gap) >= 0
        assert (row.peak is None) == (row.measured == 0)


# Sparklines and units


def test_a_bar_is_as_high_as_its_part_of_the_guideline() -> None:
    levels = [Level(peak, 0.0) for peak in (0, 1, 50, 100)]
    assert draw_sparkline([*levels, None], 100) == f"{BARS[0]}{BARS[1]}{BARS[4]}{BARS[7]}{GAP}"
    assert draw_sparkline([Level(7, 0.0), Level(14, 0.0)], None) == f"{BARS[4]}{BARS[7]}"
    assert draw_sparkline([Level(0, 0.0)], None) == BARS[0]
    assert draw_sparkline([], 5) == ""


@given(st.lists(st.none() | st.integers(0, 10**6), max_size=200), st.none() | st.integers(1, 10**6))
def test_a_sparkline_is_short_and_has_no_gap_that_was_none(peaks: list[int | None], guideline: int | None) -> None:
    line = draw_sparkline([None if peak is None else Level(peak, 0.0) for peak in peaks], guideline)
    assert len(line) <= MOST_BARS
    assert set(line) <= {*BARS, GAP}
    assert (set(line) <= {GAP}) == all(peak is None for peak in peaks)


def test_sizes_have_a_unit() -> None:
    assert [render_size(size) for size in (0, 999, 1000, 1_230_000, 5e9, 7e14)] == [
        *("0 B", "999 B", "1.0 kB", "1.2 MB", "5.0 GB", "700 TB")
    ]


# All sites


def test_the_table_while_a_tunnel_is_running(folder: Path, now: float) -> None:
    throttle = Throttled(
        site=CHAT,
        addresses=("192.0.2.0/24",),
        rate="10/second",
        since=now,
        until=now,
        why="a\x1b[2J",
        who="root",
        abuse=True,
    )
    with running(folder, now, throttles=(throttle,), warnings=("Descriptors run out.",)) as options:
        lines = run_main("usage", "--since", "3d", *options).output.splitlines()
    assert lines[0] == "warning: Descriptors run out."
    headings = ["site", "plan", "guideline", "now", "peak", "p95", "share", "standing", "3 days"]
    assert [part.strip() for part in lines[1].split("  ") if part] == headings
    first = [part.strip() for part in lines[2].split("  ") if part.strip()]
    assert first[:5] == [CHAT, "Free", "20", "18", "30"]
    assert first[6:8] == ["12 % of bytes", "repeated"]
    assert len(first[8]) == 3
    assert lines[3] == "  More tunnels than the guideline of 20 were open."
    assert "from 1 address above 10/second get 429 until" in lines[4]
    assert r"against abuse, by root: a\x1b[2J" in lines[4]
    assert any(line.startswith("idle.example.com") for line in lines)
    assert any(line.startswith(EVIL) and "not configured" in line for line in lines)


def test_the_heaviest_standing_is_first(folder: Path, now: float) -> None:
    spike = msgspec.structs.replace(make_assessment(Standing.SPIKE), site="a.example.com")
    abuse = msgspec.structs.replace(make_assessment(Standing.SUSPECTED_ABUSE), site="z.example.com")
    with running(folder, now, assessments=(spike, make_assessment(), abuse)) as options:
        output = run_main("usage", *options).output
    places = [output.index(name) for name in ("z.example.com", CHAT, "a.example.com", "idle.example.com")]
    assert places == sorted(places)


def test_the_table_while_none_is_running(folder: Path, now: float) -> None:
    store_assessments(folder, [make_assessment()])
    add_notice(folder, now)
    lines = use(folder).stdout.splitlines()
    assert lines[0].startswith("no tunnel responds: standings are those of ")
    assert lines[2].split()[:5] == [CHAT, "Free", "20", "-", "30"]
    assert "repeated" in lines[2]
    assert lines[4].startswith("  throttled: new handshakes above 10/second get 429 until")
    assert "after notice-0123456789abcdef, by root: loops" in lines[4]


def test_the_table_without_anything_stored(folder: Path) -> None:
    lines = use(folder).stdout.splitlines()
    assert lines[0] == "no tunnel responds: standings are not known"


def test_before_the_first_minute_there_is_what_is_now(tmp_path: Path, now: float) -> None:
    with running(tmp_path, now) as options:
        output = run_main("usage", *options).output
        assert "history.db: no history yet" in output
        assert "no history yet" in run_main("usage", CHAT, *options).output
        bill = run_main("usage", "--csv", *options)
        assert (bill.exit_code, bill.stdout) == (1, "")
        assert bill.stderr.endswith("history.db: no history yet\n")
    assert CHAT in output
    (tmp_path / "tlstunnel.toml").write_text('state.dir = "."')
    result = use(tmp_path, status=1)
    assert result.stderr.splitlines()[-1].endswith(
        "history.db: no history yet; is it the state folder? --config FILE says where"
    )


def test_while_the_tunnel_cannot_say_where_sites_stand(folder: Path, now: float) -> None:
    store_assessments(folder, [make_assessment()])
    with running(folder, now, assessments=(), problem="the admin process is being started") as options:
        lines = run_main("usage", *options).stdout.splitlines()
    assert lines[0] == "warning: the admin process is being started"
    assert lines[2].split()[:5] == [CHAT, "Free", "20", "18", "30"]
    assert "repeated" in lines[2]


def test_a_tunnel_without_a_history(tmp_path: Path, now: float) -> None:
    with running(tmp_path, now, folder="", assessments=()) as options:
        assert run_main("usage", *options).stdout.splitlines() == [
            "warning: the tunnel keeps no history: give a site a plan, or set state.dir",
            "site              plan  guideline  now  peak  p95  share  standing",
            f"{CHAT}  -             -   18    18    -      -  -",
            "idle.example.com  -             -    0     0    -      -  -",
        ]
        assert "18 tunnels open now" in run_main("usage", CHAT, *options).stdout
        assert run_main("usage", "notices", *options).stdout == "no notices\n"
        result = run_main("usage", CHAT, "--plot", str(tmp_path / "a.png"), *options)
        assert (result.exit_code, result.stderr) == (
            *(1, "tlstunnel: the tunnel keeps no history: give a site a plan, or set state.dir\n"),
        )


def test_a_response_of_another_release(tmp_path: Path) -> None:
    with answering(tmp_path / "c.sock", {"usage": Muted("a", 1.0, 1.0, "root")}):
        result = run_main("usage", "--control", str(tmp_path / "c.sock"))
    assert result.exit_code == 1
    assert "the tunnel's response is of another release" in result.stderr


def test_where_it_looks_while_none_is_running(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(folder))
    monkeypatch.setenv("STATE_DIRECTORY", str(folder / "absent"))
    monkeypatch.chdir(folder)
    assert CHAT in run_main("usage").stdout
    (folder / "tlstunnel.toml").unlink()
    assert run_main("usage").exit_code == 1
    assert not (folder / "absent").exists()
    monkeypatch.setenv("STATE_DIRECTORY", str(folder))
    assert CHAT in run_main("usage").stdout


def test_a_tunnel_that_is_named_is_not_taken_for_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(folder))
    result = run_main("usage", "--control", "none")
    assert result.exit_code == 1
    assert result.stderr == (
        "tlstunnel: none: cannot reach the tunnel: No such file or directory; to look at what it has stored, use"
        " --config instead\n"
    )


def test_a_damaged_history(folder: Path) -> None:
    (folder / FILE_NAME).write_text("nothing of ours")
    (folder / "tlstunnel.toml").write_text('state.dir = "."')
    assert use(folder, status=1).stderr.endswith("or set state.dir to another folder\n")


# One site


def test_one_site_with_its_days_and_notices(folder: Path, now: float) -> None:
    add_notice(folder, now)
    with running(folder, now, mutes=(Muted(CHAT, now, now, "root"),)) as options:
        lines = run_main("usage", CHAT, "--since", "4d", *options).output.splitlines()
    assert lines[:2] == [f"{CHAT}: Free, a guideline of 20 tunnels", "18 tunnels open now"]
    assert lines[2].startswith("repeated since ")
    assert lines[4].strip() == (
        "over the guideline in 9 of 60 measured hours, on 5 days, for many hours on 0 days of the last week; peak 0"
    )
    assert lines[5].strip() == "12 % of the bytes of all sites, where its plan suggests 5 %"
    assert lines[6].strip() == "also: spike"
    assert lines[7].startswith("no notices until ")
    assert lines[9].split() == [
        *("day", "peak", "mean", "p95", "handshakes", "refused", "up", "down", "measured"),
    ]
    assert lines[10].startswith(time.strftime("%Y-%m-%d", time.gmtime(now)))
    notices = lines[lines.index("notices") + 1 :]
    assert notices[0].startswith("notice-0123456789abcdef  ")
    assert notices[0].endswith("repeated, to the site's contact")
    assert notices[1] == "  More tunnels than the guideline of 20 were open."


def test_a_gap_is_shown_as_a_gap(folder: Path) -> None:
    """In hours, and as a part of days."""
    hours = use(folder, CHAT, "--since", "48h").stdout.splitlines()
    gaps = [line for line in hours if line.endswith("  gap")]
    assert len(gaps) == len(GAP_HOURS)
    assert all(line.split()[2:] == ["gap"] for line in gaps)
    assert any(" %, gap " in line for line in use(folder, CHAT, "--since", "4d").stdout.splitlines())


def test_a_site_that_is_not_known(folder: Path) -> None:
    for words in (["chat.exmaple.com"], ["chat.exmaple.com", "--csv"], ["notices", "chat.exmaple.com"]):
        stderr = use(folder, *words, status=1).stderr
        assert stderr.splitlines()[-1] == (f'tlstunnel: there is no site "chat.exmaple.com"; did you mean "{CHAT}"?')
    assert "tlstunnel usage lists all" in use(folder, "zzz", status=1).stderr


def test_a_configured_site_that_was_never_sampled(folder: Path) -> None:
    output = use(folder, "idle.example.com").stdout
    assert "no plan, so its usage is measured, and nothing else" in output
    assert "nothing was measured in this time" in output


def test_what_is_only_kept_as_days_is_said(folder: Path, now: float) -> None:
    with contextlib.closing(open_for_writing(folder / FILE_NAME, HISTORY)) as connection:
        connection.execute("DELETE FROM hours WHERE time < ?", (now // HOUR - 10,))
    result = use(folder, CHAT, "--since", "4d", "--by", "hour")
    assert "hours are kept since " in result.stderr
    assert "; --by day shows more" in result.stderr
    assert len([line for line in result.stdout.splitlines() if line.startswith("20")]) == 11


# For programs


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_csv_has_everything_that_was_counted(folder: Path, now: float) -> None:
    rows = read_csv(use(folder, "--csv", "--since", "4d").stdout)
    assert tuple(rows[0]) == COLUMNS
    chat = [row for row in rows if row["site"] == CHAT]
    hours = 73 - len(GAP_HOURS)
    assert sum(int(row["short"]) for row in chat) == hours
    assert sum(int(row["bytes_down"]) for row in chat) == 2_000_000 * hours
    assert sum(float(row["cpu_seconds"]) for row in chat) == pytest.approx(1.5 * hours)
    assert max(int(row["peak"]) for row in chat) == 30
    assert {(row["plan"], row["guideline"]) for row in chat} == {("free", "20")}
    assert sum(int(row["gap"]) for row in chat) >= (len(GAP_HOURS) - 1) * HOUR
    first = time.strptime(chat[0]["time"], "%Y-%m-%dT%H:%M:%SZ")
    assert (first.tm_hour, first.tm_min, first.tm_sec) == (0, 0, 0)


def test_a_gap_is_empty_in_the_csv(folder: Path) -> None:
    rows = read_csv(use(folder, CHAT, "--csv", "--since", "4d", "--by", "hour").stdout)
    gaps = [row for row in rows if row["measured"] == "0"]
    assert len(gaps) == len(GAP_HOURS)
    assert {row["gap"] for row in gaps} == {"3600"}
    assert {row[name] for row in gaps for name in COLUMNS[7:]} == {""}
    assert {row["gap"] for row in rows[:-1] if row not in gaps} == {"0"}


def test_no_cell_is_a_formula(folder: Path) -> None:
    names = {row["site"] for row in read_csv(use(folder, "--csv").stdout)}
    assert names == {CHAT, f"'{EVIL}"}


@given(st.text())
def test_what_a_spreadsheet_could_run_is_quoted(text: str) -> None:
    cell = to_cell(text)
    assert not cell or cell[0] not in "=+-@\t\r\n"
    assert cell.removeprefix("'") == text.removeprefix("'")


def test_the_json_is_documented(folder: Path, now: float) -> None:
    add_notice(folder, now)
    with running(folder, now) as options:
        every = json.loads(run_main("usage", "--json", "--since", "3d", *options).stdout)
        one = json.loads(run_main("usage", CHAT, "--json", "--since", "3d", *options).stdout)
    assert every["running"] is True
    assert [site["site"] for site in every["sites"]] == [EVIL, CHAT, "idle.example.com"]
    chat = every["sites"][1]
    assert (chat["standing"], chat["guideline"], chat["now"], chat["share"]) == ("repeated", 20, 18, 0.123)
    assert len(chat["peaks"]) == len(every["times"]) == 3
    assert [site["site"] for site in one["sites"]] == [CHAT]
    assert [step["time"] for step in one["steps"]] == every["times"]
    assert one["notices"][0]["accepted"] is True
    assert [delivery["to"] for delivery in one["notices"][0]["deliveries"]] == [
        "owner@example.com",
        "hooks.example.com",
    ]
    text = (REPOSITORY / "docs" / "cli.md").read_text()
    keys = {*one, *chat, *one["steps"][0], *one["notices"][0], *one["notices"][0]["deliveries"][0], *COLUMNS}
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


def test_a_gap_is_null_in_the_json(folder: Path) -> None:
    steps = json.loads(use(folder, CHAT, "--json", "--since", "48h").stdout)["steps"]
    gaps = [step for step in steps if step["measured"] == 0]
    assert len(gaps) == len(GAP_HOURS)
    assert {step[name] for step in gaps for name in ("peak", "mean", "handshakes", "cpu_seconds")} == {None}


def test_outputs_exclude_each_other(folder: Path) -> None:
    assert "exclude each other" in use(folder, "--json", "--csv", status=2).stderr


@pytest.mark.parametrize("since", ["7x", "2999-01-01"])
def test_a_wrong_time(folder: Path, since: str) -> None:
    assert "Invalid value for --since" in use(folder, "--since", since, status=2).stderr


# Plots


@pytest.mark.parametrize(("name", "since", "begin"), [("a.png", "7d", b"\x89PNG"), ("a.SVG", "24h", b"<?xml")])
def test_a_plot_is_written(folder: Path, now: float, name: str, since: str, begin: bytes) -> None:
    draw_texts(Plot(site="a", usages=[make_usage(0, 1, 1)]))  # skips the test without matplotlib
    add_notice(folder, now)
    result = use(folder, CHAT, "--since", since, "--plot", str(folder / name))
    assert result.stderr.endswith(f"wrote {folder / name}\n")
    content = (folder / name).read_bytes()
    assert content.startswith(begin)
    if name.endswith("SVG"):
        texts = content.decode()
        assert [word for word in ("notice", "repeated", "throttled", "guideline") if f">{word}<" not in texts] == []


def test_a_plot_that_cannot_be_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "a.png"
    assert "requires a site" in use(folder, "--plot", str(file), status=2).stderr
    assert "ends in .png or .svg" in use(folder, CHAT, "--plot", str(folder / "a.gif"), status=2).stderr
    nothing = use(folder, "idle.example.com", "--plot", str(file), status=1)
    assert "nothing was measured in this time" in nothing.stderr
    draw_texts(Plot(site="a", usages=[make_usage(0, 1, 1)]))  # skips the test without matplotlib
    assert "cannot be written: No such" in use(folder, CHAT, "--plot", str(folder / "b" / "a.png"), status=1).stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    missing = use(folder, CHAT, "--plot", str(file), status=1)
    assert missing.stderr.endswith("tlstunnel: --plot needs matplotlib: pip install 'tlstunnel[plot]'\n")
    assert not file.exists()


# Notices, and what is done about sites


def test_notices_and_their_deliveries(folder: Path, now: float) -> None:
    assert use(folder, "notices").stdout == "no notices\n"
    assert use(folder, "notices", CHAT).stdout == "no notices\n"
    add_notice(folder, now)
    for words in ((), (CHAT,)):
        lines = use(folder, "notices", *words).stdout.splitlines()
        assert lines[0].startswith("notice-0123456789abcdef  ")
        assert f"  {CHAT}  repeated, to the site's contact" in lines[0]
        assert lines[2].startswith("  mail to owner@example.com: pending after 1 attempt, again ")
        assert lines[2].endswith(r"(no \x1b[2J connection)")
        assert lines[3].startswith("  webhook to hooks.example.com: accepted ")
        assert lines[4].startswith("  acknowledged ")
        assert lines[4].endswith(" by root")
    found = json.loads(use(folder, "notices", "--json").stdout)["notices"]
    assert [notice["id"] for notice in found] == ["notice-0123456789abcdef"]
    assert "a-secret-token" not in json.dumps(found)


def test_what_is_asked_of_the_tunnel(tmp_path: Path, now: float) -> None:
    throttled = Throttled(site=CHAT, rate="10/second", since=now, until=now, why="loops", who="root", notice="notice-1")
    answers = {
        "ack": Acknowledged("notice-1"),
        "mute": Muted(CHAT, now + DAY, now, "root"),
        "throttle": throttled,
        "release": Released(CHAT, 1),
    }
    options = ["--control", str(tmp_path / "c.sock")]
    with answering(tmp_path / "c.sock", answers) as requests:
        outputs = [
            run_main("usage", *words, *options).output
            for words in (
                ["ack", "notice-1"],
                ["mute", CHAT, "--for", "1d"],
                ["throttle", CHAT, "10/second", "--for", "1h", "--why", "loops", "--address", "192.0.2.1"],
                ["release", CHAT],
            )
        ]
        assert json.loads(run_main("usage", "release", CHAT, "--json", *options).output) == {
            "ok": True,
            "site": CHAT,
            "throttles": 1,
        }
    assert outputs[0] == "notice-1 is acknowledged: no further notice about it while it lasts\n"
    assert outputs[1].startswith(f"{CHAT}: no notices until ")
    assert outputs[2].startswith(f"{CHAT} is throttled: new handshakes above 10/second get 429 until ")
    assert outputs[3] == f"{CHAT} is not throttled any more\n"
    assert requests[:4] == [
        {"do": "ack", "id": "notice-1"},
        {"do": "mute", "site": CHAT, "seconds": 86400.0},
        {
            "do": "throttle",
            "site": CHAT,
            "rate": "10/second",
            "seconds": 3600.0,
            "why": "loops",
            "abuse": False,
            "addresses": ["192.0.2.1"],
        },
        {"do": "release", "site": CHAT},
    ]


def test_what_the_tunnel_refuses(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    words = ["usage", "throttle", CHAT, "10/second", "--for", "1h", "--why", "x", "--control", str(path)]
    with answering(path, {"throttle": ControlError("talk to its owner first")}):
        result = run_main(*words)
        assert (result.exit_code, result.stderr) == (1, "tlstunnel: talk to its owner first\n")
        result = run_main(*words, "--json")
        assert (result.exit_code, json.loads(result.stdout)) == (1, {"ok": False, "error": "talk to its owner first"})
    assert "cannot reach the tunnel" in run_main(*words).stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--since", "3d", "--csv", CHAT],
        ["--since=3d", CHAT, "--csv"],
        ["show", "--csv", "--since", "3d", CHAT],
        ["--csv", "show", "--since", "3d", CHAT],
    ],
)
def test_options_may_come_first(folder: Path, words: list[str]) -> None:
    assert {row["site"] for row in read_csv(use(folder, *words).stdout)} == {CHAT}
    config = str(folder / "tlstunnel.toml")
    assert run_main("usage", "--config", config, "--control", "none", "notices").stdout == "no notices\n"


def test_every_option_with_a_value_is_known() -> None:
    context = click.Context(usage.command)
    names = set()
    for name in usage.command.list_commands(context):
        command = usage.command.get_command(context, name)
        assert command is not None
        for option in command.params:
            if isinstance(option, click.Option) and not option.is_flag:
                names |= {*option.opts}
    assert names == usage._WITH_VALUES


@pytest.mark.parametrize("duration", ["0s", "1", "400d"])
def test_a_wrong_duration(duration: str) -> None:
    result = run_main("usage", "throttle", CHAT, "10/second", "--for", duration, "--why", "x", "--control", "none")
    assert result.exit_code == 2
    assert "Invalid value for --for" in result.stderr


# What it costs


def fill(folder: Path, sites: int, now: float) -> None:
    """Fill what `usage` looks at: the last days, in a file with 60 days of hours."""
    with contextlib.closing(open_for_writing(folder / FILE_NAME, HISTORY)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        names = [f"site-{number}.example.com" for number in range(sites)]
        minute = int(now // MINUTE)
        rows = tuple(SiteMinute(name, 1, 60, NOTHING) for name in names)
        Store(connection, Keep()).write([Minute(minute - 60 * 1440, 60, rows, {})])
        for resolution, number in ((DAYS, 60), (HOURS, 48)):
            newest = minute // resolution.length
            with transaction(connection):
                for place in range(newest - number + 1, newest + 1):
                    connection.executemany(
                        _UPSERTS[resolution],
                        [
                            (place * MAX_SITES + site, site, 60 * site, *Counts(*range(12)))
                            for site in range(1, sites + 1)
                        ],
                    )
                    connection.execute(
                        f"INSERT OR REPLACE INTO {resolution.table} (time, samples) VALUES (?, 60)", (place,)
                    )


@pytest.mark.alone
def test_a_thousand_sites_are_shown_at_once(tmp_path: Path, now: float) -> None:
    sites = 1000
    fill(tmp_path, sites, now)
    names = [f"site-{number}.example.com" for number in range(sites)]
    assessments = tuple(msgspec.structs.replace(make_assessment(), site=name) for name in names)

    def measure() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "tlstunnel", "usage", *options]
        done = subprocess.run(command, capture_output=True, check=True, timeout=60, cwd=tmp_path)
        assert done.stdout.count(b"repeated") == sites
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{1000 * seconds:.0f} ms")
        return seconds

    with running(tmp_path, now, assessments=assessments, tunnels=dict.fromkeys(names, 7)) as options:
        assert_below(0.3, measure)
