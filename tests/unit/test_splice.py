"""The splice, driven by a script of events instead of a network.

The sockets, the readiness, the clock and TLS are fakes, as strict as what they stand for: Linux's sockets (an error is
reported once, and after the data), TLS (nothing after a failure, nothing after our own close_notify) and epoll
(level-triggered; ERR and HUP always). Each test of the first part is a row of the table in `splice.py`.
"""

import errno
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any, cast
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tlstunnel.sockets.closing import ClosingSockets
from tlstunnel.sockets.readiness import EDGE_TRIGGERED, ERR, HUP, IN, OUT, Handler, Readiness
from tlstunnel.tls.stream import LARGE, MAX_OUTPUT, RECORD, TlsStream
from tlstunnel.tunnel.splice import TURN, Endpoint, Flow, Splice, Splices

UNLIMITED = 1 << 40
UNDER_WAY = struct.Struct("@3xB20xI28xI")
CLOSE_NOTIFY = b"\xff" * 8
# Of one byte each, which the data never has.
WANTS_RESPONSE, RESPONSE, BROKEN = b"\xfe", b"\xfd", b"\xfc"
MOST_CALLS = 200  # of handlers, for one step of a script: more of them is a busy loop


class FakeSocket:
    """A connected non-blocking socket. The test is its peer: it feeds, ends, opens the window, and reads `sent`."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.incoming = bytearray()
        self.fed = bytearray()
        self.sent = bytearray()
        self.window = UNLIMITED  # bytes that it still accepts
        self.peer_ended = False
        self.error = 0
        self.broken = False  # the connection is reset
        self.has_fin = False  # ours was sent
        self.how_closed = ""
        self.probes = 0  # of a closed window, without an acknowledgement
        self.under_way = 0  # bytes that the peer has not acknowledged
        self.acknowledged_at = 0.0
        self.now: Callable[[], float] = lambda: 0.0
        self.may_be_read: Callable[[], bool] = lambda: True
        self.lingers = False

    # The peer's actions.

    def feed(self, data: bytes) -> None:
        self.incoming += data
        self.fed += data

    def end(self) -> None:
        self.peer_ended = True

    def reset(self) -> None:
        self.broken, self.error = True, errno.ECONNRESET

    # What the splice uses.

    def fileno(self) -> int:
        return self.descriptor

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        assert not self.how_closed
        assert self.may_be_read()
        if not self.incoming:
            return self.nothing_to_read()
        data = self.incoming[: nbytes or len(buffer)]
        del self.incoming[: len(data)]
        memoryview(buffer)[: len(data)] = data
        return len(data)

    def nothing_to_read(self) -> int:
        if self.error:
            raise self.taken_error()
        if self.broken or self.peer_ended:
            return 0
        raise BlockingIOError

    def taken_error(self) -> OSError:
        code, self.error = self.error, 0
        return ConnectionResetError(code, "reset")

    def send(self, data: Any, flags: int = 0) -> int:
        assert not self.how_closed
        assert not self.has_fin
        if self.broken:
            raise self.taken_error() if self.error else BrokenPipeError(errno.EPIPE, "broken pipe")
        if not self.window:
            raise BlockingIOError
        return self.take(bytes(data))

    def take(self, data: bytes) -> int:
        taken = data[: self.window]
        self.window -= len(taken)
        self.sent += taken
        return len(taken)

    def shutdown(self, how: int) -> None:
        assert how == socket.SHUT_WR
        self.has_fin = True

    def getsockopt(self, level: int, option: int, size: int = 0) -> Any:
        if option == socket.TCP_INFO and size == UNDER_WAY.size:
            return UNDER_WAY.pack(self.probes, self.under_way, int(1000 * (self.now() - self.acknowledged_at)))
        if (level, option) != (socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(errno.ENOPROTOOPT, "not a TCP socket")
        code, self.error = self.error, 0
        return code

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_LINGER)
        self.lingers = True

    def close(self) -> None:
        self.closed_by("reset" if self.lingers else "close")

    def closed_by(self, how: str) -> None:
        assert not self.how_closed
        self.how_closed = how

    # What epoll reports.

    def events(self) -> int:
        events = IN if self.incoming or self.peer_ended or self.broken else 0
        events |= OUT if self.window or self.broken or self.has_fin else 0
        events |= HUP if self.broken or (self.peer_ended and self.has_fin) else 0
        return events | (ERR if self.error else 0)


class FakePlain(FakeSocket, socket.socket):  # type: ignore[misc] # signatures of fewer types
    """A socket without TLS."""

    __repr__ = object.__repr__


class FakeTls(FakePlain):
    """A socket below TLS: `end` is close_notify, `truncate` a FIN without it. What it sends is not encrypted."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self.stream = FakeStream()
        self.truncated = False

    def end(self) -> None:
        self.peer_ended = True
        self.incoming += CLOSE_NOTIFY

    def truncate(self) -> None:
        self.peer_ended = self.truncated = True

    def ask_for_response(self) -> None:
        self.incoming += WANTS_RESPONSE

    @property
    def plaintext(self) -> bytes:
        return bytes(self.sent).replace(RESPONSE, b"").partition(CLOSE_NOTIFY[:1])[0]

    @property
    def below(self) -> bytes:
        """What was sent of our close_notify."""
        _, mark, rest = bytes(self.sent).partition(CLOSE_NOTIFY[:1])
        return mark + rest


class FakeStream(TlsStream):
    def __init__(self) -> None:
        self.output = self.surplus = b""
        self.ended = self.closed = self.changed = False
        self.failure: ssl.SSLError | None = None
        self.limit = LARGE
        self.has_half_a_message = False  # of the TLS handshake: nothing can be encrypted

    def receive(self, data: memoryview, into: memoryview) -> int:
        assert not self.ended
        assert self.failure is None
        assert len(data) <= LARGE
        content = bytes(data)
        if WANTS_RESPONSE in content:
            self.has_half_a_message = False
        if BROKEN in content:
            self.failure = ssl.SSLError(1, "[SSL] bad record mac")
            self.failure.reason = "BAD_RECORD_MAC"
            self.output += RESPONSE
            content, _, _ = content.partition(BROKEN)
        elif CLOSE_NOTIFY[:1] in content:
            self.ended = True
            content, _, _ = content.partition(CLOSE_NOTIFY[:1])
        self.output += RESPONSE * content.count(WANTS_RESPONSE)  # OpenSSL does so even after our close_notify
        content = content.replace(WANTS_RESPONSE, b"")
        self.changed |= bool(self.output or self.ended or self.failure)
        into[: len(content)] = content
        return len(content)

    def send(self, data: bytes | memoryview) -> bytes:
        assert not self.closed
        assert self.failure is None
        if self.has_half_a_message:
            raise ssl.SSLWantReadError
        ciphertext, self.output = self.output + data, b""
        return ciphertext

    def close(self) -> bytes:
        assert not self.closed
        assert self.failure is None
        self.closed = True
        assert not self.has_half_a_message
        record, self.output = self.output + CLOSE_NOTIFY, b""
        return record


def plaintext(sock: FakeSocket) -> bytes:
    """Return what the peer of `sock` got, decrypted."""
    return sock.plaintext if isinstance(sock, FakeTls) else bytes(sock.sent)


class FakeReadiness(Readiness):
    def __init__(self) -> None:
        self.watched: dict[int, int] = {}
        self.handlers: dict[int, Handler] = {}
        self.changes = 0

    def register(self, fd: int, events: int, handler: Handler) -> None:
        assert fd not in self.watched
        self.watched[fd], self.handlers[fd] = events, handler
        self.changes += 1

    def modify(self, fd: int, events: int, handler: Handler | None = None) -> None:
        assert fd in self.watched
        self.watched[fd] = events
        if handler is not None:
            self.handlers[fd] = handler
        self.changes += 1

    def unregister(self, fd: int) -> None:
        self.watched.pop(fd, None)

    forget = unregister


class FakeTimer:
    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.at, self.call, self.cancelled = when, call, False

    def when(self) -> float:
        return self.at

    def cancel(self) -> None:
        self.cancelled = True


class FakeLoop:
    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[FakeTimer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[[], None]) -> FakeTimer:
        self.timers.append(FakeTimer(when, call))
        return self.timers[-1]

    def call_later(self, delay: float, call: Callable[..., None], *args: Any) -> FakeTimer:
        return self.call_at(self.now + delay, lambda: call(*args))

    def call_soon(self, call: Callable[..., None], *args: Any) -> FakeTimer:
        return self.call_at(self.now, lambda: call(*args))

    def due(self, until: float) -> list[FakeTimer]:
        self.timers = [timer for timer in self.timers if not timer.cancelled]
        return sorted((timer for timer in self.timers if timer.at <= until), key=lambda timer: timer.at)


class FakeClosing(ClosingSockets):
    def close_gracefully(self, sock: socket.socket, timeout: float = 0, *, lingers: bool = False) -> None:
        self.closes(sock, "graceful close")

    def reset_after_delivery(self, sock: socket.socket, timeout: float) -> None:
        self.closes(sock, "reset after delivery")

    def closes(self, sock: socket.socket, how: str) -> None:
        assert sock.fileno() not in cast(FakeReadiness, self.readiness).watched
        cast(FakeSocket, sock).closed_by(how)


class Playbook:
    """A splice and its two peers. Each method is a step of the script; afterwards all pending events are handled."""

    CLOSE_TIMEOUT = 10.0
    ACKNOWLEDGE_TIMEOUT = 120.0

    def __init__(
        self,
        *,
        tls_origin: bool = False,
        to_client: bytes = b"",
        to_origin: bytes = b"",
        head: int = 0,
        idle_timeout: float | None = None,
    ) -> None:
        self.loop = FakeLoop()
        self.readiness = FakeReadiness()
        self.splices = Splices(FakeClosing(self.readiness, cast(Any, self.loop)))
        self.client = FakeTls(3)
        self.origin: FakeTls | FakePlain = FakeTls(4) if tls_origin else FakePlain(4)
        self.ends: list[Splice] = []
        self.started_with = {3: to_client, 4: to_origin}
        self.counted = 0, 0
        for sock in (self.client, self.origin):
            sock.now = self.loop.time
            self.readiness.register(sock.descriptor, EDGE_TRIGGERED, lambda _: None)
        self.splice = Splice(
            self.splices,
            Endpoint(self.client, self.client.stream),
            Endpoint(self.origin, self.origin.stream if isinstance(self.origin, FakeTls) else None),
            to_client=to_client,
            to_origin=to_origin,
            head=head,
            close_timeout=self.CLOSE_TIMEOUT,
            idle_timeout=idle_timeout,
            acknowledge_timeout=self.ACKNOWLEDGE_TIMEOUT,
            site="site",
            on_end=self._on_end,
        )
        self.client.may_be_read = lambda: self.splice.client.flow == Flow.FLOWING
        self.origin.may_be_read = lambda: self.splice.origin.flow == Flow.FLOWING

    def _on_end(self, splice: Splice) -> None:
        self.ends.append(splice)
        self.counted = splice.up, splice.down

    def start(self) -> "Playbook":
        self.splice.start()
        self.run()
        return self

    def run(self) -> None:
        """Call handlers until nothing is ready."""
        for _ in range(MOST_CALLS):
            if not self._call_one():
                return
        raise AssertionError("a busy loop")

    def _call_one(self) -> bool:
        for timer in self.loop.due(self.loop.now):
            timer.cancel()
            timer.call()
            return True
        for sock in (self.client, self.origin):
            watched = self.readiness.watched.get(sock.descriptor)
            if watched is not None and (events := sock.events() & (watched | ERR | HUP)):
                self.readiness.handlers[sock.descriptor](events)
                return True
        return False

    def pass_time(self, seconds: float) -> None:
        until = self.loop.now + seconds
        while due := self.loop.due(until):
            self.loop.now = max(due[0].at, self.loop.now)
            self.run()
        self.loop.now = until

    def ended(self) -> tuple[str, str]:
        assert self.ends == [self.splice]
        assert self.client.how_closed
        assert self.origin.how_closed
        assert not self.readiness.watched
        return self.splice.ended_by, self.splice.reason


both_origins = pytest.mark.parametrize("tls_origin", [False, True], ids=["plain origin", "TLS origin"])


# A row of the table each: FLOWING


@both_origins
def test_data_sent_at_once_changes_nothing(tls_origin: bool) -> None:
    play = Playbook(tls_origin=tls_origin).start()
    before = play.readiness.changes
    play.client.feed(b"up")
    play.origin.feed(b"down")
    play.run()
    assert plaintext(play.origin) == b"up"
    assert plaintext(play.client) == b"down"
    assert (play.splice.up, play.splice.down) == (2, 4)
    assert play.readiness.changes == before
    assert play.readiness.watched == {3: IN, 4: IN}


@both_origins
def test_a_side_is_paused_until_the_other_has_read_what_it_sent(tls_origin: bool) -> None:
    play = Playbook(tls_origin=tls_origin).start()
    play.origin.window = 3
    play.client.feed(b"abcdef")
    play.run()
    play.client.feed(b"ghi")
    play.run()
    assert plaintext(play.origin) == b"abc"
    assert play.splice.client.flow == Flow.PAUSED
    assert play.readiness.watched == {3: 0, 4: IN | OUT}
    play.origin.feed(b"the other flow goes on")
    play.run()
    assert plaintext(play.client) == b"the other flow goes on"
    play.origin.window = UNLIMITED
    play.run()
    assert plaintext(play.origin) == b"abcdefghi"
    assert play.readiness.watched == {3: IN, 4: IN}
    assert play.splice.up == 9


def test_memory_is_bounded_by_one_turn() -> None:
    play = Playbook().start()
    play.client.window = play.origin.window = 0
    for sock in (play.client, play.origin):
        sock.feed(bytes(3 * TURN))
    play.run()
    assert len(play.splice.client.unsent) <= TURN
    assert len(play.splice.origin.unsent) <= TURN
    assert len(play.client.incoming) >= 2 * TURN
    assert len(play.origin.incoming) >= 2 * TURN


def test_a_response_to_the_client_s_tls_is_sent_at_once() -> None:
    play = Playbook().start()
    before = play.readiness.changes
    play.client.ask_for_response()
    play.run()
    assert play.client.sent == RESPONSE
    assert play.readiness.changes == before


def test_a_response_that_does_not_fit_is_sent_before_the_next_data() -> None:
    play = Playbook().start()
    play.client.window = 0
    play.client.feed(b"up")
    play.client.ask_for_response()
    play.run()
    assert plaintext(play.origin) == b"up"
    assert play.splice.client.flow == Flow.FLOWING
    play.client.window = UNLIMITED
    play.origin.feed(b"down")
    play.run()
    assert play.client.sent == RESPONSE + b"down"
    assert play.readiness.watched == {3: IN, 4: IN}


@both_origins
def test_data_that_tls_does_not_encrypt_now_is_held(tls_origin: bool) -> None:
    play = Playbook(tls_origin=tls_origin).start()
    play.client.stream.has_half_a_message = True
    play.origin.feed(b"down")
    play.run()
    assert play.splice.origin.flow == Flow.PAUSED
    assert play.readiness.watched == {3: IN, 4: 0}
    play.client.feed(b"up")
    play.origin.end()
    play.run()
    assert plaintext(play.origin) == b"up"
    play.client.ask_for_response()  # which completes the message
    play.run()
    assert play.client.plaintext == b"down"
    assert play.splice.down == 4
    assert play.client.below == CLOSE_NOTIFY


@both_origins
def test_an_end_of_the_client_is_passed_on_and_the_other_flow_continues(tls_origin: bool) -> None:
    play = Playbook(tls_origin=tls_origin).start()
    play.client.feed(b"last")
    play.client.end()
    play.run()
    assert plaintext(play.origin) == b"last"
    assert play.origin.has_fin
    if isinstance(play.origin, FakeTls):
        assert play.origin.below == CLOSE_NOTIFY
    assert not play.client.has_fin
    play.origin.feed(b"return traffic")
    play.run()
    assert plaintext(play.client) == b"return traffic"
    play.origin.end()
    play.run()
    assert play.ended() == ("client", "closed")
    assert play.client.below == CLOSE_NOTIFY
    assert play.client.how_closed == play.origin.how_closed == "close"


@both_origins
def test_an_end_of_the_origin_is_passed_on_and_the_other_flow_continues(tls_origin: bool) -> None:
    play = Playbook(tls_origin=tls_origin).start()
    play.origin.feed(b"last")
    play.origin.end()
    play.run()
    assert plaintext(play.client) == b"last"
    assert play.client.below == CLOSE_NOTIFY
    assert play.client.has_fin
    play.client.feed(b"return traffic")
    play.run()
    assert plaintext(play.origin) == b"return traffic"
    play.client.end()
    play.run()
    assert play.ended() == ("origin", "closed")


def test_a_close_notify_that_does_not_fit_is_sent_in_pieces_and_once() -> None:
    play = Playbook().start()
    play.origin.end()
    play.client.window = 5
    play.run()
    assert play.client.below == CLOSE_NOTIFY[:5]
    assert not play.client.has_fin
    play.client.window = UNLIMITED
    play.run()
    assert play.client.below == CLOSE_NOTIFY
    assert play.client.has_fin


def test_a_close_notify_that_waits_is_sent_although_the_client_ends_as_well() -> None:
    play = Playbook().start()
    play.origin.end()
    play.client.window = 5
    play.run()
    play.client.end()
    play.run()
    assert not play.ends
    play.client.window = UNLIMITED
    play.run()
    assert play.client.below == CLOSE_NOTIFY
    assert play.ended() == ("origin", "closed")


@both_origins
def test_a_truncation_is_passed_on_as_one(tls_origin: bool) -> None:
    play = Playbook(tls_origin=tls_origin).start()
    play.client.feed(b"not the last")
    play.client.truncate()
    play.origin.feed(b"lost, as OpenSSL sends nothing more")
    play.run()
    assert play.ended() == ("client", "truncated")
    assert plaintext(play.origin) == b"not the last"
    # It results in a FIN without close_notify.
    assert play.origin.how_closed == play.client.how_closed == "graceful close"
    if isinstance(play.origin, FakeTls):
        assert not play.origin.stream.closed


@pytest.mark.parametrize("side", ["client", "origin"])
def test_a_reset_is_passed_on_after_the_bytes_before_it(side: str) -> None:
    play = Playbook().start()
    sender, receiver = (play.client, play.origin) if side == "client" else (play.origin, play.client)
    receiver.window = 2
    sender.feed(b"before")
    sender.reset()
    play.run()
    assert plaintext(receiver) == b"be"
    receiver.window = UNLIMITED
    play.run()
    assert plaintext(receiver) == b"before"
    assert play.ended() == (side, "reset")
    assert receiver.how_closed == sender.how_closed == "reset after delivery"
    assert not receiver.has_fin


@pytest.mark.parametrize("side", ["client", "origin"])
def test_a_reset_is_passed_on_although_a_response_to_it_failed_first(side: str) -> None:
    play = Playbook(tls_origin=True).start()
    sender, receiver = (play.client, play.origin) if side == "client" else (play.origin, play.client)
    assert isinstance(sender, FakeTls)
    sender.feed(b"before")
    sender.ask_for_response()
    sender.reset()
    play.run()
    assert plaintext(receiver) == b"before"
    assert play.ended() == (side, "reset")
    assert receiver.how_closed == sender.how_closed == "reset after delivery"


def test_a_response_is_not_sent_behind_our_close_notify() -> None:
    play = Playbook().start()
    play.origin.end()
    play.client.feed(b"up")
    play.client.ask_for_response()
    play.run()
    play.client.ask_for_response()
    play.client.truncate()
    play.run()
    assert plaintext(play.origin) == b"up"
    assert play.client.below == CLOSE_NOTIFY
    assert play.ended() == ("origin", "closed")
    assert play.origin.how_closed == "graceful close", "a truncation, and no reset"


@both_origins
def test_a_tls_error_names_the_error_and_comes_after_the_data_before_it(tls_origin: bool) -> None:
    play = Playbook(tls_origin=tls_origin).start()
    play.client.feed(b"last")
    play.client.incoming += BROKEN + b"what follows is dropped"
    play.run()
    assert play.ended() == ("client", "TLS error: BAD_RECORD_MAC")
    assert plaintext(play.origin) == b"last"
    assert play.client.sent == RESPONSE, "the alert"
    assert play.origin.how_closed == "reset after delivery"


# PAUSED and ENDING


def test_a_hang_up_of_a_paused_side_is_no_longer_watched_and_is_read_later() -> None:
    play = Playbook().start()
    play.origin.window = 0
    play.client.feed(b"first")
    play.run()
    play.client.feed(b"last")
    play.client.reset()
    play.run()
    assert play.readiness.watched == {4: OUT}
    play.origin.window = UNLIMITED
    play.run()
    assert plaintext(play.origin) == b"firstlast"
    assert play.ended() == ("client", "reset")
    assert play.origin.how_closed == "reset after delivery"


def test_an_end_waits_for_what_is_unsent() -> None:
    play = Playbook().start()
    play.origin.window = 1
    play.client.feed(b"abc")
    play.run()
    play.client.end()
    play.run()
    assert not play.origin.has_fin
    play.origin.window = 1
    play.run()
    assert not play.origin.has_fin
    play.origin.window = 1
    play.run()
    assert plaintext(play.origin) == b"abc"
    assert play.origin.has_fin


@both_origins
def test_a_side_that_accepts_no_more_is_read_to_its_end(tls_origin: bool) -> None:
    play = Playbook(tls_origin=tls_origin).start()
    play.origin.reset()
    play.readiness.watched[4] = 0  # the client's message is handled first
    play.origin.feed(b"why it ended")
    play.client.feed(b"up")
    hits = play.client.events() & IN
    play.readiness.handlers[3](hits)
    play.run()
    assert plaintext(play.client) == b"why it ended"
    assert play.ended() == ("origin", "reset")
    assert play.client.how_closed == "reset after delivery"


def test_a_failed_send_to_a_side_that_has_ended_aborts() -> None:
    play = Playbook().start()
    play.origin.end()
    play.run()
    play.origin.reset()
    play.client.feed(b"up")
    play.run()
    assert play.ended() == ("origin", "closed")
    assert play.client.how_closed == play.origin.how_closed == "reset after delivery"


# Beginning


@both_origins
def test_initial_bytes_are_sent_first(tls_origin: bool) -> None:
    play = Playbook(tls_origin=tls_origin, to_client=b"101 and more", to_origin=b"early", head=3)
    play.client.window = 5
    play.client.feed(b" later")
    play.origin.feed(b", later")
    play.start()
    assert plaintext(play.origin) == b"early later"
    assert plaintext(play.client) == b"101 a"
    play.client.window = UNLIMITED
    play.run()
    assert plaintext(play.client) == b"101 and more, later"
    assert (play.splice.up, play.splice.down) == (11, 16)


def test_an_end_that_tls_received_before_the_splice_is_passed_on() -> None:
    play = Playbook(to_origin=b"early")
    play.client.stream.ended = True
    play.start()
    assert plaintext(play.origin) == b"early"
    assert play.origin.has_fin
    play.origin.feed(b"return traffic")
    play.run()
    assert play.client.plaintext == b"return traffic"


# Ending by the tunnel


@both_origins
def test_a_drain_ends_an_idle_tunnel_at_once(tls_origin: bool) -> None:
    play = Playbook(tls_origin=tls_origin).start()
    play.splice.drain("drained")
    assert play.ended() == ("tunnel", "drained")
    assert play.client.below == CLOSE_NOTIFY
    assert play.client.how_closed == play.origin.how_closed == "graceful close"


@both_origins
def test_a_drain_delivers_what_has_arrived_and_then_ends(tls_origin: bool) -> None:
    play = Playbook(tls_origin=tls_origin).start()
    play.client.feed(b"up" * TURN)
    play.origin.feed(b"down" * TURN)
    play.splice.drain("drained")
    play.run()
    assert plaintext(play.origin) == b"up" * TURN
    assert plaintext(play.client) == b"down" * TURN
    assert play.ended() == ("tunnel", "drained")


@both_origins
def test_a_drain_waits_for_a_slow_side(tls_origin: bool) -> None:
    play = Playbook(tls_origin=tls_origin).start()
    play.origin.window = 0
    play.client.feed(b"abc")
    play.run()
    play.client.feed(b"def")
    play.splice.drain("drained")
    play.pass_time(play.CLOSE_TIMEOUT * 0.9)
    assert not play.ends
    play.origin.window = UNLIMITED
    play.run()
    assert plaintext(play.origin) == b"abcdef"
    assert play.ended() == ("tunnel", "drained")


def test_a_drain_ends_a_side_that_does_not_stop_sending() -> None:
    play = Playbook().start()
    play.origin.window = 0
    play.client.feed(b"x")
    play.run()
    play.splice.drain("drained")
    for _ in range(30):
        play.client.feed(b"x")
        play.origin.window = 1
        play.pass_time(0.5)
    assert play.splice.reason == "drained"
    play.origin.window = UNLIMITED
    play.run()
    assert play.ended() == ("tunnel", "drained")
    assert play.client.incoming, "it was no longer read"


def test_an_abort_resets_both_now() -> None:
    play = Playbook().start()
    play.origin.window = 0
    play.client.feed(b"lost")
    play.run()
    play.splice.abort("stopped")
    assert play.ended() == ("tunnel", "stopped")
    assert play.client.how_closed == play.origin.how_closed == "reset"
    play.splice.abort("again")
    play.splice.drain("again")
    assert play.ended() == ("tunnel", "stopped")


def test_the_first_reason_stays() -> None:
    play = Playbook().start()
    play.origin.window = 0
    play.client.feed(b"abc")
    play.run()
    play.splice.drain("max age")
    play.splice.drain("stopped")
    play.client.reset()
    play.origin.window = UNLIMITED
    play.run()
    assert play.ended() == ("tunnel", "max age")


# Time


def test_a_half_closed_tunnel_without_progress_is_aborted() -> None:
    play = Playbook().start()
    play.client.end()
    play.run()
    play.pass_time(play.CLOSE_TIMEOUT - 1)
    assert not play.ends
    play.origin.feed(b"progress")
    play.run()
    play.pass_time(play.CLOSE_TIMEOUT - 1)
    assert not play.ends
    play.pass_time(play.CLOSE_TIMEOUT)
    assert play.ended() == ("tunnel", "close timeout")
    assert play.client.how_closed == play.origin.how_closed == "reset"


def test_an_idle_tunnel_is_drained() -> None:
    play = Playbook(idle_timeout=60).start()
    play.pass_time(50)
    play.client.feed(b"up")
    play.run()
    play.pass_time(55)
    assert not play.ends
    play.pass_time(20)
    assert play.ended() == ("tunnel", "idle timeout")


def test_a_message_sets_no_timer() -> None:
    play = Playbook().start()
    timers = list(play.loop.timers)
    play.client.feed(b"up")
    play.run()
    assert play.loop.timers == timers


@pytest.mark.parametrize("what", ["under_way", "probes"])
@pytest.mark.parametrize("side", ["client", "origin"])
def test_a_peer_that_acknowledges_nothing_is_gone(side: str, what: str) -> None:
    play = Playbook().start()
    play.pass_time(10_000)  # idle: there was nothing to acknowledge
    setattr(getattr(play, side), what, 5)
    play.pass_time(play.ACKNOWLEDGE_TIMEOUT - 1)
    assert not play.ends
    play.pass_time(play.ACKNOWLEDGE_TIMEOUT / 2)
    assert play.ended() == (side, "no acknowledgement")
    assert getattr(play, side).how_closed == "reset"
    assert getattr(play, "origin" if side == "client" else "client").how_closed == "reset after delivery"


def test_peers_are_kept_when_the_machine_stood_still() -> None:
    play = Playbook().start()
    play.client.under_way = 5
    play.pass_time(30)
    play.loop.now += 10 * play.ACKNOWLEDGE_TIMEOUT  # no timer ran, and no acknowledgement came
    play.pass_time(1)
    assert not play.ends
    play.pass_time(1.5 * play.ACKNOWLEDGE_TIMEOUT)
    assert play.ended() == ("client", "no acknowledgement")


def test_a_peer_that_only_acknowledges_is_kept() -> None:
    """It is alive and reads nothing: its window is closed, and its system acknowledges each probe."""
    play = Playbook().start()
    play.client.window = 0
    play.origin.feed(b"down")
    play.run()
    for _ in range(100):
        play.client.probes = 1
        play.pass_time(1)
        play.client.probes, play.client.acknowledged_at = 0, play.loop.now
        play.pass_time(2 * play.ACKNOWLEDGE_TIMEOUT)
    assert not play.ends
    play.client.window = UNLIMITED
    play.run()
    assert plaintext(play.client) == b"down"


def test_the_acknowledgements_of_many_tunnels_are_checked_in_turns() -> None:
    plays = [Playbook() for _ in range(3)]
    splices = plays[0].splices
    with patch("tlstunnel.tunnel.splice.SWEEP_AT_ONCE", 1):
        for play in plays:
            play.splice.splices, play.loop = splices, plays[0].loop
            for sock in (play.client, play.origin):
                sock.now = play.loop.time
            splices.readiness = play.readiness
            play.splice.start()
            play.client.under_way = 1
        splices.closing_sockets.closes = lambda sock, how: sock.closed_by(how)  # type: ignore[attr-defined]
        plays[0].pass_time(2 * Playbook.ACKNOWLEDGE_TIMEOUT)
    assert [play.splice.reason for play in plays] == ["no acknowledgement"] * 3
    assert not splices.all


# Bugs


@pytest.mark.parametrize("side", ["client", "origin"])
def test_a_bug_ends_its_own_tunnel(side: str) -> None:
    play = Playbook().start()
    sock = play.client if side == "client" else play.origin

    def fail(*_: Any) -> int:
        raise RuntimeError("a bug")

    sock.recv_into = fail  # type: ignore[method-assign, assignment]
    sock.feed(b"x")
    with capture_logs() as logs:
        play.run()
    assert play.ended() == ("tunnel", "internal error")
    assert [line["event"] for line in logs] == ["splice failed"]
    assert play.client.how_closed == play.origin.how_closed == "reset"


def test_a_bug_in_a_sweep_ends_its_own_tunnel() -> None:
    play = Playbook().start()
    play.client.window = 0
    play.origin.feed(b"down")
    play.run()
    play.splice.drain("drained")
    with capture_logs() as logs, patch.object(Splice, "stop_reading", side_effect=RuntimeError("a bug")):
        play.pass_time(play.CLOSE_TIMEOUT)
    assert play.ended() == ("tunnel", "drained")
    assert [line["event"] for line in logs] == ["splice failed"]
    assert play.client.how_closed == play.origin.how_closed == "reset"


# Any script

SIDES = st.sampled_from(["client", "origin"])
SIZES = st.sampled_from([1, 7, 100, RECORD, RECORD + 1, TURN, TURN + 5])
ORDERLY = st.one_of(
    st.tuples(st.just("feed"), SIDES, SIZES),
    st.tuples(st.just("window"), SIDES, st.sampled_from([0, 1, 50, RECORD, UNLIMITED])),
    st.tuples(st.just("end"), SIDES, st.just(0)),
    st.tuples(st.just("ask for a response"), SIDES, st.just(0)),
)
ANY = st.one_of(
    ORDERLY,
    st.tuples(st.sampled_from(["truncate", "reset"]), SIDES, st.just(0)),
    st.tuples(st.sampled_from(["drain", "abort"]), SIDES, st.just(0)),
    st.tuples(st.just("pass time"), SIDES, st.sampled_from([1, 6, 20])),
)
STARTS = st.fixed_dictionaries(
    {
        "tls_origin": st.booleans(),
        "to_client": st.sampled_from([b"", b"101"]),
        "to_origin": st.sampled_from([b"", b"e"]),
    }
)

_numbered = bytes(range(251)) * 2100


def _do(play: Playbook, step: tuple[str, str, int]) -> None:
    """Do one step, if it is possible now."""
    what, side, number = step
    sock = play.client if side == "client" else play.origin
    gone = sock.peer_ended or sock.broken
    match what:
        case "feed" if not gone:
            at = len(sock.fed) % 251
            sock.feed(_numbered[at : at + number])
        case "window":
            sock.window = number
        case "end" if not gone:
            sock.end()
        case "reset":
            sock.reset()
        case "truncate" if isinstance(sock, FakeTls) and not gone:
            sock.truncate()
        case "ask for a response" if isinstance(sock, FakeTls) and not gone:
            sock.ask_for_response()
        case "drain":
            play.splice.drain("drained")
        case "abort":
            play.splice.abort("stopped")
        case "pass time":
            play.pass_time(number)
    play.run()
    _check(play)


def _check(play: Playbook) -> None:
    """Check what must hold at every moment."""
    for sock, other in ((play.client, play.origin), (play.origin, play.client)):
        assert (play.started_with[sock.descriptor] + other.fed).startswith(plaintext(sock)), "in order and complete"
    assert len(play.ends) <= 1
    assert play.splice.reason != "internal error", "a fake was used in a way that it does not allow"
    assert play.splice.closed == bool(play.ends)
    if not play.ends:
        assert len(play.splice.client.unsent) <= TURN + MAX_OUTPUT
        assert len(play.splice.origin.unsent) <= TURN + MAX_OUTPUT
        assert play.splice in play.splices.all


def _open_up(play: Playbook) -> None:
    """Let both peers read everything."""
    for sock in (play.client, play.origin):
        sock.window = UNLIMITED
    play.run()


@given(STARTS, st.lists(ORDERLY, max_size=25))
@example(  # two responses wait for the same room as a whole turn
    {"tls_origin": False, "to_client": b"", "to_origin": b""},
    [
        ("window", "client", 0),
        ("ask for a response", "client", 0),
        ("ask for a response", "client", 0),
        ("feed", "origin", TURN),
    ],
)
@example(  # our close_notify waits for room when the peer's is read
    {"tls_origin": True, "to_client": b"", "to_origin": b""},
    [("window", "origin", 0), ("end", "client", 0), ("end", "origin", 0)],
)
def test_an_orderly_script_loses_no_byte(start: dict[str, Any], script: list[tuple[str, str, int]]) -> None:
    play = Playbook(**start).start()
    for step in script:
        _do(play, step)
    _open_up(play)
    for sock in (play.client, play.origin):
        sock.end()
    play.run()
    _open_up(play)
    assert plaintext(play.origin) == start["to_origin"] + play.client.fed
    assert plaintext(play.client) == start["to_client"] + play.origin.fed
    assert play.ended()[1] == "closed"
    assert play.client.how_closed == play.origin.how_closed == "close"
    assert play.client.below == CLOSE_NOTIFY
    assert play.counted == (len(plaintext(play.origin)), len(plaintext(play.client)))


@given(STARTS, st.lists(ANY, max_size=25))
def test_any_script_ends_once_and_never_spins(start: dict[str, Any], script: list[tuple[str, str, int]]) -> None:
    play = Playbook(**start).start()
    for step in script:
        _do(play, step)
    play.splice.drain("drained")
    play.pass_time(10 * play.CLOSE_TIMEOUT)
    _check(play)
    play.ended()
    assert not play.splices.all
