"""Child processes: their exit is noticed, and nothing is left behind."""

import asyncio
import errno
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable

import pytest

from tlstunnel.backoff import Backoff
from tlstunnel.supervisor import ChildProcess, describe_exit, start_with_retries, wait_or_kill

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.fixture(params=["pidfd", "thread"], autouse=True)
def _way_of_watching(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with pidfds, and as on a system without them."""
    if request.param == "thread":

        def pidfd_open(pid: int, flags: int = 0) -> int:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(os, "pidfd_open", pidfd_open)


def _run(work: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        before = _descriptors()
        await work()
        assert _descriptors() == before

    asyncio.run(run())


@pytest.mark.parametrize(("code", "text"), [(0, "exited with status 0"), (3, "exited with status 3")])
def test_an_exit_is_noticed(code: int, text: str) -> None:
    async def work() -> None:
        child = ChildProcess.spawn([sys.executable, "-c", f"raise SystemExit({code})"], os.environ, ())
        assert await child.wait() == code
        assert describe_exit(code) == text
        child.kill()  # harmless by now

    _run(work)


@pytest.mark.parametrize("group", [False, True])
def test_a_process_that_is_killed(group: bool) -> None:
    async def work() -> None:
        child = ChildProcess.spawn(SLEEPER, os.environ, ())
        child.kill(group=group)
        assert describe_exit(await child.wait()) == "killed by SIGKILL"

    _run(work)


def test_a_process_that_was_started_elsewhere_is_watched_too() -> None:
    async def work() -> None:
        pid = os.posix_spawn(sys.executable, SLEEPER, os.environ)
        child = ChildProcess(pid)
        os.kill(pid, signal.SIGTERM)
        assert await child.wait() == -signal.SIGTERM

    _run(work)


def test_a_process_that_was_reaped_elsewhere() -> None:
    async def work() -> None:
        pid = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
        os.waitpid(pid, 0)
        assert await ChildProcess(pid).wait() is None
        assert describe_exit(None) == "reaped by another process"

    _run(work)


def test_a_wait_may_be_cancelled() -> None:
    async def work() -> None:
        child = ChildProcess.spawn(SLEEPER, os.environ, ())
        waiting = asyncio.ensure_future(child.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        child.kill()
        assert await child.wait() == -signal.SIGKILL

    _run(work)


def test_a_start_is_retried_until_it_succeeds() -> None:
    reported: list[tuple[str, float]] = []
    failures = ["one", "two", "three"]

    async def start() -> int:
        if failures:
            raise OSError(failures.pop(0))
        return 7

    async def work() -> None:
        backoff = Backoff(0.001, 0.002)
        result = await start_with_retries(
            start, backoff, lambda *args: reported.append((str(args[0]), args[1])), (OSError,)
        )
        assert result == 7

    _run(work)
    assert reported == [("one", 0.001), ("two", 0.002), ("three", 0.002)]


def test_waiting_without_a_loop() -> None:
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    wait_or_kill(pid, 60)
    stuck = os.posix_spawn(sys.executable, SLEEPER, os.environ)
    began = time.monotonic()
    wait_or_kill(stuck, 0.01)
    assert time.monotonic() - began < 30
    for one in (pid, stuck):
        with pytest.raises(ProcessLookupError):
            os.kill(one, 0)
    wait_or_kill(pid, 60)  # reaped already
