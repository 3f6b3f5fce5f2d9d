"""Connects the serving processes to the ledger, and hands the counts of one ledger over to the next.

A connection is a socket pair: the ledger has one end, the process the other. At an upgrade the process keeps its end,
and the ledger's end moves on to the next ledger, together with the counts. The next ledger confirms that it has
everything before the previous one is stopped. If it does not, it is killed first, so that never two ledgers answer, and
the previous one resumes.

Tested by tests/promises/test_shared_counts.py.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from tlstunnel.backoff import Backoff
from tlstunnel.errors import ProcessError
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.processes.children import Child, Role
from tlstunnel.processes.messages import Connect, Count, Done, HandOver, LedgerLoad, LedgerStatus, Request, Resume
from tlstunnel.processes.messages import TakeOver as TakeOverRequest

COUNTING_FORMAT = 3
"""The first format of the messages in which a process can be told where to count."""

START_SECONDS = 5.0
"""How long a process that starts waits for a ledger that starts too. Then it counts as it does without one."""

HAND_OVER_SECONDS = 5.0
"""How long a hand-over may take. Askers wait for 0.5 s, then they count as they do without a ledger."""

EXIT_SECONDS = 5.0
"""How long a ledger may take to exit once another one has taken over; then it is killed."""

RECONNECTS = Backoff(first=0.1, longest=5.0)
"""The delays between connections of a process that has lost the one that it had."""


class Wiring:
    """Knows the ledger that answers. `list_children` returns the children that have not exited.

    `run_in_background` keeps a task until it is done.
    """

    def __init__(
        self,
        list_children: Callable[[], Iterable[Child]],
        run_in_background: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._list_children = list_children
        self._run_in_background = run_in_background
        self._ledger: Child | None = None
        self._begun = asyncio.Event()
        self._lock = asyncio.Lock()
        self._delays: dict[Child, float] = {}
        self._log = structlog.get_logger()

    @property
    def ledger(self) -> Child | None:
        """The ledger that answers, None if there is none."""
        ledger = self._ledger
        return None if ledger is None or ledger.exited else ledger

    def restore(self, ledger: Child) -> None:
        """Take over the ledger of the previous program."""
        if not ledger.draining:
            self._set(ledger)

    async def connect(self, child: Child) -> None:
        """Connect a serving child that starts, as soon as there is a ledger. Raises ProcessError if it fails."""
        if child.identity.format < COUNTING_FORMAT:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                await self._begun.wait()
        async with self._lock:
            await self._connect(child)

    async def reconnect(self, child: Child) -> None:
        """Connect a serving child again that has lost its connection, after a delay. Without a ledger, do nothing."""
        self._delays = {child: delay for child, delay in self._delays.items() if not child.exited}
        self._delays[child] = delay = RECONNECTS.after(self._delays.get(child, 0.0))
        await asyncio.sleep(delay)
        async with self._lock:
            if self.ledger is not None and not child.exited:
                with contextlib.suppress(ProcessError):
                    await self._connect(child)

    async def begin(self, ledger: Child) -> None:
        """Have `ledger`, which is ready, answer from now on, with the counts of the previous one if that still runs.

        Raises ProcessError if it cannot take over; it was killed then, and the previous one answers.
        """
        async with self._lock:
            previous = self.ledger
            connected: set[int] = set()
            if previous is not None and not previous.silent:
                taken = await self._hand_over(previous, ledger)
                connected.update(taken or ())
                self._log.info(
                    Event.LEDGER_REPLACED, process=ledger.pid, version=ledger.identity.version, counts=taken is not None
                )
            self._set(ledger)
            await asyncio.gather(
                *(self._try_to_connect(child) for child in self._list_serving() if child.pid not in connected)
            )
        if previous is not None:
            previous.draining = True
            self._run_in_background(self._end(previous))

    async def dismiss(self) -> None:
        """Have all processes count alone, and stop the ledger."""
        async with self._lock:
            ledger, self._ledger = self.ledger, None
            self._begun.clear()
            if ledger is None:
                return
            ledger.draining = True
            ledger.leaving.set()
            await asyncio.gather(*(child.try_request(Count()) for child in self._list_serving()))
        self._run_in_background(self._end(ledger))

    async def request_load(self) -> LedgerLoad | None:
        """Return what the ledger does, None if it does not respond or there is none."""
        ledger = self.ledger
        if ledger is None:
            return None
        try:
            return await ledger.request(LedgerStatus())
        except ProcessError:
            return None

    def _set(self, ledger: Child) -> None:
        self._ledger = ledger
        self._begun.set()
        ledger.process.exited.add_done_callback(lambda _: self._forget(ledger))

    def _forget(self, ledger: Child) -> None:
        if self._ledger is ledger:
            self._ledger = None
            self._begun.clear()
            self._delays.clear()

    def _list_serving(self) -> list[Child]:
        return [
            child
            for child in self._list_children()
            if child.identity.role is Role.SERVING and child.ready and child.identity.format >= COUNTING_FORMAT
        ]

    async def _try_to_connect(self, child: Child) -> None:
        with contextlib.suppress(ProcessError):  # it has exited, or will be replaced because it does not respond
            await self._connect(child)

    async def _connect(self, child: Child) -> None:
        """Give the child a connection; one that has ended already, if there is no ledger or it does not respond."""
        ours, theirs = _make_pair()
        with ours, theirs:
            if self.ledger is not None:
                with contextlib.suppress(ProcessError):
                    await _send(self.ledger, Connect(process=child.pid), theirs)
            theirs.close()
            await _send(child, Count(), ours)

    async def _hand_over(self, previous: Child, following: Child) -> list[int] | None:
        """Move counts and connections; return the processes that are connected, None if `following` counts elsewhere.

        Raises ProcessError; then the previous ledger has resumed.
        """
        sending, receiving = _make_pair(socket.SOCK_SEQPACKET)
        try:
            with sending, receiving:
                async with asyncio.timeout(HAND_OVER_SECONDS):
                    await _send(previous, HandOver(), sending)
                    sending.close()
                    reply = await following.request(TakeOverRequest(), HAND_OVER_SECONDS, [receiving.fileno()])
        except (ProcessError, TimeoutError) as error:
            reason = str(error) or f"not done within {HAND_OVER_SECONDS:g} s"
            following.problem = f"the previous ledger remains, since the new one could not take over: {reason}"
            following.kill()
            await following.process.wait()
            await previous.try_request(Resume())
            raise ProcessError(following.problem) from None
        except asyncio.CancelledError:
            following.kill()
            raise
        return reply.processes

    async def _end(self, ledger: Child) -> None:
        """Stop a ledger that answers no more, and wait until it has exited."""
        await ledger.stop()
        await asyncio.wait([ledger.process.exited], timeout=EXIT_SECONDS)
        ledger.kill()


async def _send(child: Child, request: Request[Done], sock: socket.socket) -> None:
    await child.request(request, descriptors=[sock.fileno()])


def _make_pair(kind: socket.SocketKind = socket.SOCK_STREAM) -> tuple[socket.socket, socket.socket]:
    """Raises ProcessError if there are no descriptors left."""
    try:
        return socket.socketpair(socket.AF_UNIX, kind)
    except OSError as error:
        raise ProcessError(f"the ledger cannot be connected to: {error.strerror}") from None
