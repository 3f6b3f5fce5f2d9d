"""The record of a connection: what is known of it, filled in stage by stage.

Tested by tests/unit/test_journal.py.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tlstunnel.escaping import shorten

MAX_PATH, MAX_DETAIL = 1024, 512
"""Characters of a path and of a detail in the log: the line must fit into a pipe's buffer at once (`MAX_LINE`)."""

MAX_FIELD = 256
"""Characters of a field that the client sent."""


_WEB_ORIGIN = re.compile(rb"null|[A-Za-z][A-Za-z0-9+.-]*://[^/?#@\\\s]*")
"""RFC 6454 section 7.1: no user, path or query, in which there may be a password or a token."""


@dataclass(slots=True, eq=False)
class Record:
    """What is known of one connection; logged at its end. `docs/log.md` describes the fields.

    Strings that a client chose are as `printable` returns them; `raw_...` are as it sent them, and escaped when they
    are shown. `edge_log` is what the edge worker adds. `tags` come from the edge worker, each "name=value".
    `asked_by` and `why` are of somebody who asked for its end. `started` is of ``time.monotonic``, seconds.
    """

    id: str
    peer: str
    client: str = ""
    site: str = ""
    sni: str = ""
    ja4: str = ""
    tls_version: str = ""
    cipher: str = ""
    method: str = ""
    host: str = ""
    path: str = ""
    raw_web_origin: bytes = b""
    raw_user_agent: bytes = b""
    client_subject: str = ""
    trace: str = ""
    status: int = 0
    verdict: str = ""
    origin: str = ""
    edge: str = ""
    detail: str = ""
    edge_log: tuple[tuple[str, str | int | float | bool], ...] = ()
    firewall: dict[str, Any] | None = None
    tags: tuple[str, ...] = ()
    asked_by: str = ""
    why: str = ""
    up: int = 0
    down: int = 0
    ended_by: str = ""
    reason: str = ""
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.client = self.client or self.peer

    def take_headers(self, web_origin: bytes, user_agent: bytes) -> None:
        """Take what the client sent in these headers: no more than is shown, as a tunnel keeps it while it is open."""
        self.raw_web_origin, self.raw_user_agent = web_origin[: MAX_FIELD + 1], user_agent[: MAX_FIELD + 1]

    @property
    def tags_by_name(self) -> dict[str, str]:
        """The values of the tags by their names."""
        return dict(tag.split("=", 1) for tag in self.tags)

    @property
    def web_origin(self) -> str:
        """The web origin that the client sent, escaped; "" if it has more than a web origin, which may be a secret."""
        return _show(self.raw_web_origin) if _WEB_ORIGIN.fullmatch(self.raw_web_origin) else ""

    @property
    def user_agent(self) -> str:
        """The name of the client's program as it sent it, escaped."""
        return _show(self.raw_user_agent)

    def facts(self, show: Callable[[str], str] = str) -> dict[str, Any]:
        """Return the fields of a log line that are known when a tunnel begins; some only where they are not empty.

        `show` returns an address of a client as it may be shown.
        """
        facts: dict[str, Any] = {
            "id": self.id,
            "client": show(self.client),
            "site": self.site,
            "sni": self.sni,
            "ja4": self.ja4,
            "tls_version": self.tls_version,
            "cipher": self.cipher,
            "path": shorten(self.path, MAX_PATH),
            "status": self.status,
            "verdict": self.verdict,
            "origin": self.origin,
        }
        if self.peer != self.client:
            facts["peer"] = show(self.peer)
        if self.method:
            facts["method"], facts["host"] = self.method, shorten(self.host, MAX_FIELD)
        if web_origin := self.web_origin:
            facts["web_origin"] = web_origin
        if self.raw_user_agent:
            facts["user_agent"] = self.user_agent
        if self.client_subject:
            facts["client_subject"] = shorten(self.client_subject, MAX_FIELD)
        if self.trace:
            facts["trace"] = self.trace
        if self.edge:
            facts["edge"] = self.edge
        if self.edge_log:
            facts["edge_log"] = dict(self.edge_log)
        if self.tags:
            facts["tags"] = self.tags_by_name
        if self.detail:
            facts["detail"] = shorten(self.detail, MAX_DETAIL)
        return facts | self.firewall if self.firewall else facts

    def all_facts(self, show: Callable[[str], str] = str) -> dict[str, Any]:
        """Return the fields of the log line that is written at the end."""
        facts = self.facts(show)
        facts["up"], facts["down"] = self.up, self.down
        facts["seconds"] = round(self.seconds, 3)
        facts["ended_by"], facts["reason"] = self.ended_by, self.reason
        if self.asked_by:
            facts["asked_by"], facts["why"] = self.asked_by, self.why
        return facts


def _show(value: bytes) -> str:
    """Return what a client sent, as ASCII and cut. Only as much is escaped as is shown."""
    text = value[: MAX_FIELD + 1].decode("latin-1")
    if not (text.isascii() and text.isprintable() and "\\" not in text):
        text = text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= MAX_FIELD else shorten(text, MAX_FIELD)
