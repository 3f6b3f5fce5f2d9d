"""Serves watchers: they get the overview every second, and records of connections as they end.

Nothing is computed without a watcher, and the overview is computed once for all. A watcher that reads slowly gets the
latest overview and is told how many records it has missed; its queue is bounded. When there are too many watchers, the
oldest of the reader that has the most is closed, so nobody can keep others from watching.

Tested by tests/promises/test_admin_live.py.
"""

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from tlstunnel.admin.overview import Overview, Overviews
from tlstunnel.admin.turns import Recent
from tlstunnel.commands.command import AnyCommand
from tlstunnel.commands.metrics import Metrics, MetricsResult
from tlstunnel.commands.processes import Status
from tlstunnel.commands.records import WatchRecords
from tlstunnel.errors import TlstunnelError
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog

MOST_WATCHERS = 32

MOST_QUEUED = 200
"""Records that wait for a watcher."""

MOST_SENT = 50
"""Records in a message."""

TICK_SECONDS = 1.0

RECENT_SECONDS = 0.5
"""How old an overview may be: it is not made more often, because rates over a shorter time say little."""

ASK_SECONDS = 5.0
"""How often processes are asked to go on sending records; they stop after twice as long."""

SEND_SECONDS = 10.0
"""How long a watcher may take to receive a message. Then it is cut off."""

LONGEST_MESSAGE = 4_096
"""Bytes of a message from a watcher, at most."""

Ask = Callable[[AnyCommand, str], Awaitable[Mapping[str, Any]]]
"""Has a command carried out for a person or program, who is named; returns the fields of the result.

Raises TlstunnelError."""

WHO = "the dashboard"


class RecordFilter(msgspec.Struct, frozen=True):
    """Which records: those with all of these that are not empty. `client` is the beginning of an address."""

    site: str = ""
    client: str = ""
    verdict: str = ""

    def matches(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record is one of them."""
        return (
            (not self.site or record.get("site") == self.site)
            and (not self.verdict or record.get("verdict") == self.verdict)
            and str(record.get("client", "")).startswith(self.client)
        )


class Watch(msgspec.Struct, frozen=True):
    """A message of a watcher: what it wants from now on."""

    watch: list[Literal["overview", "records"]] = []
    records: RecordFilter = RecordFilter()


class Watcher:
    """One live WebSocket."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._watch = Watch()
        self._overview: bytes | None = None
        self._records: deque[dict[str, Any]] = deque()
        self._left_out = 0
        self._news = asyncio.Event()

    def wants(self, what: Literal["overview", "records"]) -> bool:
        """Return whether it watches that."""
        return what in self._watch.watch

    def offer_overview(self, message: bytes) -> None:
        """Send this overview next, instead of one that was not sent yet."""
        self._overview = message
        self._news.set()

    def offer_records(self, records: list[dict[str, Any]], left_out: int) -> None:
        """Send those of the records that it wants."""
        wanted = [record for record in records if self._watch.records.matches(record)]
        self._records += wanted
        self._left_out += left_out
        while len(self._records) > MOST_QUEUED:
            self._records.popleft()
            self._left_out += 1
        if wanted or left_out:
            self._news.set()

    async def receive(self, on_change: Callable[[], None]) -> None:
        """Take what it wants, until it closes. Raises ValueError for another message."""
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            if text is None:
                raise ValueError("expected text")
            try:
                self._watch = msgspec.json.decode(text, type=Watch)
            except (msgspec.DecodeError, UnicodeError, RecursionError):
                raise ValueError('expected an object such as {"watch": ["overview"]}') from None
            if not self.wants("records"):
                self._records.clear()
                self._left_out = 0
            on_change()

    async def send(self) -> None:
        """Send what there is, until cancelled. Raises TimeoutError if it does not read."""
        while True:
            await self._news.wait()
            self._news.clear()
            if (message := self._overview) is not None:
                self._overview = None
                await self._send(message)
            while self._records or self._left_out:
                records = [self._records.popleft() for _ in range(min(len(self._records), MOST_SENT))]
                left_out, self._left_out = self._left_out, 0
                await self._send(msgspec.json.encode({"records": records, "left_out": left_out}))

    async def _send(self, message: bytes) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            await self._socket.send_text(message.decode())


class Live:
    """Serves all watchers, and single requests for the overview."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._watchers: dict[Watcher, Callable[[], bool]] = {}
        self._readers: dict[Watcher, str] = {}
        self._overviews = Overviews()
        self._recent = Recent(self._compute, RECENT_SECONDS)
        self._ticking: asyncio.Task[None] | None = None
        self._asked = 0.0
        self._asking: asyncio.Task[None] | None = None

    async def serve(self, socket: WebSocket, reader: str, still_allowed: Callable[[], bool]) -> None:
        """Serve one watcher of this reader, until it goes, or is not allowed to watch any more."""
        await socket.accept()
        watcher = Watcher(socket)
        self._watchers[watcher] = still_allowed
        self._readers[watcher] = reader
        self._make_room()
        sending = asyncio.ensure_future(watcher.send())
        receiving = asyncio.ensure_future(watcher.receive(self._start))
        allowed = asyncio.ensure_future(self._wait_until_forbidden(watcher))
        tasks = (sending, receiving, allowed)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._remove(watcher)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(results[0], TimeoutError):
            socket.scope["state"]["abort"]()
            return
        code = (
            1008 if allowed.done() and not allowed.cancelled() else 1007 if isinstance(results[1], ValueError) else 1001
        )
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, ValueError | WebSocketDisconnect):
                raise result
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # it has closed already
            async with asyncio.timeout(SEND_SECONDS):
                await socket.close(code)

    async def make_overview(self) -> Overview:
        """Return the overview. Raises TlstunnelError.

        Rates need two moments, so without watchers this takes a second.
        """
        if time.time() - self._overviews.last > 2 * TICK_SECONDS:
            await self._recent.get()
            await asyncio.sleep(TICK_SECONDS)
        return await self._recent.get()

    def take_records(self, records: list[dict[str, Any]], left_out: int) -> None:
        """Give watchers these records."""
        for watcher in self._watchers:
            if watcher.wants("records"):
                watcher.offer_records(records, left_out)

    async def close(self) -> None:
        """Stop."""
        tasks = [task for task in (self._ticking, self._asking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._recent.close()

    def _make_room(self) -> None:
        """If there are too many watchers, remove the oldest of the reader that has the most."""
        if len(self._readers) > MOST_WATCHERS:
            (most, _), *_ = Counter(self._readers.values()).most_common(1)
            self._remove(next(watcher for watcher, reader in self._readers.items() if reader == most))

    def _remove(self, watcher: Watcher) -> None:
        """Remove a watcher; its WebSocket ends within a second."""
        self._watchers.pop(watcher, None)
        self._readers.pop(watcher, None)

    async def _wait_until_forbidden(self, watcher: Watcher) -> None:
        while self._watchers.get(watcher, lambda: False)():  # noqa: ASYNC110 - a login ends by the clock too
            await asyncio.sleep(TICK_SECONDS)

    def _start(self) -> None:
        if self._ticking is None or self._ticking.done():
            self._ticking = asyncio.ensure_future(self._tick())

    async def _tick(self) -> None:
        """Send overviews as long as there is a watcher."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while watching := [one for one in self._watchers if one.wants("overview") or one.wants("records")]:
            if any(one.wants("records") for one in watching):
                self._ask_for_records()
            if any(one.wants("overview") for one in watching):
                await self._offer_overview()
            due = max(due + TICK_SECONDS, loop.time())
            await asyncio.sleep(due - loop.time())

    async def _offer_overview(self) -> None:
        try:
            overview = await self._recent.get()
        except TlstunnelError:  # the parent is being replaced; the next overview is there
            return
        except Exception as error:
            structlog.get_logger().error(Event.ADMIN_REQUEST_FAILED, exc_info=error)
            return
        message = b'{"overview":%b}' % msgspec.json.encode(overview)
        for watcher in self._watchers:
            if watcher.wants("overview"):
                watcher.offer_overview(message)

    def _ask_for_records(self) -> None:
        now = time.monotonic()
        if now - self._asked >= ASK_SECONDS and (self._asking is None or self._asking.done()):
            self._asked = now
            self._asking = asyncio.ensure_future(self._request_records())

    async def _request_records(self) -> None:
        with contextlib.suppress(TlstunnelError):  # asked again
            await self._ask(WatchRecords(seconds=2 * ASK_SECONDS), WHO)

    async def _compute(self) -> Overview:
        status, metrics = await asyncio.gather(self._ask(Status(metrics="none"), WHO), self._ask(Metrics(), WHO))
        result = msgspec.convert(metrics, MetricsResult)
        return self._overviews.add(result.now, result.snapshot, status)
