"""The ledger: counts for several processes, and knows what each of them holds. No I/O.

A holder is an asker's connection. Its leases are the tunnels that it has taken and not returned; they end with it, and
no others do. Replies are given to the function of the holder that they are for.

Windows and blocks are in the counters, leases here and in the counters: a ledger that starts anew has none, until its
askers declare what they hold. What a process counted alone in the meantime is not added.
"""

import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tlstunnel.state import wire
from tlstunnel.state.announcements import Allowance, Announcements
from tlstunnel.state.counters import MAX_TUNNELS, CountersUnavailable, LimitResult, SumCounters, find_taken
from tlstunnel.state.memory import MemoryCounters

Send = Callable[[list[wire.LedgerMessage]], None]
Later = Callable[[Coroutine[Any, Any, None]], object]
"""Runs a coroutine as a task."""

MAX_KEYS_HELD = 1 << 18
"""Keys under which one holder can have tunnels, 80 MB: three for each of 80 000 tunnels, all from different clients."""

MAX_CHECKS = 1_024
"""Checks in one question."""

MAX_PENDING, MAX_PENDING_ITEMS = 512, 4_096
"""Questions of one holder that may wait for counters elsewhere, and their checks and keys.

Counters elsewhere take twice as many questions, so that no holder can fill them alone.
"""

_QUESTIONS = (wire.Ask, wire.Count)


@dataclass(slots=True)
class Tally:
    """Numbers of questions, by their outcome."""

    answered: int = 0
    expired: int = 0
    failed: int = 0


class Holder:
    """An asker's connection, and its leases: the open tunnels under each key."""

    __slots__ = ("allowance", "declarations", "leases", "send", "waiting", "waiting_items")

    def __init__(self, send: Send) -> None:
        self.send = send
        self.leases: dict[str, int] = {}
        self.declarations = 0
        """How often its leases were set or have ended, after which an earlier question takes none."""
        self.waiting = self.waiting_items = 0
        """Questions that wait for the counters, and their checks and keys."""
        self.allowance = Allowance()


class Ledger:
    """Answers askers from `counters`.

    `later` runs what has to wait, which is nothing if these are `MemoryCounters`. `clock` is that of the deadlines.
    """

    def __init__(self, counters: SumCounters, later: Later, clock: Callable[[], float] = time.monotonic) -> None:
        self.holders: set[Holder] = set()
        self.tally = Tally()
        self.announcements = Announcements(clock)
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
        """Handle the messages of a holder. A question that has expired is neither counted nor answered.

        Raises WireError for what no asker sends. What precedes it was handled.
        """
        expired = self._is_expired(batch.deadline)
        replies: list[wire.LedgerMessage] = []
        announced: list[wire.LedgerMessage] = []
        declared = False
        items = 0
        for message in batch.messages:
            items += 1 + _count_items(message)
            if items > wire.MAX_ITEMS:
                raise wire.WireError(f"more than {wire.MAX_ITEMS} messages, checks and keys in a frame")
            if isinstance(message, _QUESTIONS):
                if (reply := self._answer(holder, message, batch.deadline, expired)) is not None:
                    replies.append(reply)
            elif isinstance(message, wire.Probe):
                replies.append(wire.Alive())
            elif isinstance(message, wire.Announce):
                if holder.allowance.take(self._clock()):
                    self.announcements.keep(message)
                    announced.append(wire.Announced(message.topic, message.text))
            else:
                self._change(holder, message)
                declared = declared or isinstance(message, wire.Declare)
        if replies:
            holder.send(replies)
        if declared:
            _tell(holder, self.announcements.repeat())
        if announced:
            self._tell_others(holder, announced)

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

    def _answer(
        self, holder: Holder, question: wire.Ask | wire.Count, deadline: float, expired: bool
    ) -> wire.LedgerMessage | None:
        """Return the answer, if there is one at once."""
        if isinstance(question, wire.Ask):
            _refuse_impossible(holder, question)
        if expired:
            self.tally.expired += 1
            return None
        if self._memory is None:
            self._answer_later(holder, question, deadline)
            return None
        self.tally.answered += 1
        if isinstance(question, wire.Count):
            return wire.Counted(question.number, [self._memory.open_tunnels(key) for key in question.keys])
        return _grant(holder, question, self._memory.check_now(question.checks))

    def _tell_others(self, holder: Holder, announced: Sequence[wire.LedgerMessage]) -> None:
        for other in self.holders:
            if other is not holder:
                _tell(other, announced)

    def _change(self, holder: Holder, message: wire.Return | wire.Take | wire.Declare) -> None:
        if isinstance(message, wire.Return):
            self._return_all(holder, _count_keys(message.keys))
        elif isinstance(message, wire.Take):
            self._take_all(holder, message.leases)
        else:
            self._declare(holder, message.leases)

    def _answer_later(self, holder: Holder, question: wire.Ask | wire.Count, deadline: float) -> None:
        items = _count_items(question)
        if holder.waiting >= MAX_PENDING or holder.waiting_items + items > MAX_PENDING_ITEMS:
            self.tally.failed += 1
            holder.send([wire.Failed(question.number, "too many questions wait")])
            return
        holder.waiting += 1
        holder.waiting_items += items
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
            holder.waiting_items -= _count_items(question)

    def _take_all(self, holder: Holder, leases: Mapping[str, int]) -> None:
        """Add leases. Raises WireError if the holder has too many."""
        held = holder.leases
        if len(held) + sum(key not in held for key in leases) > MAX_KEYS_HELD:
            raise wire.WireError(f"tunnels under more than {MAX_KEYS_HELD} keys")
        taken = {key: number for key, number in leases.items() if number > 0}
        if any(held.get(key, 0) + number > MAX_TUNNELS for key, number in taken.items()):
            raise wire.WireError(f"more than {MAX_TUNNELS} tunnels under one key")
        for key, number in taken.items():
            held[key] = held.get(key, 0) + number
        self._counters.change_tunnels(taken)

    def _return_all(self, holder: Holder, numbers: Mapping[str, int]) -> None:
        """Return leases, but never more than the holder has."""
        held = holder.leases
        returned = {}
        for key, number in numbers.items():
            has = held.get(key, 0)
            if has > number:
                held[key] = has - number
                returned[key] = -number
            elif has:
                del held[key]
                returned[key] = -has
        self._counters.change_tunnels(returned)

    def _declare(self, holder: Holder, leases: Mapping[str, int]) -> None:
        """Set what the holder has."""
        holder.declarations += 1
        held = holder.leases
        self._return_all(
            holder, {key: has - leases.get(key, 0) for key, has in held.items() if has > leases.get(key, 0)}
        )
        self._take_all(holder, {key: number - held.get(key, 0) for key, number in leases.items()})


def _tell(holder: Holder, announcements: Sequence[wire.LedgerMessage]) -> None:
    for start in range(0, len(announcements), wire.ANNOUNCEMENTS_PER_FRAME):
        holder.send(list(announcements[start : start + wire.ANNOUNCEMENTS_PER_FRAME]))


def _count_items(message: wire.AskerMessage) -> int:
    """Return the number of checks and keys in a message."""
    if isinstance(message, wire.Ask):
        return len(message.checks)
    if isinstance(message, wire.Return | wire.Count):
        return len(message.keys)
    return len(message.leases) if isinstance(message, wire.Take | wire.Declare) else 0


def _count_keys(keys: Sequence[str]) -> dict[str, int]:
    """Return how often each key occurs. `Counter` takes several times as long for a few."""
    numbers: dict[str, int] = {}
    for key in keys:
        numbers[key] = numbers.get(key, 0) + 1
    return numbers


def _refuse_impossible(holder: Holder, question: wire.Ask) -> None:
    """Raise WireError for a question that no asker sends."""
    checks = question.checks
    if len(checks) > MAX_CHECKS:
        raise wire.WireError(f"more than {MAX_CHECKS} checks in a question")
    if len(holder.leases) + len(checks) > MAX_KEYS_HELD:
        raise wire.WireError(f"tunnels under more than {MAX_KEYS_HELD} keys")
    for check in checks:
        if not check.possible:
            raise wire.WireError("a check that nothing can be counted by")


def _grant(holder: Holder, question: wire.Ask, results: list[LimitResult]) -> wire.Answer:
    """Note what the holder has taken, and return the answer."""
    leases = holder.leases
    for key in find_taken(question.checks, results):
        leases[key] = leases.get(key, 0) + 1
    for result in results:
        if result.exceeded:
            return wire.Answer(question.number, results)
    return wire.Answer(question.number)
