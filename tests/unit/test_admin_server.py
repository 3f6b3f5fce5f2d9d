"""Clients that are slow, idle or many, with short deadlines: real sockets, and the server in this process."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.websockets import WebSocket

from tests.promises.administered import upgrade_request
from tlstunnel.admin import server
from tlstunnel.admin.server import HttpServer

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_SECONDS", "IDLE_SECONDS", "BODY_SECONDS", "LINGER_SECONDS"):
        monkeypatch.setattr(server, name, 0.2)
    monkeypatch.setattr(server, "RESPONSE_SECONDS", 0.6)
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 8)


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        socket = WebSocket(scope, receive, send)
        await socket.accept()
        while (await socket.receive())["type"] != "websocket.disconnect":
            pass
        return
    request = Request(scope, receive)
    match scope["path"]:
        case "/body":
            size = sum([len(part) async for part in request.stream()])
            response = PlainTextResponse(str(size))
        case "/large":
            response = PlainTextResponse("x" * 20_000_000)
        case "/forever":
            await asyncio.sleep(60)
            return
        case _:
            response = PlainTextResponse(scope["state"]["peer"].client)
    await response(scope, receive, send)


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[int]:
    http = HttpServer(app)
    sock = socket.create_server(("127.0.0.1", 0))
    port: int = sock.getsockname()[1]
    http.listen(sock)
    try:
        yield port
    finally:
        http.close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def closes(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send these, and return what was received until the server closed, which has to be soon."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = bytearray()

    async def read() -> None:
        with contextlib.suppress(ConnectionError):
            while part := await reader.read(65_536):
                received.extend(part)

    reading = asyncio.ensure_future(read())
    for part in parts:
        if not reading.done():
            writer.write(part)
            await asyncio.sleep(pause)
    await asyncio.wait_for(reading, 10)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return bytes(received)


def run(*cases: tuple[bytes, ...], pause: float = 0.0) -> list[bytes]:
    async def work() -> list[bytes]:
        async with serving() as port:
            return await asyncio.gather(*(closes(port, *case, pause=pause) for case in cases))

    return asyncio.run(work())


def test_who_sends_nothing_or_half_of_it_is_closed() -> None:
    head = b"POST /body HTTP/1.1\r\nHost: localhost\r\n"
    assert run((b"",), (REQUEST[:10],), (head,)) == [b"", b"", b""]
    (received,) = run((head + b"Content-Length: 10\r\n\r\n12345",))
    assert received == b""


def test_a_head_that_trickles_is_closed_in_the_same_time() -> None:
    """Each byte in time does not extend the time for the whole."""
    (received,) = run(tuple(REQUEST[number : number + 1] for number in range(len(REQUEST) - 1)), pause=0.02)
    assert received == b""


def test_a_body_that_trickles_is_closed_in_the_same_time() -> None:
    head = b"POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    (received,) = run((head, *[b"x"] * 40), pause=0.02)
    assert received == b""


def test_an_idle_connection_is_closed_and_one_in_use_is_not() -> None:
    (received,) = run((REQUEST, REQUEST, REQUEST, REQUEST), pause=0.1)
    assert received.count(b"HTTP/1.1 200") == 4


def test_a_body_that_nobody_wants_is_read_for_a_moment_only() -> None:
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    (received,) = run((head, *[b"1\r\nx\r\n"] * 40), pause=0.02)
    assert received.startswith(b"HTTP/1.1 200")
    (received,) = run((head + b"1\r\nx\r\n0\r\n\r\n" + REQUEST,))
    assert received.count(b"HTTP/1.1 200") == 2, "the next request is served"


def test_a_response_takes_and_is_read_in_bounded_time() -> None:
    assert run((b"GET /forever HTTP/1.1\r\nHost: localhost\r\n\r\n",)) == [b""]

    async def read_nothing() -> None:
        async with serving() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.sleep(1.0)
            received = 0
            with contextlib.suppress(ConnectionError):
                while part := await asyncio.wait_for(reader.read(65_536), 10):
                    received += len(part)
            assert received < 20_000_000
            writer.close()

    asyncio.run(read_nothing())


def test_the_longest_idle_connection_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 30.0)
    monkeypatch.setattr(server, "RESPONSE_SECONDS", 30.0)

    async def work() -> None:
        async with serving() as port:
            busy = await asyncio.open_connection("127.0.0.1", port)
            busy[1].write(b"GET /forever HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.sleep(0.05)
            idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(server.MOST_CONNECTIONS + 3)]
            # Four more than there may be, and one of them is busy: the four oldest of the others were closed.
            for reader, _ in idle[:4]:
                with contextlib.suppress(ConnectionError):
                    assert await asyncio.wait_for(reader.read(1), 10) == b""
            idle[-1][1].write(REQUEST)
            assert (await asyncio.wait_for(idle[-1][0].readline(), 10)).startswith(b"HTTP/1.1 200")
            idle[4][1].write(REQUEST)
            assert (await asyncio.wait_for(idle[4][0].readline(), 10)).startswith(b"HTTP/1.1 200")
            for _, writer in (busy, *idle):
                writer.close()

    asyncio.run(work())


def test_when_all_are_busy_the_oldest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "RESPONSE_SECONDS", 30.0)

    async def work() -> None:
        async with serving() as port:
            busy = [await asyncio.open_connection("127.0.0.1", port) for _ in range(server.MOST_CONNECTIONS)]
            for _, writer in busy:
                writer.write(b"GET /forever HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.sleep(0.1)
            assert (await closes(port, REQUEST)).startswith(b"HTTP/1.1 200")
            for _, writer in busy:
                writer.close()

    asyncio.run(work())


def test_garbage_during_a_response_ends_the_connection() -> None:
    head = b"POST /forever HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    (received,) = run((head, b"zz\r\n"), pause=0.05)
    assert received.startswith(b"HTTP/1.1 400") or not received


@pytest.mark.parametrize(("most", "whole"), [(1_000_000, 0), (1_000_000_000, 3)])
def test_responses_that_are_not_read_take_little_memory_together(
    monkeypatch: pytest.MonkeyPatch, most: int, whole: int
) -> None:
    monkeypatch.setattr(server, "IDLE_SECONDS", 60)
    monkeypatch.setattr(server, "MOST_UNSENT", most)

    async def read(reader: asyncio.StreamReader) -> int:
        size = 0
        with contextlib.suppress(ConnectionError):
            while size < 20_000_000 and (part := await reader.read(1 << 20)):
                size += len(part)
        return size

    async def run() -> list[int]:
        async with serving() as port:
            pairs = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            for _, writer in pairs:
                writer.write(REQUEST.replace(b"/", b"/large", 1))
            await asyncio.sleep(0.2)
            reader, other = await asyncio.open_connection("127.0.0.1", port)
            other.write(REQUEST)
            assert (await reader.read(12)).endswith(b"200")
            async with asyncio.timeout(20):
                sizes = await asyncio.gather(*(read(reader) for reader, _ in pairs))
            for _, writer in (*pairs, (reader, other)):
                writer.transport.abort()
            return sizes

    assert sum(size >= 20_000_000 for size in asyncio.run(run())) == whole


# --- many small pieces ------------------------------------------------------------------------------------------------

POST = b"POST /body HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("before", "piece"),
    [
        pytest.param(POST, b"1\r\na\r\n", id="chunks"),
        pytest.param(upgrade_request("localhost"), b"\x89\x80\0\0\0\0", id="pings"),
        pytest.param(upgrade_request("localhost"), b"\x8a\x80\0\0\0\0", id="pongs"),
        pytest.param(upgrade_request("localhost"), b"\x81\x82\0\0\0\0{}", id="texts"),
        pytest.param(upgrade_request("localhost") + b"\x01\x80\0\0\0\0", b"\0\x80\0\0\0\0", id="empty fragments"),
    ],
)
def test_many_small_pieces_do_not_block_others(before: bytes, piece: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """The longest turn of the loop, in CPU time of its thread, which does not depend on what else runs."""
    longest = 0.0

    async def measure() -> None:
        nonlocal longest
        while True:
            began = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - began)

    async def run() -> None:
        async with serving() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head, _, rest = before.partition(b"\r\n\r\n")
            writer.write(head + b"\r\n\r\n")
            if b"Upgrade" in head:
                await reader.readuntil(b"\r\n\r\n")
            send_at_once(writer.get_extra_info("socket"), rest + piece * 30_000)
            measuring = asyncio.ensure_future(measure())
            await asyncio.sleep(0.3)
            measuring.cancel()
            writer.transport.abort()
            await asyncio.sleep(0.05)

    asyncio.run(run())
    assert longest < 0.1
    assert caplog.records == []


def send_at_once(sock: socket.socket, data: bytes) -> None:
    """Send as much as the system takes, before the server has a turn."""
    with contextlib.suppress(BlockingIOError), sock.dup() as other:
        while data:
            data = data[other.send(data) :]
