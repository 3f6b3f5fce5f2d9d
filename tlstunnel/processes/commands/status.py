"""What the command `Status` reports: the parent, its children, and the sums of their metrics.

Tested by tests/promises/test_processes.py.
"""

import asyncio
import os
import time
from typing import Any

from tlstunnel import __version__
from tlstunnel.commands.processes import (
    AdminStatus,
    ElectionStatus,
    HistoryStatus,
    LedgerStatus,
    ProcessStatus,
    Status,
    StatusResult,
    ThrottleStatus,
)
from tlstunnel.config.together import shares_notices
from tlstunnel.processes.children import Child, measure_pss
from tlstunnel.processes.commands.metrics import reduce, sum_up
from tlstunnel.processes.fleet import Fleet
from tlstunnel.processes.messages import HistoryLoad, LedgerLoad, Load
from tlstunnel.processes.slots import Slots


async def report_status(fleet: Fleet, slots: Slots, command: Status) -> StatusResult:
    """Return the state of every process."""
    now = time.time()
    throttles = fleet.overseer.rules  # before processes are asked: those that respond have been told of these
    loads, counts = await asyncio.gather(fleet.loads(), fleet.request_ledger_load())
    ledger = fleet.wiring.ledger
    return StatusResult(
        version=__version__,
        generation=fleet.generation,
        process=os.getpid(),
        ending=fleet.ending,
        listening=list(dict.fromkeys(str(slot.listener.address) for slot in slots)),
        processes=[_describe_process(child, load, now, ending=bool(fleet.ending)) for child, load in loads],
        pss_kib=measure_pss(os.getpid()),
        metrics=_list_metrics(fleet, counts, command),
        ledger=_describe_ledger(ledger, counts, now) if ledger is not None else None,
        admin=_describe_admin(fleet.overseer.find(), now),
        throttles=[
            ThrottleStatus(rule.site, rule.amount, rule.window, rule.until, len(rule.addresses)) for rule in throttles
        ],
        shortages=[str(shortage) for shortage in fleet.resources.shortages.values()],
        election=_describe_election(fleet),
        dashboard=fleet.overseer.url,
        dashboard_problem=fleet.overseer.socket.problem,
    )


def _list_metrics(fleet: Fleet, counts: LedgerLoad | None, command: Status) -> dict[str, Any]:
    if command.metrics == "none":
        return {}
    snapshot = sum_up(fleet, counts)
    return (reduce(fleet, snapshot) if command.metrics == "shown" else snapshot).to_json()


def _describe_election(fleet: Fleet) -> ElectionStatus | None:
    if not shares_notices(fleet.config):
        return None
    election = fleet.election
    return ElectionStatus(here=election.is_ours, holder=election.holder)


def _describe_process(child: Child, load: Load | None, now: float, *, ending: bool) -> ProcessStatus:
    identity = child.identity
    draining = child.draining or ending
    return ProcessStatus(
        process=child.pid,
        place=identity.place,
        generation=identity.generation,
        version=identity.version,
        seconds=round(now - identity.started, 1),
        state="not responding" if load is None else "draining" if draining else "serving",
        tunnels=load.tunnels if load is not None else None,
        handshakes=load.handshakes if load is not None else None,
        pss_kib=measure_pss(child.pid),
        counting=load.counting if load is not None else "",
    )


def _describe_admin(admin: Child | None, now: float) -> AdminStatus | None:
    if admin is None:
        return None
    identity = admin.identity
    return AdminStatus(
        process=admin.pid,
        generation=identity.generation,
        version=identity.version,
        seconds=round(now - identity.started, 1),
        state="not responding" if admin.silent else "assessing",
        pss_kib=measure_pss(admin.pid),
    )


def _describe_ledger(ledger: Child, load: LedgerLoad | None, now: float) -> LedgerStatus:
    identity = ledger.identity
    return LedgerStatus(
        process=ledger.pid,
        generation=identity.generation,
        version=identity.version,
        seconds=round(now - identity.started, 1),
        state="not responding" if load is None else "counting",
        pss_kib=measure_pss(ledger.pid),
        answering=load.answering if load is not None else None,
        connections=load.connections if load is not None else None,
        questions_per_second=round(load.questions, 1) if load is not None else None,
        keys=load.keys if load is not None else None,
        leases=load.leases if load is not None else None,
        history=_describe_history(load.history) if load is not None and load.history is not None else None,
    )


def _describe_history(load: HistoryLoad) -> HistoryStatus:
    return HistoryStatus(load.path, load.problem, load.bytes, load.last, load.waiting, load.lost)
