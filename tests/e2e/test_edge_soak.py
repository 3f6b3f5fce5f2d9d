"""Long-running: `./scripts/soak [SECONDS]`. Workers that run for hours, fail and are reloaded must not leak."""

import asyncio
import os
import random
import time
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.harness import Certificate, Tunnel, WebsocketsOrigin, client_context, eventually
from tests.promises.edged import edged, reloaded

CLIENTS = 30
MEBIBYTE = 1 << 20
STATUSES = {"/": 101, "/changed": 101, "/refused": 403, "/raises": 500, "/late": 504, "/outside": 502}

WORKER = """
import asyncio
from tlstunnel.edge import Reply


async def setup(config):
    return {"asked": 0}


async def fetch(request, env):
    env["asked"] += 1
    match request.path:
        case "/changed":
            return request.forward(path="/", query={"n": str(env["asked"])}, headers={"X-User": request.id})
        case "/refused":
            return Reply(403, "no" * 1000, {"Set-Cookie": ["a=1", "b=2"]})
        case "/raises":
            return request.headers["X-None"]
        case "/late":
            await asyncio.sleep(3600)
        case "/outside":
            return request.forward(origin=f"{request.id}.example:3000")
    return request
"""


@pytest.mark.soak
def test_workers_leave_nothing_behind(certificate: Certificate) -> None:
    seconds = float(os.environ.get("TLSTUNNEL_SOAK_SECONDS", "600"))
    with (
        WebsocketsOrigin() as origin,
        edged(origin.address, certificate, WORKER, site='worker_timeout = "100ms"\n', measured=True) as tunnel,
    ):
        descriptors, threads = tunnel.descriptors(), _threads(tunnel)
        asyncio.run(_ask(tunnel, seconds * 0.2))
        early = tunnel.rss()
        connections = asyncio.run(_ask(tunnel, seconds * 0.8))
        eventually(lambda: tunnel.descriptors() <= descriptors)
        print(f"{connections} handshakes: RSS {early >> 10} -> {tunnel.rss() >> 10} KiB")
        assert tunnel.rss() < early + 8 * MEBIBYTE
        # The loop's executor, in which files are read, creates its threads on demand, and keeps them.
        assert _threads(tunnel) <= threads + (os.cpu_count() or 1) + 4


async def _ask(tunnel: Tunnel, seconds: float) -> int:
    """Keep `CLIENTS` clients sending requests, with a reload every few seconds; return the number of requests."""
    deadline = time.monotonic() + seconds
    reloading = asyncio.create_task(_reload(tunnel, deadline))
    asked = sum(await asyncio.gather(*(_client(tunnel, number, deadline) for number in range(CLIENTS))))
    await reloading
    return asked


async def _reload(tunnel: Tunnel, deadline: float) -> None:
    while time.monotonic() < deadline - 5:
        await asyncio.to_thread(reloaded, tunnel)
        await asyncio.sleep(2)  # so that handshakes happen between two reloads


async def _client(tunnel: Tunnel, number: int, deadline: float) -> int:
    chance = random.Random(number)
    context = client_context(tunnel)
    asked = 0
    while time.monotonic() < deadline:
        path = chance.choice(list(STATUSES))
        asked += 1
        try:
            async with connect(f"{tunnel.uri.rstrip('/')}{path}", ssl=context) as client:
                await client.send(path)
                assert await client.recv() == path
                status = 101
        except InvalidStatus as error:
            status = error.response.status_code
        assert status == STATUSES[path], path
    return asked


def _threads(tunnel: Tunnel) -> int:
    return len(list(Path(f"/proc/{tunnel.pid}/task").iterdir()))
