"""Rules: the site owner's own expressions, evaluated in order, each with an action."""

import time
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from typing import Literal, Self

import cel

from tlstunnel.addresses import quoted
from tlstunnel.config import RuleConfig
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.expressions import EvaluationError, Expression, ExpressionError, Expressions, Scope
from tlstunnel.firewall.facts import Facts
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.journal.events import Reason
from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Registry

REPORT_SECONDS = 60.0
"""The shortest time between two reports of the same rule's failures, so that a client cannot fill the log."""

_SKIP_NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RulesOutcome:
    """The decision of the rules about a request.

    `refusal` is None if the request may pass. `rule` is the name of the rule that decided, with ``block`` or ``allow``,
    or "". `skip` holds the checks to skip: ``rate_limits``, ``managed_rules``. `logged` holds the names of the rules
    that matched and only log.
    """

    refusal: Refusal | None
    rule: str
    skip: frozenset[str]
    logged: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RuleTrace:
    """The result of one rule, for `tlstunnel firewall explain`. `values` are those of the fields it reads, by name."""

    rule: str
    action: str
    mode: str
    when: str
    result: Literal["matched", "not matched", "failed", "not evaluated"]
    error: str
    values: dict[str, object]


@dataclass(frozen=True, slots=True, eq=False)
class _Rule:
    config: RuleConfig
    expression: Expression


class Rules:
    """Rules in order. ``+`` joins those of all sites and those of one site.

    `metrics` counts each rule that matched or failed. `report` is called with the name and the error of a rule that
    failed, at most once a minute for each rule. Raises ConfigurationError, which names the rule and the place in its
    expression.
    """

    def __init__(
        self,
        configs: Iterable[RuleConfig],
        expressions: Expressions,
        *,
        metrics: Registry | None = None,
        report: Callable[[str, str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._expressions = expressions
        self._counts = (Registry() if metrics is None else metrics)[families.RULES]
        self._report = report
        self._clock = clock
        self._reported: dict[_Rule, float] = {}
        self._rules = tuple(_compile(config, expressions) for config in configs)
        self._scope = self._common_scope()

    def __add__(self, other: Self) -> Self:
        """Return these rules followed by `other`, which the same `Expressions` must have compiled."""
        joined = copy(self)
        joined._rules = self._rules + other._rules
        joined._scope = joined._common_scope()
        return joined

    def __len__(self) -> int:
        return len(self._rules)

    def evaluate(self, facts: Facts, trace: list[RuleTrace] | None = None) -> RulesOutcome:
        """Evaluate the rules in order, until one blocks or allows. `trace` receives a `RuleTrace` for each rule.

        Raises `Refusal` (400) if a cookie that a rule reads has more values than it is evaluated for.
        """
        logged: list[str] = []
        skip = _SKIP_NOTHING
        refusal, name = None, ""
        evaluated = 0
        context = self._scope.context(facts)
        for rule in self._rules:
            evaluated += 1
            matched, error = self._evaluate(rule, facts, context)
            if trace is not None:
                trace.append(_trace(rule, facts, "failed" if error else "matched" if matched else "not matched", error))
            effect = _determine_effect(rule.config, matched=matched, failed=bool(error))
            if effect == "log":
                logged.append(rule.config.name)
            elif effect == "skip":
                skip |= frozenset(rule.config.skip)
            elif effect:
                name = rule.config.name
                refusal = _refuse(rule.config, error) if effect == "block" else None
                break
        if trace is not None:
            trace += (_trace(rule, facts, "not evaluated", "") for rule in self._rules[evaluated:])
        return RulesOutcome(refusal, name, skip, tuple(logged))

    def _evaluate(self, rule: _Rule, facts: Facts, context: cel.Context) -> tuple[bool, str]:
        """Return whether the rule matches, and the error if it could not be evaluated.

        If a cookie has several values, one that matches is enough to block, but to allow or to skip checks all must
        match: the origin may use any of them.
        """
        every = rule.config.action in {"allow", "skip"}
        try:
            matched = self._expressions.matches(rule.expression, facts, context, every=every)
        except EvaluationError as error:
            self._report_failure(rule, str(error), facts.site)
            return False, str(error)
        if matched:
            self._counts.add(facts.site, rule.config.name, "matched")
        return matched, ""

    def _report_failure(self, rule: _Rule, error: str, site: str) -> None:
        self._counts.add(site, rule.config.name, "failed")
        now = self._clock()
        if self._report and now - self._reported.get(rule, -REPORT_SECONDS) >= REPORT_SECONDS:
            self._reported[rule] = now
            self._report(rule.config.name, error)

    def _common_scope(self) -> Scope:
        return self._expressions.scope(rule.expression for rule in self._rules)


def _compile(config: RuleConfig, expressions: Expressions) -> _Rule:
    try:
        expression = expressions.compile(config.when)
    except ExpressionError as error:
        raise ConfigurationError(f"rule {quoted(config.name)}: when: {error}") from None
    return _Rule(config, expression)


def _determine_effect(config: RuleConfig, *, matched: bool, failed: bool) -> str:
    """Return the action to take, or "" for none."""
    if not matched and not (failed and config.on_error == "block"):
        return ""
    if config.mode == "log":
        return "log"
    return config.action if matched else "block"


def _refuse(config: RuleConfig, error: str) -> Refusal:
    text = "refused by a rule of this site" if config.body is None else config.body
    return Refusal(config.status, f"{Reason.RULE}: {config.name}", text, detail=error)


def _trace(
    rule: _Rule, facts: Facts, result: Literal["matched", "not matched", "failed", "not evaluated"], error: str
) -> RuleTrace:
    config = rule.config
    values = {name: getattr(facts, name) for name in sorted(rule.expression.fields)}
    if "cookies" in values:
        values["cookies"] = {name: sent[0] if len(sent) == 1 else sent for name, sent in facts.cookie_values.items()}
    return RuleTrace(config.name, config.action, config.mode, config.when, result, error, values)
