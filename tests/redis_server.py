"""A real `redis-server` for a test, in a folder of its own: on a Unix socket, or on a port with TLS, or a sentinel."""

import asyncio
import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import hiredis

from tests.harness import TIMEOUT, child_environment, eventually, require
from tlstunnel.testing.program import start_process


def find_free_port() -> int:
    """Return a port that is free on all addresses, since redis-server cannot let the system choose one.

    It is below those that the system gives to others, so it stays free.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(first // 2, first)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("0.0.0.0", port))
            return port


class RedisServer:
    """A server with `options` of its configuration file. It starts and stops with ``with``, or `start` and `kill`.

    `command` returns the reply to a command, as bytes, numbers and lists. It has a connection of its own for each call.
    """

    def __init__(self, *options: str, port: int = 0, mode: Sequence[str] = (), password: str = "") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="redis-"))
        self.socket = self.folder / "redis.sock"
        self.port = port
        self._options = options
        self._mode = mode
        self.password = password
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"redis+unix://{self.socket}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until it answers."""
        program = require("redis-server")
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"unixsocket {self.socket}",
            f"dir {self.folder}",
            'save ""',
            *self._options,
        ]
        config = self.folder / "redis.conf"
        if not config.exists():  # a sentinel writes what it knows into it
            config.write_text("\n".join(lines) + "\n")
        with (self.folder / "log").open("w") as log:
            command = [program, str(config), *self._mode]
            self._process = start_process(command, env=child_environment(), stdout=log, stderr=log)
        eventually(self._answers)

    def kill(self) -> None:
        """End it at once."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.socket.unlink(missing_ok=True)

    def command(self, *words: str | bytes | int) -> object:
        """Return the reply to a command. Raises hiredis.ReplyError."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(os.fspath(self.socket))
            reader = hiredis.Reader()
            for command in [("AUTH", self.password), words] if self.password else [words]:
                sock.sendall(hiredis.pack_command(command))  # type: ignore[arg-type]
                while (reply := reader.gets()) is False:
                    data = sock.recv(65536)
                    assert data, "it closed the connection"
                    reader.feed(data)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "log").read_text()
        try:
            self.command("PING")
        except OSError:
            return False
        except hiredis.ReplyError as error:
            return str(error).startswith("NOAUTH")
        return True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder)


async def wait_for(condition: Callable[[], object]) -> None:
    """Wait until the condition is true, while the loop runs. Raises AssertionError."""
    deadline = asyncio.get_running_loop().time() + TIMEOUT
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not happen"
        await asyncio.sleep(0.005)


async def retry(attempt: Callable[[], Awaitable[object]], failure: type[Exception]) -> object:
    """Repeat an attempt until it does not raise `failure`. Raises the last one after `TIMEOUT`."""
    deadline = asyncio.get_running_loop().time() + TIMEOUT
    while True:
        try:
            return await attempt()
        except failure:
            if asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(0.005)
