"""The sites of a configuration, with what each of them has used: filtered, sorted, and one page at a time.

What depends on the configuration alone is prepared once, because there may be ten thousand sites.

Tested by tests/unit/test_inventory_sites.py.
"""

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import idna

from tlstunnel.commands.sites import MOST_LISTED, Sites, SiteStatus
from tlstunnel.config import Config, RouteConfig, SiteConfig
from tlstunnel.metrics.usage import FIELDS
from tlstunnel.plans.guidelines import find_plan

KINDS = ("unfinished", "invalid", "blocked", "limited", "worker", "origin", "declined")
"""What connections are counted as that ended without a tunnel (`tlstunnel.journal.kinds`)."""

_INDEX = {name: index for index, name in enumerate(FIELDS)}
_TUNNELS, _HANDSHAKES = _INDEX["tunnels"], _INDEX["handshakes"]
_UP, _DOWN = _INDEX["bytes_up"], _INDEX["bytes_down"]
_KINDS = tuple((kind, _INDEX[kind]) for kind in KINDS)
_NOTHING = (0,) * len(FIELDS)

Totals = Mapping[str, Sequence[int]]
"""What each site has used: the values of `FIELDS`, by its first name."""

_FIGURES: Mapping[str, Callable[[Sequence[int]], int]] = {
    "tunnels": lambda values: values[_TUNNELS],
    "handshakes": lambda values: values[_HANDSHAKES],
    "refused": lambda values: sum(values[index] for _, index in _KINDS),
    "bytes": lambda values: values[_UP] + values[_DOWN],
}


@dataclass(frozen=True, slots=True)
class OriginEntry:
    """An origin in the configuration: the first name of its site, the path of its route, and its address."""

    site: str
    route: str
    address: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """A site in the configuration. `text` is what a search looks at."""

    name: str
    names: tuple[str, ...]
    shown: str
    text: str
    origins: int
    plan: str
    guideline: int | None
    worker: str
    http: str


class SiteIndex:
    """The sites of a configuration. For ten thousand of them, it takes a tenth of a second to make one."""

    def __init__(self, config: Config) -> None:
        self._entries = [_make_entry(site, config) for site in sorted(config.sites, key=lambda site: site.names[0])]
        self._by_name = {name: entry for entry in self._entries for name in entry.names}
        self.origins = [
            origin for site in sorted(config.sites, key=lambda site: site.names[0]) for origin in _list_origins(site)
        ]
        """Every origin, by its site's name, in the order of the configuration."""

    def find(self, name: str) -> str | None:
        """Return the first name of the site that has `name`."""
        entry = self._by_name.get(name)
        return None if entry is None else entry.name

    def select(self, command: Sites, totals: Totals, throttled: Collection[str]) -> tuple[int, list[SiteStatus]]:
        """Return how many sites match, and those of the page. Takes some milliseconds for ten thousand sites."""
        entries = self._filter(command, totals)
        first, end = max(command.offset, 0), max(command.offset, 0) + min(max(command.limit, 0), MOST_LISTED)
        if command.sort == "name":
            chosen = entries[first:end]
        else:
            figure = _FIGURES[command.sort]
            largest = heapq.nsmallest(
                end, entries, key=lambda entry: (-figure(totals.get(entry.name, _NOTHING)), entry.name)
            )
            chosen = list(islice(largest, first, None))
        return len(entries), [self._describe(entry, totals, throttled) for entry in chosen]

    def _filter(self, command: Sites, totals: Totals) -> list[_Entry]:
        if command.site:
            found = self._by_name.get(command.site)
            return [found] if found is not None else []
        removed = [
            _Entry(name, (name,), name, name.casefold(), 0, "", None, "", "")
            for name, values in totals.items()
            if values[_TUNNELS] and name not in self._by_name
        ]
        entries = sorted((*self._entries, *removed), key=lambda entry: entry.name) if removed else self._entries
        wanted = command.search.strip().casefold()
        return [entry for entry in entries if wanted in entry.text] if wanted else entries

    def _describe(self, entry: _Entry, totals: Totals, throttled: Collection[str]) -> SiteStatus:
        values = totals.get(entry.name, _NOTHING)
        return SiteStatus(
            names=list(entry.names),
            shown=entry.shown,
            tunnels=values[_TUNNELS],
            handshakes=values[_HANDSHAKES],
            refused={kind: values[index] for kind, index in _KINDS},
            bytes_up=values[_UP],
            bytes_down=values[_DOWN],
            origins=entry.origins,
            plan=entry.plan,
            guideline=entry.guideline,
            throttled=entry.name in throttled,
            worker=entry.worker,
            http=entry.http,
            removed=entry.name not in self._by_name,
        )


def show_name(name: str) -> str:
    """Return a site's name as people write it: an international one in its own script."""
    if "xn--" not in name:
        return name
    try:
        return ".".join(idna.ulabel(label) if label.startswith("xn--") else label for label in name.split("."))
    except idna.IDNAError:
        return name


def _make_entry(site: SiteConfig, config: Config) -> _Entry:
    plan = find_plan(site, config.plans)
    shown = show_name(site.names[0])
    return _Entry(
        name=site.names[0],
        names=site.names,
        shown=shown,
        text="\n".join({*site.names, *map(show_name, site.names)}).casefold(),
        origins=len(site.origins) + sum(len(route.origins) for route in site.routes),
        plan=plan.label or plan.plan,
        guideline=plan.guideline,
        worker=site.worker or "",
        http=site.http,
    )


def _list_origins(site: SiteConfig) -> list[OriginEntry]:
    tables: list[tuple[str, SiteConfig | RouteConfig]] = [("", site), *((route.path, route) for route in site.routes)]
    return [OriginEntry(site.names[0], path, str(one.address)) for path, table in tables for one in table.origins]
