"""The thread in which edge workers run, on an event loop of its own, and its watchdog.

On the loop of the tunnels, a worker that sleeps or computes would block every tunnel of the process, and its own
deadline too. On a loop of their own, workers can only block each other's requests, whose deadlines are kept on the loop
of the tunnels. docs/performance.md has the cost.
"""

import asyncio
import contextlib
import faulthandler
import linecache
import os
import re
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import FrameType
from typing import Any, Protocol, TypeVar

from tlstunnel.escaping import printable
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.sockets.readiness import IN, TunnelLoop

SWITCH_INTERVAL = 0.0005
"""Seconds that a worker may compute in Python before the GIL goes to a tunnel that waits for it. With Python's default
of 5 ms, tunnels would move a tenth of their messages (docs/performance.md has the measurement)."""

BLOCKED_SECONDS = 0.25
"""Seconds without an iteration of the workers' loop after which the worker that blocks it is logged."""

CHECK_SECONDS = 0.1
"""Seconds between two checks of the loop while a call runs."""

GIL_CPU_SECONDS = CHECK_SECONDS + BLOCKED_SECONDS
"""Seconds of CPU time without a check in between, after which a signal handler in C records the stacks of all threads.
C code that keeps the GIL, such as a regular expression, lets no check run, and once it returns the stack is a different
one. The timer costs two system calls a check, and none while no call runs."""

MAX_STACK_BYTES = 1 << 20
"""How much of the recorded stacks is read. faulthandler writes up to 100 frames of each of 100 threads."""

_STACK_LINE = re.compile(rb'  File "(?P<file>.*)", line (?P<line>[0-9]+) in .*')

STOP_SECONDS = 1.0
"""How long to wait for the thread to end. A thread that is still blocked then ends with the process."""

T = TypeVar("T")


class TooLate(Exception):
    """A coroutine did not finish in the workers' thread in time."""


class WatchedWorker(Protocol):
    """What the watchdog needs to know about a worker to name it."""

    reference: str

    @property
    def file(self) -> str:
        """The path of its source; "" if unknown."""

    def owns_frame(self, frame: FrameType) -> bool:
        """Return whether `frame` runs one of its functions."""


class _CallQueue:
    """Calls from the thread of one loop, `here`, into that of another, `there`, sent together once per iteration.

    If each call had its own system call, the other thread would wake up before the iteration is over: two thread
    switches per handshake, instead of two per iteration (docs/performance.md). If `alone()`, a call is sent at once.
    """

    def __init__(
        self, here: asyncio.AbstractEventLoop, there: asyncio.AbstractEventLoop, alone: Callable[[], bool]
    ) -> None:
        self._here = here
        self._there = there
        self._alone = alone
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._going = False
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        if isinstance(there, TunnelLoop):
            # Called from within the loop's wait, so that callbacks it schedules run in the same iteration.
            there.readiness.register(self._fd, IN, lambda _: self._deliver())
        else:
            there.add_reader(self._fd, self._deliver)

    def send(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call `function` on the other loop. Calls stay in order. It must not raise."""
        self._calls.append((function, arguments))
        if self._alone():
            self._go()
        elif not self._going:
            self._going = True
            self._here.call_soon(self._go)

    def _go(self) -> None:
        self._going = False
        try:
            os.eventfd_write(self._fd, 1)
        except (OSError, ValueError):  # closed, here or in the other thread: there is nothing left to deliver to
            self._calls.clear()

    def _deliver(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._fd)
        while self._calls:
            function, arguments = self._calls.popleft()
            function(*arguments)

    def close(self) -> None:
        """Receive no more calls. Call this on the receiving loop, or once that loop is closed."""
        fd, self._fd = self._fd, -1  # before the number is used again
        if fd < 0:
            return
        if not self._there.is_closed():
            if isinstance(self._there, TunnelLoop):
                self._there.readiness.unregister(fd)
            else:
                self._there.remove_reader(fd)
        os.close(fd)


class _Stacks:
    """Records the stacks of all threads when SIGVTALRM arrives, a signal that nothing else in the program uses.

    There is one per process, and it is never closed: without its handler the signal would end the process.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("tlstunnel-stacks", os.MFD_CLOEXEC)
        faulthandler.register(signal.SIGVTALRM, self._fd, all_threads=True)

    def arm(self) -> None:
        """Record the stacks after `GIL_CPU_SECONDS` of CPU time from now on."""
        signal.setitimer(signal.ITIMER_VIRTUAL, GIL_CPU_SECONDS)

    def disarm(self) -> None:
        """Stop the timer."""
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def take(self, thread: int) -> list[tuple[str, int]]:
        """Return file and line of each recorded frame of `thread`, innermost first, and discard the recording."""
        written = os.pread(self._fd, MAX_STACK_BYTES, 0)
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        # "Thread 0x...", or "Current thread 0x..." for the one that received the signal.
        _, _, stack = written.rpartition(b"hread 0x%016x" % thread)
        lines = (_STACK_LINE.fullmatch(line) for line in stack.partition(b"\n\n")[0].splitlines())
        return [(os.fsdecode(line["file"]), int(line["line"])) for line in lines if line]


_stacks = cache(_Stacks)


class EdgeThread:
    """Runs coroutines on a loop of its own, and notices when one of them blocks it.

    Create and use it on the tunnels' loop.
    """

    def __init__(self) -> None:
        self.workers: weakref.WeakSet[WatchedWorker] = weakref.WeakSet()
        self._here = asyncio.get_running_loop()
        self._watchers = 0
        self.loop = TunnelLoop()
        self._executor = ThreadPoolExecutor(thread_name_prefix="edge worker")
        self.loop.set_default_executor(self._executor)
        self._to_workers = _CallQueue(self._here, self.loop, self._is_alone)
        self._to_tunnels = _CallQueue(self.loop, self._here, self._is_alone)
        self.send = self._to_workers.send
        """Call a function on the workers' loop. Use it on the tunnels' loop."""
        self.send_back = self._to_tunnels.send
        """Call a function on the tunnels' loop. Use it on the workers' loop."""
        self._thread = threading.Thread(target=self._run, name="edge workers", daemon=True)
        self._pinged_at = self._checked_at = 0.0
        self._stacks = _stacks()
        self._ping_pending = False
        self._blocked: tuple[float, str] | None = None
        self._ended = self._stopped = False
        self._shutdown_task: asyncio.Task[None] | None = None
        self.late = 0
        """Calls that were given up but still run."""
        self._timer: asyncio.TimerHandle | None = None
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL))
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        while not self._ended:
            try:
                self.loop.run_forever()
            except (SystemExit, KeyboardInterrupt) as error:  # raised by a task that a worker left running
                structlog.get_logger().error(Event.EDGE_TASK_EXITED, reason=type(error).__name__)
        self.loop.close()

    def _is_alone(self) -> bool:
        return self._watchers <= 1

    @property
    def usable(self) -> bool:
        """Whether it runs and `stop` has not been called."""
        return not self._stopped

    async def run(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        """Run `work` on the workers' loop and return its result.

        Raises what it raises, and TooLate after `seconds` or if the thread has been stopped.
        """
        if self._stopped:
            work.close()
            raise TooLate
        self.watch()
        future = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))
        try:
            await asyncio.wait([future], timeout=seconds)
            if not future.done():
                raise TooLate
            return future.result()
        finally:
            self.unwatch()
            future.cancel()

    async def responds(self, seconds: float) -> bool:
        """Return whether its loop runs an iteration within `seconds`."""
        try:
            await self.run(asyncio.sleep(0), seconds)
        except TooLate:
            return False
        return True

    async def stop(self) -> None:
        """Cancel what runs there, and end the thread. A thread that is blocked ends once it is released."""
        if self._timer is not None:
            self._timer.cancel()
        self._stacks.disarm()
        if not self._stopped:
            self._stopped = True
            self.send(self._start_shutdown)
        await asyncio.to_thread(self._thread.join, STOP_SECONDS)
        if not self._thread.is_alive():
            self._to_workers.close()
            self._to_tunnels.close()

    def _start_shutdown(self) -> None:
        self._shutdown_task = self.loop.create_task(self._shut_down())

    async def _shut_down(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_SECONDS / 2)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS / 4):
                await self.loop.shutdown_asyncgens()
        # The process does not wait for what runs in worker threads.
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._ended = True
        self.loop.stop()

    # The watchdog. It runs only while a call waits for its result, so that an idle tunnel costs nothing.

    def watch(self) -> None:
        """Check the loop until `unwatch`. Calls of both are counted."""
        self._watchers += 1
        if self._timer is None:
            self._checked_at = time.monotonic()
            self._stacks.arm()
            self._timer = self._here.call_later(CHECK_SECONDS, self._check)

    def unwatch(self) -> None:
        """Undo one `watch`."""
        self._watchers -= 1

    def _check(self) -> None:
        self._timer = None
        now = time.monotonic()
        if (delay := now - self._checked_at - CHECK_SECONDS) >= BLOCKED_SECONDS:
            self._warn_gil_held(delay)
        self._checked_at = now
        if not self._ping_pending:
            if not self._watchers:
                self._stacks.disarm()
                return
            self._ping_pending, self._pinged_at = True, now
            self.send(self.send_back, self._receive_pong)
        if self._blocked is None and now - self._pinged_at >= BLOCKED_SECONDS:
            self._warn_blocking(now - self._pinged_at)
        self._stacks.arm()
        self._timer = self._here.call_later(CHECK_SECONDS, self._check)

    def _receive_pong(self) -> None:
        self._ping_pending = False
        if self._blocked is not None:
            (since, worker), self._blocked = self._blocked, None
            structlog.get_logger().warning(
                Event.WORKER_RESUMED, worker=worker, seconds=round(time.monotonic() - since, 2)
            )

    def _warn_blocking(self, seconds: float) -> None:
        worker, file, line = self._locate()
        self._blocked = time.monotonic() - seconds, worker
        hint = "await I/O instead of blocking; move heavy work to asyncio.to_thread"
        _warn(Event.WORKER_BLOCKING, worker, file, line, seconds, hint)

    def _warn_gil_held(self, seconds: float) -> None:
        """Log the worker that held the GIL: this loop did not run either."""
        stack = self._stacks.take(self._thread.ident or 0)
        found = next(((one, file, line) for file, line in stack for one in self.workers if one.file == file), None)
        if found is not None:
            worker, file, line = found
            hint = "every tunnel waited for a C function that held the GIL; use another library or another process"
            _warn(Event.WORKER_HOLDS_GIL, worker.reference, file, line, seconds, hint)

    @property
    def place(self) -> str:
        """The worker and the line that it executes now; "" if it executes no worker."""
        worker, file, line = self._locate()
        return f"{worker} {file}:{line}" if worker else ""

    def _locate(self) -> tuple[str, str, int]:
        """Return the worker that is on the stack, and file and line, in its own file if that is on the stack too."""
        stack = list(_walk_stack(sys._current_frames().get(self._thread.ident or 0)))
        if not stack:
            return "", "", 0
        # The innermost frame in a worker's file, also in a task that it created; without one, the innermost frame.
        files = {one.file for one in self.workers}
        own = next((frame for frame in stack if frame.f_code.co_filename in files), stack[0])
        file = own.f_code.co_filename
        # If several workers share the file, the one whose function is running.
        workers = sorted((one for one in self.workers if one.file == file), key=lambda one: one.reference)
        called = [one for one in workers if any(map(one.owns_frame, stack))]
        named = [one.reference for one in (*called, *workers)]
        return named[0] if named else "", file, own.f_lineno


def _warn(event: Event, worker: str, file: str, line: int, seconds: float, hint: str) -> None:  # noqa: PLR0913, PLR0917
    linecache.checkcache(file)
    code = printable(linecache.getline(file, line).strip())
    place = f"{file}:{line}"
    structlog.get_logger().warning(event, worker=worker, line=place, code=code, seconds=round(seconds, 2), hint=hint)


def _walk_stack(innermost: FrameType | None) -> Iterable[FrameType]:
    while innermost is not None:
        yield innermost
        innermost = innermost.f_back
