"""`SharedCounters`: the counts of all processes of a machine, which a serving process asks the ledger for.

A question waits for its answer at most `timeout` seconds. After one that was not answered, the process counts alone at
once (or refuses, as configured), until the ledger has replied to a probe. The ledger then learns what the process holds
in absolute numbers, so nothing that was lost, late or taken in the meantime leaves a wrong count of open tunnels.
"""

import asyncio
import math
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from tlstunnel.backoff import Backoff
from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Collected, Registry
from tlstunnel.state import wire
from tlstunnel.state.asker import Asker, Reply
from tlstunnel.state.counters import CountersUnavailable, LimitCheck, LimitResult, find_taken
from tlstunnel.state.memory import MemoryCounters

TIMEOUT = 0.05
"""Seconds. A question takes 0.1 ms, and a failure of the ledger should not make a handshake noticeably slower."""

PROBES = Backoff(first=0.1, longest=5.0)
"""The delays of probes if the ledger fails again and again. The first one is immediate."""

SOON = 10.0
"""Seconds. If the ledger fails again within this time, its next probe waits."""

MEMORY = "memory"
"""`SharedCounters.answering` while there is no ledger."""

LEDGER = "ledger"
"""`SharedCounters.answering` while the ledger answers."""


class SharedCounters:
    """`Counters` of all processes that share a ledger. For one event loop.

    Without a ledger, which is before the first `attach` and after `detach`, this process counts alone, because there is
    no other. `on_failure` says what happens when the ledger does not answer: "local" counts alone, so that N processes
    may admit N times a limit; "refuse" raises CountersUnavailable. `report` is called with a sentence whenever the
    ledger fails and when it has recovered. `on_announcement` is called with the topic, the text and the age of what
    other processes announce, `on_lost` when the connection has ended by itself and another one is needed, and
    `on_joined` when the ledger begins to answer.
    """

    def __init__(
        self,
        *,
        timeout: float = TIMEOUT,
        on_failure: Literal["local", "refuse"] = "local",
        report: Callable[[str], None],
        metrics: Registry | None = None,
    ) -> None:
        self.on_announcement: Callable[[str, str, float], None] | None = None
        self.on_lost: Callable[[], None] | None = None
        self.on_joined: Callable[[], None] | None = None
        self.answering = MEMORY
        self._timeout = timeout
        self._refuse = on_failure == "refuse"
        self._report = report
        metrics = Registry() if metrics is None else metrics
        self._questions = metrics[families.COUNTER_QUESTIONS]
        self._seconds = metrics.histogram(families.COUNTER_QUESTION_SECONDS)
        self._failures = metrics[families.LEDGER_FAILURES]
        metrics.collect(self._collect)
        # Counts alone, and has all tunnels of this process, whoever has granted them.
        self._local = MemoryCounters()
        self._asker: Asker | None = None
        self._asked: Asker | None = None
        """The same while the ledger answers."""
        self._failure = ""
        self._delay = 0.0
        self._failed_at = -math.inf

    # What the firewall calls.

    async def check(self, checks: Sequence[LimitCheck]) -> list[LimitResult]:
        """See `Counters.check`."""
        began = time.monotonic()
        if self._asked is not None and (future := self._asked.check(checks)) is not None:
            try:
                reply = await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled() and isinstance(results := future.result(), list):
                    self.return_tunnels(find_taken(checks, results))  # cancelled between the answer and now
                raise
            if isinstance(reply, list):
                self._note_answered(began)
                return reply
            self._raise_if_failed(reply)
        self._note_alone()
        results = self._local.check_now(checks)
        if taken := find_taken(checks, results):
            self._tell(wire.Take(Counter(taken)))
        return results

    async def count_tunnels(self, keys: Sequence[str]) -> list[int]:
        """See `Counters.count_tunnels`."""
        began = time.monotonic()
        if self._asked is not None and (future := self._asked.count_tunnels(keys)) is not None:
            reply = await future
            if isinstance(reply, list):
                self._note_answered(began)
                return reply
            self._raise_if_failed(reply)
        self._note_alone()
        return [self._local.open_tunnels(key) for key in keys]

    def take_tunnels(self, keys: Sequence[str]) -> None:
        """See `Counters.take_tunnels`."""
        self._local.take_tunnels(keys)
        self._tell(wire.Take(Counter(keys)))

    def return_tunnels(self, keys: Sequence[str]) -> None:
        """See `Counters.return_tunnels`. Raises KeyError for a tunnel that was not taken."""
        self._local.return_tunnels(keys)
        self._tell(wire.Return(list(keys)))

    def announce(self, topic: str, text: str, key: str = "", seconds: float = 0.0) -> None:
        """Tell all other processes, unless the ledger cannot be reached. A topic has 64 characters, a text 4096.

        With a `key`, processes that connect within `seconds` learn of it too, unless there is another one with this
        topic and key by then.
        """
        seconds = min(max(seconds, 0.0), wire.MAX_LIFE)
        self._tell(wire.Announce(topic[: wire.MAX_TOPIC], text[: wire.MAX_TEXT], key, seconds))

    # The connection.

    def configure(self, *, timeout: float, on_failure: Literal["local", "refuse"]) -> None:
        """Do as these say from now on."""
        self._timeout, self._refuse = timeout, on_failure == "refuse"
        if self._asker is not None:
            self._asker.timeout = timeout

    def attach(self, sock: socket.socket) -> None:
        """Ask the ledger at the other end of `sock` from now on, and declare what this process holds.

        The socket belongs to these counters. After a failure, the process counts alone until this ledger responds.
        """
        first = self.answering == MEMORY
        if self._asker is not None:
            self._drop_asker()
        self._asker = asker = Asker(sock, self, self._timeout)
        asker.declare(self._local.tunnels)
        if first and not self._local.tunnels:
            self._asked, self.answering = asker, LEDGER
            self._handle_joined()
        elif not self._failure:
            self.answering = "local: connecting to the ledger"

    def detach(self) -> None:
        """Count alone from now on, because there is no other process to share with."""
        self._drop_asker()
        self.answering, self._failure = MEMORY, ""

    def close(self) -> None:
        """Close the connection."""
        self.detach()

    # What the asker calls, see `AskerOwner`.

    def handle_granted(self, keys: Sequence[str]) -> None:
        """See `AskerOwner`."""
        self._local.take_tunnels(keys)

    def handle_alive(self, asker: Asker) -> None:
        """See `AskerOwner`. Before the ledger is asked, it learns what this process holds."""
        if not asker.declared:
            return asker.declare(self._local.tunnels)
        if self._asked is None:
            self._asked, self.answering = asker, LEDGER
            if self._failure:
                self._failure = ""
                self._report("the ledger answers again: all processes count together")
            self._handle_joined()

    def handle_failure(self, asker: Asker, kind: str, reason: str) -> None:
        """See `AskerOwner`. From now on, this process counts alone, or refuses."""
        now = time.monotonic()
        first = self._asked is not None or not self._failure
        self._failure, self._asked = reason, None
        self.answering = f"local: {reason}"
        if first:
            self._delay = PROBES.after(self._delay) if now < self._failed_at + self._delay + SOON else 0.0
            self._failed_at = now
            self._failures.add(kind)
            instead = "what has a limit is refused" if self._refuse else "this process counts alone"
            self._report(f"{reason}: {instead} until the ledger answers")
        if asker.closed:
            self._asker = None
        asker.abandon(self._delay)
        if asker.closed and self.on_lost is not None:
            self.on_lost()

    def handle_announcement(self, topic: str, text: str, age: float) -> None:
        """See `AskerOwner`."""
        if self.on_announcement is not None:
            self.on_announcement(topic, text, age)

    def _handle_joined(self) -> None:
        if self.on_joined is not None:
            self.on_joined()

    def _drop_asker(self) -> None:
        asker, self._asker, self._asked = self._asker, None, None
        if asker is not None:
            asker.close()

    def _tell(self, message: wire.AskerMessage) -> None:
        """Tell the ledger, if it knows what this process holds. Otherwise it learns everything later."""
        if self._asker is not None and self._asker.declared:
            self._asker.send(message)

    def _raise_if_failed(self, reply: Reply) -> None:
        """Raise CountersUnavailable if that is the ledger's answer, and should be the process's."""
        if isinstance(reply, wire.Failed) and self._refuse:
            self._questions.add("refused")
            raise CountersUnavailable(reply.reason)

    def _note_answered(self, began: float) -> None:
        """Count a question that the ledger has answered."""
        self._questions.add(LEDGER)
        self._seconds.observe(time.monotonic() - began)

    def _note_alone(self) -> None:
        """Count a question that this process answers alone. Raises CountersUnavailable if it should not."""
        if self.answering == MEMORY:
            return
        if self._refuse:
            self._questions.add("refused")
            raise CountersUnavailable(self._failure or "the ledger cannot answer yet")
        self._questions.add("local")

    def _collect(self) -> Collected:
        yield families.PROCESSES_COUNTING_ALONE, (), int(self.answering not in (MEMORY, LEDGER))
