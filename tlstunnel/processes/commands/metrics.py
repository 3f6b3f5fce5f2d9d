"""Gathers the metrics of the whole tunnel: sums over all processes, what sites have used, what only the parent knows.

Tested by tests/promises/test_metrics_scraped.py.
"""

import asyncio
import contextlib
import functools
import os
import platform
import resource
import ssl
import time
from pathlib import Path

from tlstunnel import __version__
from tlstunnel.metrics import families
from tlstunnel.metrics.families import MICROSECONDS
from tlstunnel.metrics.registry import Collected
from tlstunnel.metrics.snapshot import Snapshot
from tlstunnel.processes.children import Child, Role
from tlstunnel.processes.fleet import Fleet
from tlstunnel.processes.messages import LedgerLoad

ANSWER_SECONDS = 1.0
"""How long processes may take to tell their values of this moment. After that, those that they have sent last count."""

_PARENT = "parent"
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


async def gather(fleet: Fleet) -> Snapshot:
    """Return all metrics of this moment, of at most `Fleet.shown_sites` and the sum of the others."""
    ledger: LedgerLoad | None = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ANSWER_SECONDS):
            _, ledger = await asyncio.gather(fleet.loads(scraped=True), fleet.request_ledger_load())
    return reduce(fleet, sum_up(fleet, ledger))


def reduce(fleet: Fleet, snapshot: Snapshot) -> Snapshot:
    """Return the metrics with series of the sites that are to be shown, and the sums of the others."""
    if fleet.config.admin is not None:
        fleet.shown_sites.most = fleet.config.admin.metric_sites
    return fleet.shown_sites.reduce(snapshot)


def sum_up(fleet: Fleet, ledger: LedgerLoad | None = None) -> Snapshot:
    """Return all metrics of all sites, as known in the parent; `ledger` is what the ledger has said just now."""
    snapshot = fleet.sum_metrics()
    parts = (
        _describe_processes(fleet),
        _measure_processes(fleet),
        _describe_ledger(fleet, ledger),
        _describe_release(fleet),
    )
    for part in parts:
        for family, labels, value in part:
            snapshot.families.setdefault(family.name, []).append((labels, value))
    return Snapshot(snapshot.families, fleet.usage.with_forgotten())


def _describe_processes(fleet: Fleet) -> Collected:
    """Return how many processes of each role are in which state, and the tunnels of those that drain."""
    states = {(role.value, state): 0 for role in Role for state in ("serving", "draining", "not responding")}
    draining = 0
    for child in fleet:
        if child.silent:
            state = "not responding"
        elif child.draining or (fleet.ending and child.identity.role is Role.SERVING):
            state = "draining"
            draining += sum(fleet.usage.count_tunnels_of(child.pid).values())
        elif child.ready:
            state = "serving"
        else:
            state = "starting"
        key = child.identity.role.value, state
        states[key] = states.get(key, 0) + 1
    for labels, number in states.items():
        yield families.PROCESSES, labels, number
    for role in Role:
        yield families.PROCESSES_WANTED, (role.value,), fleet.count(role)
    yield families.DRAINING_TUNNELS, (), draining
    yield families.SHUTTING_DOWN, (), int(bool(fleet.ending))


def _measure_processes(fleet: Fleet) -> Collected:
    """Return the memory, the descriptors and the CPU time of all processes."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime
    measured: dict[tuple[str, str, str], list[int]] = {}
    for pid, labels in ((os.getpid(), (_PARENT, str(fleet.generation), "1")), *map(_label, fleet)):
        sums = measured.setdefault(labels, [0, 0, 0])
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has exited
            folder = Path(f"/proc/{pid}")
            sums[0] += int((folder / "statm").read_text().split()[1]) * _PAGE
            sums[1] += _count_descriptors(folder / "fd")
            sums[2] += resource.prlimit(pid, resource.RLIMIT_NOFILE)[0]
            if labels[0] != _PARENT:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                seconds += sum(map(int, fields[11:15])) / _TICKS
    for labels, (memory, descriptors, most) in measured.items():
        yield families.PROCESS_MEMORY, labels, memory
        yield families.PROCESS_DESCRIPTORS, labels, descriptors
        yield families.PROCESS_MOST_DESCRIPTORS, labels, most
    yield families.CPU_SECONDS, (), round(seconds * MICROSECONDS)
    yield families.MEMORY_USED, (), round(fleet.resources.shares.get("memory", 0.0) * MICROSECONDS)


def _label(child: Child) -> tuple[int, tuple[str, str, str]]:
    identity = child.identity
    return child.pid, (identity.role.value, str(identity.generation), str(identity.place))


def _count_descriptors(folder: Path) -> int:
    """Return how many descriptors a process has open. Since Linux 6.2, the size of the folder is their number."""
    return folder.stat().st_size or sum(1 for _ in os.scandir(folder))


def _describe_ledger(fleet: Fleet, load: LedgerLoad | None) -> Collected:
    """Return how the ledger is, if there is one or has to be."""
    if not fleet.count(Role.LEDGER):
        return
    yield families.LEDGER_UP, (), int(load is not None)
    if load is None:
        return
    yield families.LEDGER_CONNECTIONS, (), load.connections
    yield families.LEDGER_KEYS, (), load.keys
    yield families.LEDGER_LEASES, (), load.leases
    if fleet.config.state.url is not None:
        yield families.VALKEY_UP, (), int(not load.failing)
    if load.history is not None:
        yield families.HISTORY_WAITING, (), 60 * load.history.waiting
        yield families.HISTORY_LOST, (), 60 * load.history.lost


def _describe_release(fleet: Fleet) -> Collected:
    yield families.GENERATION, (), fleet.generation
    yield families.START_TIME, (), round(_find_start() * MICROSECONDS)
    yield families.CONFIG_LOADED, (), int(fleet.last_reload_succeeded)
    yield families.CONFIG_LOAD_TIME, (), round(fleet.config_loaded * MICROSECONDS)
    labels = __version__, platform.python_version(), ssl.OPENSSL_VERSION.removeprefix("OpenSSL ").partition(" ")[0]
    yield families.BUILD_INFO, labels, 1


@functools.cache
def _find_start() -> float:
    """Return when this process started, in Unix time; an upgrade does not change it."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / _TICKS
