"""The thread in which edge workers run, on an event loop of their own.

On the loop of the tunnels, one worker that sleeps or computes would hold every tunnel of the process, and its own
deadline with them. Here it holds other workers' requests, which are answered in time all the same: their deadline is
kept on the loop of the tunnels. What it costs is in docs/performance.md.
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

import structlog

from tlstunnel.escaping import printable
from tlstunnel.journal.events import Event
from tlstunnel.sockets.readiness import IN, TunnelLoop

SWITCH_INTERVAL = 0.0005
"""Seconds that a worker which only computes may hold Python's lock while a tunnel waits for it: Python's 5 ms would
leave tunnels a tenth of their messages (`tlstunnel.service` has the measurement)."""

BLOCKED_SECONDS = 0.25
"""Seconds without a turn of the workers' loop after which whoever holds it is named."""

CHECK_SECONDS = 0.1
"""How often that is looked at while a request is with a worker."""

GIL_CPU_SECONDS = CHECK_SECONDS + BLOCKED_SECONDS
"""Seconds of computing, without a look of ours between, after which the stacks are written down by a signal's handler
in C: who computes in C, such as a regular expression, holds Python's lock all the time, and when it is over the stack
is another. The timer costs two system calls, and none while nobody waits for a worker."""

MAX_STACK_BYTES = 1 << 20
"""Bytes of them that are read; faulthandler writes 100 calls of each of 100 threads."""

_STACK_LINE = re.compile(rb'  File "(?P<file>.*)", line (?P<line>[0-9]+) in .*')

STOP_SECONDS = 1.0
"""What is waited for the thread's end. A worker that blocks it then goes with the process."""

T = TypeVar("T")


class TooLate(Exception):
    """What was to be done in the workers' thread was not done in time."""


class WatchedWorker(Protocol):
    """What can be named where it stands."""

    reference: str

    @property
    def file(self) -> str:
        """Where its code is."""

    def owns_frame(self, frame: FrameType) -> bool:
        """Whether `frame` is of one of its functions."""


class _CallQueue:
    """Calls from the thread of one loop into that of another, all of a turn at once.

    Each by itself, with its own system call, was picked up before the turn that made it was over: two changes of thread
    a handshake, where now there are two for all of a turn (docs/performance.md). One that is `alone` goes at once.
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
            # Called from within the loop's wait, so that what it makes ready is done in the same turn.
            there.readiness.register(self._fd, IN, lambda _: self._deliver())
        else:
            there.add_reader(self._fd, self._deliver)

    def send(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call this there, in turn. It must not raise."""
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
        """Watch for no more; to be called where the calls arrive, or once that loop is closed."""
        fd, self._fd = self._fd, -1  # before its number is another's
        if fd < 0:
            return
        if not self._there.is_closed():
            if isinstance(self._there, TunnelLoop):
                self._there.readiness.unregister(fd)
            else:
                self._there.remove_reader(fd)
        os.close(fd)


class _Stacks:
    """The stacks of all threads as they were when a signal came, SIGVTALRM: nobody else here has a use for that one.

    One a process, for good: without its handler the signal would end the process.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("tlstunnel-stacks", os.MFD_CLOEXEC)
        faulthandler.register(signal.SIGVTALRM, self._fd, all_threads=True)

    def arm(self) -> None:
        """Write them down after `GIL_CPU_SECONDS` seconds of computing from now on."""
        signal.setitimer(signal.ITIMER_VIRTUAL, GIL_CPU_SECONDS)

    def disarm(self) -> None:
        """Do not."""
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def take(self, thread: int) -> list[tuple[str, int]]:
        """The file and line of each call of a thread, innermost first, where that was written down; forget them all."""
        written = os.pread(self._fd, MAX_STACK_BYTES, 0)
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        # "Thread 0x...", or "Current thread 0x..." for the one that had the signal.
        _, _, stack = written.rpartition(b"hread 0x%016x" % thread)
        lines = (_STACK_LINE.fullmatch(line) for line in stack.partition(b"\n\n")[0].splitlines())
        return [(os.fsdecode(line["file"]), int(line["line"])) for line in lines if line]


_stacks = cache(_Stacks)


class EdgeThread:
    """Runs coroutines on its own loop, and notices when one of them holds it. Made and asked on the tunnels' loop."""

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
        """Call a function there; to be called on the tunnels' loop."""
        self.send_back = self._to_tunnels.send
        """Call a function on the tunnels' loop; to be called there."""
        self._thread = threading.Thread(target=self._run, name="edge workers", daemon=True)
        self._pinged_at = self._checked_at = 0.0
        self._stacks = _stacks()
        self._ping_pending = False
        self._blocked: tuple[float, str] | None = None
        self._ended = self._stopped = False
        self.late = 0
        """Requests that were answered without their worker, which still has them."""
        self._timer: asyncio.TimerHandle | None = None
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL))
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        while not self._ended:
            try:
                self.loop.run_forever()
            except (SystemExit, KeyboardInterrupt) as error:  # of a task that a worker left behind
                structlog.get_logger().error(Event.EDGE_TASK_EXITED, reason=type(error).__name__)
        self.loop.close()

    def _is_alone(self) -> bool:
        return self._watchers <= 1

    @property
    def usable(self) -> bool:
        """Whether it has not been told to end."""
        return not self._stopped

    async def run(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        """Have this done there, within so many seconds. Raises what it raises; TooLate, also after the end."""
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
        """Whether its loop has a turn within so many seconds."""
        try:
            await self.run(asyncio.sleep(0), seconds)
        except TooLate:
            return False
        return True

    async def stop(self) -> None:
        """End it: what runs there is cancelled. Whoever holds it is left alone; it ends then, or with the process."""
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
        # What is under way there may take as long as it likes; the process does not wait for it.
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._ended = True
        self.loop.stop()

    # The watchdog: only as long as somebody waits for what runs there, so that an idle tunnel costs nothing.

    def watch(self) -> None:
        """Look after it until `unwatch`."""
        self._watchers += 1
        if self._timer is None:
            self._checked_at = time.monotonic()
            self._stacks.arm()
            self._timer = self._here.call_later(CHECK_SECONDS, self._check)

    def unwatch(self) -> None:
        """One fewer waits for it."""
        self._watchers -= 1

    def _check(self) -> None:
        self._timer = None
        now = time.monotonic()
        if (stood := now - self._checked_at - CHECK_SECONDS) >= BLOCKED_SECONDS:
            self._warn_gil_held(stood)
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
        hint = "await what waits, and compute elsewhere: asyncio.to_thread"
        _warn(Event.WORKER_BLOCKING, worker, file, line, seconds, hint)

    def _warn_gil_held(self, seconds: float) -> None:
        """No turn here either: somebody held Python's lock."""
        stack = self._stacks.take(self._thread.ident or 0)
        found = next(((one, file, line) for file, line in stack for one in self.workers if one.file == file), None)
        if found is not None:
            worker, file, line = found
            hint = "every tunnel waited: it computes in C with Python's lock; another library, or another process"
            _warn(Event.WORKER_HOLDS_GIL, worker.reference, file, line, seconds, hint)

    @property
    def place(self) -> str:
        """Where it stands, a worker's name and its line; "" where that is in none."""
        worker, file, line = self._locate()
        return f"{worker} {file}:{line}" if worker else ""

    def _locate(self) -> tuple[str, str, int]:
        """The worker that stands on the stack, and file and line, of its own where that is on the stack too."""
        stack = list(_walk_stack(sys._current_frames().get(self._thread.ident or 0)))
        if not stack:
            return "", "", 0
        # The innermost call of a worker's file, also in a task of its own; without one, whatever is called.
        files = {one.file for one in self.workers}
        own = next((frame for frame in stack if frame.f_code.co_filename in files), stack[0])
        file = own.f_code.co_filename
        # Of several of one file, the one whose function is under way.
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
