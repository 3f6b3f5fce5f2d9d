"""How busy the CPUs are that this process may use."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tlstunnel.processes import cores

_STAT = Path("/proc/stat")
_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


class _Times(NamedTuple):
    at: float
    busy: int
    total: int
    group: float | None
    """CPU seconds of this control group, if it is known."""


class Processor:
    """Measures the share of the usable CPU time that is used since the last call, 0 to 1, by whomever.

    Where a control group has a quota, its own use of that counts too, whichever is more.
    """

    def __init__(
        self, stat: Path = _STAT, clock: Callable[[], float] = time.monotonic, group: Path | None = None
    ) -> None:
        self._stat = stat
        self._clock = clock
        self._group = _find_group() if group is None else group
        self._before = self._read()

    def measure(self) -> float:
        """Return the share; 0 if it is not known."""
        before, now = self._before, self._read()
        if before is None or now is None:
            self._before = now
            return 0.0
        if now.total <= before.total:  # nothing to compare yet
            return 0.0
        self._before = now
        share = (now.busy - before.busy) / (now.total - before.total)
        usable = cores.count_usable()
        if now.group is not None and before.group is not None and usable < len(os.sched_getaffinity(0)):
            share = max(share, (now.group - before.group) / (max(now.at - before.at, 0.001) * usable))
        return min(max(share, 0.0), 1.0)

    def _read(self) -> _Times | None:
        """Read the times of the CPUs that may be used (proc_stat(5)): idle and waiting for I/O is not busy."""
        usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        busy = total = 0
        try:
            for line in self._stat.read_text().splitlines():
                name, *words = line.split()
                if name in usable:
                    times = [int(word) for word in words[:8]]  # guests are in user time already
                    total += sum(times)
                    busy += sum(times) - sum(times[3:5])
        except (OSError, ValueError):
            return None
        return _Times(self._clock(), busy, total, _read_group(self._group)) if total else None


def _find_group() -> Path:
    try:
        path = next(line[3:] for line in _GROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return _GROUPS
    return _GROUPS / path.lstrip("/")


def _read_group(folder: Path) -> float | None:
    """Return the CPU seconds of a control group (admin-guide/cgroup-v2)."""
    try:
        words = (folder / "cpu.stat").read_text().split()
        return int(words[words.index("usage_usec") + 1]) / 1_000_000
    except (OSError, ValueError, IndexError):
        return None
