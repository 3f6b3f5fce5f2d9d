"""Bytes both ways between a TLS client and its origin: never parsed, held back or reordered.

A splice has two sides, each with its socket and with what comes from it:

    client (TLS)  --  flow, moved  ->  unsent  --  origin (plain or TLS)
    client (TLS)  --  unsent  <-  flow, moved  --  origin (plain or TLS)

What comes from a side FLOWS; or WAITS for the other side to take it, and is not read meanwhile, so that memory is
bounded by one turn's read; or ENDS: the side has said its last, and what is left is being delivered; or has ENDED: the
end was passed on, or the other side takes no more. When both have ENDED, so has the tunnel. Reading is the only source
of truth about a side: an error or a hang-up is believed when a read shows it, so after everything that came before it.

The hot path is `on_event`, once for a TLS side and once for a plain one. Readiness is level-triggered and asked anew
only when a flow changes state: a message costs no ``epoll_ctl``.
"""

import asyncio
import contextlib
import os
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Final

import structlog

from tlstunnel.sockets.closing import ClosingSockets, reset
from tlstunnel.sockets.readiness import EDGE_TRIGGERED, ERR, HUP, IN, OUT
from tlstunnel.tls.truncation import is_truncation

RECORD: Final = 16_384
"""The most that one TLS record carries (RFC 8446 section 5.1), and so that one ``SSLSocket.recv_into`` gives."""

TURN: Final = 262_144
"""The most that a tunnel reads in one direction at one wake-up, bytes: no tunnel starves the others."""

FLOWS, WAITS, ENDS, ENDED = range(4)

CLOSED = "closed"
TRUNCATED = "truncated"
RESET = "reset"
IDLE = "idle timeout"
STUCK = "close timeout"
FAULT = "internal error"

# One buffer for all tunnels: what a handler reads it writes, or copies aside, before the next handler runs.
_BUFFER = bytearray(TURN)
_VIEW = memoryview(_BUFFER)

_WANT = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_BYTES_ACKED = struct.Struct("@120xQ")  # tcpi_bytes_acked in struct tcp_info, linux/tcp.h


class _Side:
    """One of the two sockets, what comes from it, and what is still to be sent to it.

    `moved` counts the bytes from here that the other side's socket took, `unsent` are those for here that this socket
    has not taken yet. `end` says how it ended what it sends; `failure` why it takes no more, while its own last words
    may still be on their way to us.
    """

    __slots__ = ("_sink", "_splice", "_watched", "end", "failure", "flow", "moved", "sock", "unsent", "wants")

    def __init__(self, splice: "Splice", sock: socket.socket, sink: socket.socket, unsent: bytes) -> None:
        self._splice = splice
        self._sink = sink  # the other side's socket
        self.sock = sock
        self.unsent = unsent
        self.flow = FLOWS
        self.moved = 0
        self.end = ""
        self.failure: OSError | None = None
        self.wants = 0  # IN or OUT where TLS has a message of its own to read or write before anything else
        self._watched = EDGE_TRIGGERED  # what it is registered for before

    def on_event(self, events: int) -> None:
        """Move what has come from here to the other side."""
        raise NotImplementedError

    # What is not the hot path: waiting, ending, failing.

    @property
    def _other(self) -> "_Side":
        splice = self._splice
        return splice.origin if splice.client is self else splice.client

    def _may_be_read(self, events: int) -> bool:
        splice = self._splice
        if events & (self.wants or OUT):
            self.wants = 0
            self.flush()
            splice.settle()
        if self.flow == FLOWS:
            return True
        if events & (ERR | HUP) and not splice.over:
            # It has hung up and is not to be read yet, and epoll tells of that unasked, again and again.
            splice.splices.readiness.unregister(self.sock.fileno())
            self._watched = -1
            splice.splices.closing(splice)
            if error := _error_of(self.sock):
                self._takes_no_more(error)
        return False

    def _is_behind(self, rest: bytes, why: OSError) -> None:
        """The other side's socket did not take `rest` of what came from here."""
        other = self._other
        if not isinstance(why, _WANT):
            return other._takes_no_more(why)
        # OpenSSL may have sent a part of what it was offered, and must be offered the same again.
        other.unsent = rest
        self.flow = WAITS
        if isinstance(why, ssl.SSLWantReadError):
            other._must_first(IN)
        self._splice.settle()

    def _must_first(self, wants: int) -> None:
        """Wait for `wants` alone: asked for anything else, a readiness that is of no use would come for ever."""
        self.wants = wants
        if self.flow == FLOWS:
            self.flow = WAITS

    def flush(self) -> None:
        """Send what is unsent, as far as it goes, and go on with what had to wait for that."""
        other = self._other
        if self.unsent:
            rest = memoryview(self.unsent)
            try:
                while rest:
                    sent = self.sock.send(rest)
                    other.moved += sent
                    rest = rest[sent:]
            except ssl.SSLWantReadError:
                self._must_first(IN)
            except _WANT:
                pass
            except OSError as error:
                return self._takes_no_more(error)
            self.unsent = bytes(rest)
        if self.flow == WAITS and not other.unsent and not self.wants:
            self.flow = FLOWS
        if other.flow == WAITS and not self.unsent and not other.wants:
            other.flow = FLOWS
            if self._splice.draining:
                other.on_event(IN)

    def ended(self, why: str) -> None:
        """It sends no more: `CLOSED` is the end that it meant, or that we make; all others are failures."""
        splice = self._splice
        if splice.over:
            return
        splice.blame(self, why)
        if why != CLOSED:
            # Reset, or a FIN without close_notify, after which OpenSSL writes nothing more.
            self.unsent = b""
            self._other.flow = ENDED
            splice.aborting |= why != TRUNCATED
        if why != CLOSED or not splice.draining:
            self.end = why
        self.flow = ENDS
        splice.settle()

    def _takes_no_more(self, error: OSError) -> None:
        """A write to it failed: what it sent before is still delivered, and then shows why."""
        other = self._other
        self.failure = error
        self.unsent = b""
        other.flow = ENDED
        self.wants = 0
        if self.flow == WAITS and not other.unsent:
            self.flow = FLOWS
        self._splice.aborting |= self.flow == ENDED
        self._splice.settle()

    def take_end(self) -> bool:
        """Send it the other side's end, while it may go on sending; whether that is done."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        return True

    def watch(self) -> None:
        """Watch for what is needed now."""
        events = self.wants
        if not events:
            writes = self.unsent or self._other.flow == ENDS
            events = (IN if self.flow == FLOWS else 0) | (OUT if writes else 0)
        if self._watched < 0:
            if not events:
                return
            self._splice.splices.readiness.register(self.sock.fileno(), events, self.on_event)
        elif self._watched != events:
            self._splice.splices.readiness.modify(self.sock.fileno(), events, self.on_event)
        self._watched = events


class _Plain(_Side):
    """A side without TLS: an end is a FIN."""

    __slots__ = ()

    def on_event(self, events: int) -> None:
        """Move what has come from here to the other side."""
        try:
            if (self.flow or events != IN) and not self._may_be_read(events):
                return
            try:
                n = self.sock.recv_into(_BUFFER)
            except BlockingIOError:
                if self._splice.draining:
                    self.ended(CLOSED)
                return
            except OSError as error:
                return self._read_end(_why(error))
            if not n:
                return self._read_end(CLOSED)
            sent, failure = 0, None
            try:
                while sent < n:
                    sent += self._sink.send(_VIEW[sent:n])
            except OSError as error:
                failure = error
            self.moved += sent
            if failure is not None:
                self._is_behind(bytes(_VIEW[sent:n]), failure)
        except Exception:
            self._splice.fault()

    def _read_end(self, why: str) -> None:
        if self.failure is not None and not self._splice.draining:
            # The write that failed took the socket's error with it: without one, a reset reads as an end.
            why = _why(self.failure)
        self.ended(why)


class _Secure(_Side):
    """A side with TLS: an end is close_notify, and a FIN without it a truncation (RFC 8446 section 6.1)."""

    __slots__ = ("_notify",)
    sock: ssl.SSLSocket

    def __init__(self, splice: "Splice", sock: ssl.SSLSocket, sink: socket.socket, unsent: bytes) -> None:
        super().__init__(splice, sock, sink, unsent)
        self._notify = b""  # what the socket has not taken of close_notify

    def on_event(self, events: int) -> None:  # noqa: C901 - the hot path in one frame: a call costs what a check does
        """Move what has come from here to the other side."""
        try:
            if (self.flow or events != IN) and not self._may_be_read(events):
                return
            n, end = 0, ""
            try:
                n = k = self.sock.recv_into(_BUFFER, RECORD)
                while k and n <= TURN - RECORD and (k == RECORD or self.sock.pending()):
                    k = self.sock.recv_into(_VIEW[n:], RECORD)
                    n += k
                if not k:
                    end = CLOSED
            except ssl.SSLWantReadError:
                if self._splice.draining:
                    end = CLOSED
            except OSError as error:
                end = self._read_end(error)
            if n:
                sent, failure = 0, None
                try:
                    while sent < n:
                        sent += self._sink.send(_VIEW[sent:n])
                except OSError as error:
                    failure = error
                self.moved += sent
                if failure is not None:
                    self._is_behind(bytes(_VIEW[sent:n]), failure)
            if end:
                self.ended(end)
        except Exception:
            self._splice.fault()

    def _read_end(self, error: OSError) -> str:
        """Why `error` ends what it sends, or "" when it does not."""
        if isinstance(error, ssl.SSLWantWriteError):
            self._must_first(OUT)
            self._splice.settle()
            return ""
        if isinstance(error, ssl.SSLZeroReturnError):
            return CLOSED  # OpenSSL's word for the end when our own close_notify has been sent
        why = _why(error)
        # The write that failed took the socket's error with it: without one, a reset reads as a truncation.
        return RESET if why == TRUNCATED and self.failure is not None else why

    def take_end(self) -> bool:
        """Send it close_notify and FIN. But a truncation is passed on as one: what follows is a FIN alone."""
        other = self._other
        try:
            if other.end == TRUNCATED:
                return True
            if self.end == CLOSED:
                self.sock.unwrap()  # its own close_notify has been read: this only sends
            elif not self._send_close_notify():
                return False
            if self.flow != ENDED:  # else it is closed next
                socket.socket.shutdown(self.sock, socket.SHUT_WR)
        except _WANT:
            return False
        except OSError as error:
            self.failure = error
        return True

    def _send_close_notify(self) -> bool:
        """Send it without reading, for the side may be sending; whether all of it is sent."""
        if not self._notify:
            self._notify = self._splice.splices.close_notify(self.sock)
        with contextlib.suppress(BlockingIOError):
            # The record is made: it goes to the socket below the TLS.
            self._notify = self._notify[socket.socket.send(self.sock, self._notify) :]
        return not self._notify


class Splice:
    """Two connected non-blocking sockets, spliced until both sides have ended. The origin's may be a TLS socket too.

    `to_client` and `to_origin` go first: the 101, of `head` bytes, and what came behind either head. `idle_timeout` is
    the longest time without a byte, seconds, or None; `site` is what the tunnel belongs to. `up` and `down` count the
    bytes that the sockets took, the head left out. `on_end` is called once, when `ended_by` ("client",
    "origin" or "tunnel") and `reason` are settled and both sockets are closed or closing.
    """

    __slots__ = (
        "_on_end",
        "aborting",
        "client",
        "close_timeout",
        "draining",
        "ended_by",
        "idle_timeout",
        "origin",
        "reason",
        "seen",
        "since",
        "site",
        "splices",
    )

    def __init__(  # noqa: PLR0913 - two sides, what they start with, and whom to tell
        self,
        splices: "Splices",
        client: ssl.SSLSocket,
        origin: socket.socket,
        *,
        to_client: bytes,
        to_origin: bytes,
        head: int,
        close_timeout: float,
        idle_timeout: float | None,
        site: str,
        on_end: "Callable[[Splice], None]",
    ) -> None:
        self.splices = splices
        self.client: _Side = _Secure(self, client, origin, to_client)
        self.origin: _Side = (
            _Secure(self, origin, client, to_origin)
            if isinstance(origin, ssl.SSLSocket)
            else _Plain(self, origin, client, to_origin)
        )
        if to_origin:
            self.client.flow = WAITS
        if to_client:
            self.origin.flow = WAITS
        self.origin.moved = -head
        self._on_end: Callable[[Splice], None] | None = on_end
        self.close_timeout, self.idle_timeout = close_timeout, idle_timeout
        self.site = site
        self.seen: tuple[int, int, int] | None = None  # what had moved at the last sweep
        self.since = 0.0
        self.ended_by = self.reason = ""
        self.aborting = False
        self.draining = 0.0  # since when, in the loop's time

    @property
    def up(self) -> int:
        """Bytes from the client that the origin's socket took."""
        return self.client.moved

    @property
    def down(self) -> int:
        """Bytes from the origin that the client's socket took."""
        return self.origin.moved

    @property
    def over(self) -> bool:
        """Whether it has ended; it has no sides any more then."""
        return self._on_end is None

    def start(self) -> None:
        """Take both descriptors over from the handlers they have, and begin."""
        self.splices.add(self)
        sides = self.client, self.origin
        try:
            for side in sides:
                if not self.over:
                    side.flush()
            self.settle()
            for side in sides:
                # What OpenSSL has decrypted already gives no readiness.
                if side.flow == FLOWS and isinstance(side.sock, ssl.SSLSocket) and side.sock.pending():
                    side.on_event(IN)
        except Exception:
            self.fault()

    def drain(self, reason: str) -> None:
        """End the tunnel from our side, once what both sides have sent until now is delivered."""
        if not self.over and not self.draining:
            self.blame(None, reason)
            self.draining = self.splices.loop.time()
            self.splices.closing(self)
            for side in (self.client, self.origin):
                if side.flow == FLOWS:
                    side.on_event(IN)

    def cut(self) -> None:
        """Read no more of either side: one of them did not stop sending after `drain`."""
        if not self.over:
            for side in (self.client, self.origin):
                if side.flow < ENDS:
                    side.ended(CLOSED)

    def abort(self, reason: str) -> None:
        """End the tunnel at once, with RST to both sides, whatever was still to be delivered."""
        if not self.over:
            if self.ended_by != "tunnel":
                self.ended_by, self.reason = "tunnel", reason
            self._finish(self._reset_now)

    def settle(self) -> None:
        """Pass on the ends that are due, finish if that was all, and watch for what each side needs now."""
        if self.over:
            return
        client, origin = self.client, self.origin
        for side, sink in ((client, origin), (origin, client)):
            # Where the tunnel is about to end with RST, that is the end.
            if side.flow == ENDS and not sink.unsent and not sink.wants and (self.aborting or sink.take_end()):
                side.flow = ENDED
        if client.flow == origin.flow == ENDED:
            return self._finish(self._reset if self.aborting else self._linger)
        if client.flow >= ENDS or origin.flow >= ENDS:
            self.splices.closing(self)
        client.watch()
        origin.watch()

    def blame(self, side: _Side | None, why: str) -> None:
        """Say who (None: the tunnel) ended it and why, unless somebody did before."""
        if not self.reason:
            self.ended_by = "tunnel" if side is None else "client" if side is self.client else "origin"
            self.reason = why

    def fault(self) -> None:
        """End it for an error of ours, the one that is being handled."""
        structlog.get_logger().exception("splice failed")
        if not self.over:
            self.blame(None, FAULT)
            self._finish(self._reset_now)

    def _finish(self, close: Callable[[socket.socket], None]) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is None:
            return
        sides = self.client, self.origin
        self.splices.discard(self)
        for side in sides:
            side.flow = ENDED
            if side.failure is not None:
                self.blame(side, RESET)
        for side in sides:
            close(side.sock)
        on_end(self)
        # Or the collector would have to find them: they know us.
        del self.client, self.origin

    def _linger(self, sock: socket.socket) -> None:
        """Close one of the sockets after both sides have ended well."""
        if self.draining or any(side.failure or side.end == TRUNCATED for side in (self.client, self.origin)):
            # It may have input that nobody has read.
            self.splices.readiness.unregister(sock.fileno())
            self.splices.closing_sockets.close_gracefully(sock, self.close_timeout)
        else:
            self.splices.readiness.forget(sock.fileno())
            sock.close()

    def _reset(self, sock: socket.socket) -> None:
        self.splices.readiness.unregister(sock.fileno())
        self.splices.closing_sockets.reset_after_delivery(sock, self.close_timeout)

    def _reset_now(self, sock: socket.socket) -> None:
        self.splices.readiness.unregister(sock.fileno())
        reset(sock)

    def moved(self) -> tuple[int, int, int]:
        """What changes whenever a byte gets on: what the sockets took, and what the peers acknowledged."""
        if self.over:
            return 0, 0, 0
        return self.up + self.down, _acknowledged(self.client.sock), _acknowledged(self.origin.sock)


class Splices:
    """The splices of this process, and the one sweep that ends those that do not get on.

    A sweep instead of a timer a splice: an idle tunnel costs no CPU unless it has an `idle_timeout`, and a message
    never touches a timer.
    """

    def __init__(self, closing_sockets: ClosingSockets) -> None:
        self.readiness = closing_sockets.readiness
        self.closing_sockets = closing_sockets
        self.loop = closing_sockets.loop
        self.all: dict[Splice, None] = {}  # oldest first
        self._closing: set[Splice] = set()
        self._limited: set[Splice] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._trap, self._trapped = socket.socketpair()
        self._trap.setblocking(False)
        self._trapped.setblocking(False)
        # Taken beforehand: when descriptors run out, tunnels must still be able to end well.
        self._spare = os.dup(self._trap.fileno())

    def add(self, splice: Splice) -> None:
        """Count `splice` among the running ones."""
        self.all[splice] = None
        if splice.idle_timeout is not None:
            self._limited.add(splice)
            splice.since = self.loop.time()
            self._sweep_in(splice.idle_timeout)

    def discard(self, splice: Splice) -> None:
        """Forget `splice`."""
        self.all.pop(splice, None)
        self._closing.discard(splice)
        self._limited.discard(splice)

    def closing(self, splice: Splice) -> None:
        """Give `splice` its `close_timeout` without progress from now on."""
        if splice not in self._closing:
            self._closing.add(splice)
            splice.seen, splice.since = None, self.loop.time()
            self._sweep_in(splice.close_timeout)

    def close(self) -> None:
        """Release what the splices share; none may be running."""
        if self._timer is not None:
            self._timer.cancel()
        self._trap.close()
        self._trapped.close()
        os.close(self._spare)

    def close_notify(self, sock: ssl.SSLSocket) -> bytes:
        """The close_notify record of `sock`, taken from OpenSSL without a byte being sent or read.

        ``unwrap()`` sends the record and then reads: application data that waits in the socket is lost by it, and the
        connection with it (seen: APPLICATION_DATA_AFTER_CLOSE_NOTIFY, on TLS 1.2 and 1.3). So OpenSSL's descriptor is
        for that moment one end of a socket pair, in which the record is caught and nothing is to be read.

        Raises OSError when TLS has failed.
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
        return self._trapped.recv(RECORD)

    def _sweep_in(self, limit: float) -> None:
        when = self.loop.time() + min(max(limit / 4, 0.05), 5.0)
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = self.loop.call_at(when, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        now = self.loop.time()
        for splice in self._closing | self._limited:
            closing = splice in self._closing
            if splice.draining and now - splice.draining >= splice.close_timeout:
                splice.cut()
            moved = splice.moved()
            if moved != splice.seen:
                splice.seen, splice.since = moved, now
            elif closing and now - splice.since >= splice.close_timeout:
                splice.abort(STUCK)
            elif not closing and splice.idle_timeout is not None and now - splice.since >= splice.idle_timeout:
                splice.drain(IDLE)
        if self._closing:
            self._sweep_in(min(splice.close_timeout for splice in self._closing))
        if self._limited:
            self._sweep_in(min(splice.idle_timeout or 0.0 for splice in self._limited))


def _error_of(sock: socket.socket) -> OSError | None:
    """The error that a hung up socket has, which this takes from it; None for one that has just ended."""
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return OSError(code, os.strerror(code)) if code else None


def _why(error: OSError) -> str:
    """What `error` says of the end of a side, for the record."""
    if is_truncation(error):
        return TRUNCATED
    if isinstance(error, ssl.SSLEOFError):
        return RESET
    if isinstance(error, ssl.SSLError):
        return f"TLS error: {error.reason or error.strerror or 'unknown'}"
    if isinstance(error, BrokenPipeError):
        # The side had ended before it refused more: EPIPE, not ECONNRESET, is what Linux says then.
        return CLOSED
    if isinstance(error, ConnectionResetError):
        return RESET
    return error.strerror or str(error)


def _acknowledged(sock: socket.socket) -> int:
    """How many bytes the peer of `sock` has acknowledged; 0 where the system does not tell."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
        return int(_BYTES_ACKED.unpack(info)[0])
    except (OSError, AttributeError, struct.error):
        return 0
