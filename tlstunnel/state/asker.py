"""An asker's side of its connection to the ledger: sends questions, and finds those that are not answered in time.

Tested by tests/unit/test_state_shared.py.
"""

import asyncio
import math
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NoReturn, Protocol

from tlstunnel.escaping import printable, shorten
from tlstunnel.state import wire
from tlstunnel.state.channel import Channel
from tlstunnel.state.counters import WITHIN, LimitCheck, find_taken

MAX_PATIENCE = 0.5
"""The longest time, in seconds, that the ledger may ask for while another process takes over."""

MAX_UNSENT = 1 << 20
"""Bytes that may wait for a ledger that does not read, besides a declaration."""

Reply = list[Any] | wire.Failed | None
"""The results of the checks, or numbers of open tunnels. None: there will be no reply."""

_Waiting = tuple["asyncio.Future[Reply]", Sequence[LimitCheck] | int]
"""A question, with its checks, or the number of keys whose open tunnels it counts."""

LONGEST_REASON = 200
"""Characters of what the ledger says, for the log."""


class AskerOwner(Protocol):
    """What is told about the connection."""

    def handle_granted(self, keys: Sequence[str]) -> None:
        """Note tunnels that the ledger has granted."""

    def handle_alive(self, asker: "Asker") -> None:
        """Handle the reply to a probe."""

    def handle_failure(self, asker: "Asker", kind: str, reason: str) -> None:
        """Call `asker.abandon`, because the ledger fails for this reason. `kind` is one of a few words, for metrics."""

    def handle_announcement(self, topic: str, text: str, age: float) -> None:
        """Handle what another process has announced `age` seconds ago."""


class Asker:
    """Sends what is asked and told in one turn of the loop in one frame. A question is sent at once if no other waits.

    `declared`: the ledger knows what this process holds, and is told each change.
    """

    def __init__(self, sock: socket.socket, owner: AskerOwner, timeout: float) -> None:
        self.declared = False
        self._owner = owner
        self.timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._greeted = False
        self._refusal = ""
        self._outgoing: list[wire.AskerMessage] = []
        self._number = 0
        self._waiting: dict[int, _Waiting] = {}
        self._abandoned: dict[int, Sequence[LimitCheck]] = {}
        """Questions whose answers come too late, and may still take tunnels."""
        self._deadlines: deque[tuple[float, int]] = deque()
        """For each frame with questions: when the answers are due, and the number of the last question."""
        self._sent = 0
        """The number of the last question in a frame."""
        self._timer: asyncio.TimerHandle | None = None
        self._probing = False
        self._probe_timer: asyncio.TimerHandle | None = None
        self._patience = 0.0
        self._most_unsent = MAX_UNSENT
        self._channel = Channel(sock, self._receive, self._handle_end)
        self._channel.send(wire.encode_hello(wire.Hello(wire.VERSION)))

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._channel.closed

    def check(self, checks: Sequence[LimitCheck]) -> "asyncio.Future[Reply] | None":
        """Ask as `Counters.check`. Return the reply to wait for, or None if too many questions wait."""
        return self._ask(wire.Ask(self._number + 1, list(checks)), checks)

    def count_tunnels(self, keys: Sequence[str]) -> "asyncio.Future[Reply] | None":
        """Ask as `Counters.count_tunnels`, and return the same as `check`."""
        return self._ask(wire.Count(self._number + 1, list(keys)), len(keys))

    def send(self, message: wire.AskerMessage) -> None:
        """Send a message with all others of this turn of the loop."""
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(message)

    def declare(self, tunnels: Mapping[str, int]) -> None:
        """Tell the ledger all that this process holds, and probe it. Nobody may wait for an answer."""
        self._flush()
        self._abandoned.clear()  # the ledger has forgotten what they took
        items = iter(tunnels.items())
        message: wire.AskerMessage = wire.Declare(dict(islice(items, wire.LEASES_PER_FRAME)))
        while True:
            self._send_now(message)
            if not (more := dict(islice(items, wire.LEASES_PER_FRAME))):
                break
            message = wire.Take(more)
        self.declared = True
        self._most_unsent = self._channel.unsent_bytes + MAX_UNSENT
        self._probe()

    def abandon(self, delay: float) -> None:
        """Wait for no answers any more, and probe after `delay` seconds."""
        self.declared = False
        self._outgoing.clear()
        waiting, self._waiting = self._waiting, {}
        for number, (future, checks) in waiting.items():
            if not isinstance(checks, int):
                self._abandoned[number] = checks
            if not future.done():
                future.set_result(None)
        self._deadlines.clear()
        self._channel.end_expecting()
        self._cancel_timers()
        if not self.closed and not self._probing:
            self._probe_timer = self._loop.call_later(delay, self._probe)

    def close(self) -> None:
        """Close the connection. Who waits for an answer gets none."""
        self._channel.close()
        self.abandon(0.0)

    def _ask(
        self, question: wire.Ask | wire.Count, checks: Sequence[LimitCheck] | int
    ) -> "asyncio.Future[Reply] | None":
        others = len(self._waiting)
        if others >= wire.MAX_WAITING:
            return None
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._number = question.number
        self._waiting[question.number] = future, checks
        if others:
            self.send(question)
        else:
            self._outgoing.append(question)
            self._channel.begin_expecting()
            self._flush()
        return future

    def _flush(self) -> None:
        outgoing = self._outgoing
        if not outgoing:
            return
        self._outgoing = []
        deadline = max(self._loop.time() + self.timeout, self._patience)
        for frame in wire.encode_batch(wire.Batch(deadline, outgoing)):
            self._channel.send(frame)
        if self._sent < self._number:
            self._sent = self._number
            self._deadlines.append((deadline, self._number))
            if self._timer is None:
                self._timer = self._loop.call_at(deadline, self._check_deadline)
        if self._channel.unsent_bytes > self._most_unsent:
            self._owner.handle_failure(self, "not reading", "the ledger does not read what it is sent")

    def _send_now(self, message: wire.AskerMessage) -> None:
        for frame in wire.encode_batch(wire.Batch(0.0, [message])):
            self._channel.send(frame)

    def _check_deadline(self) -> None:
        """Fail if the oldest question is late, and nothing that has arrived answers it."""
        self._timer = None
        self._channel.read()
        oldest = next(iter(self._waiting), math.inf)
        while self._deadlines and self._deadlines[0][1] < oldest:
            self._deadlines.popleft()
        if not self._deadlines:
            return
        due = max(self._deadlines[0][0], self._patience)
        if self._loop.time() < due:
            self._timer = self._loop.call_at(due, self._check_deadline)
        else:
            reason = f"the ledger did not answer within {self.timeout * 1000:.0f} ms"
            self._owner.handle_failure(self, "timed out", reason)

    def _probe(self) -> None:
        self._probe_timer = None
        if not self._probing:
            self._probing = True
            self._send_now(wire.Probe())

    def _receive(self, payload: bytes) -> None:
        if not self._greeted:
            self._greeted = True
            self._refusal = shorten(printable(wire.decode_hello(payload).refusal), LONGEST_REASON)
            return
        for reply in wire.decode_replies(payload):
            if isinstance(reply, wire.Answer):
                self._receive_answer(reply)
            elif isinstance(reply, wire.Counted):
                self._receive_counted(reply)
            elif isinstance(reply, wire.Failed):
                self._receive_failed(reply)
            elif isinstance(reply, wire.Announced):
                self._owner.handle_announcement(reply.topic, reply.text, reply.age)
            elif isinstance(reply, wire.Alive):
                self._probing = False
                self._owner.handle_alive(self)
            elif isinstance(reply, wire.Pausing):
                self._patience = min(reply.until, self._loop.time() + MAX_PATIENCE)
            else:
                self._patience = self._loop.time() + self.timeout
        if not self._waiting:
            self._channel.end_expecting()

    def _receive_answer(self, answer: wire.Answer) -> None:
        future, checks = self._waiting.pop(answer.number, (None, None))
        if checks is None:
            checks = self._abandoned.pop(answer.number, ())
        if isinstance(checks, int):
            self._refuse(future, "checks for numbers of tunnels")
        if answer.results:
            results = list(answer.results)
            if len(results) != len(checks):
                self._refuse(future, f"an answer with {len(results)} results for {len(checks)} checks")
            taken = find_taken(checks, results)
        else:
            results = [WITHIN] * len(checks)
            taken = [check.key for check in checks if check.max_tunnels]
        if future is None or future.done():
            if taken:  # too late, or cancelled
                self.send(wire.Return(taken))
        else:
            if taken:
                self._owner.handle_granted(taken)
            future.set_result(results)

    def _receive_counted(self, counted: wire.Counted) -> None:
        future, checks = self._waiting.pop(counted.number, (None, None))
        if future is not None and checks != len(counted.tunnels):
            self._refuse(future, f"{len(counted.tunnels)} numbers of tunnels for another question")
        if future is not None and not future.done():
            future.set_result(counted.tunnels)

    def _refuse(self, future: "asyncio.Future[Reply] | None", error: str) -> NoReturn:
        """Have a question without an answer, and raise WireError."""
        if future is not None and not future.done():
            future.set_result(None)
        raise wire.WireError(error)

    def _receive_failed(self, failed: wire.Failed) -> None:
        future, _ = self._waiting.pop(failed.number, (None, None))
        self._abandoned.pop(failed.number, None)
        if future is not None and not future.done():
            future.set_result(wire.Failed(failed.number, shorten(printable(failed.reason), LONGEST_REASON)))

    def _handle_end(self, reason: str) -> None:
        self._cancel_timers()
        reason = shorten(printable(reason), LONGEST_REASON)
        if self._refusal:
            self._owner.handle_failure(self, "refused", self._refusal)
        else:
            self._owner.handle_failure(self, "closed", f"the ledger has closed the connection{reason and ': '}{reason}")

    def _cancel_timers(self) -> None:
        for timer in (self._timer, self._probe_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._probe_timer = None
