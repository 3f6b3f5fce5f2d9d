"""Start a program, read the log that it writes, wait for an event, and end it with everything that it started.

`EdgeTunnel` and tlstunnel's own tests start programs only from here. Timeouts are in seconds.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TIMEOUT = 30.0
"""How long anything may take before a test fails. Generous: only a failing test waits this long."""

Record = dict[str, Any]
"""One line of the tunnel's log, decoded: docs/log.md."""

_MARK = "TLSTUNNEL_TEST_MARK"


class Program:
    """A program and the log that it writes to standard error, one JSON object per line.

    It runs from `start` until `end`. `name` is what error messages call it.
    """

    def __init__(self, name: str = "the tunnel") -> None:
        self.environment: dict[str, str] = {}
        """Its whole environment, for commands that have to run in the same one."""
        self._name = name
        self._mark = ""
        self._process: subprocess.Popen[str] | None = None
        self._reader = threading.Thread(target=self._read, name=f"log of {name}", daemon=True)
        self._changed = threading.Condition()
        self._lines: list[str] = []
        self._records: list[Record] = []
        self._strays: list[str] = []

    def start(
        self, command: Sequence[str | Path], *, environment: Mapping[str, str], folder: Path | None = None
    ) -> None:
        """Start it, in `folder`, and return before it is ready."""
        self._mark, self.environment = mark_environment(environment)
        self._process = start_process(
            command,
            cwd=folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="backslashreplace",
            start_new_session=True,  # Ctrl-C goes to pytest, which ends this program
        )
        self._reader.start()

    @property
    def process(self) -> subprocess.Popen[str]:
        """The process that was started."""
        assert self._process is not None, "start() has not been called"
        return self._process

    @property
    def text(self) -> str:
        """Everything it has written to standard error so far."""
        with self._changed:
            return "".join(self._lines)

    @property
    def strays(self) -> list[str]:
        """The lines so far that are not log records."""
        with self._changed:
            return [*self._strays]

    def records(self, start: int = 0, /, **fields: object) -> list[Record]:
        """Return the records so far with these `fields`, without the first `start` of all; oldest first."""
        with self._changed:
            return [one for one in self._records[start:] if all(one.get(k) == v for k, v in fields.items())]

    def wait_until(
        self, find: Callable[[], list[Record]], expected: str, *, count: int = 1, timeout: float | None = None
    ) -> list[Record]:
        """Call `find` whenever there is a new record, until it returns at least `count`, and return them.

        `expected` says what is missing otherwise. `timeout` is `TIMEOUT` if None. Raises AssertionError, with the log.
        """
        __tracebackhide__ = True
        timeout = TIMEOUT if timeout is None else timeout
        deadline = time.monotonic() + timeout
        with self._changed:
            while len(found := find()) < count:
                left = deadline - time.monotonic()
                if left <= 0 or not self._reader.is_alive():
                    when = f"within {timeout:g} s" if self._reader.is_alive() else "before it exited"
                    raise AssertionError(f"{expected} {when}; its log:\n{''.join(self._lines)}")
                self._changed.wait(min(left, 0.5))
        return found

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has exited; return its exit status. Raises AssertionError, with the log."""
        __tracebackhide__ = True
        timeout = TIMEOUT if timeout is None else timeout
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self._name} did not exit within {timeout:g} s; its log:\n{self.text}") from None
        self._reader.join(TIMEOUT)
        return status

    def stop(self, number: signal.Signals = signal.SIGINT, timeout: float | None = None) -> int:
        """Send a signal unless it has exited already; return its exit status. Raises AssertionError, with the log."""
        __tracebackhide__ = True
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(timeout)

    def end(self) -> list[str]:
        """Kill whatever is left of it; return the command lines of the processes that it left behind."""
        if self._process is None:
            return []
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        orphans = kill_left_behind(self._mark)
        self._reader.join(TIMEOUT)
        if self._process.stderr is not None:
            self._process.stderr.close()
        return orphans

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            record = _parse_record(line)
            with self._changed:
                self._lines.append(line)
                if record is None:
                    self._strays.append(line.rstrip("\n"))
                else:
                    self._records.append(record)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


def start_process(command: Sequence[str | Path], **options: Any) -> "subprocess.Popen[str]":
    """Start a process whose standard streams are text, as `subprocess.Popen` does, with no signal ignored.

    A process inherits ignored signals: ``nohup`` ignores SIGHUP, and a shell ignores SIGINT and SIGQUIT in what it
    runs with ``&``. A shell script that starts like this cannot trap them.
    """
    with _default_signals():
        return subprocess.Popen(command, text=True, **options)  # noqa: S603 - a test's own command


@contextlib.contextmanager
def _default_signals() -> Iterator[None]:
    """Let processes that are started meanwhile begin with the default action for signals that are ignored here.

    A handler becomes the default action in a new program, and one that does nothing is as good as none here. The
    other way, `preexec_fn`, is not safe in a process with threads. Only the main thread may set handlers.
    """
    numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        ignored = []
    for number in ignored:
        signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


def mark_environment(environment: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return a new mark and `environment` with it: `kill_left_behind` finds every process that inherits the mark."""
    mark = secrets.token_hex(8)
    return mark, {**environment, _MARK: mark}


def kill_left_behind(mark: str, grace: float = 5.0) -> list[str]:
    """Kill the processes with `mark` that have not ended within `grace`; return their command lines.

    A daemon leaves its process group and its session, but keeps its environment.
    """
    deadline = time.monotonic() + grace
    while (found := _find_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return list(found.values())


def _find_processes(mark: str) -> dict[int, str]:
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            if f"{_MARK}={mark}\0".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
    return found


def _parse_record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:  # before the log begins, errors are lines for people
        return None
    return record if isinstance(record, dict) and "event" in record else None
