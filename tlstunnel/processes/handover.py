"""An upgrade: the new code is tried as a probe, then executed in this process's place.

What the new program needs is in a file in memory, whose descriptor it inherits with all those that the file names:
listening sockets, the links to the children, the control socket. The file has a format number. A program that does not
know the number refuses, as the probe, before anything was given up; the program before then writes its previous format,
so that it can be replaced by an earlier release too.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any, Self

import msgspec

from tlstunnel import __version__
from tlstunnel.errors import ControlError, ProcessError
from tlstunnel.metrics.snapshot import Snapshot
from tlstunnel.origins.embedded import EchoHandover
from tlstunnel.processes import previous
from tlstunnel.processes.children import ChildHandover
from tlstunnel.processes.control import ControlHandover
from tlstunnel.processes.messages import FORMAT
from tlstunnel.processes.slots import SlotsHandover
from tlstunnel.program import starting_command
from tlstunnel.supervisor import ChildProcess

VARIABLE = "TLSTUNNEL_HANDOVER"
"""The environment variable that names the descriptor of the file."""

COMMAND = starting_command()
"""At import, which is before anything could change the working directory."""

MAX_LINES = 20
"""Lines that a probe has written last, kept to say why it failed."""

MAX_REASON = 500
"""Characters of such a reason."""

REFUSAL = "hands over in format"
"""What a program that does not know the format says, in every release: the program before tries another one."""


class Handover(msgspec.Struct, frozen=True):
    """What a parent gives to the program that is executed in its place. Descriptors are numbers."""

    version: str
    generation: int
    slots: SlotsHandover
    children: list[ChildHandover]
    control_socket: ControlHandover | None
    echo: EchoHandover | None
    client: int | None
    """The client of the control socket that asked for the upgrade, None if it was a signal."""

    config: str | None = None
    """The text of the configuration file, if there is one: what the probe has accepted is what is served."""

    metrics: Snapshot | None = None
    """What the children that have exited by now had counted."""

    probe: int | None = None
    """Where a probe writes its release once all is well; None if this is no probe."""

    @classmethod
    def receive(cls) -> Self | None:
        """Return what the program before has left, None without one. Raises ProcessError: it is of another format."""
        variable = os.environ.pop(VARIABLE, "")
        if not variable:
            return None
        try:
            with os.fdopen(int(variable), "rb") as file:
                file.seek(0)
                found = json.load(file)
            format_ = found["format"]
            if format_ == previous.FORMAT:
                found = previous.upgrade_handover(found)
            if format_ in {previous.FORMAT, FORMAT}:
                return msgspec.convert(found, cls)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ProcessError(f"{VARIABLE} is for tlstunnel's own use: unset it ({error!r})") from None
        raise ProcessError(
            f"the running tunnel {REFUSAL} {format_}, and {__version__} knows {previous.FORMAT} and {FORMAT}:"
            " restart it, or upgrade by way of a release between them"
        )

    def list_descriptors(self) -> list[int]:
        """Return all that the next program needs."""
        found = [slot.fd for slot in self.slots.open] + [child.link for child in self.children]
        if self.control_socket is not None:
            found += [self.control_socket.fd, self.control_socket.lock]
        if self.echo is not None:
            found.append(self.echo.pipe)
        return found + ([self.client] if self.client is not None else [])

    def respond(self, response: Mapping[str, Any]) -> None:
        """Send a response to the client that asked for the upgrade. To be called once."""
        if self.client is None:
            return
        with contextlib.suppress(OSError), socket.socket(fileno=self.client) as sock:
            sock.setblocking(False)
            sock.sendall(json.dumps(response).encode() + b"\n")

    def write(self, format_: int, probe: int | None = None) -> int:
        """Write it into a file in memory; return its descriptor."""
        text = {"format": format_, **msgspec.to_builtins(self), "probe": probe}
        if format_ == previous.FORMAT:
            text = previous.downgrade_handover(text)
        fd = os.memfd_create("tlstunnel-handover", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(json.dumps(text).encode())
        os.lseek(fd, 0, os.SEEK_SET)
        return fd


async def probe(state: Handover, seconds: float) -> int:
    """Run the code that is installed now as a probe, which does everything but accept, for at most so many seconds.

    Return the format in which it takes the handover. Raises ControlError: it failed.
    """
    for format_ in (FORMAT, previous.FORMAT):
        problem = await _run_probe(state, format_, seconds)
        if not problem:
            return format_
        if REFUSAL not in problem:
            break
    raise ControlError(f"nothing was changed: the new code does not start: {problem}")


async def _run_probe(state: Handover, format_: int, seconds: float) -> str:
    """Return why a probe fails that is given this format, empty where it does not. Raises ControlError."""
    reading, done = os.pipe()
    errors_reading, errors = os.pipe()
    file = state.write(format_, done)
    for fd in (done, file):
        os.set_inheritable(fd, True)
    try:
        pid = os.posix_spawn(  # noqa: ASYNC221 - a millisecond, for this loop serves no connections
            COMMAND[0],
            COMMAND,
            {**os.environ, VARIABLE: str(file)},
            file_actions=[(os.POSIX_SPAWN_DUP2, errors, 2)],
            setpgroup=0,
            setsigmask=(),
        )
    except OSError as error:
        for fd in (reading, errors_reading):
            os.close(fd)
        raise ControlError(f"nothing was changed: {COMMAND[0]}: cannot be executed: {error.strerror}") from None
    finally:
        for fd in (done, errors, file):
            os.close(fd)
    try:
        process = ChildProcess(pid)
    except OSError as error:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)  # noqa: ASYNC222 - it was killed
        for fd in (reading, errors_reading):
            os.close(fd)
        raise ControlError(f"nothing was changed: the new code cannot be watched: {error.strerror}") from None
    try:
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            written = group.create_task(_read_lines(reading))
            complaints = group.create_task(_read_lines(errors_reading))
    except TimeoutError:
        raise ControlError(
            f"nothing was changed: the new code was not ready within {seconds:g} s (release.upgrade_timeout)"
        ) from None
    finally:
        process.kill(group=True)  # it has a child, too
        await process.wait()
    return "" if written.result() else _explain(complaints.result())


def _explain(lines: list[str]) -> str:
    """Return what a program that ended has written last, and what its child has written before that."""
    words = [" ".join(line.split()) for line in lines if not line.startswith((" ", "Traceback (most recent call"))]
    return "; ".join(words[-2:])[:MAX_REASON] or "it exited without output"


async def _read_lines(descriptor: int) -> list[str]:
    """Return the last lines that are not empty, once no process can write any more."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", 0)
    )
    lines: deque[str] = deque(maxlen=MAX_LINES)
    rest = b""
    try:
        while some := await reader.read(65_536):
            *whole, rest = (rest + some).split(b"\n")
            rest = rest[-65_536:]
            lines += (line.decode("utf-8", "replace") for line in whole if line.strip())
    finally:
        transport.close()
    if rest.strip():
        lines.append(rest.decode("utf-8", "replace"))
    return list(lines)


def execute(state: Handover, format_: int, blocked: Collection[signal.Signals]) -> None:
    """Execute the program as it was started, in this process's place. Raises ControlError: it cannot be executed.

    The signals `blocked` wait until the new program handles them.
    """
    file = state.write(format_)
    descriptors = [*state.list_descriptors(), file]
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    for fd in descriptors:
        os.set_inheritable(fd, True)
    try:
        sys.stderr.flush()
        os.execve(COMMAND[0], COMMAND, {**os.environ, VARIABLE: str(file)})  # noqa: S606 - without a shell
    except OSError as error:
        for fd in descriptors:
            os.set_inheritable(fd, False)
        os.close(file)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        raise ControlError(f"nothing was changed: {COMMAND[0]}: cannot be executed: {error.strerror}") from None
