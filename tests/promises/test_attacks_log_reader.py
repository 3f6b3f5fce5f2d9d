"""A reader of the log can neither block the tunnels by not reading, nor end them by exiting."""

import json
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.harness import (
    PROGRAM,
    TIMEOUT,
    Certificate,
    RawOrigin,
    child_environment,
    echo_bytes,
    eventually,
    receive_exactly,
    serving_pids,
    upgrade,
)

REQUESTS = 40
"""Each writes a line of more than 12 000 bytes: together many times the capacity of the pipe."""
LONG = b"GET /%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"a" * 12_000)


@dataclass(frozen=True, slots=True)
class Started:
    """A tunnel whose standard error is `log`, which is not read any further than the line that says it is ready."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]
    port: int
    ca: Path

    def connect(self) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=self.ca)
        plain = socket.create_connection(("127.0.0.1", self.port), TIMEOUT)
        return context.wrap_socket(plain, server_hostname="localhost")


@contextmanager
def _started(origin: RawOrigin, certificate: Certificate) -> Iterator[Started]:
    command = [*PROGRAM, "start", origin.address, "--http", "refuse", "--listen", "127.0.0.1:0", "--log-format", "json"]
    command += ["--cert", str(certificate.cert), "--key", str(certificate.key)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=child_environment())
    try:
        assert process.stderr is not None
        port = 0
        while (line := json.loads(process.stderr.readline()))["event"] != "ready":
            if line["event"] == "listening":
                port = int(line["address"].rpartition(":")[2])
        yield Started(process, process.stderr, port, certificate.ca)
    finally:
        process.kill()
        process.wait(TIMEOUT)
        assert process.stderr is not None
        process.stderr.close()


def _echoed(client: ssl.SSLSocket) -> None:
    client.sendall(b"ping")
    assert receive_exactly(client, 4) == b"ping"


def _refused(started: Started, times: int) -> None:
    for _ in range(times):
        with started.connect() as client:
            client.sendall(LONG)
            assert client.recv(100).startswith(b"HTTP/1.1 426 ")


def test_reader_that_stops_reading(certificate: Certificate) -> None:
    with RawOrigin(echo_bytes) as origin, _started(origin, certificate) as started:
        with started.connect() as client:
            assert upgrade(client).status == 101
            _refused(started, REQUESTS)
            _echoed(client)
        # When it is read again, all lines are there, in order and complete.
        count = 0
        while count < REQUESTS + 1:
            count += json.loads(started.log.readline())["event"] == "connection"
        started.process.send_signal(signal.SIGINT)
        assert started.process.wait(TIMEOUT) == 0


def test_reader_that_exits(certificate: Certificate) -> None:
    with RawOrigin(echo_bytes) as origin, _started(origin, certificate) as started:
        descriptors = Path(f"/proc/{serving_pids(started.process.pid)[0]}/fd")
        with started.connect() as client:
            assert upgrade(client).status == 101
            before = len(list(descriptors.iterdir()))
            started.log.close()
            _refused(started, REQUESTS)
            with started.connect() as other:  # the end of a tunnel is logged too
                assert upgrade(other).status == 101
            _echoed(client)
            eventually(lambda: len(list(descriptors.iterdir())) <= before)
        started.process.send_signal(signal.SIGINT)
        assert started.process.wait(TIMEOUT) == 0
