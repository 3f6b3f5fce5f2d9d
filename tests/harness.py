"""What tests start: the tunnel, origins behind it, clients in front of it.

Programs, their logs and raw origins are those of `tlstunnel.testing`; this adds what only our own tests need.

A test reads::

    with RawOrigin(handler) as origin, Tunnel(origin.address, certificate) as tunnel:
        with connect_tls(tunnel) as client:
            answer = upgrade(client)
        record = tunnel.wait_records(1)[0]

Leaving the ``with`` stops the tunnel and fails the test if it did not exit with 0, left a process, wrote a line that
is not JSON (a traceback, a warning) or logged an error. Timeouts are in seconds, sizes in bytes.
"""

import asyncio
import base64
import contextlib
import hashlib
import http.client
import io
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self, TypeVar

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as WebsocketsRequest
from websockets.typing import Subprotocol

from tlstunnel.processes.reach import send_command
from tlstunnel.testing import origin as origins
from tlstunnel.testing import program as programs

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAM: tuple[str, ...] = (sys.executable, "-m", "tlstunnel")
TIMEOUT = programs.TIMEOUT

T = TypeVar("T")
Record = programs.Record
RawOrigin = origins.RawOrigin
Header = tuple[str, str]

_ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3


@dataclass(frozen=True, slots=True)
class Certificate:
    """Three PEM files: the authority that clients trust, the served chain and its key."""

    ca: Path
    cert: Path
    key: Path


def missing(what: str) -> NoReturn:
    """Skip the test, since something that it needs is missing; fail it if CI=true."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, and CI=true allows no skip", pytrace=False)
    pytest.skip(what)


def require(program: str, package: str | None = None) -> str:
    """Return the path of `program`, or call `missing`. `package` is Debian's, if its name differs."""
    return shutil.which(program) or missing(f"{program} not found: ./scripts/install gets {package or program}")


def eventually(condition: Callable[[], T], timeout: float = TIMEOUT, interval: float = 0.01) -> T:
    """Call `condition` until it returns something true, and return that. Raises AssertionError after `timeout`.

    What takes a while, such as a handshake, is called less often: waiting should not keep the cores busy.
    """
    deadline = time.monotonic() + timeout
    while True:
        began = time.monotonic()
        if result := condition():
            return result
        ended = time.monotonic()
        if ended > deadline:
            raise AssertionError(f"not so within {timeout} s: {condition} returned {result!r}")
        time.sleep(max(interval, min(4 * (ended - began), 0.1)))


def assert_below(limit: float, measure: Callable[[], float]) -> None:
    """Fail unless one of three measurements is below `limit`.

    It is for what takes longer or costs more on a busy machine: that happens now and then, a fault every time.
    """
    measured: list[float] = []
    for _ in range(3):
        measured.append(measure())
        if measured[-1] < limit:
            return
    raise AssertionError(f"not below {limit} in any of three measurements: {measured}")


def child_environment(*, measured: bool = False) -> dict[str, str]:
    """Return the environment of a tunnel under test: warnings are errors, asyncio debugs, coverage as in this process.

    If a test measures time, memory or descriptors (`measured`), none of these: each one changes the figures.
    """
    environment = dict(os.environ)
    if measured:
        for name in [name for name in environment if name.startswith(("COVERAGE_", "COV_CORE_"))]:
            del environment[name]
    else:
        environment |= {"PYTHONASYNCIODEBUG": "1", "PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}
        # The development mode also checks the allocations of C code: we have none, and a start takes a fifth longer.
        environment["PYTHONMALLOC"] = "pymalloc"
    return environment


def serving_pids(parent: int) -> list[int]:
    """Return the pids, in order, of the children of a tunnel's parent that serve or drain."""
    found = []
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with contextlib.suppress(OSError):  # it has ended
            if b"tlstunnel.processes.child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return sorted(found)


_SLOW = re.compile(r"Executing <(?:Task|Handle).*> took [0-9.]+ seconds")
"""What asyncio's debug mode writes on a busy machine, also in the embedded echo origin, a process without our log."""


class Tunnel:
    """``tlstunnel start``, as a user starts it, and everything that it logged.

    `origin` is the argument on its command line; without it, it uses its own echo origin. Without `certificate` it
    makes one. `settings` is the text of a configuration file without sites and listeners (TOML, such as
    ``[timeouts]``), used in addition to these. `config` is a whole file, used instead of these. It runs in a folder of
    its own (`folder`), which is removed afterwards.

    `descriptors` is its RLIMIT_NOFILE, soft and hard. For `measured` see `child_environment`. `errors_expected` allows
    log lines of level error; a traceback or a line that is not JSON still fails the test. `wrapper` is a command that
    executes the program, such as ``ip netns exec NAME``.
    """

    def __init__(
        self,
        origin: str | None = None,
        certificate: Certificate | None = None,
        *,
        listen: Sequence[str] = ("127.0.0.1:0",),
        settings: str = "",
        config: str | None = None,
        arguments: Sequence[str] = (),
        descriptors: int | None = None,
        measured: bool = False,
        errors_expected: bool = False,
        environment: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
    ) -> None:
        self.certificate = certificate
        self._folder = tempfile.TemporaryDirectory(prefix="tlstunnel-test-")
        self.folder = Path(self._folder.name)
        self._errors_expected = errors_expected
        own = {"RUNTIME_DIRECTORY": str(self.folder / "run")}
        self._environment = child_environment(measured=measured) | own | dict(environment or {})
        self._program = programs.Program()
        self._command = [*PROGRAM, "start", "--log-format", "json"]
        if descriptors is not None:
            # prlimit from util-linux and not preexec_fn, which is not safe in a process with threads.
            self._command[:0] = [require("prlimit", "util-linux"), f"--nofile={descriptors}:{descriptors}"]
        self._command[:0] = wrapper
        if text := config if config is not None else settings:
            self.file.write_text(text)
            self._command += ["--config", str(self.file)]
        if config is None:
            self._command += [part for address in listen for part in ("--listen", address)]
            if certificate is not None:
                self._command += ["--cert", str(certificate.cert), "--key", str(certificate.key)]
            if origin is not None:
                self._command.append(origin)
        self._command += arguments

    def __enter__(self) -> Self:
        """Start it and wait until it is ready."""
        self._program.start(self._command, environment=self._environment, folder=self.folder)
        try:
            self.wait_record(lambda record: record["event"] == "ready")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it, and fail the test for what it did wrong, unless the test has failed already."""
        try:
            status: int | None = self.stop()
        except AssertionError:
            status = None
        orphans = self._end()
        if error is not None:
            print(f"the tunnel's log ({' '.join(self._command)}):\n{self.log}", file=sys.stderr)
            return
        faults = [line for line in self._program.strays if not _SLOW.fullmatch(line)]
        faults += [str(record) for record in self.records() if _has_traceback(record)]
        if not self._errors_expected:
            faults += [str(record) for record in self.records() if record.get("level") in ("error", "critical")]
        faults += [f"it left a process: {command}" for command in orphans]
        if status is None:
            faults.append("it did not exit after a signal")
        elif status != 0:
            faults.append(f"it exited with {status}")
        assert not faults, "\n".join([*faults, "its log:", self.log])

    @property
    def file(self) -> Path:
        """Its configuration file, if it has one."""
        return self.folder / "tlstunnel.toml"

    @property
    def control(self) -> Path:
        """Its control socket."""
        return Path(self.records("ready")[0]["control"])

    def reload(self, config: str | None = None, *, status: int = 0) -> list[str]:
        """Reload it, with another file if `config` is given; return the lines that the command prints."""
        if config is not None:
            new = self.file.with_suffix(".new")
            new.write_text(config)
            new.replace(self.file)
        if status:
            return self.run_command("reload", status=status)
        changes: list[str] = send_command(self.control, {"do": "reload"})["changes"]
        return changes or ["nothing has changed"]

    def run_command(self, command: str, *options: str, status: int = 0, timeout: float = 4 * TIMEOUT) -> list[str]:
        """Run a command for a running tunnel, such as ``reload``; return the lines that it printed."""
        done = subprocess.run(
            [*PROGRAM, command, "--control", str(self.control), *options],
            env=self._program.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == status, done
        return (done.stderr if status else done.stdout).splitlines()

    def start_command(self, command: str) -> "subprocess.Popen[str]":
        """Start a command for a running tunnel, and do not wait for it."""
        return subprocess.Popen(
            [*PROGRAM, command, "--control", str(self.control)],
            env=self._program.environment,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def status(self) -> Record:
        """Return what ``tlstunnel status --json`` prints, without the half second that starting a program takes."""
        return send_command(self.control, {"do": "status"})

    @property
    def parent(self) -> int:
        """The pid of the process that was started, which serves no connection."""
        return self._program.process.pid

    @property
    def pids(self) -> list[int]:
        """The pids of the processes that serve or drain."""
        return serving_pids(self.parent)

    @property
    def pid(self) -> int:
        """The pid of the process that serves; of the last one, if there are several."""
        return self.pids[-1]

    @property
    def addresses(self) -> list[str]:
        """Its addresses, with their real ports: ``127.0.0.1:40123``, ``[::1]:40124``, ``unix:/path``."""
        return [record["address"] for record in self.records("listening")]

    @property
    def port(self) -> int:
        """The port of its first TCP listener."""
        first = next(address for address in self.addresses if not address.startswith("unix:"))
        return int(first.rpartition(":")[2])

    @property
    def uri(self) -> str:
        """The URI of its first TCP listener, with a name in its certificate."""
        return f"wss://localhost:{self.port}/"

    @property
    def ca(self) -> Path:
        """The certificate of the authority that a client has to trust."""
        return self.certificate.ca if self.certificate else self.folder / "certs" / "ca.pem"

    @property
    def log(self) -> str:
        """Everything that it has written to standard error so far."""
        return self._program.text

    def records(self, event: str | None = None) -> list[Record]:
        """Return the log records so far, all or those of one event, oldest first.

        Without those of asyncio's debug mode about what took long, which on a busy machine is anything.
        """
        found = self._program.records() if event is None else self._program.records(event=event)
        return [record for record in found if not _SLOW.fullmatch(record["event"])]

    def wait_record(self, matches: Callable[[Record], bool], timeout: float = TIMEOUT) -> Record:
        """Return the first record for which `matches` is true, past or future."""
        return self._wait(lambda: [record for record in self.records() if matches(record)], 1, timeout)[0]

    def wait_records(self, count: int = 1, event: str = "connection", timeout: float = TIMEOUT) -> list[Record]:
        """Return the records of `event` when there are at least `count`."""
        return self._wait(lambda: self.records(event), count, timeout)

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal and do not wait."""
        self._program.process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGINT, timeout: float = TIMEOUT) -> int:
        """Send it a signal unless it has exited already; return its exit status."""
        return self._program.stop(number, timeout)

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait until it has exited; return its exit status."""
        return self._program.wait(timeout)

    def rss(self) -> int:
        """Return the resident memory, in bytes."""
        return self._status_field("VmRSS") * 1024

    def peak_rss(self) -> int:
        """Return the maximum of the resident memory, in bytes, since the start or `reset_peak_rss`."""
        return self._status_field("VmHWM") * 1024

    def reset_peak_rss(self) -> None:
        """Make `peak_rss` start from now."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def descriptors(self) -> int:
        """Return how many file descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208 - a path object for each entry is a waste

    def cpu_seconds(self) -> float:
        """Return the processor time that it has used, user and system."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime: proc_pid_stat(5)

    def _status_field(self, name: str) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
        raise AssertionError(f"/proc/{self.pid}/status has no {name}")

    def _wait(self, find: Callable[[], list[Record]], count: int, timeout: float) -> list[Record]:
        return self._program.wait_until(find, f"fewer than {count} records", count=count, timeout=timeout)

    def _end(self) -> list[str]:
        """Kill what is left of it, delete its folder, and return the processes that it left behind."""
        orphans = self._program.end()
        self._folder.cleanup()
        return orphans


def _has_traceback(record: Record) -> bool:
    """Whether a record has a traceback; an edge worker's own failure is not the tunnel's fault."""
    return not record["event"].startswith("edge worker") and "Traceback (most recent call last)" in str(record)


# --- clients ---------------------------------------------------------------------------------------------------------


class Response(NamedTuple):
    """The response to a handshake. `leftover` is what followed its head in the same reads."""

    status: int
    headers: http.client.HTTPMessage
    leftover: bytes


def connect_tcp(tunnel: Tunnel, timeout: float = TIMEOUT) -> socket.socket:
    """Connect to the tunnel's first TCP listener, and send nothing."""
    return socket.create_connection(("127.0.0.1", tunnel.port), timeout)


def client_context(tunnel: Tunnel, alpn: Iterable[str] = ()) -> ssl.SSLContext:
    """Return a context that trusts the tunnel's authority and no other; restrict it further as the test needs."""
    context = ssl.create_default_context(cafile=tunnel.ca)
    if alpn := list(alpn):
        context.set_alpn_protocols(alpn)
    return context


def connect_tls(
    tunnel: Tunnel,
    *,
    server_name: str | None = "localhost",
    context: ssl.SSLContext | None = None,
    timeout: float = TIMEOUT,
) -> ssl.SSLSocket:
    """Connect to the tunnel, and do the TLS handshake. An end without ``close_notify`` raises `ssl.SSLEOFError`."""
    plain = connect_tcp(tunnel, timeout)
    try:
        return (context or client_context(tunnel)).wrap_socket(
            plain, server_hostname=server_name, suppress_ragged_eofs=False
        )
    except BaseException:
        plain.close()
        raise


def handshake_request(
    path: str = "/", host: str = "localhost", headers: Iterable[Header] = (), key: str | None = None
) -> bytes:
    """Return the bytes of a valid upgrade request. `key` is random if None."""
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key or base64.b64encode(secrets.token_bytes(16)).decode()}",
        "Sec-WebSocket-Version: 13",
        *(f"{name}: {value}" for name, value in headers),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def read_response(sock: socket.socket) -> Response:
    """Read the head of one response."""
    head, leftover = _read_head(sock)
    status_line, _, fields = head.partition(b"\r\n")
    return Response(int(status_line.split()[1]), http.client.parse_headers(io.BytesIO(fields)), leftover)


def upgrade(
    sock: socket.socket, path: str = "/", headers: Iterable[Header] = (), *, host: str = "localhost"
) -> Response:
    """Send a valid upgrade request and read the response's head; a 101 must have the right accept token."""
    key = base64.b64encode(secrets.token_bytes(16)).decode()
    sock.sendall(handshake_request(path, host, headers, key))
    answer = read_response(sock)
    if answer.status == http.HTTPStatus.SWITCHING_PROTOCOLS:
        assert answer.headers["Sec-WebSocket-Accept"] == accept_token(key)
    return answer


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Read `size` bytes; an end before that fails the test."""
    received = bytearray()
    while len(received) < size:
        some = sock.recv(min(size - len(received), 1 << 20))
        assert some, f"the connection ended after {len(received)} of {size} bytes"
        received += some
    return bytes(received)


def receive_all(sock: socket.socket) -> bytes:
    """Read until the other side has ended."""
    received = bytearray()
    while some := sock.recv(1 << 16):
        received += some
    return bytes(received)


def reset(sock: socket.socket) -> None:
    """Close with a RST (SO_LINGER 0), as a crashed peer does; a TLS socket too, without ``close_notify``."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    sock.close()


def _read_head(sock: socket.socket) -> tuple[bytes, bytes]:
    received = b""
    while b"\r\n\r\n" not in received:
        some = sock.recv(65536)
        assert some, f"the connection ended within a head: {received!r}"
        received += some
    head, _, leftover = received.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", leftover


# --- origins ---------------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """An upgrade request as an origin received it; ``leftover`` is what followed it in the same reads."""

    line: str
    headers: http.client.HTTPMessage
    leftover: bytes
    head: bytes


def accept_token(key: str) -> str:
    """Return the Sec-WebSocket-Accept for a key (RFC 6455 section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode() + _ACCEPT_GUID, usedforsecurity=False).digest()).decode()


def read_request(sock: socket.socket) -> Request:
    """Read the head of one request."""
    head, leftover = _read_head(sock)
    line, _, fields = head.partition(b"\r\n")
    return Request(line.decode("latin-1"), http.client.parse_headers(io.BytesIO(fields)), leftover, head)


def switching_protocols(request: Request, headers: Iterable[Header] = ()) -> bytes:
    """Return the bytes of a valid 101 for `request`."""
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {accept_token(request.headers['Sec-WebSocket-Key'])}",
        *(f"{name}: {value}" for name, value in headers),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def accept_upgrade(sock: socket.socket, headers: Iterable[Header] = ()) -> Request:
    """Read the request and respond with a valid 101."""
    request = read_request(sock)
    sock.sendall(switching_protocols(request, headers))
    return request


def echo_bytes(sock: socket.socket) -> None:
    """A handler for `RawOrigin`: accept the upgrade, send every byte back, and close when the peer does."""
    request = accept_upgrade(sock)
    some = request.leftover
    while some or (some := sock.recv(65536)):
        sock.sendall(some)
        some = b""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)


class WebsocketsOrigin:
    """A real WebSocket server of the `websockets` library in a thread; echoes messages unless given a ``handler``.

    It chooses the first of its `subprotocols` that the client offers, and negotiates permessage-deflate unless
    `compression` is None. `requests` are the upgrade requests that it received.
    """

    def __init__(
        self,
        handler: Callable[[ServerConnection], Any] | None = None,
        *,
        subprotocols: Sequence[str] | None = None,
        compression: str | None = "deflate",
    ) -> None:
        self._handler = handler or _echo_messages
        self._subprotocols = [Subprotocol(name) for name in subprotocols] if subprotocols else None
        self._compression = compression
        self.requests: list[WebsocketsRequest] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="websockets-origin", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has failed and is closed already
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(TIMEOUT)
        if error is None and self._failure is not None:
            raise self._failure
        assert error is not None or not self._thread.is_alive(), "the websockets origin does not stop"

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # raised again in the test's own thread
            self._failure = error
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        async def handle(connection: ServerConnection) -> None:
            assert connection.request is not None
            self.requests.append(connection.request)
            with contextlib.suppress(ConnectionClosed):
                await self._handler(connection)

        async with serve(
            handle,
            sock=self._listener,
            subprotocols=self._subprotocols,
            compression=self._compression,
            max_size=None,
        ):
            await self._stop.wait()


async def _echo_messages(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)
