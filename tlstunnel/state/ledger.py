"""The ledger: counts for several processes, and knows what each of them holds. No I/O.

A holder is an asker's connection. Its leases are the tunnels that it has taken and not returned; they end with it, and
no others do. Replies are given to the function of the holder that they are for.

Windows and blocks are in the counters, leases here and in the counters: a ledger that starts anew has none, until its
askers declare what they hold. What a process counted alone in the meantime is not added.
"""

import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from tlstunnel.state import wire
from tlstunnel.state.counters import Counters, CountersUnavailable, LimitResult, find_taken
from tlstunnel.state.memory import MemoryCounters

Send = Callable[[list[wire.LedgerMessage]], None]
Later = Callable[[Coroutine[Any, Any, None]], object]
"""Runs a coroutine as a task."""


MAX_KEYS_HELD = 1 << 20
"""Keys under which one holder can have tunnels. A process has at most half as many tunnels as descriptors."""

_QUESTIONS = (wire.Ask, wire.Count)


@dataclass(slots=True)
class Tally:
    """Numbers of questions, by their outcome."""

    answered: int = 0
    expired: int = 0
    failed: int = 0


class Holder:
    """An asker's connection, and its leases: the open tunnels under each key."""

    __slots__ = ("declarations", "leases", "send", "waiting")

    def __init__(self, send: Send) -> None:
        self.send = send
        self.leases: dict[str, int] = {}
        self.declarations = 0
        """How often its leases were set or have ended, after which an earlier question takes none."""
        self.waiting = 0
        """Questions that wait for the counters."""


class Ledger:
    """Answers askers from `counters`.

    `later` runs what has to wait, which is nothing if these are `MemoryCounters`. `clock` is that of the deadlines.
    """

    def __init__(self, counters: Counters, later: Later, clock: Callable[[], float] = time.monotonic) -> None:
        self.holders: set[Holder] = set()
        self.tally = Tally()
        self._counters = counters
        self._memory = counters if isinstance(counters, MemoryCounters) else None
        self._later = later
        self._clock = clock
        self._paused_at = self._patience = 0.0

    def open(self, send: Send, leases: Mapping[str, int] | None = None) -> Holder:
        """Return a new holder, which has `leases` already."""
        holder = Holder(send)
        self.holders.add(holder)
        self._take_all(holder, leases or {})
        return holder

    def close(self, holder: Holder) -> None:
        """End a holder, and return its leases."""
        self.holders.discard(holder)
        self._declare(holder, {})

    def receive(self, holder: Holder, batch: wire.Batch) -> None:
        """Handle the messages of a holder. A question that has expired is neither counted nor answered."""
        expired = self._is_expired(batch.deadline)
        replies: list[wire.LedgerMessage] = []
        for message in batch.messages:
            if isinstance(message, _QUESTIONS):
                if expired:
                    self.tally.expired += 1
                elif self._memory is None:
                    self._answer_later(holder, message, batch.deadline)
                else:
                    replies.append(self._answer_now(holder, message, self._memory))
            elif isinstance(message, wire.Return):
                for key in message.keys:
                    self._return(holder, key, 1)
            elif isinstance(message, wire.Take):
                self._take_all(holder, message.leases)
            elif isinstance(message, wire.Declare):
                self._declare(holder, message.leases)
            elif isinstance(message, wire.Probe):
                replies.append(wire.Alive())
            else:
                self._announce(holder, message)
        if replies:
            holder.send(replies)

    def pause(self, patience: float) -> None:
        """Tell the askers to wait until `patience`. What has not expired until now will not expire before that."""
        self._paused_at, self._patience = self._clock(), patience
        for holder in self.holders:
            holder.send([wire.Pausing(patience)])

    def resume(self, paused_at: float, patience: float) -> None:
        """Continue after a pause, perhaps that of another ledger."""
        self._paused_at, self._patience = paused_at, patience
        for holder in self.holders:
            holder.send([wire.Resumed()])

    def _is_expired(self, deadline: float) -> bool:
        now = self._clock()
        return now > deadline and not (self._paused_at <= deadline and now <= self._patience)

    def _answer_now(
        self, holder: Holder, question: wire.Ask | wire.Count, counters: MemoryCounters
    ) -> wire.LedgerMessage:
        self.tally.answered += 1
        if isinstance(question, wire.Count):
            return wire.Counted(question.number, [counters.open_tunnels(key) for key in question.keys])
        return _grant(holder, question, counters.check_now(question.checks))

    def _answer_later(self, holder: Holder, question: wire.Ask | wire.Count, deadline: float) -> None:
        if holder.waiting >= wire.MAX_WAITING:
            self.tally.expired += 1
            return
        holder.waiting += 1
        self._later(self._wait(holder, holder.declarations, question, deadline))

    async def _wait(self, holder: Holder, declarations: int, question: wire.Ask | wire.Count, deadline: float) -> None:
        """Answer when the counters do. What was taken too late is given back."""
        try:
            if isinstance(question, wire.Count):
                holder.send([wire.Counted(question.number, await self._counters.count_tunnels(question.keys))])
            else:
                results = await self._counters.check(question.checks)
                if holder.declarations != declarations or self._is_expired(deadline):
                    self._counters.return_tunnels(find_taken(question.checks, results))
                    self.tally.expired += 1
                    return
                holder.send([_grant(holder, question, results)])
        except CountersUnavailable as error:
            self.tally.failed += 1
            holder.send([wire.Failed(question.number, str(error))])
        else:
            self.tally.answered += 1
        finally:
            holder.waiting -= 1

    def _take_all(self, holder: Holder, leases: Mapping[str, int]) -> None:
        """Add leases. Raises WireError if the holder has too many."""
        if len(holder.leases) + len(leases) > MAX_KEYS_HELD:
            raise wire.WireError(f"tunnels under more than {MAX_KEYS_HELD} keys")
        for key, number in leases.items():
            if number > 0:
                holder.leases[key] = holder.leases.get(key, 0) + number
                self._counters.take_tunnels([key] * number)

    def _return(self, holder: Holder, key: str, number: int) -> None:
        """Return leases, but never more than the holder has."""
        held = holder.leases.get(key, 0)
        if held > number:
            holder.leases[key] = held - number
        elif held:
            del holder.leases[key]
        if held:
            self._counters.return_tunnels([key] * min(number, held))

    def _declare(self, holder: Holder, leases: Mapping[str, int]) -> None:
        """Set what the holder has."""
        holder.declarations += 1
        for key, held in list(holder.leases.items()):
            if (more := held - leases.get(key, 0)) > 0:
                self._return(holder, key, more)
        self._take_all(holder, {key: number - holder.leases.get(key, 0) for key, number in leases.items()})

    def _announce(self, sender: Holder, message: wire.Announce) -> None:
        for holder in self.holders:
            if holder is not sender:
                holder.send([wire.Announced(message.topic, message.text)])


def _grant(holder: Holder, question: wire.Ask, results: list[LimitResult]) -> wire.Answer:
    """Note what the holder has taken, and return the answer."""
    leases = holder.leases
    for key in find_taken(question.checks, results):
        leases[key] = leases.get(key, 0) + 1
    for result in results:
        if result.exceeded:
            return wire.Answer(question.number, results)
    return wire.Answer(question.number)
