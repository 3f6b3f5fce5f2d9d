"""The thread that uses the file with notices. The loop gives it operations and never waits for a disk.

While the file cannot be used, each operation raises StateError and changes nothing. One line of the log says when such
a time begins, and one when it ends.
"""

import asyncio
import contextlib
import functools
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Concatenate, ParamSpec, TypeVar

from tlstunnel.errors import StateError
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.plans.notice_file import FILE_NAME, NOTICES, NotContactedError, NoticeFile
from tlstunnel.state.history.database import (
    LockedError,
    check_pages,
    describe_damage,
    is_damage,
    lock_for_writing,
    open_for_writing,
)

CLOSE_SECONDS = 5.0
"""How long `NoticeStore.close` waits for a disk."""

_LOCK_POLL_SECONDS = 0.05

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Job = tuple["Future[Any]", Callable[[NoticeFile], Any]]


class NoticeStore:
    """Runs operations of `NoticeFile` in a thread of its own, one after another. The loop never waits for a disk."""

    def __init__(self, folder: Path, lock_wait: float = 0.0) -> None:
        """While another process has the file, `lock_wait` is how many seconds to wait for its end."""
        self.path = folder / FILE_NAME
        self.problem = ""
        self._lock_deadline = time.monotonic() + lock_wait
        self._lock = contextlib.ExitStack()
        self._locked = False
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._log = structlog.get_logger()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="notices", daemon=True)
        self._thread.start()

    async def run(self, action: Callable[Concatenate[NoticeFile, _P], _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run an operation, such as `run(NoticeFile.tidy, now)`. Raises StateError if it was not done."""
        future: Future[_T] = Future()
        self._jobs.put((future, functools.partial(_call, action, args, kwargs)))
        return await asyncio.wrap_future(future)

    async def close(self, seconds: float = CLOSE_SECONDS) -> bool:
        """Finish what was begun, close the file, and return whether that was done within so many seconds."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, seconds)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, action = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = self._perform(action)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
        self._disconnect()
        self._lock.close()

    def _perform(self, action: Callable[[NoticeFile], Any]) -> Any:
        try:
            result = action(NoticeFile(self._ensure_open()))
        except NotContactedError:
            raise
        except (StateError, OSError, sqlite3.Error) as error:
            self._disconnect()
            problem = self._explain(error)
            if not self.problem:
                self._log.warning(Event.NOTICES_NOT_WRITTEN, path=str(self.path), reason=str(problem))
            self.problem = str(problem)
            raise problem from error
        if self.problem:
            self._log.info(Event.NOTICES_WRITTEN_AGAIN, path=str(self.path))
        self.problem = ""
        return result

    def _explain(self, error: Exception) -> StateError:
        if isinstance(error, StateError):
            return error
        if is_damage(error):
            return describe_damage(self.path, str(error))
        return StateError(f"{self.path}: cannot be written: {error}")

    def _ensure_open(self) -> sqlite3.Connection:
        """Open the file, unless it is open and still there. Raises StateError, OSError and sqlite3.Error."""
        if not self._locked:
            self._take_lock()
        if self._connection is None or self._find_identity() != self._identity:
            self._disconnect()
            connection = open_for_writing(self.path, NOTICES)
            try:
                check_pages(connection, self.path)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
            self._identity = self._find_identity()
        return self._connection

    def _take_lock(self) -> None:
        while True:
            try:
                self._lock.enter_context(lock_for_writing(self.path))
            except LockedError:
                if time.monotonic() >= self._lock_deadline:
                    raise
                time.sleep(_LOCK_POLL_SECONDS)
            else:
                self._locked = True
                return

    def _find_identity(self) -> tuple[int, int] | None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()


def _call(action: Callable[..., _T], args: tuple[Any, ...], kwargs: dict[str, Any], file: NoticeFile) -> _T:
    return action(file, *args, **kwargs)
