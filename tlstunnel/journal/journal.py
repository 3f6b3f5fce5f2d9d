"""The journal: one record for each connection, and counts and samples of what is too common for that."""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

from tlstunnel.escaping import printable
from tlstunnel.journal.events import Decision, EndedBy, Event, Reason, fixed_reason
from tlstunnel.journal.kept import KeptRecords
from tlstunnel.journal.kinds import Kind, find_kind
from tlstunnel.journal.lines import write_info
from tlstunnel.journal.logger import structlog
from tlstunnel.journal.record import Record
from tlstunnel.journal.style import PLAIN
from tlstunnel.metrics import families
from tlstunnel.metrics.families import OTHER
from tlstunnel.metrics.registry import Registry

SWITCHING_PROTOCOLS = 101

SAMPLE_SECONDS = 10.0
"""Of what is sampled, at most one line for each event and reason is logged in this time."""

SHORT_SECONDS = 1.0
"""A tunnel is short if it ends within this time of its connection."""

_ORDINARY = frozenset({Reason.HELLO_CLIENT_CLOSED, Reason.PROXY_CLIENT_CLOSED})
"""Failures that are logged at level info: health checks by TCP and port scans, which need no one's attention."""


class _Sample:
    """What is logged of one event and reason: when the last line was written, and what was suppressed since."""

    __slots__ = ("facts", "logged_at", "suppressed", "timer")

    def __init__(self) -> None:
        self.logged_at = float("-inf")
        self.suppressed = 0
        self.facts: Mapping[str, object] = {}
        self.timer: asyncio.TimerHandle | None = None


class Observer(Protocol):
    """Sees the records of connections of interest. It must neither wait nor raise."""

    def opened(self, record: Record) -> None:
        """A tunnel begins."""

    def ended(self, record: Record, kind: Kind | None, seconds: float) -> None:
        """A tunnel has ended (`kind` is None), or a connection that had none."""

    def failed(self, record: Record) -> None:
        """A connection has ended before its TLS handshake was complete."""

    def note_failing(self, site: str) -> None:
        """The health of an origin of a site has changed."""


class Journal:
    """Logs and counts connections.

    `metrics` are those of the process. With `opened`, a tunnel is logged also when it begins. Each of `listeners` is
    called with the event and the record of every connection that has ended; it must neither wait nor raise. `observer`
    is None as long as nobody wants to know of floods. `kept` are the latest connections without a tunnel. `style` says
    how records are written.
    """

    def __init__(self, metrics: Registry | None = None, *, opened: bool = False) -> None:
        self.metrics = metrics = Registry() if metrics is None else metrics
        self.listeners: list[Callable[[Event, Record], None]] = []
        self.style = PLAIN
        self.observer: Observer | None = None
        self.kept = KeptRecords()
        self._log = structlog.get_logger()
        self.log_opened = opened
        # Few: the reasons are those of the table, and the variable ones have texts of the system.
        self._samples: dict[tuple[Event, str], _Sample] = {}
        self._connections = metrics[families.CONNECTIONS]
        self._lifetimes = metrics.histogram(families.TUNNEL_LIFETIME_SECONDS)
        self._usage = metrics.usage
        self._failed = metrics[families.TLS_HANDSHAKES_FAILED]
        self._not_accepted = metrics[families.CONNECTIONS_NOT_ACCEPTED]
        self._pauses = metrics[families.ACCEPT_PAUSES]

    def opened(self, record: Record) -> None:
        """Count a tunnel that begins, and log it if the configuration says so."""
        self._usage.change(record.site).handshakes += 1
        self.metrics.note_change()
        if self.observer is not None:
            self.observer.opened(record)
        if self.log_opened:
            self._log.info(Event.OPENED, **self.style.select(record.facts(self.style.show)))

    def ended(self, record: Record, up: int = 0, down: int = 0) -> None:
        """Log and count a connection that has ended. `up` and `down` are the bytes moved after the heads.

        The record of a plain request has its bytes already; they are no tunnel's, and only logged.
        """
        self._connections.add(record.site, record.ended_by, fixed_reason(record.reason) or OTHER)
        if up or down:
            record.up, record.down = up, down
        record.seconds = seconds = time.monotonic() - record.started
        usage = self._usage.change(record.site)
        if record.status == SWITCHING_PROTOCOLS and record.verdict == Decision.PASS:
            usage.bytes_up += up
            usage.bytes_down += down
            if seconds < SHORT_SECONDS:
                usage.short += 1
            self._lifetimes.observe(seconds)
            if self.observer is not None:
                self.observer.ended(record, None, seconds)
        elif kind := find_kind(record):
            setattr(usage, kind, getattr(usage, kind) + 1)
            if self.observer is not None:
                self.observer.ended(record, kind, seconds)
            self.kept.add(Event.CONNECTION, record)
        write_info(self._log, Event.CONNECTION, self.style.select(record.all_facts(self.style.show)))
        for listener in self.listeners:
            listener(Event.CONNECTION, record)

    def failed(self, record: Record, reason: str, detail: str = "") -> None:
        """Count a connection that ended before its TLS handshake was complete, and log a sample of such connections.

        Anyone who can connect can do that thousands of times a second, which must not fill the log.
        """
        self._failed.add(fixed_reason(reason) or OTHER)
        self._usage.change(record.site).unfinished += 1
        if self.observer is not None:
            self.observer.failed(record)
        facts = {"sni": record.sni} if record.sni else {}
        if record.peer != record.client:
            facts["peer"] = self.style.show(record.peer)
        record.reason, record.detail = reason, printable(detail)
        client = self.style.show(record.client)
        self._sample(Event.NO_TLS_HANDSHAKE, reason, client=client, detail=record.detail, **facts)
        record.seconds = time.monotonic() - record.started
        self._note(Event.NO_TLS_HANDSHAKE, record)

    def not_accepted(self, client: str, reason: Reason) -> None:
        """Count a connection that is closed because of its address, and log a sample of such connections."""
        self._not_accepted.add(reason)
        self._sample(Event.NOT_ACCEPTED, reason, client=self.style.show(client))
        self._note(Event.NOT_ACCEPTED, Record(id="", peer=client, reason=reason, ended_by=EndedBy.TUNNEL))

    def _note(self, event: Event, record: Record) -> None:
        """Keep the record of a connection of which only a sample is logged, and pass it on."""
        self.kept.add(event, record)
        for listener in self.listeners:
            listener(event, record)

    def accepting_paused(self, reason: Reason, connections: int) -> None:
        """Count and log a sample of the pauses of accepting; `connections` is how many there are."""
        self._pauses.add(reason)
        self._sample(Event.ACCEPTING_PAUSED, reason, connections=connections)

    def flush(self) -> None:
        """Log what was suppressed so far. To be called when the process ends."""
        for event, reason in self._samples:
            self._log_suppressed(event, reason)

    def _sample(self, event: Event, reason: str, **facts: object) -> None:
        sample = self._samples.get((event, reason))
        if sample is None:
            sample = self._samples[event, reason] = _Sample()
        left = sample.logged_at + SAMPLE_SECONDS - time.monotonic()
        if left <= 0:
            return self._log_sample(event, reason, facts)
        sample.suppressed += 1
        sample.facts = facts
        if sample.timer is None:
            with suppress(RuntimeError):  # without a loop, the next sample or `flush` has the number
                loop = asyncio.get_running_loop()
                sample.timer = loop.call_later(left, self._log_suppressed, event, reason)

    def _log_suppressed(self, event: Event, reason: str) -> None:
        """Log the last of what was suppressed, and how many more there were: otherwise the end of a flood is silent."""
        sample = self._samples[event, reason]
        if sample.suppressed:
            sample.suppressed -= 1
            self._log_sample(event, reason, sample.facts)

    def _log_sample(self, event: Event, reason: str, facts: Mapping[str, object]) -> None:
        sample = self._samples[event, reason]
        log = self._log.info if reason in _ORDINARY else self._log.warning
        log(event, reason=reason, suppressed=sample.suppressed, **facts)
        if sample.timer is not None:
            sample.timer.cancel()
        sample.timer = None
        sample.logged_at, sample.suppressed, sample.facts = time.monotonic(), 0, {}
