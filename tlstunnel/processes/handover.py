"""An upgrade: tries the new release as a probe, then executes it in place of this program.

The state that the new program needs is in a memory file. The program inherits the descriptor of this file and those
that the file lists: listening sockets, the links to the children, the control socket. The file has a format number. A
release that does not know the number refuses it as the probe, before anything has changed. This program then tries its
previous format, so that it can also be downgraded.
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
from tlstunnel.commands.configuration import LoadStatus
from tlstunnel.errors import ControlError, ProcessError
from tlstunnel.journal.lines import flush_log
from tlstunnel.metrics.snapshot import Snapshot
from tlstunnel.origins.embedded import EchoHandover
from tlstunnel.processes import previous
from tlstunnel.processes.admin_socket import AdminSocketHandover
from tlstunnel.processes.children import ChildHandover
from tlstunnel.processes.control import ControlHandover
from tlstunnel.processes.messages import FORMAT
from tlstunnel.processes.slots import SlotsHandover
from tlstunnel.processes.totals import TotalsHandover
from tlstunnel.program import find_starting_command
from tlstunnel.state.throttles import ThrottleRule
from tlstunnel.supervisor import ChildProcess

VARIABLE = "TLSTUNNEL_HANDOVER"
"""The environment variable with the number of the file's descriptor."""

COMMAND = find_starting_command()
"""The command that started this program. It is determined at import, before the working directory can change."""

MAX_LINES = 20
"""How many of the last lines that a probe writes are kept, to report why it failed."""

MAX_REASON = 500
"""The longest reason that is reported, in characters."""

REFUSAL = "hands over in format"
"""What every release says, as a probe, if it does not know the format. The running program then tries another one."""


class Handover(msgspec.Struct, frozen=True):
    """What a parent hands over to the program that replaces it. Descriptors are numbers."""

    version: str
    generation: int
    slots: SlotsHandover
    children: list[ChildHandover]
    control_socket: ControlHandover | None
    echo: EchoHandover | None
    client: int | None
    """The client of the control socket that requested the upgrade, None if a signal did."""

    config: str | None = None
    """The text of the configuration file, if there is one, so that what is served is what the probe accepted."""

    metrics: Snapshot | None = None
    """The metrics of the children that have exited."""

    usage: TotalsHandover | None = None
    """What sites have used of all children; None from a release that does not know."""

    instance: str = ""
    """What stands for this tunnel among all machines that count together."""

    loads: list[LoadStatus] = []
    """When the configuration was read."""

    who: str = ""
    """Who has asked for the upgrade, "" for a signal."""

    log_key: str = ""
    """What the log hashes addresses with."""

    observer_key: str = ""
    """What processes count addresses with."""

    throttles: list[ThrottleRule] = []
    """The throttles that hold."""

    admin_socket: AdminSocketHandover | None = None
    """The socket of the admin address, if there is one."""

    probe: int | None = None
    """The descriptor to which a probe writes its release on success; None if the program is not a probe."""

    @classmethod
    def receive(cls) -> Self | None:
        """Return what the previous program handed over, None if there is none.

        Raises ProcessError if its format is unknown.
        """
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
            raise ProcessError(f"{VARIABLE} is for internal use; unset it ({error!r})") from None
        raise ProcessError(
            f"the running tunnel {REFUSAL} {format_}, and {__version__} supports {previous.FORMAT} and {FORMAT};"
            " restart it, or upgrade to an intermediate release first"
        )

    def list_descriptors(self) -> list[int]:
        """Return the descriptors that the next program inherits."""
        found = [slot.fd for slot in self.slots.open] + [child.link for child in self.children]
        found += [fd for child in self.children for fd in (child.pulse, child.stacks) if fd is not None]
        if self.control_socket is not None:
            found += [self.control_socket.fd, self.control_socket.lock]
        if self.echo is not None:
            found.append(self.echo.pipe)
        if self.admin_socket is not None:
            found.append(self.admin_socket.fd)
        return found + ([self.client] if self.client is not None else [])

    def respond(self, response: Mapping[str, Any]) -> None:
        """Send a response to the client that requested the upgrade. Call this once."""
        if self.client is None:
            return
        with contextlib.suppress(OSError), socket.socket(fileno=self.client) as sock:
            sock.setblocking(False)
            sock.sendall(json.dumps(response).encode() + b"\n")

    def write(self, format_: int, probe: int | None = None) -> int:
        """Write the state to a memory file; return its descriptor."""
        text = {"format": format_, **msgspec.to_builtins(self), "probe": probe}
        if format_ == previous.FORMAT:
            text = previous.downgrade_handover(text)
        fd = os.memfd_create("tlstunnel-handover", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(json.dumps(text).encode())
        os.lseek(fd, 0, os.SEEK_SET)
        return fd


async def probe(state: Handover, seconds: float) -> int:
    """Run the installed release as a probe, which does everything except accept, for at most so many seconds.

    Return the format of the handover that it supports. Raises ControlError if the probe fails.
    """
    for format_ in (FORMAT, previous.FORMAT):
        problem = await _run_probe(state, format_, seconds)
        if not problem:
            return format_
        if REFUSAL not in problem:
            break
    raise ControlError(f"nothing was changed: the new release fails to start: {problem}")


async def _run_probe(state: Handover, format_: int, seconds: float) -> str:
    """Run a probe with this format; return why it fails, empty if it does not. Raises ControlError."""
    reading, done = os.pipe()
    errors_reading, errors = os.pipe()
    file = state.write(format_, done)
    for fd in (done, file):
        os.set_inheritable(fd, True)
    try:
        pid = os.posix_spawn(  # noqa: ASYNC221 - takes a millisecond, and this loop serves no connections
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
        raise ControlError(f"nothing was changed: the probe cannot be watched: {error.strerror}") from None
    try:
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            written = group.create_task(_read_lines(reading))
            errors_written = group.create_task(_read_lines(errors_reading))
    except TimeoutError:
        raise ControlError(
            f"nothing was changed: the new release was not ready within {seconds:g} s (release.upgrade_timeout)"
        ) from None
    finally:
        process.kill(group=True)  # it has a child
        await process.wait()
    return "" if written.result() else _explain(errors_written.result())


def _explain(lines: list[str]) -> str:
    """Return the last two lines of a probe: usually its child's error, then its own."""
    words = [" ".join(line.split()) for line in lines if not line.startswith((" ", "Traceback (most recent call"))]
    return "; ".join(words[-2:])[:MAX_REASON] or "it exited without output"


async def _read_lines(descriptor: int) -> list[str]:
    """Return the last non-empty lines, once every process has closed the pipe."""
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
    """Execute the command that started this program, in this process. Raises ControlError if that fails.

    The signals `blocked` stay pending until the new program handles them.
    """
    file = state.write(format_)
    descriptors = [*state.list_descriptors(), file]
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    for fd in descriptors:
        os.set_inheritable(fd, True)
    try:
        sys.stderr.flush()
        flush_log()
        os.execve(COMMAND[0], COMMAND, {**os.environ, VARIABLE: str(file)})  # noqa: S606 - without a shell
    except OSError as error:
        for fd in descriptors:
            os.set_inheritable(fd, False)
        os.close(file)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        raise ControlError(f"nothing was changed: {COMMAND[0]}: cannot be executed: {error.strerror}") from None
