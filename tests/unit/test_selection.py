"""Which tunnels match the filters of a command."""

import dataclasses
import math
from typing import Any

import pytest

from tlstunnel.journal.record import Record
from tlstunnel.tunnel.selection import LONGEST_FILTER, Selection, has_tag

RECORD = Record(
    id="1f",
    peer="192.0.2.9",
    client="198.51.100.7",
    site="chat.test",
    origin="10.0.0.5:3000",
    tags=("user=42", "room=a=b"),
    started=100.0,
)

MATCHING: list[dict[str, Any]] = [
    {},
    {"id": "1f"},
    {"site": "chat.test"},
    {"client": "198.51.100.7"},
    {"client": "198.51.100.0/24"},
    {"origin": "10.0.0.5:3000"},
    {"tag": "user=42"},
    {"tag": "user"},
    {"tag": "room=a=b"},
    {"older": 10.0},
    {"id": "1f", "site": "chat.test", "client": "198.51.100.7", "tag": "room", "older": 9.9},
]

OTHERS: list[dict[str, Any]] = [
    {"id": "1"},
    {"site": "chat.tes"},
    {"client": "192.0.2.9"},
    {"client": "198.51.100.8/31"},
    {"client": "2001:db8::/32"},
    {"origin": "10.0.0.5"},
    {"tag": "user=4"},
    {"tag": "user=422"},
    {"tag": "use"},
    {"tag": "42"},
    {"tag": "room=a"},
    {"tag": "="},
    {"older": 10.1},
    {"id": "1f", "site": "other.test"},
]


@pytest.mark.parametrize("filters", MATCHING, ids=str)
def test_a_tunnel_matches(filters: dict[str, Any]) -> None:
    assert Selection.parse(**filters).matches(RECORD, 110.0)


@pytest.mark.parametrize("filters", OTHERS, ids=str)
def test_a_tunnel_does_not_match(filters: dict[str, Any]) -> None:
    assert not Selection.parse(**filters).matches(RECORD, 110.0)


def test_a_client_on_a_unix_socket_is_in_no_network() -> None:
    assert not Selection.parse(client="0.0.0.0/0").matches(dataclasses.replace(RECORD, peer="", client=""), 110.0)


@pytest.mark.parametrize(
    "filters",
    [
        {"client": "nobody"},
        {"client": "198.51.100.7/33"},
        {"site": "a" * (LONGEST_FILTER + 1)},
        {"tag": "a" * (LONGEST_FILTER + 1)},
        {"older": -1.0},
        {"older": math.inf},
        {"older": math.nan},
    ],
    ids=lambda filters: str(filters)[:40],
)
def test_filters_that_mean_nothing_are_refused(filters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Selection.parse(**filters)


def test_what_means_a_certain_tunnel_client_or_user_is_narrow() -> None:
    narrow: list[dict[str, Any]] = [{"id": "1f"}, {"client": "198.51.100.7"}, {"tag": "user=42"}]
    assert all(Selection.parse(**filters).is_narrow for filters in narrow)
    wide: list[dict[str, Any]] = [{}, {"site": "chat.test"}, {"tag": "user"}, {"origin": "a:1"}, {"older": 1.0}]
    assert not any(Selection.parse(**filters).is_narrow for filters in wide)
    assert [Selection.parse(**filters).is_empty for filters in wide] == [True, False, False, False, False]


def test_a_tag_without_a_value_is_the_name_of_one() -> None:
    assert has_tag(("user=42",), "user")
    assert not has_tag(("user=42",), "")
    assert not has_tag((), "user")
