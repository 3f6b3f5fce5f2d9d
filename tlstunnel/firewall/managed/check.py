"""The check by managed rules: the guard, the evaluation, and what a score or a failure means for a site."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus

from tlstunnel.addresses import to_client_key
from tlstunnel.config import SiteManagedRules
from tlstunnel.firewall.facts import Facts
from tlstunnel.firewall.managed import guard
from tlstunnel.firewall.managed.messages import Evaluation, Match, Subject
from tlstunnel.firewall.managed.pool import Failure, HelperPool
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.journal.events import Reason
from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Registry

PENALTY = 10.0
"""Seconds for which requests of an address (for IPv6, of a /64) are not evaluated after one missed its deadline. Such a
request occupies a helper until the deadline, and 20 per second would occupy one permanently."""

MAX_PENALTIES = 4096
"""Addresses with a penalty. The oldest are dropped first."""

_BLOCKED = "the firewall refused this request"
_UNAVAILABLE = "the firewall cannot check this request now; try again"


@dataclass(frozen=True, slots=True)
class ManagedRulesOutcome:
    """The decision of the managed rules about a request.

    `logged` holds the reason for which the request would be refused if the mode were not "log". `failure` says why it
    was not evaluated. `matches` and `guard_reason` are set whatever the decision.
    """

    refusal: Refusal | None = None
    score: int = 0
    matches: tuple[Match, ...] = ()
    denied_by: int = 0
    guard_reason: str = ""
    failure: str = ""
    logged: tuple[str, ...] = ()


class ManagedRulesCheck:
    """A site's managed rules: its settings, and the name of its rule set in the pool that all sites share.

    `metrics` counts the outcome of each evaluation, and the rules that matched.
    """

    def __init__(
        self,
        pool: HelperPool,
        rule_set: str,
        settings: SiteManagedRules,
        metrics: Registry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._rule_set = rule_set
        self._settings = settings
        self._outcomes = metrics[families.MANAGED_RULES]
        self._matches = metrics[families.MANAGED_RULE_MATCHES]
        self._penalties = _Penalties(clock)

    async def check(self, facts: Facts, trace: list[object] | None = None) -> ManagedRulesOutcome:
        """Check a request. Never raises. `trace` receives the outcome."""
        outcome = await self._evaluate(facts)
        if trace is not None:
            trace.append(outcome)
        return outcome

    async def _evaluate(self, facts: Facts) -> ManagedRulesOutcome:
        request = facts.request
        if guard_reason := guard.find_problem(request.target, request.fields):
            return self._refuse_by_guard(guard_reason, facts.site)
        if self._penalties.holds(facts.ip):
            return self._fail("late before", facts.site)
        subject = Subject(facts.ip, request.target, request.fields, request.method)
        result = await self._pool.evaluate(self._rule_set, subject, self._settings.timeout)
        if isinstance(result, Failure):
            if result is Failure.LATE:
                self._penalties.add(facts.ip)
            return self._fail(result.value, facts.site)
        return self._conclude(result, facts.site)

    def _refuse_by_guard(self, guard_reason: str, site: str) -> ManagedRulesOutcome:
        """Refuse what the guard found as an attack, not as a failure of ours, whatever ``on_failure`` says."""
        self._outcomes.add(site, "guard")
        if self._settings.mode == "log":
            return ManagedRulesOutcome(guard_reason=guard_reason, logged=(Reason.MANAGED_RULES_GUARD,))
        refusal = Refusal(403, Reason.MANAGED_RULES_GUARD, _BLOCKED, detail=guard_reason)
        return ManagedRulesOutcome(refusal, guard_reason=guard_reason)

    def _fail(self, failure: str, site: str) -> ManagedRulesOutcome:
        self._outcomes.add(site, failure)
        if self._settings.mode == "log" or self._settings.on_failure == "allow":
            return ManagedRulesOutcome(failure=failure)
        refusal = Refusal(503, Reason.MANAGED_RULES_FAILURE, _UNAVAILABLE, detail=failure)
        return ManagedRulesOutcome(refusal, failure=failure)

    def _conclude(self, evaluation: Evaluation, site: str) -> ManagedRulesOutcome:
        for number in {match.id for match in evaluation.matches}:
            self._matches.add(str(number))
        found = ManagedRulesOutcome(None, evaluation.score, evaluation.matches, evaluation.denied_by)
        if evaluation.score < self._settings.threshold and not evaluation.denied_by:
            self._outcomes.add(site, "passed")
            return found
        if self._settings.mode == "log":
            self._outcomes.add(site, "logged")
            return replace(found, logged=(Reason.MANAGED_RULES,))
        self._outcomes.add(site, "blocked")
        status = _valid_status(evaluation.status) if evaluation.denied_by else 403
        refusal = Refusal(status, Reason.MANAGED_RULES, _BLOCKED, detail=_describe(evaluation))
        return replace(found, refusal=refusal)


def _describe(evaluation: Evaluation) -> str:
    rules = [f"{match.id} {match.message}" for match in evaluation.matches[:8]]
    return f"score {evaluation.score}: " + "; ".join(rules)


def _valid_status(status: int) -> int:
    """Return the status that a user's rule sets, or 403 if a refusal cannot have it."""
    return status if 400 <= status <= 599 and status in HTTPStatus.__members__.values() else 403


class _Penalties:
    """The addresses whose requests are not evaluated for a while."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: OrderedDict[str, float] = OrderedDict()

    def add(self, ip: str) -> None:
        if not ip:  # a Unix socket: all clients would wait for one
            return
        self._until[to_client_key(ip)] = self._clock() + PENALTY
        if len(self._until) > MAX_PENALTIES:
            self._until.popitem(last=False)

    def holds(self, ip: str) -> bool:
        # Called for every request, and almost always empty.
        return bool(self._until) and self._until.get(to_client_key(ip), 0.0) > self._clock()
