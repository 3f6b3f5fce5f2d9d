"""The commands that a running tunnel takes: typed requests and results, the same for every transport.

Today they come over the control socket. ``do`` names the command, and the fields of its result become those of the
response (docs/cli.md).

Tested by tests/promises/test_reload.py, test_drain.py and test_processes.py.
"""

import asyncio
import functools
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import msgspec

from tlstunnel import __version__
from tlstunnel.config.together import keeps_history
from tlstunnel.errors import ControlError, StateError
from tlstunnel.processes import usage
from tlstunnel.processes.children import Child, measure_pss
from tlstunnel.processes.control import Handler, describe_client
from tlstunnel.processes.fleet import Fleet
from tlstunnel.processes.messages import HistoryLoad, LedgerLoad, Load
from tlstunnel.processes.rollout import Rollout
from tlstunnel.processes.slots import Slots
from tlstunnel.state.folder import locate_state_folder

CommandT = TypeVar("CommandT", bound=msgspec.Struct)


class ReloadCommand(msgspec.Struct, frozen=True):
    """Read the configuration, the certificates and the lists again."""


class ReloadResult(msgspec.Struct, frozen=True):
    """What has changed, a line for each change."""

    changes: list[str]


class UpgradeCommand(msgspec.Struct, frozen=True):
    """Continue with the release that is installed now. That release reports success."""


class StatusCommand(msgspec.Struct, frozen=True):
    """Report the processes."""


class ProcessStatus(msgspec.Struct, frozen=True):
    """A serving process. `seconds` is its age; `pss_kib` is its proportional set size, if that can be read.

    `tunnels` and `handshakes` are None if it does not respond. `counting` says where it counts what is counted
    together: "ledger", "local: REASON", or "" if it counts alone.
    """

    process: int
    place: int
    generation: int
    version: str
    seconds: float
    state: Literal["serving", "draining", "not responding"]
    tunnels: int | None
    handshakes: int | None
    pss_kib: int | None
    counting: str = ""


class HistoryStatus(msgspec.Struct, frozen=True):
    """The history, in a file of so many `bytes`. `problem` is why nothing is written at the moment, or "".

    `last` is when its last minute began, in Unix time; None if it has none. `waiting` minutes are not written yet, and
    `lost` ones, since the ledger began, never will be.
    """

    path: str
    problem: str
    bytes: int
    last: int | None
    waiting: int
    lost: int


class LedgerStatus(msgspec.Struct, frozen=True):
    """The ledger, which counts for the serving processes. `seconds` is its age.

    `answering` is what has the counts, such as "memory". The last six are None if it does not respond, and `history` is
    None too if it keeps none.
    """

    process: int
    generation: int
    version: str
    seconds: float
    state: Literal["counting", "not responding"]
    pss_kib: int | None
    answering: str | None
    connections: int | None
    questions_per_second: float | None
    keys: int | None
    leases: int | None
    history: HistoryStatus | None = None


class AdminStatus(msgspec.Struct, frozen=True):
    """The admin process, which assesses sites. `seconds` is its age."""

    process: int
    generation: int
    version: str
    seconds: float
    state: Literal["assessing", "not responding"]
    pss_kib: int | None


class ThrottleStatus(msgspec.Struct, frozen=True):
    """A throttle: at most `amount` new handshakes per `window` seconds, until a Unix time.

    They are those of a site, or of so many `addresses` at it if that is not 0.
    """

    site: str
    amount: int
    window: int
    until: float
    addresses: int


class StatusResult(msgspec.Struct, frozen=True):
    """The parent, the serving processes, and the ledger if there is one.

    `ending` is the signal that started a shutdown, empty without one.

    `metrics` are the sums over all processes (docs/metrics.md). `shortages` say in a sentence each what runs short.
    `throttles` are those that hold.
    """

    version: str
    generation: int
    process: int
    ending: str
    listening: list[str]
    processes: list[ProcessStatus]
    pss_kib: int | None
    metrics: dict[str, Any]
    ledger: LedgerStatus | None = None
    shortages: list[str] = []
    admin: AdminStatus | None = None
    throttles: list[ThrottleStatus] = []


class DrainCommand(msgspec.Struct, frozen=True):
    """Drain all tunnels as configured in ``[release]``, and exit."""


class StopCommand(msgspec.Struct, frozen=True):
    """Drain all tunnels within seconds, and exit."""


class Ended(msgspec.Struct, frozen=True):
    """All tunnels have ended; the program exits."""


class Commands:
    """Carries out the commands.

    `end` starts a shutdown as the given signal would; `ended` is set once all tunnels have ended.
    """

    def __init__(
        self,
        fleet: Fleet,
        rollout: Rollout,
        slots: Slots,
        end: Callable[[signal.Signals], None],
        ended: asyncio.Event,
    ) -> None:
        self._fleet = fleet
        self._rollout = rollout
        self._slots = slots
        self._end = end
        self._ended = ended

    async def reload(self, _: ReloadCommand) -> ReloadResult:
        """Reload. Raises ControlError if that fails; nothing was changed then."""
        return ReloadResult(changes=await self._rollout.reload())

    async def upgrade(self, _: UpgradeCommand, client: int | None) -> None:
        """Upgrade, and do not return: the new release responds to `client`.

        Raises ControlError if that fails; nothing was changed then.
        """
        await self._rollout.upgrade(client)

    async def status(self, _: StatusCommand) -> StatusResult:
        """Return the state of every process."""
        now = time.time()
        loads, counts = await asyncio.gather(self._fleet.loads(), self._fleet.request_ledger_load())
        ledger = self._fleet.wiring.ledger
        return StatusResult(
            version=__version__,
            generation=self._fleet.generation,
            process=os.getpid(),
            ending=self._fleet.ending,
            listening=list(dict.fromkeys(str(slot.listener.address) for slot in self._slots)),
            processes=[self._describe(child, load, now) for child, load in loads],
            pss_kib=measure_pss(os.getpid()),
            metrics=self._fleet.totals.sum().to_json(),
            ledger=_describe_ledger(ledger, counts, now) if ledger is not None else None,
            admin=_describe_admin(self._fleet.overseer.find(), now),
            throttles=[
                ThrottleStatus(rule.site, rule.amount, rule.window, rule.until, len(rule.addresses))
                for rule in self._fleet.overseer.rules
            ],
            shortages=[str(shortage) for shortage in self._fleet.resources.shortages.values()],
        )

    async def drain(self, _: DrainCommand) -> Ended:
        """Start draining, and wait until all tunnels have ended."""
        self._end(signal.SIGTERM)
        await self._ended.wait()
        return Ended()

    async def stop(self, _: StopCommand) -> Ended:
        """Start draining within seconds, and wait until all tunnels have ended."""
        self._end(signal.SIGINT)
        await self._ended.wait()
        return Ended()

    def make_handlers(self) -> Mapping[str, Handler]:
        """Return a handler for each command, by the name that it has on the control socket."""

        async def upgrade(request: Mapping[str, Any], client: int) -> Mapping[str, Any]:
            await self.upgrade(_parse(request, UpgradeCommand), client)
            return {}

        async def reload(request: Mapping[str, Any], _: int) -> Mapping[str, Any]:
            return _to_json(await self.reload(_parse(request, ReloadCommand)))

        async def status(request: Mapping[str, Any], _: int) -> Mapping[str, Any]:
            return _to_json(await self.status(_parse(request, StatusCommand)))

        async def drain(request: Mapping[str, Any], _: int) -> Mapping[str, Any]:
            return _to_json(await self.drain(_parse(request, DrainCommand)))

        async def stop(request: Mapping[str, Any], _: int) -> Mapping[str, Any]:
            return _to_json(await self.stop(_parse(request, StopCommand)))

        about_usage = {name: functools.partial(self._handle_usage, name) for name in usage.COMMANDS}
        return {"reload": reload, "upgrade": upgrade, "status": status, "drain": drain, "stop": stop, **about_usage}

    async def _handle_usage(self, name: str, request: Mapping[str, Any], client: int) -> Mapping[str, Any]:
        command = _parse(request, usage.COMMANDS[name])
        who = await asyncio.to_thread(describe_client, client)
        result = await self.ask(command, who)
        return _to_json(result)

    async def ask(self, command: msgspec.Struct, who: str) -> msgspec.Struct:
        """Carry out a command about usage for `who`, and return its result. Raises ControlError.

        Without an admin process, which is so if no site has a plan, how many tunnels are open is known all the same.
        """
        overseer = self._fleet.overseer
        (name,) = (name for name, type_ in usage.COMMANDS.items() if type_ is type(command))
        if isinstance(command, usage.Usage) and overseer.admin is None:
            result: msgspec.Struct = usage.UsageResult(
                now=time.time(),
                problem="the admin process is being started" if overseer.is_needed else "",
                folder=self._find_state_folder(),
                tunnels=self._fleet.measure_minute().tunnels,
            )
        else:
            result = msgspec.convert(await overseer.ask(name, _to_json(command), who), usage.RESULTS[type(command)])
        if isinstance(result, usage.UsageResult):
            shortages = tuple(str(shortage) for shortage in self._fleet.resources.shortages.values())
            result = msgspec.structs.replace(result, warnings=shortages)
        return result

    def _find_state_folder(self) -> str:
        """Return the folder of the history, "" if none is kept."""
        config, invocation = self._fleet.config, self._fleet.startup.invocation
        if not keeps_history(config, os.environ):
            return ""
        configured = invocation.folder / config.state.dir if config.state.dir is not None else None
        try:
            return str(locate_state_folder(configured, os.environ))
        except StateError:
            return ""

    def _describe(self, child: Child, load: Load | None, now: float) -> ProcessStatus:
        identity = child.identity
        draining = child.draining or bool(self._fleet.ending)
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


def _parse(request: Mapping[str, Any], command: type[CommandT]) -> CommandT:
    try:
        return msgspec.convert(request, command)
    except msgspec.ValidationError as error:
        raise ControlError(f"invalid request: {error}") from None


def _to_json(result: msgspec.Struct) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = msgspec.to_builtins(result)
    return fields
