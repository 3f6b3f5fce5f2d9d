"""Descriptors and memory that run short: which, since when, and the site that grew. No I/O except at the end.

A resource is short from the share that `[usage.busy]` gives, and no longer when that has fallen by `HYSTERESIS`, so
that a share at the threshold makes one line of the log and not many.

Tested by tests/unit/test_processes_resources.py.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Resource = Literal["descriptors", "memory"]

HYSTERESIS = 0.1
"""How far a share has to fall until its resource is no longer short."""

MEASURE_SECONDS = 5.0
"""How often it is measured."""

NOTED_EVERY = 12
"""After how many measurements the tunnels of sites are noted: once a minute."""

COMPARED = 10
"""How many of these notes there are. Growth is the difference to the oldest."""

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_KIB = 1024


class Growth(NamedTuple):
    """The site whose tunnels have grown most, or has the most if none has grown: "" if there are no tunnels."""

    site: str = ""
    tunnels: int = 0
    grown: int = 0


@dataclass(frozen=True, slots=True)
class Shortage:
    """A resource that is short: `share` of it is used, 0 to 1. `process` is the one that is short of it, 0 for all."""

    resource: Resource
    share: float
    process: int
    growth: Growth

    def describe(self) -> dict[str, str | int]:
        """Return the fields of its line in the log."""
        process = {"process": self.process} if self.process else {}
        growth = self.growth._asdict() if self.growth.site else {}
        return {"resource": self.resource, "percent": round(self.share * 100), **process, **growth}

    def __str__(self) -> str:
        """What the operator is told."""
        if self.resource == "descriptors":
            what = f"process {self.process} uses {self.share:.0%} of the connections that its descriptors allow"
        else:
            what = f"{self.share:.0%} of the memory is used"
        if not self.growth.site:
            return what
        site, tunnels, grown = self.growth
        return f"{what}; {site} has {tunnels} tunnels" + (f", {grown} more than before" if grown > 0 else "")


class Resources:
    """Finds out what is short. `shares` are the last measured, 0 to 1; `shortages` are what is short now."""

    def __init__(self) -> None:
        self.shares: Mapping[Resource, float] = {}
        self.shortages: dict[Resource, Shortage] = {}
        self._tunnels: deque[Mapping[str, int]] = deque(maxlen=COMPARED)
        self._measured = 0

    def measure(
        self,
        thresholds: Mapping[Resource, float],
        processes: Mapping[int, float],
        memory: float,
        tunnels: Mapping[str, int],
    ) -> tuple[list[Shortage], list[Resource]]:
        """Compare with the thresholds, and return what has become short, and what is no longer.

        `processes` are the shares of the connections that each process can have, by pid; `memory` is the share of it
        that is used; `tunnels` are the open tunnels of each site that has any.
        """
        fullest = max(processes, key=lambda pid: processes[pid], default=0)
        self.shares = {"descriptors": processes.get(fullest, 0.0), "memory": memory}
        growth = self._find_growth(tunnels)
        new, over = [], []
        for resource, share in self.shares.items():
            if resource in self.shortages and share < thresholds[resource] - HYSTERESIS:
                del self.shortages[resource]
                over.append(resource)
            elif resource in self.shortages or share >= thresholds[resource]:
                shortage = Shortage(resource, share, fullest if resource == "descriptors" else 0, growth)
                if resource not in self.shortages:
                    new.append(shortage)
                self.shortages[resource] = shortage
        return new, over

    def _find_growth(self, tunnels: Mapping[str, int]) -> Growth:
        before = self._tunnels[0] if self._tunnels else tunnels
        if self._measured % NOTED_EVERY == 0:
            self._tunnels.append(dict(tunnels))
        self._measured += 1
        site = max(tunnels, key=lambda one: (tunnels[one] - before.get(one, 0), tunnels[one]), default="")
        return Growth(site, tunnels[site], tunnels[site] - before.get(site, 0)) if site else Growth()


def measure_memory() -> float:
    """Return the share of memory that is used, 0 to 1: of the machine or of this control group, whichever is more.

    What the kernel would free when it is needed, such as cached files, is not used. 0 if that is not known.
    """
    return max(_measure_machine(), _measure_group())


def _measure_machine() -> float:
    try:
        lines = (line.split() for line in _MEMINFO.read_text().splitlines())
        found = {words[0]: int(words[1]) * _KIB for words in lines if len(words) > 1}
        return 1.0 - found["MemAvailable:"] / found["MemTotal:"]
    except (OSError, ValueError, KeyError, ZeroDivisionError):
        return 0.0


def _measure_group() -> float:
    """See the kernel's Documentation/admin-guide/cgroup-v2.rst. Only the group itself: systemd sets limits there."""
    try:
        path = next(line[3:] for line in _GROUP.read_text().splitlines() if line.startswith("0::"))
        folder = _GROUPS / path.lstrip("/")
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return 0.0
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        stat = {words[0]: int(words[1]) for words in lines if len(words) > 1}
        used = int((folder / "memory.current").read_text()) - stat.get("inactive_file", 0)
        return max(used, 0) / int(limit)
    except (OSError, ValueError, StopIteration, ZeroDivisionError):
        return 0.0
