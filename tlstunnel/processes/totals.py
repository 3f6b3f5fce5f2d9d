"""What the sites of this tunnel have used: the sums over all processes, those that have exited included.

The history makes rows from them, so they never decrease. An upgrade hands them over.

Tested by tests/unit/test_processes_totals.py.
"""

import time
from collections.abc import Iterable, Mapping

import msgspec

from tlstunnel.metrics.families import OTHER
from tlstunnel.metrics.usage import FIELDS, MOST_SITES, Values

HANDSHAKE_COST = 1_200_000
"""CPU time for a handshake, whether it is refused or not, in nanoseconds (docs/performance.md)."""

BYTE_COST = 6
"""CPU time for a byte, in nanoseconds: that of messages of 4 KiB. In bulk data it is 2, in messages of 64 bytes 270."""

_TUNNELS = FIELDS.index("tunnels")
_HANDSHAKES = slice(FIELDS.index("handshakes"), FIELDS.index("bytes_up"))
_SHORT = FIELDS.index("short")
_BYTES = slice(FIELDS.index("bytes_up"), FIELDS.index("bytes_down") + 1)
_CPU = len(FIELDS)
_NOTHING: Values = [0] * len(FIELDS)


class ProcessUsage(msgspec.Struct, omit_defaults=True):
    """What one process, by its pid, has sent last. `owed` are the microseconds of CPU time that no site has got yet."""

    process: int
    sites: dict[str, Values] = {}
    cpu: int = 0
    owed: int = 0


class TotalsHandover(msgspec.Struct, frozen=True):
    """The totals as an upgrade hands them over. `began` is of ``time.monotonic``; `processes` have not ended."""

    began: float
    sites: dict[str, Values]
    processes: list[ProcessUsage]
    forgotten: Values = []


class SiteTotals:
    """The values of `FIELDS` for each site, and after them its CPU time in microseconds, as estimated.

    The CPU time of a process is divided among the sites by what they have used of it since it was last divided, with
    `HANDSHAKE_COST` and `BYTE_COST`. So the sites together have what the processes have used.
    """

    def __init__(self, handover: TotalsHandover | None = None) -> None:
        self._began = time.monotonic() if handover is None else handover.began
        self._sites: dict[str, Values] = {} if handover is None else handover.sites
        self._forgotten: Values = [*_NOTHING, 0]
        if handover is not None and handover.forgotten:
            self._forgotten = handover.forgotten
        running = [] if handover is None else handover.processes
        self._processes: dict[int, ProcessUsage] = {one.process: one for one in running}
        self._configured: frozenset[str] = frozenset()
        self._changed: set[str] = set(self._sites)

    @property
    def age(self) -> float:
        """Seconds since the totals began at zero."""
        return time.monotonic() - self._began

    @property
    def sites(self) -> Mapping[str, Values]:
        """The totals of all sites."""
        return self._sites

    def with_forgotten(self) -> Mapping[str, Values]:
        """Return the totals of all sites, and as `OTHER` those of the sites that were forgotten, if there are any."""
        if not any(self._forgotten):
            return self._sites
        own = self._sites.get(OTHER, [*_NOTHING, 0])
        return {**self._sites, OTHER: [a + b for a, b in zip(own, self._forgotten, strict=True)]}

    def hand_over(self) -> TotalsHandover:
        """Return what the next program continues with."""
        return TotalsHandover(self._began, self._sites, list(self._processes.values()), self._forgotten)

    def configure(self, names: Iterable[str]) -> None:
        """Note which sites there are. They have totals before any connection; `forget_idle` forgets others."""
        self._configured = frozenset(names)
        for name in self._configured:
            self._find(name)

    def update(self, process: int, sites: Mapping[str, Values], cpu: int) -> None:
        """Add what a process has used since its last report: the `sites` that have changed, and its CPU time."""
        before = self._processes.get(process)
        if before is None:
            before = self._processes[process] = ProcessUsage(process)
        costs = {}
        for site, given in sites.items():
            values = given[:_CPU] + _NOTHING[len(given) :]  # of another release
            last = before.sites.get(site, _NOTHING)
            change = [new - old for new, old in zip(values, last, strict=True)]
            before.sites[site] = values
            total = self._find(site)
            for index, amount in enumerate(change):
                if amount:
                    total[index] += amount
            self._changed.add(site)
            # A short tunnel is one of the handshakes.
            handshakes = sum(change[_HANDSHAKES]) - change[_SHORT]
            costs[site] = handshakes * HANDSHAKE_COST + sum(change[_BYTES]) * BYTE_COST
        before.owed += max(cpu - before.cpu, 0)
        before.cpu = max(cpu, before.cpu)
        self._divide(before, costs)

    def ended(self, process: int) -> None:
        """Keep what a process has used, now that it has ended. Its tunnels are gone with it."""
        usage = self._processes.pop(process, None)
        if usage is not None:
            for site, values in usage.sites.items():
                if values[_TUNNELS]:
                    self._find(site)[_TUNNELS] -= values[_TUNNELS]
                    self._changed.add(site)

    def take_changes(self) -> dict[str, Values]:
        """Return the totals of the sites that have changed since the last call."""
        changed, self._changed = self._changed, set()
        return {site: self._sites[site] for site in changed if site in self._sites}

    def count_tunnels_of(self, process: int) -> dict[str, int]:
        """Return the open tunnels of one process, of each site that has any in it."""
        usage = self._processes.get(process)
        return {} if usage is None else {site: one[_TUNNELS] for site, one in usage.sites.items() if one[_TUNNELS]}

    def count_tunnels(self) -> dict[str, int]:
        """Return the open tunnels of each site that has any."""
        return {site: values[_TUNNELS] for site, values in self._sites.items() if values[_TUNNELS]}

    def forget_idle(self) -> None:
        """Forget the sites that are no longer configured and have no tunnels."""
        gone = [site for site, values in self._sites.items() if site not in self._configured and not values[_TUNNELS]]
        for site in gone:
            values = self._sites.pop(site)
            self._forgotten = [a + b for a, b in zip(self._forgotten, values, strict=True)]

    def _find(self, site: str) -> Values:
        total = self._sites.get(site)
        if total is None:
            if len(self._sites) >= MOST_SITES:
                self.forget_idle()
            total = self._sites[site] = [*_NOTHING, 0]
            self._changed.add(site)
        return total

    def _divide(self, usage: ProcessUsage, costs: Mapping[str, int]) -> None:
        """Divide the CPU time that is owed. The rest of the division stays owed."""
        cost = sum(costs.values())
        if cost <= 0 or not usage.owed:
            return
        owed = usage.owed
        for site, part in costs.items():
            if part > 0 and site in self._sites:
                amount = owed * part // cost
                self._sites[site][_CPU] += amount
                usage.owed -= amount
