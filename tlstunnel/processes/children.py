"""The children as the parent sees them: started, begun, known."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlstunnel.config import Config
from tlstunnel.config.invocation import Invocation
from tlstunnel.errors import ProcessError
from tlstunnel.processes.link import FORMAT, MOST_FDS, Link
from tlstunnel.processes.slots import Slot
from tlstunnel.processes.spawn import spawned

TOLD_SECONDS = 5.0
"""How long anybody waits for a child that is told something: 1 ms is usual, and one that hangs must not hold others."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a child begins with: `text` is the file's, of which `config` was made."""

    wanted: Invocation
    text: str | None
    config: Config
    log_format: str


class Child:
    """A child as the parent knows it. `ended` gets its wait status, None if somebody else has waited for it."""

    def __init__(self, pid: int, place: int, generation: int, sock: socket.socket) -> None:
        self.pid = pid
        self.place = place
        self.generation = generation
        self.version = ""
        self.started = time.time()
        self.ready = False
        self.finishing = False
        self.ended: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self.leaving = asyncio.Event()
        self.link = Link(sock, {"leaving": self._leaves}, lambda: None)

    def kept(self) -> dict[str, Any]:
        """What `restored` takes in the program that is executed next."""
        facts = {name: getattr(self, name) for name in ("pid", "place", "generation", "version", "started")}
        return {**facts, "finishing": self.finishing, "link": self.link.sock.fileno()}

    @classmethod
    def restored(cls, kept: Mapping[str, Any]) -> "Child":
        """A child that the program executed before has started."""
        os.set_inheritable(kept["link"], False)
        child = cls(kept["pid"], kept["place"], kept["generation"], socket.socket(fileno=kept["link"]))
        child.version, child.started, child.finishing = kept["version"], kept["started"], kept["finishing"]
        child.ready = True
        return child

    async def tell(self, do: str, **more: Any) -> None:
        """Ask for what needs no answer, and wait for it a moment; one that has ended is told nothing."""
        with contextlib.suppress(ProcessError):
            await self.ask(do, TOLD_SECONDS, **more)

    async def ask(self, do: str, seconds: float, **more: Any) -> dict[str, Any]:
        """Ask, and wait for so long. Raises ProcessError: it refuses, has ended, or does not answer."""
        try:
            async with asyncio.timeout(seconds):
                return await self.link.ask(do, **more)
        except TimeoutError:
            raise ProcessError(f"process {self.pid} has not answered within {seconds:g} s") from None

    async def _leaves(self, _: Mapping[str, Any], __: list[int]) -> Mapping[str, Any]:
        """It was told by somebody else to end."""
        self.finishing = True
        self.leaving.set()
        return {}

    async def wait_until_missing(self) -> None:
        """Wait until it has ended, or is about to."""
        leaving = asyncio.ensure_future(self.leaving.wait())
        try:
            await asyncio.wait((leaving, self.ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()

    async def wait(self) -> int | None:
        """Wait for its end; give what `ended` gets, which is not cancelled with whoever waits."""
        return await asyncio.shield(self.ended)

    def kill(self) -> None:
        """End it, whatever it does."""
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    async def begin(self, beginning: Beginning) -> None:
        """Wait until it could accept. Raises ProcessError."""
        self.version = await _begun(
            self.link, beginning, f"tlstunnel {self.place} g{self.generation}", quiet=self.place != 1
        )

    async def hand(self, slots: list[Slot]) -> None:
        """Give it these sockets, to accept at when it is told. Raises ProcessError."""
        for start in range(0, len(slots), MOST_FDS):
            part = slots[start : start + MOST_FDS]
            await self.link.ask(
                "listeners",
                [slot.listener.sock.fileno() for slot in part],
                numbers=[slot.number for slot in part],
                written=[str(slot.listener.written) for slot in part],
            )


async def try_child(beginning: Beginning) -> None:
    """Bring one child to where it could accept, and end it. Raises ProcessError."""
    pid, sock = spawned(group=False)
    link = Link(sock, {}, lambda: None)
    try:
        await _begun(link, beginning, "tlstunnel probe", quiet=True)
        await link.ask("stop")
    finally:
        link.close()
        await asyncio.to_thread(os.waitpid, pid, 0)


async def _begun(link: Link, beginning: Beginning, name: str, *, quiet: bool) -> str:
    begun = await link.ask(
        "begin",
        format=FORMAT,
        name=name,
        wanted=beginning.wanted.as_json(),
        config=beginning.text,
        log_format=beginning.log_format,
        opened=beginning.config.log.opened,
        quiet=quiet,
    )
    return str(begun["version"])


def described(status: int | None) -> str:
    """How it ended, by its wait status."""
    if status is None:
        return "somebody else has waited for it"
    code = os.waitstatus_to_exitcode(status)
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"it exited with {code}"


def pss(pid: int) -> int | None:
    """The share of memory that a process has, KiB: shared pages count by the number of those that share them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), None)
