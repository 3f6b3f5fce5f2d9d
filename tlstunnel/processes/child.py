"""A child that serves connections. It handles the parent's requests, and drains by itself if the parent exits.

Tested by tests/promises/test_processes.py.
"""

import asyncio
import atexit
import os
import socket
import threading
import time

from tlstunnel import __version__
from tlstunnel.addresses import ListenAddress
from tlstunnel.commands.command import AnyCommand
from tlstunnel.commands.records import WatchRecords
from tlstunnel.errors import ProcessError
from tlstunnel.journal import log_file
from tlstunnel.journal.events import Event
from tlstunnel.journal.journal import Journal
from tlstunnel.journal.lines import count_lost_lines
from tlstunnel.journal.logger import structlog
from tlstunnel.journal.style import Style
from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Registry
from tlstunnel.processes import messages, previous
from tlstunnel.processes.answers.dispatch import Answer, Answers
from tlstunnel.processes.answers.knowledge import Knowledge
from tlstunnel.processes.answers.open_tunnels import OpenTunnels
from tlstunnel.processes.answers.recording import Recording
from tlstunnel.processes.lag import LoopLag
from tlstunnel.processes.observing import Observing
from tlstunnel.processes.reporting import Reporter
from tlstunnel.processes.role import RoleProcess, run_role
from tlstunnel.serving.service import Service
from tlstunnel.sockets import resolve
from tlstunnel.sockets.listeners import Listener, adopt
from tlstunnel.sockets.readiness import TunnelLoop
from tlstunnel.state.counting import Counting

STUCK_SECONDS = 1.0
"""How long threads may take to end once nothing is served."""


class ServingProcess(RoleProcess):
    """Runs a `Service` as the parent's requests say."""

    formats = (previous.FORMAT, messages.FORMAT)

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(
            sock,
            {
                messages.Begin: self._begin,
                messages.Listeners: self._add_listeners,
                messages.Serve: self._serve,
                messages.Prepare: self._prepare,
                messages.Commit: self._commit,
                messages.Abandon: self._abandon,
                messages.AnnounceDrain: self._announce_drain,
                messages.Drain: self._drain,
                messages.Stop: self._stop,
                messages.Status: self._status,
                messages.Count: self._count,
                messages.Observe: self._observe,
                messages.Throttle: self._throttle,
                messages.Ask: self._answer,
            },
            {messages.TagsEnded: lambda told: self._open_tunnels.take_ended(told.ended)},
        )
        self._metrics = Registry()
        self._metrics.collect(lambda: [(families.LOG_LINES_LOST, (), count_lost_lines())])
        self._reporter = Reporter(self._metrics, self._link)
        self._lag = LoopLag(self._metrics)
        self._counting = Counting(self._metrics, self._report_lost_ledger)
        self._connection = 0
        self._journal = Journal(self._metrics)
        self._observing = Observing(self._journal, self._link)
        self._service: Service | None = None
        self._listeners: dict[int, Listener] = {}
        self._open_tunnels = OpenTunnels(
            lambda: self._begun_service.splices, lambda: self._begun_service.lifetimes, self._show_address
        )
        knowledge = Knowledge(lambda: self._begun_service.sites, self._journal)
        self._recording = Recording(self._journal, self._link)
        answers: dict[type[AnyCommand], Answer] = {
            **knowledge.answers,
            **self._open_tunnels.answers,
            WatchRecords: self._recording.watch,
        }
        self._answers = Answers(answers)

    async def run(self) -> None:
        """Serve until it is drained or stopped."""
        await self._wait_for_exit()
        if self._service is not None:
            await self._service.close()
        self._open_tunnels.close()
        self._observing.report()  # that its tunnels are lost
        self._observing.close()
        self._recording.close()
        self._counting.close()
        self._lag.close()
        await self._reporter.close()
        self._close_link()

    def _show_address(self, address: str) -> str:
        return self._journal.style.show(address)

    @property
    def _begun_service(self) -> Service:
        if self._service is None:
            raise ProcessError("this process has not received Begin")
        return self._service

    async def _begin(self, request: messages.Begin, _: list[int]) -> messages.Begun:
        invocation = self._introduce(request)
        self._journal.log_opened = request.opened
        self._journal.style = Style(request.log_fields, request.log_address, bytes.fromhex(request.log_key))
        self._service = await Service.begin(
            invocation, request.config, self._journal, quiet=request.quiet, counting=self._counting
        )
        self._reporter.start()
        return messages.Begun(version=__version__)

    async def _add_listeners(self, request: messages.Listeners, descriptors: list[int]) -> messages.Done:
        for number, written, descriptor in zip(request.numbers, request.written, descriptors, strict=True):
            self._listeners[number] = adopt(descriptor, ListenAddress.parse(written))
        return messages.Done()

    async def _serve(self, request: messages.Serve, _: list[int]) -> messages.Done:
        if self._begun_service.draining:
            return messages.Done()  # a signal came first: its listeners are closed, and another child takes its place
        for number in self._listeners.keys() - set(request.kept):
            self._begun_service.close_listener(self._listeners.pop(number))
        self._begun_service.accept([self._listeners[number] for number in request.numbers])
        return messages.Done()

    async def _prepare(self, request: messages.Prepare, _: list[int]) -> messages.Prepared:
        return messages.Prepared(changes=await self._begun_service.prepare(request.config))

    async def _commit(self, _: messages.Commit, __: list[int]) -> messages.Done:
        self._begun_service.commit()
        return messages.Done()

    async def _abandon(self, _: messages.Abandon, __: list[int]) -> messages.Done:
        await self._begun_service.abandon()
        return messages.Done()

    async def _announce_drain(self, _: messages.AnnounceDrain, __: list[int]) -> messages.Done:
        self._begun_service.announce_drain()
        return messages.Done()

    async def _drain(self, request: messages.Drain, _: list[int]) -> messages.Done:
        self._close_listeners()
        self._start_draining(request.after, request.over)
        return messages.Done()

    async def _stop(self, _: messages.Stop, __: list[int]) -> messages.Done:
        self._close_listeners()
        self._exit.set()
        return messages.Done()

    async def _status(self, request: messages.Status, _: list[int]) -> messages.Load:
        service = self._begun_service
        if request.scraped:
            self._lag.watch()
        self._reporter.report_now()
        return messages.Load(tunnels=service.tunnels, handshakes=service.unfinished, counting=self._counting.answering)

    async def _count(self, request: messages.Count, descriptors: list[int]) -> messages.Done:
        if descriptors:
            self._connection = request.connection
            await self._counting.join(socket.socket(fileno=descriptors[0]))
        else:
            self._counting.leave()
        return messages.Done()

    async def _observe(self, request: messages.Observe, _: list[int]) -> messages.Done:
        self._observing.configure(request.key, request.sites)
        return messages.Done()

    async def _throttle(self, request: messages.Throttle, _: list[int]) -> messages.Done:
        self._counting.throttles.replace(request.rules)
        return messages.Done()

    async def _answer(self, request: messages.Ask, _: list[int]) -> messages.Told:
        return messages.Told(fields=dict(await self._answers.carry_out(request.command, request.fields, request.who)))

    def _report_lost_ledger(self) -> None:
        self._link.notify(messages.LedgerLost(connection=self._connection))

    def _handle_sigterm(self) -> None:
        self._log.info(Event.DRAIN_REQUESTED, signal="SIGTERM", process=os.getpid())
        # The parent starts another child in its place; this one accepts what waits in its backlogs.
        self._leaving = asyncio.ensure_future(self._report_leaving())
        self._close_listeners()
        self._start_draining(0.0, None)

    def _handle_parent_exit(self) -> None:
        if self._service is None:
            return self._exit.set()
        if not self._service.draining:
            self._log.warning(Event.PARENT_EXITED, process=os.getpid())
        self._close_listeners()
        self._start_draining(0.0, None)

    def _close_listeners(self) -> None:
        for listener in self._listeners.values():
            if self._service is not None:
                self._service.close_listener(listener)
            else:
                listener.close()
        self._listeners = {}

    def _start_draining(self, after: float | None, over: float | None) -> None:
        if self._service is None:
            return self._exit.set()
        self._service.drain(after, over, self._exit.set)


def main() -> None:
    """Run as a child of the process that holds the other end of ``--link``."""
    run_role("child", ServingProcess, TunnelLoop)
    _exit_despite_threads()


def _exit_despite_threads() -> None:
    """Exit even if a thread does not end, such as one in which an edge worker still runs.

    The interpreter would wait for it without limit. This includes daemon threads, because it waits for all threads of
    executors. Those of a resolver that does not respond are not waited for at all, and that of the log ends by itself.
    """
    deadline = time.monotonic() + STUCK_SECONDS
    own = {threading.current_thread().name, resolve.THREAD_NAME, log_file.THREAD_NAME}
    others = [one for one in threading.enumerate() if one.name not in own]
    for thread in others:
        thread.join(max(deadline - time.monotonic(), 0.0))
    if stuck := [thread.name for thread in others if thread.is_alive()]:
        structlog.get_logger().warning(Event.THREADS_ABANDONED, threads=stuck)
        atexit._run_exitfuncs()
        os._exit(0)


if __name__ == "__main__":
    main()
