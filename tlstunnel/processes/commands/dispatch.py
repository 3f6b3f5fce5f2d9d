"""Carries out the commands of `tlstunnel.commands`, whichever way they come.

On the control socket, ``do`` names the command, and the fields of its result become those of the response
(docs/cli.md).

Tested by tests/promises/test_reload.py, test_drain.py and test_processes.py.
"""

import asyncio
import functools
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from tlstunnel.commands.catalogue import COMMANDS, parse_command
from tlstunnel.commands.command import AnyCommand, Command, ResultT
from tlstunnel.commands.configuration import Configuration, Loads
from tlstunnel.commands.metrics import Metrics, MetricsResult
from tlstunnel.commands.processes import (
    Drain,
    Ended,
    Ready,
    ReadyResult,
    Reload,
    ReloadResult,
    Status,
    StatusResult,
    Stop,
    Upgrade,
    Upgraded,
)
from tlstunnel.commands.records import Refusals, WatchRecords
from tlstunnel.commands.sites import Certificates, Origins, Sites
from tlstunnel.commands.tunnels import EndTunnels, Tunnels, TunnelsEnded, TunnelsResult
from tlstunnel.commands.usage import AckNotice, MuteSite, Notices, ReleaseSite, ThrottleSite, Usage, UsageResult
from tlstunnel.config.together import keeps_history
from tlstunnel.errors import StateError
from tlstunnel.processes.commands.actions import Via, log_action
from tlstunnel.processes.commands.metrics import gather
from tlstunnel.processes.commands.reports import Reports
from tlstunnel.processes.commands.status import report_status
from tlstunnel.processes.commands.tunnels import end_tunnels, list_tunnels
from tlstunnel.processes.control import Handler, describe_client
from tlstunnel.processes.fleet import Fleet
from tlstunnel.processes.rollout import Rollout
from tlstunnel.processes.slots import Slots
from tlstunnel.state.folder import locate_state_folder

_ABOUT_USAGE: tuple[type[AnyCommand], ...] = (Notices, AckNotice, MuteSite, ThrottleSite, ReleaseSite)
"""The admin process carries these out, and `Usage`."""

_ONLY_ADMIN = frozenset({WatchRecords.name})
"""Their results go to the admin process, so only it may send them."""


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
        self._reports = Reports(fleet, rollout.loads)
        self._handlers: Mapping[type[AnyCommand], Callable[[Any, str], Awaitable[msgspec.Struct]]] = {
            Reload: self._reload,
            Upgrade: self._upgrade,
            Status: self._report_status,
            Ready: self._report_readiness,
            Drain: self._drain,
            Stop: self._stop,
            Metrics: self._report_metrics,
            Sites: self._reports.report_sites,
            Origins: self._reports.report_origins,
            Certificates: self._reports.report_certificates,
            Configuration: self._reports.report_configuration,
            Loads: self._reports.report_loads,
            Refusals: self._reports.report_refusals,
            WatchRecords: self._reports.watch_records,
            Usage: self._report_usage,
            Tunnels: self._list_tunnels,
            EndTunnels: self._end_tunnels,
            **dict.fromkeys(_ABOUT_USAGE, self._ask_admin),
        }

    async def carry_out(self, command: Command[ResultT], who: str, via: Via) -> ResultT:
        """Carry out a command for `who`, and return its result. What acts is logged.

        Raises ControlError if that fails; nothing was changed then.
        """
        with log_action(command, who, via, self._fleet.startup.style.show_network):
            result = await self._handlers[type(command)](command, who)
        assert isinstance(result, command.result)
        return result  # type: ignore[return-value]  # it is ResultT

    def make_handlers(self) -> Mapping[str, Handler]:
        """Return a handler for each command, by the name that it has on the control socket."""
        return {
            **{name: functools.partial(self._handle, name) for name in COMMANDS if name not in _ONLY_ADMIN},
            Upgrade.name: self._upgrade_for,
        }

    async def _handle(self, name: str, request: Mapping[str, Any], client: int) -> Mapping[str, Any]:
        command = parse_command(name, request)
        who = await asyncio.to_thread(describe_client, client)
        fields: Mapping[str, Any] = msgspec.to_builtins(await self.carry_out(command, who, "control socket"))
        return fields

    async def _upgrade(self, _: Upgrade, who: str) -> Upgraded:
        """Upgrade, and do not return."""
        await self._rollout.upgrade(None, who)
        return Upgraded()

    async def _upgrade_for(self, _: Mapping[str, Any], client: int) -> Mapping[str, Any]:
        """Upgrade, and do not return: the new release responds to `client`.

        Raises ControlError if that fails; nothing was changed then.
        """
        who = await asyncio.to_thread(describe_client, client)
        with log_action(Upgrade(), who, "control socket"):
            await self._rollout.upgrade(client, who)
        return {}

    async def _reload(self, _: Reload, who: str) -> ReloadResult:
        return ReloadResult(changes=await self._rollout.reload(who))

    async def _report_status(self, command: Status, _: str) -> StatusResult:
        return await report_status(self._fleet, self._slots, command)

    async def _report_readiness(self, _: Ready, __: str) -> ReadyResult:
        if self._fleet.ending:
            return ReadyResult(ready=False, reason="the tunnel is shutting down")
        if not self._fleet.accepting():
            return ReadyResult(ready=False, reason="no process accepts connections")
        return ReadyResult(ready=True)

    async def _drain(self, _: Drain, __: str) -> Ended:
        """Start draining, and wait until all tunnels have ended."""
        self._end(signal.SIGTERM)
        await self._ended.wait()
        return Ended()

    async def _stop(self, _: Stop, __: str) -> Ended:
        """Start draining within seconds, and wait until all tunnels have ended."""
        self._end(signal.SIGINT)
        await self._ended.wait()
        return Ended()

    async def _report_metrics(self, _: Metrics, __: str) -> MetricsResult:
        return MetricsResult(now=time.time(), snapshot=await gather(self._fleet))

    async def _list_tunnels(self, command: Tunnels, who: str) -> TunnelsResult:
        return await list_tunnels(self._fleet, command, who)

    async def _end_tunnels(self, command: EndTunnels, who: str) -> TunnelsEnded:
        return await end_tunnels(self._fleet, command, who)

    async def _ask_admin(self, command: AnyCommand, who: str) -> msgspec.Struct:
        fields = await self._fleet.overseer.ask(command.name, msgspec.to_builtins(command), who)
        return msgspec.convert(fields, command.result)

    async def _report_usage(self, command: Usage, who: str) -> UsageResult:
        """Report usage. Without an admin process, how many tunnels are open is known all the same."""
        overseer = self._fleet.overseer
        if overseer.admin is None:
            result: msgspec.Struct = UsageResult(
                now=time.time(),
                problem="the admin process is being started" if overseer.is_needed else "",
                folder=self._find_state_folder(),
                tunnels=self._fleet.measure_minute().tunnels,
            )
        else:
            result = await self._ask_admin(command, who)
        assert isinstance(result, UsageResult)
        shortages = tuple(str(shortage) for shortage in self._fleet.resources.shortages.values())
        return msgspec.structs.replace(result, warnings=shortages)

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
