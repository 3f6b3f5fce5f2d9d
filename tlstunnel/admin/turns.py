"""Whose turn it is to read: everybody gets two commands at once carried out, and others of theirs wait.

Serving processes do what is asked, beside their tunnels. So nobody can keep them busy: after a command, there is a
pause as long as it took. Who may read without a token shares the turns with all others who do. What all ask for alike
is asked for once.

Tested by tests/unit/test_admin_turns.py.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from tlstunnel.admin.checks import Unacceptable

MOST_AT_ONCE = 2
"""Commands of one reader that are carried out at once: while one waits for a process that hangs, another can go on."""

MOST_WAITING = 32
"""Requests of one reader that may wait. The dashboard makes ten when it is opened."""

LONGEST_PAUSE = 1.0
"""Seconds."""


T = TypeVar("T")


class Recent(Generic[T]):
    """What `make` has made, which may be `seconds` old, or as old as it took to make it if that is more.

    Whoever asks while it is being made gets the same one, or the same error.
    """

    def __init__(self, make: Callable[[], Awaitable[T]], seconds: float) -> None:
        self._make = make
        self._seconds = seconds
        self._making: asyncio.Future[T] | None = None
        self._holds_until = 0.0

    async def get(self) -> T:
        """Return it. Raises what `make` raises."""
        if self._making is None or (self._making.done() and asyncio.get_running_loop().time() >= self._holds_until):
            self._making = asyncio.ensure_future(self._make_one())
        return await asyncio.shield(self._making)

    async def close(self) -> None:
        """Stop making it."""
        if self._making is not None:
            self._making.cancel()
            await asyncio.gather(self._making, return_exceptions=True)

    async def _make_one(self) -> T:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            return await self._make()
        finally:
            now = loop.time()
            self._holds_until = now + max(self._seconds, now - began)


class _Queue:
    """What one reader has asked for: how many commands are carried out, or have their pause, and who waits."""

    def __init__(self) -> None:
        self.busy = 0
        self.waiting: deque[asyncio.Future[None]] = deque()


class Turns:
    """Gives turns to everybody who asks, by who it is."""

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}

    def __len__(self) -> int:
        return len(self._queues)

    @asynccontextmanager
    async def take(self, who: str, is_gone: Callable[[], bool]) -> AsyncIterator[None]:
        """Wait for a turn, and have it inside. `is_gone` says whether nobody waits for the response any more.

        Raises Unacceptable if too many wait, or nobody waits for the response.
        """
        queue = self._queues.setdefault(who, _Queue())
        if queue.busy < MOST_AT_ONCE:
            queue.busy += 1
        elif len(queue.waiting) < MOST_WAITING:
            await self._wait(who, queue)
        else:
            raise Unacceptable(503, "too many requests at once", headers={"Retry-After": "1"})
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            if is_gone():
                raise Unacceptable(503, "the client has left")
            yield
        finally:
            pause = min(loop.time() - began, LONGEST_PAUSE)
            loop.call_later(pause, self._end, who, queue)

    async def _wait(self, who: str, queue: _Queue) -> None:
        turn = asyncio.get_running_loop().create_future()
        queue.waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._end(who, queue)
            raise

    def _end(self, who: str, queue: _Queue) -> None:
        """Pass a turn on."""
        while queue.waiting:
            turn = queue.waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        queue.busy -= 1
        if not queue.busy:
            self._queues.pop(who, None)
