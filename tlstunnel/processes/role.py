"""What the children of every role do alike: their signals, the first request, polls, leaving, and their end.

Tested by tests/promises/test_processes.py.
"""

import argparse
import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from tlstunnel import __version__
from tlstunnel.config.invocation import Invocation
from tlstunnel.errors import ProcessError
from tlstunnel.journal.lines import configure_logging, reopen_log
from tlstunnel.journal.logger import structlog
from tlstunnel.processes import messages
from tlstunnel.processes.link import Link, Notifications, Requests
from tlstunnel.processes.pulse import Responder
from tlstunnel.program import forbid_core_dumps, set_process_name


class RoleProcess:
    """A child of the parent at the other end of `sock`, which sends these requests and notifications, and `Respond`.

    `formats` are those of the parents that it can be a child of. It runs until `_exit` is set.
    """

    formats: ClassVar[tuple[int, ...]] = (messages.FORMAT,)

    def __init__(self, sock: socket.socket, requests: Requests, notifications: Notifications | None = None) -> None:
        self._link = Link(
            sock,
            {messages.Respond: self._respond, **requests},
            self._handle_parent_exit,
            {messages.ReopenLog: lambda _: reopen_log(), **(notifications or {})},
        )
        self._responder: Responder | None = None
        self._exit = asyncio.Event()
        self._leaving: asyncio.Future[None] | None = None
        self._log = structlog.get_logger()

    async def run(self) -> None:
        """Do the work of the role, until it is over."""
        raise NotImplementedError

    def _handle_sigterm(self) -> None:
        """Handle SIGTERM, which this process alone has got: it ends or is replaced."""
        raise NotImplementedError

    def _handle_parent_exit(self) -> None:
        """Handle that the parent has exited."""
        raise NotImplementedError

    async def _wait_for_exit(self) -> None:
        """Handle signals, until `_exit` is set."""
        loop = asyncio.get_running_loop()
        # Signals from a terminal are for the parent, which decides.
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        loop.add_signal_handler(signal.SIGTERM, self._handle_sigterm)
        # With `stty tostop`, logging to the terminal would stop a process that is not in the foreground process group.
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        await self._exit.wait()

    def _introduce(self, request: messages.Begin) -> Invocation:
        """Take the name and the log that the parent has given; return what was called. Raises ProcessError."""
        if request.format not in self.formats:
            raise ProcessError(
                f"the package on disk, {__version__}, uses link protocol {messages.FORMAT}, the running tunnel uses"
                f" {request.format}: the package was replaced; run tlstunnel upgrade"
            )
        set_process_name(request.name)
        configure_logging(request.log_format, Path(request.log_file) if request.log_file else None)
        return Invocation.from_json(request.invocation)

    async def _respond(self, request: messages.Respond, descriptors: list[int]) -> messages.Done:
        sock, stacks = descriptors
        if self._responder is not None:  # of a program that an upgrade has replaced
            self._responder.close()
        self._responder = Responder(socket.socket(fileno=sock), stacks, request.loop_seconds)
        self._responder.start()
        return messages.Done()

    async def _stop(self, _: messages.Stop, __: list[int]) -> messages.Done:
        self._exit.set()
        return messages.Done()

    async def _report_leaving(self) -> None:
        """Have another process take this one's place. A request, so that it has arrived when this returns."""
        with contextlib.suppress(ProcessError):
            await self._link.request(messages.Leaving())

    def _close_link(self) -> None:
        self._link.close()
        if self._responder is not None:
            self._responder.close()


def run_role(
    name: str,
    make: Callable[[socket.socket], RoleProcess],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> None:
    """Run what `make` returns, as a child of the process that holds the other end of ``--link``."""
    parser = argparse.ArgumentParser(prog=f"tlstunnel {name}")
    parser.add_argument("--link", type=int, required=True)
    arguments = parser.parse_args()
    forbid_core_dumps()

    async def run() -> None:
        await make(socket.socket(fileno=arguments.link)).run()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(run())
