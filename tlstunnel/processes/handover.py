"""An upgrade: the new code is tried as a probe, then executed in this process's place.

What the new program needs stands in a file in memory, whose descriptor it inherits with all those that the file names:
listening sockets, the links to the children, the control socket. Its first key is the format's number, and a program
that does not know that number refuses: as the probe, before anything has been given up.
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
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from tlstunnel import __version__
from tlstunnel.errors import ControlError, ProcessError
from tlstunnel.processes.control import ControlSocket, Handler
from tlstunnel.program import starting_command

FORMAT = 1

VARIABLE = "TLSTUNNEL_HANDOVER"
"""The environment variable that names the descriptor of the file."""

COMMAND = starting_command()
"""At import, which is before anything could change the working directory."""

MOST_SAID = 20
"""Lines of a probe that are kept, to say why it failed."""

LONGEST_REASON = 500


@dataclass(frozen=True, slots=True)
class Handover:
    """What a parent gives to the one that is executed in its place. Descriptors are numbers."""

    version: str
    generation: int
    slots: Mapping[str, Any]
    children: list[dict[str, Any]]
    control_socket: Mapping[str, Any] | None
    echo: Mapping[str, int] | None
    client: int | None
    config: str | None = None
    """The text of the configuration file, if there is one: what the probe has found good is what is served."""

    probe: int | None = None
    """Where a probe says that all is well; None where this is no probe."""

    @classmethod
    def received(cls) -> Self | None:
        """What the program before has left, None without one. Raises ProcessError: it is of another format."""
        variable = os.environ.pop(VARIABLE, "")
        if not variable:
            return None
        try:
            with os.fdopen(int(variable), "rb") as file:
                file.seek(0)
                said = json.load(file)
            kept = {field.name: said[field.name] for field in fields(cls)} if said["format"] == FORMAT else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ProcessError(f"{VARIABLE} is for tlstunnel's own use: unset it ({error!r})") from None
        if kept is None:
            raise ProcessError(
                f"the running tunnel hands over in format {said['format']}, and {__version__} knows {FORMAT}:"
                " start it anew, or upgrade by way of a version between them"
            )
        return cls(**kept)

    def descriptors(self) -> list[int]:
        """All that the next program needs."""
        found = [one["fd"] for one in self.slots["open"]] + [child["link"] for child in self.children]
        if self.control_socket is not None:
            found += [self.control_socket["fd"], self.control_socket["lock"]]
        if self.echo is not None:
            found.append(self.echo["pipe"])
        return found + ([self.client] if self.client is not None else [])

    def control(self, handlers: Mapping[str, Handler]) -> ControlSocket | None:
        """The control socket, with these handlers from now on."""
        return ControlSocket.adopted(self.control_socket, handlers) if self.control_socket is not None else None

    def answer(self, answer: Mapping[str, Any]) -> None:
        """Tell the client that asked for the upgrade, once."""
        if self.client is None:
            return
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.client)) as sock:
            os.close(self.client)
            sock.setblocking(False)
            sock.sendall(json.dumps(answer).encode() + b"\n")

    def passed_on(self, probe: int | None = None) -> int:
        """Write it into a file in memory; give its descriptor."""
        text = json.dumps({"format": FORMAT, **asdict(self), "probe": probe}).encode()
        fd = os.memfd_create("tlstunnel-handover", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(text)
        os.lseek(fd, 0, os.SEEK_SET)
        return fd


async def probe(state: Handover, seconds: float) -> None:
    """Run the code that is installed now as a probe, which does all but accept, for so many seconds at most.

    Raises ControlError: it failed.
    """
    reading, answering = os.pipe()
    complaints_reading, complaints = os.pipe()
    file = state.passed_on(answering)
    for fd in (answering, file):
        os.set_inheritable(fd, True)
    try:
        pid = os.posix_spawn(  # noqa: ASYNC221 - a millisecond, for this loop serves nobody
            COMMAND[0],
            COMMAND,
            {**os.environ, VARIABLE: str(file)},
            file_actions=[(os.POSIX_SPAWN_DUP2, complaints, 2)],
            setpgroup=0,
            setsigmask=(),
        )
    except OSError as error:
        for fd in (reading, complaints_reading):
            os.close(fd)
        raise ControlError(f"nothing was changed: {COMMAND[0]}: cannot be executed: {error.strerror}") from None
    finally:
        for fd in (answering, complaints, file):
            os.close(fd)
    try:
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            said = group.create_task(_all(reading))
            complained = group.create_task(_all(complaints_reading))
    except TimeoutError:
        raise ControlError(
            f"nothing was changed: the new code was not ready within {seconds:g} s (release.upgrade_timeout)"
        ) from None
    finally:
        # Its whole group: it has a child, too.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            await asyncio.to_thread(os.waitpid, pid, 0)
    if not said.result():
        raise ControlError(f"nothing was changed: the new code does not start: {_reason(complained.result())}")


def _reason(complained: list[str]) -> str:
    """What a program that ended has said last, and what its child has said before that."""
    words = [" ".join(line.split()) for line in complained if not line.startswith((" ", "Traceback (most recent call"))]
    return "; ".join(words[-2:])[:LONGEST_REASON] or "it ended without a word"


async def _all(descriptor: int) -> list[str]:
    """The last lines that are not empty, once nobody can write any more."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", 0)
    )
    lines: deque[str] = deque(maxlen=MOST_SAID)
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


def execute(state: Handover, blocked: Collection[signal.Signals]) -> None:
    """Execute the program as it was started, in this process's place. Raises ControlError: it cannot be executed.

    Signals that come before the new program handles them wait, `blocked`.
    """
    file = state.passed_on()
    descriptors = [*state.descriptors(), file]
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    for fd in descriptors:
        os.set_inheritable(fd, True)
    try:
        sys.stderr.flush()
        os.execve(COMMAND[0], COMMAND, {**os.environ, VARIABLE: str(file)})  # noqa: S606 - there is none wanted
    except OSError as error:
        for fd in descriptors:
            os.set_inheritable(fd, False)
        os.close(file)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        raise ControlError(f"nothing was changed: {COMMAND[0]}: cannot be executed: {error.strerror}") from None
