"""Whatever a client or an origin sends, a log line stays one line of plain ASCII, harmless to its readers."""

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import (
    PROGRAM,
    TIMEOUT,
    Certificate,
    RawOrigin,
    child_environment,
    eventually,
    handshake_request,
    read_request,
    switching_protocols,
)
from tests.promises.wire import ABRUPT_ENDS, MemoryTlsClient, client_hello, read_until_end

# What controls terminals, ends lines, or forges fields: C0, ANSI, C1 raw and in UTF-8, bidi and separators.
NASTY = {
    "newline": b'\n{"event":"forged","level":"info"}\n',
    "crlf": b"\r\nevent=forged",
    "ansi": b"\x1b[31mforged\x1b[0m",
    "bell": b"\x07\x08\x7f",
    "nul": b"\x00",
    "c1": b"\x9b31mforged",
    "c1-utf8": "\x9b31mforged\x85".encode(),
    "latin-1": b"J\xfcrgen",
    "utf-8": "Jürgen 中文".encode(),
    "bidi": "\u202eforged\u2028".encode(),
    "broken-utf8": b"\xff\xfe\xc3\x28",
    "quotes": b'"\'\\","event":"forged',
    "format": b"%s%n{0}{event}",
    "long": b"A" * 15_000,
    "long-nasty": b"\x9b" * 15_000,
}


class _Logged:
    """A tunnel whose standard error is read as raw bytes."""

    def __init__(self, style: str, folder: Path, origin: str, certificate: Certificate) -> None:
        (folder / "t.toml").write_text('trusted_proxies = ["127.0.0.0/8"]\n[log]\nopened = true\n')
        self.style = style
        self.raw = b""
        self._process = subprocess.Popen(
            [
                *(*PROGRAM, "start", origin, "--listen", "127.0.0.1:0", "--config", "t.toml", "--log-format", style),
                *("--cert", str(certificate.cert), "--key", str(certificate.key)),
            ],
            cwd=folder,
            env=child_environment(),
            stderr=subprocess.PIPE,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = eventually(self._port)

    def _read(self) -> None:
        assert self._process.stderr is not None
        while some := os.read(self._process.stderr.fileno(), 65536):
            self.raw += some

    def _port(self) -> int:
        listening = re.search(rb"listening.*?127\.0\.0\.1:([0-9]+)|127\.0\.0\.1:([0-9]+).*?listening", self.raw)
        assert self._process.poll() is None, self.raw
        return int(listening[1] or listening[2]) if listening and b"ready" in self.raw else 0

    def stop(self) -> bytes:
        """Stop it if it runs; return everything it logged."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            assert self._process.wait(TIMEOUT) == 0
        finally:
            self._process.kill()
            self._reader.join(TIMEOUT)
            assert self._process.stderr is not None
            self._process.stderr.close()
        return self.raw

    def hello(self, data: bytes) -> None:
        """Send these bytes on a connection of their own and wait for its end."""
        with socket.create_connection(("127.0.0.1", self.port), TIMEOUT) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            read_until_end(client)

    def request(self, data: bytes) -> None:
        """Send these bytes in a TLS connection of their own and wait for its end."""
        tls = MemoryTlsClient()
        with socket.create_connection(("127.0.0.1", self.port), TIMEOUT) as client:
            client.sendall(tls.step())
            tls.finish(client)
            client.sendall(tls.encrypt(data))
            with contextlib.suppress(AssertionError, ssl.SSLError, *ABRUPT_ENDS):
                tls.read_all(client)


@pytest.fixture(params=["json", "text"])
def logged(request: pytest.FixtureRequest, tmp_path: Path, certificate: Certificate) -> Iterator[_Logged]:
    turns = iter(NASTY.values())

    def origin_(sock: socket.socket) -> None:
        """Accepts /accept; other requests get, one by one, one of the hostile texts, in a head or as one."""
        request = read_request(sock)
        if request.line.startswith("GET /accept"):
            sock.sendall(switching_protocols(request))
        elif request.line.startswith("GET /phrase"):
            sock.sendall(b"HTTP/1.1 403 " + next(turns) + b"\r\nContent-Length: 0\r\n\r\n")
        elif request.line.startswith("GET /chunk"):
            sock.sendall(b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nwords\r\n")
            sock.sendall(next(turns) + b"\r\n")
        else:
            sock.sendall(next(turns) + b"\r\n\r\n")

    with RawOrigin(origin_) as origin:
        started = _Logged(request.param, tmp_path, origin.address, certificate)
        try:
            yield started
        finally:
            started.stop()


def _lines(logged: _Logged) -> list[str]:
    """Return all lines, after the checks that apply to each."""
    raw = logged.stop()
    assert re.fullmatch(rb"[\n\x20-\x7e]*", raw), re.findall(rb".{0,80}[^\n\x20-\x7e].{0,80}", raw)[:3]
    assert raw.endswith(b"\n")
    lines = raw.decode("ascii").splitlines()
    for line in lines:
        if logged.style == "json":
            record = json.loads(line)
            assert {"event", "level", "timestamp"} <= record.keys()
            assert record["event"] != "forged"
        else:
            assert re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z \[[a-z]+ *\] ", line), line
    return lines


def _with(field: bytes) -> bytes:
    return handshake_request("/accept")[:-2] + field + b"\r\n\r\n"


def _connections(lines: list[str]) -> list[str]:
    return [line for line in lines if '"event":"connection"' in line or "] connection " in line]


def test_paths_and_fields(logged: _Logged) -> None:
    for nasty in NASTY.values():
        logged.request(b"GET /" + nasty + handshake_request("")[4:])
        logged.request(b"GET /chat?" + nasty + handshake_request("")[4:])
        logged.request(nasty + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        logged.request(_with(b"X-Nasty: " + nasty))
        logged.request(_with(nasty + b": a"))
        logged.request(_with(b"Origin: " + nasty))
        logged.request(_with(b"Sec-WebSocket-Protocol: " + nasty))
        logged.request(handshake_request("/accept").replace(b"localhost", b"localhost" + nasty))
    lines = _connections(_lines(logged))
    assert len(lines) == 8 * len(NASTY), "each has one record, and on one line"


def test_what_a_trusted_proxy_passes_on(logged: _Logged) -> None:
    """The client may be behind the proxy, and may have written these fields too."""
    for nasty in NASTY.values():
        logged.request(_with(b"X-Forwarded-For: " + nasty))
        logged.request(_with(b"X-Forwarded-For: fe80::1%" + nasty))
        logged.request(_with(b"X-Request-Id: " + nasty))
        logged.request(_with(b"X-Forwarded-Host: " + nasty))
    assert len(_connections(_lines(logged))) == 4 * len(NASTY)


def _hello_for(name: bytes) -> bytes:
    """Return a ClientHello with this SNI, in place of one of the same length that a TLS library accepts."""
    stand_in = ".".join(["a" * 63] * 5)[: len(name)].strip(".").ljust(len(name), "a")
    hello = client_hello(stand_in)
    assert stand_in.encode() in hello
    return hello.replace(stand_in.encode(), name)


def test_server_names_and_first_bytes(logged: _Logged) -> None:
    for nasty in NASTY.values():
        logged.hello(_hello_for((nasty + b"." * 4)[:200]))
        logged.hello(nasty)
        logged.hello(b"GET /" + nasty + b" HTTP/1.1\r\n\r\n")
        logged.hello(b"\x16\x03\x01" + nasty)
    for printable in (b'"quoted".example', b"back\\slash", b"%s{0}", b"a=b,c=d", b"[31m"):
        logged.hello(_hello_for(printable))
    _lines(logged)


@pytest.mark.parametrize("path", ["/garbage", "/phrase", "/chunk"])
def test_responses_of_an_origin(logged: _Logged, path: str) -> None:
    for _ in NASTY:
        logged.request(handshake_request(path))
    assert len(_connections(_lines(logged))) == len(NASTY)


def test_the_length_of_a_line_is_limited(logged: _Logged) -> None:
    """A client that sends 16 KiB cannot write 60 KiB into the log."""
    logged.request(b"GET /" + b"a" * 15_000 + handshake_request("")[4:])
    logged.request(_with(b"X-Long " + b"\x9b" * 15_000))
    logged.request(_with(b"Host: " + b"\x9b" * 15_000))
    lines = _lines(logged)
    assert len(_connections(lines)) == 3
    assert max(map(len, lines)) < 20_000
