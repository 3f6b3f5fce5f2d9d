"""What a connection that has no tunnel yet waits on: an event, or its deadline."""

import asyncio


class Wakeup:
    """What the one task of a connection sleeps on, until an event or its `deadline` (of the loop's time)."""

    __slots__ = ("_future", "_loop", "deadline")

    def __init__(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        self._loop = loop
        self._future: asyncio.Future[None] | None = None
        self.deadline = deadline

    def fire(self) -> None:
        """Wake the task, if it sleeps."""
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def expire(self) -> None:
        """Wake the task with a TimeoutError, if it sleeps."""
        if self._future is not None and not self._future.done():
            self._future.set_exception(TimeoutError())

    async def wait(self) -> None:
        """Sleep until the next event. Raises TimeoutError at the deadline.

        Call it right after an operation said that it would block, with no await between: events are delivered only
        while the task sleeps, so none is missed.
        """
        self._future = self._loop.create_future()
        await self._future

    async def sleep(self, seconds: float) -> None:
        """Sleep for so long, or until an event. Raises TimeoutError at the deadline."""
        timer = self._loop.call_later(seconds, self.fire)
        try:
            await self.wait()
        finally:
            timer.cancel()


class Deadlines:
    """The deadlines of the connections that have no tunnel yet, looked through several times a second.

    A timer for each would be set and cancelled five times a handshake; that cost 24 us of 675 (docs/performance.md).
    `precision` is the time between two looks, seconds: a deadline is at most that late.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, precision: float) -> None:
        self._loop = loop
        self._precision = precision
        self._all: set[Wakeup] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, wakeup: Wakeup) -> None:
        """Expire `wakeup` at its deadline, whatever that is by then, until it is discarded."""
        self._all.add(wakeup)
        if self._timer is None:
            self._timer = self._loop.call_later(self._precision, self._expire_due)

    def discard(self, wakeup: Wakeup) -> None:
        """Forget `wakeup`."""
        self._all.discard(wakeup)

    def _expire_due(self) -> None:
        now = self._loop.time()
        for wakeup in self._all:
            if now >= wakeup.deadline:
                wakeup.expire()
        self._timer = self._loop.call_later(self._precision, self._expire_due) if self._all else None
