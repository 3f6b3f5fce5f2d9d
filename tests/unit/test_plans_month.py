"""A simulated month for each kind of site: where it stands, from the functions that decide it.

Each scenario says how many tunnels are open in each minute, or what connects in each minute; None is a gap.
"""

import math
import random
from collections.abc import Callable, Iterator
from itertools import groupby

import pytest

from tlstunnel.config.plans import BUILT_IN
from tlstunnel.config.usage import Abuse, Usage
from tlstunnel.plans.abuse import AbuseWatch, Attempts, Suspicion
from tlstunnel.plans.addresses import AddressFigures, Heavy
from tlstunnel.plans.guidelines import SitePlan
from tlstunnel.plans.standing import Activity, Hour, MachineLoad, Standings
from tlstunnel.plans.values import Assessment, Standing

START = 1_699_833_600  # a Monday, 00:00 UTC
HOUR, DAY, MINUTES = 3600, 86_400, 1440
Level = Callable[[int], int | None]


def plan(site: str, name: str) -> SitePlan:
    found = BUILT_IN[name]
    return SitePlan(
        site=site, plan=name, label=found.label, guideline=found.tunnels, next_plan=found.next_plan or "", contact=""
    )


class Month:
    """One site on the free plan, of which each minute is sampled, assessed once an hour."""

    def __init__(self) -> None:
        self.standings = Standings(Usage(), {"site": plan("site", "free")})
        self.assessments: list[Assessment] = []
        self.hours = 0

    def run(self, level: Level, days: int = 30) -> "Month":
        timeline = self.standings.timeline("site")
        for day in range(self.hours // 24, self.hours // 24 + days):
            levels: list[int] = []
            for hour in range(day * 24, day * 24 + 24):
                known = [value for minute in range(60) if (value := level(hour * 60 + minute)) is not None]
                levels += known
                self.hours += 1
                if not known:
                    self.assessments.append(self.standings.assess({}, {}, START + hour * HOUR + 3599)["site"])
                    continue
                timeline.add_hour(Hour(START + hour * HOUR, max(known), sum(known) / len(known)))
                timeline.set_p95(START + day * DAY, sorted(levels, reverse=True)[len(levels) * 5 // 100])
                found = self.standings.assess({"site": known[-1]}, {}, START + hour * HOUR + 3599)
                self.assessments.append(found["site"])
        return self

    @property
    def changes(self) -> list[tuple[float, Standing]]:
        """The days on which the standing changed, and to what."""
        grouped = groupby(enumerate(self.assessments), key=lambda pair: pair[1].standing)
        return [(next(group)[0] / 24, standing) for standing, group in grouped]

    @property
    def sequence(self) -> list[Standing]:
        return [standing for _, standing in self.changes]

    @property
    def last(self) -> Assessment:
        return self.assessments[-1]


def hour_of(minute: int) -> int:
    return minute // 60 % 24


def daily(minute: int, least: float, most: float) -> int:
    """A day with its peak at three in the afternoon."""
    return round(least + (most - least) * (0.5 + 0.5 * math.cos((minute / 60 - 15) / 24 * 2 * math.pi)))


def test_a_hobby_site_with_one_viral_afternoon_is_a_spike_and_nothing_else() -> None:
    def level(minute: int) -> int:
        viral = 12 * MINUTES + 13 * 60 <= minute < 12 * MINUTES + 18 * 60
        return 900 if viral else daily(minute, 5, 40)

    month = Month().run(level)
    assert month.sequence == [Standing.WITHIN, Standing.SPIKE, Standing.WITHIN]
    (_, begin), (_, end) = ((number, day) for number, (day, _) in enumerate(month.changes) if number)
    assert begin == pytest.approx(12 + 13 / 24)
    assert end - begin == pytest.approx(5 / 24 + 23 / 24)
    (spike, *_) = [one for one in month.assessments if one.standing is Standing.SPIKE]
    assert spike.sentence == (
        "More tunnels than the guideline of 100 were open in the last 24 hours, up to 900, and a spike now and then is"
        " fine."
    )
    assert month.last.figures.days_over == 1


def test_steady_growth_becomes_sustained_once() -> None:
    month = Month().run(lambda minute: round(50 + 150 * minute / (30 * MINUTES)))
    assert month.sequence == [Standing.WITHIN, Standing.SPIKE, Standing.SUSTAINED]
    (_, _), (_, spike), (_, sustained) = ((standing, day) for day, standing in month.changes)
    assert 2 <= sustained - spike <= 3.5
    assert month.last.since == START + sustained * DAY + 3599
    assert month.last.sentence == (
        "More tunnels than the guideline of 100 were open for many hours of 7 of the last 7 measured days, and the 95th"
        " percentile of a day was 200."
    )


def test_growth_by_day_and_night_only_ever_gets_heavier() -> None:
    month = Month().run(lambda minute: daily(minute, 5, 60 + 160 * minute / (30 * MINUTES)))
    assert month.sequence == [Standing.WITHIN, Standing.SPIKE, Standing.REPEATED, Standing.SUSTAINED]


@pytest.mark.parametrize("hours", [1, 3, 6])
def test_a_nightly_batch_is_repeated(hours: int) -> None:
    month = Month().run(lambda minute: 300 if 2 <= hour_of(minute) < 2 + hours else 20)
    assert month.sequence == [Standing.WITHIN, Standing.SPIKE, Standing.REPEATED]
    assert month.changes[-1][0] == pytest.approx(5 + 2 / 24 if hours == 1 else 4 + 2 / 24)
    assert month.last.figures.days_over == 28
    assert month.last.sentence == (
        f"More tunnels than the guideline of 100 were open in {28 * hours} of the last 672 measured hours, on 28 days,"
        " and up to 300 at once."
    )


def test_a_batch_that_moves_elsewhere_is_forgiven_after_a_week() -> None:
    month = Month().run(lambda minute: 300 if hour_of(minute) == 2 and minute < 14 * MINUTES else 20)
    assert month.sequence == [Standing.WITHIN, Standing.SPIKE, Standing.REPEATED, Standing.WITHIN]
    assert month.changes[-1][0] == pytest.approx(13 + 2 / 24 + 7)


def test_weekend_peaks_are_repeated_also_between_weekends() -> None:
    def level(minute: int) -> int:
        return 250 if minute // MINUTES % 7 >= 5 and 14 <= hour_of(minute) < 18 else 30

    month = Month().run(level)
    spike = [Standing.WITHIN, Standing.SPIKE]
    assert month.sequence == [*spike, *spike, Standing.WITHIN, Standing.REPEATED]
    assert 19 <= month.changes[-1][0] <= 20  # the third Saturday


def test_office_hours_are_sustained_also_at_weekends() -> None:
    def level(minute: int) -> int:
        return 180 if minute // MINUTES % 7 < 5 and 8 <= hour_of(minute) < 18 else 30

    assert Month().run(level).sequence == [Standing.WITHIN, Standing.SPIKE, Standing.SUSTAINED]


def test_a_little_over_at_noon_each_day_is_a_spike() -> None:
    """Up to a tenth, for minutes: the guideline is no precise number."""
    assert Month().run(lambda minute: 108 if hour_of(minute) == 12 and minute % 60 < 20 else 60).sequence == [
        Standing.WITHIN,
        Standing.SPIKE,
    ]


def test_use_that_varies_around_the_guideline_does_not_flap() -> None:
    random_levels = random.Random(7)
    month = Month().run(lambda minute: round(random_levels.gauss(99, 12)), 60)
    assert len(month.changes) <= 4
    assert month.sequence[-1] in (Standing.REPEATED, Standing.SUSTAINED)


@pytest.mark.parametrize("gap", [1, 3, 20])
def test_a_machine_that_was_off_changes_nothing(gap: int) -> None:
    def batch(minute: int) -> int:
        return 300 if hour_of(minute) == 2 else 20

    def with_gap(minute: int) -> int | None:
        off = 20 * MINUTES <= minute < (20 + gap) * MINUTES
        return None if off else batch(minute)

    month = Month().run(with_gap, 30 + gap)
    assert month.sequence == [Standing.WITHIN, Standing.SPIKE, Standing.REPEATED]
    before, off = month.assessments[20 * 24 - 1], month.assessments[20 * 24 : (20 + gap) * 24]
    assert all(one == before for one in off)
    whole = Month().run(batch, 30)
    assert month.last.figures == whole.last.figures
    assert month.last.sentence == whole.last.sentence


def test_a_gap_is_not_zero() -> None:
    """After a day off, a site is as sustained as it was; after a day of idling, it is less so."""
    month = Month().run(lambda minute: 200 if minute < 10 * MINUTES else None, 20)
    assert month.last.standing is Standing.SUSTAINED
    assert month.last.figures.hours_measured == 240
    idle = Month().run(lambda minute: 200 if minute < 10 * MINUTES else 0, 20)
    assert idle.last.standing is Standing.WITHIN


# Shares of a machine.

SITES = {"greedy": plan("greedy", "free"), **{f"shop{number}": plan(f"shop{number}", "free") for number in range(9)}}


def run_machine(cpu: Callable[[int], float], minutes: int) -> list[Assessment]:
    """A site with half of everything, beside nine with the rest, which all are on the same plan."""
    standings = Standings(Usage(), SITES)
    assessments = []
    for minute in range(minutes):
        activities = {name: Activity(50, 2, 50_000, 0.02) for name in SITES} | {
            "greedy": Activity(90, 18, 450_000, 0.18)
        }
        standings.add_minute(activities, MachineLoad(cpu(minute), 0.2, 0.3))
        found = standings.assess(dict.fromkeys(SITES, 50), {}, START + 60 * minute)
        assert {one.standing for name, one in found.items() if name != "greedy"} == {Standing.WITHIN}
        assessments.append(found["greedy"])
    return assessments


def test_half_of_a_busy_machine_is_disproportionate() -> None:
    *_, last = found = run_machine(lambda _: 0.9, MINUTES)
    assert [standing for standing, _ in groupby(one.standing for one in found)] == [
        Standing.WITHIN,
        Standing.DISPROPORTIONATE,
    ]
    assert last.next_plan == "pro"
    assert last.figures.factor == pytest.approx(5)
    assert last.sentence == (
        "It uses 50 % of the handshakes of all sites, where its plan suggests 10 %, while 90 % of the machine's CPU is"
        " in use."
    )


def test_half_of_an_idle_machine_is_nothing() -> None:
    assert {one.standing for one in run_machine(lambda _: 0.3, MINUTES)} == {Standing.WITHIN}


def test_a_machine_just_at_the_threshold_does_not_flap() -> None:
    found = run_machine(lambda minute: 0.83 if minute // 60 % 2 else 0.77, MINUTES)
    assert len(list(groupby(one.standing for one in found))) == 2


def test_a_machine_that_is_busy_for_five_minutes_is_nothing() -> None:
    found = run_machine(lambda minute: 1.0 if minute % 120 < 5 else 0.4, MINUTES)
    assert {one.standing for one in found} == {Standing.WITHIN}


# Abuse, and what looks like it.

NORMAL = Attempts(opened=60, short=2, unfinished=3, refused=4, addresses=AddressFigures(9, 6))


def watch(minutes: Iterator[Attempts | None]) -> list[Suspicion | None]:
    watching = AbuseWatch(Abuse())
    found = []
    for attempts in minutes:
        suspicions = watching.observe({"site": attempts}) if attempts is not None else watching.list_suspicions()
        found.append(suspicions.get("site"))
    return found


def after_a_day(*minutes: Attempts) -> list[Suspicion | None]:
    """Return what is suspected in these minutes, and in the hour after them."""

    def produce() -> Iterator[Attempts]:
        yield from (NORMAL for _ in range(MINUTES))
        yield from minutes
        yield from (NORMAL for _ in range(60))

    found = watch(produce())
    assert found[:MINUTES] == [None] * MINUTES
    return found[MINUTES:]


def test_an_ordinary_month_is_no_abuse() -> None:
    assert set(watch(NORMAL for _ in range(30 * MINUTES))) == {None}


def test_a_reconnect_storm_after_a_release_is_no_abuse() -> None:
    """5 000 tunnels are drained in two minutes; their clients are impatient, and the machine is too busy for them."""
    storm = Attempts(
        opened=2500, short=1500, unfinished=9000, refused=4000, lost=2500, addresses=AddressFigures(2400, 900)
    )
    later = storm._replace(lost=0)
    assert set(after_a_day(storm, storm, *[later] * 8)) == {None}


def test_a_machine_that_was_off_for_a_day_is_no_abuse_when_all_come_back() -> None:
    watching = AbuseWatch(Abuse())
    for _ in range(60):
        watching.observe({"site": NORMAL})
    watching.note_lost("site", 4000)  # they were open when the gap began
    back = Attempts(opened=3000, unfinished=8000, refused=3000, addresses=AddressFigures(3500, 0))
    assert [watching.observe({"site": back}) for _ in range(5)] == [{}] * 5


def test_an_origin_that_flaps_is_no_abuse() -> None:
    """It accepts tunnels and loses them at once, all day; the clients of one company share an address."""
    heavy = (Heavy("192.0.2.1", 0, 900),)  # known, so what a mistake explains is not counted
    flapping = Attempts(
        *(2000, 1900, 40, 30, 3000), lost=0, origin_failing=True, addresses=AddressFigures(900, 700, heavy)
    )
    up = flapping._replace(origin_failing=False)
    assert set(after_a_day(*[flapping, up] * 360)) == {None}


def test_a_lost_origin_is_no_abuse() -> None:
    lost = Attempts(opened=0, by_origin=40_000, lost=5000, addresses=AddressFigures(20, 10))
    assert set(after_a_day(lost, *[lost._replace(lost=0)] * 300)) == {None}


def test_clients_with_a_mistake_in_them_are_no_abuse() -> None:
    """A release of an application connects again and again, at once, in all clients that were here before."""
    broken = Attempts(opened=9000, short=8800, refused=3000, addresses=AddressFigures(1000, 985))
    assert set(after_a_day(*[broken] * 300)) == {None}
    heavy = (Heavy("192.0.2.1", 4, 1500),)
    assert set(after_a_day(*[Attempts(1500, 1500, addresses=AddressFigures(1, 1, heavy))] * 300)) == {None}


def test_a_flood_from_one_address_is_suspected_and_ends() -> None:
    flood = Attempts(
        opened=60, refused=6000, unfinished=20, addresses=AddressFigures(10, 6, (Heavy("198.51.100.7", 5990, 0),))
    )
    found = after_a_day(*[flood] * 20)
    assert found[:2] == [None, None]
    assert all(found[2:29])
    assert set(found[29:]) == {None}
    suspicion = found[10]
    assert suspicion is not None
    assert suspicion.culprits == ("198.51.100.7",)
    assert (suspicion.flood, suspicion.rate, suspicion.addresses) == ("refused", 100, 10)
    assert suspicion.share == pytest.approx(0.99, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "flood"),
    [
        ("refused", Attempts(opened=60, refused=3000, addresses=AddressFigures(3000, 40))),
        ("unfinished", Attempts(opened=60, unfinished=3000, addresses=AddressFigures(3000, 40))),
        ("short", Attempts(opened=3060, short=3000, addresses=AddressFigures(3000, 40))),
    ],
)
def test_a_flood_from_a_botnet_is_suspected(kind: str, flood: Attempts) -> None:
    found = after_a_day(*[flood] * 30)
    assert found[:2] == [None, None]
    assert all(found[2:39])
    assert set(found[39:]) == {None}
    suspicion = found[20]
    assert suspicion is not None
    assert (suspicion.flood, suspicion.rate, suspicion.culprits) == (kind, 50, ())


def test_a_flood_that_begins_with_a_gap_is_not_forgotten_in_it() -> None:
    flood = Attempts(refused=6000, addresses=AddressFigures(3000, 0))
    minutes: list[Attempts | None] = [*[NORMAL] * 30, *[flood] * 3, *[None] * MINUTES, *[NORMAL] * 10]
    found = watch(iter(minutes))
    assert found[32] is not None
    assert all(one == found[32] for one in found[33 : 33 + MINUTES])
    assert found[-1] is None


def test_a_flood_is_suspected_in_the_standing_and_told_to_the_operator() -> None:
    flood = Attempts(refused=6000, addresses=AddressFigures(3000, 0))
    watching, standings = AbuseWatch(Abuse()), Standings(Usage(), {"site": plan("site", "free")})
    for minute in range(40):
        suspicions = watching.observe({"site": NORMAL if minute < 20 else flood})
        found = standings.assess({"site": 30}, suspicions, START + 60 * minute)["site"]
        assert (found.standing is Standing.SUSPECTED_ABUSE) == (minute >= 22)
    assert found.standing.recipient == "operator"
    assert found.since == START + 60 * 22
    assert found.sentence == (
        "100 handshakes are refused each second, from about 3 000 addresses, and 100 % of its connections are of such"
        " kinds."
    )
