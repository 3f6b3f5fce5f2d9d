"""Connects the serving processes to the ledger, and hands the counts of one ledger over to the next.

A connection is a socket pair: the ledger has one end, the process the other. At an upgrade the process keeps its end,
and the ledger's end moves on to the next ledger, together with the counts. The next ledger confirms that it has
everything before the previous one is stopped. If it does not, it is killed first, so that never two ledgers answer, and
the previous one resumes, with new connections if the killed one may have read from the others. A previous ledger
that does not respond is killed too, and its counts are lost.

Tested by tests/promises/test_shared_counts.py.
"""

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from tlstunnel.backoff import Backoff
from tlstunnel.errors import ProcessError
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.processes.children import Child, NotResponding, Role
from tlstunnel.processes.messages import Connect, Count, HandOver, LedgerLoad, LedgerStatus, Resume, Stop
from tlstunnel.processes.messages import TakeOver as TakeOverRequest

COUNTING_FORMAT = 3
"""The first format of the messages in which a process can be told where to count."""

START_SECONDS = 5.0
"""How long a process that starts waits for a ledger that starts too. Then it counts as it does without one."""

HAND_OVER_SECONDS = 5.0
"""How long a hand-over may take. Askers wait for 0.5 s, then they count as they do without a ledger."""

REPLY_SECONDS = 1.0
"""How long a ledger may take to reply to other requests. Who starts, or asks for the status, does not wait longer."""

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
        self._numbers = itertools.count(time.monotonic_ns())
        """For connections. Those of the previous program have lower ones."""
        self._connections: dict[Child, int] = {}
        """The number of each child's last connection."""
        self._reconnecting: dict[Child, int] = {}
        self._log = structlog.get_logger()

    @property
    def ledger(self) -> Child | None:
        """The ledger that answers, None if there is none."""
        ledger = self._ledger
        return None if ledger is None or ledger.exited else ledger

    def restore(self, ledger: Child) -> None:
        """Take over a ledger of the previous program. There are two if one was about to exit."""
        current = self._ledger
        if current is not None and not current.draining:
            self._run_in_background(self._end(ledger))
            return
        if current is not None:
            self._run_in_background(self._end(current))
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

    async def reconnect(self, child: Child, lost: int) -> None:
        """Connect a serving child again that has lost its connection, after a delay. Without a ledger, do nothing.

        `lost` is the number of the connection. For each there is one reconnection, and none if it was not the last.
        """
        if self._connections.get(child, lost) != lost or self._reconnecting.get(child) == lost:
            return
        self._reconnecting[child] = lost
        for kept in (self._delays, self._connections, self._reconnecting):
            for gone in [one for one in kept if one.exited]:
                del kept[gone]
        self._delays[child] = delay = RECONNECTS.after(self._delays.get(child, 0.0))
        await asyncio.sleep(delay)
        async with self._lock:
            if self.ledger is not None and not child.exited and self._connections.get(child, lost) == lost:
                with contextlib.suppress(ProcessError):
                    await self._connect(child)

    async def begin(self, ledger: Child) -> None:
        """Have `ledger`, which is ready, answer from now on, with the counts of the previous one if that still runs.

        Raises ProcessError if it cannot take over; it was killed then, and the previous one answers.
        """
        async with self._lock:
            previous = self.ledger
            connected: set[int] = set()
            if previous is not None:
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
            return await ledger.request(LedgerStatus(), REPLY_SECONDS)
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
                    await self.ledger.request(Connect(process=child.pid), REPLY_SECONDS, [theirs.fileno()])
            theirs.close()
            self._connections[child] = number = next(self._numbers)
            await child.request(Count(connection=number), descriptors=[ours.fileno()])

    async def _hand_over(self, previous: Child, following: Child) -> list[int] | None:
        """Move counts and connections; return the processes that are connected.

        None if `following` begins without counts: it counts elsewhere, or `previous` did not respond and was killed.
        Raises ProcessError if `following` could not take over; then the previous ledger has resumed.
        """
        sending, receiving = _make_pair(socket.SOCK_SEQPACKET)
        try:
            with sending, receiving:
                if not await self._send_counts(previous, sending):
                    previous.kill()
                    await previous.process.wait()
                    return None
                sending.close()
                reply = await following.request(TakeOverRequest(), HAND_OVER_SECONDS, [receiving.fileno()])
        except ProcessError as error:
            following.problem = f"the previous ledger remains, since the new one could not take over: {error}"
            has_exited = following.exited or following.link.closed
            following.kill()
            await following.process.wait()
            if has_exited or isinstance(error, NotResponding):  # it may have read from the connections
                await asyncio.gather(*(self._try_to_connect(child) for child in self._list_serving()))
            await previous.try_request(Resume())
            raise ProcessError(following.problem) from None
        except asyncio.CancelledError:
            following.kill()
            raise
        return reply.processes

    async def _send_counts(self, previous: Child, sock: socket.socket) -> bool:
        """Have `previous` send its counts over `sock`; return whether it has responded. Raises ProcessError."""
        try:
            await previous.request(HandOver(), HAND_OVER_SECONDS, [sock.fileno()])
        except NotResponding as error:
            if not previous.exited:
                self._log.warning(Event.LEDGER, process=previous.pid, reason=f"its counts are lost: {error}")
            return False
        except ProcessError:
            if not (previous.exited or previous.link.closed):
                raise
            return False
        return True

    async def _end(self, ledger: Child) -> None:
        """Stop a ledger that answers no more, and wait until it has exited."""
        with contextlib.suppress(ProcessError):
            await ledger.request(Stop(), REPLY_SECONDS)
        await asyncio.wait([ledger.process.exited], timeout=EXIT_SECONDS)
        ledger.kill()


def _make_pair(kind: socket.SocketKind = socket.SOCK_STREAM) -> tuple[socket.socket, socket.socket]:
    """Raises ProcessError if there are no descriptors left."""
    try:
        return socket.socketpair(socket.AF_UNIX, kind)
    except OSError as error:
        raise ProcessError(f"the ledger cannot be connected to: {error.strerror}") from None
