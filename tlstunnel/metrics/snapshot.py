"""The values of a process at one moment, as they are sent to the parent, and their sum over all processes.

Tested by tests/unit/test_metrics.py.
"""

from collections.abc import Hashable, Iterator, Mapping
from itertools import chain
from typing import Any, Self

import msgspec

from tlstunnel.metrics.families import FAMILIES, SITE_FAMILIES, SITE_VALUES, Family
from tlstunnel.metrics.usage import FIELDS

Labels = tuple[str, ...]
Values = dict[str, dict[Labels, int]]

_ALWAYS = frozenset({"tunnels", "handshakes", "bytes_up", "bytes_down"})
"""What is shown of a site even if it is 0: the rate of a counter is only right if it was seen at 0."""

_PARTS: dict[str, tuple[tuple[Labels, int, bool], ...]] = {
    name: tuple(
        (rest, (*FIELDS, "cpu").index(field), field in _ALWAYS)
        for family, rest, field in SITE_VALUES
        if family.name == name
    )
    for name in SITE_FAMILIES
}
"""For each family of sites: the values of the labels after the site, the place of the field, and whether 0 is shown."""


class Snapshot(msgspec.Struct, frozen=True, omit_defaults=True):
    """Values by family name: pairs of the labels' values and the number.

    Processes of two releases may exchange them: unknown families, or known ones with other labels, are ignored. `sites`
    are what the parent knows of each site, from which the families in `SITE_VALUES` are made.
    """

    families: dict[str, list[tuple[Labels, int]]] = {}
    sites: Mapping[str, list[int]] = {}

    @classmethod
    def of(cls, values: Mapping[str, Mapping[Labels, int]]) -> Self:
        """Return the snapshot of these values."""
        return cls({name: list(series.items()) for name, series in values.items()})

    def __getitem__(self, family: Family) -> dict[Labels, int]:
        """The values of `family`."""
        values: dict[Labels, int] = {}
        for labels, value in self.list_series(family):
            values[labels] = values.get(labels, 0) + value
        return values

    def list_series(self, family: Family) -> Iterator[tuple[Labels, int]]:
        """Return the values of `family`. Those with the same labels have to be added up."""
        counted = self.families.get(family.name, ())
        return chain(counted, self._list_sites(family)) if family.name in SITE_FAMILIES else iter(counted)

    def _list_sites(self, family: Family) -> Iterator[tuple[Labels, int]]:
        parts = _PARTS[family.name]
        for site, values in self.sites.items():
            for rest, place, always in parts:
                if always or values[place]:
                    yield (site, *rest), values[place]

    def total(self, family: Family, **labels: str) -> int:
        """Return the sum of the values of `family` that have these labels."""
        wanted = [(family.series_labels.index(label), value) for label, value in labels.items()]
        return sum(
            value for have, value in self.list_series(family) if all(have[index] == text for index, text in wanted)
        )

    def to_json(self) -> dict[str, Any]:
        """Return the values for people and programs: for each family a list of labels and values, as in the table."""
        shown: dict[str, Any] = {}
        for name, family in FAMILIES.items():
            series = sorted(self[family].items())
            if series:
                divisor = family.divisor
                shown[name] = [
                    {
                        "labels": dict(zip(family.series_labels, labels, strict=True)),
                        "value": value if divisor == 1 else value / divisor,
                    }
                    for labels, value in series
                ]
        return shown


class Totals:
    """The sum over all processes, those that have ended included: counters never decrease.

    A process that ends is remembered by what it has sent. `base` holds what has ended by now.
    """

    def __init__(self, base: Snapshot | None = None) -> None:
        self._sum: Values = {}
        """The counters of all processes."""
        self._counted: dict[Hashable, Values] = {}
        """Those of the ones that run."""
        self._gauges: dict[Hashable, Values] = {}
        if base is not None:
            self.update(None, base)
            self.ended(None)

    def update(self, process: Hashable, snapshot: Snapshot) -> None:
        """Take the newest values of `process`: all gauges, and at least the counters that have changed."""
        counted = self._counted.setdefault(process, {})
        gauges = self._gauges[process] = {}
        for name, series in snapshot.families.items():
            family = FAMILIES.get(name)
            if family is None:
                continue
            size = len(family.series_labels)
            if family.kind == "gauge":
                gauges[name] = {labels: value for labels, value in series if len(labels) == size}
                continue
            before, sums = counted.setdefault(name, {}), self._sum.setdefault(name, {})
            for labels, value in series:
                if len(labels) == size:
                    sums[labels] = sums.get(labels, 0) + value - before.get(labels, 0)
                    before[labels] = value

    def ended(self, process: Hashable) -> None:
        """Keep what `process` has counted, now that it has ended. Its gauges are gone with it."""
        self._counted.pop(process, None)
        self._gauges.pop(process, None)

    def last(self, process: Hashable) -> Snapshot | None:
        """Return what a running process has sent, for the release that takes it over."""
        if process not in self._counted:
            return None
        return Snapshot.of({**self._counted[process], **self._gauges[process]})

    @property
    def base(self) -> Snapshot:
        """The counts of the processes that have ended."""
        values = {name: series.copy() for name, series in self._sum.items()}
        for counted in self._counted.values():
            for name, series in counted.items():
                for labels, value in series.items():
                    values[name][labels] -= value
        found = {name: {labels: value for labels, value in series.items() if value} for name, series in values.items()}
        return Snapshot.of({name: series for name, series in found.items() if series})

    def sum(self) -> Snapshot:
        """Return the sum over all processes."""
        gauges: Values = {}
        for values in self._gauges.values():
            for name, series in values.items():
                lowest, sums = FAMILIES[name].lowest, gauges.setdefault(name, {})
                for labels, value in series.items():
                    before = sums.get(labels)
                    sums[labels] = value if before is None else min(before, value) if lowest else before + value
        return Snapshot.of({**{name: series for name, series in self._sum.items() if series}, **gauges})
