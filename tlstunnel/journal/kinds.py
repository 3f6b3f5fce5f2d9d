"""For the history: which kind of usage a connection was that ended without a tunnel.

Tested by tests/unit/test_journal_kinds.py.
"""

from collections.abc import Mapping
from typing import Literal

from tlstunnel.journal.events import Decision, Reason, fixed_reason
from tlstunnel.journal.record import Record

Kind = Literal["unfinished", "invalid", "blocked", "limited", "worker", "origin", "declined"]
"""A field of `tlstunnel.metrics.usage.SiteUsage`."""

REFUSALS: Mapping[Reason, Kind] = {
    Reason.MALFORMED_HEAD: "invalid",
    Reason.BARE_LF: "invalid",
    Reason.CONTROL_CHARACTER: "invalid",
    Reason.FOLDED_FIELD: "invalid",
    Reason.TARGET_FORM: "invalid",
    Reason.HOST: "invalid",
    Reason.BODY: "invalid",
    Reason.CONNECTION_FIELD: "invalid",
    Reason.KEY_FIELD: "invalid",
    Reason.METHOD: "invalid",
    Reason.REQUEST_TIMED_OUT: "invalid",
    Reason.MISDIRECTED: "invalid",
    Reason.NO_UPGRADE: "invalid",
    Reason.WEBSOCKET_VERSION: "invalid",
    Reason.HEAD_TOO_LARGE: "invalid",
    Reason.TOO_MANY_FIELDS: "invalid",
    Reason.HTTP_VERSION: "invalid",
    Reason.CLIENT_CERTIFICATE: "blocked",
    Reason.CLIENT_EXPIRED: "blocked",
    Reason.CLIENT_REVOKED: "blocked",
    Reason.CLIENT_CRL_EXPIRED: "blocked",
    Reason.CLIENT_NO_CRL: "blocked",
    Reason.AMBIGUOUS_TARGET: "blocked",
    Reason.TOO_MANY_QUERY_VALUES: "blocked",
    Reason.TOO_MANY_COOKIES: "blocked",
    Reason.TOO_MANY_ELEMENTS: "blocked",
    Reason.REPEATED_FIELD: "blocked",
    Reason.ADDRESS_BLOCKED: "blocked",
    Reason.ADDRESS_NOT_ALLOWED: "blocked",
    Reason.WEB_ORIGIN_MISSING: "blocked",
    Reason.WEB_ORIGIN_NOT_ALLOWED: "blocked",
    Reason.RULE: "blocked",
    Reason.MANAGED_RULES: "blocked",
    Reason.MANAGED_RULES_GUARD: "blocked",
    Reason.MANAGED_RULES_FAILURE: "blocked",
    Reason.RATE_LIMIT: "limited",
    Reason.NOT_COUNTED: "limited",
    Reason.THROTTLED: "limited",
    Reason.TOO_MANY_UPLOADS: "limited",
    Reason.WORKER_FAILED: "worker",
    Reason.WORKER_ORIGIN: "worker",
    Reason.WORKER_BUSY: "worker",
    Reason.WORKER_TIMED_OUT: "worker",
    Reason.WORKER_REPLY: "worker",
    Reason.WORKER_EXPIRED: "worker",
}
"""Why a request was refused; for every other reason it was because of the origin."""


def find_kind(record: Record) -> Kind | None:
    """Return the kind of a connection that has ended and had no tunnel. None if a plain request was answered."""
    if record.verdict == Decision.NONE:
        return "unfinished"
    if record.verdict == Decision.PASS:
        return None if record.reason == Reason.RESPONDED else "declined"
    reason = fixed_reason(record.reason)
    return REFUSALS.get(reason, "origin") if reason is not None else "origin"
