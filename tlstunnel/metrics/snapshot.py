"""The values of a process at one moment, as they are sent to the parent, and their sum over all processes.

Tested by tests/unit/test_metrics.py.
"""

from collections.abc import Hashable, Mapping
from typing import Any, Self

import msgspec

from tlstunnel.metrics.families import FAMILIES, Family

Labels = tuple[str, ...]
Values = dict[str, dict[Labels, int]]


class Snapshot(msgspec.Struct, frozen=True, omit_defaults=True):
    """Values by family name: pairs of the labels' values and the number.

    Processes of two releases may exchange them: unknown families, or known ones with other labels, are ignored.
    """

    families: dict[str, list[tuple[Labels, int]]] = {}

    @classmethod
    def of(cls, values: Mapping[str, Mapping[Labels, int]]) -> Self:
        """Return the snapshot of these values."""
        return cls({name: list(series.items()) for name, series in values.items()})

    def __getitem__(self, family: Family) -> dict[Labels, int]:
        """The values of `family`."""
        return dict(self.families.get(family.name, ()))

    def total(self, family: Family, **labels: str) -> int:
        """Return the sum of the values of `family` that have these labels."""
        wanted = [(family.series_labels.index(label), value) for label, value in labels.items()]
        return sum(
            value
            for have, value in self.families.get(family.name, ())
            if all(have[index] == text for index, text in wanted)
        )

    def to_json(self) -> dict[str, Any]:
        """Return the values for people and programs: for each family a list of labels and values, as in the table."""
        shown: dict[str, Any] = {}
        for name, family in FAMILIES.items():
            series = sorted(self.families.get(name, ()))
            if series:
                shown[name] = [
                    {"labels": dict(zip(family.series_labels, labels, strict=True)), "value": value}
                    for labels, value in series
                ]
        return shown


class Totals:
    """The sum over all processes, those that have ended included: counters never decrease.

    A process that ends is remembered by its last snapshot. `base` holds what has ended by now.
    """

    def __init__(self, base: Snapshot | None = None) -> None:
        self._base: Values = {}
        self._last: dict[Hashable, Snapshot] = {}
        if base is not None:
            _add(self._base, base, gauges=False)

    def update(self, process: Hashable, snapshot: Snapshot) -> None:
        """Take the newest snapshot of `process`."""
        self._last[process] = snapshot

    def ended(self, process: Hashable) -> None:
        """Keep what `process` has counted, now that it has ended. Its gauges are gone with it."""
        snapshot = self._last.pop(process, None)
        if snapshot is not None:
            _add(self._base, snapshot, gauges=False)

    def last(self, process: Hashable) -> Snapshot | None:
        """Return the newest snapshot of a running process, for the release that takes it over."""
        return self._last.get(process)

    @property
    def base(self) -> Snapshot:
        """The counts of the processes that have ended."""
        return Snapshot.of(self._base)

    def sum(self) -> Snapshot:
        """Return the sum over all processes."""
        values: Values = {name: series.copy() for name, series in self._base.items()}
        for snapshot in self._last.values():
            _add(values, snapshot, gauges=True)
        return Snapshot.of(values)


def _add(values: Values, snapshot: Snapshot, *, gauges: bool) -> None:
    for name, series in snapshot.families.items():
        family = FAMILIES.get(name)
        if family is None or (family.kind == "gauge" and not gauges):
            continue
        sums = values.setdefault(name, {})
        for labels, value in series:
            if len(labels) == len(family.series_labels):
                sums[labels] = sums.get(labels, 0) + value
