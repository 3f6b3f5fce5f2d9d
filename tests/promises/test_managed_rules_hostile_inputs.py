"""No input keeps the managed rules busy: each is decided within 100 ms, and so is the next client's."""

import os
import signal
import time
from urllib.parse import quote

import pytest

from tests.corpus.managed_rules import facts, helper_pids, plain_request, require_crs, with_pool
from tlstunnel.config import SiteManagedRules, Timeout
from tlstunnel.firewall.managed.check import PENALTY, ManagedRulesCheck, ManagedRulesOutcome
from tlstunnel.firewall.managed.pool import HelperPool
from tlstunnel.firewall.managed.rule_sets import build
from tlstunnel.metrics.families import MANAGED_RULES
from tlstunnel.metrics.registry import Registry

LONGEST = 0.1
ATTEMPTS = 3
"""The best of these attempts counts: a busy machine may delay a process for longer, but not every time."""


def query(text: str) -> tuple[str, tuple[str, ...]]:
    return f"/chat?x={quote(text, safe='$(){}[]')}", ()


def cookie(text: str) -> tuple[str, tuple[str, ...]]:
    return "/chat", (f"Cookie: a={text}",)


HOSTILE = {
    "8 kB of $( in an argument": query("$(" * 4000),
    "8 kB of $( encoded": ("/chat?x=" + "%24%28" * 1300, ()),
    "$( encoded twice": ("/chat?x=" + "%2524%2528" * 800, ()),
    "$( as %u escapes": ("/chat?x=" + "%u0024%u0028" * 600, ()),
    "1 kB of {": query("{" * 1000),
    "1 kB of ${": query("${" * 500),
    "1 kB of line feeds": query("\n" * 1000),
    "1 kB of backslash and n": query("\\n" * 500),
    "4 kB cookie of brackets": cookie("[" * 4000),
    "4 kB cookie of mixed brackets": cookie("[{(" * 1300),
    "4 kB User-Agent of parentheses": ("/chat", ("User-Agent: " + "()" * 2000,)),
    "4 kB Referer of slashes": ("/chat", ("Referer: https://a.example" + "/" * 4000,)),
    "4 kB path of slashes": ("/" * 4000, ()),
    "120 arguments": ("/chat?" + "&".join(f"a{number}=x" for number in range(120)), ()),
    "64 arguments of $(": ("/chat?" + "&".join(f"a{number}={'$(' * 15}" for number in range(64)), ()),
    # Below the guard's limits: the deadline applies to these.
    "8 kB of a=": query("a=" * 4000),
    "8 kB of a'": query("a'" * 2500),
    "8 kB of $(a": query("$(a" * 2500),
    "6 kB of <a": query("<a" * 2000),
    "8 kB of (select": query("(select" * 1100),
    "14 kB of letters": query("a" * 14_000),
    "runs of 30": query(("$(" * 15 + "a") * 250),
    "4 kB cookie of short runs": cookie("[{a" * 1300),
    "14 kB of %ff": ("/chat?x=" + "%ff" * 4600, ()),
}


@pytest.mark.alone
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_is_decided_in_time(name: str) -> None:
    require_crs()
    settings = SiteManagedRules(owasp_crs=True)
    rule_set = build(settings)
    hostile, ordinary = plain_request(HOSTILE[name][0], *HOSTILE[name][1]), plain_request("/chat?room=1")

    async def ask(pool: HelperPool) -> tuple[list[float], list[float], ManagedRulesOutcome]:
        stage = ManagedRulesCheck(pool, rule_set.name, settings, Registry())
        first, second = [], []
        for attempt in range(ATTEMPTS):
            began = time.perf_counter()
            outcome = await stage.check(facts(hostile, f"203.0.113.{attempt}"))
            first.append(time.perf_counter() - began)
            began = time.perf_counter()
            after = await stage.check(facts(ordinary, "198.51.100.1"))
            second.append(time.perf_counter() - began)
            assert after == ManagedRulesOutcome()
        return first, second, outcome

    first, second, outcome = with_pool(HelperPool([rule_set]), ask)
    verdict = outcome.guard_reason or outcome.failure or f"score {outcome.score}"
    print(f"{name}: {min(first) * 1000:.1f} ms ({verdict}), the next client {min(second) * 1000:.1f} ms")
    assert min(first) < LONGEST
    assert min(second) < LONGEST


def test_address_that_missed_the_deadline_is_not_evaluated_for_a_while() -> None:
    require_crs()
    settings = SiteManagedRules(owasp_crs=True, timeout=Timeout(0.5))
    rule_set = build(settings)
    metrics = Registry()
    now = 0.0

    async def ask(pool: HelperPool) -> None:
        nonlocal now
        stage = ManagedRulesCheck(pool, rule_set.name, settings, metrics, clock=lambda: now)
        request = plain_request("/chat")
        os.kill(helper_pids(pool)[0], signal.SIGSTOP)
        late = await stage.check(facts(request, "2001:db8::1"))
        assert late.failure == "late"
        assert late.refusal is not None
        assert late.refusal.status == 503
        assert (await stage.check(facts(request, "2001:db8::2"))).failure == "late before"  # of the same /64
        assert not (await stage.check(facts(request, "2001:db8:0:1::1"))).failure
        now = PENALTY
        assert not (await stage.check(facts(request, "2001:db8::1"))).failure

    with_pool(HelperPool([rule_set]), ask)
    outcomes = {outcome: count for (_, outcome), count in metrics[MANAGED_RULES].values.items()}
    assert (outcomes["late"], outcomes["late before"]) == (1, 1)
