"""The managed rules' part of a verdict: the guard, the evaluation, and what a score or a failure means for a site."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from ipaddress import IPv6Address

from tlstunnel.config import SiteManagedRules
from tlstunnel.firewall.facts import Facts
from tlstunnel.firewall.managed import guard
from tlstunnel.firewall.managed.categories import name_category
from tlstunnel.firewall.managed.messages import Evaluation, Match, Subject
from tlstunnel.firewall.managed.pool import Failure, HelperPool
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.journal.events import Reason
from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Registry

PENALTY = 10.0
"""Seconds for which an address (a /64 of IPv6) whose request was late is not evaluated again: a request that makes
libmodsecurity hang takes a helper for the whole of the deadline, and 20 a second would take one for good."""

MAX_PENALTIES = 4096
"""Addresses that are remembered for it, the oldest forgotten first."""

_BLOCKED = "the firewall refused this request"
_UNAVAILABLE = "the firewall cannot judge this request now; try again"


@dataclass(frozen=True, slots=True)
class ManagedRulesOutcome:
    """What the managed rules make of a request.

    `logged` has what would have refused it (``managed rules``, ``managed rules: guard``) had the mode been "block".
    `failure` says why there was no evaluation. `matches` and `guard_reason` are there whatever the verdict.
    """

    refusal: Refusal | None = None
    score: int = 0
    matches: tuple[Match, ...] = ()
    denied_by: int = 0
    guard_reason: str = ""
    failure: str = ""
    logged: tuple[str, ...] = ()

    @property
    def rule_ids(self) -> tuple[int, ...]:
        """The ids of the rules that matched, each once, in order."""
        return tuple(dict.fromkeys(match.id for match in self.matches))

    @property
    def categories(self) -> tuple[str, ...]:
        """What the rules that matched look for: ``SQL injection``, ``cross-site scripting``, ..."""
        return tuple(dict.fromkeys(name_category(match.id) for match in self.matches))


class ManagedRulesCheck:
    """A site's managed rules: its settings, and the name of its rule set in a pool that others use too.

    `metrics` count the outcome of each evaluation, and the rules that matched.
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
        self._rules_set = rule_set
        self._settings = settings
        self._outcomes = metrics[families.MANAGED_RULES]
        self._matches = metrics[families.MANAGED_RULE_MATCHES]
        self._penalties = _Penalties(clock)

    async def judge(self, facts: Facts, trace: list[object] | None = None) -> ManagedRulesOutcome:
        """Judge a request; ``trace``, for a person who asks why, receives the outcome. Never raises."""
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
        result = await self._pool.judge(self._rules_set, subject, self._settings.timeout)
        if isinstance(result, Failure):
            if result is Failure.LATE:
                self._penalties.add(facts.ip)
            return self._fail(result.value, facts.site)
        return self._conclude(result, facts.site)

    def _refuse_by_guard(self, guard_reason: str, site: str) -> ManagedRulesOutcome:
        """What the guard stops is refused as an attack, not as a fault of ours, whatever ``on_failure`` says."""
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
    """Take the status that a user's rule names, if a refusal can have it."""
    return status if 400 <= status <= 599 and status in HTTPStatus.__members__.values() else 403


class _Penalties:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: OrderedDict[str, float] = OrderedDict()

    def add(self, ip: str) -> None:
        self._until[_network_of(ip)] = self._clock() + PENALTY
        if len(self._until) > MAX_PENALTIES:
            self._until.popitem(last=False)

    def holds(self, ip: str) -> bool:
        # Asked for every request, and almost always empty.
        return bool(self._until) and self._until.get(_network_of(ip), 0.0) > self._clock()


def _network_of(ip: str) -> str:
    return IPv6Address(ip).packed[:8].hex() if ":" in ip else ip
