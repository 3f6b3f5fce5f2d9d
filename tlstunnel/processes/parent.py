"""The parent process: it holds the listening sockets, handles signals, and shuts down. It serves no connection itself.

An upgrade replaces its program in place (`tlstunnel.processes.rollout`): same process, same sockets, same children.

Tested by tests/promises/test_ending.py and test_systemd.py.
"""

import asyncio
import contextlib
import dataclasses
import os
import secrets
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec

from tlstunnel import __version__
from tlstunnel.commands.catalogue import parse_command
from tlstunnel.errors import ControlError
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.metrics.snapshot import Totals
from tlstunnel.origins.embedded import EchoOrigin
from tlstunnel.processes.admin_socket import AdminSocket
from tlstunnel.processes.children import Startup
from tlstunnel.processes.commands.dispatch import Commands
from tlstunnel.processes.control import ControlSocket, ControlSocketInUse, default_path
from tlstunnel.processes.fleet import Fleet, Options
from tlstunnel.processes.handover import Handover
from tlstunnel.processes.messages import Ask, Told
from tlstunnel.processes.notify import ServiceManager
from tlstunnel.processes.rollout import HANDLED_SIGNALS, Rollout
from tlstunnel.processes.slots import Slots

SIGINT_SECONDS = 5.0
"""The period over which SIGINT and `stop` end tunnels. It is short, because a user waits at a terminal."""


CONTROL_RETRY_SECONDS = 1.0
"""How often to try again to create the control socket, while another tunnel has it."""


class Parent:
    """Keeps children running that serve `startup`, until a signal or a command. Create it in the loop that runs it.

    `inherited` is what the previous program handed over, None unless this is an upgrade.
    """

    def __init__(
        self,
        startup: Startup,
        slots: Slots,
        options: Options,
        echo: EchoOrigin | None = None,
        inherited: Handover | None = None,
    ) -> None:
        """Raises ControlError if the control socket that the command line names cannot be created."""
        self._slots = slots
        self._options = options
        self._inherited = inherited
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self._stopped = asyncio.Event()
        self._service_manager = ServiceManager()
        self._background: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger()
        self._control_in_use = False
        self._control = self._make_control_socket()
        instance = inherited.instance if inherited is not None else ""
        log_key = inherited.log_key if inherited is not None else ""
        self._fleet = Fleet(
            dataclasses.replace(
                startup, instance=instance or secrets.token_hex(16), log_key=log_key or secrets.token_hex(32)
            ),
            slots,
            options,
            inherited.generation + 1 if inherited else 1,
            totals=Totals(inherited.metrics if inherited else None),
            usage=inherited.usage if inherited else None,
            observer_key=inherited.observer_key if inherited else "",
            throttles=inherited.throttles if inherited else (),
            carry_out=self._carry_out,
            admin_socket=AdminSocket(inherited.admin_socket if inherited else None),
        )
        self._rollout = Rollout(self._fleet, slots, self._control, echo, inherited, self._service_manager)
        self._commands = Commands(self._fleet, self._rollout, slots, self._signals.put_nowait, self._stopped)

    async def run(self) -> None:
        """Serve until a signal or a command ends it. Raises TlstunnelError if the start fails."""
        self._handle_signals()
        if self._inherited is not None:
            self._fleet.restore(self._inherited.children)
            # The watchdog does not stop during an upgrade, and starting many sites takes seconds.
            self._run_in_background(self._stay_alive())
        # They were blocked while the program was replaced, because there was no handler.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
        watching = asyncio.ensure_future(self._fleet.watch())
        ending = asyncio.ensure_future(self._drain_on_signal())
        begin = asyncio.ensure_future(self._begin())
        try:
            await asyncio.wait((begin, ending), return_when=asyncio.FIRST_COMPLETED)
            if begin.done() and not self._fleet.ending:
                begin.result()
            await ending
            begin.cancel()
        finally:
            ending.cancel()
            self._stopped.set()
            await self._fleet.stop()
            watching.cancel()
            await self._rollout.close()
            await self._cancel_background()
            if self._control is not None:
                await self._control.close()
            self._slots.close()
            self._fleet.overseer.socket.close()
            # The loop removes its handlers when it closes: another signal would then turn a success into a failure.
            signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
        self._log.info(Event.STOPPED)

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._run_in_background(self._reload()))
        loop.add_signal_handler(signal.SIGUSR2, lambda: self._run_in_background(self._upgrade()))

    def _make_control_socket(self) -> ControlSocket | None:
        """Create the control socket. If that fails, the tunnel starts without one, unless the command line names it."""
        if self._inherited is not None and self._inherited.control_socket is not None:
            return ControlSocket.restore(self._inherited.control_socket)
        try:
            return ControlSocket.bind(self._control_path)
        except ControlError as error:
            if self._options.control is not None:
                raise
            self._control_in_use = isinstance(error, ControlSocketInUse)
            hint = {"hint": "it is tried again until that one has ended; signals work"} if self._control_in_use else {}
            self._log.warning(Event.NO_CONTROL_SOCKET, reason=str(error), **hint)
            return None

    @property
    def _control_path(self) -> Path:
        return self._options.control or default_path(next(iter(self._slots)).listener.address.port)

    async def _wait_for_control_socket(self) -> None:
        """Create the control socket once the tunnel that has it, such as one that drains, has ended."""
        path = self._control_path
        while self._control is None:
            await asyncio.sleep(CONTROL_RETRY_SECONDS)
            try:
                self._control = ControlSocket.bind(path)
            except ControlSocketInUse:
                continue
            except ControlError as error:
                self._log.warning(Event.NO_CONTROL_SOCKET, reason=str(error))
                return
        self._rollout.control = self._control
        await self._control.serve(self._commands.make_handlers())
        self._log.info(Event.CONTROL_SOCKET, control=str(path))

    async def _begin(self) -> None:
        if self._control is not None:
            await self._control.serve(self._commands.make_handlers())
        elif self._control_in_use:
            self._run_in_background(self._wait_for_control_socket())
        self._fleet.overseer.open()
        await self._rollout.start()
        for address in dict.fromkeys(str(slot.listener.address) for slot in self._slots):
            self._log.info(Event.LISTENING, address=address)
        fleet = self._fleet
        where = {"control": str(self._control.path)} if self._control else {}
        self._log.info(Event.READY, version=__version__, processes=fleet.count(), generation=fleet.generation, **where)
        if os.geteuid() == 0 and self._inherited is None:
            self._log.warning(Event.RUNNING_AS_ROOT, hint="root is not needed: see docs/operations.md")
        self._rollout.notify_ready()
        if self._inherited is None:
            self._run_in_background(self._stay_alive())

    async def _reload(self) -> None:
        with contextlib.suppress(ControlError):  # already logged
            await self._rollout.reload()

    async def _upgrade(self) -> None:
        with contextlib.suppress(ControlError):  # already logged
            await self._rollout.upgrade(None)

    async def _stay_alive(self) -> None:
        while every := self._service_manager.watchdog_interval:
            self._service_manager.notify_alive()
            await asyncio.sleep(every)

    async def _carry_out(self, request: Ask) -> Told:
        """Carry out a command that came by HTTP. Raises ControlError."""
        command = parse_command(request.command, request.fields)
        return Told(fields=msgspec.to_builtins(await self._commands.carry_out(command, request.who, "HTTP")))

    # --- shutdown -----------------------------------------------------------------------------------------------------

    async def _drain_on_signal(self) -> None:
        """Drain at the first signal; return when that is done, or at the second signal."""
        number = await self._signals.get()
        self._fleet.ending = number.name
        self._log.info(Event.DRAIN_REQUESTED, signal=number.name)
        self._service_manager.notify_stopping()
        again = asyncio.ensure_future(self._signals.get())
        drained = asyncio.ensure_future(self._drain(number))
        await asyncio.wait((again, drained), return_when=asyncio.FIRST_COMPLETED)
        for task in (again, drained):
            task.cancel()

    async def _drain(self, number: signal.Signals) -> None:
        release = self._fleet.config.release
        wait, over = (0.0, SIGINT_SECONDS) if number == signal.SIGINT else (release.drain_wait, release.drain_over)
        if wait:
            await self._fleet.announce_drain()
            await asyncio.sleep(wait)
        # Before the children do: the last one to close a socket accepts what waits in its backlog.
        self._slots.close()
        await self._fleet.drain(float(over))

    async def _cancel_background(self) -> None:
        """Cancel a reload or an upgrade in progress; the probe of an upgrade ends with it."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
