"""What several processes know of an origin is put together."""

from typing import Any

import pytest

from tlstunnel.commands.sites import OriginStatus
from tlstunnel.inventory.origins import is_unhealthy, merge_origins
from tlstunnel.inventory.sites import OriginEntry

ENTRY = OriginEntry("a.test", "", "127.0.0.1:1")


def origin(**fields: Any) -> OriginStatus:
    return OriginStatus(site="a.test", address="127.0.0.1:1", **fields)


def merge(*reports: OriginStatus) -> OriginStatus:
    (merged,) = merge_origins([ENTRY], [[report] for report in reports])
    return merged


def test_numbers_are_added_up_and_the_latest_problem_counts() -> None:
    merged = merge(
        origin(tunnels=2, connects=5, failures=1, problem="old", problem_at=10.0, connected_at=30.0, resolved=["::1"]),
        origin(tunnels=3, connects=7, failures=2, problem="new", problem_at=20.0, connected_at=5.0, resolved=["::2"]),
    )
    assert (merged.tunnels, merged.connects, merged.failures) == (5, 12, 3)
    assert (merged.problem, merged.problem_at, merged.connected_at) == ("new", 20.0, 30.0)
    assert merged.resolved == ["::1", "::2"]
    assert merged.state == "healthy"


@pytest.mark.parametrize(
    ("states", "merged"),
    [
        (("healthy", "ejected"), "ejected"),
        (("trial", "healthy"), "trial"),
        (("trial", "ejected"), "ejected"),
        (("unresolved", "healthy"), "healthy"),
        (("unresolved", "unresolved"), "unresolved"),
        (("unresolved", "down"), "down"),
    ],
)
def test_the_worst_state_counts_of_those_that_know_one(states: tuple[Any, Any], merged: str) -> None:
    assert merge(*(origin(state=state) for state in states)).state == merged


def test_an_ejection_ends_with_the_last_one() -> None:
    merged = merge(origin(state="ejected", until=7.0), origin(state="ejected", until=9.0), origin())
    assert merged.until == 9.0


def test_the_only_origin_is_up_if_another_process_has_reached_it_since() -> None:
    down = origin(state="down", problem="Connection refused", problem_at=10.0)
    assert merge(down, origin(connected_at=11.0)).state == "healthy"
    assert merge(down, origin(connected_at=9.0)).state == "down"


def test_a_failing_health_check_counts_whatever_connections_say() -> None:
    assert merge(origin(state="down", checked=True, problem_at=10.0), origin(connected_at=11.0)).state == "down"


def test_an_origin_that_no_process_knows_is_listed() -> None:
    assert merge().state == "unresolved"


@pytest.mark.parametrize(
    ("status", "unhealthy"),
    [
        (origin(), False),
        (origin(problem="old"), False),
        (origin(state="unresolved"), False),
        (origin(state="unresolved", problem="cannot be resolved"), True),
        (origin(state="down"), True),
        (origin(state="trial"), True),
    ],
)
def test_what_is_unhealthy(status: OriginStatus, *, unhealthy: bool) -> None:
    assert is_unhealthy(status) is unhealthy
