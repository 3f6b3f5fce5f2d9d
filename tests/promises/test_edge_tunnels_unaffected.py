"""Established tunnels, and handshakes of other sites, are not slowed down by anything that a worker does.

Ten tunnels exchange numbered messages all the time, and clients open more tunnels on a site without a worker,
while workers wait, sleep, compute, raise and leak. A worker that blocks its thread does so until the others have moved.
For the rest, `MOST` is the longest a message or such a handshake may take: if a tunnel waited for a worker, it would
take seconds.
"""

import asyncio
import contextlib
import itertools
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.harness import (
    Certificate,
    Record,
    Tunnel,
    WebsocketsOrigin,
    assert_below,
    client_context,
    connect_tls,
    eventually,
    handshake_request,
    upgrade,
)
from tests.promises.edged import BY_PATH, edged
from tests.promises.numbered import Numbered
from tests.promises.wire import read_until_end

BLOCKS, RESUMED = "edge worker blocks the event loop", "edge worker resumed"
HOLDS_GIL = "edge worker holds the GIL"

TUNNELS = 10
HELD = 1.6
"""Seconds for which a worker blocks its thread, if not until the test releases it."""

MOST = 0.6
"""Seconds. Without noise it is a tenth of that: three programs and others share the machine's cores."""

WORKER = (
    BY_PATH
    + f"""
import logging, os

RELEASED = os.path.join(os.path.dirname(__file__), "released")
kept = []
log = logging.getLogger(__name__)


async def awaits(request, env):
    await asyncio.sleep({HELD})


async def sleeps(request, env):
    while not os.path.exists(RELEASED):
        time.sleep(0.5)  # it stands here
    return request


def compute():
    while not os.path.exists(RELEASED):
        for _ in range(1000): sum(range(1000))  # it computes here


async def computes(request, env):
    compute()
    return request


async def calls_c(request, env):
    import re
    re.fullmatch("(a|aa)+b", "a" * 35)  # it searches here
    return request


async def raises(request, env):
    raise ValueError(request.path)


async def tasks(request, env):
    for _ in range(100):
        kept.append(asyncio.create_task(asyncio.sleep(3600)))
    return request


async def memory(request, env):
    kept.append(b"x" * (16 << 20))
    return request


async def references(request, env):
    kept.append(request)
    return request


async def descriptors(request, env):
    while True:
        kept.append(os.open("/dev/null", os.O_RDONLY))


class Slow(Exception):
    def __str__(self):
        time.sleep({HELD})
        return "slow"


async def slow_text(request, env):
    raise Slow


async def long_text(request, env):
    raise ValueError("\\x1b" * 4_000_000)


class Lazy(dict):
    def items(self):
        time.sleep({HELD / 2})
        return super().items()


async def slow_headers(request, env):
    return Reply(403, "no", Lazy({{"X-Said": "a"}}))


async def talks(request, env):
    for number in range(100_000):
        log.warning("line %d", number)
    return request


async def in_a_thread(request, env):
    await asyncio.to_thread(time.sleep, 4)
    return request


async def forever(request, env):
    while True:
        time.sleep(0.1)
"""
)


def line_of(text: str) -> int:
    """Return the number of the line of the worker's file that contains this."""
    return next(number for number, line in enumerate(WORKER.splitlines(), 1) if text in line)


@pytest.fixture(scope="module")
def origin() -> Iterator[WebsocketsOrigin]:
    with WebsocketsOrigin() as origin:
        yield origin


def _both(origin: WebsocketsOrigin, certificate: Certificate, **options: Any) -> Tunnel:
    """Configure localhost with a worker, and 127.0.0.1, for clients without SNI, without one."""
    plain = (
        f'[[sites]]\nnames = ["127.0.0.1"]\ndefault = true\norigins = ["{origin.address}"]\n'
        f'cert = "{certificate.cert}"\nkey = "{certificate.key}"\n'
    )
    return edged(origin.address, certificate, WORKER, site=plain, measured=True, errors_expected=True, **options)


@pytest.fixture(scope="module")
def started(origin: WebsocketsOrigin, certificate: Certificate) -> Iterator[Tunnel]:
    with _both(origin, certificate) as tunnel:
        yield tunnel


@pytest.fixture
def tunnel(started: Tunnel) -> Tunnel:
    """Return the tunnel once the workers' thread is free."""
    eventually(lambda: _statuses(started, "/", 1) == {101})
    return started


class Beside:
    """Traffic while a worker runs. `message` and `handshake` are the longest times that one took, in seconds."""

    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel
        self._context = client_context(tunnel)
        self._over = asyncio.Event()
        self.message = self.handshake = 0.0
        self.opened = 0
        self._tunnels: list[Numbered] = []

    async def while_(self, attack: Callable[["Beside"], object]) -> object:
        """Start, call `attack` in a thread, and continue until it has ended and all traffic has moved since."""
        self._tunnels = [await Numbered.open(self._tunnel.port, self._context) for _ in range(TUNNELS)]
        beside = [asyncio.ensure_future(self._talk(one)) for one in self._tunnels]
        beside.append(asyncio.ensure_future(self._arrive()))
        try:
            while not self.opened:
                await asyncio.sleep(0.01)
            before, opened = self._exchanged(), self.opened
            found = await asyncio.to_thread(attack, self)
            while self.opened == opened and not any(task.done() for task in beside):
                await asyncio.sleep(0.01)
        finally:
            self._over.set()
            await asyncio.gather(*beside)
        assert all(now > count for now, count in zip(self._exchanged(), before, strict=True))
        await asyncio.gather(*(one.close() for one in self._tunnels))
        return found

    def wait_for_progress(self) -> None:
        """Wait, in the attack's thread, until all tunnels have exchanged ten messages and three more have opened."""
        before, opened = self._exchanged(), self.opened
        eventually(lambda: all(now >= count + 10 for now, count in zip(self._exchanged(), before, strict=True)))
        eventually(lambda: self.opened >= opened + 3)

    def _exchanged(self) -> list[int]:
        return [one.exchanged for one in self._tunnels]

    async def _talk(self, one: Numbered) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            await one.exchange()
            self.message = max(self.message, time.monotonic() - began)
            await asyncio.sleep(0.01)

    async def _arrive(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", self._tunnel.port, ssl=self._context, server_hostname="127.0.0.1"
            )
            writer.write(handshake_request("/raises", "127.0.0.1"))
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
            self.handshake = max(self.handshake, time.monotonic() - began)
            self.opened += 1
            writer.transport.abort()
            await asyncio.sleep(0.01)


def _statuses(tunnel: Tunnel, path: str, count: int, at_once: int = 10) -> set[int]:
    """Send so many requests and return their statuses."""
    context = client_context(tunnel)

    def one() -> int:
        with connect_tls(tunnel, context=context) as client:
            status = upgrade(client, path).status
            if status != 101:
                read_until_end(client)
            return status

    with ThreadPoolExecutor(at_once) as pool:
        return {each.result() for each in [pool.submit(one) for _ in range(count)]}


@contextlib.contextmanager
def _released_afterwards(tunnel: Tunnel) -> Iterator[None]:
    """A worker that blocks the thread of workers does so until the end of this."""
    released = tunnel.folder / "released"
    try:
        yield
    finally:
        released.touch()
        eventually(lambda: _statuses(tunnel, "/", 1) == {101})
        released.unlink()


@pytest.mark.alone
@pytest.mark.parametrize(
    ("path", "count", "statuses"),
    [
        ("/awaits", 30, {504}),
        ("/raises", 100, {500}),
        ("/tasks", 50, {101}),
        ("/memory", 10, {101}),
        ("/references", 100, {101}),
        ("/slow_text", 1, {500, 504}),
        ("/long_text", 1, {500, 504}),
        ("/slow_headers", 1, {403, 500, 504}),
        ("/talks", 1, {101, 504}),
    ],
)
def test_a_worker_that_fails_and_leaks(tunnel: Tunnel, path: str, count: int, statuses: set[int]) -> None:
    def measure() -> float:
        beside = Beside(tunnel)
        found = asyncio.run(beside.while_(lambda _: _statuses(tunnel, path, count)))
        assert isinstance(found, set)
        assert found <= statuses
        print(f"the slowest message {beside.message:.3f} s, the slowest handshake {beside.handshake:.3f} s")
        return max(beside.message, beside.handshake)

    assert_below(MOST, measure)


@pytest.mark.parametrize(
    ("path", "stands", "code"),
    [
        ("/sleeps", "# it stands here", "time.sleep(0.5)  # it stands here"),
        ("/computes", "# it computes here", ""),
    ],
)
def test_a_worker_that_blocks_the_workers_loop(tunnel: Tunnel, path: str, stands: str, code: str) -> None:
    """Its requests get a response meanwhile, and the log names it with the line that blocks."""
    # On a busy machine, a worker that only waits for a core may be named too, before or after: with another line.
    where = {f"{tunnel.folder}/worker.py:{line_of(stands)}", f"{tunnel.folder}/worker.py:{line_of(stands) - 1}"}

    def watched() -> list[Record]:
        """What the watchdog has logged since it named this line."""
        logged = [record for record in tunnel.records() if record["event"] in (BLOCKS, RESUMED)]
        return list(itertools.dropwhile(lambda record: record.get("line") not in where, logged))

    def attack(beside: Beside) -> object:
        assert _statuses(tunnel, path, 1) == {504}
        beside.wait_for_progress()
        return eventually(watched)[0]

    with _released_afterwards(tunnel):
        named: Any = asyncio.run(Beside(tunnel).while_(attack))
        assert watched() == [named]
    assert named["worker"] == f"{tunnel.folder}/worker.py:fetch"
    if code:
        assert (named["line"], named["code"]) == (f"{tunnel.folder}/worker.py:{line_of(stands)}", code)
    assert named["seconds"] >= 0.25
    # It is logged once, and so is its end.
    eventually(lambda: watched()[1:])
    assert watched()[1]["event"] == RESUMED
    assert not [record for record in watched()[2:] if record.get("line") in where]


def test_a_worker_that_holds_the_gil_is_named(tunnel: Tunnel) -> None:
    """A regular expression that backtracks holds the GIL, and so blocks tunnels too: it is named once it is over."""
    _statuses(tunnel, "/calls_c", 1)
    line = f"{tunnel.folder}/worker.py:{line_of('# it searches here')}"
    named = tunnel.wait_record(lambda record: record["event"] == HOLDS_GIL and record["line"] == line)
    assert named["worker"] == f"{tunnel.folder}/worker.py:fetch"
    assert named["code"].endswith("# it searches here")
    assert named["seconds"] >= 0.25


def test_other_requests_of_a_blocked_worker(tunnel: Tunnel) -> None:
    """They wait for the worker that blocks the thread, but no longer than their own deadline."""
    with _released_afterwards(tunnel):
        assert _statuses(tunnel, "/sleeps", 1) == {504}
        assert _statuses(tunnel, "/", 20, at_once=20) == {504}


@pytest.mark.alone
def test_a_worker_that_leaks_every_descriptor(origin: WebsocketsOrigin, certificate: Certificate) -> None:
    """Then none is left for new connections; but established tunnels have their own."""
    with _both(origin, certificate, descriptors=256) as tunnel:

        async def run() -> None:
            context = client_context(tunnel)
            tunnels = [await Numbered.open(tunnel.port, context) for _ in range(TUNNELS)]
            with contextlib.suppress(OSError, AssertionError, ssl.SSLError):
                await asyncio.to_thread(_statuses, tunnel, "/descriptors", 1)
            tunnel.wait_record(lambda record: "Too many open files" in str(record))
            assert tunnel.descriptors() >= 250
            slowest = []
            for _ in range(3):
                slowest.append(0.0)
                for _ in range(100):
                    began = time.monotonic()
                    await asyncio.gather(*(one.exchange() for one in tunnels))
                    slowest[-1] = max(slowest[-1], time.monotonic() - began)
            assert min(slowest) < MOST
            await asyncio.gather(*(one.close() for one in tunnels))

        asyncio.run(run())


# --- the end ----------------------------------------------------------------------------------------------------------


def _stops_within(origin: WebsocketsOrigin, certificate: Certificate, path: str, seconds: float) -> None:
    def measure() -> float:
        with _both(origin, certificate) as tunnel:
            assert _statuses(tunnel, path, 1) == {504}
            began = time.monotonic()
            assert tunnel.stop() == 0
            return time.monotonic() - began

    assert_below(seconds, measure)


@pytest.mark.alone
def test_a_process_exits_although_a_worker_does_not_end(origin: WebsocketsOrigin, certificate: Certificate) -> None:
    _stops_within(origin, certificate, "/forever", 2.5)


@pytest.mark.alone
def test_a_process_exits_although_a_thread_of_a_worker_does_not_end(
    origin: WebsocketsOrigin, certificate: Certificate
) -> None:
    """The watchdog recommends `asyncio.to_thread`; a thread that sleeps for an hour must not delay an upgrade."""
    _stops_within(origin, certificate, "/in_a_thread", 2.5)
