import asyncio
import gc
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.corpus.corpus import upgrade_request
from tests.harness import TIMEOUT
from tlstunnel.addresses import OriginAddress
from tlstunnel.config import OriginConfig
from tlstunnel.origins.errors import NoOrigin
from tlstunnel.origins.pool import Pool
from tlstunnel.sockets.resolve import MAX_LOOKUPS, resolve

REQUEST = upgrade_request(
    "/",
    [
        "Host: a",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ],
)
_ADDRESS = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 80))


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Return an event; until it is set, the resolver does not respond."""
    responds = threading.Event()

    def getaddrinfo(*_: Any, flags: int = 0, **__: Any) -> list[Any]:
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror
        responds.wait(TIMEOUT)
        return [_ADDRESS]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield responds
    responds.set()
    for thread in _threads():
        thread.join(TIMEOUT)


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "resolver"]


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [_ADDRESS])
    assert asyncio.run(resolve("chat.test", 80)) == [(socket.AF_INET, ("192.0.2.1", 80))]


@pytest.mark.parametrize("host", ["a" * 64 + ".test", "ä" * 64, "no-such-name.invalid"])
def test_a_name_without_addresses_is_an_error(host: str) -> None:
    with pytest.raises(OSError, match=r"\S"):
        asyncio.run(resolve(host, 80))


def test_a_program_does_not_wait_for_a_hung_resolver(hung: threading.Event) -> None:
    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(resolve("chat.test", 80), 0.01)

    asyncio.run(give_up())  # which waits for the threads of the loop's executor
    assert not hung.is_set()
    assert [thread.daemon for thread in _threads()] == [True]


def test_a_pool_does_not_wait_for_a_hung_resolver(hung: threading.Event) -> None:
    """Neither a request nor the end of the pool; and neither leaves an error behind for the log."""
    errors: list[object] = []

    async def time_out_and_close() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: errors.append(context))
        pool = Pool([OriginConfig(address=OriginAddress("chat.test", 80))])
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await pool.order("192.0.2.1", REQUEST, loop.time() + 0.01)
        waiting = asyncio.ensure_future(pool.order("192.0.2.1", REQUEST, loop.time() + TIMEOUT))
        await asyncio.sleep(0)
        await pool.close()
        with pytest.raises(NoOrigin):
            await waiting

    asyncio.run(time_out_and_close())
    gc.collect()
    assert not hung.is_set()
    assert not errors


def test_a_hung_resolver_holds_few_threads(hung: threading.Event) -> None:
    async def look_up() -> list[object]:
        waiting = [asyncio.ensure_future(resolve("chat.test", 80)) for _ in range(MAX_LOOKUPS)]
        await asyncio.sleep(0)
        with pytest.raises(OSError, match="look-ups"):
            await resolve("chat.test", 80)
        hung.set()
        return [await one for one in waiting]

    assert len(asyncio.run(look_up())) == MAX_LOOKUPS
