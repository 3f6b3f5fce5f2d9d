"""The checks that need libraries of their own (CEL, limits, libmodsecurity), built from the configuration.

This module is imported only if the configuration has such a check: importing its libraries takes as long as importing
everything else.

Tested by tests/unit/test_firewall_verdict.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from tlstunnel.config import Config, RateLimitConfig, RuleConfig, SiteConfig
from tlstunnel.config.problems import Problems
from tlstunnel.errors import ConfigurationError
from tlstunnel.escaping import printable
from tlstunnel.firewall.expressions import Expressions
from tlstunnel.firewall.lists import NamedLists
from tlstunnel.firewall.managed.check import ManagedRulesCheck
from tlstunnel.firewall.managed.messages import RuleSet
from tlstunnel.firewall.managed.pool import HelperPool
from tlstunnel.firewall.managed.rule_sets import build
from tlstunnel.firewall.rate_limits import RateLimits
from tlstunnel.firewall.rules import Rules
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.metrics.registry import Registry
from tlstunnel.state.counters import Counters
from tlstunnel.state.memory import MemoryCounters

SiteChecks = tuple[Rules | None, RateLimits | None, ManagedRulesCheck | None]
"""The rules, rate limits and managed rules of a site; None for a check that is not configured."""

CheckConfig = TypeVar("CheckConfig", RuleConfig, RateLimitConfig)
Built = TypeVar("Built")
Addable = TypeVar("Addable", Rules, RateLimits)


class OptionalChecks:
    """Rules, rate limits and managed rules of all sites. `pool` is None if no site has managed rules.

    `by_site` has the checks of each site, by the site's index. Rules and limits of all sites come before the site's
    own. `make_counters` returns what counts for the rate limits. Raises InvalidConfiguration with every problem.
    """

    def __init__(
        self,
        config: Config,
        sites: Sequence[SiteConfig],
        lists: NamedLists,
        metrics: Registry,
        make_counters: Callable[[], Counters] | None = None,
    ) -> None:
        self._metrics = metrics
        self._counters: Counters = MemoryCounters() if make_counters is None else make_counters()
        self._expressions = Expressions(lists)
        problems = Problems()
        rules = _build_or_collect(self._build_rules, config.rules, problems, "rules")
        limits = _build_or_collect(partial(self._build_limits, scope=""), config.rate_limits, problems, "rate_limits")
        own = []
        rule_sets: dict[int, RuleSet] = {}
        for index, site in enumerate(sites):
            own.append(self._build_own(index, site, problems))
            if site.managed_rules is not None:
                with problems.collect("sites", index, "managed_rules"):
                    rule_sets[index] = build(site.managed_rules)
        problems.raise_found()
        helpers = config.managed_rules
        self.pool = (
            HelperPool(list(rule_sets.values()), helpers.processes, helpers.queue, log=_warn) if rule_sets else None
        )
        self.by_site: tuple[SiteChecks, ...] = tuple(
            self._combine(site, (rules, limits), own[index], rule_sets.get(index)) for index, site in enumerate(sites)
        )

    def _build_own(self, index: int, site: SiteConfig, problems: Problems) -> tuple[Rules | None, RateLimits | None]:
        """Build the rules and limits of one site. Problems name the site, since an index is hard to find in a file."""
        name = f"site {site.names[0]}, "
        path = ("sites", index)
        limits = partial(self._build_limits, scope=site.names[0])
        return (
            _build_or_collect(self._build_rules, site.rules, problems, *path, "rules", name=name),
            _build_or_collect(limits, site.rate_limits, problems, *path, "rate_limits", name=name),
        )

    def _combine(
        self,
        site: SiteConfig,
        common: tuple[Rules | None, RateLimits | None],
        own: tuple[Rules | None, RateLimits | None],
        rule_set: RuleSet | None,
    ) -> SiteChecks:
        managed = None
        if self.pool is not None and site.managed_rules is not None and rule_set is not None:
            managed = ManagedRulesCheck(self.pool, rule_set.name, site.managed_rules, self._metrics)
        return _add(common[0], own[0]), _add(common[1], own[1]), managed

    def _build_rules(self, configs: Sequence[RuleConfig]) -> Rules:
        return Rules(
            configs, self._expressions, metrics=self._metrics, report=_make_reporter(Event.RULE_FAILED, "rule")
        )

    def _build_limits(self, configs: Sequence[RateLimitConfig], scope: str) -> RateLimits:
        report = _make_reporter(Event.RATE_LIMIT_CONDITION_FAILED, "rate_limit")
        condition = self._expressions.condition
        return RateLimits(configs, self._counters, condition, scope=scope, metrics=self._metrics, report=report)


def _make_reporter(event: Event, what: str) -> Callable[[str, str], None]:
    def report(name: str, error: str) -> None:
        structlog.get_logger().warning(event, **{what: name}, reason=printable(error))

    return report


def _build_or_collect(
    build: Callable[[Sequence[CheckConfig]], Built],
    configs: Sequence[CheckConfig],
    problems: Problems,
    *path: str | int,
    name: str = "",
) -> Built | None:
    """Build what `configs` describe, None if there are none. If that fails, build each alone, to find all problems."""
    if not configs:
        return None
    try:
        return build(configs)
    except ConfigurationError as error:
        whole = error
    before = len(problems.found)
    for index, config in enumerate(configs):
        try:
            build((config,))
        except ConfigurationError as error:
            problems.add(f"{name}{error}", *path, index)
    if len(problems.found) == before:  # each is valid, but they conflict
        problems.add(f"{name}{whole}", *path)
    return None


def _add(first: Addable | None, second: Addable | None) -> Addable | None:
    return first + second if first is not None and second is not None else first if first is not None else second


def _warn(sentence: str) -> None:
    structlog.get_logger().warning(Event.MANAGED_RULES, reason=sentence)
