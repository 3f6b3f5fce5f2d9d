"""A child process as the parent sees it: starts it, sends it requests, hands it over, kills it.

Tested by tests/promises/test_processes.py.
"""

import asyncio
import contextlib
import functools
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import msgspec

from tlstunnel.config import Config
from tlstunnel.config.invocation import Invocation
from tlstunnel.errors import ProcessError
from tlstunnel.journal.style import Style
from tlstunnel.metrics.snapshot import Snapshot
from tlstunnel.processes.link import MAX_FDS, Link
from tlstunnel.processes.messages import (
    FORMAT,
    Ask,
    Begin,
    Begun,
    Done,
    Drain,
    Leaving,
    Listeners,
    Load,
    Notification,
    ReplyT,
    Request,
    Status,
    Stop,
    Told,
)
from tlstunnel.processes.pulse import Pulse
from tlstunnel.processes.slots import Slot
from tlstunnel.processes.spawn import ADMIN, LEDGER, SERVING, spawn
from tlstunnel.supervisor import ChildProcess

REPLY_SECONDS = 5.0
"""How long the parent waits for a reply. 1 ms is usual; a child that hangs must not hold up the others."""

ChildNotifications = Mapping[type[Notification], Callable[["Child", Any], None]]
"""Handlers of the notifications that children send, by type."""


CarryOut = Callable[[Ask], Awaitable[Told]]
"""Carries out a command that the admin process passes on. Raises ControlError."""


class NotResponding(ProcessError):
    """A child did not reply in time."""


class Role(Enum):
    """What a child does. An upgrade hands over the value."""

    SERVING = "serving"
    LEDGER = "ledger"
    ADMIN = "admin"


MODULES: Mapping[Role, str] = {Role.SERVING: SERVING, Role.LEDGER: LEDGER, Role.ADMIN: ADMIN}
"""The module that the children of each role run."""


@dataclass(frozen=True, slots=True)
class Startup:
    """What children are started with. `text` is that of the configuration file, `config` what was parsed from it.

    `instance` and `log_key` are in `Begin`.
    """

    invocation: Invocation
    text: str | None
    config: Config
    log_format: Literal["text", "json"]
    instance: str = ""
    log_key: str = ""

    @property
    def style(self) -> Style:
        """How the addresses of clients are written."""
        return Style(self.config.log.selected, self.config.log.address, bytes.fromhex(self.log_key))

    def to_begin(self, name: str, *, quiet: bool) -> Begin:
        """Return the first request to a child, which is named `name`."""
        log = self.config.log
        return Begin(
            format=FORMAT,
            name=name,
            invocation=self.invocation.as_json(),
            config=self.text,
            log_format=self.log_format,
            opened=log.opened,
            quiet=quiet,
            instance=self.instance,
            log_file=str(log.file) if log.file is not None else "",
            log_fields=list(log.selected),
            log_address=log.address,
            log_key=self.log_key,
        )


class Identity(msgspec.Struct):
    """What identifies a child, from its start on.

    `place` counts the children of a role from 1. `generation` is that of the parent's program that started it. `format`
    is the format of its messages, `started` is in seconds since the epoch.
    """

    role: Role
    place: int
    generation: int
    version: str = ""
    format: int = FORMAT
    started: float = msgspec.field(default_factory=time.time)


class ChildHandover(msgspec.Struct, frozen=True):
    """A child as an upgrade hands it over. `metrics` are the last ones that it sent.

    `link`, `pulse` and `stacks` are descriptors; the last two are None if it is not watched.
    """

    identity: Identity
    pid: int
    draining: bool
    link: int
    metrics: Snapshot | None = None
    pulse: int | None = None
    stacks: int | None = None


class Child:
    """A child and the link to it.

    `ready`: it has loaded its configuration and can accept. `draining`: it accepts no more, and exits after its last
    tunnel. `leaving` is set when another one must take its place. `silent`: it does not respond, so requests to it are
    sent, but fail at once. `outdated`: it was silent during a reload. `problem` is why it is being killed. `carry_out`
    is for the commands that the admin process passes on.
    """

    def __init__(
        self,
        pid: int,
        identity: Identity,
        sock: socket.socket,
        notifications: ChildNotifications,
        carry_out: CarryOut | None = None,
    ) -> None:
        """Raises OSError if there are no descriptors left."""
        self.process = ChildProcess(pid)
        self.identity = identity
        self.ready = False
        self.draining = False
        self.silent = False
        self.outdated = False
        self.problem = ""
        self.pulse: Pulse | None = None
        self.leaving = asyncio.Event()
        self._carry_out = carry_out
        self.link = Link(
            sock,
            {Leaving: self._handle_leaving, Ask: self._handle_command},
            lambda: None,
            {type_: functools.partial(take, self) for type_, take in notifications.items()},
        )
        # Its last metrics may not have been read yet.
        self.process.exited.add_done_callback(lambda _: self.link.read_rest())

    @classmethod
    def start(
        cls,
        role: Role,
        place: int,
        generation: int,
        notifications: ChildNotifications,
        carry_out: CarryOut | None = None,
    ) -> "Child":
        """Start a child in a process group of its own, so that Ctrl-C in a terminal reaches only the parent.

        Raises OSError if the system is out of processes, memory or descriptors.
        """
        pid, sock = spawn(MODULES[role], group=True)
        try:
            return cls(pid, Identity(role, place, generation), sock, notifications, carry_out)
        except OSError:
            sock.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def hand_over(self) -> "ChildHandover":
        """Return what `restore` takes in the next program."""
        pulse = self.pulse
        return ChildHandover(
            self.identity,
            self.pid,
            self.draining,
            self.link.sock.fileno(),
            pulse=pulse.sock.fileno() if pulse is not None else None,
            stacks=pulse.stacks if pulse is not None else None,
        )

    @classmethod
    def restore(
        cls, kept: "ChildHandover", notifications: ChildNotifications, carry_out: CarryOut | None = None
    ) -> "Child":
        """Return a child that the previous program has started."""
        os.set_inheritable(kept.link, False)
        child = cls(kept.pid, kept.identity, socket.socket(fileno=kept.link), notifications, carry_out)
        child.draining = kept.draining
        child.ready = True
        return child

    @property
    def pid(self) -> int:
        """The process ID."""
        return self.process.pid

    @property
    def exited(self) -> bool:
        """Whether its process has exited."""
        return self.process.exited.done()

    def describe(self) -> dict[str, str | int]:
        """Return what identifies it in the log."""
        role = {"role": self.identity.role.value} if self.identity.role is not Role.SERVING else {}
        return {"process": self.pid, "place": self.identity.place, **role}

    async def request(
        self, request: Request[ReplyT], seconds: float = REPLY_SECONDS, descriptors: Sequence[int] = ()
    ) -> ReplyT:
        """Send a request and return the reply.

        Raises ProcessError if the child refuses it, exits, is silent, or does not reply within `seconds`.
        """
        try:
            async with asyncio.timeout(0.0 if self.silent else seconds):
                return await self.link.request(request, descriptors)
        except TimeoutError:
            within = "" if self.silent else f" within {seconds:g} s"
            raise NotResponding(f"process {self.pid} did not respond{within}") from None

    async def try_request(self, request: Request[Done]) -> None:
        """Send a request and wait for its reply; a failure is ignored."""
        with contextlib.suppress(ProcessError):
            await self.request(request)

    async def begin(self, startup: Startup) -> None:
        """Have it load the configuration, and wait until it is ready to accept. Raises ProcessError."""
        identity = self.identity
        what = identity.place if identity.role is Role.SERVING else identity.role.value
        request = startup.to_begin(f"tlstunnel {what} g{identity.generation}", quiet=identity.place != 1)
        identity.version = (await self.link.request(request)).version

    async def send_listeners(self, slots: list[Slot]) -> None:
        """Send it these sockets. It accepts at them once `Serve` names them. Raises ProcessError."""
        for start in range(0, len(slots), MAX_FDS):
            part = slots[start : start + MAX_FDS]
            await self.link.request(
                Listeners(
                    numbers=[slot.number for slot in part],
                    written=[str(slot.listener.written) for slot in part],
                ),
                [slot.listener.sock.fileno() for slot in part],
            )

    def mark_silent(self) -> None:
        """Fail the requests that wait for its replies, and those that follow."""
        self.silent = True
        self.link.fail_requests(NotResponding(f"process {self.pid} does not respond"))

    async def drain(self, after: float | None, over: float | None) -> None:
        """Have it accept no more, and exit after its last tunnel: see `Drain`."""
        self.draining = True
        await self.try_request(Drain(after=after, over=over))

    async def stop(self) -> None:
        """Have it close everything at once, with a record of each connection."""
        await self.try_request(Stop())

    async def request_load(self, *, scraped: bool = False) -> Load:
        """Return its load. With `scraped`, it measures the lag of its loop for a while. Raises ProcessError."""
        return await self.request(Status(scraped=scraped))

    async def wait_until_leaving(self) -> None:
        """Wait until it has exited, or another one must take its place."""
        leaving = asyncio.ensure_future(self.leaving.wait())
        try:
            await asyncio.wait((leaving, self.process.exited), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()

    def kill(self) -> None:
        """Kill it, whatever state it is in."""
        self.process.kill()

    async def _handle_command(self, request: Ask, _: list[int]) -> Told:
        if self.identity.role is not Role.ADMIN or self._carry_out is None:
            raise ProcessError("only the admin process passes commands on")
        return await self._carry_out(request)

    async def _handle_leaving(self, _: Leaving, __: list[int]) -> Done:
        self.draining = True
        self.leaving.set()
        return Done()


async def try_child(startup: Startup) -> None:
    """Start a child, wait until it is ready to accept, and stop it. Raises ProcessError."""
    pid, sock = spawn(SERVING, group=False)
    process = ChildProcess(pid)
    link = Link(sock, {}, lambda: None)
    try:
        begun: Begun = await link.request(startup.to_begin("tlstunnel probe", quiet=True))
        assert begun.version
        await link.request(Stop())
        await process.wait()  # before the link is closed, or the child would report that its parent has exited
    except BaseException:
        process.kill()
        raise
    finally:
        link.close()
        await process.wait()


def measure_pss(pid: int) -> int | None:
    """Return the proportional set size of a process in KiB: a shared page is divided by the number of its users."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), None)
