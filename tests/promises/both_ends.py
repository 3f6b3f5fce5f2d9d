"""Both ends of a tunnel in one test, which decides the order of their bytes and ends."""

import contextlib
import fcntl
import socket
import ssl
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import pytest

from tests.harness import (
    TIMEOUT,
    Certificate,
    Record,
    Tunnel,
    client_context,
    eventually,
    handshake_request,
    read_request,
    reset,
    switching_protocols,
)

READ = 1 << 18


class TlsEnd:
    """A TLS client whose directions are independent: one thread may send while another receives, and either may end.

    `ssl.SSLSocket` has neither: two threads in one corrupt it before Python 3.13, and its ``unwrap`` reads, and loses,
    what the other side still sends.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.sock = sock
        self._lock = threading.Lock()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self._ended = False
        self.path = ""
        """The request's path, unique so that its record can be found."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(self._outgoing.read())
                self._incoming.write(sock.recv(READ))
        sock.sendall(self._outgoing.read())

    @property
    def version(self) -> str | None:
        """The version of TLS, such as ``TLSv1.3``."""
        return self._tls.version()

    def encrypt(self, data: bytes | memoryview) -> bytes:
        """Return the records for `data`; the test sends them on `sock`."""
        with self._lock:
            view = memoryview(data)
            while view:
                view = view[self._tls.write(view) :]
            return self._outgoing.read()

    def close_notify(self) -> bytes:
        """Return the record of close_notify; the test sends it on `sock`."""
        with self._lock:
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.unwrap()
            return self._outgoing.read()

    def send(self, data: bytes | memoryview) -> None:
        """Send all of ``data``."""
        view = memoryview(data)
        for start in range(0, len(view), READ):
            self.sock.sendall(self.encrypt(view[start : start + READ]))

    def end(self) -> None:
        """Send ``close_notify`` and FIN; the other direction stays as it is."""
        self.sock.sendall(self.close_notify())
        self.sock.shutdown(socket.SHUT_WR)

    def receive(self) -> bytes:
        """Return the next bytes, b"" for ``close_notify``.

        Raises `ssl.SSLEOFError` for a FIN without it and ConnectionResetError for a RST.
        """
        while not self._ended:
            some = self.sock.recv(READ)
            with self._lock:
                if some:
                    self._incoming.write(some)
                else:
                    self._incoming.write_eof()
                if data := self._decrypt():
                    return data
        return b""

    def receive_exactly(self, size: int) -> bytes:
        """Return the next `size` bytes. The peer must have sent no more than these."""
        received = bytearray()
        while len(received) < size:
            some = self.receive()
            assert some, f"close_notify after {len(received)} of {size} bytes"
            received += some
        assert len(received) == size
        return bytes(received)

    def receive_all(self) -> bytes:
        """Return everything up to a ``close_notify`` that a FIN follows."""
        received = bytearray()
        while some := self.receive():
            received += some
        assert self.sock.recv(1) == b"", "bytes after close_notify"
        return bytes(received)

    def _decrypt(self) -> bytes:
        parts = []
        try:
            while part := self._tls.read(16_384):
                parts.append(part)
            self._ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._ended = True
        return b"".join(parts)


class Pair(NamedTuple):
    """The two ends of a tunnel, after its 101."""

    client: TlsEnd
    origin: socket.socket


class BothEnds:
    """A running tunnel whose client and origin are both the test, in one thread unless it starts more.

    ``settings`` and ``measured`` are the tunnel's (`Tunnel`). All sockets are reset when the ``with`` is left, so
    that a test does not have to close them.
    """

    def __init__(self, certificate: Certificate, *, settings: str = "", measured: bool = False) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._listener.settimeout(TIMEOUT)
        self.tunnel = Tunnel(
            f"127.0.0.1:{self._listener.getsockname()[1]}", certificate, settings=settings, measured=measured
        )
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        try:
            self.tunnel.__enter__()
        except BaseException:
            self._listener.close()
            raise
        self.context = client_context(self.tunnel)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        for sock in self._sockets:
            if sock.fileno() >= 0:
                reset(sock)
        self.tunnel.__exit__(kind, error, trace)

    def tls_1_2(self) -> ssl.SSLContext:
        """A client's context that goes no higher than TLS 1.2."""
        context = client_context(self.tunnel)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        return context

    def connect(self, *, context: ssl.SSLContext | None = None, buffers: int | None = None) -> TlsEnd:
        """Return a client that has not sent its request. `buffers` is the size of its socket's buffers in bytes."""
        sock = socket.socket()
        self._adopt(sock, buffers)
        sock.connect(("127.0.0.1", self.tunnel.port))
        return TlsEnd(sock, context or self.context)

    def accept(self, *, buffers: int | None = None) -> socket.socket:
        """Return the origin's end of the next tunnel, before its request is read."""
        sock, _ = self._listener.accept()
        self._adopt(sock, buffers)
        return sock

    def open(self, *, context: ssl.SSLContext | None = None, buffers: int | None = None) -> Pair:
        """Open a tunnel. Small `buffers` of both test sockets make waiting bytes wait in the tunnel."""
        client = self.connect(context=context, buffers=buffers)
        client.path = f"/{len(self._sockets)}"
        client.send(handshake_request(client.path))
        origin = self.accept(buffers=buffers)
        head = switching_protocols(read_request(origin))
        origin.sendall(head)
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            some = client.receive()
            assert some, f"the connection ended after {answer!r}"
            answer += some
        assert answer.startswith(b"HTTP/1.1 101 ")
        return Pair(client, origin)

    def record(self, client: TlsEnd) -> Record:
        """Wait for the record of the tunnel of `client`, which `open` returned."""
        return self.tunnel.wait_record(lambda record: record.get("path") == client.path)

    def _adopt(self, sock: socket.socket, buffers: int | None) -> None:
        self._sockets.append(sock)
        sock.settimeout(TIMEOUT)
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if buffers is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)


class Threads(ThreadPoolExecutor):
    """Threads that run functions at the same time; an exception in one fails the test, at the latest at its end."""

    def __init__(self) -> None:
        super().__init__(64)
        self._all: list[Future[Any]] = []

    def do(self, work: Callable[..., Any], *arguments: object) -> "Future[Any]":
        """Start ``work(*arguments)``."""
        future = self.submit(work, *arguments)
        self._all.append(future)
        return future

    def __exit__(self, *error: object) -> None:
        super().__exit__(None, None, None)
        if error[0] is None:
            for future in self._all:
                future.result()


def receive_until_fin(sock: socket.socket) -> bytes:
    """Return everything up to a FIN."""
    received = bytearray()
    while some := sock.recv(READ):
        received += some
    return bytes(received)


def receive_until_reset(receive: Callable[[], bytes]) -> bytes:
    """Return everything that `receive` returns before a RST; a clean end fails the test."""
    received = bytearray()
    try:
        while some := receive():
            received += some
    except ConnectionResetError:
        return bytes(received)
    pytest.fail(f"a proper end after {len(received)} bytes")


def unacknowledged_bytes(sock: socket.socket) -> int:
    """Return how many bytes sent on `sock` the peer's kernel has not acknowledged (SIOCOUTQ, tcp(7))."""
    answer = fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0")
    return int(struct.unpack("i", answer)[0])


def wait_until_acknowledged(sock: socket.socket) -> None:
    """Wait until the peer's kernel has acknowledged everything that was sent on `sock`."""
    eventually(lambda: not unacknowledged_bytes(sock))


def ticks(seconds: float, interval: float) -> Iterator[float]:
    """Yield the time passed, every `interval` seconds for `seconds`."""
    begin = time.monotonic()
    while (passed := time.monotonic() - begin) < seconds:
        yield passed
        time.sleep(interval)


def random_pieces(data: bytes, numbers: "Callable[[int], int]", most: int) -> Iterator[bytes]:
    """Yield `data` in pieces of 1 to `most` bytes, of sizes that ``numbers(most)`` chooses."""
    start = 0
    while start < len(data):
        size = 1 + numbers(most)
        yield data[start : start + size]
        start += size
