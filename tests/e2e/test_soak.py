"""Long-running: `./scripts/soak [SECONDS]`. What a minute does not show: memory or descriptors that leak slowly."""

import asyncio
import os
import random
import time

import pytest
from websockets.asyncio.client import connect

from tests.harness import Certificate, Tunnel, WebsocketsOrigin, client_context, eventually

CLIENTS = 50
MEBIBYTE = 1 << 20


@pytest.mark.soak
def test_clients_that_come_and_go_leave_nothing_behind(certificate: Certificate) -> None:
    seconds = float(os.environ.get("TLSTUNNEL_SOAK_SECONDS", "600"))
    with WebsocketsOrigin() as origin, Tunnel(origin.address, certificate, measured=True) as tunnel:
        descriptors = tunnel.descriptors()
        connections = asyncio.run(_come_and_go(tunnel, seconds * 0.2))
        tunnel.wait_records(connections)
        early = tunnel.rss()
        connections += asyncio.run(_come_and_go(tunnel, seconds * 0.8))
        tunnel.wait_records(connections)
        eventually(lambda: tunnel.descriptors() <= descriptors)
        # The allocator keeps some memory of a peak; a leak grows with each of many thousand connections.
        assert tunnel.rss() < early + 8 * MEBIBYTE
        assert len(tunnel.records("connection")) == connections


async def _come_and_go(tunnel: Tunnel, seconds: float) -> int:
    """Keep `CLIENTS` clients busy for so long; return how many connections they made."""
    deadline = time.monotonic() + seconds
    return sum(await asyncio.gather(*(_client(tunnel, number, deadline) for number in range(CLIENTS))))


async def _client(tunnel: Tunnel, number: int, deadline: float) -> int:
    chance = random.Random(number)
    context = client_context(tunnel)
    connections = 0
    while time.monotonic() < deadline:
        async with connect(tunnel.uri, ssl=context, max_size=None) as client:
            connections += 1
            for _ in range(chance.randrange(20)):
                message = chance.randbytes(min(int(chance.paretovariate(0.5)), MEBIBYTE))
                await client.send(message)
                assert await client.recv() == message
            if chance.random() < 0.2:
                client.transport.abort()  # a client that crashes
    return connections
