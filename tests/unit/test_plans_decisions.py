"""What machines tell each other about acknowledgements and mutes: any order, any text, any number of times."""

import itertools
import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.plans.decisions import (
    MAX_BYTES,
    Acknowledgement,
    Decision,
    Mute,
    SiteThrottle,
    parse_decision,
    render_decision,
)
from tlstunnel.plans.notice_file import FILE_NAME, NOTICES, NoticeFile
from tlstunnel.plans.notices import DAY
from tlstunnel.plans.values import Standing
from tlstunnel.state.history.database import open_for_writing

NOW = 1_800_000_000.0
DECISIONS = [
    Acknowledgement("chat.example.com", Standing.SUSTAINED, NOW, NOW + 5, "ann (uid 1000)"),
    Mute("chat.example.com", NOW + 30 * DAY, NOW, "bob (uid 0)"),
    SiteThrottle("chat.example.com", "10/second", NOW, NOW + 60, "bob (uid 0)", "it is too much", "notice-1", False),
    SiteThrottle("a", "1/hour", NOW, NOW + 60, "bob (uid 0)", "an attack", "", True, NOW + 9, "ann (uid 1)"),
]


@pytest.mark.parametrize("decision", DECISIONS)
def test_what_is_told_is_understood(decision: Decision) -> None:
    text = render_decision(decision)
    assert text is not None
    assert parse_decision(text) == decision


def test_what_is_told_is_short_and_printable() -> None:
    mute = Mute("a" * 253, NOW, NOW, "\n\x1b" * 100)
    text = render_decision(mute)
    assert text is not None
    found = parse_decision(text)
    assert isinstance(found, Mute)
    assert len(found.who) <= 64
    assert found.who.isprintable()
    assert render_decision(Mute("a" * MAX_BYTES, NOW, NOW, "x")) is None
    throttle = SiteThrottle("a" * 253, "10/second", NOW, NOW, "x" * 64, "語\n" * 500, "notice-1", False)
    text = render_decision(throttle)
    assert text is not None
    found = parse_decision(text)
    assert isinstance(found, SiteThrottle)
    assert (found.rate, found.why) == ("10/second", "")


@pytest.mark.parametrize(
    "told",
    [
        ["mute", "a", NOW + 400 * DAY, NOW, "x"],
        ["mute", "a", -1.0, NOW, "x"],
        ["mute", "a", 1e300, 1e300, "x"],
        ["mute", "a", NOW, NOW],
        ["mute", 1, NOW, NOW, "x"],
        ["ack", "a", "spike", NOW, NOW, "x"],
        ["ack", "a", "none", NOW, NOW, "x"],
        ["ack", "a", "sustained", NOW, -1.0, "x"],
        ["throttle", "a", NOW, NOW, "x"],
        ["mute", "a" * MAX_BYTES, NOW, NOW, "x"],
        ["throttle", "a", "1/hour", NOW, NOW + 400 * DAY, "x", "y", "", True],
        ["throttle", "a", "1/hour", NOW, NOW, "x", "y", "", True, -1.0, "x"],
        ["throttle", "a", "1/hour", NOW, NOW, "x", "y", "", 1],
        {},
    ],
)
def test_what_is_not_understood_is_ignored(told: object) -> None:
    assert parse_decision(msgspec.json.encode(told).decode()) is None


@given(st.text())
def test_any_text_is_understood_or_ignored(text: str) -> None:
    assert parse_decision(text) is None or text.startswith("[")


def test_a_time_is_a_number() -> None:
    for time in (math.nan, math.inf):
        text = render_decision(Mute("a", time, NOW, "x"))
        assert text is None or parse_decision(text) is None


def test_machines_that_learn_in_any_order_know_the_same(tmp_path: Path) -> None:
    """The one that was decided last counts, whichever machine has heard of it first."""
    mutes = [
        Mute("a", NOW + 10 * DAY, NOW, "ann"),
        Mute("a", NOW + 60, NOW + 60, "bob"),
        Mute("a", NOW + 20 * DAY, NOW + 60, "cid"),
    ]
    for number, order in enumerate(itertools.permutations(mutes)):
        folder = tmp_path / str(number)
        folder.mkdir()
        connection = open_for_writing(folder / FILE_NAME, NOTICES)
        file = NoticeFile(connection)
        for mute in (*order, *order):
            file.follow_mute(mute)
        assert file.read_mutes(NOW + 120) == [mutes[2]]
        connection.close()
