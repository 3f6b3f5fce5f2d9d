"""The splice with real sockets and real TLS, compared with a model of what its peers must receive.

One thread runs the loop and is both peers of each splice: a script says what they do, and how often the loop turns in
between. Nothing waits for a moment of time. `test_splice.py` does the same with fakes, which show each transition;
this shows that Linux and OpenSSL are as the fakes say.

The model knows what a peer's kernel has taken, and what the splice's kernel has acknowledged. Everything that was taken
before an orderly end must arrive, and everything that was acknowledged before a failure. As soon as two failures meet,
the order in which they are noticed decides, so that only the weaker rules apply: each peer receives a part of what the
other has sent, from its beginning and in order.
"""

import asyncio
import contextlib
import functools
import os
import random
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tests.harness import TIMEOUT, Certificate
from tests.promises.both_ends import unacknowledged_bytes
from tests.promises.secure import Sealing, server_context
from tests.promises.test_key_update import DATA, HANDSHAKE, KEY_UPDATE
from tlstunnel.sockets.closing import ClosingSockets, reset
from tlstunnel.sockets.readiness import EDGE_TRIGGERED, IN, RDHUP, Handler, Readiness, TunnelLoop
from tlstunnel.tls import stream
from tlstunnel.tls.policy import apply_to_client_context, apply_to_server_context
from tlstunnel.tls.stream import MAX_OUTPUT, RECORD, TlsStream
from tlstunnel.tunnel.splice import TURN, Endpoint, Flow, Splice, Splices

ALERT = 21
CLOSE_NOTIFY = b"\x01\x00"
SEGMENT = 4000
"""Of loopback's 64 KiB, one does not fit into a small buffer, and the rest of a window is offered only after 200 ms."""
SMALL_BUFFER = 16384
FRUITLESS = 50
"""Calls of a handler that move nothing and change nothing, for one connection: a busy loop has hundreds.

Those that discard the input of a closing socket are among them.
"""
MOST = 2 << 20
"""Bytes that a peer sends in one script; then it writes no more."""
PAIR = stream._local.pair
"""What all connections of this thread share."""


@functools.cache
def content_of(number: int, side: str) -> bytes:
    """Return what a peer sends. No two peers send the same."""
    return random.Random(f"{number} {side}").randbytes(MOST)


class Peer:
    """A peer without TLS: what it has sent, what it has received, and how that has ended."""

    tls = False

    def __init__(self, sock: socket.socket, content: bytes) -> None:
        self.sock = sock
        self.content = content
        self.written = 0  # bytes of plaintext
        self.backlog = bytearray()  # what its own kernel has not taken yet
        self.taken = 0
        self.received = bytearray()
        self.ends = self.sends_fin = self.has_fin = self.failed = False
        self.fails_to_send = ""
        self.notified = self.alerted = False  # by close_notify, by another alert
        self.end = ""  # "FIN" or "RST", as it sees it

    # What it does.

    def write(self, size: int) -> None:
        data = self.content[self.written : self.written + size]
        self.encrypt(data)
        self.written += len(data)
        self.flush()

    def encrypt(self, data: bytes) -> None:
        self.backlog += data

    def flush(self) -> None:
        """Send what the kernel takes, and FIN behind the last byte."""
        try:
            while self.backlog:
                sent = self.sock.send(self.backlog)
                self.taken += sent
                del self.backlog[:sent]
            if self.sends_fin and not self.has_fin:
                self.has_fin = True
                self.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError as error:
            # This takes the error of the socket with it: then it reads as if there had been a FIN.
            self.fails_to_send = self.fails_to_send or type(error).__name__
            self.backlog.clear()

    def end_orderly(self, *, fin: bool) -> None:
        self.ends = True
        self.sends_fin = True
        self.flush()

    def truncate(self) -> None:
        """Send FIN without close_notify, perhaps in the middle of a record."""
        self.failed = True
        self.backlog.clear()
        self.sends_fin = True
        self.flush()

    def reset(self) -> None:
        self.failed = True
        reset(self.sock)

    def send_key_update(self) -> None:
        pass

    def read(self, size: int) -> bool:
        """Read once; return whether there was anything."""
        try:
            data = self.sock.recv(size)
        except BlockingIOError:
            return False
        except OSError:
            self.end = self.end or "RST"
            return False
        if data:
            self.take(data)
        else:
            self.end = self.end or ("RST" if self.fails_to_send == "ConnectionResetError" else "FIN")
        return bool(data)

    def take(self, data: bytes) -> None:
        self.received += data

    # What the model says.

    def plaintext_of(self, taken: int) -> int:
        """Return of how many bytes the first `taken` ones on the wire are the whole."""
        return taken

    @property
    def complete(self) -> int:
        """Bytes that the splice gets, unless the connection is reset."""
        return self.plaintext_of(self.taken)

    @property
    def arrived(self) -> int:
        """Bytes that have arrived at the splice."""
        return self.plaintext_of(max(0, self.taken - unacknowledged_bytes(self.sock)))

    @property
    def end_has_arrived(self) -> bool:
        return self.ends and not self.backlog and not unacknowledged_bytes(self.sock)


class Bios(NamedTuple):
    """The BIOs of a peer, which are its own."""

    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO


class TlsPeer(Peer):
    """A peer with TLS. With `sealing`, it does not send what OpenSSL seals."""

    tls = True

    def __init__(self, sock: socket.socket, content: bytes, tls: ssl.SSLObject, bios: Bios) -> None:
        super().__init__(sock, content)
        self.object = tls
        self.incoming, self.outgoing = bios
        self.sealing: Sealing | None = None
        self.marks = [(0, 0)]  # after each record: bytes on the wire, bytes of plaintext
        self.offer(self.outgoing.read())

    def offer(self, records: bytes) -> None:
        self.backlog += records

    def encrypt(self, data: bytes) -> None:
        size = self.written
        for begin in range(0, len(data), RECORD):
            part = data[begin : begin + RECORD]
            if self.sealing is not None:
                self.offer(self.sealing.record(part, DATA))
            else:
                self.object.write(part)
                self.offer(self.outgoing.read())
            size += len(part)
            self.marks.append((self.taken + len(self.backlog), size))

    def end_orderly(self, *, fin: bool) -> None:
        if not self.ends:
            self.ends = True
            if self.sealing is not None:
                self.offer(self.sealing.record(CLOSE_NOTIFY, ALERT))
            else:
                with contextlib.suppress(ssl.SSLWantReadError):
                    self.object.unwrap()
                self.offer(self.outgoing.read())
        self.sends_fin |= fin
        self.flush()

    def send_garbage(self) -> None:
        self.failed = True
        self.offer(b"\x17\x03\x03\x00\x20" + bytes(32))
        self.flush()

    def send_key_update(self) -> None:
        if self.sealing is not None:
            self.offer(self.sealing.record(KEY_UPDATE, HANDSHAKE))
            self.sealing.next_secret()
            self.flush()

    def take(self, data: bytes) -> None:
        assert not self.notified, "bytes behind close_notify"
        self.incoming.write(data)
        try:
            while some := self.object.read(RECORD):
                self.received += some
            self.notified = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.notified = True
        except ssl.SSLError:
            self.alerted = True

    def plaintext_of(self, taken: int) -> int:
        return next(size for wire, size in reversed(self.marks) if wire <= taken)


class Ours(socket.socket):
    """A socket of the splice: it counts the calls that do something."""

    readiness: "Watched"

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        size = super().recv_into(buffer, nbytes, flags)
        self.readiness.deeds += 1
        return size

    def send(self, data: Any, flags: int = 0) -> int:
        size = super().send(data, flags)
        self.readiness.deeds += 1
        return size


class Watched(Readiness):
    """The readiness of `World`, which checks the world after each call of a handler."""

    __slots__ = ("deeds", "fruitless", "world")

    def __init__(self, world: "World") -> None:
        self.world = world
        self.deeds = self.fruitless = 0

    def register(self, fd: int, events: int, handler: Handler) -> None:
        self.deeds += 1
        self.world.loop.readiness.register(fd, events, self._checked(handler))

    def modify(self, fd: int, events: int, handler: Handler | None = None) -> None:
        self.deeds += 1
        self.world.loop.readiness.modify(fd, events, None if handler is None else self._checked(handler))

    def unregister(self, fd: int) -> None:
        self.deeds += 1
        self.world.loop.readiness.unregister(fd)
        # By then, the socket has left what it was part of.
        self.world.loop.call_soon(self.world.stop_if_done)

    def forget(self, fd: int) -> None:
        self.deeds += 1
        self.world.loop.readiness.forget(fd)

    def _checked(self, handler: Handler) -> Handler:
        def call(events: int) -> None:
            before = self.deeds
            handler(events)
            self.fruitless += self.deeds == before
            self.world.check()

        return call


class Step(NamedTuple):
    """A step of a script."""

    which: int  # of the connections
    what: str
    side: str
    size: int
    turns: int  # of the loop, afterwards


class Shape(NamedTuple):
    """How a connection is made."""

    version: str  # "1.2", "1.3", or "sealed": 1.3, and the client can send a KeyUpdate
    tls_origin: bool
    to_client: int
    to_origin: int
    our_buffers: bool  # small ones
    peers_buffers: bool


class Contexts:
    """The contexts of both peers and of the tunnel."""

    def __init__(self, certificate: Certificate, folder: Path) -> None:
        self.server, self.to_origin = (
            ssl.SSLContext(kind) for kind in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT)
        )
        apply_to_server_context(self.server)
        apply_to_client_context(self.to_origin)
        self.server.load_cert_chain(certificate.cert, certificate.key)
        self.origin = server_context(certificate)
        self.clients = {name: ssl.create_default_context(cafile=certificate.ca) for name in ("1.2", "1.3", "sealed")}
        self.clients["1.2"].maximum_version = ssl.TLSVersion.TLSv1_2
        self.to_origin.load_verify_locations(certificate.ca)
        for context in (*self.clients.values(), self.origin):
            context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
        keys = folder / "keys"
        keys.touch()
        self.clients["sealed"].keylog_filename = str(keys)
        self._keys = keys.open()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)

    def close(self) -> None:
        self.listener.close()
        self._keys.close()
        self.clients["sealed"].keylog_filename = os.devnull

    def sockets(self, shape: Shape, readiness: Watched) -> tuple[Ours, socket.socket]:
        """Return the tunnel's and the peer's end of a connection."""
        theirs = socket.socket()
        theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
        if shape.peers_buffers:
            _make_buffers_small(theirs)
        theirs.connect(self.listener.getsockname())
        accepted, _ = self.listener.accept()
        ours = Ours(fileno=accepted.detach())
        ours.readiness = readiness
        if shape.our_buffers:
            _make_buffers_small(ours)
        for sock in (ours, theirs):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return ours, theirs

    def client(self, shape: Shape, sock: socket.socket, content: bytes) -> tuple[TlsStream, TlsPeer]:
        ours = TlsStream(self.server)
        bios = Bios(ssl.MemoryBIO(), ssl.MemoryBIO())
        tls = self.clients[shape.version].wrap_bio(bios.incoming, bios.outgoing, server_hostname="localhost")
        _shake_hands(ours, tls, bios, client=True)
        peer = TlsPeer(sock, content, tls, bios)
        if shape.version == "sealed":
            label = "CLIENT_TRAFFIC_SECRET_0"
            line = next(line for line in self._keys.read().splitlines() if line.startswith(label))
            peer.sealing = Sealing(ours.cipher, bytes.fromhex(line.split()[2]), 0)
        return ours, peer

    def tls_origin(self, sock: socket.socket, content: bytes) -> tuple[TlsStream, TlsPeer]:
        ours = TlsStream(self.to_origin, server_hostname="localhost")
        bios = Bios(ssl.MemoryBIO(), ssl.MemoryBIO())
        tls = self.origin.wrap_bio(bios.incoming, bios.outgoing, server_side=True)
        _shake_hands(ours, tls, bios, client=False)
        return ours, TlsPeer(sock, content, tls, bios)


def _make_buffers_small(sock: socket.socket) -> None:
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SMALL_BUFFER)


def _shake_hands(ours: TlsStream, tls: ssl.SSLObject, bios: Bios, *, client: bool) -> None:
    """Make the TLS handshake. What may be sent with the first data stays where it is: session tickets."""
    incoming, outgoing = bios
    complete = peer_complete = False
    if not client:
        ours.handshake(b"")
    while not (complete and peer_complete):
        if not (complete and client and ours.version == "TLSv1.3"):
            incoming.write(ours.output)
            ours.output = b""
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
            peer_complete = True
        if not complete:
            complete = ours.handshake(outgoing.read())


class Connection:
    """A splice, its peers, and what must become of them."""

    def __init__(self, world: "World", shape: Shape, number: int) -> None:
        self.world = world
        self.shape = shape
        self.early = content_of(number, "early")[: shape.to_origin]
        self.head = content_of(number, "101")[: shape.to_client]
        contexts = world.contexts
        client, theirs = contexts.sockets(shape, world.readiness)
        tls, self.client = contexts.client(shape, theirs, content_of(number, "client"))
        origin, theirs = contexts.sockets(shape, world.readiness)
        to_origin: TlsStream | None = None
        self.origin: Peer
        if shape.tls_origin:
            to_origin, self.origin = contexts.tls_origin(theirs, content_of(number, "origin"))
        else:
            self.origin = Peer(theirs, content_of(number, "origin"))
        self.peers = self.client, self.origin
        for sock in (client, origin):
            world.readiness.register(sock.fileno(), EDGE_TRIGGERED | IN | RDHUP, lambda _: None)
        self.failures: list[str] = []
        self.arrived: dict[Peer, int] = {}  # before the first failure
        self.ended_before: set[Peer] = set()
        self.end_has_arrived = False
        self.ended: set[Peer] = set()  # by the script
        self.counted = 0, 0
        self.times_ended = 0
        self.splice = Splice(
            world.splices,
            Endpoint(client, tls),
            Endpoint(origin, to_origin),
            to_client=self.head,
            to_origin=self.early,
            head=len(self.head),
            close_timeout=10 * TIMEOUT,
            idle_timeout=None,
            acknowledge_timeout=10 * TIMEOUT,
            site="site",
            on_end=self._on_end,
        )
        self.splice.start()
        for peer in self.peers:
            peer.flush()

    def _on_end(self, splice: Splice) -> None:
        self.times_ended += 1
        self.counted = splice.up, splice.down
        if self.world.finishing:
            for peer in self.peers:
                if peer.sock.fileno() >= 0:
                    self.world.loop.call_soon(self._pump, peer)

    def do(self, what: str, side: str, number: int) -> None:
        """Do one step, if it is possible now."""
        peer = self.client if side == "client" else self.origin
        if what in {"drain", "abort"}:
            if not self.splice.closed:
                self._fail(what)
                getattr(self.splice, what)("by the script")
            return
        if peer.sock.fileno() < 0:
            return
        peer.flush()
        match what:
            case "read":
                peer.read(number)
            case "write" if not (peer.ends or peer.failed):
                peer.write(number)
            case "key update" if not (peer.ends or peer.failed):
                peer.send_key_update()
            case "end" if not peer.failed:
                peer.end_orderly(fin=True)
            case "close_notify" if not peer.failed:
                peer.end_orderly(fin=False)
            case "truncate" if peer.tls and not (peer.ends or peer.failed):
                self._fail(what, peer)
                peer.truncate()
            case "garbage" if isinstance(peer, TlsPeer) and not (peer.ends or peer.failed):
                self._fail(what, peer)
                peer.send_garbage()
            case "reset" if not (peer.failed and peer.sends_fin):
                self._fail(what, peer)
                peer.reset()

    def settle(self) -> None:
        """Let everything arrive that the peers have sent."""
        for _ in range(1000):
            for peer in self.peers:
                peer.flush()
                while peer.read(65_536):
                    pass
            down, up = (len(peer.received) for peer in self.peers)
            if (down, up) == (len(self.head) + self.origin.written, len(self.early) + self.client.written):
                return
            self.world.turn(1)
        raise AssertionError("a tunnel has stalled")

    def _fail(self, what: str, peer: Peer | None = None) -> None:
        if not self.failures:
            self.arrived = {peer: peer.arrived for peer in self.peers}
            self.ended_before = {peer for peer in self.peers if peer.ends}
            self.end_has_arrived = peer is not None and peer.end_has_arrived
        self.failures.append(what if peer is None else f"{'client' if peer is self.client else 'origin'}: {what}")

    # The end of the script: both peers read all that comes.

    def finish(self) -> None:
        self.ended = {peer for peer in self.peers if peer.ends}
        for peer in self.peers:
            if peer.sock.fileno() >= 0:
                if not self.failures:
                    peer.end_orderly(fin=True)
                self.world.loop.add_reader(peer.sock, self._pump, peer)
                self.world.loop.add_writer(peer.sock, self._pump, peer)

    def _pump(self, peer: Peer) -> None:
        if peer.sock.fileno() < 0:
            return
        loop = self.world.loop
        while peer.read(65_536):
            pass
        if peer.end == "FIN" and peer.notified == peer.tls and not peer.failed and self.splice.closed:
            # After a drain, both ends are sent without it. So it waits for both.
            peer.end_orderly(fin=True)
        peer.flush()
        if not peer.backlog:
            loop.remove_writer(peer.sock)
        if peer.end:
            loop.remove_reader(peer.sock)
            # After a reset or a truncation, the splice reads no more.
            done = (peer.ends or peer.failed) and not peer.backlog
            if done or peer.end == "RST" or peer.notified != peer.tls:
                loop.remove_writer(peer.sock)
                peer.sock.close()
                self.world.stop_if_done()

    @property
    def done(self) -> bool:
        return self.splice.closed and all(peer.sock.fileno() < 0 for peer in self.peers)

    # What must hold.

    def check(self) -> None:
        """Check what holds at every moment."""
        assert self.times_ended == self.splice.closed
        if not self.splice.closed:
            for side, first in ((self.splice.client, self.head), (self.splice.origin, self.early)):
                # What a record's first part has left within TLS comes with the rest of it.
                assert len(side.unsent) <= max(TURN + RECORD, len(first)) + MAX_OUTPUT
                assert side.flow != Flow.PAUSED or side._other.unsent

    def check_end(self) -> None:
        assert self.times_ended == 1
        for peer, sender, first in ((self.client, self.origin, self.head), (self.origin, self.client, self.early)):
            size = len(peer.received)
            assert peer.received == (first + sender.content[:size])[:size]
            assert size <= len(first) + sender.complete
        if not self.failures:
            self._check_orderly_end()
        elif len(self.failures) == 1:
            self._check_failure()

    def _check_orderly_end(self) -> None:
        for peer in self.peers:
            assert not peer.fails_to_send
            assert (peer.end, peer.notified) == ("FIN", peer.tls)
        up, down = self.early, self.head
        assert len(self.origin.received) == len(up) + self.client.written
        assert len(self.client.received) == len(down) + self.origin.written
        assert self.counted == (len(self.origin.received), len(self.client.received) - len(down))
        assert self.splice.ended_by in {"client", "origin"}
        assert self.splice.reason == "closed"

    def _check_failure(self) -> None:
        """Check what each peer has received after the only failure, and what it sees at the end."""
        side, _, what = self.failures[0].rpartition(": ")
        if not side:
            return self._check_own_end(what)
        failing, other = self.peers if side == "client" else self.peers[::-1]
        first = self.early if other is self.origin else self.head
        size = len(other.received) - len(first)
        if what == "reset":
            assert size >= self.arrived[failing]
            if failing not in self.ended_before:
                assert (other.end, other.notified) == ("RST", False)
            elif self.end_has_arrived:
                assert size == failing.written
                assert (other.end, other.notified) == ("FIN", other.tls)
        else:
            assert size == failing.complete
            assert not other.notified
            assert other.end == ("FIN" if what == "truncate" else "RST")
            # What waited to be sent to it is dropped, and so may be the other's end.
            assert failing.end == ("FIN" if what == "truncate" or failing.notified else "RST") or other in self.ended
            assert not failing.notified or other in self.ended
        reasons = {"reset": "reset", "truncate": "truncated", "garbage": "TLS error"}
        if not self.ended:
            assert self.splice.ended_by == side
            assert self.splice.reason.startswith(reasons[what])

    def _check_own_end(self, what: str) -> None:
        for peer, sender, first in ((self.client, self.origin, self.head), (self.origin, self.client, self.early)):
            if what == "drain":
                assert len(peer.received) >= len(first) + self.arrived[sender]
                assert (peer.end, peer.notified) == ("FIN", peer.tls)
            elif sender not in self.ended_before:
                assert (peer.end, peer.notified) == ("RST", False)
        if what == "abort" or not self.ended_before:
            assert (self.splice.ended_by, self.splice.reason) == ("tunnel", "by the script")


class World:
    """A loop with splices."""

    def __init__(self, contexts: Contexts) -> None:
        self.contexts = contexts
        self.loop = TunnelLoop()
        self.loop.set_exception_handler(self._on_exception)
        self.readiness = Watched(self)
        self.splices = Splices(ClosingSockets(self.readiness, self.loop))
        self.connections: list[Connection] = []
        self.problems: list[BaseException] = []
        self.finishing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for splice in list(self.splices.all):
            splice.abort("test ended")
        self.splices.closing_sockets.reset_all()
        self.splices.close()
        for connection in self.connections:
            for peer in connection.peers:
                peer.sock.close()
        self.loop.close()

    def _on_exception(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.problems.append(context.get("exception") or AssertionError(context["message"]))
        self.loop.stop()

    def connect(self, shape: Shape) -> Connection:
        self.connections.append(Connection(self, shape, len(self.connections)))
        self.check()
        return self.connections[-1]

    def turn(self, times: int) -> None:
        """Let the loop handle what is ready."""
        for _ in range(times):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()
        self.check()
        self.raise_problems()

    def check(self) -> None:
        """Check what holds at every moment. A failure is raised later: the readiness would log it."""
        try:
            assert not PAIR.incoming.pending
            assert not PAIR.outgoing.pending
            for connection in self.connections:
                connection.check()
        except AssertionError as error:
            self.problems.append(error)

    def raise_problems(self) -> None:
        for problem in self.problems:
            raise problem

    def finish(self) -> None:
        """Let the peers read everything, until all sockets are closed."""
        self.finishing = True
        for connection in self.connections:
            connection.finish()
        timer = self.loop.call_later(TIMEOUT, self.loop.stop)
        self.loop.call_soon(self.stop_if_done)
        self.loop.run_forever()
        timer.cancel()
        self.raise_problems()
        assert self._done, "a tunnel has stalled"
        assert not self.splices.all
        assert self.readiness.fruitless <= FRUITLESS * len(self.connections)
        for connection in self.connections:
            connection.check_end()

    @property
    def _done(self) -> bool:
        return all(connection.done for connection in self.connections) and not self.splices.closing_sockets.open

    def stop_if_done(self) -> None:
        if self.finishing and self._done:
            self.loop.stop()


@pytest.fixture(scope="module")
def contexts(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contexts]:
    made = Contexts(certificate, tmp_path_factory.mktemp("keys"))
    yield made
    made.close()


def run(contexts: Contexts, shapes: list[Shape], script: list[Step]) -> None:
    """Make a connection of each shape, and do the steps."""
    with World(contexts) as world, capture_logs() as logs:
        for shape in shapes:
            world.connect(shape)
        for step in script:
            world.connections[step.which % len(shapes)].do(step.what, step.side, step.size)
            world.turn(step.turns)
        world.finish()
    assert not logs


# Of many sizes, small ones matter most: of records, of turns, and of buffers.
SIZES = st.one_of(
    st.integers(1, 300),
    st.sampled_from([RECORD - 1, RECORD, RECORD + 1, TURN, TURN + 1, 300_000]),
    st.integers(1, 300_000),
)
SIDES = st.sampled_from(["client", "origin"])
TURNS = st.sampled_from([0, 0, 1, 2, 5, 30])
ORDERLY = ["write", "write", "write", "read", "read", "key update", "close_notify", "end"]
FAILURES = ["truncate", "reset", "garbage", "drain", "abort"]
SHAPES = st.builds(
    Shape,
    version=st.sampled_from(["1.3", "sealed", "1.2"]),
    tls_origin=st.booleans(),
    to_client=st.sampled_from([0, 150, 200_000]),
    to_origin=st.sampled_from([0, 150, 100_000]),
    our_buffers=st.booleans(),
    peers_buffers=st.booleans(),
)


def steps(what: list[str], connections: int = 1) -> st.SearchStrategy[list[Step]]:
    which = st.integers(0, connections - 1)
    return st.lists(st.builds(Step, which, st.sampled_from(what), SIDES, SIZES, TURNS), max_size=20 * connections)


def examples(times: int) -> settings:
    """Take more examples than the profile says: these are quick."""
    assert settings.default is not None
    return settings(max_examples=times * settings.default.max_examples)


@examples(1)
@given(shape=SHAPES, script=steps(ORDERLY))
def test_an_orderly_script_loses_no_byte(contexts: Contexts, shape: Shape, script: list[Step]) -> None:
    run(contexts, [shape], script)


PLAIN = Shape("1.3", tls_origin=False, to_client=0, to_origin=0, our_buffers=False, peers_buffers=False)
SEALED = PLAIN._replace(version="sealed", tls_origin=True)


@examples(4)
@given(
    shape=SHAPES,
    script=steps(ORDERLY),
    failure=st.builds(Step, st.just(0), st.sampled_from(FAILURES), SIDES, SIZES, TURNS),
    then=steps(ORDERLY),
)
@example(  # the reset is noticed first by the send of the session tickets
    shape=PLAIN,
    script=[Step(0, "write", "client", 1, 0)],
    failure=Step(0, "reset", "client", 1, 0),
    then=[],
)
@example(  # OpenSSL responds to the KeyUpdate although our FIN was sent
    shape=SEALED,
    script=[Step(0, "end", "origin", 1, 5), Step(0, "key update", "client", 1, 5)],
    failure=Step(0, "truncate", "client", 1, 5),
    then=[],
)
@example(  # nothing is read from the client any more, and nothing is sent to it
    shape=PLAIN,
    script=[Step(0, "end", "client", 1, 5)],
    failure=Step(0, "reset", "client", 1, 5),
    then=[],
)
@example(  # what arrives after the drain must not destroy what is on its way
    shape=PLAIN._replace(to_client=200_000, peers_buffers=True),
    script=[],
    failure=Step(0, "drain", "client", 1, 5),
    then=[Step(0, "write", "client", 10_000, 5)],
)
def test_a_failure_is_passed_on_behind_all_that_came_before_it(
    contexts: Contexts, shape: Shape, script: list[Step], failure: Step, then: list[Step]
) -> None:
    run(contexts, [shape], [*script, failure, *then])


@examples(1)
@given(shapes=st.lists(SHAPES, min_size=2, max_size=4), script=steps(ORDERLY * 4 + FAILURES, connections=4))
def test_connections_of_one_loop_share_nothing(contexts: Contexts, shapes: list[Shape], script: list[Step]) -> None:
    """Some fail in the middle, perhaps more than once, while the bytes of the others are under way."""
    run(contexts, shapes, script)


@pytest.mark.parametrize("shape", [PLAIN, PLAIN._replace(tls_origin=True)], ids=["plain origin", "TLS origin"])
@pytest.mark.parametrize("side", ["client", "origin"])
@pytest.mark.parametrize("step", ["write", "end"])
@pytest.mark.parametrize("bio", [PAIR.incoming, PAIR.outgoing], ids=["incoming", "outgoing"])
def test_bytes_of_another_connection_end_one_and_reach_none(
    contexts: Contexts, bio: ssl.MemoryBIO, step: str, side: str, shape: Shape
) -> None:
    """What a bug would do: an operation leaves bytes in the BIOs that all connections share."""
    with World(contexts) as world, capture_logs() as logs:
        victim, other = world.connect(shape), world.connect(SEALED)
        for connection in (victim, other):
            connection.do("write", "client", 300_000)
            connection.do("write", "origin", 300_000)
        world.turn(1)
        victim.settle()
        bio.write(b"\x17\x03\x03\x00\x20of another connection")
        victim.do(step, side, 100)
        world.turn(5)
        assert [(line["event"], line["log_level"]) for line in logs] == [("splice failed", "error")]
        ended = victim.splice.ended_by, victim.splice.reason
        # The first event stays: an end that was read before the operation failed.
        assert ended == ("tunnel", "internal error") or (step == "end" and ended == (side, "closed"))
        victim.failures = ["a bug", "of ours"]
        world.connect(PLAIN)
        for connection in world.connections[1:]:
            connection.do("write", "client", 1000)
            connection.do("write", "origin", 1000)
        world.finish()
        assert [peer.end for peer in victim.peers] == ["RST", "RST"]
        assert len(logs) == 1
