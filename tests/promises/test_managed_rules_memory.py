"""Evaluations do not leak memory in a helper."""

import asyncio
import os
import random
from pathlib import Path

import pytest

from tests.corpus import corpus
from tests.corpus.managed_rules import helper_pids, plain_request, require_crs, with_pool
from tlstunnel.config import SiteManagedRules
from tlstunnel.firewall.managed.messages import Evaluation, Subject
from tlstunnel.firewall.managed.pool import HelperPool
from tlstunnel.firewall.managed.rule_sets import build

KIB = 1024
WARM = 2_000
MOST = KIB * KIB
"""A leaked transaction would take 61 kB, a leaked text of an intervention 1 kB: 2 MB or more for 2 000."""


def private(pid: int) -> int:
    """Return the bytes that belong to this process alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * KIB for line in lines if line.startswith("Private_"))


def growth(evaluations: int) -> float:
    """Evaluate that many requests, all different, a fifth of them attacks; return a helper's growth once warm."""
    rule_set = build(SiteManagedRules(owasp_crs=True))
    chance = random.Random(1)
    attacks = [attack.request for attack in corpus.attacks() if len(attack.request.target) < 60][::3]

    def subject() -> Subject:
        ip = f"203.0.{chance.randrange(256)}.{chance.randrange(256)}"
        if chance.random() < 0.2:
            request = chance.choice(attacks)
        else:
            request = plain_request(
                f"/chat?n={chance.randrange(10**9)}", f"User-Agent: client/{chance.randrange(10**9)}"
            )
        return Subject(ip, request.target, request.fields)

    async def ask(pool: HelperPool) -> float:
        scores = 0

        async def some(count: int) -> None:
            nonlocal scores
            for _ in range(count):
                evaluation = await pool.evaluate(rule_set.name, subject(), 30)
                assert isinstance(evaluation, Evaluation)
                scores += bool(evaluation.score)

        await asyncio.gather(*(some(WARM // 4) for _ in range(4)))
        pids = helper_pids(pool)
        before = [private(pid) for pid in pids]
        await asyncio.gather(*(some(evaluations // 4) for _ in range(4)))
        assert helper_pids(pool) == pids
        assert scores > evaluations // 10
        return max(private(pid) - size for pid, size in zip(pids, before, strict=True))

    grown = with_pool(HelperPool([rule_set], processes=min(2, os.cpu_count() or 1), evaluations=10**9), ask)
    print(f"{evaluations} evaluations: a helper has grown by {grown / KIB:.0f} KiB")
    return grown


def test_memory_is_flat_over_2_000_evaluations() -> None:
    require_crs()
    assert growth(2_000) < MOST


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_memory_is_flat_over_a_million_evaluations() -> None:
    require_crs()
    # malloc's fragmentation takes two bytes for each: a helper is replaced after 100 000 evaluations.
    assert growth(1_000_000) < 4 * MOST
