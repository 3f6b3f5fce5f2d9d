"""Move bytes both ways between a TLS client and its origin, without parsing, holding back or reordering them.

# Theory of operation

A splice has two *sides*, the client (TLS) and the origin (plain or TLS), and two *flows*, one in each direction. A side
owns its socket, its TLS stream if it has one, the state of the flow that begins at it (`flow`), and the bytes that its
socket has not taken yet (`unsent`, ciphertext if it has TLS), which belong to the flow that ends at it:

    client.sock  -- receive -->  client.flow  -- send -->  origin.sock        waiting: origin.unsent
    client.sock  <-- send --  origin.flow  <-- receive --  origin.sock        waiting: client.unsent

Everything happens in `on_event`, which the readiness calls for a descriptor that is ready: receive from this side,
decrypt, encrypt, send to the other. There is no queue, no task and no timer for each tunnel.

## What a TLS stream does

- It never touches the socket, and never waits: what it is given is decrypted at once, and what it returns is to be
  sent (`tls.stream`).
- Ciphertext that a socket has not taken must be sent before any other, because records are numbered: it is `unsent`.
  The bytes in it count as moved when the socket has taken all of it.
- Receiving may produce records for the peer (the response to a KeyUpdate, RFC 8446 section 4.6.3). They are sent at
  once if the socket takes them, else before the next data. The stream bounds them.
- close_notify ends one direction: after the peer's, we may still send, and after ours, receive.
- It encrypts nothing while it has a part of a message of the TLS handshake (half a KeyUpdate): the data is `held` until
  the rest has come. Nobody but an attacker sends such messages in parts.

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
    PAUSED    B.unsent or B.held is not empty               no                           OUT, if B.unsent
    ENDING    A sends no more; B.unsent or the end itself   no                           OUT
              is still to be sent to B
    ENDED     the end was passed on, or B takes no more     no

The states only move downwards, except that PAUSED returns to FLOWING.

    state    event                                          action                                        next
    FLOWING  A is readable, B takes all of it               count it                                      FLOWING
    FLOWING  B takes a part of it, or nothing               B.unsent is the rest                          PAUSED
    FLOWING  B's TLS encrypts nothing now                   B.held is the data                            PAUSED
    FLOWING  reading A: records for A's peer                send A what it takes, keep the rest           FLOWING
    any      reading A: A's TLS encrypts again              encrypt A.held, send it: B's flow as PAUSED   same
    FLOWING  reading A: FIN (plain), close_notify (TLS)     A has closed                                  ENDING
    FLOWING  reading A: FIN without close_notify            A is truncated; nothing more is sent to A:    ENDING
                                                            drop A.unsent, B's flow is ENDED
    FLOWING  reading A: RST, TLS error, other error         the same, and the splice aborts               ENDING
    FLOWING  nothing to read, and the splice drains         we close it                                   ENDING
    PAUSED   B.unsent was sent, B.held is empty             if draining, read A until nothing is left     FLOWING
    PAUSED,  A hangs up, and is not read now                stop watching A; if it has an error, handle   same
    ENDING                                                  it as a failed send to A
    ENDING   B.unsent and B.held are empty                  send B the end (a FIN, close_notify and FIN), ENDED
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
   and `held` hold at most one TURN and the record that TLS had a part of before, what encryption adds, and what TLS
   itself sends (`MAX_OUTPUT`); or what the splice began with. All splices share their buffers: a handler sends what it
   read, or copies it, before it returns.
3. *Half-close.* An end is passed on while the other flow continues. A truncation is passed on as one, as a FIN without
   close_notify; a reset is passed on as RST, behind everything that came before it.
4. *No spinning.* Readiness is level-triggered, so a side is only ever watched for what will be acted on; a side that
   hung up and is not read now is not watched at all.
5. *No stalling.* Whatever changes a flow or `unsent` calls `advance`, which passes on what is due and adjusts what is
   watched. A message that is taken whole changes none of them and costs no ``epoll_ctl``.
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
import math
import os
import socket
import ssl
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Final, NamedTuple

from tlstunnel.journal.events import EndedBy, Event, Reason
from tlstunnel.journal.logger import structlog
from tlstunnel.sockets.closing import ClosingSockets, reset
from tlstunnel.sockets.readiness import EDGE_TRIGGERED, ERR, HUP, IN, OUT
from tlstunnel.tls.stream import LARGE, RECORD, TlsStream
from tlstunnel.tls.truncation import is_truncation

TURN: Final = 131_072
"""Bytes that are read from one side at one wake-up at most: no tunnel starves the others. With half of it, bulk data
took 10 to 30 % more CPU, with twice as much no less."""


class Flow(IntEnum):
    """The state of what one side sends, on its way to the other. See the table above."""

    FLOWING = 0
    PAUSED = 1
    ENDING = 2
    ENDED = 3


# Globals: an attribute of the enum is slower.
FLOWING, PAUSED, ENDING, ENDED = Flow

# For all tunnels: a handler sends what it reads, or copies it, before the next handler runs.
_RECEIVED, _PLAINTEXT = bytearray(max(TURN, LARGE)), bytearray(LARGE + RECORD)
_RECEIVED_VIEW, _PLAINTEXT_VIEW = memoryview(_RECEIVED), memoryview(_PLAINTEXT)

_NOT_WATCHED = -1
# Of struct tcp_info (linux/tcp.h): tcpi_bytes_acked; and tcpi_probes, tcpi_unacked, tcpi_last_ack_recv.
_BYTES_ACKED = struct.Struct("@120xQ")
_UNDER_WAY = struct.Struct("@3xB20xI28xI")

SWEEP_AT_ONCE = 256
"""Tunnels whose acknowledgements are checked before others get a turn: less than a millisecond."""


class Endpoint(NamedTuple):
    """One end of a tunnel: its socket, and its TLS unless it is plain."""

    sock: socket.socket
    tls: TlsStream | None = None


class _Side:
    """One of the two endpoints, the state of the flow that begins at it, and what is still to be sent to it.

    `moved` counts the bytes of its flow that the other side's socket took. `unsent` is what its own socket has not
    taken yet; with TLS, it is the ciphertext of `owed` bytes. `held` are bytes that TLS does not encrypt now. `end`
    says how its peer ended what it sends, and is empty if we ended it. `send_error` is why it takes no more.
    """

    __slots__ = (
        "_end_begun",
        "_sink",
        "_sink_tls",
        "_splice",
        "_watched_for",
        "end",
        "flow",
        "held",
        "moved",
        "owed",
        "send_error",
        "sock",
        "tls",
        "unsent",
    )

    def __init__(self, splice: "Splice", endpoint: Endpoint, sink: Endpoint) -> None:
        self._splice = splice
        self._sink, self._sink_tls = sink  # of the other side
        self.sock, self.tls = endpoint
        self.unsent = self.held = b""
        self.owed = 0
        self.flow = FLOWING
        self.moved = 0
        self.end = ""
        self.send_error: OSError | None = None
        self._end_begun = False
        self._watched_for = EDGE_TRIGGERED  # as the channel registered it

    def on_event(self, events: int) -> None:
        """Read what has come from this side and send it to the other."""
        raise NotImplementedError

    # Outside the hot path: pausing, ending, failing.

    @property
    def _other(self) -> "_Side":
        splice = self._splice
        return splice.origin if splice.client is self else splice.client

    def begin_with(self, data: bytes) -> None:
        """Let `data` be sent to this side first."""
        if data:
            self._other.flow = PAUSED
            if self.tls is None:
                self.unsent = data
            else:
                self.held = data
                self._encrypt_held(self.tls)

    def _encrypt_held(self, tls: TlsStream) -> None:
        """Encrypt what TLS did not encrypt before, if it does now."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.unsent, self.owed, self.held = tls.send(self.held), len(self.held), b""

    def handle_ended_tls(self) -> None:
        """End the flow if TLS has ended or failed, here or before the splice."""
        tls = self.tls
        if tls is not None and not self._splice.closed:
            if tls.failure is not None:
                self.end_flow(_reason_of(tls.failure))
            elif tls.ended:
                self.end_flow(Reason.CLOSED)

    def _handle_other_events(self, events: int) -> bool:
        """Handle everything but IN on a side that flows. Return whether it is to be read now."""
        splice = self._splice
        if events & OUT:
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

    def _encrypt_and_send(self, tls: TlsStream, data: memoryview, size: int) -> None:
        """Send `size` bytes of this flow to the other side, which has TLS."""
        try:
            ciphertext = tls.send(data)
        except ssl.SSLWantReadError:
            return self._hold(data)
        try:
            sent = self._sink.send(ciphertext)
        except OSError as error:
            sent = self._handle_failed_send(error)
        if sent == len(ciphertext):
            self.moved += size
        elif sent >= 0:
            self._pause(ciphertext[sent:], size)

    def _handle_failed_send(self, error: OSError) -> int:
        """Return 0 if the other side just took nothing, or -1 after handling that it takes no more."""
        if isinstance(error, BlockingIOError):
            return 0
        self._other._fail_sending(error)
        return -1

    def _pause(self, unsent: bytes, owed: int) -> None:
        """Pause until the other side has taken `unsent`, which is the ciphertext of `owed` bytes if that has TLS."""
        other = self._other
        other.unsent, other.owed = unsent, owed
        self.flow = PAUSED
        self._splice.advance()

    def _hold(self, data: memoryview) -> None:
        """Pause until the other side's TLS encrypts `data`."""
        self._other.held = bytes(data)
        self.flow = PAUSED
        self._splice.advance()

    def flush(self) -> None:
        """Send as much of what is unsent as the socket takes, and resume the flow that waited for that."""
        other = self._other
        if self.unsent:
            try:
                sent = self.sock.send(self.unsent)
            except BlockingIOError:
                return
            except OSError as error:
                return self._fail_sending(error)
            self.unsent = self.unsent[sent:]
            if self.tls is None:
                other.moved += sent
            elif not self.unsent:
                other.moved += self.owed
                self.owed = 0
        if other.flow == PAUSED and not self.unsent and not self.held:
            other.flow = FLOWING
            if self._splice.draining_since:
                self._splice.splices.loop.call_soon(other.read_until_empty)

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
            self.unsent = self.held = b""
            self._other.flow = ENDED
            splice.aborting |= reason != Reason.TRUNCATED
        if reason != Reason.CLOSED or not splice.draining_since:
            self.end = reason
        self.flow = ENDING
        splice.advance()

    def _end_flow_after_read(self, reason: str) -> None:
        if self.send_error is not None and not self._splice.draining_since:
            # The failed send took the socket's error with it: without it, a reset reads as an end.
            reason = _reason_of(self.send_error) if self.tls is None else Reason.RESET
        self.end_flow(reason)

    def _fail_sending(self, error: OSError) -> None:
        """Handle that a send to this side failed. What it sent before is still delivered; its end then shows why."""
        other = self._other
        self.send_error = error
        self.unsent = self.held = b""
        other.flow = ENDED
        self._splice.aborting |= self.flow == ENDED
        self._splice.advance()

    def send_end(self) -> bool:
        """Send the end of the other side's flow; this side may continue to send. Return whether all of it is sent.

        After a truncation that is nothing: closing the socket sends a FIN alone.
        """
        if self.tls is not None and self._other.end == Reason.TRUNCATED:
            return True
        try:
            if self.tls is not None and not self._end_begun:
                self._end_begun = True
                self.unsent = self.tls.close()
                # In one segment with the FIN, which follows here or when the socket is closed.
                self.unsent = self.unsent[self.sock.send(self.unsent, socket.MSG_MORE) :]
            if self.unsent:
                return False
            if self.flow != ENDED:  # else it is closed next
                self.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return False
        except OSError as error:
            self.unsent = b""
            if self.tls is not None:
                self.send_error = error
        return True

    def update_watch(self) -> None:
        """Watch the descriptor for exactly what can be acted on now."""
        sends = self.unsent or (self._other.flow == ENDING and not self.held)
        events = (IN if self.flow == FLOWING else 0) | (OUT if sends else 0)
        if self._watched_for == _NOT_WATCHED:
            if not events:
                return
            self._splice.splices.readiness.register(self.sock.fileno(), events, self.on_event)
        elif self._watched_for != events:
            self._splice.splices.readiness.modify(self.sock.fileno(), events, self.on_event)
        self._watched_for = events


class _PlainSide(_Side):
    """An origin without TLS. Its end is a FIN. The other side is the client, which has TLS."""

    __slots__ = ()
    _sink_tls: TlsStream

    def on_event(self, events: int) -> None:
        """Read what has come from this side and send it to the other."""
        try:
            if (self.flow or events != IN) and not self._handle_other_events(events):
                return
            try:
                n = self.sock.recv_into(_RECEIVED, TURN)
            except BlockingIOError:
                if self._splice.draining_since:
                    self.end_flow(Reason.CLOSED)
                return
            except OSError as error:
                return self._end_flow_after_read(_reason_of(error))
            if not n:
                return self._end_flow_after_read(Reason.CLOSED)
            # What follows is `_encrypt_and_send`.
            try:
                ciphertext = self._sink_tls.send(_RECEIVED_VIEW[:n])
            except ssl.SSLWantReadError:
                return self._hold(_RECEIVED_VIEW[:n])
            try:
                sent = self._sink.send(ciphertext)
            except OSError as error:
                sent = self._handle_failed_send(error)
            if sent == len(ciphertext):
                self.moved += n
            elif sent >= 0:
                self._pause(ciphertext[sent:], n)
        except Exception:
            self._splice.fail()


class _TlsSide(_Side):
    """A side with TLS. Its end is close_notify; a FIN without it is a truncation (RFC 8446 section 6.1)."""

    __slots__ = ()
    tls: TlsStream

    def on_event(self, events: int) -> None:  # noqa: C901, PLR0912 - in one frame: a call costs what a check does
        """Read what has come from this side and send it to the other."""
        try:
            if (self.flow or events != IN) and not self._handle_other_events(events):
                return
            tls = self.tls
            try:
                n = self.sock.recv_into(_RECEIVED, tls.limit)
            except BlockingIOError:
                if self._splice.draining_since:
                    self.end_flow(Reason.CLOSED)
                return
            except OSError as error:
                return self._end_flow_after_read(_reason_of(error))
            if not n:
                return self._end_flow_after_read(Reason.TRUNCATED)
            if n := tls.receive(_RECEIVED_VIEW[:n], _PLAINTEXT_VIEW):
                if (sink_tls := self._sink_tls) is None:
                    try:
                        sent = self._sink.send(_PLAINTEXT_VIEW[:n])
                    except OSError as error:
                        sent = self._handle_failed_send(error)
                    if sent == n:
                        self.moved += n
                    elif sent >= 0:
                        self.moved += sent
                        self._pause(bytes(_PLAINTEXT_VIEW[sent:n]), 0)
                else:
                    self._encrypt_and_send(sink_tls, _PLAINTEXT_VIEW[:n], n)
            if tls.changed or self.held:
                self._handle_tls_events(tls)
        except Exception:
            self._splice.fail()

    def _handle_tls_events(self, tls: TlsStream) -> None:
        """Handle what TLS has to say besides data."""
        splice = self._splice
        tls.changed = False
        if splice.closed:
            return
        if self.held and tls.failure is None:
            self._encrypt_held(tls)
            self.flush()
            splice.advance()
        if self._other.flow == ENDED:
            tls.output = b""  # nothing follows our close_notify, but OpenSSL still responds to a KeyUpdate
        elif tls.output and not self.unsent:
            try:
                tls.output = tls.output[self.sock.send(tls.output) :]
            except BlockingIOError:
                pass  # it is sent before the next data
            except OSError as error:
                self._fail_sending(error)
        self.handle_ended_tls()


class Splice:
    """Two connected non-blocking sockets, spliced until both flows have ended.

    `client` has TLS, `origin` may have it. Both must be registered with the readiness of `splices`.
    `to_client` and `to_origin` are sent first: the 101, whose head has `head` bytes, and what came after either head.
    `close_timeout` and `idle_timeout` (None: no limit) are seconds without progress, `acknowledge_timeout` those in
    which a peer acknowledges none of the data under way to it. `site` is the name of the site that the tunnel belongs
    to. `on_end` is called once, when `ended_by` and `reason` are final and both sockets are
    closed or being closed. `about` is what others know of the tunnel; the splice only keeps it.
    """

    __slots__ = (
        "_on_end",
        "aborting",
        "about",
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
        client: Endpoint,
        origin: Endpoint,
        *,
        to_client: bytes,
        to_origin: bytes,
        head: int,
        close_timeout: float,
        idle_timeout: float | None,
        acknowledge_timeout: float,
        site: str,
        on_end: "Callable[[Splice], None]",
        about: object = None,
    ) -> None:
        self.splices = splices
        self.client: _Side = _TlsSide(self, client, origin)
        self.origin: _Side = (_PlainSide if origin.tls is None else _TlsSide)(self, origin, client)
        self.client.begin_with(to_client)
        self.origin.begin_with(to_origin)
        self.origin.moved = -head
        self._on_end: Callable[[Splice], None] | None = on_end
        self.close_timeout, self.idle_timeout = close_timeout, idle_timeout
        self.acknowledge_timeout = acknowledge_timeout
        self.site = site
        self.about = about
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
                side.handle_ended_tls()
        except Exception:
            self.fail()

    def drain(self, reason: str, close_timeout: float = math.inf) -> None:
        """End the tunnel from our side, once everything that both sides have sent until now is delivered.

        With `close_timeout`, its own is at most that from now on.
        """
        if not self.closed and not self.draining_since:
            self.set_reason(None, reason)
            self.draining_since = self.splices.loop.time()
            anew = close_timeout < self.close_timeout
            self.close_timeout = min(close_timeout, self.close_timeout)
            self.splices.start_close_timeout(self, anew=anew)
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
            if side.flow == ENDING and not sink.unsent and not sink.held and (self.aborting or sink.send_end()):
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
        self.all: dict[Splice, None] = {}  # oldest first
        self._closing: set[Splice] = set()  # those with a running close_timeout
        self._with_idle_timeout: set[Splice] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._unacknowledged: dict[_Side, float] = {}  # since when data has been seen under way to it
        self._acknowledgement_timer: asyncio.TimerHandle | None = None
        self._acknowledgements_due = 0.0  # a time of the loop

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

    def start_close_timeout(self, splice: Splice, *, anew: bool = False) -> None:
        """Abort `splice` when it makes no progress for its `close_timeout`. Only `anew`, if that runs already."""
        if anew or splice not in self._closing:
            self._closing.add(splice)
            splice.last_progress, splice.last_progress_at = None, self.loop.time()
            self._sweep_within(splice.close_timeout)

    def close(self) -> None:
        """Release what the splices share. None may be running."""
        for timer in (self._timer, self._acknowledgement_timer):
            if timer is not None:
                timer.cancel()

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
            try:
                self._check_progress(splice, now)
            except Exception:
                splice.fail()
        if self._closing:
            self._sweep_within(min(splice.close_timeout for splice in self._closing))
        if self._with_idle_timeout:
            self._sweep_within(min(splice.idle_timeout or 0.0 for splice in self._with_idle_timeout))

    def _check_progress(self, splice: Splice, now: float) -> None:
        closing = splice in self._closing
        if splice.draining_since and now - splice.draining_since >= splice.close_timeout:
            splice.stop_reading()
        progress = splice.progress()
        if progress != splice.last_progress:
            splice.last_progress, splice.last_progress_at = progress, now
        elif closing and now - splice.last_progress_at >= splice.close_timeout:
            splice.abort(Reason.CLOSE_TIMEOUT)
        elif not closing and splice.idle_timeout is not None and now - splice.last_progress_at >= splice.idle_timeout:
            splice.drain(Reason.IDLE_TIMEOUT)

    def _check_acknowledgements_within(self, timeout: float) -> None:
        self._acknowledgement_timer = timer = self._call_within(
            timeout, 30.0, self._acknowledgement_timer, self._check_acknowledgements
        )
        self._acknowledgements_due = timer.when()

    def _check_acknowledgements(self) -> None:
        if not self.all:
            self._acknowledgement_timer = None
            return
        late = self.loop.time() - self._acknowledgements_due
        if late >= min(splice.acknowledge_timeout for splice in self.all) / 4:
            # The machine stood still, and with it the peers' acknowledgements: they get the whole time again.
            self._unacknowledged.clear()
        self._check_part(list(self.all), 0)

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
