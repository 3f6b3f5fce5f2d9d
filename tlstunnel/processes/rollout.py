"""Changes to what is running, as named steps: the first start, a reload, an upgrade. Only one runs at a time.

A step that can be undone registers how before the next one begins. A failure or a cancellation undoes the completed
steps in reverse order, so each change is made as a whole or not at all.

    reload     read, prepare, open | switch, commit
    upgrade    read, probe, quiesce, execute | (the next program:) restore, start, retire

Steps before the bar can be undone; those after it do not fail.

Tested by tests/promises/test_reload.py, test_upgrade.py and test_upgrade_between_versions.py.
"""

import asyncio
import contextlib
import dataclasses
import signal
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Literal

from tlstunnel import __version__
from tlstunnel.addresses import ListenAddress
from tlstunnel.config import Config, read
from tlstunnel.config.invocation import EVERYWHERE, LOOPBACK, addresses_to_listen_on
from tlstunnel.errors import ControlError, ProcessError, TlstunnelError
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.origins.embedded import EchoOrigin
from tlstunnel.processes import handover, previous
from tlstunnel.processes.children import REPLY_SECONDS, Child, try_child
from tlstunnel.processes.control import ControlSocket
from tlstunnel.processes.fleet import Fleet
from tlstunnel.processes.handover import Handover
from tlstunnel.processes.loads import Loads
from tlstunnel.processes.messages import Abandon, Commit, Prepare, Prepared
from tlstunnel.processes.notify import ServiceManager
from tlstunnel.processes.slots import Slot, Slots
from tlstunnel.serving.changes import describe_changes

PREPARE_SECONDS = 120.0
"""How long a child may take to load a new configuration. Ten thousand sites take 2 s."""

MAX_LOGGED = 50
"""How many changes of a reload are logged."""

POLL_SECONDS = 0.5
"""How often to check whether a new child accepts, if those of an upgrade could not be started at first."""

OPTIONAL = (LOOPBACK[1], EVERYWHERE[1])
"""Addresses that are left out on a machine without IPv6."""

HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)
"""Signals that are blocked while another program is executed. Releases of format 1 handle SIGCHLD too."""


@dataclass(frozen=True, slots=True)
class NewConfig:
    """A configuration that was read, and the addresses to listen on."""

    text: str | None
    config: Config
    addresses: tuple[ListenAddress, ...]


class Rollout:
    """Makes the changes. `inherited` is what the previous program handed over, None unless this is an upgrade.

    `control` is the control socket, None as long as there is none.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - everything that a change affects
        self,
        fleet: Fleet,
        slots: Slots,
        control: ControlSocket | None,
        echo: EchoOrigin | None,
        inherited: Handover | None,
        service_manager: ServiceManager,
    ) -> None:
        self._fleet = fleet
        self._slots = slots
        self.control = control
        self._echo = echo
        self._inherited = inherited
        self._service_manager = service_manager
        self.loads = Loads(inherited.loads if inherited is not None else ())
        self._change_lock = asyncio.Lock()
        self._retiring: asyncio.Task[None] | None = None
        self._responded = False
        self._started = asyncio.Event()
        self._log = structlog.get_logger()

    # --- the start ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the children, and retire those of the previous program.

        Raises ProcessError if this is the first start and it fails.
        """
        try:
            await self._start()
        finally:
            self._started.set()
        self._fleet.mark_started()

    async def _start(self) -> None:
        async with self._change_lock:
            old = self._fleet.serving()
            starts = self._fleet.start()
            try:
                await asyncio.gather(*starts)
            except TlstunnelError as error:
                if self._inherited is None:
                    raise
                # The old children continue to serve; the start of each new one is retried.
                self._log.error(Event.UPGRADE_PROCESSES_FAILED, reason=str(error))
                reason = f"the new processes fail to start, so the old ones continue to serve: {error}"
                self._respond({"ok": False, "error": reason})
                await asyncio.wait(starts)
                self._retiring = asyncio.ensure_future(self._retire_when_possible(old))
            else:
                await self._retire(old)
            if self._inherited is None:
                self._note_load("start")

    async def close(self) -> None:
        """Cancel what is in progress."""
        if self._retiring is not None:
            self._retiring.cancel()
            await asyncio.gather(self._retiring, return_exceptions=True)

    async def _retire(self, old: Iterable[Child]) -> None:
        """Have the new children accept, and drain the old ones."""
        await self._fleet.assign()
        for child in old:
            if not child.draining:
                await self._fleet.retire(child)
        if self._inherited is not None:
            result = {"version": __version__, "before": self._inherited.version, "generation": self._fleet.generation}
            self._log.info(Event.UPGRADED, **result)
            self._note_load("upgrade", self._inherited.who, [f"{self._inherited.version} -> {__version__}"])
            self._respond({"ok": True, **result})

    async def _retire_when_possible(self, old: Iterable[Child]) -> None:
        while not self._fleet.accepting():  # noqa: ASYNC110 - rare, and nothing waits for it
            await asyncio.sleep(POLL_SECONDS)
        await self._retire(old)

    def _respond(self, response: Mapping[str, Any]) -> None:
        """Respond, once, to the client that asked the previous program for the upgrade."""
        if self._inherited is not None and not self._responded:
            self._responded = True
            self._inherited.respond(response)

    def notify_ready(self) -> None:
        """Notify the service manager that a start or a change is complete."""
        count = self._fleet.count()
        processes = f"{count} process{'es' if count > 1 else ''}"
        self._service_manager.notify_ready(f"{__version__}, generation {self._fleet.generation}, {processes}")

    # --- a reload -----------------------------------------------------------------------------------------------------

    async def reload(self, who: str = "") -> list[str]:
        """Read everything again, in every child, and switch to it, for `who`; return a line for each change.

        Raises ControlError if that fails; nothing was changed then.
        """
        self._fleet.reopen_logs()  # also if nothing else can be loaded
        try:
            changes = await self._reload(who)
        except ControlError:
            self._fleet.note_reload(succeeded=False)
            raise
        self._fleet.note_reload(succeeded=True)
        return changes

    async def _reload(self, who: str) -> list[str]:
        await self._started.wait()
        async with self._change_lock, self._report_change(Event.NOT_RELOADED, who):
            self._refuse_if_ending()
            new = await self._read()
            async with AsyncExitStack() as undo:
                children, changes = await self._prepare(new, self._fleet.accepting(), undo)
                self._refuse_if_ending()
                opened = self._open(new, undo)
                undo.pop_all()
            before = self._fleet.config
            added = self._switch(new, opened, children)
            await self._commit(children, added)
            await self._fleet.overseer.reconfigure(new.text, before)
            self._note_load("reload", who, changes)
            self._log.info(Event.RELOADED, changes=changes[:MAX_LOGGED], more=max(len(changes) - MAX_LOGGED, 0))
            for slot in added:
                self._log.info(Event.LISTENING, address=str(slot.listener.address))
            return changes

    async def _read(self) -> NewConfig:
        """Read the file. Raises ConfigurationError."""
        invocation = self._fleet.startup.invocation
        text = self._read_text()
        config = await asyncio.to_thread(invocation.configuration, text)
        return NewConfig(text, config, addresses_to_listen_on(invocation, config, self._slots.passed))

    def _read_text(self) -> str | None:
        invocation = self._fleet.startup.invocation
        return read(invocation.folder / invocation.file) if invocation.file is not None else None

    async def _prepare(
        self, new: NewConfig, children: Sequence[Child], undo: AsyncExitStack
    ) -> tuple[list[Child], list[str]]:
        """Have every child load the new configuration, while it serves the old one.

        Return the children that have, and what changes. Raises ProcessError.
        """
        undo.push_async_callback(self._abandon, children)
        request = Prepare(config=new.text)
        replies = await asyncio.gather(
            *(child.request(request, PREPARE_SECONDS) for child in children), return_exceptions=True
        )
        prepared = {}
        for child, reply in zip(children, replies, strict=True):
            if isinstance(reply, Prepared):
                prepared[child] = reply.changes
            # A child that has exited meanwhile is restarted with the new configuration; one that is silent is replaced.
            elif isinstance(reply, BaseException) and not (child.exited or child.link.closed or child.silent):
                raise reply
        if prepared:
            return list(prepared), next(iter(prepared.values()))
        # None that serves can check it, for example because each of them is being restarted.
        await self._try(new)
        return [], describe_changes(self._fleet.config, new.config)

    async def _try(self, new: NewConfig) -> None:
        """Have a child of its own load the new configuration. Raises ProcessError."""
        startup = dataclasses.replace(self._fleet.startup, text=new.text, config=new.config)
        try:
            async with asyncio.timeout(PREPARE_SECONDS):
                await try_child(startup)
        except TimeoutError:
            raise ProcessError(f"no process was ready within {PREPARE_SECONDS:g} s") from None

    async def _abandon(self, children: Iterable[Child]) -> None:
        await asyncio.gather(*(child.try_request(Abandon()) for child in children))

    def _open(self, new: NewConfig, undo: AsyncExitStack) -> dict[ListenAddress, list[Slot]]:
        """Open the new listeners. Raises ListenError."""
        opened = self._slots.open(new.addresses, 1, OPTIONAL)
        undo.callback(self._slots.forget, opened)
        return opened

    def _switch(
        self, new: NewConfig, opened: Mapping[ListenAddress, list[Slot]], children: Collection[Child]
    ) -> list[Slot]:
        """Make the new configuration the one that is served; return the new listeners."""
        gone = self._slots.update(opened, new.addresses)
        self._fleet.replace_startup(new.text, new.config, children)
        for slot in gone:
            slot.listener.remove()
        return [slot for slots in opened.values() for slot in slots]

    async def _commit(self, children: Iterable[Child], added: list[Slot]) -> None:
        """Have the children serve the new configuration, and adjust their number to it."""
        for child in children:
            try:
                await child.send_listeners(added)
                await child.request(Commit())
            except ProcessError:
                child.outdated = True
        await self._fleet.resize()
        await self._fleet.assign()

    # --- an upgrade ---------------------------------------------------------------------------------------------------

    async def upgrade(self, client: int | None, who: str = "") -> None:
        """Replace this program by the new release, for `who`, and do not return; that release responds to `client`.

        Raises ControlError if that fails; nothing was changed then.
        """
        if self._change_lock.locked() or not self._started.is_set():
            raise ControlError("nothing was changed: a reload or an upgrade is in progress; try again when it is done")
        async with self._change_lock, self._report_change(Event.NOT_UPGRADED, who):
            self._refuse_if_ending()
            text = self._read_text()
            seconds = float(self._fleet.config.release.upgrade_timeout)
            format_ = await handover.probe(self._handover(client, text, who), seconds)
            self._refuse_if_ending()
            async with AsyncExitStack() as undo:
                await self._quiesce(undo)
                await self._fleet.overseer.dismiss()  # another one continues from the disk
                if format_ == previous.FORMAT:
                    await self._fleet.end_ledger()
                    self._fleet.overseer.socket.close()  # that release would leave clients waiting in its backlog
                    undo.callback(self._fleet.overseer.open)
                handover.execute(self._handover(client, text, who), format_, HANDLED_SIGNALS)

    async def _quiesce(self, undo: AsyncExitStack) -> None:
        """Wait until no child is being started and no message is half sent. Raises ProcessError."""
        await self._fleet.quiesce(REPLY_SECONDS)
        undo.callback(self._fleet.resume_starts)
        await self._fleet.pause_starts()

    def _handover(self, client: int | None, text: str | None, who: str) -> Handover:
        return Handover(
            version=__version__,
            generation=self._fleet.generation,
            slots=self._slots.hand_over(),
            children=self._fleet.hand_over(),
            control_socket=self.control.hand_over() if self.control else None,
            echo=self._echo.hand_over() if self._echo else None,
            client=client,
            config=text,
            metrics=self._fleet.hand_over_metrics(),
            usage=self._fleet.usage.hand_over(),
            observer_key=self._fleet.overseer.key,
            throttles=self._fleet.overseer.rules,
            instance=self._fleet.startup.instance,
            loads=self.loads.hand_over(),
            who=who,
            log_key=self._fleet.startup.log_key,
            admin_socket=self._fleet.overseer.socket.hand_over(),
        )

    # --- both ---------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _report_change(self, event: Event, who: str) -> AsyncIterator[None]:
        """Report a change to the service manager, and log its failure. Raises ControlError."""
        self._service_manager.notify_reloading()
        try:
            yield
        except TlstunnelError as error:
            problems = error.problems
            if not isinstance(error, ControlError):
                first, *more = problems
                problems = (f"nothing was changed: {first}", *more)
            self._log.warning(event, reason="; ".join(problems))
            self._note_load("reload" if event == Event.NOT_RELOADED else "upgrade", who, problems=problems)
            raise ControlError(*problems) from None
        finally:
            self.notify_ready()

    def _note_load(
        self,
        what: Literal["start", "reload", "upgrade"],
        who: str = "",
        changes: Sequence[str] = (),
        problems: Sequence[str] = (),
    ) -> None:
        invocation = self._fleet.startup.invocation
        file = str(invocation.folder / invocation.file) if invocation.file is not None else ""
        self.loads.note(what, self._fleet.generation, file=file, who=who, changes=changes, problems=problems)

    def _refuse_if_ending(self) -> None:
        if self._fleet.ending:
            raise ControlError(f"nothing was changed: the tunnel is shutting down ({self._fleet.ending})")
