"""`http = "pass"`: a page and its WebSocket share a hostname; one request a connection, streamed both ways."""

import contextlib
import fcntl
import http.client
import json
import socket
import ssl
import subprocess
import termios
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from tests.harness import (
    TIMEOUT,
    Certificate,
    RawOrigin,
    Tunnel,
    accept_upgrade,
    client_context,
    connect_tcp,
    connect_tls,
    eventually,
    receive_all,
    receive_exactly,
    require,
    upgrade,
)
from tests.promises.firewalled import config_for, tunnel_to
from tests.promises.wire import MemoryTlsClient

PASS = 'http = "pass"\n'
RULES = (
    PASS
    + '[[sites.rules]]\nname = "no deletes"\nwhen = \'method == "DELETE"\'\naction = "block"\n'
    + '[[sites.rules]]\nname = "closed"\nwhen = \'path == "/closed"\'\naction = "block"\n'
)


async def page(request: Request) -> Response:
    return PlainTextResponse("a page", headers={"X-Seen": json.dumps(dict(request.headers))})


async def upload(request: Request) -> Response:
    size, total = 0, 0
    async for part in request.stream():
        size += len(part)
        total = (total + sum(part)) % 65_521
    return PlainTextResponse(f"{size} {total}")


async def download(request: Request) -> Response:
    count = int(request.query_params["mib"])

    async def parts() -> AsyncIterator[bytes]:
        for number in range(count * 16):
            yield bytes([number % 256]) * 65_536

    return StreamingResponse(parts())


async def events(_: Request) -> Response:
    async def lines() -> AsyncIterator[bytes]:
        for number in range(3):
            yield b"data: %d\n\n" % number
            await gate()

    return StreamingResponse(lines(), media_type="text/event-stream")


_gates = threading.Semaphore(0)


async def gate() -> None:
    """Continue only when the client has seen the last event."""
    import asyncio  # noqa: PLC0415

    await asyncio.to_thread(_gates.acquire, timeout=TIMEOUT)


async def nothing(_: Request) -> Response:
    return Response(status_code=204)


async def echo(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text(await socket.receive_text())
    await socket.close()


APP = Starlette(
    routes=[
        Route("/", page, methods=["GET", "HEAD", "DELETE", "OPTIONS"]),
        Route("/upload", upload, methods=["POST", "PUT"]),
        Route("/download", download),
        Route("/events", events),
        Route("/nothing", nothing),
        WebSocketRoute("/ws", echo),
    ]
)


@pytest.fixture(scope="module")
def app() -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(APP, port=0, log_level="error", ws="websockets-sansio"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started)
    yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(TIMEOUT)


@pytest.fixture(scope="module")
def tunnel(app: str, certificate: Certificate) -> Iterator[Tunnel]:
    with tunnel_to(app, certificate, site=RULES) as tunnel:
        yield tunnel


def _ask(tunnel: Tunnel, method: str, target: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPSConnection("localhost", tunnel.port, context=client_context(tunnel), timeout=TIMEOUT)
    connection.sock = connect_tls(tunnel)
    connection.request(method, target, body, {name.replace("_", "-"): value for name, value in headers.items()})
    return connection.getresponse()


def test_a_page(tunnel: Tunnel) -> None:
    response = _ask(
        tunnel, "GET", "/", Cookie="sid=1", X_Forwarded_For="1.2.3.4", Connection="keep-alive, X-Hop", X_Hop="1"
    )
    assert (response.status, response.read()) == (200, b"a page")
    assert response.headers["Connection"] == "close"
    seen = json.loads(response.headers["X-Seen"])
    assert seen["cookie"] == "sid=1"
    assert (seen["x-forwarded-for"], seen["x-forwarded-proto"], seen["connection"]) == ("127.0.0.1", "https", "close")
    assert "x-hop" not in seen
    record = tunnel.wait_record(lambda record: record.get("id") == seen["x-request-id"])
    assert (record["status"], record["verdict"], record["ended_by"], record["reason"]) == (
        200,
        "pass",
        "origin",
        "responded",
    )


def test_its_websocket_on_the_same_name(tunnel: Tunnel) -> None:
    with connect_tls(tunnel) as client:
        assert upgrade(client, "/ws").status == 101
        client.sendall(b"\x81\x85\0\0\0\0hello")
        assert receive_exactly(client, 7) == b"\x81\x05hello"


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_is_streamed_completely(tunnel: Tunnel, *, chunked: bool) -> None:
    content = bytes(range(256)) * 4096 * 4
    body: Any = (content[start : start + 50_000] for start in range(0, len(content), 50_000)) if chunked else content
    response = _ask(tunnel, "POST", "/upload", body)
    assert response.read() == f"{len(content)} {sum(content) % 65_521}".encode()


def test_a_download_is_streamed_in_bounded_memory(app: str, certificate: Certificate) -> None:
    with tunnel_to(app, certificate, site=PASS) as tunnel:
        assert _ask(tunnel, "GET", "/download?mib=1").read()
        before = tunnel.peak_rss()
        response = _ask(tunnel, "GET", "/download?mib=64")
        # The reader is slow until it is certain that the whole of it cannot wait anywhere.
        assert len(response.read(1 << 20)) == 1 << 20
        assert len(response.read()) == 63 << 20
        assert tunnel.peak_rss() - before < 16 << 20


def test_events_arrive_as_they_are_sent(tunnel: Tunnel) -> None:
    response = _ask(tunnel, "GET", "/events")
    for number in range(3):
        assert response.readline() == b"data: %d\n" % number
        assert response.readline() == b"\n"
        _gates.release()
    assert response.read() == b""


@pytest.mark.parametrize(("method", "target", "status"), [("HEAD", "/", 200), ("GET", "/nothing", 204)])
def test_responses_without_a_body(tunnel: Tunnel, method: str, target: str, status: int) -> None:
    with connect_tls(tunnel) as client:
        client.sendall(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head, separator, rest = receive_all(client).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert (separator, rest) == (b"\r\n\r\n", b"")


def test_the_firewall_checks_it(tunnel: Tunnel) -> None:
    assert _ask(tunnel, "DELETE", "/").status == 403
    response = _ask(tunnel, "GET", "/closed")
    assert response.status == 403
    record = tunnel.wait_record(lambda record: record.get("id") == response.headers["X-Request-Id"])
    assert record["rule"] == "closed"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("CONNECT localhost:443 HTTP/1.1\r\nHost: localhost", 405),
        ("TRACE / HTTP/1.1\r\nHost: localhost", 405),
        ("GET ws://localhost/ HTTP/1.1\r\nHost: localhost", 400),
        ("POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked", 400),
        ("POST / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade", 405),
        ("GET / HTTP/1.0\r\nHost: localhost", 505),
        ("GET / HTTP/1.1\r\nHost: other.example", 421),
        ("GET https://other.example/ HTTP/1.1\r\nHost: localhost", 421),
    ],
)
def test_requests_that_are_refused(tunnel: Tunnel, head: str, status: int) -> None:
    with connect_tls(tunnel) as client:
        client.sendall(f"{head}\r\n\r\n".encode())
        assert receive_all(client).startswith(b"HTTP/1.1 %d " % status)


def test_the_default_refuses(app: str, certificate: Certificate) -> None:
    with tunnel_to(app, certificate) as tunnel:
        assert _ask(tunnel, "GET", "/").status == 426


class _Raw(RawOrigin):
    """An origin that reads a head, writes an answer, ends unless told otherwise, and keeps what it received."""

    def __init__(self) -> None:
        super().__init__(self._handle)
        self.play(b"")

    def play(self, answer: bytes, then: str = "end") -> None:
        self.seen: list[bytes] = []
        self._script = answer, then, self.seen

    def _handle(self, sock: socket.socket) -> None:
        answer, then, seen = self._script
        received = b""
        while b"\r\n\r\n" not in received and (more := sock.recv(65536)):
            received += more
        sock.sendall(answer)
        if then == "end":
            sock.shutdown(socket.SHUT_WR)
        while more := sock.recv(65536):
            received += more
        seen.append(received)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture(scope="module")
def raw(certificate: Certificate) -> Iterator[tuple[_Raw, Tunnel]]:
    with _Raw() as origin, tunnel_to(origin.address, certificate, site=PASS) as tunnel:
        yield origin, tunnel


def test_a_second_request_never_reaches_an_origin(raw: tuple[_Raw, Tunnel]) -> None:
    origin, tunnel = raw
    origin.play(OK)
    with connect_tls(tunnel) as client:
        client.sendall(
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc"
            b"GET /secret HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        assert receive_all(client).endswith(b"ok")
        (seen,) = eventually(lambda: origin.seen)
        assert seen.endswith(b"\r\n\r\nabc")
        assert b"secret" not in seen


def test_the_upgrade_field_is_removed_if_it_is_not_for_websocket(raw: tuple[_Raw, Tunnel]) -> None:
    origin, tunnel = raw
    origin.play(OK)
    with connect_tls(tunnel) as client:
        client.sendall(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
            b"HTTP2-Settings: AAA\r\n\r\n"
        )
        assert receive_all(client).startswith(b"HTTP/1.1 200 ")
        (seen,) = eventually(lambda: origin.seen)
        assert b"h2c" not in seen
        assert b"HTTP2-Settings" not in seen


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", 502),
        (b"nonsense\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloX", 502),
        (b"", 502),
    ],
)
def test_invalid_responses(raw: tuple[_Raw, Tunnel], answer: bytes, status: int) -> None:
    origin, tunnel = raw
    origin.play(answer)
    with connect_tls(tunnel) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert receive_all(client).startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/half", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"),
        ("/chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"),
    ],
)
def test_a_truncated_response_is_visible_to_the_client(raw: tuple[_Raw, Tunnel], path: str, answer: bytes) -> None:
    origin, tunnel = raw
    origin.play(answer)
    with connect_tls(tunnel) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
            receive_all(client)
        record = tunnel.wait_record(lambda record: record.get("path") == path)
        assert (record["ended_by"], record["reason"], record["status"]) == ("origin", "response truncated", 200)


def test_a_response_before_the_end_of_the_body_is_complete(certificate: Certificate) -> None:
    answer = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n"
    with (
        _Raw() as origin,
        tunnel_to(origin.address, certificate, top='timeouts.request = "500ms"', site=PASS) as tunnel,
        connect_tls(tunnel) as client,
    ):
        origin.play(answer, "keep")
        client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1000)
        assert receive_all(client).startswith(answer[:16])


UPLOAD = b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048576\r\n\r\n"
PIECE = b"x" * 65_536


def test_a_response_before_the_end_of_the_body_does_not_cut_the_upload_off(raw: tuple[_Raw, Tunnel]) -> None:
    origin, tunnel = raw
    origin.play(OK, "keep")
    with connect_tls(tunnel) as client:
        client.sendall(UPLOAD)
        response = receive_exactly(client, 8)
        for _ in range(16):
            client.sendall(PIECE)
        assert (response + receive_all(client)).endswith(b"ok")
        (seen,) = eventually(lambda: origin.seen)
        assert len(seen.partition(b"\r\n\r\n")[2]) == 1 << 20
        record = tunnel.wait_record(lambda record: record.get("path") == "/upload")
        assert record["reason"] == "responded"
        assert 1 << 20 < record["up"] < (1 << 20) + 2_000
        assert record["down"] > len(b"ok")


@pytest.mark.parametrize("body", [OK, b""])
def test_a_client_reads_a_response_after_its_whole_body(certificate: Certificate, body: bytes) -> None:
    """Of an origin that has closed the connection, or of the tunnel itself: as browsers do."""

    def handle(sock: socket.socket) -> None:
        sock.recv(1)
        sock.sendall(body)

    with (
        RawOrigin(handle) as origin,
        tunnel_to(origin.address, certificate, site=PASS if body else "") as tunnel,
        connect_tls(tunnel) as client,
    ):
        client.sendall(UPLOAD)
        tunnel.wait_records(1)  # the tunnel has closed its side
        for _ in range(16):
            client.sendall(PIECE)
            eventually(lambda: not fcntl.ioctl(client, termios.TIOCOUTQ, b"\0" * 4).strip(b"\0"))
        assert receive_all(client).startswith(b"HTTP/1.1 200 " if body else b"HTTP/1.1 405 ")


def test_a_body_below_the_minimum_rate_is_refused(certificate: Certificate) -> None:
    """However often a byte of it arrives."""
    with (
        RawOrigin(lambda sock: (sock.recv(1), receive_all(sock), None)[2]) as origin,
        tunnel_to(origin.address, certificate, top='timeouts.request = "300ms"', site=PASS) as tunnel,
        connect_tls(tunnel) as client,
    ):
        client.sendall(UPLOAD)

        def trickle() -> bool:
            client.sendall(b"x")
            return bool(tunnel.records("connection"))

        eventually(trickle)
        assert receive_all(client).startswith(b"HTTP/1.1 408 ")


def test_one_address_has_a_share_of_the_uploads(certificate: Certificate) -> None:
    """Of 34 connections with 100 descriptors three, until their responses begin."""
    complete = threading.Event()

    def handle(sock: socket.socket) -> None:
        if sock.recv(65_536).startswith(b"POST"):
            assert complete.wait(TIMEOUT)
        sock.sendall(OK)
        with contextlib.suppress(OSError):
            receive_all(sock)

    with (
        RawOrigin(handle) as origin,
        Tunnel(None, certificate, config=config_for(origin.address, certificate, site=PASS), descriptors=100) as tunnel,
        contextlib.ExitStack() as stack,
    ):
        uploading = []
        for number in range(1, 4):
            uploading.append(stack.enter_context(connect_tls(tunnel)))
            uploading[-1].sendall(UPLOAD)
            eventually(lambda number=number: origin.connections == number)  # type: ignore[misc]
        response = _ask(tunnel, "POST", "/", b"more")
        assert (response.status, response.headers["Retry-After"]) == (429, "1")
        assert _ask(tunnel, "GET", "/").status == 200
        complete.set()
        for client in uploading:
            assert receive_exactly(client, 8) == b"HTTP/1.1"
        assert _ask(tunnel, "POST", "/", b"more").status == 200


FIN_WAIT2 = b"\x05"
"""The peer's system has acknowledged the FIN: tcpi_state, the first byte of struct tcp_info."""


@pytest.mark.parametrize("websocket", [False, True])
def test_a_half_closed_client_gets_its_response(certificate: Certificate, *, websocket: bool) -> None:
    """RFC 9112 section 9.6: close_notify, then FIN; the origin responds once that has arrived at the tunnel."""
    fields = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
    fields = fields + "dGhlIHNhbXBsZSBub25jZQ==\r\n" if websocket else ""
    half_closed = threading.Event()

    def handle(sock: socket.socket) -> None:
        with contextlib.suppress(AssertionError):
            assert half_closed.wait(TIMEOUT)
            if not websocket:
                sock.recv(65_536)
                return sock.sendall(OK)
            accept_upgrade(sock)
            while sock.recv(65_536):
                pass

    tls = MemoryTlsClient(server_name="localhost")
    with (
        RawOrigin(handle) as origin,
        tunnel_to(origin.address, certificate, site=PASS) as tunnel,
        connect_tcp(tunnel) as client,
    ):
        client.sendall(tls.step())
        tls.finish(client)
        client.sendall(tls.encrypt(f"GET / HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n".encode()))
        eventually(lambda: origin.connections)
        client.sendall(tls.end())
        client.shutdown(socket.SHUT_WR)
        eventually(lambda: client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == FIN_WAIT2)
        half_closed.set()
        assert tls.read_all(client).startswith(b"HTTP/1.1 101 " if websocket else b"HTTP/1.1 200 ")


def test_expect_100_continue_reaches_the_client(tunnel: Tunnel) -> None:
    with connect_tls(tunnel) as client:
        client.sendall(b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert receive_exactly(client, 25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"abc")
        assert receive_all(client).endswith(b"3 294")


@pytest.mark.parametrize(
    ("timeouts", "sent", "status"),
    [
        ('timeouts.origin_response = "200ms"', b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 504),
        ('timeouts.request = "200ms"', b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc", 408),
    ],
)
def test_timeouts(certificate: Certificate, timeouts: str, sent: bytes, status: int) -> None:
    silent = threading.Event()
    with (
        RawOrigin(lambda sock: (silent.wait(TIMEOUT), None)[1]) as origin,
        tunnel_to(origin.address, certificate, top=timeouts, site=PASS) as tunnel,
        connect_tls(tunnel) as client,
    ):
        client.sendall(sent)
        assert receive_all(client).startswith(b"HTTP/1.1 %d " % status)
        silent.set()


def test_a_client_that_leaves_is_noticed_and_nothing_is_kept(tunnel: Tunnel) -> None:
    before = tunnel.descriptors()
    for _ in range(20):
        with connect_tls(tunnel) as client:
            client.sendall(b"GET /download?mib=64 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert receive_exactly(client, 8) == b"HTTP/1.1"
    eventually(lambda: tunnel.descriptors() <= before)


def test_streams_do_not_count_as_unfinished_handshakes(app: str, certificate: Certificate) -> None:
    """Ten may be unfinished, one for an address: more streams than that continue."""
    with (
        tunnel_to(app, certificate, top="limits.unfinished_handshakes = 10", site=PASS) as tunnel,
        contextlib.ExitStack() as stack,
    ):
        clients = []
        for _ in range(15):
            client = stack.enter_context(connect_tls(tunnel))
            client.sendall(b"GET /download?mib=64 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert receive_exactly(client, 8) == b"HTTP/1.1"
            clients.append(client)
        for client in clients:
            assert receive_exactly(client, 1 << 20)
            client.close()


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        ((), 200, b"a page"),
        (("--http", "refuse"), 426, b"this address has no page to show"),
    ],
)
def test_an_origin_on_the_command_line(
    app: str, certificate: Certificate, options: tuple[str, ...], status: int, text: bytes
) -> None:
    with Tunnel(app, certificate, arguments=options) as tunnel:
        with connect_tls(tunnel) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            response = receive_all(client)
        assert response.startswith(b"HTTP/1.1 %d " % status)
        assert text in response
        with connect_tls(tunnel) as client:
            assert upgrade(client, "/ws").status == 101
        (record, _) = tunnel.wait_records(2)
        assert ("--http pass" in record.get("detail", "")) == (status == 426)


def test_curl(tunnel: Tunnel, tmp_path: Path) -> None:
    """A client that wants to keep the connection, and waits for the 100 before it sends a body."""
    file = tmp_path / "body"
    file.write_bytes(b"z" * 2_000_000)
    url = f"https://localhost:{tunnel.port}"
    done = subprocess.run(
        [
            *(require("curl"), "--silent", "--show-error", "--fail", "--cacert", str(tunnel.ca), "--http1.1"),
            *(f"{url}/", f"{url}/", "--next", "--silent", "--cacert", str(tunnel.ca), "-T", str(file), f"{url}/upload"),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stdout == f"a pagea page2000000 {2_000_000 * ord('z') % 65_521}", done
