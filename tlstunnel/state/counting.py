"""Where a serving process counts: alone, or together with others at the ledger.

Tested by tests/promises/test_shared_counts.py.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.metrics.registry import Registry
from tlstunnel.program import import_when_needed
from tlstunnel.state.throttles import Throttles

if TYPE_CHECKING:  # it needs a library that most configurations do not use
    from tlstunnel.state.shared import SharedCounters

_SHARED = "tlstunnel.state.shared"

Listener = Callable[[str, float], None]
"""Takes the text of an announcement and its age in seconds. It must not raise."""


class Counting:
    """The counters of a serving process, for as long as it runs.

    They are made when they are first needed. `together` is whether there is a ledger, even if it does not answer now.
    `on_lost` is called when the connection to the ledger has ended. `on_joined` is called when the ledger begins to
    answer, which may be another one, to which nothing was announced yet. `throttles` are those that hold now.
    """

    def __init__(self, metrics: Registry | None = None, on_lost: Callable[[], None] | None = None) -> None:
        self.together = False
        self.on_joined: Callable[[], None] | None = None
        self._metrics = metrics
        self._on_lost = on_lost
        self._timeout = 0.05
        self._on_failure: Literal["local", "refuse"] = "local"
        self._counters: SharedCounters | None = None
        self._listeners: dict[str, Listener] = {}
        self.throttles = Throttles(lambda: self.counters)
        self._log = structlog.get_logger()

    @property
    def counters(self) -> "SharedCounters":
        """The counters. They stay the same until the process ends."""
        if self._counters is None:
            module = import_when_needed(_SHARED, "rate limits")
            made: SharedCounters = module.SharedCounters(
                timeout=self._timeout, on_failure=self._on_failure, report=self._report, metrics=self._metrics
            )
            made.on_announcement = self._receive
            made.on_lost = self._on_lost
            made.on_joined = self._handle_joined
            self._counters = made
        return self._counters

    @property
    def answering(self) -> str:
        """What answers: "ledger", "local: REASON", or "" if this process counts alone."""
        return self.counters.answering if self.together else ""

    def configure(self, timeout: float, on_failure: Literal["local", "refuse"]) -> None:
        """Wait `timeout` seconds for a count from now on, and then do as `on_failure` says."""
        self._timeout, self._on_failure = timeout, on_failure
        if self._counters is not None:
            self._counters.configure(timeout=timeout, on_failure=on_failure)

    async def join(self, sock: socket.socket) -> None:
        """Count at the ledger at the other end of `sock` from now on. Raises ConfigurationError."""
        if self._counters is None:  # in a thread, because it takes 0.1 s, and there may be tunnels
            await asyncio.to_thread(import_when_needed, _SHARED, "shared counts")
        self.together = True
        self.counters.attach(sock)

    def leave(self) -> None:
        """Count alone from now on."""
        self.together = False
        if self._counters is not None:
            self._counters.detach()

    def close(self) -> None:
        """End the connection to the ledger, and with it what this process holds."""
        self.together = False
        if self._counters is not None:
            self._counters.close()

    def announce(self, topic: str, text: str, key: str = "", seconds: float = 0.0) -> None:
        """Tell all other processes, if there are any: see `SharedCounters.announce`."""
        if self.together:
            self.counters.announce(topic, text, key, seconds)

    def listen(self, topic: str, listener: Listener) -> None:
        """Give announcements of this topic to `listener`, which replaces the previous one."""
        self._listeners[topic] = listener

    def _handle_joined(self) -> None:
        if self.on_joined is not None:
            self.on_joined()

    def _receive(self, topic: str, text: str, age: float) -> None:
        listener = self._listeners.get(topic)
        if listener is not None:  # otherwise it is of a later release
            listener(text, age)

    def _report(self, sentence: str) -> None:
        answers = self.answering == "ledger"
        (self._log.info if answers else self._log.warning)(Event.COUNTING, reason=sentence)
