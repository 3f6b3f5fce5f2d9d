"""Tunnels exchange numbered messages through reload after reload: none is dropped, nothing is lost or reordered."""

import asyncio
import itertools
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Certificate, Tunnel, WebsocketsOrigin, client_context, handshake_request
from tests.promises.firewalled import policy

MESSAGE = struct.Struct("!I")
TUNNELS, RELOADS = 2_000, 10


@pytest.fixture(scope="module")
def origin() -> Iterator[WebsocketsOrigin]:
    with WebsocketsOrigin() as origin:
        yield origin


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


def _configurations(origin: str, certificate: Certificate, folder: Path) -> Iterator[str]:
    """Certificates, rules, origins and sites, in turn; every other has a pair of its own."""
    for number in itertools.count():
        cert, key = folder / f"{number % 2}.pem", folder / f"{number % 2}-key.pem"
        cert.write_bytes(certificate.cert.read_bytes())
        key.write_bytes(certificate.key.read_bytes())
        site = f'[[sites.rules]]\nname = "rule {number}"\nwhen = \'path == "/{number}"\'\naction = "block"\n'
        limit = '[[sites.rate_limits]]\nname = "many"\nlimit = "1000000/day"\n' if number % 3 else ""
        other = f'[[sites]]\nnames = ["s{number}.example"]\norigins = ["localhost:{1000 + number}"]\n'
        own = Certificate(certificate.ca, cert, key)
        text = policy(origin, own, site=site + limit)
        yield text + other + f'cert = "{cert}"\nkey = "{key}"\n'


async def _through_reloads(tunnel: Tunnel, configurations: Iterator[str], tunnels: int, reloads: int) -> None:
    context = client_context(tunnel)
    gate = asyncio.Semaphore(50)

    async def opened() -> Numbered:
        async with gate:
            return await Numbered.open(tunnel.port, context)

    all_of_them = await asyncio.gather(*(opened() for _ in range(tunnels)))
    over = asyncio.Event()
    come_and_gone = 0

    async def talk(numbered: Numbered) -> None:
        while not over.is_set():
            await numbered.exchange()
            await asyncio.sleep(0.2)

    async def arrive() -> None:
        nonlocal come_and_gone
        while not over.is_set():
            fresh = await opened()
            await fresh.exchange()
            await fresh.close()
            come_and_gone += 1

    talking = [asyncio.ensure_future(talk(one)) for one in all_of_them]
    arriving = [asyncio.ensure_future(arrive()) for _ in range(4)]
    for _ in range(reloads):
        before = come_and_gone
        said = await asyncio.to_thread(tunnel.reload, next(configurations))
        assert any("rules" in line for line in said), said
        # A reload between any two handshakes, not all of them before the first.
        while come_and_gone == before:
            await asyncio.sleep(0.01)
    over.set()
    await asyncio.gather(*talking, *arriving)
    # Still whole after the last.
    await asyncio.gather(*(one.exchange() for one in all_of_them))
    assert min(one.exchanged for one in all_of_them) >= 2
    await asyncio.gather(*(one.close() for one in all_of_them))
    # Those that came and went, and nobody else, have ended.
    refused = [record for record in tunnel.records("connection") if record["status"] != 101]
    assert refused == []


def _run(origin: WebsocketsOrigin, certificate: Certificate, folder: Path, tunnels: int, reloads: int) -> None:
    configurations = _configurations(origin.address, certificate, folder)
    with Tunnel(None, certificate, config=next(configurations), measured=True) as tunnel:
        asyncio.run(_through_reloads(tunnel, configurations, tunnels, reloads))
        assert len(tunnel.records("reloaded")) == reloads


@pytest.mark.timeout(300)
def test_numbered_messages_through_reloads(origin: WebsocketsOrigin, certificate: Certificate, tmp_path: Path) -> None:
    _run(origin, certificate, tmp_path, TUNNELS, RELOADS)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_numbered_messages_through_a_hundred_reloads(
    origin: WebsocketsOrigin, certificate: Certificate, tmp_path: Path
) -> None:
    _run(origin, certificate, tmp_path, TUNNELS, 10 * RELOADS)


def _memory_after(tunnel: Tunnel, reloads: int, configurations: Iterator[str]) -> int:
    """RSS once that many reloads are done, asked for over the control socket itself: no process each."""
    from tlstunnel.control import ask  # noqa: PLC0415

    for _ in range(reloads):
        tunnel.file.write_text(next(configurations))
        assert ask(tunnel.control, {"do": "reload"})["changes"]
    return tunnel.rss()


def _memory(origin: WebsocketsOrigin, certificate: Certificate, folder: Path, warm: int, reloads: int) -> None:
    configurations = _configurations(origin.address, certificate, folder)
    with Tunnel(None, certificate, config=next(configurations), measured=True) as tunnel:
        descriptors = tunnel.descriptors()
        before = _memory_after(tunnel, warm, configurations)
        after = _memory_after(tunnel, reloads, configurations)
        print(f"{reloads} reloads: RSS {before >> 10} -> {after >> 10} KiB")
        # A context kept has 20 KiB and more, a configuration of two sites about the same.
        assert after - before < max(reloads, 200) * 5 * 1024
        assert abs(tunnel.descriptors() - descriptors) <= 2


def test_memory_after_reloads(origin: WebsocketsOrigin, certificate: Certificate, tmp_path: Path) -> None:
    _memory(origin, certificate, tmp_path, 100, 200)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_memory_after_a_thousand_reloads(origin: WebsocketsOrigin, certificate: Certificate, tmp_path: Path) -> None:
    _memory(origin, certificate, tmp_path, 200, 1000)
