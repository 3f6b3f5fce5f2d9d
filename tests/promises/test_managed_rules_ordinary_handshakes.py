"""Ordinary handshakes of browsers, libraries and applications pass OWASP CRS."""

import re

import pytest

from tests.corpus import corpus
from tests.corpus.managed_rules import UNHURRIED, evaluate_samples, require_crs
from tlstunnel.config import SiteManagedRules
from tlstunnel.firewall.managed.check import ManagedRulesOutcome
from tlstunnel.firewall.managed.rule_sets import DEBIAN_CRS

HANDSHAKES = corpus.handshakes()
PROFILES = corpus.profile_handshakes()


@pytest.fixture(scope="module")
def outcomes() -> dict[str, ManagedRulesOutcome]:
    require_crs()
    return evaluate_samples(HANDSHAKES, SiteManagedRules(owasp_crs=True, timeout=UNHURRIED))


def test_the_corpus_is_large() -> None:
    assert len({handshake.name for handshake in HANDSHAKES}) == len(HANDSHAKES) >= 60


@pytest.mark.parametrize("handshake", HANDSHAKES, ids=lambda handshake: handshake.name)
def test_ordinary_handshake_passes(handshake: corpus.Sample, outcomes: dict[str, ManagedRulesOutcome]) -> None:
    assert outcomes[handshake.name] == ManagedRulesOutcome()


@pytest.mark.parametrize("handshake", PROFILES, ids=lambda handshake: handshake.name)
def test_handshake_passes_with_its_profile_only(handshake: corpus.Sample) -> None:
    require_crs()

    def evaluate(profiles: tuple[str, ...]) -> ManagedRulesOutcome:
        settings = SiteManagedRules(
            owasp_crs=True,
            paranoia=handshake.paranoia,
            profiles=profiles,  # type: ignore[arg-type]
            timeout=UNHURRIED,
        )
        return evaluate_samples([handshake], settings)[handshake.name]

    stock = evaluate(())
    if handshake.until and _crs_version() > _numbers(handshake.until):
        assert stock.refusal is None
    else:
        assert stock.refusal is not None
        assert stock.score >= 5
    assert evaluate((handshake.profile,)).refusal is None


def _crs_version() -> tuple[int, ...]:
    head = (DEBIAN_CRS / "rules" / "REQUEST-901-INITIALIZATION.conf").read_text()[:1000]
    found = re.search(r"ver\.([0-9.]+)", head)
    assert found is not None, head
    return _numbers(found[1])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_profile_excludes_nothing_else() -> None:
    """An attack beside the excluded argument is still blocked."""
    require_crs()
    attacks = [attack for attack in corpus.attacks() if "?host=" in attack.request.target.decode()]
    every = ("kubernetes", "signalr", "grafana", "keycloak", "proxmox", "guacamole", "nextjs")
    found = evaluate_samples(attacks, SiteManagedRules(owasp_crs=True, profiles=every, timeout=UNHURRIED))  # type: ignore[arg-type]
    assert len(attacks) >= 4
    assert all(outcome.refusal is not None for outcome in found.values())
