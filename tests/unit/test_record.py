"""The record of a connection, counters and samples, and lines that nobody's bytes can break."""

import asyncio
import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Literal

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tlstunnel.escaping import printable
from tlstunnel.journal import journal as recording
from tlstunnel.journal.journal import Journal, Lines, Record, configure_logging

HOSTILE = '\x1b[2J\r\n{"event":"ready"}\x00\x7f\x9b31m\u202e\u2028"\\ é'


@contextlib.contextmanager
def logging_as(style: Literal["text", "json"]) -> Iterator[None]:
    """As `configure_logging` sets it, and as it was again."""
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


# What is said of a connection.


def test_record_of_a_connection() -> None:
    record = filled()
    with capture_logs() as logs:
        Journal().ended(record, up=12, down=345)
    (line,) = logs
    assert line.pop("seconds") >= 0
    assert line == {
        "event": "connection",
        "log_level": "info",
        **FACTS,
        "up": 12,
        "down": 345,
        "ended_by": "client",
        "reason": "closed",
    }


def test_seconds_are_those_since_the_beginning() -> None:
    record = filled()
    record.started -= 61.5
    with capture_logs() as logs:
        Journal().ended(record)
    assert logs[0]["seconds"] == pytest.approx(61.5, abs=5)


def test_peer_is_named_where_it_is_not_the_client() -> None:
    record = filled()
    assert "peer" not in record.facts()
    record.client = "198.51.100.7"
    assert record.facts() == {**FACTS, "client": "198.51.100.7", "peer": "192.0.2.1"}


def test_detail_is_named_where_there_is_one() -> None:
    record = filled()
    record.detail = "101 with a wrong Sec-WebSocket-Accept"
    assert record.facts() == {**FACTS, "detail": "101 with a wrong Sec-WebSocket-Accept"}


def test_new_record_has_every_field() -> None:
    assert Record("a", "").facts().keys() == FACTS.keys()


def test_opening_is_logged_where_asked_for() -> None:
    with capture_logs() as logs:
        Journal(opened=True).opened(filled())
    assert logs == [{"event": "opened", "log_level": "info", **FACTS}]


def test_opening_is_counted_only_by_default() -> None:
    journal = Journal()
    with capture_logs() as logs:
        journal.opened(filled())
        journal.opened(filled())
    assert logs == []
    assert journal.counters["opened"] == 2


def test_ends_are_counted_by_who_and_why() -> None:
    journal, other = Journal(), filled()
    other.ended_by, other.reason = "origin", "reset"
    with capture_logs() as logs:
        for record in (filled(), other, filled()):
            journal.ended(record)
    assert len(logs) == 3
    assert journal.counters == {"ended: client: closed": 2, "ended: origin: reset": 1}


# Samples.


def test_failures_before_a_request_are_counted_and_one_is_logged() -> None:
    journal = Journal()
    with capture_logs() as logs:
        for _ in range(1000):
            journal.failed(Record("a", "192.0.2.1"), "tls: handshake failed", "NO_SHARED_CIPHER")
    assert logs == [
        {
            "event": "no handshake",
            "log_level": "warning",
            "reason": "tls: handshake failed",
            "unsaid": 0,
            "client": "192.0.2.1",
            "detail": "NO_SHARED_CIPHER",
        }
    ]
    assert journal.counters == {"tls: handshake failed": 1000}


def test_later_sample_says_how_many_were_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal()
    with capture_logs() as logs:
        for _ in range(5):
            journal.sampled("no handshake", "hello: timed out")
        monkeypatch.setattr(recording, "SAMPLE_SECONDS", 0.0)
        journal.sampled("no handshake", "hello: timed out")
        journal.sampled("no handshake", "hello: timed out")
    assert [line["unsaid"] for line in logs] == [0, 4, 0]
    assert journal.counters == {"hello: timed out": 7}


def test_each_kind_is_sampled_alone() -> None:
    journal = Journal()
    with capture_logs() as logs:
        for why in ("hello: timed out", "hello: not TLS", "hello: timed out", "hello: not TLS"):
            journal.failed(Record("a", "192.0.2.1"), why)
    assert [line["reason"] for line in logs] == ["hello: timed out", "hello: not TLS"]


def test_sample_names_the_sni_where_there_is_one() -> None:
    record = Record("a", "192.0.2.1")
    record.sni = "nobody.example.com"
    with capture_logs() as logs:
        Journal().failed(record, "hello: no site of this name")
    assert logs[0]["sni"] == "nobody.example.com"


# Lines.


@given(st.text())
def test_printable_text_is_one_harmless_line(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert all(char in text for char in shown if not char.isascii())


@given(st.text(), st.text())
def test_printable_text_is_never_the_same_for_two(first: str, second: str) -> None:
    assert (printable(first) == printable(second)) is (first == second)


@pytest.mark.parametrize("text", ["", "chat.example.com", "/a b?c=%20&d", "é", '"quoted"'])
def test_harmless_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_json_is_one_object_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    with logging_as("json"):
        Journal().ended(filled(), up=1, down=2)
        Journal().sampled("accepting paused", "no descriptors left", connections=3)
    out, err = capfd.readouterr()
    first, second = (json.loads(line) for line in err.splitlines())
    assert out == ""
    assert first.items() >= {"event": "connection", "level": "info", **FACTS, "up": 1, "down": 2}.items()
    assert second.items() >= {"event": "accepting paused", "level": "warning", "connections": 3}.items()
    assert first["timestamp"].endswith("Z")


def test_text_is_one_line_an_event(capfd: pytest.CaptureFixture[str]) -> None:
    with logging_as("text"):
        Journal().ended(filled())
        Journal().sampled("accepting paused", "no descriptors left")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "connection" in lines[0]
    assert "/chat" in lines[0]
    assert "accepting paused" in lines[1]
    assert "\x1b" not in lines[0]


@pytest.mark.parametrize("style", ["text", "json"])
def test_what_is_less_than_information_is_not_logged(
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
def test_text_escapes_whatever_it_is_given(value: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Also what somebody forgot to make printable."""
    with logging_as("text"):
        structlog.get_logger().info("odd", value=value)
    err = capfd.readouterr().err
    assert err.endswith("\n")
    assert err[:-1].isprintable()


def test_values_of_any_type_can_be_logged_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    address = OSError(24, "Too many open files")
    with logging_as("json"):
        structlog.get_logger().info("odd", value=address)
    assert json.loads(capfd.readouterr().err)["value"] == str(address)


# What libraries say.


def test_warning_of_a_library_is_a_line_of_ours(capfd: pytest.CaptureFixture[str]) -> None:
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
    """A fault while a request is at hand must not put its cookies and tokens into the log."""

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
    """One whose reader is behind keeps lines, and writes a part of them whenever there is room."""
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


def test_another_thread_that_never_stops_talking_neither_holds_nor_displaces(capfd: pytest.CaptureFixture[str]) -> None:
    """Its lines are written in turns, and lost beyond what may wait; ours are there, whole and in order."""

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
