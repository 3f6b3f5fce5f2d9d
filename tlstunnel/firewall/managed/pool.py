"""The pool of helpers. Requests wait in a bounded queue, and each helper evaluates one at a time.

Nothing waits for libmodsecurity longer than an evaluation's deadline, which begins when a helper gets the request.
"""

import asyncio
import enum
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from tlstunnel.backoff import Backoff
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.managed.helper import EVALUATIONS
from tlstunnel.firewall.managed.messages import (
    END_OF_RULES,
    MAX_PACKET,
    Evaluation,
    EvaluationRequest,
    EvaluationResult,
    FromHelper,
    Ready,
    RuleSet,
    RulesLoaded,
    Subject,
)
from tlstunnel.program import build_helper_environment, build_module_command
from tlstunnel.supervisor import ChildProcess, describe_exit, start_with_retries

MAX_WAIT = 1.0
"""Seconds that a request waits for a helper. A full queue of 256 takes 0.4 s, and so does restarting a helper."""

LOAD_TIMEOUT = 30.0
"""Seconds for starting a helper and loading its rules, which usually take 0.2 each."""

CHILD_TIMEOUT = 2.0
"""Seconds for a helper to fork its next child, which usually takes 0.002. After that the helper itself is killed."""

RESTARTS = Backoff(first=0.1, longest=10.0)
"""The waits between attempts to restart a helper."""


class Failure(enum.Enum):
    """Why a request was not evaluated."""

    FULL = "queue full"
    WAITED = "waited too long"
    LATE = "late"
    DIED = "helper died"
    CLOSED = "closed"


@dataclass(slots=True, eq=False)
class _Job:
    rule_set: int
    subject: Subject
    deadline: float
    future: "asyncio.Future[Evaluation | Failure]"
    timer: asyncio.TimerHandle | None = None

    def end(self, result: Evaluation | Failure) -> None:
        if self.timer:
            self.timer.cancel()
        if not self.future.done():
            self.future.set_result(result)


class HelperPool:
    """A number of helpers (`processes`) that evaluate requests with `rule_sets`. At most `queue` requests wait.

    `log` is called with a sentence when a helper is restarted. A child is replaced after `evaluations`.
    """

    def __init__(
        self,
        rule_sets: Sequence[RuleSet],
        processes: int = 1,
        queue: int = 256,
        *,
        log: Callable[[str], None] = lambda _: None,
        evaluations: int = EVALUATIONS,
    ) -> None:
        self.log = log
        self.evaluations = evaluations
        self.rule_sets = tuple({rule_set.name: rule_set for rule_set in rule_sets}.values())
        self._numbers = {rule_set.name: number for number, rule_set in enumerate(self.rule_sets)}
        self._queue: deque[_Job] = deque()
        self._max_waiting = queue
        self._helpers = [_Helper(self) for _ in range(processes)]
        self._closed = True

    async def start(self) -> None:
        """Start the helpers and wait until all have loaded the rules. Raises ConfigurationError if one cannot."""
        self._closed = False
        starts = [asyncio.ensure_future(helper.start()) for helper in self._helpers]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.wait(starts)
            await self.close()
            raise

    async def close(self) -> None:
        """Kill the helpers, even during an evaluation, and wait for their processes."""
        self._closed = True
        while self._queue:
            self._queue.popleft().end(Failure.CLOSED)
        await asyncio.gather(*(helper.close() for helper in self._helpers))

    async def evaluate(self, rule_set: str, subject: Subject, deadline: float) -> Evaluation | Failure:
        """Evaluate a subject with the rule set of that name, in at most `deadline` seconds once it has begun.

        Returns within `MAX_WAIT` plus `deadline`, whatever the subject is and whatever the helpers do.
        """
        if self._closed:
            return Failure.CLOSED
        if len(self._queue) >= self._max_waiting:
            return Failure.FULL
        loop = asyncio.get_running_loop()
        job = _Job(self._numbers[rule_set], subject, deadline, loop.create_future())
        self._queue.append(job)
        self.dispatch()
        if job.timer is None and not job.future.done():
            job.timer = loop.call_later(MAX_WAIT, self._on_wait_over, job)
        try:
            return await job.future
        except asyncio.CancelledError:
            self._forget(job)
            raise

    def dispatch(self) -> None:
        """Send waiting requests to idle helpers."""
        for helper in self._helpers:
            while self._queue and helper.idle:
                helper.send(self._queue.popleft())

    def _on_wait_over(self, job: _Job) -> None:
        self._forget(job)
        job.end(Failure.WAITED)

    def _forget(self, job: _Job) -> None:
        with suppress(ValueError):  # it was sent to a helper
            self._queue.remove(job)
            if job.timer:
                job.timer.cancel()


@dataclass(slots=True, eq=False)
class _Helper:
    """One helper process and its socket. `child` is the process that evaluates, 0 while there is none."""

    pool: HelperPool
    child: int = 0
    _process: ChildProcess | None = None
    _socket: socket.socket | None = None
    _pidfd: int = -1
    _job: _Job | None = None
    _number: int = 0
    _timer: asyncio.TimerHandle | None = None
    _loaded: "asyncio.Future[None] | None" = None
    _restart_task: "asyncio.Task[None] | None" = None
    _decoder: "msgspec.msgpack.Decoder[FromHelper]" = field(default_factory=lambda: msgspec.msgpack.Decoder(FromHelper))

    @property
    def idle(self) -> bool:
        return self.child != 0 and self._job is None

    async def start(self) -> None:
        """Start the process and wait until it is ready. If it fails, kill it and raise ConfigurationError."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._socket = ours
        self._loaded = loop.create_future()
        with theirs:
            arguments = (str(theirs.fileno()), str(os.getpid()), str(self.pool.evaluations))
            # Without standard error, to which C++ writes when it aborts: that would not be a valid line of the log.
            self._process = ChildProcess.spawn(
                build_module_command("tlstunnel.firewall.managed.helper", *arguments),
                build_helper_environment(),
                (theirs.fileno(),),
            )
        try:
            async with asyncio.timeout(LOAD_TIMEOUT):
                for rule_set in self.pool.rule_sets:
                    await loop.sock_sendall(ours, msgspec.msgpack.encode(rule_set))
                await loop.sock_sendall(ours, END_OF_RULES)
                loop.add_reader(ours, self._on_readable)
                await self._loaded
        except TimeoutError:
            await self._kill()
            raise ConfigurationError(
                f"a helper for managed rules did not load the rules within {LOAD_TIMEOUT:.0f} s"
            ) from None
        except OSError:
            raise ConfigurationError(
                f"a helper for managed rules exited during its start: {await self._kill()}"
            ) from None
        except BaseException:
            await self._kill()
            raise

    async def close(self) -> None:
        if self._restart_task:
            self._restart_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._restart_task
        await self._kill()
        self._fail(Failure.CLOSED)

    def send(self, job: _Job) -> None:
        """Send a request. Its deadline begins now."""
        assert self._socket is not None
        if job.timer:
            job.timer.cancel()
        self._job = job
        self._number += 1
        request = EvaluationRequest(self._number, job.rule_set, job.subject)
        job.timer = asyncio.get_running_loop().call_later(job.deadline, self._on_deadline)
        try:
            self._socket.send(msgspec.msgpack.encode(request))
        except OSError:  # whether it exited is found by reading
            self._fail(Failure.DIED)
            self._on_gone("its socket accepts no data")

    def _on_readable(self) -> None:
        assert self._socket is not None
        try:
            packet = self._socket.recv(MAX_PACKET)
            message = self._decoder.decode(packet) if packet else None
        except BlockingIOError:
            return
        except (OSError, msgspec.MsgspecError) as error:
            self._on_gone(f"it sent an invalid message: {error}")
            return
        match message:
            case EvaluationResult(number, evaluation, last):
                self._on_result(number, evaluation, last=last)
            case Ready(pid):
                self._on_ready(pid)
            case RulesLoaded(problem):
                if problem and self._loaded and not self._loaded.done():
                    self._loaded.set_exception(ConfigurationError(problem))
            case None:
                self._on_gone("it exited")

    def _on_result(self, number: int, evaluation: Evaluation, *, last: bool) -> None:
        if self._job is None or number != self._number:
            return  # it arrived after its deadline
        job, self._job = self._job, None
        if last:
            self._expect_child()
        job.end(evaluation)
        self.pool.dispatch()

    def _on_ready(self, pid: int) -> None:
        self._fail(Failure.DIED)  # the child before died by itself
        self._expect_child()
        with suppress(ProcessLookupError):  # it has died already; the next will report
            self._pidfd = os.pidfd_open(pid)
            self.child = pid
            if self._timer:
                self._timer.cancel()
        if self._loaded and not self._loaded.done():
            self._loaded.set_result(None)
        self.pool.dispatch()

    def _on_deadline(self) -> None:
        """Kill the child. The helper forks the next one."""
        self._fail(Failure.LATE)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._expect_child()

    def _expect_child(self) -> None:
        """Let go of the child, and expect the helper's next one."""
        self.child = 0
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._timer:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(CHILD_TIMEOUT, self._on_gone, "it does not fork a child")

    def _fail(self, failure: Failure) -> None:
        job, self._job = self._job, None
        if job:
            job.end(failure)

    def _on_gone(self, reason: str) -> None:
        """Restart the helper. If it is still starting, its start fails instead."""
        if self._loaded and not self._loaded.done():
            self._loaded.set_exception(OSError(reason))
            return
        if self._restart_task is None or self._restart_task.done():
            self._close_handles()
            self._fail(Failure.DIED)
            self._restart_task = asyncio.get_running_loop().create_task(self._restart_process(reason))

    async def _restart_process(self, reason: str) -> None:
        self.pool.log(f"a helper for managed rules is restarted: {reason}, {await self._kill()}")

        def report(error: Exception, seconds: float) -> None:
            self.pool.log(f"a helper for managed rules cannot be restarted, next attempt in {seconds:.1f} s: {error}")

        await start_with_retries(self.start, RESTARTS, report, (ConfigurationError, OSError))

    async def _kill(self) -> str:
        """Kill the process and its child, wait for it, and return how it exited."""
        self._close_handles()
        process = self._process
        if process is None:
            return "not started"
        process.kill(group=True)  # with its child, which is in its session
        code = await process.wait()
        if self._process is process:  # only now: if this is cancelled, `close` still has to wait
            self._process = None
        return describe_exit(code)

    def _close_handles(self) -> None:
        """Close the socket and the child's descriptor, and stop the timer."""
        self.child = 0
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._timer:
            self._timer.cancel()
        if self._socket:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
