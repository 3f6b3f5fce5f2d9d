"""From the totals of each second to rows per minute. No I/O, and no clock: the caller says what time it is.

A row is what was measured in a minute, so samples that are missing leave no trace in peaks and means. Counts are
differences of totals, so they lose nothing while nobody samples: what happened in the meantime is in the next row.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import add, sub
from typing import Any, NamedTuple

MINUTE = 60
"""Seconds."""

NEW_SECONDS = 120.0
"""Age up to which the totals of an unknown instance are counted: they began only just before the first sample."""

MAX_ABSENT = 256
"""Instances that are remembered although they are absent, such as another machine that is being restarted."""

MAX_ABSENT_SITES = 20_000
"""Sites of one instance that are remembered although it no longer lists them: reloads may rename sites many times."""


class Counts(NamedTuple):
    """What has been counted for a site. New counts are added at the end, since positions in files have this order."""

    handshakes: int = 0
    """Handshakes answered with 101: the tunnels that were opened."""
    short: int = 0
    """Tunnels that ended within a second."""
    unfinished: int = 0
    """Connections that ended before their handshake was answered."""
    invalid: int = 0
    """Requests refused because they violate HTTP or the WebSocket handshake, or came too late."""
    blocked: int = 0
    """Requests refused by a client certificate check, address lists, web origins, rules or managed rules."""
    limited: int = 0
    """Requests refused by rate limits."""
    worker: int = 0
    """Requests refused by an edge worker, or because it failed."""
    origin: int = 0
    """Requests refused because no origin gave a valid response."""
    declined: int = 0
    """Requests to which the origin sent another status than 101."""
    bytes_up: int = 0
    """Bytes from clients to origins."""
    bytes_down: int = 0
    """Bytes from origins to clients."""
    cpu: int = 0
    """CPU time in microseconds, as estimated."""


NOTHING = Counts()


class Totals(NamedTuple):
    """A site at one moment: its open tunnels, and what has been counted since the instance began."""

    tunnels: int
    counts: Counts = NOTHING


class Instance(NamedTuple):
    """One tunnel's totals: those of all its processes.

    `name` is random and stays the same as long as the totals continue, also across an upgrade. `age` is the number of
    seconds since they began at zero.
    """

    name: str
    age: float
    sites: Mapping[str, Totals]


class SiteMinute(NamedTuple):
    """A site's row: the most tunnels in one sample, the sum of all samples, and what was counted."""

    site: str
    peak: int
    tunnels: int
    counts: Counts

    @property
    def idle(self) -> bool:
        """Whether there is nothing to store."""
        return self.peak == 0 and self.counts == NOTHING


@dataclass(frozen=True, slots=True)
class Minute:
    """What was sampled in one minute, or in a part of it: the parts are added up where they are stored.

    `time` is the number of the minute since 1970 (UTC). `sites` has a row for each site that was sampled, idle or not.
    `positions` has the totals of each instance up to which `sites` counts.
    """

    time: int
    samples: int
    sites: tuple[SiteMinute, ...]
    positions: Mapping[str, Mapping[str, Counts]]


class _Row:
    """What a minute has so far. `counts` has only what its instances began again after."""

    __slots__ = ("counts", "peak", "tunnels")

    def __init__(self) -> None:
        self.peak = 0
        self.tunnels = 0
        self.counts = NOTHING


class _Position:
    """An instance: the last total of each site, and what it was when the minute began for those that have changed."""

    __slots__ = ("begun", "last")

    def __init__(self, last: Mapping[str, Counts]) -> None:
        self.last = dict(last)
        self.begun: dict[str, Counts] = {}


class Sampler:
    """Makes rows per minute from the totals of each second.

    `positions` are those of the last row that was stored (`History.positions`), so that a new ledger continues where
    the last one stopped and counts nothing twice. The clock may jump either way: a sample belongs to the minute that
    the clock shows.
    """

    def __init__(self, positions: Mapping[str, Mapping[str, Counts]] | None = None) -> None:
        self._positions = {name: _Position(sites) for name, sites in (positions or {}).items()}
        self._time = 0
        self._samples = 0
        self._sites: dict[str, _Row] = {}
        self._present: set[str] = set()

    def sample(self, now: float, instances: Iterable[Instance]) -> Minute | None:
        """Add the totals of this moment, in Unix time, and return the last minute if this sample begins another.

        A total that is lower than before has begun again at zero. An unknown instance older than `NEW_SECONDS` counts
        from now on: what it counted before belongs to no minute that was measured here.
        """
        time = int(now // MINUTE)
        finished = self.take() if time != self._time else None
        self._time = time
        self._samples += 1
        tunnels: dict[str, int] = {}
        for instance in instances:
            position = self._find_position(instance)
            last, begun = position.last, position.begun
            for site, (number, counts) in instance.sites.items():
                tunnels[site] = tunnels.get(site, 0) + number
                before = last.get(site, NOTHING)
                if counts != before:
                    began = begun.setdefault(site, before)
                    if min(map(sub, counts, before)) < 0:
                        begun[site] = self._begin_again(site, began, before, counts)
                    last[site] = counts
        for site, number in tunnels.items():
            row = self._find_row(site)
            row.tunnels += number
            row.peak = max(row.peak, number)
        return finished

    def take(self) -> Minute | None:
        """Return what was sampled since the last minute that was returned, if anything, to store it before an end."""
        if not self._samples:
            return None
        present = {name: self._positions.pop(name) for name in self._present}
        for position in present.values():
            for site, began in position.begun.items():
                row = self._find_row(site)
                row.counts = add_counts(row.counts, Counts._make(map(sub, position.last[site], began)))
            position.begun = {}
        rows = tuple(SiteMinute(site, row.peak, row.tunnels, row.counts) for site, row in self._sites.items())
        minute = Minute(self._time, self._samples, rows, {name: dict(one.last) for name, one in present.items()})
        self._positions |= present  # behind those that are absent, the longest absent first
        _forget(self._positions, present, MAX_ABSENT)
        self._samples = 0
        self._sites = {}
        self._present = set()
        return minute

    def _find_position(self, instance: Instance) -> _Position:
        position = self._positions.get(instance.name)
        if position is None:
            old = instance.age > NEW_SECONDS
            position = _Position({site: totals.counts for site, totals in instance.sites.items()} if old else {})
            self._positions[instance.name] = position
        self._present.add(instance.name)
        if not position.begun:  # those that have changed are still needed
            _forget(position.last, instance.sites, MAX_ABSENT_SITES)
        return position

    def _find_row(self, site: str) -> _Row:
        row = self._sites.get(site)
        if row is None:
            row = self._sites[site] = _Row()
        return row

    def _begin_again(self, site: str, began: Counts, before: Counts, now: Counts) -> Counts:
        """Keep what was counted in this minute until some totals decreased. Return where they begin now."""
        row = self._find_row(site)
        row.counts = add_counts(row.counts, Counts._make(map(sub, before, began)))
        return Counts(*(0 if new < old else old for old, new in zip(before, now, strict=True)))


def add_counts(first: Counts, second: Counts) -> Counts:
    """Return the sums."""
    return Counts._make(map(add, first, second))


def _forget(known: dict[str, Any], present: Mapping[str, Any], most: int) -> None:
    """Forget the first of those that are not present, so that at most so many of them are left."""
    if len(known) > len(present) + most:
        for name in [name for name in known if name not in present][: len(known) - len(present) - most]:
            del known[name]
