"""Tunnels that exchange numbered messages while something happens to the tunnel's process."""

import asyncio
import ssl
import struct
import time
from collections.abc import Callable

from tests.harness import Tunnel, client_context, handshake_request

MESSAGE = struct.Struct("!I")

AT_ONCE = 50
"""Handshakes at one moment: more would wait for each other and not for the tunnel."""


class Numbered:
    """A tunnel on which each message is one more than the last."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.exchanged = 0

    @classmethod
    async def open(cls, port: int, context: ssl.SSLContext) -> "Numbered":
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=context, server_hostname="localhost", limit=4096
        )
        writer.write(handshake_request("/"))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        return cls(reader, writer)

    async def exchange(self) -> None:
        number = MESSAGE.pack(self.exchanged)
        self._writer.write(b"\x82\x84\0\0\0\0" + number)
        while (frame := await self._reader.readexactly(2))[0] == 0x89:  # the origin's own ping, every 20 s
            # It closes the tunnel of a client that leaves two of them without a pong.
            payload = await self._reader.readexactly(frame[1])
            self._writer.write(bytes((0x8A, 0x80 | frame[1])) + b"\0\0\0\0" + payload)
        assert frame + await self._reader.readexactly(4) == b"\x82\x04" + number
        self.exchanged += 1

    async def close(self) -> None:
        self._writer.transport.abort()


class Traffic:
    """Many tunnels, each with a message on the way now and then, and clients that come and go meanwhile."""

    def __init__(self, tunnel: Tunnel, every: float = 0.2) -> None:
        self.tunnels: list[Numbered] = []
        self.come_and_gone = 0
        self.slowest = 0.0
        self._tunnel = tunnel
        self._every = every
        self._context = client_context(tunnel)
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._over = asyncio.Event()
        self._beside: list[asyncio.Task[None]] = []

    async def opened(self) -> Numbered:
        """Open another tunnel that is not counted here. Raises ConnectionError, AssertionError."""
        async with self._gate:
            begun = time.monotonic()
            try:
                return await Numbered.open(self._tunnel.port, self._context)
            finally:
                self.slowest = max(self.slowest, time.monotonic() - begun)

    async def through(self, tunnels: int, times: int, change: Callable[[int], None]) -> None:
        """Have them exchange messages while `change` is called, in a thread, so many times, and once more after.

        Between any two calls some have come and gone. Fails where one tunnel ends, or one handshake does not succeed.
        """
        self.tunnels = await asyncio.gather(*(self.opened() for _ in range(tunnels)))
        self._beside = [asyncio.ensure_future(self._talk(one)) for one in self.tunnels]
        self._beside += [asyncio.ensure_future(self._arrive()) for _ in range(4)]
        for number in range(times):
            before = self.come_and_gone
            await asyncio.to_thread(change, number)
            while self.come_and_gone == before and not any(task.done() for task in self._beside):
                await asyncio.sleep(0.01)
        self._over.set()
        await asyncio.gather(*self._beside)
        await asyncio.gather(*(one.exchange() for one in self.tunnels))
        assert min(one.exchanged for one in self.tunnels) >= 2

    async def keep_one_more(self) -> None:
        """Open another tunnel that exchanges messages until `through` ends."""
        self.tunnels.append(await self.opened())
        self._beside.append(asyncio.ensure_future(self._talk(self.tunnels[-1])))

    async def close(self) -> None:
        """Close all open tunnels."""
        await asyncio.gather(*(one.close() for one in self.tunnels))

    async def _talk(self, one: Numbered) -> None:
        while not self._over.is_set():
            await one.exchange()
            await asyncio.sleep(self._every)

    async def _arrive(self) -> None:
        while not self._over.is_set():
            fresh = await self.opened()
            await fresh.exchange()
            await fresh.close()
            self.come_and_gone += 1
