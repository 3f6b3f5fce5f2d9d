"""A worker: its code, its environment from `setup`, and its calls.

Tested by tests/unit/test_edge_thread.py.
"""

import asyncio
from collections.abc import Awaitable, Callable
from types import FrameType

from tlstunnel.config import WorkerTable
from tlstunnel.edge.loading import Code, explain, find_line
from tlstunnel.edge.thread import EdgeThread, TooLate
from tlstunnel.edge.values import Forwarded, InvalidReply, WorkerRequest, to_outcome
from tlstunnel.errors import ConfigurationError
from tlstunnel.escaping import printable_traceback
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog

SETUP_SECONDS = 30.0
"""How long a worker's `setup` may take. An upgrade waits for it (``release.upgrade_timeout`` is as long)."""

TEARDOWN_SECONDS = 5.0
"""How long a worker's `teardown` may take. The process waits for it before it exits."""

MAX_LATE = 1000
"""Calls that may still run after they have been given up. A worker that ignores cancellation keeps the memory of
each request; beyond this number it is not called."""


class Call:
    """A call of a worker with a request. `done` is called on the tunnels' loop once it has finished, unless closed.

    Then either `outcome` is set, or `failure` is the traceback of what the worker raised; `invalid` is whether that was
    an invalid reply. Everything that runs code of the worker, including the text of its exceptions, is done in the
    workers' thread.
    """

    __slots__ = ("_closed", "_done", "_request", "_task", "_thread", "failure", "finished", "invalid", "outcome")

    def __init__(self, thread: EdgeThread, request: WorkerRequest, done: Callable[[], object]) -> None:
        self._thread = thread
        self._request = request
        self._done = done
        self._task: asyncio.Task[None] | None = None
        self._closed = self.finished = self.invalid = False
        self.outcome: Forwarded | Refusal | None = None
        self.failure = ""

    def start(self, worker: "Worker") -> None:
        """Start the call. Runs in the workers' thread."""
        if self._closed:
            self._thread.send_back(self._finish)
        else:
            self._task = self._thread.loop.create_task(self._run(worker))

    async def _run(self, worker: "Worker") -> None:
        """Call the worker and report the result, within the task: a done callback would need another iteration."""
        try:
            self.outcome = to_outcome(await worker.fetch(self._request), self._request)
        except BaseException as error:  # SystemExit and KeyboardInterrupt would end the thread's loop
            self.invalid = isinstance(error, InvalidReply)
            self.failure = _render_traceback(error)
            error.__traceback__ = None  # its frames would keep everything in the worker alive
        self._task = None
        self._thread.send_back(self._finish)

    def _finish(self) -> None:
        self.finished = True
        if self._closed:
            self._thread.late -= 1
        else:
            self._done()

    def close(self) -> None:
        """Stop waiting, and cancel the call if it has not finished. To be called exactly once."""
        self._thread.unwatch()
        if not self.finished:
            self._closed = True
            self._thread.late += 1
            self._thread.send(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task.add_done_callback(self._report_cancelled)

    def _report_cancelled(self, _: "asyncio.Task[None]") -> None:
        if self._task is not None:  # cancelled before it had started
            self._task = None
            self._thread.send_back(self._finish)


def _render_traceback(error: BaseException) -> str:
    """Return the traceback of what a worker raised, without our own frame. The exception's text may raise, too."""
    traceback = error.__traceback__
    try:
        return printable_traceback(error.with_traceback(traceback and traceback.tb_next))
    except BaseException as another:
        return f"{type(error).__name__}, whose text raises {type(another).__name__}"


class Worker:
    """The worker that `reference` names, with its `config`, in one configuration. Sites may share it."""

    def __init__(self, reference: str, config: WorkerTable, code: Code) -> None:
        self.reference = reference
        self.config = config
        self.code = code
        self._env: object = None
        self._has_env = False
        self._thread: EdgeThread | None = None
        functions = (code.fetch, code.setup, code.teardown)
        self._codes = frozenset(found for one in functions if (found := getattr(one, "__code__", None)) is not None)

    def __repr__(self) -> str:
        return f"<Worker {self.reference}>"

    @property
    def file(self) -> str:
        """The path of its source; "" if unknown."""
        return self.code.file

    @property
    def late(self) -> int:
        """How many calls of its thread were given up but still run."""
        assert self._thread is not None
        return self._thread.late

    def owns_frame(self, frame: FrameType) -> bool:
        """Return whether `frame` runs one of its functions."""
        return frame.f_code in self._codes

    def fetch(self, request: WorkerRequest) -> Awaitable[object]:
        """Call its function. Runs in the workers' thread."""
        return self.code.fetch(request, self._env)

    def call(self, request: WorkerRequest, done: Callable[[], object]) -> Call:
        """Start a call; `done` is called on the tunnels' loop. The caller must close the call in any case."""
        assert self._thread is not None
        call = Call(self._thread, request, done)
        self._thread.watch()  # before it can start: from then on it may block this thread too
        self._thread.send(call.start, self)
        return call

    async def set_up(self, thread: EdgeThread) -> None:
        """Call its `setup` in `thread`, in which it runs from then on. Raises ConfigurationError."""
        env: object = None
        if self.code.setup is not None:
            thread.workers.add(self)  # for the watchdog
            try:
                env, failure = await thread.run(
                    _call_guarded(self.code.setup, dict(self.config), self._explain_failure), SETUP_SECONDS
                )
            except TooLate:
                failure = f"took longer than {SETUP_SECONDS:g} s; it is at {thread.place or 'an await'}"
            if failure:
                thread.workers.discard(self)
                raise ConfigurationError(f"the edge worker {self.reference}: its setup {failure}")
        self._attach(env, thread, has_env=True)

    def continue_from(self, before: "Worker") -> None:
        """Use the environment of `before`, which still owns it until `take_over`."""
        assert before._thread is not None
        self._attach(before._env, before._thread, has_env=False)

    def take_over(self, before: "Worker") -> None:
        """Become the owner of the environment of `before`, and so the one that tears it down."""
        self._has_env, before._has_env = before._has_env, False

    def _attach(self, env: object, thread: EdgeThread, *, has_env: bool) -> None:
        self._env, self._thread, self._has_env = env, thread, has_env
        thread.workers.add(self)

    @property
    def thread(self) -> EdgeThread | None:
        """The thread in which it runs; None before it is set up."""
        return self._thread

    async def tear_down(self) -> None:
        """Call its `teardown`, if it owns its environment. Log what that raises."""
        thread, teardown = self._thread, self.code.teardown
        if thread is not None:
            if self._has_env and teardown is not None:
                log = structlog.get_logger()
                try:
                    _, failure = await thread.run(
                        _call_guarded(teardown, self._env, printable_traceback), TEARDOWN_SECONDS
                    )
                except TooLate:
                    log.warning(Event.WORKER_TEARDOWN_TIMED_OUT, worker=self.reference, seconds=TEARDOWN_SECONDS)
                else:
                    if failure:
                        log.warning(Event.WORKER_TEARDOWN_FAILED, worker=self.reference, exception=failure)
            thread.workers.discard(self)
        self._env, self._has_env = None, False
        self.code.discard()

    def _explain_failure(self, error: BaseException) -> str:
        line = find_line(error, self.code.file)
        return f"failed: {f'{self.code.file}:{line}: ' if line else ''}{explain(error)}"


async def _call_guarded(
    function: Callable[..., Awaitable[object]], argument: object, render: Callable[[BaseException], str]
) -> tuple[object, str]:
    """Call a `setup` or `teardown` and return its result, or its failure as `render` shows it.

    Runs in the workers' thread. Raises nothing: some exceptions would end the thread's loop.
    """
    try:
        return await function(argument), ""
    except BaseException as error:
        try:
            return None, render(error) or "failed"
        except BaseException as another:
            return None, f"failed: {type(error).__name__}, whose text raises {type(another).__name__}"
