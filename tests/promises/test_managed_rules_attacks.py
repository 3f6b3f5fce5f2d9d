"""Attacks are refused with 403, and the record names their category."""

import pytest

from tests.corpus import corpus
from tests.corpus.managed_rules import UNHURRIED, categories, evaluate_samples, require_crs, rule_ids
from tlstunnel.config import SiteManagedRules
from tlstunnel.firewall.managed.check import ManagedRulesOutcome

ATTACKS = corpus.attacks()
SETTINGS = SiteManagedRules(owasp_crs=True, timeout=UNHURRIED)
CATEGORIES = {
    "SQL injection",
    "cross-site scripting",
    "path traversal",
    "remote file inclusion",
    "command injection",
    "PHP injection",
    "code injection",
    "Java attack",
    "scanner",
    "session fixation",
    "protocol attack",
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, ManagedRulesOutcome]:
    require_crs()
    return evaluate_samples(ATTACKS, SETTINGS)


def test_the_corpus_is_large_and_wide() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 60
    assert {attack.category for attack in ATTACKS} == CATEGORIES


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_is_blocked_with_its_category(attack: corpus.Sample, outcomes: dict[str, ManagedRulesOutcome]) -> None:
    outcome = outcomes[attack.name]
    assert outcome.refusal is not None, (outcome.score, rule_ids(outcome))
    assert (outcome.refusal.status, outcome.refusal.reason) == (403, "managed rules")
    assert outcome.score >= SETTINGS.threshold
    assert attack.category in categories(outcome)
    assert all(match.message for match in outcome.matches)
    assert str(rule_ids(outcome)[0]) in outcome.refusal.detail
    assert not outcome.logged


def test_in_mode_log_none_is_blocked() -> None:
    require_crs()
    some = ATTACKS[::10]
    found = evaluate_samples(some, SiteManagedRules(owasp_crs=True, mode="log", timeout=UNHURRIED))
    for attack in some:
        outcome = found[attack.name]
        assert outcome.refusal is None
        assert outcome.logged == ("managed rules",)
        assert outcome.score >= 5
        assert outcome.matches


def test_excluded_rules_and_a_higher_threshold_let_an_attack_through() -> None:
    require_crs()
    sample = next(attack for attack in ATTACKS if attack.name == "SQL injection: tautology in an argument")
    before = evaluate_samples([sample], SETTINGS)[sample.name]
    excluded = SiteManagedRules(owasp_crs=True, exclude=rule_ids(before), timeout=UNHURRIED)
    assert evaluate_samples([sample], excluded)[sample.name] == ManagedRulesOutcome()
    patient = SiteManagedRules(owasp_crs=True, threshold=before.score + 1, timeout=UNHURRIED)
    outcome = evaluate_samples([sample], patient)[sample.name]
    assert outcome.refusal is None
    assert outcome.score == before.score
    assert rule_ids(outcome) == rule_ids(before)
