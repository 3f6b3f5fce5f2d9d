"""The kinds of usage of connections without a tunnel."""

import pytest

from tests.unit.test_journal_lines import filled
from tlstunnel.journal.events import Decision, Reason
from tlstunnel.journal.kinds import REFUSALS, find_kind
from tlstunnel.metrics.usage import FIELDS

REASONS = list(Reason)
REFUSED = REASONS[REASONS.index(Reason.MALFORMED_HEAD) : REASONS.index(Reason.UNTRUSTED_PROXY)]
AT_THE_ORIGIN = REFUSED[REFUSED.index(Reason.TOO_MANY_UPLOADS) + 1 :]


def test_every_refusal_has_a_kind() -> None:
    assert set(REFUSALS) == set(REFUSED) - set(AT_THE_ORIGIN)
    assert AT_THE_ORIGIN[0] == Reason.ORIGIN_UNREACHABLE
    assert set(REFUSALS.values()) < set(FIELDS)


@pytest.mark.parametrize(
    ("verdict", "reason", "kind"),
    [
        (Decision.NONE, Reason.CLOSED_DURING_HANDSHAKE, "unfinished"),
        (Decision.NONE, "TLS error: BAD_RECORD", "unfinished"),
        (Decision.REFUSED, Reason.NO_UPGRADE, "invalid"),
        (Decision.REFUSED, "rule: no-bots", "blocked"),
        (Decision.REFUSED, "rate limit: by-address", "limited"),
        (Decision.REFUSED, Reason.WORKER_REPLY, "worker"),
        (Decision.REFUSED, Reason.ORIGIN_UNREACHABLE, "origin"),
        (Decision.REFUSED, "of a later release", "origin"),
        (Decision.PASS, Reason.DECLINED, "declined"),
        (Decision.PASS, Reason.RESPONDED, None),
    ],
)
def test_the_kind_of_a_record(verdict: str, reason: str, kind: str | None) -> None:
    record = filled()
    record.status, record.verdict, record.reason = 200, verdict, reason
    assert find_kind(record) == kind
