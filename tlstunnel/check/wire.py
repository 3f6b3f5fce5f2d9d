"""TLS over a blocking socket, with a copy of the server's first bytes, within a time budget.

Tested by tests/unit/test_check_steps.py.
"""

import contextlib
import socket
import ssl
import time
from typing import Any, Final

from tlstunnel.tls.truncation import is_truncation

# Bytes of the server's TLS records kept to find the group: OpenSSL accepts certificate messages of up to 100 KiB, and
# in TLS 1.2 the group follows them.
MAX_CAPTURED: Final = 131_072
# Bytes of plaintext read at once: deflate expands up to 1032-fold, so this is about 4 MiB of memory at worst.
READ_SIZE: Final = 4096


class Deadline:
    """The time budget that all steps share."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds left. Raises TimeoutError if there are none: 0 would make a socket non-blocking."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class Wire:
    """TLS over a blocking socket, through memory BIOs, so that the server's plaintext records can be read too."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str, deadline: Deadline) -> None:
        self._sock = sock
        self._deadline = deadline
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.captured = bytearray()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)

    def secure(self) -> None:
        """Make the TLS handshake. Raises ssl.SSLError, TimeoutError, or OSError for a lost connection."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
            except ssl.SSLError:
                # The alert tells the server why.
                self._flush()
                raise
            else:
                self._flush()
                return

    def read(self) -> bytes:
        """Return some bytes; b"" at the end, whether clean or not."""
        while True:
            # OpenSSL would read an endless series of empty records without returning.
            self._deadline.left()
            try:
                return self.tls.read(READ_SIZE)
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
            except ssl.SSLError as error:
                if isinstance(error, ssl.SSLZeroReturnError | ssl.SSLEOFError) or is_truncation(error):
                    return b""
                raise

    def write(self, data: bytes) -> None:
        """Send `data`. Raises as `secure` does."""
        self.tls.write(data)
        self._flush()

    def end(self) -> None:
        """Send ``close_notify`` without waiting for the server's."""
        with contextlib.suppress(OSError):
            self.tls.unwrap()
        with contextlib.suppress(OSError):
            self._flush()

    def _flush(self) -> None:
        data = self._outgoing.read()
        if not data:
            # Sending nothing would consume the error of a reset, which the next read should report.
            return
        # A server that has refused and closed resets what follows: its response still has to be read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._sock.settimeout(self._deadline.left())
            self._sock.sendall(data)

    def _fill(self) -> None:
        self._sock.settimeout(self._deadline.left())
        data = self._sock.recv(16_384)
        if not data:
            self._incoming.write_eof()
            return
        self.captured += data[: MAX_CAPTURED - len(self.captured)]
        self._incoming.write(data)


def get_sent_chain(tls: Any) -> list[bytes]:
    """Return the certificates that the server sent, leaf first, in DER. `tls` is an ``ssl.SSLObject``.

    Public API since Python 3.13, private since 3.10; only the leaf without either.
    """
    if hasattr(tls, "get_unverified_chain"):
        return list(tls.get_unverified_chain())
    beneath: Any = getattr(tls, "_sslobj", None)
    if hasattr(beneath, "get_unverified_chain"):
        # 2 is _ssl.ENCODING_DER.
        return [certificate.public_bytes(2) for certificate in beneath.get_unverified_chain() or ()]
    leaf = tls.getpeercert(binary_form=True)
    return [leaf] if leaf else []
