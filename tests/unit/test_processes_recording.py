"""Records are sent while somebody looks: at most so many, and none afterwards."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from structlog.testing import capture_logs

from tlstunnel.commands.records import Watched, WatchRecords
from tlstunnel.journal.events import Reason
from tlstunnel.journal.journal import Journal
from tlstunnel.journal.record import Record
from tlstunnel.journal.style import Style
from tlstunnel.processes.answers import recording
from tlstunnel.processes.answers.recording import Recording
from tlstunnel.processes.link import Link
from tlstunnel.processes.messages import Recorded


class Watching:
    """A process whose records are watched, and the parent at the other end of its link."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.arrived = asyncio.Event()
        self.received: list[Recorded] = []
        self.parent = Link(theirs, {}, lambda: None, {Recorded: self._receive})
        self.link = Link(ours, {}, lambda: None)
        self.journal = Journal()
        self.recording = Recording(self.journal, self.link)

    def _receive(self, recorded: Recorded) -> None:
        self.received.append(recorded)
        self.arrived.set()

    def end(self, count: int = 1) -> None:
        with capture_logs():
            for number in range(count):
                self.journal.ended(Record(f"{number}", "192.0.2.1", site="a.test", reason="closed"))

    async def receive(self) -> Recorded:
        await self.arrived.wait()
        self.arrived.clear()
        return self.received[-1]


def watching(test: Callable[[Watching], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        process = Watching()
        try:
            async with asyncio.timeout(10):
                await test(process)
        finally:
            process.recording.close()
            process.link.close()
            process.parent.close()

    asyncio.run(main())


def test_records_are_sent_as_they_are_logged() -> None:
    async def test(process: Watching) -> None:
        process.journal.style = Style(address="prefix")
        assert await process.recording.watch(WatchRecords(), "admin") == Watched(1)
        process.end()
        with capture_logs():
            process.journal.failed(Record("", "192.0.2.9"), Reason.HELLO_NOT_TLS)
        first, second = (await process.receive()).records
        assert (first["event"], first["site"], first["client"]) == ("connection", "a.test", "192.0.2.0/24")
        assert (second["event"], second["reason"]) == ("no TLS handshake", "hello: not TLS")

    watching(test)


def test_what_exceeds_the_limit_is_counted() -> None:
    async def test(process: Watching) -> None:
        await process.recording.watch(WatchRecords(limit=4), "admin")
        process.end(10)
        recorded = await process.receive()
        assert (len(recorded.records), recorded.left_out) == (2, 8)

    watching(test)


def test_nothing_is_taken_before_and_after() -> None:
    async def test(process: Watching) -> None:
        process.end()
        assert process.journal.listeners == []
        await process.recording.watch(WatchRecords(seconds=0), "admin")
        await process.recording.watch(WatchRecords(seconds=0), "admin")
        assert len(process.journal.listeners) == 1
        process.end()
        await process.receive()
        assert process.journal.listeners == []

    watching(test)


def test_a_parent_that_does_not_read_gets_no_more() -> None:
    async def test(process: Watching) -> None:
        process.link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        asyncio.get_running_loop().remove_reader(process.parent.sock)
        await process.recording.watch(WatchRecords(limit=recording.MOST_RECORDS), "admin")
        while process.link.idle:
            process.end(recording.MOST_RECORDS)
            process.recording._send()
        waiting = len(process.link._unsent)
        process.end(recording.MOST_RECORDS)
        process.recording._send()
        process.recording._send()
        assert len(process.link._unsent) == waiting

    watching(test)
