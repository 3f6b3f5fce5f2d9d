"""Move bytes both ways between a TLS client and its origin, without parsing, holding back or reordering them.

# Theory of operation

A splice has two *sides*, the client (TLS) and the origin (plain or TLS), and two *flows*, one in each direction. A side
owns its socket, the state of the flow that begins at it (`flow`), and the bytes that its socket has not taken yet
(`unsent`), which belong to the flow that ends at it:

    client.sock  -- read -->  client.flow  -- send -->  origin.sock        waiting: origin.unsent
    client.sock  <-- send --  origin.flow  <-- read --  origin.sock        waiting: client.unsent

Everything happens in `on_event`, which the readiness calls for a descriptor that is ready: read from this side, send to
the other. There is no queue, no task and no timer for each tunnel.

## What OpenSSL does

- A read returns at most one record (16 KiB of data). Python does not turn on read-ahead, so OpenSSL takes one record at
  a time from the kernel, and our buffer has room for all of it. No data is therefore hidden in OpenSSL: a descriptor
  that is not readable has nothing for us. Only reads before the splice may leave some behind, hence `start`.
- A send of several records that fills the socket raises SSLWantWriteError although some of them have been sent. The
  same bytes must be offered again; the address may differ. They count as `moved` when OpenSSL has taken them all.
- A read may have to write first (the response to a KeyUpdate, RFC 8446 section 4.6.3), and a send may have to read
  first. Until then neither of the two makes progress.
- close_notify ends one direction: after the peer's, we may still send. `unwrap()` sends ours but then reads until the
  peer's, which destroys data that is still coming; `CloseNotify` explains how we avoid that.
- After a FIN without close_notify, and after any other failure, OpenSSL sends nothing more on that connection.

## What Linux does

- Data that arrived before a RST is still returned by reads; the error comes after it. So a read is the only source of
  truth about a side: errors and hang-ups that epoll reports are left for the read to find.
- A send that fails takes the socket's error with it, and the next read finds a regular end. So a side remembers that
  error (`send_error`), and its end is then reported as a reset.
- epoll reports ERR and HUP even if they are not watched, again and again. OUT comes with both: a socket that failed,
  or whose FIN was sent, rejects every write at once.

## The states of a flow, from side A to side B

    state     meaning                                       A is read  A is watched for  B is watched for
    FLOWING   B.sock took everything                        yes        IN
    PAUSED    B.unsent is not empty, or TLS has a need      no                           OUT
    ENDING    A sends no more; B.unsent or the end itself   no                           OUT
              is still to be sent to B
    ENDED     the end was passed on, or B takes no more     no

The states only move downwards, except that PAUSED returns to FLOWING. A side whose TLS has a need (`tls_need`) is
watched for that event alone.

    state    event                                          action                                        next
    FLOWING  A is readable, B takes all of it               count it                                      FLOWING
    FLOWING  B takes a part of it, or nothing               B.unsent is the rest                          PAUSED
    FLOWING  the same, B's TLS must read first              and B.tls_need is IN, B's flow pauses too     PAUSED
    FLOWING  reading A: TLS must write first                A.tls_need is OUT                             PAUSED
    FLOWING  reading A: FIN (plain), close_notify (TLS)     A has closed                                  ENDING
    FLOWING  reading A: FIN without close_notify            A is truncated; nothing more is sent to A:    ENDING
                                                            drop A.unsent, B's flow is ENDED
    FLOWING  reading A: RST, TLS error, other error         the same, and the splice aborts               ENDING
    FLOWING  nothing to read, and the splice drains         we close it                                   ENDING
    PAUSED   B.unsent was sent, A's TLS has no need         if draining, read A until nothing is left     FLOWING
    PAUSED,  A hangs up, and is not read now                stop watching A; if it has an error, handle   same
    ENDING                                                  it as a failed send to A
    ENDING   B.unsent is empty, B's TLS has no need         send B the end (a FIN, close_notify and FIN), ENDED
                                                            if the splice does not abort
    FLOWING, A has acknowledged nothing for                 A is gone: as after RST from A, except that   ENDING
    PAUSED   `acknowledge_timeout`, with data under way     A's socket is closed without waiting
    any      a send to B fails                              drop B.unsent; B itself may be read on: what  ENDED
                                                            it sent before is delivered. If B's flow is
                                                            ENDED already, the splice aborts
    FLOWING, draining for `close_timeout`                   we close it: A did not stop sending           ENDING
    PAUSED
    both ENDED                                              close both sockets: gracefully, or with RST
                                                            once everything was delivered if aborting
    any      `abort`, `close_timeout`, a bug                close both sockets with RST now

## Invariants

1. *Order and completeness.* What A sent reaches B's socket in order, and an end is passed on only after all of it.
   Bytes are dropped only towards a side to which a send, or whose connection, has failed.
2. *Bounded memory.* A is read only while its flow is FLOWING, so nothing is added to an `unsent` that is not empty. It
   holds at most TURN bytes, or what the splice began with. All splices share one read buffer: a handler sends what it
   read, or copies it, before it returns.
3. *Half-close.* An end is passed on while the other flow continues. A truncation is passed on as one, as a FIN without
   close_notify; a reset is passed on as RST, behind everything that came before it.
4. *No spinning.* Readiness is level-triggered, so a side is only ever watched for what will be acted on; a side that
   hung up and is not read now is not watched at all.
5. *No stalling.* Whatever changes a flow, `unsent` or `tls_need` calls `advance`, which passes on what is due and
   adjusts what is watched. A message that is taken whole changes none of them and costs no ``epoll_ctl``.
6. *Ending.* `close_timeout` runs from the moment a flow is ENDING, a paused side hangs up, or the splice drains. It
   restarts with each byte that a socket takes or a peer acknowledges. A drain delivers what has arrived by then, and
   reads on for at most `close_timeout` if a side does not stop sending.
7. *Once.* `ended_by` and `reason` name the first event that ended a flow or drained the splice; `abort` overrides them
   unless that was the tunnel's own decision. `on_end` is called once, after both sockets are closed or handed over to
   `ClosingSockets`; the splice has no sides any more then.

The hot path is `on_event` up to the successful send, written out once for a plain side and once for a TLS side: a
call costs as much as a check. In it, FLOWING must be 0.
"""

import asyncio
import contextlib
import os
import socket
import ssl
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Final

from tlstunnel.journal.events import EndedBy, Event, Reason
from tlstunnel.journal.logger import structlog
from tlstunnel.sockets.closing import ClosingSockets, reset
from tlstunnel.sockets.readiness import EDGE_TRIGGERED, ERR, HUP, IN, OUT
from tlstunnel.tls.close_notify import CloseNotify
from tlstunnel.tls.truncation import is_truncation

RECORD: Final = 16_384
"""Bytes of data that one TLS record carries at most (RFC 8446 section 5.1), and so one ``SSLSocket.recv_into``."""

TURN: Final = 262_144
"""Bytes that are read from one side at one wake-up at most: no tunnel starves the others."""


class Flow(IntEnum):
    """The state of what one side sends, on its way to the other. See the table above."""

    FLOWING = 0
    PAUSED = 1
    ENDING = 2
    ENDED = 3


# Globals: an attribute of the enum is slower.
FLOWING, PAUSED, ENDING, ENDED = Flow

# One buffer for all tunnels: a handler sends what it reads, or copies it, before the next handler runs.
_BUFFER = bytearray(TURN)
_VIEW = memoryview(_BUFFER)

_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_NOT_WATCHED = -1
# Of struct tcp_info (linux/tcp.h): tcpi_bytes_acked; and tcpi_probes, tcpi_unacked, tcpi_last_ack_recv.
_BYTES_ACKED = struct.Struct("@120xQ")
_UNDER_WAY = struct.Struct("@3xB20xI28xI")

SWEEP_AT_ONCE = 256
"""Tunnels whose acknowledgements are checked before others get a turn: less than a millisecond."""


class _Side:
    """One of the two sockets, the state of the flow that begins at it, and what is still to be sent to it.

    `moved` counts the bytes of its flow that the other side's socket took. `unsent` is what its own socket has not
    taken yet. `tls_need` is IN or OUT if TLS must read or write before anything else can happen here. `end` says how
    its peer ended what it sends, and is empty if we ended it. `send_error` is why it takes no more.
    """

    __slots__ = ("_sink", "_splice", "_watched_for", "end", "flow", "moved", "send_error", "sock", "tls_need", "unsent")

    def __init__(self, splice: "Splice", sock: socket.socket, sink: socket.socket, unsent: bytes) -> None:
        self._splice = splice
        self._sink = sink  # the other side's socket
        self.sock = sock
        self.unsent = unsent
        self.flow = FLOWING
        self.moved = 0
        self.end = ""
        self.send_error: OSError | None = None
        self.tls_need = 0
        self._watched_for = EDGE_TRIGGERED  # as the channel registered it

    def on_event(self, events: int) -> None:
        """Read what has come from this side and send it to the other."""
        raise NotImplementedError

    # Outside the hot path: pausing, ending, failing.

    @property
    def _other(self) -> "_Side":
        splice = self._splice
        return splice.origin if splice.client is self else splice.client

    def has_decrypted_data(self) -> bool:
        """Return whether data waits that no readiness announces."""
        return False

    def _handle_other_events(self, events: int) -> bool:
        """Handle everything but IN on a side that flows. Return whether it is to be read now."""
        splice = self._splice
        if events & (self.tls_need or OUT):
            self.tls_need = 0
            self.flush()
            splice.advance()
        if self.flow == FLOWING:
            return True
        if events & (ERR | HUP) and not splice.closed:
            # It hung up and is not to be read yet; epoll would report that again and again.
            splice.splices.readiness.unregister(self.sock.fileno())
            self._watched_for = _NOT_WATCHED
            splice.splices.start_close_timeout(splice)
            if error := _take_error(self.sock):
                self._fail_sending(error)
        return False

    def _pause(self, rest: bytes, error: OSError) -> None:
        """Handle that the other side's socket did not take `rest` of what came from this one."""
        other = self._other
        if not isinstance(error, _WOULD_BLOCK):
            return other._fail_sending(error)
        # OpenSSL may have sent a part of what it was offered, and must be offered the same again.
        other.unsent = rest
        self.flow = PAUSED
        if isinstance(error, ssl.SSLWantReadError):
            other._wait_for_tls(IN)
        self._splice.advance()

    def _wait_for_tls(self, need: int) -> None:
        """Wait for `need` alone: readiness for anything else would be reported forever without being of use."""
        self.tls_need = need
        if self.flow == FLOWING:
            self.flow = PAUSED

    def flush(self) -> None:
        """Send as much of what is unsent as the socket takes, and resume the flows that waited for that."""
        other = self._other
        if self.unsent:
            rest = memoryview(self.unsent)
            try:
                while rest:
                    sent = self.sock.send(rest)
                    other.moved += sent
                    rest = rest[sent:]
            except ssl.SSLWantReadError:
                self._wait_for_tls(IN)
            except _WOULD_BLOCK:
                pass
            except OSError as error:
                return self._fail_sending(error)
            self.unsent = bytes(rest)
        if self.flow == PAUSED and not other.unsent and not self.tls_need:
            self._resume()
        if other.flow == PAUSED and not self.unsent and not other.tls_need:
            other._resume()

    def _resume(self) -> None:
        self.flow = FLOWING
        if self._splice.draining_since:
            self._splice.splices.loop.call_soon(self.read_until_empty)

    def read_until_empty(self) -> None:
        """Read turn by turn, if it flows, until nothing is left: while the splice drains, that ends the flow.

        Readiness does not report that nothing is left.
        """
        if self.flow == FLOWING:
            self.on_event(IN)
        if self.flow == FLOWING:
            self._splice.splices.loop.call_soon(self.read_until_empty)

    def end_flow(self, reason: str) -> None:
        """End what this side sends. CLOSED: the peer meant it, or we end it; any other reason is a failure."""
        splice = self._splice
        if splice.closed:
            return
        splice.set_reason(self, reason)
        if reason != Reason.CLOSED:
            # A reset, or a FIN without close_notify: nothing more can be sent to this side.
            self.unsent = b""
            self._other.flow = ENDED
            splice.aborting |= reason != Reason.TRUNCATED
        if reason != Reason.CLOSED or not splice.draining_since:
            self.end = reason
        self.flow = ENDING
        splice.advance()

    def _fail_sending(self, error: OSError) -> None:
        """Handle that a send to this side failed. What it sent before is still delivered; its end then shows why."""
        other = self._other
        self.send_error = error
        self.unsent = b""
        other.flow = ENDED
        self.tls_need = 0
        if self.flow == PAUSED and not other.unsent:
            self.flow = FLOWING
        self._splice.aborting |= self.flow == ENDED
        self._splice.advance()

    def send_end(self) -> bool:
        """Send the end of the other side's flow; this side may continue to send. Return whether all of it is sent."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        return True

    def update_watch(self) -> None:
        """Watch the descriptor for exactly what can be acted on now."""
        events = self.tls_need
        if not events:
            sends = self.unsent or self._other.flow == ENDING
            events = (IN if self.flow == FLOWING else 0) | (OUT if sends else 0)
        if self._watched_for == _NOT_WATCHED:
            if not events:
                return
            self._splice.splices.readiness.register(self.sock.fileno(), events, self.on_event)
        elif self._watched_for != events:
            self._splice.splices.readiness.modify(self.sock.fileno(), events, self.on_event)
        self._watched_for = events


class _PlainSide(_Side):
    """A side without TLS. Its end is a FIN."""

    __slots__ = ()

    def on_event(self, events: int) -> None:
        """Read what has come from this side and send it to the other."""
        try:
            if (self.flow or events != IN) and not self._handle_other_events(events):
                return
            try:
                n = self.sock.recv_into(_BUFFER)
            except BlockingIOError:
                if self._splice.draining_since:
                    self.end_flow(Reason.CLOSED)
                return
            except OSError as error:
                return self._end_flow_after_read(_reason_of(error))
            if not n:
                return self._end_flow_after_read(Reason.CLOSED)
            sent, failure = 0, None
            try:
                while sent < n:
                    sent += self._sink.send(_VIEW[sent:n])
            except OSError as error:
                failure = error
            self.moved += sent
            if failure is not None:
                self._pause(bytes(_VIEW[sent:n]), failure)
        except Exception:
            self._splice.fail()

    def _end_flow_after_read(self, reason: str) -> None:
        if self.send_error is not None and not self._splice.draining_since:
            # The failed send took the socket's error with it: without it, a reset reads as a regular end.
            reason = _reason_of(self.send_error)
        self.end_flow(reason)


class _TlsSide(_Side):
    """A side with TLS. Its end is close_notify; a FIN without it is a truncation (RFC 8446 section 6.1)."""

    __slots__ = ("_close_notify",)
    sock: ssl.SSLSocket

    def __init__(self, splice: "Splice", sock: ssl.SSLSocket, sink: socket.socket, unsent: bytes) -> None:
        super().__init__(splice, sock, sink, unsent)
        self._close_notify = b""  # what the socket has not taken of the record

    def on_event(self, events: int) -> None:  # noqa: C901 - the hot path in one frame: a call costs what a check does
        """Read what has come from this side and send it to the other."""
        try:
            if (self.flow or events != IN) and not self._handle_other_events(events):
                return
            n, end = 0, ""
            try:
                n = k = self.sock.recv_into(_BUFFER, RECORD)
                while k and n <= TURN - RECORD and (k == RECORD or self.sock.pending()):
                    k = self.sock.recv_into(_VIEW[n:], RECORD)
                    n += k
                if not k:
                    end = Reason.CLOSED
            except ssl.SSLWantReadError:
                if self._splice.draining_since:
                    end = Reason.CLOSED
            except OSError as error:
                end = self._interpret_read_error(error)
            if n:
                sent, failure = 0, None
                try:
                    while sent < n:
                        sent += self._sink.send(_VIEW[sent:n])
                except OSError as error:
                    failure = error
                self.moved += sent
                if failure is not None:
                    self._pause(bytes(_VIEW[sent:n]), failure)
            if end:
                self.end_flow(end)
        except Exception:
            self._splice.fail()

    def _interpret_read_error(self, error: OSError) -> str:
        """Return why `error` ends what this side sends, or "" if it does not."""
        if isinstance(error, ssl.SSLWantWriteError):
            self._wait_for_tls(OUT)
            self._splice.advance()
            return ""
        if isinstance(error, ssl.SSLZeroReturnError):
            return Reason.CLOSED  # what OpenSSL raises at the end when our own close_notify has been sent
        reason = _reason_of(error)
        # The failed send took the socket's error with it: without it, a reset reads as a truncation, or as EPIPE when
        # OpenSSL 3.5 tries to send an alert about that.
        hidden = self.send_error is not None and reason in {Reason.TRUNCATED, Reason.CLOSED}
        return Reason.RESET if hidden else reason

    def has_decrypted_data(self) -> bool:
        """Return whether OpenSSL has decrypted data that has not been read yet."""
        return bool(self.sock.pending())

    def send_end(self) -> bool:
        """Send close_notify and FIN; after a truncation nothing: closing the socket sends a FIN alone."""
        try:
            if self._other.end == Reason.TRUNCATED:
                return True
            if self.end == Reason.CLOSED and not self._close_notify:
                self.sock.unwrap()  # the peer's close_notify has been read: this only sends
            elif not self._send_close_notify():
                return False
            if self.flow != ENDED:  # else it is closed next
                self._splice.splices.close_notify.shut_down_below(self.sock)
        except _WOULD_BLOCK:
            return False
        except OSError as error:
            self.send_error = error
        return True

    def _send_close_notify(self) -> bool:
        """Send it without reading, since the peer may still be sending. Return whether all of it is sent."""
        close_notify = self._splice.splices.close_notify
        if not self._close_notify:
            self._close_notify = close_notify.take_record(self.sock)
        with contextlib.suppress(BlockingIOError):
            self._close_notify = self._close_notify[close_notify.send_below(self.sock, self._close_notify) :]
        return not self._close_notify


class Splice:
    """Two connected non-blocking sockets, spliced until both flows have ended.

    `client` is a TLS socket, `origin` a plain or a TLS one. Both must be registered with the readiness of `splices`.
    `to_client` and `to_origin` are sent first: the 101, whose head has `head` bytes, and what came after either head.
    `close_timeout` and `idle_timeout` (None: no limit) are seconds without progress, `acknowledge_timeout` those in
    which a peer acknowledges none of the data under way to it. `site` is the name of the site that the tunnel belongs
    to. `on_end` is called once, when `ended_by` and `reason` are final and both sockets are
    closed or being closed.
    """

    __slots__ = (
        "_on_end",
        "aborting",
        "acknowledge_timeout",
        "client",
        "close_timeout",
        "draining_since",
        "ended_by",
        "idle_timeout",
        "last_progress",
        "last_progress_at",
        "origin",
        "reason",
        "site",
        "splices",
    )

    def __init__(  # noqa: PLR0913 - two sides, what they begin with, their limits, and the callback
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
        acknowledge_timeout: float,
        site: str,
        on_end: "Callable[[Splice], None]",
    ) -> None:
        self.splices = splices
        self.client: _Side = _TlsSide(self, client, origin, to_client)
        self.origin: _Side = (
            _TlsSide(self, origin, client, to_origin)
            if isinstance(origin, ssl.SSLSocket)
            else _PlainSide(self, origin, client, to_origin)
        )
        if to_origin:
            self.client.flow = PAUSED
        if to_client:
            self.origin.flow = PAUSED
        self.origin.moved = -head
        self._on_end: Callable[[Splice], None] | None = on_end
        self.close_timeout, self.idle_timeout = close_timeout, idle_timeout
        self.acknowledge_timeout = acknowledge_timeout
        self.site = site
        self.last_progress: tuple[int, int, int] | None = None  # as `progress` returned it at the last sweep
        self.last_progress_at = 0.0
        self.ended_by = self.reason = ""
        self.aborting = False
        self.draining_since = 0.0  # of the loop's time; 0 if it does not drain

    @property
    def up(self) -> int:
        """Bytes from the client that the origin's socket took, without the request's head."""
        return self.client.moved

    @property
    def down(self) -> int:
        """Bytes from the origin that the client's socket took, without the head of the 101."""
        return self.origin.moved

    @property
    def closed(self) -> bool:
        """Whether both sockets are closed or being closed; it has no sides any more then."""
        return self._on_end is None

    def start(self) -> None:
        """Replace the handlers of both descriptors, and begin."""
        self.splices.add(self)
        sides = self.client, self.origin
        try:
            for side in sides:
                if not self.closed:
                    side.flush()
            self.advance()
            for side in sides:
                if side.flow == FLOWING and side.has_decrypted_data():
                    side.on_event(IN)
        except Exception:
            self.fail()

    def drain(self, reason: str) -> None:
        """End the tunnel from our side, once everything that both sides have sent until now is delivered."""
        if not self.closed and not self.draining_since:
            self.set_reason(None, reason)
            self.draining_since = self.splices.loop.time()
            self.splices.start_close_timeout(self)
            for side in (self.client, self.origin):
                side.read_until_empty()

    def stop_reading(self) -> None:
        """End both flows although a side is still sending, long after `drain`."""
        if not self.closed:
            for side in (self.client, self.origin):
                if side.flow < ENDING:
                    side.end_flow(Reason.CLOSED)

    def abort(self, reason: str) -> None:
        """End the tunnel at once, with RST to both sides; what was still to be delivered is discarded."""
        if not self.closed:
            if self.ended_by != EndedBy.TUNNEL:
                self.ended_by, self.reason = EndedBy.TUNNEL, reason
            self._close(self._reset)

    def advance(self) -> None:
        """Pass on the ends that are due; then close if both flows have ended, else watch for what is needed next."""
        if self.closed:
            return
        client, origin = self.client, self.origin
        for side, sink in ((client, origin), (origin, client)):
            # If the tunnel is about to end with RST, that is the end.
            if side.flow == ENDING and not sink.unsent and not sink.tls_need and (self.aborting or sink.send_end()):
                side.flow = ENDED
        if client.flow == origin.flow == ENDED:
            return self._close(self._reset_after_delivery if self.aborting else self._close_gracefully)
        if client.flow >= ENDING or origin.flow >= ENDING:
            self.splices.start_close_timeout(self)
        client.update_watch()
        origin.update_watch()

    def set_reason(self, side: _Side | None, reason: str) -> None:
        """Set who ended the tunnel (None: the tunnel itself) and why, unless that is known already."""
        if not self.reason:
            self.ended_by = (
                EndedBy.TUNNEL if side is None else EndedBy.CLIENT if side is self.client else EndedBy.ORIGIN
            )
            self.reason = reason

    def fail(self) -> None:
        """End the tunnel because of a bug: the exception that is being handled."""
        structlog.get_logger().exception(Event.SPLICE_FAILED)
        if not self.closed:
            self.set_reason(None, Reason.INTERNAL_ERROR)
            self._close(self._reset)

    def progress(self) -> tuple[int, int, int]:
        """Return what changes with every byte that moves: what the sockets took and the peers acknowledged."""
        if self.closed:
            return 0, 0, 0
        return self.up + self.down, _acknowledged(self.client.sock), _acknowledged(self.origin.sock)

    def _close(self, close: Callable[[socket.socket], None]) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is None:
            return
        sides = self.client, self.origin
        self.splices.discard(self)
        for side in sides:
            side.flow = ENDED
            if side.send_error is not None:
                self.set_reason(side, Reason.RESET)
        for side in sides:
            # No delivery is waited for at a peer that is gone.
            (self._reset if side.end == Reason.NO_ACKNOWLEDGEMENT else close)(side.sock)
        on_end(self)
        # They refer to the splice, and it to them: without this, only the garbage collector would free the tunnel.
        del self.client, self.origin

    def _close_gracefully(self, sock: socket.socket) -> None:
        """Close `sock`; gracefully if it may have unread input, for which a plain close sends RST."""
        if self.draining_since or any(
            side.send_error or side.end == Reason.TRUNCATED for side in (self.client, self.origin)
        ):
            self.splices.readiness.unregister(sock.fileno())
            self.splices.closing_sockets.close_gracefully(sock, self.close_timeout)
        else:
            self.splices.readiness.forget(sock.fileno())
            sock.close()

    def _reset_after_delivery(self, sock: socket.socket) -> None:
        self.splices.readiness.unregister(sock.fileno())
        self.splices.closing_sockets.reset_after_delivery(sock, self.close_timeout)

    def _reset(self, sock: socket.socket) -> None:
        self.splices.readiness.unregister(sock.fileno())
        reset(sock)


class Splices:
    """The splices of this process, and the sweeps that end those without progress or peers.

    Sweeps instead of a timer for each: a message never touches a timer, and an idle tunnel costs some 3 us each 30 s,
    for the question whether its peers acknowledge what is under way to them.
    """

    def __init__(self, closing_sockets: ClosingSockets) -> None:
        self.readiness = closing_sockets.readiness
        self.closing_sockets = closing_sockets
        self.loop = closing_sockets.loop
        self.close_notify = CloseNotify()
        self.all: dict[Splice, None] = {}  # oldest first
        self._closing: set[Splice] = set()  # those with a running close_timeout
        self._with_idle_timeout: set[Splice] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._unacknowledged: dict[_Side, float] = {}  # since when data has been seen under way to it
        self._acknowledgement_timer: asyncio.TimerHandle | None = None

    def add(self, splice: Splice) -> None:
        """Add a splice that begins."""
        self.all[splice] = None
        if splice.idle_timeout is not None:
            self._with_idle_timeout.add(splice)
            splice.last_progress_at = self.loop.time()
            self._sweep_within(splice.idle_timeout)
        self._check_acknowledgements_within(splice.acknowledge_timeout)

    def discard(self, splice: Splice) -> None:
        """Remove a splice that has ended."""
        self.all.pop(splice, None)
        self._closing.discard(splice)
        self._with_idle_timeout.discard(splice)
        for side in (splice.client, splice.origin):
            self._unacknowledged.pop(side, None)

    def start_close_timeout(self, splice: Splice) -> None:
        """Abort `splice` when it makes no progress for its `close_timeout`. Does nothing if that runs already."""
        if splice not in self._closing:
            self._closing.add(splice)
            splice.last_progress, splice.last_progress_at = None, self.loop.time()
            self._sweep_within(splice.close_timeout)

    def close(self) -> None:
        """Release what the splices share. None may be running."""
        for timer in (self._timer, self._acknowledgement_timer):
            if timer is not None:
                timer.cancel()
        self.close_notify.close()

    def _call_within(
        self, timeout: float, longest: float, timer: asyncio.TimerHandle | None, call: Callable[[], None]
    ) -> asyncio.TimerHandle:
        """Return a timer for `call` that is soon enough for `timeout`: after a quarter of it, 50 ms to `longest`.

        That is `timer` if it is due by then; otherwise it is cancelled.
        """
        when = self.loop.time() + min(max(timeout / 4, 0.05), longest)
        if timer is not None:
            if timer.when() <= when:
                return timer
            timer.cancel()
        return self.loop.call_at(when, call)

    def _sweep_within(self, timeout: float) -> None:
        self._timer = self._call_within(timeout, 5.0, self._timer, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        now = self.loop.time()
        for splice in self._closing | self._with_idle_timeout:
            closing = splice in self._closing
            if splice.draining_since and now - splice.draining_since >= splice.close_timeout:
                splice.stop_reading()
            progress = splice.progress()
            if progress != splice.last_progress:
                splice.last_progress, splice.last_progress_at = progress, now
            elif closing and now - splice.last_progress_at >= splice.close_timeout:
                splice.abort(Reason.CLOSE_TIMEOUT)
            elif (
                not closing and splice.idle_timeout is not None and now - splice.last_progress_at >= splice.idle_timeout
            ):
                splice.drain(Reason.IDLE_TIMEOUT)
        if self._closing:
            self._sweep_within(min(splice.close_timeout for splice in self._closing))
        if self._with_idle_timeout:
            self._sweep_within(min(splice.idle_timeout or 0.0 for splice in self._with_idle_timeout))

    def _check_acknowledgements_within(self, timeout: float) -> None:
        self._acknowledgement_timer = self._call_within(
            timeout, 30.0, self._acknowledgement_timer, self._check_acknowledgements
        )

    def _check_acknowledgements(self) -> None:
        if self.all:
            self._check_part(list(self.all), 0)
        else:
            self._acknowledgement_timer = None

    def _check_part(self, splices: "list[Splice]", begin: int) -> None:
        now = self.loop.time()
        for splice in splices[begin : begin + SWEEP_AT_ONCE]:
            if splice.closed:
                continue
            try:
                gone = [side for side in (splice.client, splice.origin) if self._is_gone(side, splice, now)]
                if gone:
                    gone[0].end_flow(Reason.NO_ACKNOWLEDGEMENT)
            except Exception:
                splice.fail()
        begin += SWEEP_AT_ONCE
        if begin < len(splices):
            # Until the last part, so that no other sweep begins.
            self._acknowledgement_timer = self.loop.call_later(0, self._check_part, splices, begin)
            return
        self._acknowledgement_timer = None
        if self.all:
            self._check_acknowledgements_within(min(splice.acknowledge_timeout for splice in self.all))

    def _is_gone(self, side: _Side, splice: Splice, now: float) -> bool:
        """Return whether the peer of a side is gone. If it has ended what it sends, `close_timeout` decides instead."""
        silent = _seconds_without_acknowledgement(side.sock) if side.flow < ENDING else None
        if silent is None:
            self._unacknowledged.pop(side, None)
            return False
        # Before there was data under way, there was nothing to acknowledge.
        return min(silent, now - self._unacknowledged.setdefault(side, now)) >= splice.acknowledge_timeout


def _take_error(sock: socket.socket) -> OSError | None:
    """Return the error of a socket that hung up, which clears it; None if it has just ended."""
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return OSError(code, os.strerror(code)) if code else None


def _reason_of(error: OSError) -> str:
    """Return the reason that the record gives for `error`."""
    if is_truncation(error):
        return Reason.TRUNCATED
    if isinstance(error, ssl.SSLEOFError):
        return Reason.RESET
    if isinstance(error, ssl.SSLError):
        return f"{Reason.TLS_ERROR}: {error.reason or error.strerror or 'unknown'}"
    if isinstance(error, BrokenPipeError):
        # The side had ended before it refused more: Linux then says EPIPE, not ECONNRESET.
        return Reason.CLOSED
    if isinstance(error, ConnectionResetError):
        return Reason.RESET
    return f"{Reason.SOCKET_ERROR}: {error.strerror or error}"


def _seconds_without_acknowledgement(sock: socket.socket) -> float | None:
    """Return how long the peer of `sock` has acknowledged nothing; None if nothing is under way to it.

    With a closed window, the kernel sends probes at growing intervals of up to 2 minutes: nothing is under way between
    an acknowledged one and the next. None for a Unix socket.
    """
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _UNDER_WAY.size)
        probes, unacknowledged, milliseconds = _UNDER_WAY.unpack(info)
    except (OSError, struct.error):
        return None
    return milliseconds / 1000 if unacknowledged or probes else None


def _acknowledged(sock: socket.socket) -> int:
    """Return how many bytes the peer of `sock` has acknowledged; 0 for a Unix socket or a closed one."""
    try:
        return int(_BYTES_ACKED.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size))[0])
    except (OSError, struct.error):
        return 0
