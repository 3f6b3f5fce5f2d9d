"""A worker: its code, what `setup` gave it, and one request's way through it."""

import asyncio
from collections.abc import Awaitable, Callable
from types import FrameType

import structlog

from tlstunnel.config import WorkerTable
from tlstunnel.edge.loading import Code, explain, find_line
from tlstunnel.edge.thread import EdgeThread, TooLate
from tlstunnel.edge.values import Forwarded, InvalidReply, WorkerRequest, to_outcome
from tlstunnel.errors import ConfigurationError
from tlstunnel.escaping import printable_traceback
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.journal.events import Event

SETUP_SECONDS = 30.0
"""What a worker's `setup` may take: a release waits for it (``release.upgrade_timeout`` is as long)."""

TEARDOWN_SECONDS = 5.0
"""What its `teardown` may take: the end of the process waits for it."""

MAX_LATE = 1000
"""Requests that workers were too late for and still have: one that ignores its cancellation keeps the memory of each.
Beyond that none is asked."""


class Call:
    """A request on its way through a worker. `done` is called on the tunnels' loop once it is through, unless left.

    `outcome` is then what came of it, or `failure` the traceback of what it raised; `invalid` says that a refusal was
    meant. Whatever runs code of the worker's, its exceptions' texts included, is done in its thread.
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
        """In the workers' thread."""
        if self._closed:
            self._thread.send_back(self._finish)
        else:
            self._task = self._thread.loop.create_task(self._run(worker))

    async def _run(self, worker: "Worker") -> None:
        """Ask, and tell: from within the task, whose callbacks would be another turn of the loop."""
        try:
            self.outcome = to_outcome(await worker.fetch(self._request), self._request)
        except BaseException as error:  # some would end the thread's loop
            self.invalid = isinstance(error, InvalidReply)
            self.failure = _render_traceback(error)
            error.__traceback__ = None  # it holds every frame, and by them all that the worker had
        self._task = None
        self._thread.send_back(self._finish)

    def _finish(self) -> None:
        self.finished = True
        if self._closed:
            self._thread.late -= 1
        else:
            self._done()

    def close(self) -> None:
        """Wait for it no more; have it end as soon as it will, where it has not. To be called once."""
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
        if self._task is not None:  # it was cancelled before it had begun
            self._task = None
            self._thread.send_back(self._finish)


def _render_traceback(error: BaseException) -> str:
    """The traceback of what a worker raised, without our own frame; its text may raise, too."""
    traceback = error.__traceback__
    try:
        return printable_traceback(error.with_traceback(traceback and traceback.tb_next))
    except BaseException as another:
        return f"{type(error).__name__}, whose text raises {type(another).__name__}"


class Worker:
    """The worker that `reference` names, with its `config`, for one configuration; sites may share it."""

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
        """Where its code is; "" where nobody knows."""
        return self.code.file

    @property
    def late(self) -> int:
        """How many requests its thread holds that were answered without it."""
        assert self._thread is not None
        return self._thread.late

    def owns_frame(self, frame: FrameType) -> bool:
        """Whether `frame` is of one of its functions."""
        return frame.f_code in self._codes

    def fetch(self, request: WorkerRequest) -> Awaitable[object]:
        """Ask it. In the workers' thread."""
        return self.code.fetch(request, self._env)

    def call(self, request: WorkerRequest, done: Callable[[], object]) -> Call:
        """Begin to ask it; `done` is called on the tunnels' loop. To be left in any case, by `Call.leave`."""
        assert self._thread is not None
        call = Call(self._thread, request, done)
        self._thread.watch()  # before it can begin: from then on it may hold this thread too
        self._thread.send(call.start, self)
        return call

    async def set_up(self, thread: EdgeThread) -> None:
        """Call its `setup` in `thread`, where it is asked from then on. Raises ConfigurationError."""
        env: object = None
        if self.code.setup is not None:
            thread.workers.add(self)  # for the watchdog
            try:
                env, failure = await thread.run(
                    _call_guarded(self.code.setup, dict(self.config), self._explain_failure), SETUP_SECONDS
                )
            except TooLate:
                failure = f"did not end within {SETUP_SECONDS:g} s; it stands at {thread.place or 'an await'}"
            if failure:
                thread.workers.discard(self)
                raise ConfigurationError(f"the edge worker {self.reference}: its setup {failure}")
        self._attach(env, thread, has_env=True)

    def continue_from(self, before: "Worker") -> None:
        """Be asked with what `before` was set up with, which stays its own until `take_over`."""
        assert before._thread is not None
        self._attach(before._env, before._thread, has_env=False)

    def take_over(self, before: "Worker") -> None:
        """Tear down what it goes on with, in the place of `before`."""
        self._has_env, before._has_env = before._has_env, False

    def _attach(self, env: object, thread: EdgeThread, *, has_env: bool) -> None:
        self._env, self._thread, self._has_env = env, thread, has_env
        thread.workers.add(self)

    @property
    def thread(self) -> EdgeThread | None:
        """Where it is asked; None before it was set up."""
        return self._thread

    async def tear_down(self) -> None:
        """Call its `teardown`, if that is its to do; whatever that raises is logged."""
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
    """What a `setup` or `teardown` gives, or what is `render` of its failure: in its thread, as that runs its code.

    It ends normally in any case: some exceptions would end the thread's loop.
    """
    try:
        return await function(argument), ""
    except BaseException as error:
        try:
            return None, render(error) or "failed"
        except BaseException as another:
            return None, f"failed: {type(error).__name__}, whose text raises {type(another).__name__}"
