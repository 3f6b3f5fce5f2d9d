"""The thread that writes the history. The loop gives it minutes and never waits for it.

A minute is committed as soon as the thread has it, and a commit returns when it is on the disk. So a process that is
killed loses what it had sampled since its last minute, and so does a machine that loses power, as far as its disk keeps
what it has confirmed.
"""

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Self

from tlstunnel.backoff import Backoff
from tlstunnel.errors import StateError
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.state.history.database import (
    FILE_NAME,
    HISTORY,
    LockedError,
    check_pages,
    describe_damage,
    is_damage,
    lock_for_writing,
    may_pass,
    open_for_writing,
)
from tlstunnel.state.history.samples import NOTHING, Counts, Minute, SiteMinute, add_counts
from tlstunnel.state.history.store import Keep, Store

MAX_WAITING_ROWS = 100_000
"""Rows that wait while nothing can be written: 100 minutes of 1 000 sites, some 50 MB."""

CLOSE_SECONDS = 5.0
"""How long `History.close` waits for a disk."""

_RETRIES = Backoff(0.5, 30.0)
_LOCK_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class HistoryStats:
    """`problem` is why nothing is written at the moment, or "". `written`, `waiting` and `lost` count minutes.

    `last` is the number of the last minute in the file, since 1970 (UTC); None if there is none.
    """

    problem: str
    written: int
    waiting: int
    lost: int
    last: int | None


class History:
    """Stores minutes in the file `FILE_NAME` of a folder. Its methods are for the loop that opened it.

    While nothing can be written, such as on a full disk, minutes wait and it is tried again. When `MAX_WAITING_ROWS`
    are reached, further minutes are lost: a gap in peaks and means. What they counted is added to the next minute that
    is accepted. One line of the log says when such a time begins, and one when it ends. A file that is found damaged
    is not written any more, until another one is in its place.
    """

    def __init__(self, folder: Path, keep: Keep, lock_wait: float, max_waiting_rows: int) -> None:
        """Use `open` instead."""
        self.path = folder / FILE_NAME
        self.positions: Mapping[str, Mapping[str, Counts]] = {}
        self._keep = keep
        self._max_waiting = max_waiting_rows
        self._log = structlog.get_logger()
        self._queue: SimpleQueue[Minute | Future[None] | None] = SimpleQueue()
        self._opened = _start_future()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)
        # Each of these is written by one thread: the first by the loop's, the others by the history's.
        self._appended_rows = self._appended = self._lost = 0
        self._finished_rows = self._written = self._dropped = 0
        self._reported_lost = 0
        self._last: int | None = None
        self._refusing = False
        self._problem = ""
        self._owed: dict[str, Counts] = {}
        self._lock_deadline = time.monotonic() + lock_wait
        self._lock = contextlib.ExitStack()
        self._locked = False
        self._connection: sqlite3.Connection | None = None
        self._store: Store | None = None
        self._identity: tuple[int, ...] = ()
        self._refused: tuple[tuple[int, ...], StateError] | None = None

    @classmethod
    async def open(
        cls,
        folder: Path,
        keep: Keep | None = None,
        *,
        lock_wait: float = 0.0,
        max_waiting_rows: int = MAX_WAITING_ROWS,
    ) -> Self:
        """Open the history of this folder in a thread of its own, with its `positions` for a `Sampler`.

        Its pages are checked afterwards: if one is damaged, that is logged, and nothing is written.

        While another process has it, `lock_wait` is how many seconds to wait for its end. Raises StateError if it
        cannot be used. A full disk is not an error: then this waits for room.
        """
        history = cls(folder, keep or Keep(), lock_wait, max_waiting_rows)
        history._thread.start()
        try:
            await asyncio.wrap_future(history._opened)
        except BaseException:
            history._closing.set()
            raise
        return history

    def append(self, minute: Minute) -> bool:
        """Give the thread a minute, and return whether it was accepted. Never waits.

        If it was not, it is a gap, and its counts are added to the next one.
        """
        if self._owed:
            minute = _add_owed(minute, self._owed)
        rows = len(minute.sites) + 1
        if self._closing.is_set() or self._appended_rows - self._finished_rows + rows > self._max_waiting:
            if not self._refusing:
                self._log.warning(Event.HISTORY_MINUTES_LOST, path=str(self.path), waiting=self.stats().waiting)
            self._refusing = True
            self._owed = {row.site: row.counts for row in minute.sites if row.counts != NOTHING}
            self._lost += 1
            return False
        self._owed = {}
        self._refusing = False
        self._appended_rows += rows
        self._appended += 1
        self._queue.put(minute)
        return True

    def flush(self) -> "Future[None]":
        """Return a future that is done when every minute accepted so far is on the disk.

        It lasts as long as nothing can be written; its exception is a StateError if a minute is lost for good. A
        coroutine waits for it with `asyncio.wrap_future`.
        """
        done = _start_future()
        self._queue.put(done)
        if not self._thread.is_alive():  # ended after `close`, perhaps just before this
            self._refuse_waiting()
        return done

    async def close(self, seconds: float = CLOSE_SECONDS) -> bool:
        """Store what was accepted, and close the file. Return whether that was done within so many seconds."""
        self._closing.set()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join, seconds)
        return not self._thread.is_alive() and self.stats().waiting == 0 and not self._problem

    def stats(self) -> HistoryStats:
        """Return how it is doing."""
        waiting = self._appended - self._written - self._dropped
        return HistoryStats(self._problem, self._written, waiting, self._lost + self._dropped, self._last)

    def _run(self) -> None:
        """Be the history's thread."""
        try:
            self._attempt(self._load)
        except Exception as error:  # for the one who opens it
            self._end()
            self._opened.set_exception(error)
            return
        self._opened.set_result(None)
        try:
            self._check()
            while self._serve():
                pass
        finally:
            self._end()

    def _load(self, store: Store) -> None:
        self.positions = store.read_positions()
        self._last = store.read_last_minute()
        self._log.info(Event.HISTORY_OPENED, path=str(self.path), bytes=self.path.stat().st_size)

    def _check(self) -> None:
        """Refuse the file if a page is damaged. Minutes wait in the meantime: a large file takes seconds."""
        with contextlib.suppress(StateError):
            self._attempt(lambda store: check_pages(store.connection, self.path))

    def _serve(self) -> bool:
        """Wait for minutes and store them, in one transaction if there are several. Return whether to go on."""
        minutes: list[Minute] = []
        flushes: list[Future[None]] = []
        open_ = True
        item = self._queue.get()
        while True:
            if isinstance(item, Minute):
                minutes.append(item)
            elif item is None:
                open_ = False
            else:
                flushes.append(item)
            if self._queue.empty():
                break
            item = self._queue.get_nowait()
        error = self._store_minutes(minutes) if minutes else None
        for flush in flushes:
            if error is None:
                flush.set_result(None)
            else:
                flush.set_exception(error)
        if minutes and error is None:
            self._tidy(minutes)
        return open_

    def _store_minutes(self, minutes: Sequence[Minute]) -> StateError | None:
        """Store these minutes as soon as that is possible. Return why they are lost if it never will be."""
        lost: StateError | None = None
        try:
            self._attempt(lambda store: store.write(minutes))
            self._written += len(minutes)
            self._last = minutes[-1].time
        except StateError as error:
            lost = error
            self._dropped += len(minutes)
        self._finished_rows += sum(len(minute.sites) + 1 for minute in minutes)
        return lost

    def _tidy(self, minutes: Sequence[Minute]) -> None:
        try:
            assert self._store is not None
            self._store.tidy(minutes)
        except Exception as error:  # the minutes are stored; the next ones show whether it lasts
            self._disconnect()
            self._report(str(error))
            return
        lost = self._lost + self._dropped
        if self._problem or lost > self._reported_lost:
            self._log.info(Event.HISTORY_WRITTEN_AGAIN, path=str(self.path), lost=lost - self._reported_lost)
        self._problem = ""
        self._reported_lost = lost

    def _attempt(self, action: Callable[[Store], None]) -> None:
        """Do something with the open file, again and again while errors may pass. Raises StateError."""
        delay = 0.0
        while True:
            try:
                action(self._ensure_open())
                return
            except StateError as error:
                self._refuse(error)
                raise
            except Exception as error:
                self._disconnect()
                if is_damage(error):
                    damage = describe_damage(self.path, str(error))
                    self._refuse(damage)
                    raise damage from error
                self._report(str(error))
                if not may_pass(error) or self._closing.is_set():
                    raise StateError(f"{self.path}: cannot be written: {error}") from error
                delay = _RETRIES.after(delay)
                self._closing.wait(delay)

    def _ensure_open(self) -> Store:
        """Open the file, unless it is open and still there. Raises StateError, OSError and sqlite3.Error."""
        if not self._locked:
            self._take_lock()
        if self._store is not None and self._find_identity()[:2] == self._identity[:2]:
            return self._store
        self._disconnect()
        if self._refused is not None and self._find_identity() == self._refused[0]:
            raise self._refused[1]
        self._refused = None
        self._connection = open_for_writing(self.path, HISTORY)
        self._store = Store(self._connection, self._keep)
        self._identity = self._find_identity()
        return self._store

    def _take_lock(self) -> None:
        while True:
            try:
                self._lock.enter_context(lock_for_writing(self.path))
            except LockedError:
                if time.monotonic() >= self._lock_deadline or self._closing.wait(_LOCK_POLL_SECONDS):
                    raise
            else:
                self._locked = True
                return

    def _find_identity(self) -> tuple[int, ...]:
        """Return which file it is, and a state of it; () if there is none."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return ()
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size

    def _refuse(self, error: StateError) -> None:
        """Write no more to this file. It is looked at again when another one is in its place, or it has changed."""
        self._disconnect()
        self._refused = (self._find_identity(), error)
        if self._opened.done():  # otherwise the one who opens it is told
            self._report(str(error))

    def _report(self, reason: str) -> None:
        if not self._problem:
            self._log.warning(Event.HISTORY_NOT_WRITTEN, path=str(self.path), reason=reason)
        self._problem = reason

    def _disconnect(self) -> None:
        connection, self._connection, self._store = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _end(self) -> None:
        self._disconnect()
        self._lock.close()
        self._closing.set()
        self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        """Let those who wait for a flush know that it will not be."""
        with contextlib.suppress(Empty):
            while True:
                item = self._queue.get_nowait()
                if isinstance(item, Future):
                    item.set_exception(StateError(f"{self.path}: closed"))


def _start_future() -> "Future[None]":
    """Return a future that a waiting coroutine cannot cancel when it is cancelled itself: the thread will set it."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


def _add_owed(minute: Minute, owed: Mapping[str, Counts]) -> Minute:
    """Return the minute with the counts of lost ones."""
    rows = {row.site: row for row in minute.sites}
    for site, counts in owed.items():
        row = rows.get(site, SiteMinute(site, 0, 0, NOTHING))
        rows[site] = row._replace(counts=add_counts(row.counts, counts))
    return replace(minute, sites=tuple(rows.values()))
