"""Bytes both ways between a TLS client and its origin: never parsed, held back or reordered.

Two directions, each with a source, a buffer for what its sink would not take, and an end:

    up      client (TLS)  ->  _to_origin  ->  origin
    down    origin        ->  _to_client  ->  client (TLS)

A direction FLOWS; or WAITS for its sink, and its source is not read meanwhile, so that memory is bounded by one turn's
read; or ENDS: its source has said its last, and what is left is being delivered; or has ENDED: the end was passed on,
or its sink takes no more. When both have ENDED, so has the tunnel. Reading is the only source of truth about a source:
an error or a hang-up is believed when a read shows it, so after everything that came before it.

Readiness is level-triggered and asked anew only when a direction changes state: a message costs no ``epoll_ctl``.
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

from tlstunnel.linger import Partings, reset
from tlstunnel.readiness import EDGE, ERR, HUP, IN, OUT
from tlstunnel.truncation import is_truncation

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

_WANT = (ssl.SSLWantReadError, ssl.SSLWantWriteError)
_BYTES_ACKED = struct.Struct("@120xQ")  # tcpi_bytes_acked in struct tcp_info, linux/tcp.h


class Splice:
    """Two connected non-blocking sockets, spliced until both directions have ended.

    `to_client` and `to_origin` go first: the 101, of `head` bytes, and what came behind either head. `idle_timeout` is
    the longest time without a byte, seconds, or None; `site` is what the tunnel belongs to. `up` and `down` count the
    bytes that the sockets took, the head left out. `on_end` is called once, when `ended_by` ("client",
    "origin" or "tunnel") and `reason` are settled and both sockets are closed or closing.
    """

    __slots__ = (
        "_aborting",
        "_cfd",
        "_client",
        "_client_failure",
        "_client_has_ended",
        "_client_watch",
        "_down",
        "_notify",
        "_ofd",
        "_on_end",
        "_origin",
        "_origin_failure",
        "_origin_watch",
        "_read_wants_write",
        "_readiness",
        "_splices",
        "_to_client",
        "_to_origin",
        "_up",
        "close_timeout",
        "down",
        "draining",
        "ended_by",
        "idle_timeout",
        "reason",
        "seen",
        "since",
        "site",
        "up",
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
        self._splices = splices
        self._readiness = splices.readiness
        self._client, self._origin = client, origin
        self._cfd, self._ofd = client.fileno(), origin.fileno()
        self._to_client, self._to_origin = to_client, to_origin
        self._up = WAITS if to_origin else FLOWS
        self._down = WAITS if to_client else FLOWS
        self._on_end = on_end
        self.close_timeout, self.idle_timeout = close_timeout, idle_timeout
        self.site = site
        self.up, self.down = 0, -head
        self.seen: tuple[int, int, int] | None = None  # what had moved at the last sweep
        self.since = 0.0
        self.ended_by = self.reason = ""
        # Why a side takes no more; its own last words may still be on their way to us.
        self._client_failure: OSError | None = None
        self._origin_failure: OSError | None = None
        self._notify = b""
        self._read_wants_write = self._aborting = self._client_has_ended = False
        self.draining = 0.0  # since when, in the loop's time
        self._client_watch = self._origin_watch = EDGE  # what they are registered for before

    def start(self) -> None:
        """Take both descriptors over from the handlers they have, and begin."""
        self._splices.add(self)
        try:
            self._flush_to_client()
            self._flush_to_origin()
            self._settle()
            # What OpenSSL has decrypted already gives no readiness.
            if self._up == FLOWS and self._client.pending():
                self.on_client(IN)
        except Exception:
            self._fault()

    def end(self, reason: str) -> None:
        """End the tunnel from our side, once what both sides have sent until now is delivered."""
        if not self._over and not self.draining:
            self._blame("tunnel", reason)
            self.draining = self._splices.loop.time()
            self._splices.closing(self)
            if self._up == FLOWS:
                self.on_client(IN)
            if self._down == FLOWS:
                self.on_origin(IN)

    def cut(self) -> None:
        """Read no more of either side: one of them did not stop sending after `end`."""
        if self._up < ENDS:
            self._client_ended(CLOSED)
        if self._down < ENDS:
            self._origin_ended(CLOSED)

    def abort(self, reason: str) -> None:
        """End the tunnel at once, with RST to both sides, whatever was still to be delivered."""
        if not self._over:
            if self.ended_by != "tunnel":
                self.ended_by, self.reason = "tunnel", reason
            self._finish(self._reset_now)

    def on_client(self, events: int) -> None:  # noqa: C901 - the hot path in one frame: a call costs what a check does
        """Move what the client has sent to the origin."""
        try:
            if (self._up or events != IN) and not self._client_may_be_read(events):
                return
            n, end = 0, ""
            try:
                n = k = self._client.recv_into(_BUFFER, RECORD)
                while k and n <= TURN - RECORD and (k == RECORD or self._client.pending()):
                    k = self._client.recv_into(_VIEW[n:], RECORD)
                    n += k
                if not k:
                    end = CLOSED
            except ssl.SSLWantReadError:
                if self.draining:
                    end = CLOSED
            except OSError as error:
                end = self._why_client_ended(error)
            if n:
                sent, failure = 0, None
                try:
                    sent = self._origin.send(_VIEW[:n])
                except BlockingIOError:
                    pass
                except OSError as error:
                    failure = error
                self.up += sent
                if sent < n:
                    self._origin_is_behind(bytes(_VIEW[sent:n]), failure)
            if end:
                self._client_ended(end)
        except Exception:
            self._fault()

    def on_origin(self, events: int) -> None:
        """Move what the origin has sent to the client."""
        try:
            if (self._down or events != IN) and not self._origin_may_be_read(events):
                return
            try:
                n = self._origin.recv_into(_BUFFER)
            except BlockingIOError:
                if self.draining:
                    self._origin_ended(CLOSED)
                return
            except OSError as error:
                return self._origin_ended(_why(error))
            if not n:
                return self._origin_ended(CLOSED)
            sent, failure = 0, None
            try:
                while sent < n:
                    sent += self._client.send(_VIEW[sent:n])
            except _WANT:
                pass
            except OSError as error:
                failure = error
            self.down += sent
            if sent < n:
                self._client_is_behind(bytes(_VIEW[sent:n]), failure)
        except Exception:
            self._fault()

    # What is not the hot path: waiting, ending, failing.

    def _client_may_be_read(self, events: int) -> bool:
        if events & OUT:
            self._read_wants_write = False
            self._flush_to_client()
            self._settle()
        if self._up == FLOWS:
            return True
        if events & (ERR | HUP) and not self._over:
            self._client_watch = self._park(self._cfd)
            if error := _error_of(self._client):
                self._client_takes_no_more(error)
        return False

    def _origin_may_be_read(self, events: int) -> bool:
        if events & OUT:
            self._flush_to_origin()
            self._settle()
        if self._down == FLOWS:
            return True
        if events & (ERR | HUP) and not self._over:
            self._origin_watch = self._park(self._ofd)
            if error := _error_of(self._origin):
                self._origin_takes_no_more(error)
        return False

    def _park(self, fd: int) -> int:
        """Stop watching a side that has hung up and is not to be read yet: epoll tells of ERR and HUP unasked."""
        self._readiness.unregister(fd)
        self._splices.closing(self)
        return -1

    def _origin_is_behind(self, rest: bytes, failure: OSError | None) -> None:
        if failure is not None:
            return self._origin_takes_no_more(failure)
        self._to_origin = rest
        self._up = WAITS
        self._settle()

    def _client_is_behind(self, rest: bytes, failure: OSError | None) -> None:
        if failure is not None:
            return self._client_takes_no_more(failure)
        # OpenSSL may have sent a part of what it was offered, and must be offered the same again.
        self._to_client = rest
        self._down = WAITS
        self._settle()

    def _flush_to_client(self) -> None:
        data = self._to_client
        try:
            while data:
                sent = self._client.send(data)
                self.down += sent
                data = data[sent:]
        except _WANT:
            pass
        except OSError as error:
            return self._client_takes_no_more(error)
        self._to_client = data
        if not data and self._down == WAITS:
            self._down = FLOWS
            if self.draining:
                self.on_origin(IN)

    def _flush_to_origin(self) -> None:
        data = self._to_origin
        if data:
            try:
                sent = self._origin.send(data)
            except BlockingIOError:
                return
            except OSError as error:
                return self._origin_takes_no_more(error)
            self.up += sent
            self._to_origin = data = data[sent:]
        if not data and self._up == WAITS:
            self._up = FLOWS
            if self.draining:
                self.on_client(IN)

    def _why_client_ended(self, error: OSError) -> str:
        """Why `error` ends what the client sends, or "" when it does not."""
        if isinstance(error, ssl.SSLWantWriteError):
            self._read_wants_write = True
            self._settle()
            return ""
        # OpenSSL's word for the end when our own close_notify has been sent.
        return CLOSED if isinstance(error, ssl.SSLZeroReturnError) else _why(error)

    def _client_ended(self, why: str) -> None:
        if why == TRUNCATED and self._client_failure is not None:
            # The write that failed took the socket's error with it: without one, a reset reads as an end.
            why = RESET
        self._blame("client", why)
        self._client_has_ended = why == CLOSED and not self.draining
        if why != CLOSED:
            # Reset, or a FIN without close_notify, after which OpenSSL writes nothing more.
            self._to_client = b""
            self._down = ENDED
            self._aborting = why != TRUNCATED
        self._up = ENDS
        self._settle()

    def _origin_ended(self, why: str) -> None:
        if self._origin_failure is not None and not self.draining:
            why = _why(self._origin_failure)  # as above
        self._blame("origin", why)
        if why != CLOSED:
            self._to_origin = b""
            self._up = ENDED
            self._aborting = True
        self._down = ENDS
        self._settle()

    def _client_takes_no_more(self, error: OSError) -> None:
        """A write to the client failed: what it sent before is still delivered, and then shows why."""
        self._client_failure = error
        self._to_client = self._notify = b""
        self._down = ENDED
        self._aborting |= self._up == ENDED
        self._settle()

    def _origin_takes_no_more(self, error: OSError) -> None:
        self._origin_failure = error
        self._to_origin = b""
        self._up = ENDED
        self._aborting |= self._down == ENDED
        self._settle()

    def _settle(self) -> None:
        """Pass on the ends that are due, finish if that was all, and watch for what each direction needs now."""
        if self._over:
            return
        if self._up == ENDS and not self._to_origin:
            self._pass_end_to_origin()
        if self._down == ENDS and not self._to_client:
            self._pass_end_to_client()
        if self._up == self._down == ENDED:
            return self._finish(self._reset if self._aborting else self._linger)
        if self._up >= ENDS or self._down >= ENDS:
            self._splices.closing(self)
        writes = self._to_client or self._read_wants_write or self._down == ENDS
        self._client_watch = self._watch(
            self._cfd, self._client_watch, (IN if self._up == FLOWS else 0) | (OUT if writes else 0), self.on_client
        )
        self._origin_watch = self._watch(
            self._ofd,
            self._origin_watch,
            (IN if self._down == FLOWS else 0) | (OUT if self._to_origin else 0),
            self.on_origin,
        )

    def _watch(self, fd: int, now: int, events: int, handler: Callable[[int], None]) -> int:
        if now < 0:  # parked
            if not events:
                return now
            self._readiness.register(fd, events, handler)
        elif now != events:
            self._readiness.modify(fd, events, handler)
        return events

    def _pass_end_to_origin(self) -> None:
        """FIN, or nothing where the tunnel is about to end with RST."""
        self._up = ENDED
        if not self._aborting:
            with contextlib.suppress(OSError):
                self._origin.shutdown(socket.SHUT_WR)

    def _pass_end_to_client(self) -> None:
        """close_notify and FIN; the client may go on sending (RFC 8446 section 6.1)."""
        if self._aborting:
            self._down = ENDED
            return
        try:
            if self._client_has_ended:
                self._client.unwrap()  # the client's close_notify has been read: this only sends
            elif not self._send_close_notify():
                return
            self._down = ENDED
            if self._up != ENDED:  # else it is closed next
                socket.socket.shutdown(self._client, socket.SHUT_WR)
        except _WANT:
            pass
        except OSError as error:
            self._client_failure = error
            self._down = ENDED

    def _send_close_notify(self) -> bool:
        """Send it without reading, for the client may be sending; whether all of it is sent."""
        if not self._notify:
            self._notify = self._splices.close_notify(self._client)
        with contextlib.suppress(BlockingIOError):
            # The record is made: it goes to the socket below the TLS.
            self._notify = self._notify[socket.socket.send(self._client, self._notify) :]
        return not self._notify

    def _blame(self, who: str, why: str) -> None:
        if not self.reason:
            self.ended_by, self.reason = who, why

    def _fault(self) -> None:
        structlog.get_logger().exception("splice failed")
        self._blame("tunnel", FAULT)
        self._finish(self._reset_now)

    @property
    def _over(self) -> bool:
        return self._client.fileno() < 0

    def _finish(self, close: Callable[[socket.socket], None]) -> None:
        if self._over:
            return
        self._up = self._down = ENDED
        self._splices.discard(self)
        if self._client_failure is not None:
            self._blame("client", RESET)
        if self._origin_failure is not None:
            self._blame("origin", RESET)
        close(self._client)
        close(self._origin)
        self._on_end(self)

    def _linger(self, sock: socket.socket) -> None:
        """Close one of the sockets after both directions have ended well."""
        if self.draining or self._client_failure or self._origin_failure or self.reason == TRUNCATED:
            # It may have input that nobody has read.
            self._readiness.unregister(sock.fileno())
            self._splices.partings.linger(sock, self.close_timeout)
        else:
            self._readiness.forget(sock.fileno())
            sock.close()

    def _reset(self, sock: socket.socket) -> None:
        self._readiness.unregister(sock.fileno())
        self._splices.partings.reset(sock, self.close_timeout)

    def _reset_now(self, sock: socket.socket) -> None:
        self._readiness.unregister(sock.fileno())
        reset(sock)

    def moved(self) -> tuple[int, int, int]:
        """What changes whenever a byte gets on: what the sockets took, and what the peers acknowledged."""
        return self.up + self.down, _acknowledged(self._client), _acknowledged(self._origin)


class Splices:
    """The splices of this process, and the one sweep that ends those that do not get on.

    A sweep instead of a timer a splice: an idle tunnel costs no CPU unless it has an `idle_timeout`, and a message
    never touches a timer.
    """

    def __init__(self, partings: Partings) -> None:
        self.readiness = partings.readiness
        self.partings = partings
        self.loop = partings.loop
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

    def close_notify(self, client: ssl.SSLSocket) -> bytes:
        """The close_notify record of `client`, taken from OpenSSL without a byte being sent or read.

        ``unwrap()`` sends the record and then reads: application data that waits in the socket is lost by it, and the
        connection with it (seen: APPLICATION_DATA_AFTER_CLOSE_NOTIFY, on TLS 1.2 and 1.3). So OpenSSL's descriptor is
        for that moment one end of a socket pair, in which the record is caught and nothing is to be read.

        Raises OSError when TLS has failed.
        """
        fd = client.fileno()
        os.dup2(fd, self._spare, inheritable=False)
        os.dup2(self._trap.fileno(), fd, inheritable=False)
        try:
            client.unwrap()
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
                splice.end(IDLE)
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
