"""The ledger's sockets: one connection for each asker, on the running asyncio loop.

Tested by tests/unit/test_state_shared.py.
"""

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from tlstunnel.errors import TlstunnelError
from tlstunnel.escaping import printable, shorten
from tlstunnel.state import wire
from tlstunnel.state.announcements import Kept
from tlstunnel.state.channel import Channel
from tlstunnel.state.counters import SumCounters
from tlstunnel.state.ledger import Holder, Ledger
from tlstunnel.state.memory import MemoryCounters

PATIENCE = 0.5
"""Seconds that askers wait for answers while another process takes over."""

PENDING_SECONDS = 0.1
"""How long a pause waits for questions that wait for the counters."""

MOST_UNSENT = 1 << 16
"""While more bytes of replies wait for an asker that does not read, nothing is read from it."""

MAX_UNSENT = 1 << 20
"""Replies beyond that are dropped. Only announcements come that far, since nothing is read meanwhile."""

TURN_SECONDS = 0.002
"""After so many seconds, what else one asker has sent waits for a turn of the others."""

LONGEST_REASON = 200
"""Characters of a reason in the log, which may quote what an asker has sent."""

RATE_SECONDS = 10
"""The period of the questions per second, in whole seconds."""


class SnapshotError(TlstunnelError):
    """A snapshot is not one, or is of a later release."""


class ConnectionSnapshot(msgspec.Struct, frozen=True):
    """The state of one connection. `version` is 0 before its `Hello`."""

    name: str
    version: int
    leases: dict[str, int]
    received: bytes
    unsent: bytes


class Snapshot(msgspec.Struct, frozen=True):
    """A ledger as another process continues it. `counts` is None if the counts are not in this process.

    `kept` are announcements for askers that connect later.
    The times are on CLOCK_MONOTONIC, in seconds, which all processes of a machine share.
    """

    paused_at: float
    patience: float
    connections: list[ConnectionSnapshot]
    counts: bytes | None = None
    format: int = 1
    kept: list[Kept] = []

    def encode(self) -> bytes:
        """Return the snapshot as bytes."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> "Snapshot":
        """Raises SnapshotError."""
        try:
            snapshot = msgspec.msgpack.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SnapshotError(f"the ledger's snapshot is invalid: {error}") from None
        if snapshot.format != 1:
            raise SnapshotError(f"the ledger's snapshot has format {snapshot.format}, this release reads format 1")
        return snapshot


@dataclass(frozen=True, slots=True)
class LedgerStats:
    """Figures for `tlstunnel status`. `answered`, `expired` and `failed` are numbers of questions since the start."""

    connections: int
    keys: int
    leases: int
    answered: int
    expired: int
    failed: int
    questions_per_second: float


class LedgerServer:
    """Answers the askers at the other ends of its sockets.

    `report` is called with a sentence when a connection is closed because of what the asker has sent.
    """

    def __init__(self, counters: SumCounters, *, report: Callable[[str], None]) -> None:
        self._counters = counters
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._pending: set[asyncio.Task[None]] = set()
        self._ledger = Ledger(counters, self._start_pending)
        self._connections: dict[Holder, _Connection] = {}
        self._paused = False
        self._paused_at = self._patience = 0.0
        self._rate = _Rate()

    def add(self, sock: socket.socket, name: str = "a process") -> None:
        """Serve the asker at the other end of `sock`, which belongs to this server from now on. Reports call it `name`.

        Raises OSError.
        """
        self._open(sock, ConnectionSnapshot(name, 0, {}, b"", b""))

    @property
    def paused(self) -> bool:
        """Whether another process may continue this server's work."""
        return self._paused

    @property
    def names(self) -> set[str]:
        """The names of all connections."""
        return {connection.name for connection in self._connections.values()}

    def keep_newest(self, name: str, number: int = 1) -> None:
        """Close the connections of this name except the newest ones, and return their leases."""
        for connection in [one for one in self._connections.values() if one.name == name][:-number]:
            connection.channel.close()
            self._handle_end(connection, "")

    @property
    def sockets(self) -> list[socket.socket]:
        """The sockets of all connections, in the order of a snapshot."""
        return [connection.channel.sock for connection in self._connections.values()]

    async def pause(self) -> Snapshot:
        """Stop answering, so that another process can continue. Until `resume`, nothing is read or sent.

        Call `close` once it does, or `resume` if it cannot.
        """
        self._paused_at = time.monotonic()
        self._patience = self._paused_at + PATIENCE
        self._ledger.pause(self._patience)
        for connection in self._connections.values():
            connection.channel.stop()
        self._paused = True
        if self._pending:
            await asyncio.wait(self._pending, timeout=PENDING_SECONDS)
            for task in self._pending:
                task.cancel()
            await asyncio.gather(*self._pending, return_exceptions=True)
        for connection in self._connections.values():
            connection.channel.stop()
        return Snapshot(
            self._paused_at,
            self._patience,
            [connection.snapshot() for connection in self._connections.values()],
            self._counters.snapshot() if isinstance(self._counters, MemoryCounters) else None,
            kept=self._ledger.announcements.list_kept(),
        )

    def resume(self) -> None:
        """Continue after a pause."""
        self._paused = False
        self._ledger.resume(self._paused_at, self._patience)
        for connection in self._connections.values():
            connection.channel.resume()

    def restore(self, snapshot: Snapshot, socks: Sequence[socket.socket]) -> None:
        """Continue what another process has paused, with its sockets. Raises SnapshotError and OSError.

        For a server without connections, and counters without counts.
        """
        if len(socks) != len(snapshot.connections):
            raise SnapshotError(f"the ledger's snapshot has {len(snapshot.connections)} connections, not {len(socks)}")
        if snapshot.counts is not None and isinstance(self._counters, MemoryCounters):
            try:
                self._counters.restore(snapshot.counts)
            except ValueError as error:
                raise SnapshotError(f"the ledger's snapshot is invalid: {error}") from None
        self._ledger.announcements.restore(snapshot.kept)
        for sock, connection in zip(socks, snapshot.connections, strict=True):
            self._open(sock, connection)
        self._ledger.resume(snapshot.paused_at, snapshot.patience)

    def close(self) -> None:
        """Close all connections. Leases are not returned: this process exits, or another one continues."""
        for connection in self._connections.values():
            connection.channel.close()
        self._connections.clear()
        for task in self._pending:
            task.cancel()

    def stats(self) -> LedgerStats:
        """Return figures about this moment."""
        tally = self._ledger.tally
        return LedgerStats(
            connections=len(self._connections),
            keys=len(self._counters.storage) if isinstance(self._counters, MemoryCounters) else 0,
            leases=sum(sum(holder.leases.values()) for holder in self._connections),
            answered=tally.answered,
            expired=tally.expired,
            failed=tally.failed,
            questions_per_second=self._rate.read(),
        )

    def _open(self, sock: socket.socket, snapshot: ConnectionSnapshot) -> None:
        connection = _Connection(self._ledger, sock, snapshot, self._handle_end, self._rate.note)
        self._connections[connection.holder] = connection
        if self._paused:
            connection.channel.stop()

    def _handle_end(self, connection: "_Connection", reason: str) -> None:
        self._connections.pop(connection.holder, None)
        self._ledger.close(connection.holder)
        if reason:
            said = shorten(printable(reason), LONGEST_REASON)
            self._report(f"the ledger has closed the connection of {connection.name}: {said}")

    def _start_pending(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._pending.add(task)
        task.add_done_callback(self._handle_answered)

    def _handle_answered(self, task: asyncio.Task[None]) -> None:
        self._pending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            said = shorten(printable(f"{type(error).__name__}: {error}"), LONGEST_REASON)
            self._report(f"the ledger could not answer: {said}")


class _Connection:
    """One asker's connection."""

    def __init__(
        self,
        ledger: Ledger,
        sock: socket.socket,
        snapshot: ConnectionSnapshot,
        on_end: Callable[["_Connection", str], None],
        note: Callable[[int], None],
    ) -> None:
        self.name = snapshot.name
        self._ledger = ledger
        self._on_end = on_end
        self._note = note
        self._version = snapshot.version
        self._dialect = wire.DIALECTS.get(snapshot.version)
        self.channel = Channel(
            sock,
            self._receive,
            self._handle_end,
            received=snapshot.received,
            unsent=snapshot.unsent,
            most_unsent=MOST_UNSENT,
            turn_seconds=TURN_SECONDS,
        )
        self.holder = ledger.open(self._send, snapshot.leases)

    def snapshot(self) -> ConnectionSnapshot:
        return ConnectionSnapshot(
            self.name, self._version, self.holder.leases, self.channel.received, self.channel.unsent
        )

    def _send(self, replies: list[wire.LedgerMessage]) -> None:
        if self._dialect is not None and self.channel.unsent_bytes < MAX_UNSENT:
            self.channel.send(self._dialect.encode_replies(replies))

    def _receive(self, payload: bytes) -> None:
        if self._dialect is None:
            return self._begin(wire.decode_hello(payload).version)
        batch = self._dialect.decode_batch(payload)
        self._note(len(batch.messages))
        try:
            self._ledger.receive(self.holder, batch)
        except wire.WireError:
            raise
        except Exception as error:  # such as numbers that cannot be counted with
            raise wire.WireError(f"{type(error).__name__}: {error}") from error

    def _begin(self, version: int) -> None:
        self._dialect = wire.DIALECTS.get(version)
        if self._dialect is None:
            spoken = ", ".join(map(str, sorted(wire.DIALECTS)))
            refusal = f"the ledger speaks version {spoken} of its protocol, and this process version {version}"
            self.channel.send(wire.encode_hello(wire.Hello(wire.VERSION, refusal)))
            raise wire.WireError(refusal)
        self._version = version
        self.channel.send(wire.encode_hello(wire.Hello(version)))

    def _handle_end(self, reason: str) -> None:
        self._on_end(self, reason)


class _Rate:
    """Events per second over the last whole seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._second = int(clock())
        self._current = 0
        self._past: deque[int] = deque(maxlen=RATE_SECONDS)

    def note(self, number: int) -> None:
        """Count this many events now."""
        self._move()
        self._current += number

    def read(self) -> float:
        """Return the events per second, 0 in the first second."""
        self._move()
        return sum(self._past) / len(self._past) if self._past else 0.0

    def _move(self) -> None:
        passed = int(self._clock()) - self._second
        if passed:
            self._second += passed
            self._past.append(self._current)
            self._past.extend([0] * min(passed - 1, RATE_SECONDS))
            self._current = 0
