"""How often deadlines are checked, what is evicted, and uploads. `tests/promises` test the rest: `test_ending.py`."""

from typing import Any

import pytest

from tlstunnel.config import Timeout, Timeouts
from tlstunnel.serving.server import SHARE, Unfinished, Uploads, _choose_precision

TIMEOUTS = Timeouts()


@pytest.mark.parametrize("key", Timeouts.__struct_fields__)
def test_every_timeout_counts_for_the_precision_of_deadlines(key: str) -> None:
    values = {name: getattr(TIMEOUTS, name) for name in Timeouts.__struct_fields__}
    assert _choose_precision(TIMEOUTS, 10) == 0.25
    assert _choose_precision(Timeouts(**values | {key: Timeout(0.5)}), 10) == pytest.approx(0.05)


def test_the_timeouts_of_workers_count_too() -> None:
    assert _choose_precision(TIMEOUTS, 0.2) == pytest.approx(0.02)
    assert _choose_precision(TIMEOUTS, 0.001) == 0.01


def test_an_address_evicts_its_own_oldest_connection() -> None:
    unfinished: Any = Unfinished(2 * SHARE)
    assert [unfinished.add(task, "192.0.2.1") for task in "abcd"] == [None, None, "a", "a"]
    unfinished.discard("a")
    assert unfinished.add("e", "192.0.2.2") is None


def test_behind_a_proxy_a_connection_counts_for_its_client_once_that_is_known() -> None:
    unfinished: Any = Unfinished(2 * SHARE)
    for task in "abcde":
        assert unfinished.add(task, "") is None
    assert [unfinished.move(task, "192.0.2.1") for task in "abc"] == [None, None, "a"]
    assert unfinished.move("c", "192.0.2.1") is None
    assert unfinished.move("d", "192.0.2.2") is None
    assert unfinished.move("gone", "192.0.2.2") is None
    for task in "abcde":
        unfinished.discard(task)
    assert not len(unfinished)
    assert unfinished._by_address == {}


def test_a_connection_that_is_moved_stays_as_old() -> None:
    unfinished: Any = Unfinished(SHARE)
    for number in range(SHARE):
        unfinished.add(number, "")
    unfinished.move(0, "192.0.2.1")
    assert unfinished.add("new", "") == 0


def test_uploads_of_one_address_are_limited() -> None:
    uploads: Any = Uploads(2 * SHARE)
    assert [uploads.add(task, "192.0.2.1") for task in "abcd"] == [True, True, False, False]
    assert uploads.add("e", "192.0.2.2")
    assert uploads.add("f", "")
    uploads.discard("d")
    uploads.discard("a")
    assert [uploads.add(task, "192.0.2.1") for task in "cd"] == [True, False]
    for task in "abcdef":
        uploads.discard(task)
    assert not len(uploads)
