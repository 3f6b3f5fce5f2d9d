"""Standings: more use is never milder, equal growth changes no share, a gap changes nothing, nothing flaps.

tests/unit/test_plans_month.py has whole scenarios.
"""

import time
from collections.abc import Mapping
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.config.usage import RepeatedUse, Usage
from tlstunnel.plans.abuse import Suspicion
from tlstunnel.plans.guidelines import SitePlan
from tlstunnel.plans.standing import Activity, Hour, MachineLoad, Standings, Timeline, find_shares
from tlstunnel.plans.values import Assessment, Standing

HOUR, DAY = 3600, 86_400
PLAN = SitePlan(site="a", plan="free", label="Free", guideline=100, next_plan="pro", next_label="Pro")
IDLE, BUSY = MachineLoad(0.3, 0.1, 0.2), MachineLoad(0.95, 0.1, 0.2)
SUSPICION = Suspicion("short", 50.0, 0.9, 7, ("192.0.2.1",), 3, few=True)

levels = st.one_of(st.none(), st.tuples(st.integers(0, 250), st.integers(0, 250)).map(sorted))
"""The mean and the peak of an hour, or a gap."""


def assess(
    hours: list[list[int] | None],
    *,
    now: int = 0,
    held: tuple[Standing, ...] = (),
    usage: Usage = Usage(),  # noqa: B008 - frozen
    skip: int = 0,
) -> Assessment:
    """Return the assessment after these hours. `skip` whole days of gap follow the first half of them."""
    previous = Assessment(site="a", since=0, sentence="", holds=held, standing=held[-1] if held else Standing.WITHIN)
    standings = Standings(usage, {"a": PLAN}, [previous])
    timeline = standings.timeline("a")
    half = len(hours) // 2 // 24 * 24
    for number, level in enumerate(hours):
        start = number * HOUR + (skip * DAY if number >= half else 0)
        if level is not None:
            timeline.add_hour(Hour(start, level[1], level[0]))
    for day in range(len(hours) // 24 + skip + 1):
        known = [hour.mean for hour in timeline.hours if hour.start // DAY == day]
        timeline.set_p95(day * DAY, max(known, default=None))
    return standings.assess({"a": now}, {}, 10.0**9)["a"]


HELD = st.lists(st.sampled_from([Standing.SPIKE, Standing.REPEATED, Standing.SUSTAINED]), unique=True).map(
    lambda found: tuple(sorted(found, key=lambda one: one.weight))
)
# Smaller numbers, so that examples of some days reach them.
QUICK = Usage(repeated=RepeatedUse(hours=4, days=3))
histories = st.lists(levels, max_size=24 * 6)


@given(hours=histories, now=st.integers(0, 200), held=HELD, data=st.data())
def test_more_use_is_never_milder(
    hours: list[list[int] | None], now: int, held: tuple[Standing, ...], data: st.DataObject
) -> None:
    more = [
        [level[0] + added, level[1] + added] if level is not None else None
        for level in hours
        for added in [data.draw(st.sampled_from([0, 0, 0, 30, 200]))]
    ]
    before = assess(hours, now=now, held=held, usage=QUICK)
    after = assess(more, now=now + data.draw(st.integers(0, 100)), held=held, usage=QUICK)
    assert after.standing.weight >= before.standing.weight
    assert set(after.holds) >= set(before.holds)


@given(hours=histories, now=st.integers(0, 200), held=HELD)
def test_a_standing_that_holds_is_not_left_sooner_than_it_is_entered(
    hours: list[list[int] | None], now: int, held: tuple[Standing, ...]
) -> None:
    assert set(assess(hours, now=now, held=held, usage=QUICK).holds) >= set(assess(hours, now=now, usage=QUICK).holds)


@given(hours=histories, now=st.integers(0, 200), held=HELD, skip=st.integers(1, 20))
def test_days_that_were_not_measured_change_nothing(
    hours: list[list[int] | None], now: int, held: tuple[Standing, ...], skip: int
) -> None:
    assert assess(hours, now=now, held=held, usage=QUICK, skip=skip) == assess(hours, now=now, held=held, usage=QUICK)


@given(hours=histories, now=st.integers(0, 200), held=HELD, data=st.data())
def test_hours_that_were_not_measured_never_make_it_heavier(
    hours: list[list[int] | None], now: int, held: tuple[Standing, ...], data: st.DataObject
) -> None:
    """Up to the length of what is looked at: a gap is no evidence."""
    lost = [level if data.draw(st.integers(0, 3)) else None for level in hours]
    before, after = (assess(each, now=now, held=held, usage=QUICK) for each in (hours, lost))
    assert after.figures.hours_over <= before.figures.hours_over
    assert after.figures.days_over <= before.figures.days_over
    assert after.figures.hours_measured <= before.figures.hours_measured


def test_a_site_that_is_not_sampled_stays_as_it_was() -> None:
    standings = Standings(Usage(), {"a": PLAN, "b": PLAN})
    before = standings.assess({"a": 200}, {}, 1.0)
    assert before["a"].standing is Standing.SPIKE
    assert standings.assess({}, {"a": SUSPICION}, 2.0) == before
    assert "b" not in before


def test_since_is_when_the_standing_began() -> None:
    standings = Standings(Usage(), {"a": PLAN})
    found = [standings.assess({"a": number}, {}, now)["a"] for now, number in enumerate([5, 6, 200, 201, 5])]
    assert [one.since for one in found] == [0, 0, 2, 2, 4]
    again = Standings(Usage(), {"a": PLAN}, [found[3]])
    assert again.assess({"a": 300}, {}, 99)["a"].since == 2


def test_a_site_without_a_plan_is_only_measured() -> None:
    none = SitePlan(site="a")
    standings = Standings(Usage(), {"a": none})
    found = standings.assess({"a": 10**6}, {"a": SUSPICION}, 1)["a"]
    assert (found.standing, found.holds) == (Standing.WITHIN, ())
    assert found.sentence == "1 000 000 tunnels are open, and there is no guideline to compare that with."


def test_a_plan_without_a_guideline_stands_within_unless_abuse_is_suspected() -> None:
    standings = Standings(Usage(), {"a": SitePlan(site="a", plan="enterprise", label="Enterprise")})
    assert standings.assess({"a": 10**6}, {}, 1)["a"].standing is Standing.WITHIN
    found = standings.assess({"a": 1}, {"a": SUSPICION}, 2)["a"]
    assert found.standing is Standing.SUSPECTED_ABUSE
    assert found.sentence == (
        "50 tunnels end as soon as they have begun each second, from about 7 addresses, and 90 % of its connections are"
        " of such kinds."
    )
    assert b"192.0.2.1" not in msgspec.json.encode(found)


def test_a_larger_plan_ends_it_at_once() -> None:
    standings = Standings(Usage(), {"a": PLAN})
    for number in range(20 * 24):
        standings.timeline("a").add_hour(Hour(number * HOUR, 300, 300))
    assert standings.assess({"a": 300}, {}, 1)["a"].standing is Standing.SUSTAINED
    standings.configure(Usage(), {"a": msgspec.structs.replace(PLAN, plan="pro", guideline=1000)})
    assert standings.assess({"a": 300}, {}, 2)["a"].standing is Standing.WITHIN


def test_what_is_gone_is_forgotten() -> None:
    standings = Standings(Usage(), {"a": PLAN})
    standings.timeline("a").add_hour(Hour(0, 500, 500))
    assert standings.assess({"a": 1}, {}, 1)["a"].standing is Standing.SPIKE
    standings.configure(Usage(), {})
    assert standings.assess({"a": 1}, {}, 1) == {}
    standings.configure(Usage(), {"a": PLAN})
    assert standings.assess({"a": 1}, {}, 1)["a"].standing is Standing.WITHIN


# Timelines


@given(starts=st.lists(st.integers(0, 40), max_size=60))
def test_a_timeline_is_in_order_and_knows_the_last_word_about_each_hour(starts: list[int]) -> None:
    timeline = Timeline()
    for number, start in enumerate(starts):
        timeline.add_hour(Hour(start * HOUR, number, 0.0))
    assert all(one.start < two.start for one, two in pairwise(timeline.hours))
    assert {hour.start // HOUR: hour.peak for hour in timeline.hours} == {
        start: number for number, start in enumerate(starts)
    }


def test_a_timeline_is_bounded() -> None:
    timeline = Timeline(Hour(number * HOUR, 1, 1.0) for number in range(9000))
    timeline.add_hour(Hour(9000 * HOUR, 2, 1.0))
    assert len(timeline.hours) == 8784
    assert timeline.hours[-1].peak == 2
    for day in range(500):
        timeline.set_p95(day * DAY, 1.0)
    assert timeline.find_p95(499) == 1.0
    assert timeline.find_p95(3) is None
    timeline.set_p95(499 * DAY, None)
    assert timeline.find_p95(499) is None


# Shares

activities = st.builds(
    Activity, st.integers(0, 5000), st.integers(0, 500), st.integers(0, 10**9), st.floats(0, 4, allow_subnormal=False)
)
guidelines = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 10_000))
used = st.dictionaries(st.sampled_from("abcdefgh"), activities)


@given(used=used, guidelines=guidelines, factor=st.sampled_from([2, 4, 1024]))
def test_what_all_have_more_of_changes_no_share(
    used: dict[str, Activity], guidelines: dict[str, int], factor: int
) -> None:
    more = {name: Activity(*(value * factor for value in one)) for name, one in used.items()}
    before, after = find_shares(used, guidelines), find_shares(more, guidelines)
    assert set(before) == set(after)
    for name, shares in before.items():
        found = {share.resource: share for share in after[name]}
        for share in shares:
            assert found[share.resource].share == pytest.approx(share.share)
            assert found[share.resource].suggested == share.suggested


@given(used=used, guidelines=guidelines)
def test_shares_add_up_and_leave_out_who_has_no_guideline(
    used: dict[str, Activity], guidelines: dict[str, int]
) -> None:
    found = find_shares(used, guidelines)
    assert set(found) <= set(used) & set(guidelines)
    assert len(found) != 1
    for resource in ("handshakes", "bytes", "cpu"):
        shares = [share for each in found.values() for share in each if share.resource == resource]
        assert not shares or sum(share.share for share in shares) == pytest.approx(1)
        assert not shares or sum(share.suggested for share in shares) == pytest.approx(1)


@given(used=used, guidelines=guidelines, more=activities, name=st.sampled_from("abc"))
def test_more_use_of_a_site_is_no_smaller_share_of_it(
    used: dict[str, Activity], guidelines: dict[str, int], more: Activity, name: str
) -> None:
    grown = used | {name: Activity(*map(sum, zip(used.get(name, Activity()), more, strict=True)))}
    before, after = find_shares(used, guidelines).get(name, ()), find_shares(grown, guidelines).get(name, ())
    found = {share.resource: share for share in after}
    for share in before:
        assert found[share.resource].factor >= share.factor - 1e-9


def run(minutes: list[tuple[dict[str, Activity], MachineLoad]], plans: Mapping[str, int | None]) -> list[Assessment]:
    standings = Standings(
        Usage(), {name: SitePlan(site=name, plan="free", guideline=number) for name, number in plans.items()}
    )
    found = []
    for number, (used, load) in enumerate(minutes):
        standings.add_minute(used, load)
        found.append(standings.assess(dict.fromkeys(plans, 1), {}, number)["a"])
    return found


GREEDY = {"a": Activity(10, 50, 10**6, 0.5), **{name: Activity(10, 1, 10**4, 0.01) for name in "bcdef"}}
EQUAL = dict.fromkeys("abcdef", 100)


def test_a_share_counts_only_while_the_machine_is_busy() -> None:
    assert {one.standing for one in run([(GREEDY, IDLE)] * 60, EQUAL)} == {Standing.WITHIN}
    found = run([(GREEDY, BUSY)] * 20, EQUAL)
    assert [one.standing for one in found] == [Standing.WITHIN] * 14 + [Standing.DISPROPORTIONATE] * 6
    assert found[-1].figures.scarcity == "cpu"


@pytest.mark.parametrize("load", [MachineLoad(0, 0.9, 0), MachineLoad(0, 0, 0.9)])
def test_a_machine_is_busy_for_lack_of_descriptors_or_memory_too(load: MachineLoad) -> None:
    assert run([(GREEDY, load)] * 15, EQUAL)[-1].standing is Standing.DISPROPORTIONATE


def test_a_single_site_is_never_disproportionate() -> None:
    assert run([({"a": GREEDY["a"]}, BUSY)] * 30, EQUAL)[-1].standing is Standing.WITHIN
    alone = {"a": 100, "b": None}  # who has no guideline is no other site
    assert run([(GREEDY, BUSY)] * 30, alone)[-1].standing is Standing.WITHIN


def test_the_larger_plan_may_have_the_larger_share() -> None:
    assert run([(GREEDY, BUSY)] * 30, {**EQUAL, "a": 1000})[-1].standing is Standing.WITHIN


def test_tunnels_within_the_guideline_are_no_share() -> None:
    """A site has them on a machine that others keep busy."""
    used = {"a": Activity(90), **{name: Activity(1, 0, 0, 0.2) for name in "bcdef"}}
    assert run([(used, BUSY)] * 30, EQUAL)[-1].standing is Standing.WITHIN
    used["a"] = Activity(110)
    assert run([(used, BUSY)] * 30, EQUAL)[-1].figures.resource == "tunnels"


def test_a_share_at_the_factor_does_not_flap() -> None:
    more, less = ({**GREEDY, "a": Activity(10, 0, 0, cpu)} for cpu in (0.070, 0.058))
    others = {name: Activity(10, 0, 0, 0.01) for name in "bcdef"}
    minutes = [({**(more if number // 20 % 2 == 0 else less), **others}, BUSY) for number in range(200)]
    found = [one.standing for one in run(minutes, EQUAL)]
    assert sum(one is not two for one, two in pairwise(found)) == 1


def test_the_site_that_grew() -> None:
    standings = Standings(Usage(), {"a": PLAN})
    assert standings.find_grown() is None
    assert standings.load is None
    for number in range(15):
        standings.add_minute({"a": Activity(10 + number), "b": Activity(9 * number)}, IDLE)
    assert standings.find_grown() == ("b", 0, 126)
    assert standings.load == pytest.approx(IDLE)
    assert standings.scarcity is None
    for _ in range(15):
        standings.add_minute({"a": Activity(3)}, IDLE)
    assert standings.find_grown() is None


@pytest.mark.alone
def test_a_thousand_sites_with_full_history_take_little_time() -> None:
    """CPU time of this thread; the best of three, since a busy machine is no fault."""
    names = [f"site{number}" for number in range(1000)]
    standings = Standings(
        Usage(), {name: SitePlan(site=name, plan="free", guideline=100, next_plan="pro") for name in names}
    )
    for number, name in enumerate(names):
        timeline = standings.timeline(name)
        for hour in range(60 * 24):
            timeline.add_hour(Hour(hour * HOUR, (hour * 7 + number) % 140, (hour * 5 + number) % 120))
        for day in range(60):
            timeline.set_p95(day * DAY, (day + number) % 130)
    used = {name: Activity(5, 1, 1000, 0.001) for name in names}
    times = []
    for _ in range(3):
        for _ in range(15):
            standings.add_minute(used, BUSY)
        begin = time.thread_time()
        standings.add_minute(used, BUSY)
        found = standings.assess(dict.fromkeys(names, 50), {}, 0)
        times.append(time.thread_time() - begin)
    assert len(found) == 1000
    assert min(times) < 0.5
