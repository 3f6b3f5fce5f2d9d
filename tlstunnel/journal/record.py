"""The record of a connection: what is known of it, filled in stage by stage."""

import time
from typing import Any

_NOTHING: dict[str, Any] = {}


class Record:
    """What is known of one connection; filled in stage by stage, logged at its end.

    Strings that a client chose are as `printable` gives them. Times are of ``time.monotonic``, seconds.
    """

    __slots__ = (
        "cipher",
        "client",
        "detail",
        "edge",
        "ended_by",
        "firewall",
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
        self.verdict = self.edge = ""
        self.firewall: dict[str, Any] = _NOTHING
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
        if self.edge:
            facts["edge"] = self.edge
        if self.detail:
            facts["detail"] = self.detail
        return facts | self.firewall if self.firewall else facts
