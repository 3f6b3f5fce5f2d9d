"""The lines of the log: a writer that never blocks, and the configuration of structlog and logging."""

import asyncio
import atexit
import contextlib
import errno
import functools
import logging
import os
import select
import socket
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TextIO

import msgspec

from tlstunnel.escaping import printable, printable_traceback, shorten
from tlstunnel.journal.events import Event
from tlstunnel.journal.log_file import LogFile
from tlstunnel.journal.logger import structlog

MOST_KEPT = 4 << 20
"""Bytes of log lines kept for a slow reader: about ten thousand records."""

MOST_ELSEWHERE = MOST_KEPT // 4
"""Bytes of waiting lines from other threads, which must not displace the records."""

MAX_LINE = select.PIPE_BUF
"""Bytes of a line, with its end. A pipe takes so many at once (pipe(7)); longer lines of several processes mix."""

TURN = 16_384
"""Bytes of other threads' lines that are written at once, before tunnels continue."""


class _Elsewhere:
    """Lines from other threads, such as that of edge workers, until the writing thread takes them."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque()
        self._lock = threading.Lock()  # between threads that put; the one that takes never waits
        self._put = self._got = self._lost = 0
        self._notified = False

    def __bool__(self) -> bool:
        return bool(self._lines)

    def put(self, line: bytes) -> bool:
        """Keep a line, or drop it if too many wait. Return whether the writing thread must be notified."""
        with self._lock:
            if self._put - self._got + len(line) > MOST_ELSEWHERE:
                self._lost += 1
                return False
            self._put += len(line)
            self._lines.append(line)
            first, self._notified = not self._notified, True
            return first

    def get(self) -> tuple[list[bytes], int, bool]:
        """Return some lines, how many were lost, and whether there are more; if not, the next `put` notifies."""
        lines: list[bytes] = []
        size = 0
        while self._lines and size < TURN:
            lines.append(self._lines.popleft())
            size += len(lines[-1])
        self._got += size
        lost, self._lost = self._lost, 0
        self._notified = False
        more = bool(self._lines)
        self._notified = self._notified or more
        return lines, lost, more


class Lines:
    """Writes log lines to `stream` without ever waiting or failing: the loop that logs serves every tunnel.

    A full pipe would block all tunnels, and a pipe without a reader, or a full disk, would raise while a connection is
    being closed (both seen). Therefore lines that cannot be written at once are kept, up to 4 MiB, and written as the
    reader reads. Lines beyond that are dropped and counted, and the count is logged. With `file`, they are also written
    there.
    """

    def __init__(self, stream: TextIO, file: LogFile | None = None) -> None:
        self._file = file
        self._fd, self._write_some = _open_without_waiting(stream.fileno())
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)
        self._kept = bytearray()
        self._lost = 0
        self._lost_before = 0  # which the log has named
        self._watched_by: asyncio.AbstractEventLoop | None = None
        self._thread = threading.get_ident()
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self._elsewhere = _Elsewhere()

    def msg(self, message: str) -> None:
        """Write `message` as a line, as soon as possible without waiting. May be called from any thread."""
        line = _to_lines(message)
        if self._file is not None:
            self._file.put(line)
        if threading.get_ident() != self._thread:
            if self._elsewhere.put(line) and self._loop is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed; `flush` writes it
                    self._loop.call_soon_threadsafe(self._take)
            return
        if self._loop is None:
            with contextlib.suppress(RuntimeError):  # there is none yet
                self._loop = asyncio.get_running_loop()
        self._keep(line, 1)

    def _keep(self, lines: bytes, count: int) -> None:
        if len(self._kept) + len(lines) > MOST_KEPT:
            self._lost += count
            return
        self._kept += lines
        self._write()
        if self._kept and self._watched_by is None:
            with contextlib.suppress(RuntimeError, OSError):  # no loop yet, or a regular file, which epoll refuses
                loop = asyncio.get_running_loop()
                loop.add_writer(self._fd, self._write)
                self._watched_by = loop

    def _take(self) -> None:
        """Write some of the other threads' lines: one that never stops logging must not block the tunnels."""
        lines, lost, more = self._elsewhere.get()
        self._lost += lost
        if lines:
            self._keep(b"".join(lines), len(lines))
        if more and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon(self._take)

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg

    @property
    def lost(self) -> int:
        """The number of lines that were lost so far."""
        return self._lost_before + self._lost

    def flush(self, seconds: float = 1.0) -> None:
        """Give the reader up to `seconds` to read the kept lines, when the program ends."""
        deadline = time.monotonic() + seconds
        while self._elsewhere and time.monotonic() < deadline:
            self._take()
        while self._kept and (left := deadline - time.monotonic()) > 0:
            self._poll.poll(left * 1000)
            self._write()

    def _write(self) -> None:
        try:
            # Where there is POLLOUT, a pipe takes PIPE_BUF bytes at once (pipe(7)). Whole lines, since other processes
            # of the tunnel write to the same pipe. Only a terminal that is full takes less.
            while self._kept and self._poll.poll(0)[:1] == [(self._fd, select.POLLOUT)]:
                end = self._kept.rfind(b"\n", 0, MAX_LINE) + 1
                del self._kept[: self._write_some(self._kept[: end or MAX_LINE])]
                if self._lost and not self._kept:
                    self._kept += self._render_lost_line()
        except BlockingIOError:
            gone = False  # another process of the tunnel has filled the pipe since
        except OSError:
            gone = True
        else:
            gone = bool(self._kept) and any(events & ~select.POLLOUT for _, events in self._poll.poll(0))
        if gone:
            self._lost += self._kept.count(b"\n")
            self._kept.clear()
        if not self._kept and self._watched_by is not None:
            self._watched_by.remove_writer(self._fd)
            self._watched_by = None

    def _render_lost_line(self) -> bytes:
        lost, self._lost = self._lost, 0
        self._lost_before += lost
        return msgspec.json.encode({"event": Event.LINES_LOST, "level": "warning", "lost": lost}) + b"\n"


def _open_without_waiting(fd: int) -> tuple[int, Callable[[bytes | bytearray], int]]:
    """Return a descriptor for what `fd` is open for, and a function that writes to it or raises BlockingIOError.

    The processes of a tunnel share one pipe, so another one can fill it between a poll and a write, which would then
    wait for the reader. O_NONBLOCK on `fd` itself would also apply to every other program that has it.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(fd))
        return sock.fileno(), lambda data: sock.send(data, socket.MSG_DONTWAIT)
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with contextlib.suppress(OSError):  # of another user, as in many containers, or without a reader
            reopened = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            return reopened, functools.partial(os.write, reopened)
        return fd, functools.partial(_write_without_waiting, fd)
    return fd, functools.partial(os.write, fd)


def _write_without_waiting(fd: int, data: bytes | bytearray) -> int:
    """Write to a pipe or a terminal that cannot be opened again. Before Linux 6.4, that may wait for its reader."""
    try:
        return os.pwritev(fd, [data], -1, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in _NO_NOWAIT:
            return os.write(fd, data)
        raise


_NO_NOWAIT = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})

_lines: Lines | None = None

_file: LogFile | None = None

_json_lines: Lines | None = None
"""Where records are written without structlog, which would double the time for each and adds nothing."""


def write_info(log: Any, event: str, facts: dict[str, Any]) -> None:
    """Write a line of level info: by `log`, or in JSON directly (see `_json_lines`), which changes `facts`."""
    if _json_lines is None:
        log.info(event, **facts)
    else:
        facts["event"] = event
        _json_lines.msg(_as_json(None, "info", facts))


def count_lost_lines() -> int:
    """Return how many lines this process has lost so far."""
    return (_lines.lost if _lines is not None else 0) + (_file.lost if _file is not None else 0)


def reopen_log() -> None:
    """Open the log's file again, which may have been renamed."""
    if _file is not None:
        _file.reopen()


def flush_log() -> None:
    """Write what waits for the log's file: this program is about to be replaced."""
    if _file is not None:
        _file.flush()


def configure_logging(style: Literal["text", "json"], path: Path | None = None) -> None:
    """Log to standard error, and to a file if there is a `path`: one line an event, for people, or one JSON object.

    See `Lines` and `LogFile` for what may be lost.
    """
    global _file, _lines, _json_lines  # noqa: PLW0603 - as structlog's own configuration, of the process
    if _file is not None:
        _file.close()
    _file = LogFile(path, _report_file) if path is not None else None
    if _file is not None:
        atexit.register(_file.close)
    lines = _lines = Lines(sys.stderr, _file)
    _json_lines = lines if style == "json" else None
    atexit.register(lines.flush)
    processors: list[structlog.typing.Processor]
    if style == "json":
        processors = [_as_json]
    else:
        processors = [
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            # repr of strings, so that unprintable characters are escaped here too.
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty() and path is None,
                repr_native_str=True,
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *_: lines,
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Forward()], level=logging.WARNING, force=True)
    # Edge workers may log from level INFO.
    logging.getLogger("tlstunnel.edge").setLevel(logging.INFO)


def _report_file(problem: str) -> None:
    """Log that the file cannot be written, or that it can again. Called in its thread."""
    if _file is None:
        return
    log = structlog.get_logger()
    if problem:
        log.warning(Event.LOG_FILE_NOT_WRITTEN, file=str(_file.path), reason=problem)
    else:
        log.info(Event.LOG_FILE_WRITTEN_AGAIN, file=str(_file.path), lost=_file.lost)


def _to_lines(message: str) -> bytes:
    """Return `message` with a line end, and each of its lines cut to MAX_LINE bytes."""
    data = message.encode("utf-8", "backslashreplace") + b"\n"
    if len(data) <= MAX_LINE:
        return data
    return b"".join(
        line if len(line) <= MAX_LINE else line[: MAX_LINE - 4].decode(errors="ignore").encode() + b"...\n"
        for line in data.splitlines(keepends=True)
    )


_ENCODER = msgspec.json.Encoder(enc_hook=str)


def _as_json(logger: Any, level: str, event: structlog.typing.EventDict) -> str:
    """Return an event as a JSON object. structlog's own chain of four processors takes three times as long."""
    if "exc_info" in event:
        event = structlog.processors.format_exc_info(logger, level, event)
    event["level"] = "error" if level == "exception" else level
    event["timestamp"] = datetime.now(UTC)
    line = _ENCODER.encode(event)
    return (line if len(line) < MAX_LINE else _encode_shortened(event)).decode()


def _encode_shortened(event: structlog.typing.EventDict) -> bytes:
    """Return an event as a JSON object of less than MAX_LINE bytes: shortened texts, or in the end a few fields."""
    for most in (2048, 1024, 512, 256, 128, 64):
        line = _ENCODER.encode({name: _shorten_value(value, most) for name, value in event.items()})
        if len(line) < MAX_LINE:
            return line
    kept = ("event", "level", "timestamp", "id", "client", "site", "status", "verdict", "ended_by", "reason")
    return _ENCODER.encode({name: _shorten_value(event[name], 64) for name in kept if name in event})


def _shorten_value(value: object, most: int) -> object:
    """Shorten every text in `value`; a traceback in the middle, since its end says most."""
    match value:
        case str() if "\n" in value and len(value) > most:
            return f"{value[: most // 4]}\n...\n{value[-3 * most // 4 :]}"
        case str():
            return shorten(value, most)
        case dict():
            return {name: _shorten_value(one, most) for name, one in value.items()}
        case list() | tuple():
            return [_shorten_value(one, most) for one in value[: most // 16]]
        case int() | float() | datetime() | None:
            return value
    return shorten(str(value), most)


class _Forward(logging.Handler):
    """Writes what libraries, mostly asyncio, log with the standard library as lines of this log."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        traced = {} if error is None else {"exception": printable_traceback(error)}
        structlog.get_logger().log(record.levelno, printable(record.getMessage()), logger=record.name, **traced)
