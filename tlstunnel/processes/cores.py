"""The number of cores that this process may use."""

import math
import os
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def count_usable(root: Path = _ROOT, own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the number of cores in the CPU affinity, or in the smallest quota of the control groups if that is lower.

    Reads the quotas of both versions: ``cpu.max`` (Linux, admin-guide/cgroup-v2) and ``cpu.cfs_quota_us``
    (scheduler/sched-bwc). They are rounded up: one and a half cores need two processes to be used. At least 1.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *(math.ceil(quota) for quota in _find_quotas(root, own))]))


def _find_quotas(root: Path, own: Path) -> list[float]:
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        folder = top / path.lstrip("/")
        # Quotas of parent groups apply too. In a container, the process's own group may appear as the root.
        for place in {folder, *folder.parents} | {top}:
            if place == top or top in place.parents:
                found += _read_quota(place)
    return found


def _read_quota(folder: Path) -> list[float]:
    for read in (_read_v2, _read_v1):
        try:
            quota, period = read(folder)
        except (OSError, ValueError):
            continue  # no quota, or "max"
        if quota > 0 and period > 0:
            return [quota / period]
    return []


def _read_v2(folder: Path) -> tuple[int, int]:
    quota, period = (folder / "cpu.max").read_text().split()
    return int(quota), int(period)


def _read_v1(folder: Path) -> tuple[int, int]:
    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    return int(quota), int(period)
