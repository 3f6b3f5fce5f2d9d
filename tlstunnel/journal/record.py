"""The record of a connection: what is known of it, filled in stage by stage.

Tested by tests/unit/test_journal.py.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from tlstunnel.escaping import shorten

MAX_PATH, MAX_DETAIL = 1024, 512
"""Characters of a path and of a detail in the log: the line must fit into a pipe's buffer at once (`MAX_LINE`)."""


@dataclass(slots=True, eq=False)
class Record:
    """What is known of one connection; logged at its end. `docs/log.md` describes the fields.

    Strings that a client chose are as `printable` returns them. `tags` come from the edge worker, each "name=value".
    `started` is of ``time.monotonic``, seconds.
    """

    id: str
    peer: str
    client: str = ""
    site: str = ""
    sni: str = ""
    ja4: str = ""
    tls_version: str = ""
    cipher: str = ""
    path: str = ""
    status: int = 0
    verdict: str = ""
    origin: str = ""
    edge: str = ""
    detail: str = ""
    firewall: dict[str, Any] | None = None
    tags: tuple[str, ...] = ()
    up: int = 0
    down: int = 0
    ended_by: str = ""
    reason: str = ""
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.client = self.client or self.peer

    @property
    def tags_by_name(self) -> dict[str, str]:
        """The values of the tags by their names."""
        return dict(tag.split("=", 1) for tag in self.tags)

    def facts(self) -> dict[str, Any]:
        """Return the fields of a log line that are known when a tunnel begins; some only where they are not empty."""
        facts: dict[str, Any] = {
            "id": self.id,
            "client": self.client,
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
            facts["peer"] = self.peer
        if self.edge:
            facts["edge"] = self.edge
        if self.tags:
            facts["tags"] = self.tags_by_name
        if self.detail:
            facts["detail"] = shorten(self.detail, MAX_DETAIL)
        return facts | self.firewall if self.firewall else facts

    def all_facts(self) -> dict[str, Any]:
        """Return the fields of the log line that is written at the end."""
        facts = self.facts()
        facts["up"], facts["down"] = self.up, self.down
        facts["seconds"] = round(self.seconds, 3)
        facts["ended_by"], facts["reason"] = self.ended_by, self.reason
        return facts
