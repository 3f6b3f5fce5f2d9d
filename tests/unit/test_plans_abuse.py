"""Suspecting abuse: more of a flood is never less suspicious, and what has another reason is not suspicious.

tests/unit/test_plans_month.py has whole scenarios.
"""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.config.usage import Abuse
from tlstunnel.plans.abuse import AbuseWatch, Attempts, Weighed, find_usual, to_attempts, weigh
from tlstunnel.plans.addresses import AddressFigures, Heavy
from tlstunnel.plans.elsewhere import Sighting
from tlstunnel.state.history.samples import Counts

numbers = st.integers(0, 100_000)
figures = st.builds(
    AddressFigures,
    st.integers(0, 5000),
    st.integers(0, 5000),
    st.lists(st.builds(Heavy, st.sampled_from("abc"), numbers, numbers), max_size=3).map(tuple),
)
attempts = st.builds(
    Attempts,
    *(numbers, numbers, numbers, numbers, numbers),
    lost=st.integers(0, 500),
    origin_failing=st.booleans(),
    addresses=figures,
    elsewhere=st.builds(
        Sighting, st.integers(0, 500), st.booleans(), st.integers(0, 5000), st.integers(0, 5000), numbers
    ),
)
RAISE: dict[str, Callable[[Attempts, int], Attempts]] = {
    "short": lambda one, more: one._replace(short=one.short + more),
    "unfinished": lambda one, more: one._replace(unfinished=one.unfinished + more),
    "refused": lambda one, more: one._replace(refused=one.refused + more),
}


def test_counts_by_kind() -> None:
    counts = Counts(
        handshakes=1, short=2, unfinished=4, invalid=8, blocked=16, limited=32, worker=64, origin=128, declined=256
    )
    found = to_attempts(counts, lost=5, origin_failing=True)
    assert found == Attempts(1, 2, 4, 8 + 16 + 32 + 64, 128 + 256, 5, True)
    assert found.total == 1 + 4 + 120 + 384
    assert found.suspicious == 4 + 120  # short tunnels are the failing origin's doing
    assert found._replace(origin_failing=False).suspicious == 2 + 4 + 120


@pytest.mark.parametrize(
    ("one", "lost", "weighed"),
    [
        (Attempts(refused=600), 0, Weighed(0, 600)),
        (Attempts(refused=600), 50, Weighed(0, 300)),
        (Attempts(refused=600), 100, Weighed(0, 0)),
        (Attempts(refused=600, addresses=AddressFigures(100, 25)), 0, Weighed(0, 450)),
        (Attempts(refused=600, addresses=AddressFigures(100, 100)), 0, Weighed(0, 0)),
        (Attempts(refused=600, addresses=AddressFigures(9, 9, (Heavy("a", 500, 0),))), 0, Weighed(500, 0)),
        (Attempts(refused=600, addresses=AddressFigures(9, 9, (Heavy("a", 119, 0),))), 0, Weighed(0, 0)),
        (Attempts(refused=600, addresses=AddressFigures(9, 9, (Heavy("a", 500, 0),))), 90, Weighed(60, 0)),
        (Attempts(opened=5000, by_origin=5000), 0, Weighed(0, 0)),
    ],
)
def test_what_is_left(one: Attempts, lost: int, weighed: Weighed) -> None:
    assert weigh(one, lost, 2) == weighed


@given(one=attempts, lost=st.integers(0, 1000), kind=st.sampled_from(list(RAISE)), more=numbers)
def test_more_of_a_flood_weighs_no_less(one: Attempts, lost: int, kind: str, more: int) -> None:
    before, after = weigh(one, lost, 2), weigh(RAISE[kind](one, more), lost, 2)
    assert after.few >= before.few
    assert after.strangers >= before.strangers


@given(one=attempts, lost=st.integers(0, 1000), more=numbers)
def test_more_tunnels_that_were_lost_never_make_it_worse(one: Attempts, lost: int, more: int) -> None:
    before, after = weigh(one, lost, 2), weigh(one, lost + more, 2)
    assert after.few <= before.few
    assert after.strangers <= before.strangers


@given(minutes=st.lists(attempts, max_size=12), gaps=st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_minutes_in_which_a_site_was_not_measured_change_nothing(minutes: list[Attempts], gaps: list[int]) -> None:
    first, second = AbuseWatch(Abuse()), AbuseWatch(Abuse())
    for _ in range(20):  # until strangers are suspected
        first.observe({"a": Attempts(opened=1)})
        second.observe({"a": Attempts(opened=1)})
    for one, gap in zip(minutes, gaps, strict=False):
        found = first.observe({"a": one})
        assert second.observe({"a": one}) == found
        assert [second.observe({}) for _ in range(gap)] == [found] * gap


def test_a_site_that_was_not_measured_stays_as_it_was() -> None:
    watch = AbuseWatch(Abuse())
    flood = Attempts(refused=6000, addresses=AddressFigures(1, 0, (Heavy("b", 6000, 0),)))
    for _ in range(3):
        found = watch.observe({"a": flood})
    assert "a" in found
    for _ in range(30):
        assert watch.observe({"b": Attempts(opened=1)}) == found


def test_strangers_are_not_suspected_while_everybody_is_a_stranger() -> None:
    watch = AbuseWatch(Abuse())
    flood = Attempts(opened=3000, short=3000, addresses=AddressFigures(3000, 0))
    assert [bool(watch.observe({"a": flood})) for _ in range(25)] == [False] * 17 + [True] * 8


def test_few_addresses_are_suspected_at_once() -> None:
    watch = AbuseWatch(Abuse())
    flood = Attempts(unfinished=3000, addresses=AddressFigures(1, 0, (Heavy("b", 3000, 0),)))
    assert [bool(watch.observe({"a": flood})) for _ in range(4)] == [False, False, True, True]


@pytest.mark.parametrize(("usual", "suspected"), [(0.0, True), (30.0, False)])
def test_what_is_usual_is_not_suspected(usual: float, suspected: bool) -> None:
    watch = AbuseWatch(Abuse(), {"a": usual})
    usual_minute = Attempts(opened=6000, short=int(usual * 60))
    for _ in range(60):
        watch.observe({"a": usual_minute})
    flood = Attempts(opened=6000, short=50 * 60, addresses=AddressFigures(3000, 100))
    found = [watch.observe({"a": flood}) for _ in range(5)]
    assert bool(found[-1]) is suspected


@pytest.mark.parametrize(
    ("flood", "suspected"),
    [
        (Attempts(opened=6000, short=3000, addresses=AddressFigures(3000, 100)), True),
        (Attempts(opened=12_000, short=3000, addresses=AddressFigures(3000, 100)), False),  # readers who come and go
        (Attempts(unfinished=900, addresses=AddressFigures(15, 0)), False),  # the nodes of a load balancer
        (Attempts(unfinished=900, addresses=AddressFigures(30, 0)), True),
        (Attempts(unfinished=900), True),  # nothing is known of addresses
        (Attempts(unfinished=900, addresses=AddressFigures(10, 0), elsewhere=Sighting(addresses=15)), True),
    ],
)
def test_a_flood_of_strangers_is_large_and_from_many(flood: Attempts, suspected: bool) -> None:
    watch = AbuseWatch(Abuse())
    for _ in range(20):
        watch.observe({"a": Attempts(opened=60)})
    assert bool([watch.observe({"a": flood}) for _ in range(5)][-1]) is suspected


def test_what_is_usual_in_the_history() -> None:
    assert find_usual([], 3600) == 0
    hours = [Counts(handshakes=10**6, short=3600)] * 13 + [Counts(invalid=10**7)] * 11
    assert find_usual(hours, 3600) == 1


def test_a_flood_that_has_ended_is_forgotten_after_ten_minutes() -> None:
    watch = AbuseWatch(Abuse())
    flood = Attempts(refused=6000, addresses=AddressFigures(1, 0, (Heavy("b", 6000, 0),)))
    less = Attempts(refused=400, addresses=AddressFigures(1, 0, (Heavy("b", 400, 0),)))
    for _ in range(5):
        found = watch.observe({"a": flood})
    assert found["a"].minutes == 3
    for _ in range(30):  # less than would be suspected, more than half of it
        found = watch.observe({"a": less})
    assert found
    assert [bool(watch.observe({"a": Attempts(opened=9)})) for _ in range(11)] == [True] * 9 + [False] * 2


def test_thresholds_are_those_of_the_configuration() -> None:
    flood = Attempts(refused=6000, addresses=AddressFigures(1, 0, (Heavy("b", 6000, 0),)))
    for thresholds in (Abuse(rate=101), Abuse(address_rate=101)):
        watch = AbuseWatch(thresholds)
        assert [watch.observe({"a": flood}) for _ in range(10)] == [{}] * 10


def test_sites_that_are_gone_are_forgotten() -> None:
    watch = AbuseWatch(Abuse())
    flood = Attempts(refused=6000, addresses=AddressFigures(1, 0, (Heavy("b", 6000, 0),)))
    for _ in range(3):
        watch.observe({"a": flood})
    watch.forget(["a", "b"])
    assert watch.list_suspicions() == {}
