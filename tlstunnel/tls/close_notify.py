"""Send close_notify on a TLS connection whose peer may still be sending (RFC 8446 section 6.1).

Tested by tests/promises/test_half_close_return_traffic.py.
"""

import os
import socket
import ssl

_MAX_RECORD = 16_384


class CloseNotify:
    """What a half-close of TLS needs and ``ssl`` does not offer: the record alone, and the socket below TLS.

    ``SSLSocket.unwrap()`` sends close_notify and then reads until the peer's. It fails if there is application data in
    the socket, and the connection is lost (seen: APPLICATION_DATA_AFTER_CLOSE_NOTIFY, on TLS 1.2 and 1.3). Therefore
    `take_record` uses dup2(2) to replace the descriptor below OpenSSL with one end of a socket pair for the duration of
    that call. The pair catches the record, and OpenSSL finds nothing to read in it.
    """

    def __init__(self) -> None:
        self._trap, self._caught = socket.socketpair()
        self._trap.setblocking(False)
        self._caught.setblocking(False)
        # Reserved in advance: tunnels must still be able to close properly when the process runs out of descriptors.
        self._spare = os.dup(self._trap.fileno())

    def take_record(self, sock: ssl.SSLSocket) -> bytes:
        """Return the close_notify record of `sock` without sending it or reading from the peer.

        OpenSSL regards it as sent and encrypts nothing more for `sock`. Raises OSError if TLS has failed.
        """
        fd = sock.fileno()
        os.dup2(fd, self._spare, inheritable=False)
        os.dup2(self._trap.fileno(), fd, inheritable=False)
        try:
            sock.unwrap()
        except ssl.SSLWantReadError:
            pass
        finally:
            os.dup2(self._spare, fd, inheritable=False)
            os.dup2(self._trap.fileno(), self._spare, inheritable=False)
        return self._caught.recv(_MAX_RECORD)

    def send_below(self, sock: ssl.SSLSocket, record: bytes) -> int:
        """Send bytes of a TLS record. Return how many the socket accepted. Raises OSError."""
        return socket.socket.send(sock, record)

    def shut_down_below(self, sock: ssl.SSLSocket) -> None:
        """Send FIN and keep the TLS state, which ``SSLSocket.shutdown`` drops. Raises OSError."""
        socket.socket.shutdown(sock, socket.SHUT_WR)

    def close(self) -> None:
        """Release the descriptors."""
        self._trap.close()
        self._caught.close()
        os.close(self._spare)
