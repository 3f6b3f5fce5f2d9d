"""Waiting for an event or a deadline, for connections that have no tunnel yet.

Tested by tests/promises/test_slow_loris.py.
"""

import asyncio


class Wakeup:
    """Lets the task of a connection sleep until an event or its `deadline`, in the loop's time."""

    __slots__ = ("_future", "_loop", "deadline")

    def __init__(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        self._loop = loop
        self._future: asyncio.Future[None] | None = None
        self.deadline = deadline

    def fire(self) -> None:
        """Wake the task if it is asleep."""
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def expire(self) -> None:
        """Wake the task with a TimeoutError if it is asleep."""
        if self._future is not None and not self._future.done():
            self._future.set_exception(TimeoutError())

    async def wait(self) -> None:
        """Sleep until the next event. Raises TimeoutError at the deadline.

        Call it right after an operation would have blocked, without an await in between: the loop delivers events only
        while the task sleeps, so none is missed.
        """
        self._future = self._loop.create_future()
        await self._future

    async def sleep(self, seconds: float) -> None:
        """Sleep for `seconds` or until an event. Raises TimeoutError at the deadline."""
        timer = self._loop.call_later(seconds, self.fire)
        try:
            await self.wait()
        finally:
            timer.cancel()


class Deadlines:
    """The deadlines of all connections that have no tunnel yet, checked several times a second.

    A timer for each connection was set and cancelled five times per handshake, 24 us of 675 (docs/performance.md).
    `precision` is the time between two checks in seconds: a deadline expires at most that late.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, precision: float) -> None:
        self._loop = loop
        self._precision = precision
        self._all: set[Wakeup] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, wakeup: Wakeup) -> None:
        """Expire `wakeup` when its deadline, which may change, has passed, unless it is discarded before."""
        self._all.add(wakeup)
        if self._timer is None:
            self._timer = self._loop.call_later(self._precision, self._expire_due)

    def discard(self, wakeup: Wakeup) -> None:
        """Stop checking `wakeup`."""
        self._all.discard(wakeup)

    def _expire_due(self) -> None:
        now = self._loop.time()
        for wakeup in self._all:
            if now >= wakeup.deadline:
                wakeup.expire()
        self._timer = self._loop.call_later(self._precision, self._expire_due) if self._all else None
