"""The plot of a site: what is on it, what it makes of many figures, and where it has them from."""

import asyncio
import contextlib
import importlib.util
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import missing
from tlstunnel.errors import StateError
from tlstunnel.plans.notice_file import FILE_NAME as NOTICE_FILE
from tlstunnel.plans.notice_file import NOTICES, Channel, NoticeFile, Target, Throttle
from tlstunnel.plans.notices import Due
from tlstunnel.plans.plot import Labels, Mark, Plot, condense, draw_plot, find_gaps, find_spikes
from tlstunnel.plans.site_plot import NOTICE_SECONDS, NoticePlots, read_plot
from tlstunnel.plans.templates import FOLDER, load_texts
from tlstunnel.plans.values import Assessment, Figures, Notice, Standing
from tlstunnel.state.history.database import FILE_NAME, HISTORY, open_for_writing
from tlstunnel.state.history.reader import Level, Usage
from tlstunnel.state.history.samples import NOTHING, Minute, SiteMinute
from tlstunnel.state.history.store import Keep, Store

HOUR = 3600
BEGIN = 1_795_305_600
"""22 November 2026, 00:00 UTC."""


def make_usages(*peaks: int | None) -> list[Usage]:
    """Return hours with these peaks; None is a gap."""
    levels = [None if peak is None else Level(peak, peak / 2) for peak in peaks]
    return [
        Usage(BEGIN + place * HOUR, HOUR, 0 if level is None else HOUR, level, NOTHING)
        for place, level in enumerate(levels)
    ]


def draw_texts(plot: Plot) -> list[str]:
    if importlib.util.find_spec("matplotlib") is None:
        missing("matplotlib not found: ./scripts/install gets it")
    root = ET.fromstring(draw_plot(plot, "svg"))
    return ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_everything_that_happened_is_named() -> None:
    notice = Mark("notice", BEGIN + 5 * HOUR, BEGIN + 5 * HOUR, "repeated")
    throttle = Mark("throttle", BEGIN + HOUR, BEGIN + 2 * HOUR, "10/second")
    usages = make_usages(3, 12, None, None, 1234, 0)
    texts = draw_texts(
        Plot(site="chat.example.com", plan="Pro $1 < $2", guideline=10, usages=usages, marks=[notice, throttle])
    )
    assert {
        *("chat.example.com (Pro $1 < $2)", "concurrent tunnels", "time (UTC), 22 November 2026"),
        *("mean", "peak", "guideline", "over the guideline", "spike", "not measured", "notice", "throttled"),
        *("repeated", "1 234"),
    } <= set(texts)
    assert not [text for text in texts if "limit" in text.lower() or "exceed" in text.lower()]


def test_a_plot_for_a_german_notice_is_german() -> None:
    marks = [Mark("notice", BEGIN + 5 * HOUR, BEGIN + 5 * HOUR, "suspected abuse")]
    marks += [Mark("throttle", BEGIN + HOUR, BEGIN + 2 * HOUR, "10/second")]
    usages = make_usages(*[3] * 220, 12, None)
    labels = load_texts().find_labels("de")
    texts = draw_texts(Plot(site="a.example", guideline=10, usages=usages, marks=marks, labels=labels))
    assert {
        *("gleichzeitige Tunnel", "Zeit (UTC), 22. November 2026 bis 1. Dezember 2026", "Mittelwert", "Höchstwert"),
        *("Richtwert", "über dem Richtwert", "Spitze", "nicht gemessen", "Mitteilung", "gebremst"),
        *("Verdacht auf Missbrauch", "1. Dez."),
    } <= set(texts)
    english = draw_texts(Plot(site="a.example", guideline=10, usages=usages, marks=marks))
    numbers = {text for text in texts if not any(character.isalpha() for character in text)}
    assert set(texts) & set(english) <= numbers | {"a.example", "10/second"}


def test_a_language_without_labels_has_english_ones(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "en", tmp_path / "fr")
    assert load_texts(tmp_path).find_labels("fr") == Labels() == load_texts().find_labels("nl")


def test_what_did_not_happen_is_not_named() -> None:
    marks = [Mark("notice", BEGIN - 1, BEGIN - 1, "repeated"), Mark("throttle", BEGIN + 9 * HOUR, BEGIN + 1e9, "later")]
    texts = draw_texts(Plot(site="a.example", guideline=10, usages=make_usages(3, 10), marks=marks))
    assert not {"over the guideline", "spike", "not measured", "notice", "throttled", "repeated"} & set(texts)
    texts = draw_texts(Plot(site="a.example", usages=make_usages(3, 10)))
    assert "guideline" not in texts


def test_a_gap_alone_and_a_strange_name_can_be_drawn() -> None:
    assert "not measured" in draw_texts(Plot(site="a.example", plan="計画", guideline=1, usages=make_usages(None)))


def test_the_same_figures_make_the_same_file_with_colours_for_dark_pages() -> None:
    plot = Plot(site="a.example", guideline=10, usages=make_usages(3, 12, None))
    draw_texts(plot)
    svg = draw_plot(plot, "svg")
    assert svg == draw_plot(plot, "svg")
    assert b"@media (prefers-color-scheme: dark){[style" in svg
    png = draw_plot(plot, "png")
    assert png == draw_plot(plot, "png")
    assert png.startswith(b"\x89PNG")


def test_a_webhook_takes_a_plot_of_any_month() -> None:
    usages = make_usages(*[hour * 7919 % 2000 for hour in range(672)])
    draw_texts(Plot(site="a.example", usages=usages))  # skips the test without matplotlib
    assert len(draw_plot(Plot(site="a.example", guideline=1000, usages=usages), "png")) < 70_000


def test_nothing_to_draw_and_nothing_to_draw_with(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no usage"):
        draw_plot(Plot(site="a.example", usages=[]), "png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError):
        draw_plot(Plot(site="a.example", usages=make_usages(1)), "png")


def test_gaps_are_as_long_as_they_were() -> None:
    usages = make_usages(None, 1, None, None, 0)
    assert list(find_gaps(usages)) == [(BEGIN, BEGIN + HOUR), (BEGIN + 2 * HOUR, BEGIN + 4 * HOUR)]


def test_spikes_that_are_close_are_one() -> None:
    usages = make_usages(11, 15, 10, 12, 3, 3, 3, 20, None, 21)
    assert [peak for _, peak in find_spikes(usages, 10)] == [15, 12, 20, 21]
    assert [peak for _, peak in find_spikes(usages, 10, HOUR)] == [15, 21]
    assert [peak for _, peak in find_spikes(usages, 10, 3 * HOUR)] == [21]
    assert find_spikes(usages, 21) == []


@given(st.lists(st.none() | st.integers(0, 1000), min_size=1, max_size=60), st.integers(1, 70))
def test_fewer_steps_have_the_same_highest_peak_mean_and_time(peaks: list[int | None], most: int) -> None:
    usages = make_usages(*peaks)
    found = condense(usages, most)
    assert len(found) <= most
    assert (found[0].time, sum(usage.seconds for usage in found)) == (BEGIN, len(peaks) * HOUR)
    known = [peak for peak in peaks if peak is not None]
    levels = [(usage.level, usage.samples) for usage in found if usage.level is not None]
    assert max((level.peak for level, _ in levels), default=None) == max(known, default=None)
    assert sum(level.mean * samples for level, samples in levels) == pytest.approx(sum(known) / 2 * HOUR)
    assert [usage.is_gap for usage in found] == [usage.samples == 0 for usage in found]


# From what is stored

DAY = 86_400
NOW = BEGIN + 7 * DAY + 10 * HOUR


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A state folder with ten days, one minute of each hour, a notice, a throttle and one that was released."""
    minutes = [
        Minute(time // 60, 60, (SiteMinute("a.example", 12, 300, NOTHING),), {})
        for time in range(BEGIN - 3 * DAY, NOW, HOUR)
    ]
    with contextlib.closing(open_for_writing(tmp_path / FILE_NAME, HISTORY)) as connection:
        Store(connection, Keep()).write(minutes)
    with contextlib.closing(open_for_writing(tmp_path / NOTICE_FILE, NOTICES)) as connection:
        file = NoticeFile(connection)
        file.record(Due((make_notice(),)), {"notice-1": (Target(Channel.LOG),)})
        for since in (NOW - 50, NOW - 20):
            file.add_throttle(
                Throttle(site="a.example", rate="1/second", since=since, until=since + HOUR, why="", who="", abuse=True)
            )
        connection.execute("UPDATE throttles SET released = ? WHERE since = ?", (NOW - 10, NOW - 20))
    return tmp_path


def make_notice(site: str = "a.example") -> Notice:
    assessment = Assessment(
        site=site, label="Free", standing=Standing.REPEATED, since=NOW, figures=Figures(guideline=10), sentence="So."
    )
    return Notice(
        id="notice-1",
        site=site,
        standing=Standing.REPEATED,
        created=NOW,
        recipient="contact",
        address="",
        assessment=assessment,
        language="en",
    )


@pytest.mark.parametrize(
    ("since", "seconds"), [(NOW - DAY, 60), (NOW - 3 * DAY, HOUR), (NOW - 50 * DAY, HOUR), (NOW - 100 * DAY, HOUR)]
)
def test_a_plot_has_the_finest_steps_that_are_kept(folder: Path, since: int, seconds: int) -> None:
    plot = read_plot(folder, "a.example", since, NOW, plan="Free", guideline=10)
    assert {usage.seconds for usage in plot.usages} == {seconds}
    assert plot.usages[0].time in {-(-since // seconds) * seconds, BEGIN - 3 * DAY}
    assert (plot.plan, plot.guideline) == ("Free", 10)
    assert plot.marks == [
        Mark("notice", NOW, NOW, "repeated"),
        Mark("throttle", NOW - 20, NOW - 10, "1/second"),
        Mark("throttle", NOW - 50, NOW - 50 + HOUR, "1/second"),
    ]


def test_where_hours_are_deleted_there_are_days(folder: Path) -> None:
    with contextlib.closing(open_for_writing(folder / FILE_NAME, HISTORY)) as connection:
        connection.execute("DELETE FROM hours WHERE time < ?", (BEGIN // HOUR,))
    seconds = {
        days: {usage.seconds for usage in read_plot(folder, "a.example", NOW - days * DAY, NOW).usages}
        for days in (1, 5, 9)
    }
    assert seconds == {1: {60}, 5: {HOUR}, 9: {DAY}}


def test_a_notice_has_a_plot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_texts(Plot(site="a.example", usages=make_usages(1)))  # skips the test without matplotlib
    plots = NoticePlots(folder)
    drawn = asyncio.run(plots.draw(make_notice(), Labels()))
    expected = read_plot(folder, "a.example", NOW - NOTICE_SECONDS, NOW, plan="Free", guideline=10)
    assert drawn == draw_plot(expected, "png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert asyncio.run(plots.draw(make_notice(), Labels())) is None


def test_a_notice_about_a_site_that_was_never_measured_has_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"b\.example: nothing was measured in this time"):
        asyncio.run(NoticePlots(folder).draw(make_notice("b.example"), Labels()))
    (tmp_path / NOTICE_FILE).unlink()
    assert read_plot(folder, "a.example", NOW - DAY, NOW).marks == []
