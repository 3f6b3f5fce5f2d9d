"""The plot of a site: what is on it, and what it makes of many figures."""

import importlib.util
import sys
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import missing
from tlstunnel.plans.plot import Mark, Plot, condense, draw_plot, find_gaps, find_spikes
from tlstunnel.state.history.reader import Level, Usage
from tlstunnel.state.history.samples import NOTHING

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
