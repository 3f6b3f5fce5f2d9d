"""The whole firewall: one verdict on each upgrade request, by these checks in this order.

    address lists  ->  web origins  ->  rules  ->  rate limits  ->  managed rules

The address lists of all sites are also checked at accept (`Firewall.check_address`). Nothing after the ``101`` comes
here.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tlstunnel.config import Config, Mode, SiteConfig
from tlstunnel.config.problems import Problems
from tlstunnel.escaping import printable
from tlstunnel.firewall.facts import Facts, gather, refuse_ambiguous
from tlstunnel.firewall.lists import AddressLists, NamedLists
from tlstunnel.firewall.web_origins import WebOriginCheck
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import Request, UpgradeRequest
from tlstunnel.journal.events import Event, Reason
from tlstunnel.journal.logger import structlog
from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Registry
from tlstunnel.program import import_when_needed

if TYPE_CHECKING:  # they need libraries that most configurations do not use: see optional_checks.py
    from tlstunnel.firewall.managed.check import ManagedRulesCheck, ManagedRulesOutcome
    from tlstunnel.firewall.optional_checks import OptionalChecks
    from tlstunnel.firewall.rate_limits import Lease, RateLimits
    from tlstunnel.firewall.rules import Rules
    from tlstunnel.state.counters import Counters
    from tlstunnel.state.throttles import Throttles

REFRESH_SECONDS = 1.0
"""How often the files of lists are checked for changes."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The firewall's decision about a request.

    `refusal` is None if the request may pass; close `lease` when its tunnel has ended. `rule` is the rule that blocked
    or allowed the request, `logged` names the checks in mode "log" that would have refused it. `managed` is the outcome
    of the managed rules, None if they were not evaluated.
    """

    refusal: Refusal | None = None
    lease: "Lease | None" = None
    rule: str = ""
    logged: tuple[str, ...] = ()
    managed: "ManagedRulesOutcome | None" = None

    def to_record(self) -> dict[str, Any]:
        """Return the fields of the record that the verdict adds; those without a value are left out."""
        fields: dict[str, Any] = {}
        if self.rule:
            fields["rule"] = self.rule
        if self.logged:
            fields["logged"] = list(self.logged)
        managed = self.managed
        if managed is not None and (managed.matches or managed.guard_reason or managed.failure):
            fields["managed_rules"] = {
                "score": managed.score,
                "matches": [{"id": match.id, "message": printable(match.message)} for match in managed.matches],
                **({"guard": printable(managed.guard_reason)} if managed.guard_reason else {}),
                **({"failure": managed.failure} if managed.failure else {}),
            }
        return fields


@dataclass(frozen=True, slots=True)
class CheckTrace:
    """The result of one check, for `tlstunnel firewall explain`. `entries` are the traces of its rules or limits."""

    name: str
    result: str
    entries: Sequence[object] = ()


PASSED = Verdict()


@dataclass(frozen=True, slots=True)
class Policy:
    """The checks of one site, including those of all sites. None stands for a check that is not configured.

    With `strict_path`, targets that servers read in different ways are refused.
    """

    strict_path: bool
    addresses: AddressLists | None
    addresses_mode: Mode
    web_origins: WebOriginCheck | None
    web_origins_mode: Mode
    rules: "Rules | None" = None
    limits: "RateLimits | None" = None
    managed: "ManagedRulesCheck | None" = None

    @property
    def empty(self) -> bool:
        """Whether no check needs the facts of a request."""
        return not (self.addresses or self.web_origins or self.rules or self.limits or self.managed)


class Firewall:
    """The policies of all sites, and what they share: lists, counters, and helpers for managed rules.

    `metrics` counts what matched, was exceeded or failed. `make_counters` returns what counts for rate limits, and is
    called only if there are some; with None they are counted here, from zero. `throttles` are those of the process.
    Raises InvalidConfiguration with every problem of the lists, rules, limits and managed rules.
    """

    def __init__(
        self,
        config: Config,
        sites: Sequence[SiteConfig] | None = None,
        *,
        metrics: Registry | None = None,
        make_counters: "Callable[[], Counters] | None" = None,
        throttles: "Throttles | None" = None,
    ) -> None:
        self.metrics = metrics = Registry() if metrics is None else metrics
        self._failed_checks = metrics[families.FIREWALL_CHECKS_FAILED]
        self._seconds = {
            name: metrics.histogram(families.FIREWALL_CHECK_SECONDS, name)
            for name in ("addresses", "rules", "rate limits", "managed rules")
        }
        self._throttles = throttles
        self._log = structlog.get_logger()
        self._has_files = any(isinstance(source, str) for source in config.lists.values())
        self._addresses: AddressLists | None = None
        self._addresses_mode: Mode = config.addresses_mode
        self._refreshing: asyncio.Task[None] | None = None
        self._optional: OptionalChecks | None = None
        self._policies: dict[str, Policy] = {}
        sites = config.sites if sites is None else sites
        problems = Problems()
        self._lists = _load_lists(config, problems)
        with problems.collect():
            self._addresses = _build_address_lists(config, self._lists)
        if config.rules or config.rate_limits or any(s.rules or s.rate_limits or s.managed_rules for s in sites):
            with problems.collect():
                module = import_when_needed("tlstunnel.firewall.optional_checks", "rules, rate limits, managed rules")
                self._optional = module.OptionalChecks(config, sites, self._lists, metrics, make_counters)
        for index, site in enumerate(sites):
            with problems.collect():
                self._policies[site.names[0]] = self._build_policy(index, site)
        problems.raise_found()

    @property
    def lists(self) -> NamedLists:
        """The lists of the configuration."""
        return self._lists

    def _build_policy(self, index: int, site: SiteConfig) -> Policy:
        checked = site.web_origins is not None or site.require_web_origin
        rules, limits, managed = self._optional.by_site[index] if self._optional else (None, None, None)
        # Where nothing depends on the path, there is nothing to bypass, and some origins need any target.
        depends = rules is not None or managed is not None or (limits is not None and limits.depend_on_path)
        return Policy(
            strict_path=site.strict_path and (depends or site.depends_on_path),
            addresses=_build_address_lists(site, self._lists),
            addresses_mode=site.addresses_mode,
            web_origins=WebOriginCheck(site.web_origins or (), site.names, required=site.require_web_origin)
            if checked
            else None,
            web_origins_mode=site.web_origins_mode,
            rules=rules,
            limits=limits,
            managed=managed,
        )

    async def start(self) -> None:
        """Start the helpers and the task that reloads lists. Raises ConfigurationError."""
        if self._optional is not None and self._optional.pool is not None:
            await self._optional.pool.start()
        if self._has_files:
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())

    async def close(self) -> None:
        """Stop the helpers and the task that reloads lists."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._refreshing
        if self._optional is not None and self._optional.pool is not None:
            await self._optional.pool.close()

    def check_address(self, ip: str) -> Reason | None:
        """Return why the lists of all sites block a connection from `ip`, or None. Takes microseconds."""
        if self._addresses is None or (reason := self._addresses.check(ip)) is None:
            return None
        if self._addresses_mode == "log":
            self._failed_checks.add("", reason, "log")
            return None
        return reason

    async def check(
        self,
        request: Request,
        connection: Connection,
        trace: list[CheckTrace] | None = None,
        *,
        behind_proxy: bool = False,
    ) -> Verdict:
        """Return the verdict on a request to the site `connection.site`. Never raises.

        With `behind_proxy` the request came through a trusted proxy: the client's address was not known at accept, so
        the lists of all sites are checked here. `trace` receives a `CheckTrace` for each check that ran.
        """
        policy = self._policies[connection.site]
        try:
            if policy.empty and trace is None and not (behind_proxy and self._addresses):
                if policy.strict_path:
                    refuse_ambiguous(request.target)
                return await self._check_throttles(request, connection, PASSED) if self._throttles else PASSED
            facts = gather(request, connection, strict_path=policy.strict_path, now=time.time())
        except Refusal as refusal:
            _add_trace(trace, "target", refusal.text)
            return Verdict(refusal)
        _add_trace(trace, "target", f"the path is {printable(facts.path)}")
        try:
            return await self._check_all(policy, facts, trace, behind_proxy=behind_proxy)
        except Refusal as refusal:  # more values of a cookie than rules and limits read
            return Verdict(refusal)

    async def _check_all(
        self, policy: Policy, facts: Facts, trace: list[CheckTrace] | None, *, behind_proxy: bool
    ) -> Verdict:
        logged: list[str] = []
        began = time.monotonic()
        for refusal, name, mode in (
            (self._check_common_addresses(facts, trace) if behind_proxy else None, "addresses", self._addresses_mode),
            (self._check_site_addresses(policy, facts, trace), "addresses", policy.addresses_mode),
            (self._check_web_origin(policy, facts, trace), "web origin", policy.web_origins_mode),
        ):
            if refusal is not None:
                self._failed_checks.add(facts.site, refusal.reason, mode)
                if mode == "block":
                    return Verdict(refusal, logged=tuple(logged))
                logged.append(name)
        began = self._seconds["addresses"].observe_since(began)
        skip: frozenset[str] = frozenset()
        verdict = Verdict(logged=tuple(logged))
        if policy.rules is not None:
            entries: list[Any] | None = None if trace is None else []
            found = policy.rules.evaluate(facts, entries)
            self._seconds["rules"].observe_since(began)
            _add_trace(trace, "rules", found.rule or "no rule decided", entries or ())
            skip = found.skip
            verdict = Verdict(found.refusal, rule=found.rule, logged=(*logged, *found.logged))
        if verdict.refusal is None and self._throttles:
            verdict = await self._check_throttles(facts.request, facts.connection, verdict)
        if verdict.refusal is None and policy.limits is not None:
            if "rate_limits" in skip:
                _add_trace(trace, "rate limits", "skipped")
            else:
                verdict = await self._check_rate_limits(policy.limits, facts, trace, verdict)
        if verdict.refusal is None and policy.managed is not None:
            if "managed_rules" in skip:
                _add_trace(trace, "managed rules", "skipped")
            else:
                verdict = await self._check_managed_rules(policy.managed, facts, trace, verdict)
        return verdict

    async def _check_throttles(self, request: Request, connection: Connection, verdict: Verdict) -> Verdict:
        if self._throttles is None or not isinstance(request, UpgradeRequest):
            return verdict
        refusal = await self._throttles.check(connection.site, connection.ip)
        return verdict if refusal is None else replace(verdict, refusal=refusal)

    async def _check_rate_limits(
        self, limits: "RateLimits", facts: Facts, trace: list[CheckTrace] | None, verdict: Verdict
    ) -> Verdict:
        entries: list[Any] | None = None if trace is None else []
        began = time.monotonic()
        outcome = await limits.check(facts, entries)
        self._seconds["rate limits"].observe_since(began)
        _add_trace(trace, "rate limits", outcome.limit or "within all limits", entries or ())
        logged = (*verdict.logged, *outcome.logged)
        return replace(verdict, refusal=outcome.refusal, lease=outcome.lease, logged=logged)

    async def _check_managed_rules(
        self, check: "ManagedRulesCheck", facts: Facts, trace: list[CheckTrace] | None, verdict: Verdict
    ) -> Verdict:
        began = time.monotonic()
        try:
            managed = await check.check(facts)
            self._seconds["managed rules"].observe_since(began)
        except BaseException:
            if verdict.lease is not None:
                verdict.lease.close()
            raise
        _add_trace(trace, "managed rules", _describe_managed_rules(managed), managed.matches)
        if managed.refusal is not None and verdict.lease is not None:
            verdict.lease.close()
        return replace(verdict, refusal=managed.refusal, managed=managed, logged=(*verdict.logged, *managed.logged))

    def _check_common_addresses(self, facts: Facts, trace: list[CheckTrace] | None) -> Refusal | None:
        if self._addresses is None:
            return None
        reason = self._addresses.check(facts.ip)
        _add_trace(trace, "addresses of all sites", reason or "allowed")
        return _refuse_address(reason)

    def _check_site_addresses(self, policy: Policy, facts: Facts, trace: list[CheckTrace] | None) -> Refusal | None:
        if policy.addresses is None:
            return None
        reason = policy.addresses.check(facts.ip)
        _add_trace(trace, "addresses of the site", reason or "allowed")
        return _refuse_address(reason)

    def _check_web_origin(self, policy: Policy, facts: Facts, trace: list[CheckTrace] | None) -> Refusal | None:
        if policy.web_origins is None:
            return None
        refusal = policy.web_origins.check(facts)
        _add_trace(trace, "web origin", refusal.text if refusal else _describe_web_origin(facts))
        return refusal

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            # In a thread: 100 000 new networks take a tenth of a second.
            refreshed = await asyncio.to_thread(self._lists.refresh)
            for name in refreshed.lists:
                self._log.info(Event.LIST_RELOADED, list=name)
            for error in refreshed.errors:
                self._log.warning(Event.LIST_NOT_RELOADED, reason=error)


def _load_lists(config: Config, problems: Problems) -> NamedLists:
    """Load the lists; if one is wrong, return empty ones, so that the rules that use them can be checked."""
    with problems.collect():
        return NamedLists(config.lists)
    return NamedLists(dict.fromkeys(config.lists, ()))


def _build_address_lists(config: Config | SiteConfig, lists: NamedLists) -> AddressLists | None:
    if not (config.allow_addresses or config.block_addresses):
        return None
    return AddressLists(config.allow_addresses, config.block_addresses, lists)


def _refuse_address(reason: Reason | None) -> Refusal | None:
    return Refusal(403, reason, "this address may not connect") if reason else None


def _add_trace(trace: list[CheckTrace] | None, name: str, result: str, entries: Sequence[object] = ()) -> None:
    if trace is not None:
        trace.append(CheckTrace(name, result, entries))


def _describe_web_origin(facts: Facts) -> str:
    if not isinstance(facts.request, UpgradeRequest):
        return "not checked: only handshakes are"
    if not facts.origin:
        return "no Origin field, so the client is not a web page: allowed"
    return f"{printable(facts.origin)} is allowed"


def _describe_managed_rules(managed: "ManagedRulesOutcome") -> str:
    if managed.guard_reason:
        return f"stopped by the guard: {printable(managed.guard_reason)}"
    return managed.failure or f"score {managed.score}"
