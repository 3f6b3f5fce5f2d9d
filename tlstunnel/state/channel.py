"""One end of the connection between an asker and the ledger: frames over a socket that never blocks the loop.

Tested by tests/unit/test_state_shared.py.
"""

import asyncio
import math
import socket
import time
from collections import deque
from collections.abc import Callable

from tlstunnel.sockets.readiness import IN, OUT, TunnelLoop, readiness
from tlstunnel.state import wire

_READ = 1 << 16


class Channel:
    """Sends and receives frames on `sock`, which belongs to it from then on. It starts to read in the running loop.

    `on_payload` is called with each frame's payload, and may raise `wire.WireError`. `on_end` is called once with the
    reason when the other side has closed the connection or has sent what is no frame, but not after `close`.
    `received` and `unsent` are what another process has left. Frames are handled for `turn_seconds`, the others in the
    next turn of the loop. While more than `most_unsent` bytes wait for a peer that
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
        turn_seconds: float = math.inf,
    ) -> None:
        """Raises OSError."""
        sock.setblocking(False)
        self.sock = sock
        self.received = received
        self.unsent_bytes = len(unsent)
        self._on_payload = on_payload
        self._on_end = on_end
        self._unsent = deque([unsent] if unsent else ())
        self._most_unsent = most_unsent
        self._turn_seconds = turn_seconds
        self._reading = True
        self._continuing = False
        """Whether frames that have arrived wait for the next turn."""
        self._stopped = False
        self._watched = 0
        # asyncio's own readers cost a Handle and a turn of its queue for each event.
        self._loop = loop = asyncio.get_running_loop()
        self._readiness = readiness(loop)
        self._own_readiness = not isinstance(loop, TunnelLoop)
        self._watch()
        if received:
            self._continue_later()

    @property
    def closed(self) -> bool:
        """Whether either side has closed the connection."""
        return self.sock.fileno() < 0

    @property
    def unsent(self) -> bytes:
        """What the socket has not taken yet."""
        return b"".join(self._unsent)

    def stop(self) -> None:
        """Neither read nor write, nor notice the end, until `resume`."""
        self._stopped = True
        self._watch()

    def resume(self) -> None:
        """Continue after `stop`."""
        self._stopped = False
        self._watch()
        if self._continuing:
            self._loop.call_soon(self._continue)

    def send(self, frame: bytes) -> None:
        """Send a frame, as soon as the socket takes it. After the end, it is dropped."""
        if self.closed:
            return
        if not self._unsent and not self._stopped:
            try:
                sent = self.sock.send(frame)
            except BlockingIOError:
                sent = 0
            except OSError:
                return  # closed by the peer: what it sent before that is read first, then its end
            if sent == len(frame):
                return
            frame = frame[sent:]
        self._unsent.append(frame)
        self.unsent_bytes += len(frame)
        self._reading = self.unsent_bytes <= self._most_unsent
        self._watch()

    def begin_expecting(self) -> None:
        """Read what arrives before the loop does anything else: somebody waits for it."""
        if not self.closed:
            self._readiness.begin_expecting(self.sock.fileno())

    def end_expecting(self) -> None:
        """Read as other sockets are read."""
        if not self.closed:
            self._readiness.end_expecting(self.sock.fileno())

    def read(self) -> None:
        """Handle what has arrived."""
        if self.closed:
            return
        try:
            data = self.sock.recv(_READ)
        except BlockingIOError:
            return
        except ConnectionResetError:  # it had not read everything
            return self._end("")
        except OSError as error:
            return self._end(error.strerror or str(error))
        if not data:
            return self._end("")
        self._handle(self.received + data if self.received else data)

    def _handle(self, received: bytes) -> None:
        """Handle the complete frames, as many as there is time for in this turn."""
        latest = time.monotonic() + self._turn_seconds
        try:
            payloads, self.received = wire.split(received)
            for index, payload in enumerate(payloads, 1):
                self._on_payload(payload)
                if self.sock.fileno() < 0:
                    return
                if index < len(payloads) and time.monotonic() > latest:
                    self.received = b"".join([*map(wire.frame, payloads[index:]), self.received])
                    return self._continue_later()
        except wire.WireError as error:
            self._end(str(error))
        except BaseException:
            # Otherwise it would stay open, unread, with all its leases.
            self._end("an error of this program, see the log")
            raise

    def _continue_later(self) -> None:
        self._continuing = True
        self._watch()
        self._loop.call_soon(self._continue)

    def _continue(self) -> None:
        if self._continuing and not self._stopped and not self.closed:
            self._continuing = False
            self._handle(self.received)
            self._watch()

    def close(self) -> None:
        """Close the connection, without `on_end`."""
        if not self.closed:
            self.stop()
            self.end_expecting()
            if self._own_readiness:
                self._readiness.close()
            self.sock.close()
            self._unsent.clear()
            self.unsent_bytes = 0

    def _watch(self) -> None:
        """Have the loop wait for what this end waits for."""
        reading = self._reading and not self._continuing
        events = 0 if self._stopped else (IN if reading else 0) | (OUT if self._unsent else 0)
        if events != self._watched and not self.closed:
            if not events:
                self._readiness.unregister(self.sock.fileno())
            elif self._watched:
                self._readiness.modify(self.sock.fileno(), events)
            else:
                self._readiness.register(self.sock.fileno(), events, self._handle_events)
            self._watched = events

    def _handle_events(self, events: int) -> None:
        if self._unsent and events & ~IN:
            self._write()
        if self._reading and not self._continuing:
            self.read()

    def _write(self) -> None:
        while self._unsent:
            first = self._unsent[0]
            try:
                sent = self.sock.send(first)
            except BlockingIOError:
                return
            except OSError:
                self._unsent.clear()  # closed by the peer, which reading notices
                break
            self.unsent_bytes -= sent
            if sent < len(first):
                self._unsent[0] = first[sent:]
            else:
                self._unsent.popleft()
        self.unsent_bytes = 0
        self._reading = True
        self._watch()

    def _end(self, reason: str) -> None:
        if not self.closed:
            self.close()
            self._on_end(reason)
