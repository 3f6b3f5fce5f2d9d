"""The stages that need libraries of their own (CEL, limits, libmodsecurity), made from the configuration.

A module of its own, imported where a configuration has such a stage: the libraries take as long to import as all else.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import structlog

from tlstunnel.config import Config, RateLimitConfig, RuleConfig, SiteConfig
from tlstunnel.errors import ConfigurationError
from tlstunnel.escaping import printable
from tlstunnel.firewall.counters import Counters, MemoryCounters
from tlstunnel.firewall.expressions import Expressions
from tlstunnel.firewall.lists import NamedLists
from tlstunnel.firewall.managed.pool import Pool
from tlstunnel.firewall.managed.rules_sets import build
from tlstunnel.firewall.managed.verdict import ManagedRulesStage
from tlstunnel.firewall.rate_limits import RateLimits
from tlstunnel.firewall.rules import Rules
from tlstunnel.journal.events import Event
from tlstunnel.metrics.registry import Registry


class Stages:
    """Rules, rate limits and managed rules of all sites. `pool` is None where no site has managed rules.

    Raises ConfigurationError, which names the site and the rule.
    """

    def __init__(
        self,
        config: Config,
        sites: Sequence[SiteConfig],
        lists: NamedLists,
        metrics: Registry,
        counters: Counters | None = None,
    ) -> None:
        self._metrics = metrics
        self.counters: Counters = MemoryCounters() if counters is None else counters
        self._expressions = Expressions(lists)
        self._common_rules = self._rules(config.rules)
        self._common_limits = self._limits(config.rate_limits, "")
        self._sets = {
            index: build(site.managed_rules, f"sites[{index}].managed_rules")
            for index, site in enumerate(sites)
            if site.managed_rules is not None
        }
        own = config.managed_rules
        self.pool = Pool(list(self._sets.values()), own.processes, own.queue, log=_said) if self._sets else None

    def of(self, index: int, site: SiteConfig) -> tuple[Rules | None, RateLimits | None, ManagedRulesStage | None]:
        """The stages of the site of this index, those of all sites before its own; None where there is nothing."""
        with _place(f"sites[{index}] ({site.names[0]})"):
            rules = self._common_rules + self._rules(site.rules)
            limits = self._common_limits + self._limits(site.rate_limits, site.names[0])
        managed = None
        if self.pool is not None and site.managed_rules is not None:
            managed = ManagedRulesStage(self.pool, self._sets[index].name, site.managed_rules, self._metrics)
        return rules if len(rules) else None, limits if len(limits) else None, managed

    def _rules(self, configs: Sequence[RuleConfig]) -> Rules:
        return Rules(configs, self._expressions, metrics=self._metrics, report=_reporter(Event.RULE_FAILED, "rule"))

    def _limits(self, configs: Sequence[RateLimitConfig], scope: str) -> RateLimits:
        report = _reporter(Event.RATE_LIMIT_CONDITION_FAILED, "rate_limit")
        condition = self._expressions.condition
        return RateLimits(configs, self.counters, condition, scope=scope, metrics=self._metrics, report=report)


def _reporter(event: Event, what: str) -> Callable[[str, str], None]:
    def report(name: str, error: str) -> None:
        structlog.get_logger().warning(event, **{what: name}, reason=printable(error))

    return report


def _said(sentence: str) -> None:
    structlog.get_logger().warning(Event.MANAGED_RULES, reason=sentence)


@contextlib.contextmanager
def _place(place: str) -> Iterator[None]:
    """Say whose it was that could not be read."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{place}: {error}") from None
