"""Polls the children, and acts if one does not respond: reports it, and in the end dumps its stacks and kills it.

Tested by tests/promises/test_processes.py.
"""

import asyncio
import contextlib
import functools
import os
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from tlstunnel.errors import ProcessError
from tlstunnel.escaping import printable
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.processes.children import Child, Role
from tlstunnel.processes.messages import Respond
from tlstunnel.processes.pulse import MAX_STACKS, STACKS_SIGNAL, Pulse
from tlstunnel.processes.watch import Finding, Watch, WatchTimes

STACKS_SECONDS = 2.0
"""How long a hung child may take to write its stacks; it takes milliseconds, unless the kernel holds the process."""

MAX_THREADS = 16
"""How many threads' stacks are logged, the one that received the signal first."""

MAX_FRAMES = 20
"""How many frames of a stack are logged, the innermost first."""

_STATES = {"R": "running", "S": "sleeping", "D": "waiting for the kernel", "T": "stopped", "t": "stopped by a debugger"}
"""States of a process (proc_pid_stat(5))."""

_STOPPED = frozenset({_STATES["T"], _STATES["t"]})


class Guard:
    """Watches children. `on_change` is called when one falls silent or responds again; see `Child.silent`.

    `run_in_background` keeps a task until it is done.
    """

    def __init__(
        self,
        times: WatchTimes,
        on_change: Callable[[Child], None],
        run_in_background: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._times = times
        self._on_change = on_change
        self._run_in_background = run_in_background
        self._loop = asyncio.get_running_loop()
        self._watch: Watch[Child] = Watch(times, self._loop.time())
        self._watched: set[Child] = set()
        self._log = structlog.get_logger()

    async def watch(self, child: Child) -> None:
        """Watch a child from now on, if its release supports it. Raises ProcessError if there are no descriptors."""
        try:
            pulse, theirs = Pulse.create(functools.partial(self._note_response, child))
        except OSError as error:
            raise ProcessError(f"a process cannot be watched: {error.strerror}") from None
        try:
            with theirs:
                request = Respond(loop_seconds=self._times.loop)
                # Without a time limit, which a pause of all processes would exceed: the child would never be watched.
                await child.link.request(request, [theirs.fileno(), pulse.stacks])
        except ProcessError:  # an earlier release with this format refuses it; or the child has exited
            pulse.close()
        else:
            self._add(child, pulse)

    def restore(self, child: Child, sock: int, stacks: int) -> None:
        """Watch a child that the previous program has watched, with these descriptors."""
        for fd in (sock, stacks):
            os.set_inheritable(fd, False)
        self._add(child, Pulse(socket.socket(fileno=sock), stacks, functools.partial(self._note_response, child)))

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            for child in self._watched:
                if child.pulse is not None:
                    child.pulse.poll()
            await asyncio.sleep(self._times.every)
            for child, finding, seconds in self._watch.check(self._loop.time()):
                self._act(child, finding, seconds)

    def _add(self, child: Child, pulse: Pulse) -> None:
        child.pulse = pulse
        self._watched.add(child)
        self._watch.add(child, self._loop.time())
        child.process.exited.add_done_callback(lambda _: self._discard(child))

    def _discard(self, child: Child) -> None:
        self._watched.discard(child)
        self._watch.discard(child)
        if child.pulse is not None:
            child.pulse.close()

    def _note_response(self, child: Child) -> None:
        for finding in self._watch.note_response(child, self._loop.time()):
            self._act(child, finding, 0.0)

    def _act(self, child: Child, finding: Finding, seconds: float) -> None:
        about = child.describe()
        match finding:
            case Finding.SILENT:
                state = _read_state(child.pid)
                serving = child.identity.role is Role.SERVING
                instead = "others accept its connections" if serving else "processes do without it"
                hint = f"{instead}; if this continues, it is killed after {self._times.kill:g} s"
                self._log.warning(Event.PROCESS_SILENT, **about, seconds=round(seconds, 1), state=state, hint=hint)
                child.mark_silent()
                self._on_change(child)
            case Finding.RESPONDS:
                self._log.info(Event.PROCESS_RESPONDS, **about)
                child.silent = False
                self._on_change(child)
            case Finding.HUNG:
                child.problem = f"it did not respond for {seconds:.0f} s"
                self._run_in_background(self._kill(child))

    async def _kill(self, child: Child) -> None:
        """Have a child write its stacks and exit, which `STACKS_SIGNAL` does; kill it if that does not work.

        A stopped process is only killed: to write its stacks it would have to continue, and then its loop may accept a
        client's connection before it ends (seen).
        """
        about = child.describe()
        state = _read_state(child.pid)
        self._log.error(Event.PROCESS_KILLED, **about, reason=child.problem, state=state)
        if state in _STOPPED:
            return child.kill()
        stacks = -1
        with contextlib.suppress(OSError):  # out of descriptors
            if child.pulse is not None:
                stacks = os.dup(child.pulse.stacks)  # the other one is closed when the child exits
        child.process.send_signal(STACKS_SIGNAL)
        await asyncio.wait([child.process.exited], timeout=STACKS_SECONDS)
        child.kill()
        if stacks < 0:
            return
        with open(stacks, "rb") as file:  # noqa: ASYNC230, PTH123 - a memory file
            text = os.pread(file.fileno(), MAX_STACKS, 0).decode("utf-8", "replace")
        for thread, frames in list(parse_stacks(text))[:MAX_THREADS]:
            self._log.error(Event.PROCESS_STACK, **about, thread=thread, calls=frames)


def parse_stacks(text: str) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield the threads in what `faulthandler` has written, and the innermost frames of each, innermost first."""
    thread = ""
    frames: list[str] = []
    for line in text.splitlines():
        if line.startswith("  "):
            frames.append(printable(line.strip()))
        elif line.strip():
            if frames:
                yield thread, frames[:MAX_FRAMES]
            thread, frames = printable(line.partition(" (most recent")[0].rstrip(":")), []
    if frames:
        yield thread, frames[:MAX_FRAMES]


def _read_state(pid: int) -> str:
    """Return the state of a process in words, "" if it cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return _STATES.get(fields[0], fields[0])
