"""What one process counts.

Counters are incremented where things happen; what can be read from a live table (open tunnels, their bytes) is
collected when a snapshot is taken, so that moving a message costs nothing. All of it belongs to one thread.

Tested by tests/unit/test_metrics.py.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable

from tlstunnel.metrics.families import FAMILIES, MICROSECONDS, OTHER, SUM, Family
from tlstunnel.metrics.snapshot import Labels, Snapshot
from tlstunnel.metrics.usage import Usage

Collected = Iterable[tuple[Family, Labels, int]]


class Counts:
    """The values of one counter, by the values of its labels, in their order.

    It keeps `Family.most` combinations. What is counted beyond that has the site `OTHER`, and if there are still too
    many, `OTHER` in every label.
    """

    __slots__ = ("_by_site", "_changed", "_most", "_other", "_registry", "values")

    def __init__(self, registry: "Registry", family: Family) -> None:
        self.values: dict[Labels, int] = {}
        self._changed: set[Labels] = set()
        self._registry = registry
        self._most = family.most
        self._by_site = family.labels[:1] == ("site",)
        self._other = (OTHER,) * len(family.labels)

    def add(self, *labels: str) -> None:
        """Count one."""
        values = self.values
        if labels in values:
            values[labels] += 1
            self._changed.add(labels)
        else:
            self._add_new(labels, 1)
        if not self._registry.changed:
            self._registry.touch()

    def increase(self, amount: int, *labels: str) -> None:
        """Count `amount` at once."""
        if labels in self.values:
            self.values[labels] += amount
            self._changed.add(labels)
        else:
            self._add_new(labels, amount)
        if not self._registry.changed:
            self._registry.touch()

    def __getitem__(self, labels: Labels) -> int:
        """The value of these labels, 0 where nothing was counted."""
        return self.values.get(labels, 0)

    def _add_new(self, labels: Labels, amount: int) -> None:
        if len(self.values) >= self._most:
            labels = (OTHER, *labels[1:]) if self._by_site else self._other
            if labels not in self.values and len(self.values) >= 2 * self._most:
                labels = self._other
        self.values[labels] = self.values.get(labels, 0) + amount
        self._changed.add(labels)

    def take_changes(self) -> dict[Labels, int]:
        """Return the values that have changed since the last call."""
        if not self._changed:
            return {}
        changed, self._changed = self._changed, set()
        return {labels: self.values[labels] for labels in changed}


class Histogram:
    """The observations of one histogram with these values of its labels.

    An observation does not announce a change: what is observed is also counted.
    """

    __slots__ = ("_bounds", "_buckets", "_labels", "_observed", "_sum")

    def __init__(self, family: Family, labels: Labels) -> None:
        assert len(labels) == len(family.labels)
        self._bounds = family.bounds
        self._labels = labels
        self._buckets = family.buckets
        self._observed = [0] * len(family.buckets)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self._observed[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def observe_since(self, began: float) -> float:
        """Count the time since `began`, of ``time.monotonic``, which is also that of the loop; return the time now."""
        now = time.monotonic()
        seconds = now - began
        self._observed[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds
        return now

    def collect(self) -> Iterable[tuple[Labels, int]]:
        """Return the values of the buckets that have any, and their sum."""
        for bucket, observed in zip(self._buckets, self._observed, strict=True):
            if observed:
                yield (*self._labels, bucket), observed
        if any(self._observed):
            yield (*self._labels, SUM), round(self._sum * MICROSECONDS)


class Registry:
    """The counters of a process, and the `usage` of its sites.

    `on_change` is called at the first change after `take_changes`.
    """

    def __init__(self) -> None:
        self.changed = False
        self.on_change: Callable[[], None] | None = None
        self.usage = Usage()
        self._counts: dict[str, Counts] = {
            family.name: Counts(self, family) for family in FAMILIES.values() if family.kind == "counter"
        }
        self._histograms: dict[tuple[str, Labels], Histogram] = {}
        self._collectors: list[Callable[[], Collected]] = []

    def __getitem__(self, family: Family) -> Counts:
        """The counter `family`. What counts often keeps it."""
        return self._counts[family.name]

    def histogram(self, family: Family, *labels: str) -> Histogram:
        """The histogram `family` with these values of its labels. What observes often keeps it."""
        return self._histograms.setdefault((family.name, labels), Histogram(family, labels))

    def collect(self, collector: Callable[[], Collected]) -> None:
        """Ask `collector` for values whenever some are taken, which are added to those counted. It must be cheap."""
        self._collectors.append(collector)

    def note_change(self) -> None:
        """Note that something has changed."""
        if not self.changed:
            self.touch()

    def touch(self) -> None:
        """Note the first change since `take_changes`."""
        self.changed = True
        if self.on_change is not None:
            self.on_change()

    def snapshot(self) -> Snapshot:
        """Return all values as they are now, without counters of which there was nothing."""
        return self._add_collected({name: counts.values.copy() for name, counts in self._counts.items()})

    def take_changes(self) -> Snapshot:
        """Return the counters that have changed since the last call, and everything else as it is now."""
        self.changed = False
        return self._add_collected({name: counts.take_changes() for name, counts in self._counts.items()})

    def look(self) -> None:
        """Have the collectors note what open tunnels have moved."""
        for collector in self._collectors:
            for _ in collector():
                pass

    def _add_collected(self, counted: dict[str, dict[Labels, int]]) -> Snapshot:
        values = {name: series for name, series in counted.items() if series}
        for (name, _), histogram in self._histograms.items():
            if found := dict(histogram.collect()):
                values.setdefault(name, {}).update(found)
        for collector in self._collectors:
            for family, labels, value in collector():
                series = values.setdefault(family.name, {})
                if family.lowest:
                    series[labels] = min(series.get(labels, value), value)
                else:
                    series[labels] = series.get(labels, 0) + value
        return Snapshot.of(values)
