"""What happened: one log record a connection, and counters for what is too common for a record each."""

import logging
import sys
import time
from collections import Counter
from typing import Any, Literal

import msgspec
import structlog

from tlstunnel.escaping import printable

SAMPLE_SECONDS = 10.0
"""Failures before the TLS handshake is done are counted, and at most one line of each kind is logged in this time."""


class Record:
    """What is known of one connection; filled in stage by stage, logged at its end.

    Strings that a client chose are as `printable` gives them. Times are of ``time.monotonic``, seconds.
    """

    __slots__ = (
        "cipher",
        "client",
        "detail",
        "ended_by",
        "id",
        "ja4",
        "origin",
        "path",
        "peer",
        "reason",
        "site",
        "sni",
        "started",
        "status",
        "tls_version",
        "verdict",
    )

    def __init__(self, request_id: str, peer: str) -> None:
        self.id = request_id
        self.peer = self.client = peer
        self.started = time.monotonic()
        self.site = self.sni = self.ja4 = self.tls_version = self.cipher = self.path = self.origin = ""
        self.status = 0
        self.verdict = ""
        self.ended_by = self.reason = self.detail = ""

    def facts(self) -> dict[str, Any]:
        """The fields of a log line, without those that are empty and only sometimes there."""
        facts: dict[str, Any] = {
            "id": self.id,
            "client": self.client,
            "site": self.site,
            "sni": self.sni,
            "ja4": self.ja4,
            "tls_version": self.tls_version,
            "cipher": self.cipher,
            "path": self.path,
            "status": self.status,
            "verdict": self.verdict,
            "origin": self.origin,
        }
        if self.peer != self.client:
            facts["peer"] = self.peer
        if self.detail:
            facts["detail"] = self.detail
        return facts


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
        self._log.info(
            "connection",
            **record.facts(),
            up=up,
            down=down,
            seconds=round(time.monotonic() - record.started, 3),
            ended_by=record.ended_by,
            reason=record.reason,
        )

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


def configure_logging(style: Literal["text", "json"]) -> None:
    """Log to standard error, one line an event: for people, or one JSON object."""
    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if style == "json":
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_encode)]
    else:
        # repr of strings: whatever is not printable is escaped also here.
        processors.append(
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), repr_native_str=True, exception_formatter=structlog.dev.plain_traceback
            )
        )
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Forward()], level=logging.WARNING, force=True)


def _encode(event: dict[str, Any], **_: Any) -> str:
    return msgspec.json.encode(event, enc_hook=str).decode()


class _Forward(logging.Handler):
    """What libraries (asyncio, mostly) say by the standard library's logging, as lines of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger()
        log.log(record.levelno, printable(record.getMessage()), logger=record.name, exc_info=record.exc_info)
