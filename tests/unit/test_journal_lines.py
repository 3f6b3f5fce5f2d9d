"""The lines of the log: one for each event, whatever it contains, and written without waiting."""

import asyncio
import contextlib
import json
import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.escaping import printable
from tlstunnel.journal.events import Reason
from tlstunnel.journal.journal import Journal
from tlstunnel.journal.lines import MAX_LINE, Lines, _as_json, _to_lines, configure_logging
from tlstunnel.journal.record import MAX_DETAIL, MAX_PATH, Record

HOSTILE = '\x1b[2J\r\n{"event":"ready"}\x00\x7f\x9b31m\u202e\u2028"\\ é'


@contextlib.contextmanager
def logging_as(style: Literal["text", "json"]) -> Iterator[None]:
    """Configure the log as `configure_logging` does, and restore it."""
    root = logging.getLogger()
    handlers, root.handlers, level = root.handlers, [], root.level
    configure_logging(style)
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
        structlog.reset_defaults()


def filled() -> Record:
    record = Record("0123456789abcdef", "192.0.2.1")
    record.site, record.sni, record.ja4 = "chat.example.com", "chat.example.com", "t13d1516h2_8daaf6152771_e5627efa2ab1"
    record.tls_version, record.cipher = "TLSv1.3", "TLS_AES_128_GCM_SHA256"
    record.path, record.origin = "/chat", "localhost:3000"
    record.status, record.verdict = 101, "pass"
    record.ended_by, record.reason = "client", "closed"
    return record


FACTS = {
    "id": "0123456789abcdef",
    "client": "192.0.2.1",
    "site": "chat.example.com",
    "sni": "chat.example.com",
    "ja4": "t13d1516h2_8daaf6152771_e5627efa2ab1",
    "tls_version": "TLSv1.3",
    "cipher": "TLS_AES_128_GCM_SHA256",
    "path": "/chat",
    "status": 101,
    "verdict": "pass",
    "origin": "localhost:3000",
}


def test_json_is_one_object_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    with logging_as("json"):
        Journal().ended(filled(), up=1, down=2)
        Journal().accepting_paused(Reason.OUT_OF_DESCRIPTORS, connections=3)
    out, err = capfd.readouterr()
    first, second = (json.loads(line) for line in err.splitlines())
    assert out == ""
    assert first.items() >= {"event": "connection", "level": "info", **FACTS, "up": 1, "down": 2}.items()
    assert second.items() >= {"event": "accepting paused", "level": "warning", "connections": 3}.items()
    assert first["timestamp"].endswith("Z")


def test_text_is_one_line_an_event(capfd: pytest.CaptureFixture[str]) -> None:
    with logging_as("text"):
        Journal().ended(filled())
        Journal().accepting_paused(Reason.OUT_OF_DESCRIPTORS, connections=3)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "connection" in lines[0]
    assert "/chat" in lines[0]
    assert "accepting paused" in lines[1]
    assert "\x1b" not in lines[0]


@pytest.mark.parametrize("style", ["text", "json"])
def test_events_below_information_are_not_logged(
    style: Literal["text", "json"], capfd: pytest.CaptureFixture[str]
) -> None:
    with logging_as(style):
        structlog.get_logger().debug("noise")
        logging.getLogger("asyncio").info("noise")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("style", ["text", "json"])
def test_hostile_text_stays_inside_its_line(style: Literal["text", "json"], capfd: pytest.CaptureFixture[str]) -> None:
    record = filled()
    record.path = record.sni = printable(HOSTILE)
    with logging_as(style):
        Journal().ended(record)
        Journal().failed(record, "tls: handshake failed", HOSTILE)
        logging.getLogger("asyncio").warning("from a library: %s", HOSTILE)
    err = capfd.readouterr().err
    assert err.endswith("\n")
    lines = err.splitlines()
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    if style == "json":
        ended, failed, library = (json.loads(line) for line in lines)
        assert ended["path"] == failed["detail"] == printable(HOSTILE)
        assert library["event"] == "from a library: " + printable(HOSTILE)


@pytest.mark.parametrize("value", [HOSTILE, "\x1b[2J", "\x9b31m"])
def test_text_format_escapes_every_value(value: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Also values that were not made printable before."""
    with logging_as("text"):
        structlog.get_logger().info("odd", value=value)
    err = capfd.readouterr().err
    assert err.endswith("\n")
    assert err[:-1].isprintable()


_TEXTS = st.text(max_size=50) | st.text(max_size=20).map(lambda text: text * 400)
_VALUES = st.recursive(
    _TEXTS | st.integers(-9, 9) | st.none() | st.just(object()) | st.just(Reason.CLOSED),
    lambda values: st.lists(values, max_size=40) | st.dictionaries(st.text(max_size=9), values, max_size=9),
    max_leaves=60,
)


@given(facts=st.dictionaries(st.sampled_from(["id", "path", "detail", "exception", "rules", "reason"]), _VALUES))
def test_any_event_is_one_line_that_a_pipe_takes_at_once(facts: dict[str, object]) -> None:
    line = _to_lines(_as_json(None, "info", {"event": "connection", **facts}))
    assert len(line) <= MAX_LINE == select.PIPE_BUF
    assert line.count(b"\n") == 1
    assert json.loads(line)["event"] == "connection"


def test_what_a_long_line_keeps() -> None:
    record = filled()
    record.path, record.detail = "/" + "x" * 15_000, "y" * 15_000
    found = json.loads(_as_json(None, "info", record.facts() | {"event": "connection"}))
    assert found == FACTS | {
        "path": "/" + "x" * (MAX_PATH - 4) + "...",
        "detail": "y" * (MAX_DETAIL - 3) + "...",
        "event": "connection",
        "level": "info",
        "timestamp": found["timestamp"],
    }


def test_a_long_traceback_keeps_its_end() -> None:
    text = "\n".join(f"  frame {number}" for number in range(1000))
    found = json.loads(_as_json(None, "error", {"event": "failed", "exception": text}))["exception"]
    assert found.startswith("  frame 0\n")
    assert found.endswith("  frame 999")


def test_a_long_line_for_people_is_cut() -> None:
    first, second = _to_lines("é" * 5000 + "\nend").splitlines(keepends=True)
    assert len(first) <= MAX_LINE
    assert first.decode().endswith("é...\n")
    assert second == b"end\n"


def test_values_of_any_type_can_be_logged_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    address = OSError(24, "Too many open files")
    with logging_as("json"):
        structlog.get_logger().info("odd", value=address)
    assert json.loads(capfd.readouterr().err)["value"] == str(address)


# Libraries.


def test_warning_of_a_library_is_a_line_of_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    with logging_as("json"):
        logging.getLogger("some.library").error("failed %d times", 3)
    line = json.loads(capfd.readouterr().err)
    assert line.items() >= {"event": "failed 3 times", "level": "error", "logger": "some.library"}.items()


@pytest.mark.parametrize("style", ["text", "json"])
def test_fault_that_asyncio_reports_has_its_traceback(
    style: Literal["text", "json"], capfd: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(fault)
        await asyncio.sleep(0)

    def fault() -> None:
        raise LookupError("of ours")

    with logging_as(style):
        asyncio.run(main())
    err = capfd.readouterr().err
    assert "LookupError: of ours" in err
    assert "in fault" in err
    if style == "json":
        assert "Traceback" in json.loads(err)["exception"]


@pytest.mark.parametrize("style", ["text", "json"])
def test_traceback_shows_no_values(style: Literal["text", "json"], capfd: pytest.CaptureFixture[str]) -> None:
    """A fault during a request must not put its cookies and tokens into the log."""

    def handle(cookie: str) -> int:
        return len(cookie) // 0

    with logging_as(style):
        try:
            handle("".join(("s3", "cret")))
        except ZeroDivisionError:
            structlog.get_logger().exception("tunnel failed", id="a")
    err = capfd.readouterr().err
    assert "ZeroDivisionError" in err
    assert "s3cret" not in err


def test_processes_with_one_pipe_do_not_mix_their_lines() -> None:
    """A process whose reader is slow keeps lines, and writes some of them whenever there is room."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "w") as pipe:
        writers = {name: Lines(pipe) for name in "ab"}
        for number in range(1000):  # more than a pipe holds
            for name, lines in writers.items():
                lines.msg(f"{name} {number} {'-' * (number % 500)} end")
        received, turns = b"", list(writers.values())
        while not received.endswith(b"end\n") or any(lines._kept for lines in turns):
            received += os.read(reader.fileno(), 5000)
            turns.reverse()
            for lines in turns:
                lines._write()
    found = received.decode().splitlines()
    assert len(found) == 2000
    for name in writers:
        own = [line.split() for line in found if line.startswith(name)]
        assert [int(line[1]) for line in own] == list(range(1000))
        assert all(line[-1] == "end" for line in own)


class _OtherIsFirst:
    """A poll that says a pipe has room, which another process then uses."""

    def __init__(self, fd: int, fill: Callable[[], None]) -> None:
        self._fd = fd
        self._fill = fill

    def poll(self, _: float) -> list[tuple[int, int]]:
        self._fill()
        return [(self._fd, select.POLLOUT)]


@pytest.mark.parametrize("may_reopen", [True, False], ids=["own pipe", "pipe of another user"])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket")  # a log is never closed
def test_a_process_does_not_wait_where_another_one_has_filled_the_pipe(
    kind: str, *, may_reopen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "pipe":
        reading, writing = os.pipe()
    else:
        reading, writing = (one.detach() for one in socket.socketpair())
    if not may_reopen:
        try:
            os.pwritev(writing, [b"-"], -1, os.RWF_NOWAIT)
        except OSError:
            pytest.skip("the kernel cannot write to a pipe without waiting")
        monkeypatch.setattr("tlstunnel.journal.lines.os.open", _refuse_to_open)
    with open(reading, "rb", buffering=0) as reader, open(writing, "w") as stream:  # noqa: PTH123 - descriptors
        lines = Lines(stream)

        def fill() -> None:
            with contextlib.suppress(BlockingIOError):
                while True:
                    lines._write_some(b"-" * 4095 + b"\n")

        ordinary, lines._poll = lines._poll, _OtherIsFirst(lines._fd, fill)  # type: ignore[assignment]
        lines.msg("kept")
        assert os.get_blocking(stream.fileno())  # as the other programs that have it expect
        lines._poll = ordinary
        received = b""
        while not received.endswith(b"kept\n"):
            received += os.read(reader.fileno(), 65536)
            lines._write()


def _refuse_to_open(*_: object) -> int:
    raise PermissionError


def test_a_thread_that_logs_without_pause_neither_blocks_nor_displaces(capfd: pytest.CaptureFixture[str]) -> None:
    """Its lines are written in turns, and dropped beyond a limit; the others are there, complete and in order."""

    async def serve() -> float:
        lines = Lines(sys.stderr)
        over = threading.Event()

        def talk() -> None:
            number = 0
            while not over.is_set():
                lines.msg(f"other {number} {'x' * 200}")
                number += 1

        thread = threading.Thread(target=talk)
        thread.start()
        longest = 0.0
        for number in range(100):
            before = time.monotonic()
            lines.msg(f"own {number}")
            await asyncio.sleep(0)
            longest = max(longest, time.monotonic() - before)
        over.set()
        thread.join()
        lines.flush()
        return longest

    longest = asyncio.run(serve())
    written = capfd.readouterr().err.splitlines()
    assert [line for line in written if line.startswith("own")] == [f"own {number}" for number in range(100)]
    numbers = [int(line.split()[1]) for line in written if line.startswith("other")]
    assert numbers == sorted(numbers)
    assert longest < 1
