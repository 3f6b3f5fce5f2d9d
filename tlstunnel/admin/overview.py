"""The overview: what a glance at the tunnel shows, from its status and the metrics of the last minute.

Tested by tests/unit/test_admin_overview.py.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import msgspec

from tlstunnel.journal.events import Reason
from tlstunnel.metrics import families
from tlstunnel.metrics.families import INFINITE, SUM, Family
from tlstunnel.metrics.snapshot import Labels, Snapshot

WINDOW = 60.0
"""Seconds that percentiles are computed of."""

RATE_SECONDS = 10.0
"""Seconds that rates are at most computed over, if nothing was watched meanwhile."""

MOST_REASONS = 20

_STAGES = (
    (families.HANDSHAKE_STAGE_SECONDS, "stage", ""),
    (families.FIREWALL_CHECK_SECONDS, "check", "firewall: "),
    (families.HANDSHAKE_SECONDS, "", "total"),
)
"""The histograms of latencies: the family, the label that tells the stages apart, and what the names begin with."""

Values = dict[Labels, int]


class Latency(msgspec.Struct, frozen=True):
    """Percentiles of a latency over the last minute, in seconds, from so many connections."""

    p50: float
    p90: float
    p99: float
    count: int


class RefusedFor(msgspec.Struct, frozen=True):
    """Connections that ended without a tunnel for this reason."""

    reason: str
    per_second: float
    total: int


class Sums(msgspec.Struct, frozen=True):
    """Totals since the start; `up` and `down` are bytes."""

    connections: int
    opened: int
    refused: int
    up: int
    down: int


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """Rates are per second, of connections, of handshakes, and of bytes. `handshakes_per_second` are tunnels opened.

    `processes`, `ledger`, `admin` and `shortages` are those of the status. `memory` is in bytes, of all processes
    (PSS). `event_loop_lag` is in seconds, None if it was not measured.
    """

    now: float
    version: str
    generation: int
    ending: str
    tunnels: int
    unfinished: int
    connections_per_second: float
    handshakes_per_second: float
    refused_per_second: float
    refused: list[RefusedFor]
    up_per_second: float
    down_per_second: float
    latency: dict[str, Latency]
    processes: list[dict[str, Any]]
    ledger: dict[str, Any] | None
    admin: dict[str, Any] | None
    shortages: list[str]
    totals: Sums
    event_loop_lag: Latency | None
    descriptors: float | None
    memory: int


class _Moment(msgspec.Struct, frozen=True):
    now: float
    totals: Sums
    refused: dict[str, int]
    histograms: dict[str, Values]


class Overviews:
    """Makes an overview from each status and snapshot that it is given, and what it was given before."""

    def __init__(self) -> None:
        self._moments: deque[_Moment] = deque()

    @property
    def last(self) -> float:
        """When the last overview was made, in Unix time; 0 if there is none."""
        return self._moments[-1].now if self._moments else 0.0

    def add(self, now: float, snapshot: Snapshot, status: Mapping[str, Any]) -> Overview:
        """Return the overview of this moment. `status` are the fields of a `StatusResult`."""
        moment = _take(now, snapshot)
        while self._moments and not 0.0 <= now - self._moments[0].now <= WINDOW:
            self._moments.popleft()
        before = self._moments[-1] if self._moments else moment
        if now - before.now > RATE_SECONDS:
            before = moment
        first = self._moments[0] if self._moments else moment
        self._moments.append(moment)
        seconds = max(moment.now - before.now, 0.001)

        def rate(name: str) -> float:
            more: int = getattr(moment.totals, name) - getattr(before.totals, name)
            return round(max(more, 0) / seconds, 2)

        processes = list(status.get("processes", ()))
        others = [status.get("ledger"), status.get("admin"), {"pss_kib": status.get("pss_kib")}]
        latency: dict[str, Latency] = {}
        for family, label, prefix in _STAGES:
            latency |= _find_latencies(moment, first, family, label, prefix)
        return Overview(
            now=now,
            version=status.get("version", ""),
            generation=status.get("generation", 0),
            ending=status.get("ending", ""),
            tunnels=snapshot.total(families.TUNNELS),
            unfinished=snapshot.total(families.UNFINISHED_HANDSHAKES),
            connections_per_second=rate("connections"),
            handshakes_per_second=rate("opened"),
            refused_per_second=rate("refused"),
            refused=_rank_reasons(moment.refused, before.refused, seconds)[:MOST_REASONS],
            up_per_second=rate("up"),
            down_per_second=rate("down"),
            latency=latency,
            processes=processes,
            ledger=status.get("ledger"),
            admin=status.get("admin"),
            shortages=list(status.get("shortages", ())),
            totals=moment.totals,
            event_loop_lag=_find_latencies(moment, first, families.EVENT_LOOP_LAG_SECONDS).get(""),
            descriptors=_find_descriptors(snapshot),
            memory=1024 * sum((one or {}).get("pss_kib") or 0 for one in (*processes, *others)),
        )


def _rank_reasons(now: Mapping[str, int], before: Mapping[str, int], seconds: float) -> list[RefusedFor]:
    """Return the reasons of refusals, the most frequent at the moment first."""
    refused = (
        RefusedFor(reason, round(max(total - before.get(reason, 0), 0) / seconds, 2), total)
        for reason, total in now.items()
    )
    return sorted(refused, key=lambda one: (-one.per_second, -one.total, one.reason))


def _take(now: float, snapshot: Snapshot) -> _Moment:
    refused = _count_refused(snapshot)
    totals = Sums(
        connections=snapshot.total(families.CONNECTIONS_ACCEPTED),
        opened=snapshot.total(families.TUNNELS_OPENED),
        refused=sum(refused.values()),
        up=snapshot.total(families.BYTES, direction="up"),
        down=snapshot.total(families.BYTES, direction="down"),
    )
    measured = (*(family for family, *_ in _STAGES), families.EVENT_LOOP_LAG_SECONDS)
    histograms = {family.name: dict(snapshot[family]) for family in measured}
    return _Moment(now, totals, refused, histograms)


def _count_refused(snapshot: Snapshot) -> dict[str, int]:
    """Return how many connections ended without a tunnel, by reason."""
    found: dict[str, int] = {}
    for family in (families.CONNECTIONS_NOT_ACCEPTED, families.TLS_HANDSHAKES_FAILED):
        place = family.labels.index("reason")
        for labels, value in snapshot[family].items():
            found[labels[place]] = found.get(labels[place], 0) + value
    # Connections that end with their tunnel have a reason too, but not one of a refusal.
    for labels, value in snapshot[families.CONNECTIONS].items():
        reason = labels[families.CONNECTIONS.labels.index("reason")]
        if reason not in _AFTER_OPENING:
            found[reason] = found.get(reason, 0) + value
    return found


_AFTER_OPENING = frozenset(
    {
        Reason.CLOSED,
        Reason.TRUNCATED,
        Reason.RESET,
        Reason.TLS_ERROR,
        Reason.SOCKET_ERROR,
        Reason.NO_ACKNOWLEDGEMENT,
        Reason.IDLE_TIMEOUT,
        Reason.CLOSE_TIMEOUT,
        Reason.MAX_AGE,
        Reason.SITE_REMOVED,
        Reason.DRAINED,
        Reason.STOPPED,
        Reason.RESPONDED,
    }
)
"""Reasons of connections that had a tunnel, or whose plain request was answered (docs/log.md)."""


def _find_latencies(
    moment: _Moment, first: _Moment, family: Family, label: str = "", prefix: str = ""
) -> dict[str, Latency]:
    """Return the percentiles of a histogram since `first`, by `prefix` and the value of its label."""
    now, before = moment.histograms[family.name], first.histograms[family.name]
    counts: dict[str, dict[str, int]] = {}
    for labels, value in now.items():
        *rest, bound = labels
        if bound != SUM:
            key = prefix + (rest[family.labels.index(label)] if label else "")
            since = counts.setdefault(key, {})
            since[bound] = since.get(bound, 0) + max(value - before.get(labels, 0), 0)
    return {key: found for key, one in counts.items() if (found := _find_percentiles(family, one)) is not None}


def _find_percentiles(family: Family, counts: Mapping[str, int]) -> Latency | None:
    total = sum(counts.values())
    if not total:
        return None
    p50, p90, p99 = (_find_percentile(family, counts, total * share) for share in (0.5, 0.9, 0.99))
    return Latency(p50, p90, p99, total)


def _find_percentile(family: Family, counts: Mapping[str, int], rank: float) -> float:
    """Return where this rank is, between the bounds of its bucket, as Prometheus' histogram_quantile does."""
    low, seen = 0.0, 0.0
    for bound in family.buckets:
        count = counts.get(bound, 0)
        high = low if bound == INFINITE else float(bound)
        if count and seen + count >= rank:
            return round(low + (high - low) * (rank - seen) / count, 6)
        seen, low = seen + count, high
    return low


def _find_descriptors(snapshot: Snapshot) -> float | None:
    """Return how much of the descriptors is used, 0 to 1, None if that was not measured."""
    limit = snapshot.total(families.MOST_OPEN_CONNECTIONS)
    return round(snapshot.total(families.OPEN_CONNECTIONS) / limit, 4) if limit else None
