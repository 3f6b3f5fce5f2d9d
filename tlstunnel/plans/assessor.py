"""Where each site stands, minute by minute, from the history and from what the processes have seen.

It reads the history and keeps its last assessments in a file, so that a restart changes no standing. Everything here
blocks, so it is for one thread, which is not that of a loop. The caller has the clock.

Tested by tests/unit/test_processes_administration.py.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from tlstunnel.config import Config
from tlstunnel.plans.abuse import NO_ADDRESSES, AbuseWatch, Attempts, Suspicion, count_heavy, find_usual, to_attempts
from tlstunnel.plans.addresses import AddressFigures, merge_reports
from tlstunnel.plans.assessments import read_assessments, store_assessments
from tlstunnel.plans.elsewhere import NOTHING_SEEN, Sighting, Sightings, add_sightings, choose_sightings
from tlstunnel.plans.guidelines import SitePlan, find_plans
from tlstunnel.plans.observer import Observed
from tlstunnel.plans.sentences import describe
from tlstunnel.plans.standing import CALM_HOURS, DAY, HOUR, Activity, Hour, MachineLoad, Standings
from tlstunnel.plans.values import Assessment, Standing
from tlstunnel.state.history.reader import HistoryReader, Level, Usage
from tlstunnel.state.history.samples import Counts
from tlstunnel.state.history.store import DAYS, HOURS, MINUTES

MINUTE = 60

MOST_MINUTES = 15
"""Minutes that are looked at one by one after a time in which nothing was assessed. Older ones are in the hours."""

CHUNK = 7 * DAY
"""How much of the history is read at once."""

GAP_SECONDS = 180.0
"""If the last minute that was measured began before so long, the tunnel was down."""

MOST_WAITING = 256
"""What processes have seen of a site, while nothing can be assessed."""

USUAL_HOURS, USUAL_STEP = 168, 7
"""Of these hours, each seventh says how many suspicious connections are usual: so each hour of the day does once."""

FAILING_SHARE = 20
"""An origin is failing if it has refused one for each so many handshakes, even if nobody checks its health."""


class Step(msgspec.Struct, frozen=True):
    """What one minute has brought: where each site stands, what is suspected, and what to tell other machines."""

    assessments: dict[str, Assessment]
    suspicions: Mapping[str, Suspicion]
    sightings: Sightings


class _Seen(NamedTuple):
    """What all processes of this machine have seen of a site together."""

    addresses: AddressFigures = NO_ADDRESSES
    lost: int = 0
    failing: bool = False

    def to_sighting(self, address_rate: int) -> Sighting:
        """Return what other machines are told."""
        found = self.addresses
        heavy = count_heavy(found.heavy, address_rate)
        return Sighting(self.lost, self.failing, found.addresses, found.known, heavy)


class Assessor:
    """Assesses the sites of a configuration. `load` reads what was before; then `step` is called once a minute."""

    def __init__(self, folder: Path, config: Config, key: bytes) -> None:
        self._folder = folder
        self._reader = HistoryReader(folder)
        self._key = key
        self._plans: dict[str, SitePlan] = {}
        self._configure(config)
        self._standings = Standings(config.usage, self._plans, read_assessments(folder)[0])
        self._abuse = AbuseWatch(config.usage.abuse)
        self._seen: dict[str, list[Observed]] = {}
        self._elsewhere: dict[str, list[Sighting]] = {}
        self._last = 0
        """The number of the last minute that was looked at."""
        self._assessed: float | None = None
        self._loaded = False
        self._load: MachineLoad | None = None

    # --- what is known ------------------------------------------------------------------------------------------------

    @property
    def assessments(self) -> dict[str, Assessment]:
        """Where each site stands, as of the last time."""
        return self._standings.assess({}, {}, 0.0)

    @property
    def assessed(self) -> float | None:
        """When sites were last assessed, None if they were not since the start."""
        return self._assessed

    @property
    def load(self) -> MachineLoad | None:
        """How much of the machine was in use in the last minute."""
        return self._load

    def configure(self, config: Config) -> None:
        """Assess by another configuration from now on."""
        gone = set(self._plans)
        self._configure(config)
        self._standings.configure(config.usage, self._plans)
        self._abuse.thresholds = config.usage.abuse
        self._abuse.forget(gone - set(self._plans))
        self._loaded = False  # other thresholds may look further back

    def _configure(self, config: Config) -> None:
        self._usage = config.usage
        self._plans = {
            name: plan for name, plan in find_plans(config).items() if plan.plan or plan.guideline is not None
        }

    # --- at the start -------------------------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Read what is looked at. Raises StateError if the history cannot be read; then it is tried again."""
        self._load_hours(now)
        minute = int(now // MINUTE)
        if not self._last:
            usual = self._find_usual(now)
            self._abuse = AbuseWatch(self._usage.abuse, usual)
            self._note_gap(now)
            self._last = minute - 1
        self._loaded = True

    def _load_hours(self, now: float) -> None:
        """Read so many measured hours as count, also if there are gaps, and the percentiles of their days."""
        wanted = max(
            self._usage.repeated.hours_looked_at, (self._usage.sustained.days_looked_at + 1) * 24, CALM_HOURS + 1
        )
        until = now + HOUR
        measured = 0
        oldest = now - float(self._usage.keep.hours)
        chunks: list[dict[str, list[Hour]]] = []
        while measured < wanted and until > oldest:
            chunk, number = self._read_hours(until - CHUNK, until)
            chunks.append(chunk)
            measured += number
            until -= CHUNK
        for name in self._plans:
            hours = [hour for chunk in reversed(chunks) for hour in chunk.get(name, ())]
            self._standings.timeline(name).hours = hours
        self._load_days(until, now)

    def _read_hours(self, since: float, until: float) -> tuple[dict[str, list[Hour]], int]:
        """Return the measured hours of each site in this time, and how many of them there are at all."""
        levels = self._reader.read_levels(HOURS, since, until)
        found = {}
        for name, column in levels.sites.items():
            if name in self._plans:
                pairs = zip(levels.times, column, strict=True)
                found[name] = [Hour(start, level.peak, level.mean) for start, level in pairs if level is not None]
        return found, max(map(len, found.values()), default=0)

    def _load_days(self, since: float, now: float) -> None:
        levels = self._reader.read_levels(DAYS, since - DAY, now + HOUR)
        for name, found in levels.sites.items():
            if name in self._plans:
                timeline = self._standings.timeline(name)
                for start, level in zip(levels.times, found, strict=True):
                    if level is not None:
                        timeline.set_p95(start, level.p95)

    def _find_usual(self, now: float) -> dict[str, float]:
        """Return the suspicious connections per second that each site usually has."""
        found: dict[str, list[Counts]] = {}
        hour = int(now // HOUR) * HOUR
        for begin in range(hour - USUAL_HOURS * HOUR, hour, USUAL_STEP * HOUR):
            for name, usage in self._reader.read_totals(HOURS, begin, begin + HOUR).items():
                if name in self._plans and not usage.is_gap:
                    found.setdefault(name, []).append(usage.counts)
        return {name: find_usual(counts, HOUR) for name, counts in found.items()}

    def _note_gap(self, now: float) -> None:
        """Expect the clients back whose tunnels were open when the tunnel, or the machine, went down."""
        measured = self._find_measured(now - DAY, now)
        if not measured or now - measured[-1] < GAP_SECONDS:
            return
        last = self._reader.read_totals(MINUTES, measured[-1], measured[-1] + MINUTE)
        for name, usage in last.items():
            if name in self._plans and usage.level is not None and usage.level.peak:
                self._abuse.note_lost(name, usage.level.peak)

    # --- minute by minute ---------------------------------------------------------------------------------------------

    def take(self, seen: Mapping[str, Observed]) -> None:
        """Take what one process has seen in the last minute."""
        for name, observed in seen.items():
            if name in self._plans:
                waiting = self._seen.setdefault(name, [])
                waiting.append(observed)
                del waiting[:-MOST_WAITING]

    def take_elsewhere(self, sightings: Mapping[str, Sighting]) -> None:
        """Take what another machine has seen in a minute, usually in the one before."""
        for name, sighting in sightings.items():
            if name in self._plans:
                waiting = self._elsewhere.setdefault(name, [])
                waiting.append(sighting)
                del waiting[:-MOST_WAITING]

    def step(self, now: float, tunnels: Mapping[str, int], load: MachineLoad) -> Step:
        """Assess all sites. `tunnels` are those that are open now, as far as that is known.

        Raises StateError if the history cannot be read. Nothing has changed then.
        """
        if not self._loaded:
            self.start(now)
        current = int(now // MINUTE)
        if self._last >= current:  # the clock was set back
            self._last = current - 1
        first = max(self._last + 1, current - MOST_MINUTES)
        minutes = [
            self._reader.read_totals(MINUTES, one, one + MINUTE)
            for one in self._find_measured(first * MINUTE, current * MINUTE)
        ]
        self._add_hours(now)
        measured: set[str] = set()
        seen, elsewhere = self._merge_seen(), {name: add_sightings(all_) for name, all_ in self._elsewhere.items()}
        for number, found in enumerate(minutes):
            known = {name: one for name, one in found.items() if name in self._plans and one.level is not None}
            if not known:
                continue
            measured = set(known)
            self._standings.add_minute({name: _to_activity(one) for name, one in known.items()}, load)
            if number == len(minutes) - 1:
                attempts = {name: _to_attempts(one, seen.get(name), elsewhere.get(name)) for name, one in known.items()}
            else:
                attempts = {name: _to_attempts(one) for name, one in known.items()}
            self._abuse.observe(attempts)
            latest = {name: one.level for name, one in known.items()}
        self._seen.clear()
        self._elsewhere.clear()
        self._last = current - 1
        levels: dict[str, int] = {}
        if measured:
            levels = {name: tunnels.get(name, _round(latest[name])) for name in measured}
        elif self._assessed is None:
            levels = {name: number for name, number in tunnels.items() if name in self._plans}
        suspicions = self._abuse.list_suspicions()
        assessments = self._standings.assess(levels, suspicions, now)
        self._assessed = now
        self._load = load
        store_assessments(self._folder, assessments.values())
        rate = self._usage.abuse.address_rate
        return Step(
            assessments,
            {name: one for name, one in suspicions.items() if name in self._plans},
            choose_sightings({name: one.to_sighting(rate) for name, one in seen.items()}),
        )

    def refresh(self, now: float, tunnels: Mapping[str, int]) -> dict[str, Assessment]:
        """Return where each site stands, with the number of tunnels of this moment.

        Only those whose standing that may change are assessed anew: who had no more tunnels than the guideline, and has
        now, or was never assessed.
        """
        known = self.assessments
        outgrown = {}
        for name, plan in self._plans.items():
            number = tunnels.get(name)
            if number is None:
                continue
            before = known.get(name)
            grown = plan.guideline is not None and number > plan.guideline
            if before is None or (grown and before.standing is Standing.WITHIN):
                outgrown[name] = number
        if outgrown:
            known = self._standings.assess(outgrown, self._abuse.list_suspicions(), now)
        return self.update(known, tunnels)

    def update(self, assessments: Mapping[str, Assessment], tunnels: Mapping[str, int]) -> dict[str, Assessment]:
        """Return those of configured sites, with the number of tunnels of this moment. For any thread; never waits."""
        plans = self._plans
        return {name: self._update(one, tunnels.get(name)) for name, one in assessments.items() if name in plans}

    def _update(self, assessment: Assessment, tunnels: int | None) -> Assessment:
        """Return an assessment with the number of tunnels of this moment."""
        figures = assessment.figures
        if tunnels is None or tunnels == figures.now:
            return assessment
        figures = msgspec.structs.replace(
            figures, now=tunnels, peak=max(figures.peak, tunnels), latest_peak=max(figures.latest_peak, tunnels)
        )
        sentence = describe(assessment.standing, figures, self._usage)
        return msgspec.structs.replace(assessment, figures=figures, sentence=sentence)

    def _find_measured(self, since: float, until: float) -> list[int]:
        """Return when those minutes of this time began in which anything was sampled."""
        levels = self._reader.read_levels(MINUTES, since, until)
        columns = zip(*levels.sites.values(), strict=True) if levels.sites else ()
        return [
            time for time, column in zip(levels.times, columns, strict=False) if any(one is not None for one in column)
        ]

    def _add_hours(self, now: float) -> None:
        """Bring the last two hours up to date, and at the begin of an hour the percentiles of two days."""
        hour = int(now // HOUR) * HOUR
        for name, hours in self._read_hours(hour - HOUR, hour + 1)[0].items():
            timeline = self._standings.timeline(name)
            for one in hours:
                timeline.add_hour(one)
        if self._assessed is None or self._assessed // HOUR != now // HOUR or now % HOUR < 5 * MINUTE:
            self._load_days(now - DAY, now)

    def _merge_seen(self) -> dict[str, _Seen]:
        """Return of each site what all processes have seen together."""
        merged = {}
        for name, observed in self._seen.items():
            reports = []
            for one in observed:
                with contextlib.suppress(ValueError):
                    reports.append(one.to_report())
            addresses = merge_reports(self._key, reports) if any(one.suspicious for one in reports) else NO_ADDRESSES
            merged[name] = _Seen(addresses, sum(one.lost for one in observed), any(one.failing for one in observed))
        return merged

    def close(self) -> None:
        """Close the history."""
        self._reader.close()


def _to_activity(usage: Usage) -> Activity:
    counts = usage.counts
    return Activity(
        tunnels=usage.level.mean if usage.level is not None else 0.0,
        handshakes=counts.handshakes / MINUTE,
        bytes=(counts.bytes_up + counts.bytes_down) / MINUTE,
        cpu=counts.cpu / 1_000_000 / MINUTE,
    )


def _to_attempts(usage: Usage, seen: _Seen | None = None, elsewhere: Sighting | None = None) -> Attempts:
    """Return the attempts of a minute: the counts are those of all machines, `seen` is what this one has seen."""
    seen, elsewhere = seen or _Seen(), elsewhere or NOTHING_SEEN
    counts = usage.counts
    return to_attempts(
        counts,
        seen.addresses,
        lost=seen.lost + elsewhere.lost,
        origin_failing=seen.failing or elsewhere.failing or counts.origin * FAILING_SHARE > counts.handshakes,
        elsewhere=elsewhere,
    )


def _round(level: Level | None) -> int:
    return round(level.mean) if level is not None else 0
