"""Clients that send and receive what TLS and HTTP libraries do not let a test do."""

import contextlib
import http.client
import io
import socket
import ssl
import time
from pathlib import Path
from typing import NamedTuple, cast

from tests.harness import TIMEOUT, Tunnel, assert_below, connect_tls, receive_all

# Descriptions of alerts, RFC 8446 section 6.
ILLEGAL_PARAMETER, PROTOCOL_VERSION, UNRECOGNIZED_NAME, NO_APPLICATION_PROTOCOL = 47, 70, 112, 120

ABRUPT_ENDS = (ConnectionError, ssl.SSLEOFError)
"""An end without close_notify. Python's OpenSSL also reports a RST as an EOF if it arrives during a read."""


class Response(NamedTuple):
    """A whole HTTP response, and its bytes."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    raw: bytes


class _Received:
    """A socket for http.client with bytes that have been received already."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def parse_response(raw: bytes) -> Response:
    """Parse the response in ``raw``; a body that is cut short raises http.client.IncompleteRead."""
    response = http.client.HTTPResponse(cast("socket.socket", _Received(raw)), method="GET")
    response.begin()
    return Response(response.status, response.headers, response.read(), raw)


def send_request(tunnel: Tunnel, request: bytes, *, server_name: str | None = "localhost") -> Response:
    """Send `request` over a new TLS connection and read the response up to close_notify."""
    with connect_tls(tunnel, server_name=server_name) as client:
        client.sendall(request)
        return parse_response(receive_all(client))


def unverified_context(*, alpn: tuple[str, ...] = (), newest: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """Return a context that verifies nothing, for tests that are not about certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if newest is not None:
        context.maximum_version = newest
    return context


class MemoryTlsClient:
    """A TLS client without a socket: it takes received bytes and returns the bytes to send."""

    def __init__(self, context: ssl.SSLContext | None = None, server_name: str | None = "localhost") -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = (context or unverified_context()).wrap_bio(self._in, self._out, server_hostname=server_name)

    def step(self, received: bytes = b"") -> bytes:
        """Continue the TLS handshake with the received bytes; return the bytes to send."""
        self._in.write(received)
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
        return self._out.read()

    def finish(self, sock: socket.socket) -> None:
        """Complete the TLS handshake over `sock`, after the ClientHello has been sent."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(self._out.read())
                some = sock.recv(65536)
                assert some, "the connection ended within the TLS handshake"
                self._in.write(some)
        sock.sendall(self._out.read())

    def encrypt(self, data: bytes) -> bytes:
        """Return the records for `data`, after the TLS handshake."""
        self._tls.write(data)
        return self._out.read()

    def end(self) -> bytes:
        """Return close_notify. What the peer sends can still be read."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        return self._out.read()

    def read_all(self, sock: socket.socket) -> bytes:
        """Return everything up to close_notify; an end without it fails the test."""
        received = b""
        while True:
            try:
                some = self._tls.read(65536)
            except ssl.SSLWantReadError:
                data = sock.recv(65536)
                assert data, f"the connection ended without close_notify after {received!r}"
                self._in.write(data)
            except ssl.SSLZeroReturnError:
                return received
            else:
                if not some:
                    return received
                received += some


def client_hello(server_name: str | None = "localhost", context: ssl.SSLContext | None = None) -> bytes:
    """Return OpenSSL's ClientHello, in one TLS record."""
    return MemoryTlsClient(context, server_name).step()


def alert(description: int) -> bytes:
    """Return the record of a fatal alert, unencrypted."""
    return bytes((21, 3, 3, 0, 2, 2, description))


def split_into_records(hello: bytes, size: int) -> bytes:
    """Return the same ClientHello in TLS records of `size` bytes each (RFC 8446 section 5.1)."""
    message = hello[5:]
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join([b"\x16\x03\x01" + len(piece).to_bytes(2) + piece for piece in pieces])


def read_until_end(sock: socket.socket) -> bytes:
    """Return everything up to the end of the connection, whether clean or not."""
    received = b""
    with contextlib.suppress(*ABRUPT_ENDS):
        while some := sock.recv(65536):
            received += some
    return received


def has_ended(sock: socket.socket) -> bool:
    """Return whether the peer has closed this plain connection; discard what it sent before."""
    sock.setblocking(False)
    try:
        while sock.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


def cpu_share(tunnel: Tunnel, seconds: float) -> float:
    """Return the share of a core that the tunnel's process uses in the next `seconds`."""
    before, began = tunnel.cpu_seconds(), time.monotonic()
    time.sleep(seconds)
    return (tunnel.cpu_seconds() - before) / (time.monotonic() - began)


def assert_does_not_spin(tunnel: Tunnel) -> None:
    """Fail if the tunnel's process is busy. One that waits uses no CPU time, one that spins all that it can get."""
    assert_below(0.15, lambda: cpu_share(tunnel, 0.4))


def wait_for_descriptors(tunnel: Tunnel, most: int, timeout: float = TIMEOUT) -> int:
    """Wait until the tunnel has at most `most` open descriptors; return how many."""
    deadline = time.monotonic() + timeout
    while (held := tunnel.descriptors()) > most:
        if time.monotonic() > deadline:
            folder = Path(f"/proc/{tunnel.pid}/fd")
            raise AssertionError(f"{held} descriptors, not {most}: {[str(fd.readlink()) for fd in folder.iterdir()]}")
        time.sleep(0.05)
    return held
