"""What an edge worker may say about the end and the tags of a tunnel; `test_tunnels_ended.py` tries more."""

from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_edge_values import made, make
from tlstunnel.edge import EdgeError, Reply
from tlstunnel.edge.limits import (
    LATEST,
    LONGEST_LOGGED,
    MOST_BYTES,
    MOST_LOGGED,
    MOST_TAGS,
    join_log,
    join_tags,
    parse_log,
    parse_tags,
    parse_until,
)
from tlstunnel.edge.values import InvalidReply
from tlstunnel.tunnel.selection import has_tag


class Word(str):
    """A text that is not what it seems."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n"

    def __format__(self, spec: str) -> str:
        return "\n"


@pytest.mark.parametrize(
    ("until", "seconds"),
    [
        (0, 0.0),
        (-5, 0.0),
        (1.5, 1.5),
        (datetime(2026, 1, 1, tzinfo=UTC), 1_767_225_600.0),
        (datetime(2026, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))), 1_767_225_600.0),
        (datetime(1, 1, 1, tzinfo=UTC), 0.0),
        (datetime.max.replace(tzinfo=UTC), LATEST - 1e-6),
    ],
    ids=str,
)
def test_times(until: Any, seconds: float) -> None:
    assert parse_until(until) == pytest.approx(seconds)


class NoZone(tzinfo):
    def utcoffset(self, when: datetime | None) -> None:
        return None

    dst = utcoffset

    def tzname(self, when: datetime | None) -> None:
        return None


@pytest.mark.parametrize(
    ("until", "problem"),
    [
        (datetime(2026, 1, 1), "a datetime with a time zone"),
        (datetime(2026, 1, 1, tzinfo=NoZone()), "a datetime with a time zone"),
        ("tomorrow", "not a str"),
        (None, "not None"),
        (True, "not a bool"),
        (float("nan"), "in seconds"),
        (float("inf"), "in seconds"),
        (1_767_225_600_000, "may be in milliseconds"),
        (10**400, "in seconds"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_time(until: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_until(until)


def test_tags_are_joined() -> None:
    before = join_tags((), {"user": "1", "b": "x=y"})
    assert before == ("b=x=y", "user=1")
    assert join_tags(before, {"user": "2"}) == ("b=x=y", "user=2")


def test_there_are_few_of_them_and_they_are_small() -> None:
    join_tags((), {f"a{number}": "1" for number in range(MOST_TAGS)})
    with pytest.raises(ValueError, match="8 tags, and not 9"):
        join_tags(("b=1",), {f"a{number}": "1" for number in range(MOST_TAGS)})
    with pytest.raises(ValueError, match=f"{MOST_BYTES} bytes in all, and not 518"):
        join_tags((), {"a": "é" * 128, "b": "é" * 128, "c": ""})


def test_a_class_of_the_worker_changes_nothing() -> None:
    parsed = parse_tags({Word("user"): Word("42")})
    assert join_tags((), parsed) == ("user=42",)
    assert [type(part) for part in (*parsed, *parsed.values())] == [str, str]


def test_a_value_is_not_quoted_in_an_error() -> None:
    """It may be a secret of the client."""
    with pytest.raises(ValueError, match="cannot be printed") as caught:
        parse_tags({"user": "secret\x00"})
    assert "secret" not in str(caught.value)


names = st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,31}", fullmatch=True)


@given(st.dictionaries(names, st.text(min_size=1, max_size=255), max_size=8))
def test_tags_are_found_again_or_refused(tags: dict[str, str]) -> None:
    try:
        joined = join_tags((), parse_tags(tags))
    except ValueError:
        return
    assert dict(tag.split("=", 1) for tag in joined) == tags
    assert all(tag.isprintable() for tag in joined)
    for name, value in tags.items():
        assert has_tag(joined, name)
        assert has_tag(joined, f"{name}={value}")
        assert not has_tag(joined, f"{name}={value}x")


def test_forward() -> None:
    given = make()
    assert (given.until, given.tags) == (None, {})
    changed = given.forward(until=5e9, tags={"user": "1"}).forward(tags={"room": "2"}).forward(path="/x")
    assert (changed.until, changed.tags) == (5e9, {"user": "1", "room": "2"})
    assert (made(changed).until, made(changed).tags) == (5e9, ("room=2", "user=1"))
    assert (made(given).until, made(given).tags) == (None, ())


@pytest.mark.parametrize("arguments", [{"until": "x"}, {"tags": {"user": 42}}, {"tags": "user=42"}], ids=str)
def test_a_request_with_invalid_limits_is_never_forwarded(arguments: dict[str, Any]) -> None:
    """Whatever `worker_on_error` is: an `InvalidReply` is not forwarded."""
    with pytest.raises(EdgeError) as caught:
        make().forward(**arguments)
    assert isinstance(caught.value, InvalidReply)


@given(st.dictionaries(names, st.text() | st.integers() | st.floats() | st.booleans() | st.none() | st.binary()))
def test_what_is_logged_is_bounded_and_can_be_encoded(log: dict[str, Any]) -> None:
    try:
        joined = join_log((), parse_log(log))
    except ValueError:
        return
    assert len(joined) <= MOST_LOGGED
    msgspec.json.encode(dict(joined))
    for _, value in joined:
        assert type(value) in {str, int, float, bool}
        if isinstance(value, str):
            assert value.isprintable()
            assert len(value) <= LONGEST_LOGGED


def test_a_text_for_the_log_is_what_it_seems() -> None:
    assert parse_log({"a": Word("b\x1b")}) == {"a": "b\\x1b"}
    assert parse_log({"a": float("nan"), "b": float("-inf")}) == {"a": "nan", "b": "-inf"}, "JSON has none of these"


@pytest.mark.parametrize(
    "log",
    [{"": "x"}, {"a b": "x"}, {1: "x"}, {"a": None}, {"a": b"x"}, {"a": 1 << 63}, {"a": ["x"]}, "a", None,
     {f"a{number}": "x" for number in range(MOST_LOGGED + 1)}],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_logged_is_refused(log: Any) -> None:
    with pytest.raises(ValueError, match="log"):
        join_log((), parse_log(log))


def test_forward_and_reply_add_to_the_log() -> None:
    changed = make().forward(log={"room": "7", "seats": 1}).forward(log={"seats": 2}).forward(path="/x")
    assert made(changed).log == (("room", "7"), ("seats", 2))
    assert Reply(403, log={"why": "full"})._refusal.log == (("why", "full"),)
    with pytest.raises(EdgeError):
        Reply(403, log={"why": None})  # type: ignore[dict-item]
    with pytest.raises(EdgeError):
        make().forward(log={"why": None})  # type: ignore[dict-item]
