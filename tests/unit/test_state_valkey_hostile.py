"""A server that is hostile, broken or confused cannot crash, block or bloat the ledger, nor write to its log."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from tests.redis_server import RedisServer, retry, wait_for
from tlstunnel.state.counters import CountersUnavailable, LimitCheck
from tlstunnel.state.valkey import counters as module
from tlstunnel.state.valkey.address import Endpoint, parse_url
from tlstunnel.state.valkey.connection import ServerUnavailable, explain_error, open_connection
from tlstunnel.state.valkey.counters import ValkeyCounters
from tlstunnel.state.valkey.replies import MAX_REPLY

CHECK = [LimitCheck("a", 1000, 60, max_tunnels=1000)]
MANY = 1 << 62


class Impostor:
    """Relays to a real server, until `say` is what it replies instead: again and again if `drip`, for `endless` bytes.

    The first `after` replies are still real.
    """

    def __init__(self, server: RedisServer, path: Path) -> None:
        self._target = os.fspath(server.socket)
        self.path = path
        self.say: bytes | None = None
        self.after = 0
        self.endless = b""
        self.drip = False
        self._handlers: set[asyncio.Task[None]] = set()

    async def end(self) -> None:
        for task in self._handlers:
            task.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        from_server, to_server = await asyncio.open_unix_connection(self._target)
        replies = 0

        async def relay() -> None:
            nonlocal replies
            while reply := await from_server.read(1 << 16):
                replies += 1
                writer.write(reply)

        relaying = asyncio.create_task(relay())
        try:
            while data := await reader.read(1 << 16):
                if self.say is None or replies < self.after:
                    to_server.write(data)
                    continue
                for piece in [self.say[at : at + 1] for at in range(len(self.say))] if self.drip else [self.say]:
                    writer.write(piece)
                    await asyncio.sleep(0.05 if self.drip else 0)
                while self.endless and not writer.is_closing():
                    writer.write(self.endless)
                    await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            relaying.cancel()
            for one in (writer, to_server):
                one.close()
                with suppress(ConnectionError):
                    await one.wait_closed()


@asynccontextmanager
async def between(server: RedisServer, folder: Path) -> AsyncIterator[tuple[Impostor, ValkeyCounters, list[str]]]:
    impostor = Impostor(server, folder / "impostor.sock")
    listening = await asyncio.start_unix_server(impostor.handle, impostor.path)
    reports: list[str] = []
    counters = ValkeyCounters(
        parse_url(f"redis+unix://{impostor.path}"),
        prefix="test",
        instance="one",
        timeout=5.0,
        report=lambda line, _: reports.append(line),
    )
    counters.start()
    try:
        await retry(lambda: counters.check(CHECK), CountersUnavailable)
        yield impostor, counters, reports
    finally:
        await counters.close()
        listening.close()
        await impostor.end()


def bulk(data: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(data), data)


def packed(*values: object) -> bytes:
    return bulk(msgspec.msgpack.encode(values))


NOW = 1_700_000_000_000_000
ESCAPES = b"\x1b[2J\x07\xff\xfe" * 200_000

HOSTILE = {
    "number": b":1\r\n",
    "huge number": b":" + b"9" * 100_000 + b"\r\n",
    "nil": b"$-1\r\n",
    "no protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "escape characters": b"-ERR " + ESCAPES + b"\r\n",
    "escape characters as status": b"+" + ESCAPES + b"\r\n",
    "map of arrays": b"%1\r\n*1\r\n:1\r\n:1\r\n",
    "set of arrays": b"~1\r\n*1\r\n:1\r\n",
    "array of 2^32": b"*4294967294\r\n:1\r\n",
    "nested": b"*1\r\n" * 1000,
    "digits": b"(" + b"1" * 100_000 + b"\r\n",
    "moved to nowhere": b"-MOVED 1 :" + b"9" * 10_000 + b"\r\n",
    "moved to a host that is none": b"-MOVED 1 " + b"x\0." * 1000 + b":1\r\n",
    "moved to a port that is none": b"-MOVED 1 h:99999\r\n",
    "no numbers": packed("a", "b"),
    "too few": packed(0),
    "negative time": packed(0, -1),
    "time after the end of all floats": packed(0, MANY),
    "too many": packed(0, NOW, *[1] * 50_000),
    "unknown status": packed(77, NOW, 0, 0),
    "unknown result": packed(0, NOW, 99, 0),
    "negative wait": packed(0, NOW, 1, -1),
    "not UTF-8": bulk(b"\x93\x00\x01\xa1\xff"),
    "wrong secret": packed(NOW, "\x1b" * 100, "one.1"),
    "long secret": packed(NOW, "a" * 500_000),
    "many holders": packed(NOW, "a" * 32, *["one.1"] * 100_000),
    "no such time": packed(MANY, "a" * 32),
}


@pytest.mark.parametrize("after", [0, 6], ids=["logging in", "counting"])
@pytest.mark.parametrize("reply", HOSTILE.values(), ids=HOSTILE)
def test_replies_that_are_none(
    server: RedisServer, tmp_path: Path, reply: bytes, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be counted fails at once, with one short printable line. Once the server is right, it counts."""
    monkeypatch.setattr(module, "PATIENCE", 0.3)

    async def main() -> None:
        failures: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        async with between(server, tmp_path) as (impostor, counters, reports):
            impostor.say, impostor.after = reply, after
            assert counters._registration is not None
            counters._registration.connection.close()
            for _ in range(5):
                with suppress(CountersUnavailable):
                    await asyncio.wait_for(counters.check(CHECK), 10)
                with suppress(CountersUnavailable):
                    await asyncio.wait_for(counters.count_tunnels(["a"]), 10)
            impostor.say = None
            await retry(lambda: counters.check(CHECK), CountersUnavailable)
            assert all(line.isprintable() and len(line) < 500 for line in reports), reports
            assert len(reports) <= 12
        assert not failures

    asyncio.run(main())


ENDLESS = {
    "array": (b"*1000000000\r\n", b":1\r\n" * 10_000),
    "string": (b"$1000000000\r\n", b"x" * 65_536),
    "error": (b"-ERR ", b"\x1b[2J" * 10_000),
    "replies": (b"", b":1\r\n" * 10_000),
    "arrays in an array": (b"*1000000\r\n", b"*2\r\n:1\r\n:2\r\n" * 5_000),
}


@pytest.mark.parametrize(("say", "endless"), ENDLESS.values(), ids=ENDLESS)
def test_replies_without_end(server: RedisServer, tmp_path: Path, say: bytes, endless: bytes) -> None:
    """The connection is closed long before they need memory, and the loop runs meanwhile."""

    async def main() -> None:
        async with between(server, tmp_path) as (impostor, counters, reports):
            before = resident()
            impostor.say, impostor.endless = say, endless
            assert counters._registration is not None
            counters._registration.connection.close()
            slowest = 0.0
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                began = time.monotonic()
                await asyncio.sleep(0)
                slowest = max(slowest, time.monotonic() - began)
            await wait_for(lambda: counters.failure)
            assert counters.failure == "what it sends is not the protocol of a Valkey or Redis server"
            assert slowest < 1.0
            assert resident() - before < 40 * MAX_REPLY
            impostor.say, impostor.endless = None, b""
            await retry(lambda: counters.check(CHECK), CountersUnavailable)
            assert reports

    asyncio.run(main())


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_reply_that_drips(server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as none: a question waits no longer for it."""
    monkeypatch.setattr(module, "PATIENCE", 0.3)

    async def main() -> None:
        async with between(server, tmp_path) as (impostor, counters, _):
            impostor.say, impostor.drip = bulk(b"x" * 100_000), True
            assert counters._registration is not None
            counters._registration.connection.close()
            await wait_for(lambda: counters.failure)
            assert counters.failure == "it does not answer"
            impostor.say = None
            await retry(lambda: counters.check(CHECK), CountersUnavailable)

    asyncio.run(main())


def test_a_key_of_another_type_fails_only_its_own_questions(server: RedisServer, tmp_path: Path) -> None:
    """It is reported once. Others are counted, over the same connection."""

    async def main() -> None:
        async with between(server, tmp_path) as (_, counters, reports):
            registration = counters._registration
            assert registration is not None
            names = registration._names
            taken = LimitCheck("taken", 5, 60)
            server.command("HSET", names.window(taken, names.hash("taken")), "not", "ours")
            server.command("SET", names.tunnels(names.hash("tunnels")), "not ours")
            for _ in range(3):
                with pytest.raises(CountersUnavailable, match="a key has another type than ours"):
                    await counters.check([taken])
                with pytest.raises(CountersUnavailable, match="a key has another type than ours"):
                    await counters.count_tunnels(["tunnels"])
                assert not (await counters.check(CHECK))[0].exceeded
            counters.take_tunnels(["tunnels"])
            assert await counters.count_tunnels(["a"]) == [counters.tunnels["a"]]
            assert counters._registration is registration
            (report,) = reports
            assert report.endswith(
                "does not count everything: a key has another type than ours; use another state.prefix"
            )

    asyncio.run(main())


@pytest.mark.parametrize("endpoint", [Endpoint("h\0st", 1), Endpoint("x" * 300, 1), Endpoint("127.0.0.1", 99_999)])
def test_where_nothing_can_be(endpoint: Endpoint) -> None:
    """A cluster or a sentinel may name any host and port."""

    async def main() -> None:
        with pytest.raises(ServerUnavailable):
            await open_connection(endpoint, None)

    asyncio.run(main())


def test_explanations_are_printable() -> None:
    for text in ("\x1b[2J", "\r\n", "\u202e"):
        assert str(explain_error(OSError(text))).isprintable()
        assert str(explain_error(ValueError(text))).isprintable()
