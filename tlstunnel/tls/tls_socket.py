"""A TLS socket whose failed system calls are not taken for failures of other connections.

OpenSSL has one queue of errors per thread, and an entry left in it turns the next "want read" of any connection into
a failure: the queue must be empty before an operation (SSL_get_error(3)). ``ssl`` empties it for no operation, and
since Python 3.13.2 leaves the error of a failed system call in it (cpython#148594). Seen: one client that reset its
connection while the tunnel sent to it ended fourteen other connections.
"""

import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

    from _typeshed import ReadableBuffer, WriteableBuffer

# The hot path: a lookup in the module is cheaper than super().
_send = ssl.SSLSocket.send
_recv_into = ssl.SSLSocket.recv_into


class TlsSocket(ssl.SSLSocket):
    """An ``SSLSocket`` that leaves no error in the queue of its thread: the ``sslsocket_class`` of all contexts."""

    def send(self, data: "ReadableBuffer", flags: int = 0) -> int:
        """Send what the socket takes, as ``SSLSocket.send`` does."""
        try:
            return _send(self, data, flags)
        except ssl.SSLError:
            raise
        except OSError:
            clear_error_queue()
            raise

    def recv_into(self, buffer: "WriteableBuffer", nbytes: int | None = None, flags: int = 0) -> int:
        """Receive into `buffer`, as ``SSLSocket.recv_into`` does."""
        try:
            return _recv_into(self, buffer, nbytes, flags)
        except ssl.SSLError:
            raise
        except OSError:
            clear_error_queue()
            raise

    def do_handshake(self, block: bool = False) -> None:
        """Make the TLS handshake, as ``SSLSocket.do_handshake`` does."""
        try:
            super().do_handshake(block)
        except ssl.SSLError:
            raise
        except OSError:
            clear_error_queue()
            raise

    def unwrap(self) -> "socket.socket":
        """Send close_notify and receive the peer's, as ``SSLSocket.unwrap`` does."""
        try:
            return super().unwrap()
        except ssl.SSLError:
            raise
        except OSError:
            clear_error_queue()
            raise


_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
_context.check_hostname = False


def clear_error_queue() -> None:
    """Empty the queue of this thread (20 us). ``ssl`` has no function for that, but does it for each new connection."""
    _context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO())
