"""The journal: one record for each connection, and counts and samples of what is too common for that."""

import time
from collections import Counter

import structlog

from tlstunnel.escaping import printable
from tlstunnel.journal.lines import write_info
from tlstunnel.journal.record import Record

SAMPLE_SECONDS = 10.0
"""Failures before the TLS handshake is done are counted, and at most one line of each kind is logged in this time."""


class Journal:
    """Where records go. `counters` counts what ended how, under names such as ``tls: timed out``."""

    def __init__(self, *, opened: bool = False) -> None:
        self.counters: Counter[str] = Counter()
        self._log = structlog.get_logger()
        self._opened = opened
        self._sampled: dict[str, tuple[float, int]] = {}

    def opened(self, record: Record) -> None:
        """A tunnel has begun: a line if the configuration asks for one."""
        self.counters["opened"] += 1
        if self._opened:
            self._log.info("opened", **record.facts())

    def ended(self, record: Record, up: int = 0, down: int = 0) -> None:
        """A connection has ended: its one record. `up` and `down` are the bytes moved behind the heads."""
        self.counters[f"ended: {record.ended_by}: {record.reason}"] += 1
        facts = record.facts()
        facts["up"], facts["down"] = up, down
        facts["seconds"] = round(time.monotonic() - record.started, 3)
        facts["ended_by"], facts["reason"] = record.ended_by, record.reason
        write_info(self._log, "connection", facts)

    def failed(self, record: Record, why: str, detail: str = "") -> None:
        """A connection ended before there was a request to record: counted, and a sample logged.

        A flood of half-open connections must not become a flood of lines.
        """
        facts = {"sni": record.sni} if record.sni else {}
        self.sampled("no handshake", why, client=record.client, detail=printable(detail), **facts)

    def sampled(self, event: str, why: str, **facts: object) -> None:
        """Count `why`, and log it unless that was done in the last 10 s; `unsaid` is how often it was not logged."""
        self.counters[why] += 1
        now = time.monotonic()
        last, unsaid = self._sampled.get(why, (float("-inf"), 0))
        if now - last < SAMPLE_SECONDS:
            self._sampled[why] = (last, unsaid + 1)
            return
        self._sampled[why] = (now, 0)
        self._log.warning(event, reason=why, unsaid=unsaid, **facts)
