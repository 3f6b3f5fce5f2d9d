"""What a score, a refusal by the guard and a failure mean for a site."""

import asyncio
from typing import Literal

import pytest

from tests.corpus.managed_rules import categories, facts, plain_request, rule_ids
from tlstunnel.config import SiteManagedRules
from tlstunnel.firewall.managed import check
from tlstunnel.firewall.managed.categories import LOG4SHELL, name_category
from tlstunnel.firewall.managed.check import ManagedRulesCheck, ManagedRulesOutcome
from tlstunnel.firewall.managed.messages import Evaluation, Match, Subject
from tlstunnel.firewall.managed.pool import Failure, HelperPool
from tlstunnel.handshake.refusal import render_refusal
from tlstunnel.metrics.families import MANAGED_RULE_MATCHES, MANAGED_RULES
from tlstunnel.metrics.registry import Registry

SQLI, XSS = Match(942100, "SQL", 2, "a"), Match(941100, "XSS", 2, "b")
HOSTILE = "/?x=" + "$(" * 100


class Answers(HelperPool):
    """A pool that returns a given result. Real failures of each kind are in the promises."""

    def __init__(self, result: Evaluation | Failure) -> None:
        super().__init__([])
        self.result = result
        self.asked: list[tuple[str, Subject, float]] = []

    async def evaluate(self, rule_set: str, subject: Subject, deadline: float) -> Evaluation | Failure:
        self.asked.append((rule_set, subject, deadline))
        return self.result


def evaluate(
    result: Evaluation | Failure, settings: SiteManagedRules, target: str = "/?x=1"
) -> tuple[ManagedRulesOutcome, dict[str, int]]:
    """Return the outcome, and the counts of each outcome and each rule."""
    metrics = Registry()
    stage = ManagedRulesCheck(Answers(result), "set", settings, metrics)
    outcome = asyncio.run(stage.check(facts(plain_request(target))))
    outcomes = {labels[-1]: count for labels, count in metrics[MANAGED_RULES].values.items()}
    matches = {rule: count for (rule,), count in metrics[MANAGED_RULE_MATCHES].values.items()}
    return outcome, outcomes | matches


def test_pool_receives_the_request_as_sent() -> None:
    pool = Answers(Evaluation(0))
    trace: list[object] = []
    request = plain_request("/%61?x=%31", "User-Agent: T")
    stage = ManagedRulesCheck(pool, "set", SiteManagedRules(), Registry())
    outcome = asyncio.run(stage.check(facts(request, "::ffff:203.0.113.7"), trace))
    assert pool.asked == [("set", Subject("203.0.113.7", b"/%61?x=%31", request.fields), 0.05)]
    assert trace == [outcome] == [ManagedRulesOutcome()]


@pytest.mark.parametrize(("score", "blocked"), [(0, False), (4, False), (5, True), (100, True)])
def test_threshold(score: int, blocked: bool) -> None:
    outcome, counters = evaluate(Evaluation(score, (SQLI, XSS, SQLI)), SiteManagedRules())
    assert (outcome.score, rule_ids(outcome)) == (score, (942100, 941100))
    assert categories(outcome) == ("SQL injection", "cross-site scripting")
    assert counters["942100"] == counters["941100"] == 1
    assert counters == {"blocked" if blocked else "passed": 1, "942100": 1, "941100": 1}
    if blocked:
        assert outcome.refusal is not None
        assert (outcome.refusal.status, outcome.refusal.reason) == (403, "managed rules")
        assert outcome.refusal.detail.startswith(f"score {score}: 942100 SQL; 941100 XSS")
        assert b"SQL" not in render_refusal(outcome.refusal, "id")  # the client does not learn what to change
    else:
        assert outcome.refusal is None


@pytest.mark.parametrize(("status", "given"), [(403, 403), (429, 429), (503, 503), (200, 403), (302, 403), (499, 403)])
def test_denying_rule_sets_a_valid_status(status: int, given: int) -> None:
    outcome, _ = evaluate(Evaluation(0, (Match(7, "own", 0, ""),), denied_by=7, status=status), SiteManagedRules())
    assert outcome.refusal is not None
    assert outcome.refusal.status == given
    assert render_refusal(outcome.refusal, "id")


def test_mode_log_refuses_nothing() -> None:
    settings = SiteManagedRules(mode="log")
    for evaluation in (Evaluation(50, (SQLI,)), Evaluation(0, (SQLI,), denied_by=942100, status=403)):
        outcome, counters = evaluate(evaluation, settings)
        assert outcome.refusal is None
        assert outcome.logged == ("managed rules",)
        assert outcome.matches == (SQLI,)
        assert counters["logged"] == 1
    outcome, counters = evaluate(Evaluation(0), settings, HOSTILE)
    assert (outcome.refusal, outcome.logged) == (None, ("managed rules: guard",))
    assert counters["guard"] == 1
    for failure in Failure:
        outcome, counters = evaluate(failure, settings)
        assert (outcome.refusal, outcome.logged, outcome.failure) == (None, (), failure.value)
        assert counters[failure.value] == 1


@pytest.mark.parametrize("on_failure", ["block", "allow"])
@pytest.mark.parametrize("failure", list(Failure))
def test_failure_follows_on_failure(failure: Failure, on_failure: Literal["block", "allow"]) -> None:
    outcome, counters = evaluate(failure, SiteManagedRules(on_failure=on_failure))
    assert counters == {failure.value: 1}
    assert outcome.failure == failure.value
    if on_failure == "allow":
        assert outcome.refusal is None
    else:
        assert outcome.refusal is not None
        assert (outcome.refusal.status, outcome.refusal.reason) == (503, "managed rules: failure")
        assert outcome.refusal.detail == failure.value


@pytest.mark.parametrize("on_failure", ["block", "allow"])
def test_a_refusal_by_the_guard_does_not_depend_on_on_failure(on_failure: Literal["block", "allow"]) -> None:
    outcome, _ = evaluate(Evaluation(0), SiteManagedRules(on_failure=on_failure), HOSTILE)
    assert outcome.refusal is not None
    assert (outcome.refusal.status, outcome.refusal.reason) == (403, "managed rules: guard")
    assert outcome.guard_reason == outcome.refusal.detail != ""


def test_penalties_are_by_address_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_PENALTIES", 3)
    now = 0.0
    penalties = check._Penalties(lambda: now)
    penalties.add("")
    assert not penalties.holds("")
    penalties.add("203.0.113.1")
    assert penalties.holds("203.0.113.1")
    assert not penalties.holds("203.0.113.2")
    assert not penalties.holds("2001:db8::1")
    now = check.PENALTY
    assert not penalties.holds("203.0.113.1")
    for number in range(10):
        penalties.add(f"2001:db8:0:{number:x}::1")
    assert [penalties.holds(f"2001:db8:0:{number:x}::ffff") for number in range(10)] == [False] * 7 + [True] * 3


def test_categories() -> None:
    assert name_category(942100) == name_category(942999) == "SQL injection"
    assert name_category(LOG4SHELL) == "Java attack"
    assert (name_category(980100), name_category(1001), name_category(99_900_000)) == ("other", "own rule", "own rule")
