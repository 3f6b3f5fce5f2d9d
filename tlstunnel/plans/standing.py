"""Where each site stands, from its history, its share of a busy machine, and suspected abuse. No I/O, and no clock.

docs/plans.md explains the standings. What makes one heavier is at least as much use in each term of its definition, so
more use never leads to a milder one. Hours, days and minutes that were not measured are in no count: all times are
those that were measured, so a gap changes nothing, however long it is.

A standing that applies is left later than it is entered: at half of the hours and days, at four fifths of the factor,
and at ten percent less of what makes a machine busy. So use at a threshold does not lead to and fro.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import NamedTuple

from msgspec.structs import replace

from tlstunnel.config.usage import Usage
from tlstunnel.plans.abuse import Suspicion
from tlstunnel.plans.guidelines import SitePlan
from tlstunnel.plans.sentences import describe
from tlstunnel.plans.values import Assessment, Figures, Resource, Scarcity, Standing

HOUR, DAY = 3600, 86_400

SPIKE_HOURS = 24
"""A spike is shown for so many hours."""

CALM_HOURS = 168
"""After a week within the guideline, a site's use is not repeated any more."""

MOST_HOURS = 24 * 366
"""Hours of a site that are remembered at most."""

LEAST_TO_SHARE: Mapping[Resource, float] = {"tunnels": 10.0, "handshakes": 1.0, "bytes": 100_000.0, "cpu": 0.05}
"""What all sites together have to use, on average and per second, before anybody's share of it means anything. CPU time
is in seconds."""

_HELD_FACTOR = 0.8
_HELD_BUSY = 0.1


class Hour(NamedTuple):
    """An hour in which something was measured: when it begins, and the most and the mean number of open tunnels."""

    start: int
    peak: int
    mean: float


class Timeline:
    """The measured hours of a site, and the 95th percentiles of its days. The hour that is not over belongs to it."""

    def __init__(self, hours: Iterable[Hour] = (), p95s: Mapping[int, float] | None = None) -> None:
        self.hours: list[Hour] = sorted(hours)[-MOST_HOURS:]
        self._p95s: dict[int, float] = dict(p95s or {})

    def add_hour(self, hour: Hour) -> None:
        """Add an hour, or what is known of it now. They may come in any order."""
        hours = self.hours
        place = len(hours)
        if hours and hours[-1].start >= hour.start:
            place = bisect_left(hours, hour.start, key=_get_start)
        known = place < len(hours) and hours[place].start == hour.start
        hours[place : place + known] = [hour]
        del hours[:-MOST_HOURS]

    def set_p95(self, day: int, p95: float | None) -> None:
        """Set the 95th percentile of the day that begins at this time; None if it cannot be known."""
        self._p95s.pop(day // DAY, None)
        if p95 is not None:
            self._p95s[day // DAY] = p95
        while len(self._p95s) > MOST_HOURS // 24:
            del self._p95s[min(self._p95s)]

    def find_p95(self, day: int) -> float | None:
        """Return the 95th percentile of a day, by its number."""
        return self._p95s.get(day)


_get_start = attrgetter("start")


class Activity(NamedTuple):
    """What a site used in a minute that was measured: the mean of open tunnels, and the other values per second.

    `bytes` are those of both directions, `cpu` is in seconds.
    """

    tunnels: float = 0.0
    handshakes: float = 0.0
    bytes: float = 0.0
    cpu: float = 0.0


class MachineLoad(NamedTuple):
    """How much of each the machine uses, 0 to 1: its CPUs, the descriptors of the fullest process, memory."""

    cpu: float
    descriptors: float
    memory: float


class Share(NamedTuple):
    """A site's part of what all sites with a guideline use, and the part that its plan suggests; both 0 to 1."""

    resource: Resource
    share: float
    suggested: float

    @property
    def factor(self) -> float:
        """How many times as much it is."""
        return self.share / self.suggested


class _Use(NamedTuple):
    """The figures of a site compared with its guideline."""

    peak: int
    latest_peak: int
    hours: int
    hours_over: int
    days_over: int
    over_lately: bool
    sustained: tuple[int, int]
    """Days of use above the guideline: of `sustained.hours` or more each, and of half as many."""
    p95: float | None


def find_shares(activities: Mapping[str, Activity], guidelines: Mapping[str, int]) -> dict[str, tuple[Share, ...]]:
    """Return the shares of each site that has a guideline and is in use, if there are two such sites at least.

    A resource of which nothing worth mentioning is used is left out. So are the tunnels of a site that has no more than
    its guideline: that many are what its plan is for.
    """
    used = {name: one for name, one in activities.items() if name in guidelines and any(one)}
    if len(used) < 2:
        return {}
    suggested = sum(guidelines[name] for name in used)
    totals = Activity(*(sum(each) for each in zip(*used.values(), strict=True)))
    counted = [
        (index, resource) for index, (resource, least) in enumerate(LEAST_TO_SHARE.items()) if totals[index] >= least
    ]
    return {
        name: tuple(
            Share(resource, one[index] / totals[index], guidelines[name] / suggested)
            for index, resource in counted
            if resource != "tunnels" or one.tunnels > guidelines[name]
        )
        for name, one in used.items()
    }


class Standings:
    """Assesses all sites. `previous` are the assessments of the last time, such as those before a restart."""

    def __init__(self, usage: Usage, plans: Mapping[str, SitePlan], previous: Iterable[Assessment] = ()) -> None:
        self._previous = {one.site: one for one in previous}
        self._timelines: dict[str, Timeline] = {}
        self._minutes: deque[tuple[Mapping[str, Activity], MachineLoad]] = deque()
        self._load: MachineLoad | None = None
        self._scarcity: Scarcity | None = None
        self._shares: dict[str, Share] = {}
        self.configure(usage, plans)

    def configure(self, usage: Usage, plans: Mapping[str, SitePlan]) -> None:
        """Assess by these thresholds and plans from now on. What is known of sites that are gone is forgotten."""
        self._usage = usage
        self._plans = dict(plans)
        self._guidelines = {name: plan.guideline for name, plan in plans.items() if plan.guideline is not None}
        self._previous = {name: one for name, one in self._previous.items() if name in plans}
        self._timelines = {name: one for name, one in self._timelines.items() if name in plans}
        self._most_minutes = max(int(usage.disproportionate.over // 60), 1)
        self._find_shares()

    def timeline(self, site: str) -> Timeline:
        """Return the history of a site, to add hours and days to it."""
        return self._timelines.setdefault(site, Timeline())

    def add_minute(self, activities: Mapping[str, Activity], load: MachineLoad) -> None:
        """Add a minute that was measured."""
        self._minutes.append((activities, load))
        self._find_shares()

    @property
    def load(self) -> MachineLoad | None:
        """The mean load of the time in which shares are measured; None before it has passed once."""
        return self._load

    @property
    def scarcity(self) -> Scarcity | None:
        """What the machine is shortest of; None if it is not busy."""
        return self._scarcity

    def find_grown(self) -> tuple[str, int, int] | None:
        """Return the site whose tunnels have grown most in this time, and their number at its begin and end."""
        if len(self._minutes) < 2:
            return None
        first, last = self._minutes[0][0], self._minutes[-1][0]
        grown = {name: one.tunnels - first.get(name, Activity()).tunnels for name, one in last.items()}
        site = max(grown, key=lambda name: grown[name], default="")
        if not site or grown[site] <= 0:
            return None
        return site, round(first.get(site, Activity()).tunnels), round(last[site].tunnels)

    def assess(
        self, tunnels: Mapping[str, int], suspicions: Mapping[str, Suspicion], now: float
    ) -> dict[str, Assessment]:
        """Return where each site stands that has just been sampled. `tunnels` are those that are open.

        The other sites stay as they were: nothing is known about them.
        """
        for name, number in tunnels.items():
            plan = self._plans.get(name)
            if plan is not None:
                self._previous[name] = self._assess_site(plan, number, suspicions.get(name), now)
        return dict(self._previous)

    def _find_shares(self) -> None:
        while len(self._minutes) > self._most_minutes:
            self._minutes.popleft()
        if len(self._minutes) < self._most_minutes:
            return
        self._load = MachineLoad(*_find_means(load for _, load in self._minutes))
        self._scarcity = self._find_scarcity(self._load)
        sums: dict[str, list[float]] = {}
        for activities, _ in self._minutes:
            for name, one in activities.items():
                if name in self._guidelines and any(one):
                    total = sums.setdefault(name, [0.0] * len(one))
                    for index, value in enumerate(one):
                        total[index] += value
        means = {name: Activity(*(value / self._most_minutes for value in total)) for name, total in sums.items()}
        found = find_shares(means, self._guidelines)
        self._shares = {name: max(shares, key=lambda one: one.factor) for name, shares in found.items() if shares}

    def _find_scarcity(self, load: MachineLoad) -> Scarcity | None:
        busy = self._usage.busy
        thresholds: dict[Scarcity, int] = {"cpu": busy.cpu, "descriptors": busy.descriptors, "memory": busy.memory}
        excess: dict[Scarcity, float] = {
            name: used - percent / 100 for used, (name, percent) in zip(load, thresholds.items(), strict=True)
        }
        most = max(excess, key=lambda name: excess[name])
        return most if excess[most] >= (-_HELD_BUSY if self._scarcity is not None else 0.0) else None

    def _assess_site(self, plan: SitePlan, tunnels: int, suspicion: Suspicion | None, now: float) -> Assessment:
        previous = self._previous.get(plan.site)
        held = previous.holds if previous is not None else ()
        holds: list[Standing] = []
        figures = Figures(guideline=plan.guideline, now=tunnels, peak=tunnels, latest_peak=tunnels)
        if plan.guideline is not None:
            use = self._measure(plan.guideline, self._timelines.get(plan.site, _NOTHING), tunnels)
            share = self._shares.get(plan.site)
            holds = [*self._find_use(plan.guideline, use, held), *self._find_disproportion(share, held)]
            figures = self._to_figures(plan.guideline, tunnels, use, share)
        if suspicion is not None and (plan.plan or plan.guideline is not None):
            holds.append(Standing.SUSPECTED_ABUSE)
            figures = _add_suspicion(figures, suspicion)
        standing = holds[-1] if holds else Standing.WITHIN
        since = previous.since if previous is not None and previous.standing is standing else now
        return Assessment(
            site=plan.site,
            plan=plan.plan,
            label=plan.label,
            next_plan=plan.next_plan,
            next_label=plan.next_label,
            standing=standing,
            holds=tuple(holds),
            since=since,
            figures=figures,
            sentence=describe(standing, figures, self._usage),
        )

    def _measure(self, guideline: int, timeline: Timeline, tunnels: int) -> _Use:
        usage = self._usage
        hours = timeline.hours[-usage.repeated.hours_looked_at :]
        often = guideline * (100 + usage.tolerance) / 100
        over = [hour.start for hour in hours if hour.mean > guideline or hour.peak > often]
        lately = hours[-CALM_HOURS:]
        sustained, p95 = self._measure_days(guideline, timeline, often)
        return _Use(
            peak=max(max((hour.peak for hour in hours), default=0), tunnels),
            latest_peak=max(max((hour.peak for hour in hours[-SPIKE_HOURS:]), default=0), tunnels),
            hours=len(hours),
            hours_over=len(over),
            days_over=len({start // DAY for start in over}),
            over_lately=bool(over) and over[-1] >= lately[0].start,
            sustained=sustained,
            p95=p95,
        )

    def _measure_days(self, guideline: int, timeline: Timeline, often: float) -> tuple[tuple[int, int], float | None]:
        """Return the days of sustained use, by the whole threshold and by half of it, and the highest percentile."""
        wanted = self._usage.sustained
        over: dict[int, int] = {}
        hours = timeline.hours
        # A day has 24 hours, so the days that are looked at are in these, and more if there are gaps.
        for index in range(len(hours) - 1, -1, -1):
            start, peak, mean = hours[index]
            day = start // DAY
            if day not in over:
                if len(over) == wanted.days_looked_at:
                    break
                over[day] = 0
            over[day] += mean > guideline or peak > often
        p95s = {day: timeline.find_p95(day) for day in over}
        known = [p95 for p95 in p95s.values() if p95 is not None]
        # Where the percentile is not known, because minutes are missing, the hours decide.
        high = [over[day] for day, p95 in p95s.items() if p95 is None or p95 > guideline]
        days = sum(number >= wanted.hours for number in high), sum(2 * number >= wanted.hours for number in high)
        return days, max(known, default=None)

    def _find_use(self, guideline: int, use: _Use, held: tuple[Standing, ...]) -> Iterable[Standing]:
        if use.latest_peak > guideline:
            yield Standing.SPIKE
        repeated, sustained = self._usage.repeated, self._usage.sustained
        part = 2 if Standing.REPEATED in held else 1
        if use.over_lately and use.hours_over * part >= repeated.hours and use.days_over * part >= repeated.days:
            yield Standing.REPEATED
        strict, lenient = use.sustained
        if strict >= sustained.days or (Standing.SUSTAINED in held and 2 * lenient >= sustained.days):
            yield Standing.SUSTAINED

    def _find_disproportion(self, share: Share | None, held: tuple[Standing, ...]) -> Iterable[Standing]:
        if share is not None and self._scarcity is not None:
            part = _HELD_FACTOR if Standing.DISPROPORTIONATE in held else 1.0
            if share.factor > self._usage.disproportionate.factor * part:
                yield Standing.DISPROPORTIONATE

    def _to_figures(self, guideline: int, tunnels: int, use: _Use, share: Share | None) -> Figures:
        return Figures(
            guideline=guideline,
            now=tunnels,
            peak=use.peak,
            latest_peak=use.latest_peak,
            p95=use.p95,
            hours=self._usage.repeated.hours_looked_at,
            hours_measured=use.hours,
            hours_over=use.hours_over,
            days_over=use.days_over,
            days_sustained=use.sustained[0],
            resource=share.resource if share is not None else None,
            share=share.share if share is not None else None,
            suggested_share=share.suggested if share is not None else None,
            factor=share.factor if share is not None else None,
            scarcity=self._scarcity,
            scarcity_share=getattr(self._load, self._scarcity) if self._scarcity is not None else 0.0,
        )


_NOTHING = Timeline()


def _add_suspicion(figures: Figures, suspicion: Suspicion) -> Figures:
    return replace(
        figures,
        flood=suspicion.flood,
        flood_rate=suspicion.rate,
        flood_share=suspicion.share,
        flood_addresses=suspicion.addresses,
    )


def _find_means(rows: Iterable[tuple[float, ...]]) -> list[float]:
    columns = list(zip(*rows, strict=True))
    return [sum(column) / len(column) for column in columns]
