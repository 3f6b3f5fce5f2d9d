"""Measures the reconnects while a tunnel drains: clients that reconnect immediately, to another tunnel.

    python -m scripts.load.drain FOLDER [--clients 5000] [--over 60]

writes drain.json into FOLDER, and drain.svg: the rate of reconnects, spread and not. Needs matplotlib.
"""

import argparse
import asyncio
import contextlib
import importlib
import json
import math
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUEST = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)

AT_ONCE = 50
"""How many clients connect at the same time at first. Reconnects are not limited."""

TIMEOUT_SECONDS = 120.0
"""How long after the drain the last client may reconnect, and how long a start may take."""

PROGRAM = (sys.executable, "-m", "tlstunnel")


@dataclass(frozen=True, slots=True)
class Drained:
    """For each client, in seconds since the drain began: when its tunnel ended, and when it had reconnected."""

    over: float
    ended: list[float]
    back: list[float]
    attempts: int

    def peak(self, bin_seconds: float = 1.0) -> int:
        """Return the highest number of clients that lost their tunnel within `bin_seconds`."""
        return max(Counter(math.floor(at / bin_seconds) for at in self.ended).values())


class _Client:
    """A client that reconnects, from an address of its own."""

    def __init__(self, number: int, context: ssl.SSLContext) -> None:
        self._address = f"127.{1 + number % 50}.{1 + number // 50 % 50}.1"
        self._context = context
        self.attempts = 0

    async def connect(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a tunnel. Raises OSError."""
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=self._context, server_hostname="localhost", local_addr=(self._address, 0), limit=4096
        )
        writer.write(REQUEST)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            raise ConnectionResetError from None
        assert head.startswith(b"HTTP/1.1 101 "), head
        return reader, writer

    async def come_back(self, port: int) -> asyncio.StreamWriter:
        """Reconnect, without pauses between attempts, as a naive client does."""
        while True:
            self.attempts += 1
            with contextlib.suppress(OSError):
                return (await self.connect(port))[1]


def measure(clients: int, over: float) -> Drained:
    """Drain a tunnel with so many clients over so many seconds, while they reconnect to a second tunnel."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "tlstunnel.toml")
        config.write_text(f'[release]\ndrain_over = "{over:g}s"\n')
        with (
            _start(Path(folder), "a", config) as (first, process),
            _start(Path(folder), "b", config) as (second, _),
        ):
            context = ssl.create_default_context(cafile=Path(folder, "certs", "ca.pem"))
            return asyncio.run(_measure(clients, over, context, (first, second), process))


async def _measure(
    clients: int, over: float, context: ssl.SSLContext, ports: tuple[int, int], process: subprocess.Popen[str]
) -> Drained:
    gate = asyncio.Semaphore(AT_ONCE)
    ended: list[float] = []
    back: list[float] = []
    began = 0.0
    all_of_them = [_Client(number, context) for number in range(clients)]

    async def open_tunnel(client: _Client) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with gate:
            return await client.connect(ports[0])

    async def live(client: _Client, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.read(2):  # pings of the origin, which expects pongs
            assert head[0] == 0x89, head
            payload = await reader.readexactly(head[1])
            writer.write(bytes((0x8A, 0x80 | head[1])) + b"\0\0\0\0" + payload)
        ended.append(time.monotonic() - began)
        writer.close()
        again = await client.come_back(ports[1])
        back.append(time.monotonic() - began)
        again.transport.abort()

    streams = await asyncio.gather(*(open_tunnel(client) for client in all_of_them))
    began = time.monotonic()
    process.terminate()
    lives = [live(client, *stream) for client, stream in zip(all_of_them, streams, strict=True)]
    async with asyncio.timeout(over + TIMEOUT_SECONDS):
        await asyncio.gather(*lives)
    attempts = sum(client.attempts for client in all_of_them)
    return Drained(over, sorted(ended), sorted(back), attempts)


@contextlib.contextmanager
def _start(folder: Path, name: str, config: Path) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    command = [*PROGRAM, "start", "--config", str(config), "--listen", "127.0.0.1:0", "--log-format", "json"]
    log = folder / f"{name}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--control", str(folder / f"{name}.sock")], cwd=folder, stderr=stream, text=True
        )
    try:
        yield _wait_for_port(log, process), process
    finally:
        process.kill()
        process.wait()


def _wait_for_port(log: Path, process: subprocess.Popen[str]) -> int:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        records = [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if any(record["event"] == "ready" for record in records):
            address = next(record["address"] for record in records if record["event"] == "listening")
            return int(address.rpartition(":")[2])
        time.sleep(0.05)
    raise AssertionError(f"the tunnel was not ready: {log.read_text()}")


def plot(found: Sequence[Drained], folder: Path) -> None:
    """Draw the rates of reconnects, one panel for each run, with the same axes."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "tlstunnel", "svg.fonttype": "none", "font.size": 9})
    pyplot = importlib.import_module("matplotlib.pyplot")
    size = (7, 2.1 * len(found))
    drawing, panels = pyplot.subplots(len(found), 1, figsize=size, sharex=True, sharey=True, layout="constrained")
    last = math.ceil(max(one.back[-1] for one in found))
    for one, axes in zip(found, panels, strict=True):
        _panel(axes, one, last)
    panels[0].legend(frameon=False, loc="upper right")
    panels[-1].set_xlabel("seconds since the drain began")
    drawing.savefig(folder / "drain.svg", metadata={"Date": None})


def _panel(axes: Any, one: Drained, last: int) -> None:
    bins = range(last + 2)
    axes.hist(one.ended, bins=bins, color="#0072b2", label="lost its tunnel, and is back at once")
    axes.hist(one.back, bins=bins, color="#d55e00", histtype="step", linewidth=1.5, label="has a tunnel again")
    how = f"spread over {one.over:g} s" if one.over else "at one moment"
    count, peak = (f"{number:,}".replace(",", "\N{NO-BREAK SPACE}") for number in (len(one.ended), one.peak()))
    axes.set_title(f"{count} tunnels ended {how}: at most {peak} a second")
    axes.set_ylabel("clients a second")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Measure with and without spreading, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, default=5000)
    parser.add_argument("--over", type=float, default=60.0)
    arguments = parser.parse_args()
    found = [measure(arguments.clients, over) for over in (0.0, arguments.over)]
    for one in found:
        rates = f"at most {one.peak()} a second, {one.attempts} attempts"
        print(f"over {one.over:g} s: {rates}, all back after {one.back[-1]:.1f} s")
    rows = [
        {
            "over": one.over,
            "ended": _count_per_second(one.ended),
            "back": _count_per_second(one.back),
            "attempts": one.attempts,
        }
        for one in found
    ]
    (arguments.folder / "drain.json").write_text(json.dumps(rows) + "\n")
    plot(found, arguments.folder)


def _count_per_second(times: Sequence[float]) -> list[int]:
    counts = Counter(map(math.floor, times))
    return [counts[second] for second in range(max(counts) + 1)]


if __name__ == "__main__":
    main()
