"""What one process counts.

Counters are incremented where things happen; what can be read from a live table (open tunnels, their bytes) is
collected when a snapshot is taken, so that moving a message costs nothing. All of it belongs to one thread.

Tested by tests/unit/test_metrics.py.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable

from tlstunnel.metrics.families import FAMILIES, SUM, Family
from tlstunnel.metrics.snapshot import Labels, Snapshot
from tlstunnel.metrics.usage import Usage

MOST_SERIES = 5_000
"""Combinations of labels that one counter keeps. Sites and rules come and go with reloads, for as long as it runs."""

OTHER = "other"
"""The value of every label of what is counted beyond that."""

Collected = Iterable[tuple[Family, Labels, int]]


class Counts:
    """The values of one counter, by the values of its labels, in their order."""

    __slots__ = ("_other", "_registry", "values")

    def __init__(self, registry: "Registry", family: Family) -> None:
        self.values: dict[Labels, int] = {}
        self._registry = registry
        self._other = (OTHER,) * len(family.series_labels)

    def add(self, *labels: str) -> None:
        """Count one."""
        values = self.values
        if labels in values:
            values[labels] += 1
        else:
            self._add_new(labels, 1)
        if not self._registry.changed:
            self._registry.touch()

    def increase(self, amount: int, *labels: str) -> None:
        """Count `amount` at once."""
        if labels in self.values:
            self.values[labels] += amount
        else:
            self._add_new(labels, amount)
        if not self._registry.changed:
            self._registry.touch()

    def __getitem__(self, labels: Labels) -> int:
        """The value of these labels, 0 where nothing was counted."""
        return self.values.get(labels, 0)

    def _add_new(self, labels: Labels, amount: int) -> None:
        if len(self.values) >= MOST_SERIES:
            labels = self._other
        self.values[labels] = self.values.get(labels, 0) + amount


class Histogram:
    """The observations of one histogram that has no labels of its own."""

    __slots__ = ("_bounds", "_buckets", "_counts", "_sum")

    def __init__(self, family: Family, counts: Counts) -> None:
        assert not family.labels
        self._bounds = family.bounds
        self._buckets: list[Labels] = [(bucket,) for bucket in family.buckets]
        self._counts = counts
        self._sum: Labels = (SUM,)

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self._counts.add(*self._buckets[bisect_left(self._bounds, seconds)])
        self._counts.increase(round(seconds * 1e6), *self._sum)


class Registry:
    """The counters of a process, and the `usage` of its sites.

    `on_change` is called at the first change after a snapshot.
    """

    def __init__(self) -> None:
        self.changed = False
        self.on_change: Callable[[], None] | None = None
        self.usage = Usage()
        self._counts: dict[str, Counts] = {
            family.name: Counts(self, family) for family in FAMILIES.values() if family.kind != "gauge"
        }
        self._collectors: list[Callable[[], Collected]] = []

    def __getitem__(self, family: Family) -> Counts:
        """The counter `family`. What counts often keeps it."""
        return self._counts[family.name]

    def histogram(self, family: Family) -> Histogram:
        """The histogram `family`. What observes often keeps it."""
        return Histogram(family, self._counts[family.name])

    def collect(self, collector: Callable[[], Collected]) -> None:
        """Ask `collector` at each snapshot for values, which are added to those counted. It must be cheap."""
        self._collectors.append(collector)

    def touch(self) -> None:
        """Note that there is something new since the last snapshot."""
        self.changed = True
        if self.on_change is not None:
            self.on_change()

    def snapshot(self) -> Snapshot:
        """Return all values as they are now, without counters of which there was nothing."""
        self.changed = False
        values = {name: counts.values.copy() for name, counts in self._counts.items() if counts.values}
        for collector in self._collectors:
            for family, labels, value in collector():
                series = values.setdefault(family.name, {})
                series[labels] = series.get(labels, 0) + value
        return Snapshot.of(values)
