"""Child processes: starts them, watches them with a pidfd, kills and reaps them, and retries failed starts.

A pidfd (pidfd_open(2)) becomes readable when its process exits. It needs no SIGCHLD handler, also works for children
that the previous program has started, and a signal sent through it cannot reach another process that has got the same
process ID since. Where the call does not exist (gVisor, valgrind, some seccomp filters), a thread waits for the
child instead.
"""

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Self, TypeVar

from tlstunnel.backoff import Backoff

T = TypeVar("T")

_NO_PIDFD = frozenset({errno.ENOSYS, errno.EPERM})

_POLL_SECONDS = 0.005


class ChildProcess:
    """A child of this process, watched by the running loop. The result of `exited` is what `wait` returns."""

    def __init__(self, pid: int, popen: "subprocess.Popen[bytes] | None" = None) -> None:
        """Watch the child `pid`. Raises OSError if there are no descriptors left."""
        self.pid = pid
        self._popen = popen
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int | None] = self._loop.create_future()
        self._pidfd = -1
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # already reaped
            self.exited.set_result(None)
        except OSError as error:
            if error.errno not in _NO_PIDFD:
                raise
            threading.Thread(target=self._wait_in_thread, name=f"wait for {pid}", daemon=True).start()
        else:
            self._loop.add_reader(self._pidfd, self._reap)

    @classmethod
    def spawn(cls, command: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int]) -> Self:
        """Start a process in its own session, with only these descriptors and no standard streams. Raises OSError."""
        popen = subprocess.Popen(  # noqa: S603 - our own commands
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=descriptors,
            start_new_session=True,
        )
        try:
            return cls(popen.pid, popen)
        except OSError:
            popen.kill()
            popen.wait()
            raise

    async def wait(self) -> int | None:
        """Wait until it has exited; return its exit code, negative for a signal, None if it was reaped elsewhere."""
        return await asyncio.shield(self.exited)

    def kill(self, *, group: bool = False) -> None:
        """Kill it; with `group`, all processes of the group that it leads."""
        if not group:
            self.send_signal(signal.SIGKILL)
        elif not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # not reaped yet, so the ID is still its own

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has exited."""
        if self.exited.done():
            return
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd < 0:
                os.kill(self.pid, number)
            else:
                signal.pidfd_send_signal(self._pidfd, number)

    def _reap(self) -> None:
        code: int | None = None
        with contextlib.suppress(ChildProcessError):
            _, status = os.waitpid(self.pid, 0)  # does not block, because the pidfd is readable
            code = os.waitstatus_to_exitcode(status)
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._set_exited(code)

    def _wait_in_thread(self) -> None:
        code: int | None = None
        with contextlib.suppress(ChildProcessError):
            _, status = os.waitpid(self.pid, 0)
            code = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nothing waits for it
            self._loop.call_soon_threadsafe(self._set_exited, code)

    def _set_exited(self, code: int | None) -> None:
        if self._popen is not None:
            self._popen.returncode = code or 0
        self.exited.set_result(code)


def describe_exit(code: int | None) -> str:
    """Describe how a process ended. `code` is what `ChildProcess.wait` returned."""
    if code is None:
        return "reaped by another process"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


async def start_with_retries(
    start: Callable[[], Awaitable[T]],
    backoff: Backoff,
    report: Callable[[Exception, float], None],
    errors: tuple[type[Exception], ...],
) -> T:
    """Call `start` until it succeeds, and return its result.

    After one of `errors`, `report` is called with it and with the seconds until the next attempt.
    """
    delay = 0.0
    while True:
        try:
            return await start()
        except errors as error:
            delay = backoff.after(delay)
            report(error, delay)
        await asyncio.sleep(delay)


def wait_or_kill(pid: int, seconds: float) -> None:
    """Wait for a child's exit, without a loop, and kill it after so many seconds."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):  # reaped by someone else
        deadline = time.monotonic() + seconds
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() >= deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return
            time.sleep(_POLL_SECONDS)
