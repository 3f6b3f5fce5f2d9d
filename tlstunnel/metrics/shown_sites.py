"""Which sites have series of their own in the metrics. The others are added up, as the site ``other``.

Prometheus takes a counter that decreases for one that began again at zero, and adds its whole value once more. So
neither a site's series nor the sums of the others ever decrease, although sites come into view and leave it. What a
site had counted while it was one of the others stays with them, and what it has counted by itself never goes there:

    its own series    value - shared     shared: its value when it came into view, less what was its own before
    the others        value - own        own: its value when it left, less what is shared

So the increases of all series together are always those of all sites.

Tested by tests/unit/test_metrics_shown_sites.py.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import add, sub

from tlstunnel.metrics.families import FAMILIES, OTHER, TUNNELS
from tlstunnel.metrics.snapshot import Labels, Snapshot
from tlstunnel.metrics.usage import FIELDS

RANK_SECONDS = 3600.0
"""How often the busiest sites are chosen again. Each change begins and ends series, which a database keeps."""

STAY = 1.5
"""By how much busier than one in view another site has to be to take its place."""

_WIDTH = len(FIELDS) + 1
_TUNNELS = FIELDS.index("tunnels")
_HANDSHAKES = FIELDS.index("handshakes")
_CPU = len(FIELDS)

_BY_SITE = frozenset(
    family.name for family in FAMILIES.values() if family.labels[:1] == ("site",) and family.kind == "counter"
)


Series = dict[tuple[str, Labels], int]
"""Values by family and labels after the site."""


class _Counted:
    """What was counted for a site: its `usage`, and the `series` of families."""

    __slots__ = ("series", "usage")

    def __init__(self, usage: Iterable[int] = (0,) * _WIDTH, series: Series | None = None) -> None:
        self.usage = list(usage)
        self.usage[_TUNNELS] = 0  # a gauge, not a counter
        self.series: Series = dict(series or {})

    def add(self, other: "_Counted") -> None:
        self.usage = list(map(add, self.usage, other.usage))
        for key, value in other.series.items():
            self.series[key] = self.series.get(key, 0) + value

    def subtract(self, other: "_Counted") -> None:
        self.usage = list(map(sub, self.usage, other.usage))
        for key, value in other.series.items():
            self.series[key] = self.series.get(key, 0) - value


class ShownSites:
    """Reduces snapshots to at most `most` sites: the busiest of the last hour, or since the start."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self._clock = clock
        self._ranked_at = float("-inf")
        self._ranked: dict[str, int] = {}
        """The CPU time of each site when they were ranked."""
        self._others: set[str] = set()
        """The sites of the last snapshot that were added up."""
        self._shown: dict[str, _Counted] = {}
        """The sites in view, and what is shared of each."""
        self._last: dict[str, _Counted] = {}
        """Their values in the last snapshot."""
        self._own: dict[str, _Counted] = {}
        """What sites that have left have counted by themselves."""

    def reduce(self, snapshot: Snapshot) -> Snapshot:
        """Return the snapshot with the sites in view, and the sums of the others."""
        chosen = self._choose(snapshot)
        for site in [site for site in self._shown if site not in chosen]:
            self._hide(site)
        found: dict[str, Series] = {site: {} for site in ("", *chosen)}
        others = _Counted()
        added = {site for site in snapshot.sites if site not in chosen}
        families = _separate(snapshot, found, others.series, added)
        for site in chosen:
            counted = _Counted(snapshot.sites[site], found[site])
            if site not in self._shown:
                self._show(site, counted)
            self._last[site] = counted
        self._others = added
        hidden = [values for site, values in snapshot.sites.items() if site not in chosen]
        if hidden:
            others.usage = list(map(sum, zip(*hidden, strict=True)))
        for own in self._own.values():
            others.subtract(own)
        for shared in self._shown.values():
            others.add(shared)
        return self._render(families, snapshot, found[""], others)

    def _choose(self, snapshot: Snapshot) -> Collection[str]:
        """Return the sites that are in view from now on."""
        sites, shown, before, now = snapshot.sites, self._shown, self._ranked, self._clock()
        candidates = [site for site in sites if site != OTHER]

        def measure(site: str) -> tuple[float, int]:
            values = sites[site]
            return (values[_CPU] - before.get(site, 0)) * (STAY if site in shown else 1.0), values[_HANDSHAKES]

        if len(candidates) <= self.most:
            return dict.fromkeys(candidates)
        if now - self._ranked_at >= RANK_SECONDS or len(shown) > self.most:
            self._ranked_at, self._ranked = now, {site: sites[site][_CPU] for site in candidates}
            return dict.fromkeys(sorted(candidates, key=measure, reverse=True)[: self.most])
        stay = [site for site in shown if site in sites]
        free = self.most - len(stay)
        more = sorted((site for site in candidates if site not in shown), key=measure, reverse=True) if free else ()
        return dict.fromkeys((*stay, *more[:free]))

    def _show(self, site: str, counted: _Counted) -> None:
        shared = _Counted()
        if site in self._others:
            shared.add(counted)
        if (own := self._own.pop(site, None)) is not None:
            shared.subtract(own)
        self._shown[site] = shared

    def _hide(self, site: str) -> None:
        own = self._last.pop(site)
        own.subtract(self._shown.pop(site))
        self._own[site] = own

    def _render(
        self, families: dict[str, list[tuple[Labels, int]]], snapshot: Snapshot, without: Series, others: _Counted
    ) -> Snapshot:
        sites: dict[str, list[int]] = {}
        rows = [("", without)]
        for site, shared in self._shown.items():
            counted = _Counted(series=self._last[site].series)
            counted.subtract(_Counted(series=shared.series))
            rows.append((site, counted.series))
            sites[site] = list(map(sub, snapshot.sites[site], shared.usage))
        if any(others.usage):
            sites[OTHER] = others.usage
        for site, series in (*rows, (OTHER, others.series)):
            for (name, rest), value in series.items():
                if value:
                    families.setdefault(name, []).append(((site, *rest), value))
        return Snapshot(families, sites)


def _separate(
    snapshot: Snapshot, found: Mapping[str, Series], others: Series, added: set[str]
) -> dict[str, list[tuple[Labels, int]]]:
    """Put the series of the sites in `found` there, and add those of others to `others`; return all other families.

    The sites that are added up are added to `added`.
    """
    families = {name: values for name, values in snapshot.families.items() if name not in _BY_SITE}
    for name in _BY_SITE & snapshot.families.keys():
        sums: dict[Labels, int] = {}
        for labels, value in snapshot.families[name]:
            rest = labels[1:]
            if (series := found.get(labels[0])) is not None:
                series[name, rest] = series.get((name, rest), 0) + value
            else:
                added.add(labels[0])
                sums[rest] = sums.get(rest, 0) + value
        others.update(((name, rest), value) for rest, value in sums.items())
    if tunnels := families.pop(TUNNELS.name, None):  # of processes of earlier releases
        families[TUNNELS.name] = [((site if site in found else OTHER,), value) for (site,), value in tunnels]
    return families
