"""The log in a file, besides standard error: whole lines of all processes, appended in a thread of its own.

A disk may take seconds for a write, and be full. So a line only waits in memory, for the thread; what cannot be written
is kept, up to 4 MiB, and tried again every second. Lines beyond that are lost and counted.

Tested by tests/unit/test_journal_log_file.py and tests/promises/test_log_file.py.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

MOST_WAITING = 4 << 20
"""Bytes of lines that wait for the disk: about ten thousand records."""

BATCH_SECONDS = 0.02
"""How long lines are collected before they are written together."""

RETRY_SECONDS = 1.0

THREAD_NAME = "log"

MODE = 0o640
"""Of a new file. Its group, such as adm, may read the log."""


def open_log(path: Path) -> int:
    """Open a file for appending. Raises OSError."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, MODE)


class LogFile:
    """Appends lines to the file at `path`.

    `report` is called in the thread: with why they cannot be written, and "" once they can again.
    """

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self.path = path
        self._report = report
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        self._size = 0
        self._lost = 0
        self._reopens = False
        self._closed = False
        self._wake = threading.Event()
        self._written = threading.Event()
        self._descriptor: int | None = None
        self._problem = ""
        self._broken = False
        """Whether the last line in the file is incomplete."""
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """The number of lines that were lost so far."""
        return self._lost

    def put(self, line: bytes) -> None:
        """Have a line written, which ends with a line end. May be called from any thread, and never waits."""
        with self._lock:
            if self._size + len(line) > MOST_WAITING:
                self._lost += 1
                return
            self._waiting.append(line)
            self._size += len(line)
        if not self._wake.is_set():
            self._wake.set()

    def reopen(self) -> None:
        """Write to a new file from now on: the old one was renamed."""
        self._reopens = True
        self._wake.set()

    def flush(self, seconds: float = 1.0) -> None:
        """Wait up to so many seconds until all lines are written."""
        deadline = time.monotonic() + seconds
        while self._size and not self._problem and (left := deadline - time.monotonic()) > 0:
            self._written.clear()
            self._wake.set()
            if self._size:
                self._written.wait(left)

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self.flush()
        self._closed = True
        self._wake.set()
        self._thread.join(RETRY_SECONDS)

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            self._write()
            self._written.set()
            if self._problem:
                self._wake.set()  # tried again
            time.sleep(RETRY_SECONDS if self._problem and not self._closed else BATCH_SECONDS)
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _write(self) -> None:
        """Write what waits, as far as possible."""
        if self._reopens:
            self._reopens = False
            self._forget()
            self._broken = False
        with self._lock:
            lines, self._waiting = self._waiting, []
        data = b"".join(lines)
        written = 0
        problem = ""
        try:
            if self._descriptor is None:
                self._descriptor = open_log(self.path)
            written = self._append(data)
        except OSError as error:
            problem = error.strerror or str(error)
            written = getattr(error, "written", 0)
            self._forget()
        rest = data[written:]
        with self._lock:
            self._waiting = [rest, *self._waiting] if rest else self._waiting
            self._size -= written
        if problem != self._problem:
            self._problem = problem
            self._report(problem)

    def _append(self, data: bytes) -> int:
        """Append lines, and return how many bytes, of whole lines. Raises OSError, with that number as `written`."""
        assert self._descriptor is not None
        done = 0
        try:
            while done < len(data):
                # A line that was cut, because the disk was full, is written again as a whole.
                start = b"\n" if self._broken else b""
                count = os.write(self._descriptor, start + data[done:]) - len(start)
                whole = data.rfind(b"\n", done, done + max(count, 0)) + 1 or done
                self._broken = whole < done + count
                done = whole
        except OSError as error:
            error.written = done  # type: ignore[attr-defined]
            raise
        return done

    def _forget(self) -> None:
        """Close the file. The next line opens it again."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None
