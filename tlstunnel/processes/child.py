"""A child: one process that serves. It does what the parent says, and drains by itself once the parent is gone."""

import argparse
import asyncio
import atexit
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import structlog

from tlstunnel import __version__
from tlstunnel.addresses import ListenAddress
from tlstunnel.config.invocation import Invocation
from tlstunnel.errors import ProcessError
from tlstunnel.journal.journal import Journal
from tlstunnel.journal.lines import configure_logging
from tlstunnel.processes.link import FORMAT, Link
from tlstunnel.program import set_process_name
from tlstunnel.serving.service import Service
from tlstunnel.sockets.listeners import Listener, adopted
from tlstunnel.sockets.readiness import TunnelLoop

STUCK_SECONDS = 1.0
"""What threads have to end once nothing is served any more."""


class Child:
    """Answers the parent's requests with a `Service`."""

    def __init__(self, sock: socket.socket) -> None:
        self._link = Link(
            sock,
            {
                "begin": self._begin,
                "listeners": self._take,
                "serve": self._serve,
                "prepare": self._prepare,
                "commit": self._commit,
                "abandon": self._abandon,
                "finish": self._finish,
                "stop": self._stop,
                "status": self._status,
            },
            self._orphaned,
        )
        self._service: Service | None = None
        self._held: dict[int, Listener] = {}
        self._done = asyncio.Event()
        self._log = structlog.get_logger()

    async def run(self) -> None:
        """Serve until there is nothing left to serve and nothing more will come."""
        loop = asyncio.get_running_loop()
        # The parent gets what a terminal or a person sends, and says what it means. To this one alone: it drains.
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        loop.add_signal_handler(signal.SIGTERM, self._terminated)
        # In a terminal with `stty tostop` a line of the log would stop a process that is not in the foreground's group.
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        await self._done.wait()
        if self._service is not None:
            await self._service.close()
        self._link.close()

    @property
    def _serving(self) -> Service:
        if self._service is None:
            raise ProcessError("this process has not begun")
        return self._service

    async def _begin(self, request: Mapping[str, Any], _: list[int]) -> Mapping[str, Any]:
        if request["format"] != FORMAT:
            raise ProcessError(
                f"the package on disk, {__version__}, speaks another language ({FORMAT}) than the running tunnel"
                f" ({request['format']}): it was replaced; run tlstunnel upgrade"
            )
        set_process_name(request["name"])
        configure_logging(request["log_format"])
        invocation = Invocation.from_json(request["wanted"])
        journal = Journal(opened=request["opened"])
        self._service = await Service.begin(invocation, request["config"], journal, quiet=request["quiet"])
        return {"version": __version__}

    async def _take(self, request: Mapping[str, Any], descriptors: list[int]) -> Mapping[str, Any]:
        for number, written, descriptor in zip(request["numbers"], request["written"], descriptors, strict=True):
            self._held[number] = adopted(descriptor, ListenAddress.parse(written))
        return {}

    async def _serve(self, request: Mapping[str, Any], _: list[int]) -> Mapping[str, Any]:
        """Accept at these from now on; those that are no longer `kept` are closed."""
        for number in self._held.keys() - set(request["kept"]):
            self._serving.leave(self._held.pop(number))
        self._serving.accept([self._held[number] for number in request["numbers"]])
        return {}

    async def _prepare(self, request: Mapping[str, Any], _: list[int]) -> Mapping[str, Any]:
        return {"changes": await self._serving.prepare(request["config"])}

    async def _commit(self, _: Mapping[str, Any], __: list[int]) -> Mapping[str, Any]:
        self._serving.commit()
        return {}

    async def _abandon(self, _: Mapping[str, Any], __: list[int]) -> Mapping[str, Any]:
        await self._serving.abandon()
        return {}

    async def _finish(self, request: Mapping[str, Any], _: list[int]) -> Mapping[str, Any]:
        """Accept no more; end once there is no tunnel, or spread over `over` seconds after `linger` (None: never)."""
        self._leave_all()
        self._end(request["linger"], request["over"])
        return {}

    async def _stop(self, _: Mapping[str, Any], __: list[int]) -> Mapping[str, Any]:
        """End at once."""
        self._leave_all()
        self._done.set()
        return {}

    async def _status(self, _: Mapping[str, Any], __: list[int]) -> Mapping[str, Any]:
        return self._serving.status()

    def _terminated(self) -> None:
        self._log.info("ending", signal="SIGTERM", process=os.getpid())
        # The parent has another take its place; what waits to be accepted is accepted here.
        self._telling = asyncio.ensure_future(self._tell_of_leaving())
        self._leave_all()
        self._end(0.0, None)

    async def _tell_of_leaving(self) -> None:
        with contextlib.suppress(ProcessError):
            await self._link.ask("leaving")

    def _orphaned(self) -> None:
        if self._service is None:
            return self._done.set()
        if not self._service.ending:
            self._log.warning("the parent is gone: draining", process=os.getpid())
        self._leave_all()
        self._end(0.0, None)

    def _leave_all(self) -> None:
        for listener in self._held.values():
            if self._service is not None:
                self._service.leave(listener)
            else:
                listener.close()
        self._held = {}

    def _end(self, linger: float | None, over: float | None) -> None:
        if self._service is None:
            return self._done.set()
        self._service.end(linger, over, self._done.set)


def main() -> None:
    """Serve as a child of the process that holds the other end of ``--link``."""
    parser = argparse.ArgumentParser(prog="tlstunnel child")
    parser.add_argument("--link", type=int, required=True)
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=TunnelLoop) as runner:
        runner.run(_run(arguments.link))
    _leave()


def _leave() -> None:
    """End, though a thread does not: the interpreter would wait for what an edge worker has left in one, for ever.

    Daemons too: it waits for all threads of executors.
    """
    deadline = time.monotonic() + STUCK_SECONDS
    others = [one for one in threading.enumerate() if one is not threading.current_thread()]
    for thread in others:
        thread.join(max(deadline - time.monotonic(), 0.0))
    if stuck := [thread.name for thread in others if thread.is_alive()]:
        structlog.get_logger().warning("threads that do not end are left", threads=stuck)
        atexit._run_exitfuncs()
        os._exit(0)


async def _run(link: int) -> None:
    await Child(socket.socket(fileno=link)).run()


if __name__ == "__main__":
    main()
