"""One end of the connection between an asker and the ledger: frames over a socket that never blocks the loop.

Tested by tests/unit/test_state_shared.py.
"""

import asyncio
import math
import socket
from collections import deque
from collections.abc import Callable

from tlstunnel.state import wire

_READ = 1 << 16


class Channel:
    """Sends and receives frames on `sock`, which belongs to it from then on.

    `on_payload` is called with each frame's payload, and may raise `wire.WireError`. `on_end` is called once with the
    reason when the other side has closed the connection or has sent what is no frame, but not after `close`.
    `received` and `unsent` are what another process has left. While more than `most_unsent` bytes wait for a peer that
    does not read, nothing is read from it; at most one side may have such a bound, or both could wait for each other.
    """

    def __init__(  # noqa: PLR0913 - what another process has left
        self,
        sock: socket.socket,
        on_payload: Callable[[bytes], None],
        on_end: Callable[[str], None],
        *,
        received: bytes = b"",
        unsent: bytes = b"",
        most_unsent: float = math.inf,
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._on_payload = on_payload
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._received = bytearray(received)
        self._unsent = deque([unsent] if unsent else ())
        self.unsent_bytes = len(unsent)
        self._most_unsent = most_unsent
        self._reading = False
        self.start_reading()
        if unsent:
            self._loop.add_writer(sock, self._write)

    @property
    def closed(self) -> bool:
        """Whether either side has closed the connection."""
        return self.sock.fileno() < 0

    @property
    def received(self) -> bytes:
        """What has arrived of a frame that is not complete."""
        return bytes(self._received)

    @property
    def unsent(self) -> bytes:
        """What the socket has not taken yet."""
        return b"".join(self._unsent)

    def start_reading(self) -> None:
        """Read whenever something has arrived."""
        if not self._reading and not self.closed:
            self._reading = True
            self._loop.add_reader(self.sock, self.read)

    def stop_reading(self) -> None:
        """Leave what arrives in the socket."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self.sock)

    def stop(self) -> None:
        """Neither read nor write any more. The socket stays open."""
        self.stop_reading()
        self._loop.remove_writer(self.sock)

    def resume(self) -> None:
        """Read and write again after `stop`."""
        self.start_reading()
        if self._unsent:
            self._loop.add_writer(self.sock, self._write)

    def send(self, frame: bytes) -> None:
        """Send a frame, as soon as the socket takes it. After the end, it is dropped."""
        if self.closed:
            return
        if not self._unsent:
            try:
                sent = self.sock.send(frame)
            except BlockingIOError:
                sent = 0
            except OSError:
                return  # closed by the peer: what it sent before that is read first, then its end
            if sent == len(frame):
                return
            frame = frame[sent:]
            self._loop.add_writer(self.sock, self._write)
        self._unsent.append(frame)
        self.unsent_bytes += len(frame)
        if self.unsent_bytes > self._most_unsent:
            self.stop_reading()

    def read(self) -> None:
        """Handle what has arrived."""
        if self.closed:
            return
        try:
            data = self.sock.recv(_READ)
        except BlockingIOError:
            return
        except OSError as error:
            return self._end(error.strerror or str(error))
        if not data:
            return self._end("")
        self._received += data
        try:
            for payload in wire.split(self._received):
                self._on_payload(payload)
                if self.sock.fileno() < 0:
                    return
        except wire.WireError as error:
            self._end(str(error))

    def close(self) -> None:
        """Close the connection, without `on_end`."""
        if not self.closed:
            self.stop()
            self.sock.close()
            self._unsent.clear()
            self.unsent_bytes = 0

    def _write(self) -> None:
        while self._unsent:
            first = self._unsent[0]
            try:
                sent = self.sock.send(first)
            except BlockingIOError:
                return
            except OSError:
                break
            self.unsent_bytes -= sent
            if sent < len(first):
                self._unsent[0] = first[sent:]
                return
            self._unsent.popleft()
        self._loop.remove_writer(self.sock)
        self._unsent.clear()
        self.unsent_bytes = 0
        self.start_reading()

    def _end(self, reason: str) -> None:
        self.close()
        self._on_end(reason)
