"""The admin process: assesses sites, sends notices, keeps throttles, and serves the admin address.

It serves no tunnels.

Its state is on the disk. So it is not handed over at an upgrade or after a crash: another one continues. If there is
none, everything is served as before, and throttles that hold end in time.

Tested by tests/promises/test_plans.py.
"""

import asyncio
import gc
import os
import socket
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tlstunnel import __version__
from tlstunnel.commands.catalogue import parse_command
from tlstunnel.commands.command import AnyCommand
from tlstunnel.config import Config
from tlstunnel.config.invocation import Invocation
from tlstunnel.config.together import shares_notices
from tlstunnel.errors import ControlError, ProcessError, StateError, TlstunnelError
from tlstunnel.journal.events import Event
from tlstunnel.journal.style import PLAIN, Style
from tlstunnel.plans.channels import load_channels
from tlstunnel.plans.duty import Duty
from tlstunnel.plans.elsewhere import Sightings
from tlstunnel.plans.standing import MachineLoad
from tlstunnel.processes import messages
from tlstunnel.processes.administration import Administration
from tlstunnel.processes.processor import Processor
from tlstunnel.processes.role import RoleProcess, run_role
from tlstunnel.program import import_when_needed
from tlstunnel.state.folder import find_state_folder
from tlstunnel.state.throttles import ThrottleRule

if TYPE_CHECKING:
    from tlstunnel.admin.service import AdminService


class AdminProcess(RoleProcess):
    """Runs an `Administration` as the parent's requests say."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(
            sock,
            {
                messages.Begin: self._begin,
                messages.Administer: self._administer,
                messages.Adopt: self._adopt,
                messages.Ask: self._answer,
                messages.ServeAdmin: self._serve,
                messages.Stop: self._stop,
            },
            {
                messages.Seen: self._take_seen,
                messages.MinuteOver: self._handle_minute,
                messages.Elected: self._learn_duty,
                messages.Recorded: self._take_records,
                messages.SeenElsewhere: self._take_elsewhere,
            },
        )
        self._invocation: Invocation | None = None
        self._config: Config | None = None
        self._administration: Administration | None = None
        self._key = b""
        self._problem = ""
        self._style = PLAIN
        self._folder: Path | None = None
        self._service: AdminService | None = None
        self._processor = Processor()
        self._minute: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Administer until the parent stops it, or exits."""
        await self._wait_for_exit()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self._service is not None:
            await self._service.close()
        if self._administration is not None:
            await self._administration.close()
        self._close_link()

    @property
    def _begun(self) -> Administration:
        if self._administration is None:
            raise ProcessError(self._problem or "this process has not received Administer")
        return self._administration

    async def _begin(self, request: messages.Begin, _: list[int]) -> messages.Begun:
        self._invocation = self._introduce(request)
        self._config = self._invocation.configuration(request.config)
        self._style = Style(request.log_fields, request.log_address, bytes.fromhex(request.log_key))
        return messages.Begun(version=__version__)

    async def _administer(self, request: messages.Administer, _: list[int]) -> messages.Done:
        if self._invocation is None or self._config is None or self._administration is not None:
            raise ProcessError("this process has not received Begin, or has begun already")
        self._key = request.key
        try:
            await self._start_administration(self._config)
        except StateError as error:
            if self._config.admin is None:
                raise
            # The dashboard is there all the same, and what it shows of the history is missing.
            self._problem = str(error)
            self._log.warning(Event.NOT_ASSESSED, reason=self._problem)
        # What was imported stays, so the garbage collector need not look at it again.
        gc.collect()
        gc.freeze()
        return messages.Done()

    async def _start_administration(self, config: Config) -> None:
        """Begin to administer. Raises StateError if there is no folder for the state."""
        self._folder = await asyncio.to_thread(find_state_folder, self._find_folder(config), os.environ)
        self._administration = Administration(
            self._folder,
            config,
            load_channels(config),
            self._key,
            self._report_throttles,
            duty=Duty(self._report_delivered, alone=not shares_notices(config)),
            on_sightings=self._report_sightings,
            show=self._style.show_network,
        )
        self._run_in_background(self._administration.start())

    def _find_folder(self, config: Config) -> Path | None:
        assert self._invocation is not None
        return self._invocation.folder / config.state.dir if config.state.dir is not None else None

    async def _adopt(self, request: messages.Adopt, _: list[int]) -> messages.Done:
        assert self._invocation is not None
        try:
            config = self._config = await asyncio.to_thread(self._invocation.configuration, request.config)
            if self._administration is not None:
                await self._administration.configure(config, load_channels(config))
            if self._service is not None and config.admin is not None:
                await self._service.configure(config.admin)
        except TlstunnelError as error:
            self._log.warning(Event.NOT_CONFIGURED, reason=str(error))
        return messages.Done()

    async def _answer(self, request: messages.Ask, _: list[int]) -> messages.Told:
        command = parse_command(request.command, request.fields)
        result = await self._begun.carry_out(command, request.who, request.tunnels)
        return messages.Told(fields=msgspec.to_builtins(result))

    async def _serve(self, _: messages.ServeAdmin, descriptors: list[int]) -> messages.Done:
        sock = socket.socket(fileno=descriptors[0]) if descriptors else None
        admin = self._config.admin if self._config is not None else None
        if self._service is None and sock is not None and admin is not None:
            # Imported here, because it needs libraries that an admin process for plans alone does without.
            module = import_when_needed("tlstunnel.admin.service", "the dashboard and the API")
            service: AdminService = module.AdminService(self._ask, self._folder, self._style.show)
            self._service = service
            await service.configure(admin)
            gc.collect()
            gc.freeze()
        if self._service is not None:
            self._service.listen(sock)
        elif sock is not None:
            sock.close()
        return messages.Done()

    async def _ask(self, command: AnyCommand, who: str) -> Mapping[str, Any]:
        """Have the parent carry out a command. Raises ControlError."""
        request = messages.Ask(command=command.name, fields=msgspec.to_builtins(command), who=who)
        try:
            return (await self._link.request(request)).fields
        except ProcessError as error:
            raise ControlError(*error.problems) from None

    def _take_records(self, recorded: messages.Recorded) -> None:
        if self._service is not None:
            self._service.take_records(recorded.records, recorded.left_out)

    def _take_seen(self, seen: messages.Seen) -> None:
        if self._administration is not None:
            self._run_in_background(self._administration.take(seen.sites))

    def _take_elsewhere(self, seen: messages.SeenElsewhere) -> None:
        if self._administration is not None:
            self._run_in_background(self._administration.take_elsewhere(seen.sites))

    def _report_sightings(self, sightings: Sightings) -> None:
        self._link.notify(messages.SeenHere(sites=sightings))

    def _handle_minute(self, minute: messages.MinuteOver) -> None:
        if self._service is not None:
            self._run_in_background(self._service.refresh())
        if self._administration is None or (self._minute is not None and not self._minute.done()):
            return  # the last one is not done yet; the next one makes up for it
        load = MachineLoad(self._processor.measure(), minute.descriptors, minute.memory)
        self._minute = self._run_in_background(self._administration.handle_minute(minute.tunnels, load))

    def _report_throttles(self, rules: Sequence[ThrottleRule]) -> None:
        self._link.notify(messages.Throttled(rules=list(rules)))

    def _learn_duty(self, news: messages.Elected) -> None:
        if self._administration is not None:
            self._run_in_background(self._administration.learn_duty(news.until, news.delivered))

    def _report_delivered(self, deliveries: list[str]) -> None:
        self._link.notify(messages.Delivered(deliveries=deliveries))

    def _handle_sigterm(self) -> None:
        self._run_in_background(self._leave())

    async def _leave(self) -> None:
        await self._report_leaving()
        self._exit.set()

    def _handle_parent_exit(self) -> None:
        self._exit.set()

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._finish)
        return task

    def _finish(self, task: "asyncio.Task[None]") -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error(Event.REQUEST_FAILED, request="minute", exc_info=error)


def main() -> None:
    """Run as a child of the process that holds the other end of ``--link``."""
    run_role("admin", AdminProcess)


if __name__ == "__main__":
    main()
