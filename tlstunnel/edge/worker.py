"""A worker: its code, what `setup` gave it, and one request's way through it."""

import asyncio
from collections.abc import Awaitable, Callable
from types import FrameType

import structlog

from tlstunnel.config import WorkerTable
from tlstunnel.edge.loading import Code, explained, line_in
from tlstunnel.edge.thread import EdgeThread
from tlstunnel.edge.values import EdgeError, Forwarded, InvalidReply, UpgradeRequest, outcome
from tlstunnel.errors import ConfigurationError
from tlstunnel.escaping import printable_traceback
from tlstunnel.handshake.refusal import Refusal

SETUP_SECONDS = 30.0
"""What a worker's `setup` may take: a release waits for it (``release.upgrade_timeout`` is as long)."""

TEARDOWN_SECONDS = 5.0
"""What its `teardown` may take: the end of the process waits for it."""

MOST_LATE = 1000
"""Requests that a worker was too late for and still has: one that ignores its cancellation keeps the memory of each.
Beyond that it is not asked."""


class Call:
    """A request on its way through a worker. `done` is called on the tunnels' loop once it is through.

    `outcome` is then what came of it, or `failure` the traceback of what it raised; `invalid` says that a refusal was
    meant. Whatever runs code of the worker's, its exceptions' texts included, is done in its thread.
    """

    __slots__ = ("_cancelled", "_done", "_request", "_task", "_thread", "failure", "finished", "invalid", "outcome")

    def __init__(self, thread: EdgeThread, request: UpgradeRequest, done: Callable[["Call"], None]) -> None:
        self._thread = thread
        self._request = request
        self._done = done
        self._task: asyncio.Task[object] | None = None
        self._cancelled = self.finished = self.invalid = False
        self.outcome: Forwarded | Refusal | None = None
        self.failure = ""

    def begin(self, worker: "Worker") -> None:
        """In the workers' thread."""
        if self._cancelled:
            self._thread.back(self._finish)
            return
        self._task = self._thread.loop.create_task(worker.fetch(self._request))
        self._task.add_done_callback(self._through)

    def _through(self, task: "asyncio.Task[object]") -> None:
        self._task = None
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        try:
            if error is not None:
                # Without our own frame: the worker's is the first.
                raise error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
            self.outcome = outcome(task.result(), self._request)
        except BaseException as caught:
            self.invalid = isinstance(caught, InvalidReply)
            self.failure = _written(caught)
            caught.__traceback__ = None  # it holds every frame, and by them all that the worker had
        self._thread.back(self._finish)

    def _finish(self) -> None:
        self.finished = True
        self._done(self)

    def cancel(self) -> None:
        """Have it end as soon as it will."""
        self._cancelled = True
        self._thread.soon(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


def _written(error: BaseException) -> str:
    """The traceback of what a worker raised, without our own frame; its text may raise, too."""
    traceback = error.__traceback__
    try:
        return printable_traceback(error.with_traceback(traceback and traceback.tb_next))
    except BaseException as another:
        return f"{type(error).__name__}, whose text raises {type(another).__name__}"


class Worker:
    """The worker that `reference` names, with its `config`: one a process, whichever sites have it."""

    def __init__(self, reference: str, config: WorkerTable, code: Code) -> None:
        self.reference = reference
        self.config = config
        self.code = code
        self.late = 0
        self._env: object = None
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
    def thread(self) -> EdgeThread | None:
        """Where it was set up."""
        return self._thread

    async def fetch(self, request: UpgradeRequest) -> object:
        """Ask it. In the workers' thread."""
        try:
            return await self.code.fetch(request, self._env)
        except (SystemExit, KeyboardInterrupt) as error:  # would end the thread's loop
            raise EdgeError(f"an edge worker cannot end the process: {type(error).__name__}") from error

    def stands_in(self, frame: FrameType) -> bool:
        """Whether `frame` is of one of its functions."""
        return frame.f_code in self._codes

    def ask(self, request: UpgradeRequest, done: Callable[[Call], None]) -> Call:
        """Begin to ask it; `done` is called on the tunnels' loop."""
        assert self._thread is not None
        call = Call(self._thread, request, done)
        self._thread.soon(call.begin, self)
        self._thread.watch()
        return call

    def through(self) -> None:
        """To be called once for each that was asked: nobody waits for it any more."""
        assert self._thread is not None
        self._thread.unwatch()

    async def set_up(self, thread: EdgeThread) -> None:
        """Call its `setup` in `thread`, where it is asked from then on. Raises ConfigurationError."""
        env: object = None
        if self.code.setup is not None:
            try:
                env = await thread.run(_awaited(self.code.setup, dict(self.config)), SETUP_SECONDS)
            except TimeoutError:
                reason = f"its setup did not end within {SETUP_SECONDS:g} s; it stands at {thread.place or 'an await'}"
                raise ConfigurationError(f"the edge worker {self.reference}: {reason}") from None
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and _cancelled_here():
                    raise
                line = line_in(error, self.code.file)
                where = f"{self.code.file}:{line}: " if line else ""
                reason = f"its setup failed: {where}{explained(error)}"
                raise ConfigurationError(f"the edge worker {self.reference}: {reason}") from None
        self._env, self._thread = env, thread
        thread.workers.add(self)

    async def tear_down(self) -> None:
        """Call its `teardown`; whatever that raises is logged."""
        thread = self._thread
        if thread is not None and thread.alive and self.code.teardown is not None:
            log = structlog.get_logger()
            try:
                await thread.run(_awaited(self.code.teardown, self._env), TEARDOWN_SECONDS)
            except TimeoutError:
                log.warning("edge worker: teardown did not end", worker=self.reference, seconds=TEARDOWN_SECONDS)
            except Exception as error:
                log.warning("edge worker: teardown failed", worker=self.reference, exception=printable_traceback(error))
        if thread is not None:
            thread.workers.discard(self)
        self._env = None
        self.code.forget()


async def _awaited(function: Callable[..., Awaitable[object]], argument: object) -> object:
    """Call a user's `setup` or `teardown`: one that exits would end the thread's loop."""
    try:
        return await function(argument)
    except (SystemExit, KeyboardInterrupt) as error:
        raise EdgeError(f"an edge worker cannot end the process: {type(error).__name__}") from error


def _cancelled_here() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
