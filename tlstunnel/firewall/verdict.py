"""The firewall as a whole: one verdict on one upgrade request, in the order of its stages.

    address lists  ->  allowed origins  ->  rules  ->  rate limits  ->  managed rules

The lists of all sites also act at accept (`Firewall.objection`). What comes after the ``101`` is never seen here.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import structlog

from tlstunnel.config import Config, Mode, SiteConfig
from tlstunnel.config.problems import Problems
from tlstunnel.escaping import printable
from tlstunnel.firewall.cross_site import OriginCheck
from tlstunnel.firewall.facts import Facts, gather, refuse_ambiguous
from tlstunnel.firewall.lists import AddressLists, NamedLists
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import Request
from tlstunnel.journal.events import Event, Reason
from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Registry
from tlstunnel.program import import_when_needed

if TYPE_CHECKING:  # they bring libraries that most configurations do without: see stages.py
    from tlstunnel.firewall.counters import Counters
    from tlstunnel.firewall.managed.verdict import ManagedOutcome, ManagedRulesStage
    from tlstunnel.firewall.rate_limits import Lease, RateLimits
    from tlstunnel.firewall.rules import Rules
    from tlstunnel.firewall.stages import Stages

REFRESH_SECONDS = 1.0
"""How often the files of lists are looked at."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the firewall says of a request.

    `refusal` is None where it may go on; `lease` is then to be released when its tunnel has ended. `rule` is the rule
    that ended the rules, `logged` names what would have refused it were it not in mode "log". `managed` is what the
    managed rules found, None where they were not asked.
    """

    refusal: Refusal | None = None
    lease: "Lease | None" = None
    rule: str = ""
    logged: tuple[str, ...] = ()
    managed: "ManagedOutcome | None" = None

    def facts(self) -> dict[str, Any]:
        """What of it belongs into the record, where it is anything."""
        facts: dict[str, Any] = {}
        if self.rule:
            facts["rule"] = self.rule
        if self.logged:
            facts["logged"] = list(self.logged)
        managed = self.managed
        if managed is not None and (managed.matches or managed.objection or managed.failure):
            facts["managed_rules"] = {
                "score": managed.score,
                "matches": [{"id": match.id, "message": printable(match.message)} for match in managed.matches],
                **({"guard": printable(managed.objection)} if managed.objection else {}),
                **({"failure": managed.failure} if managed.failure else {}),
            }
        return facts


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage saw, for `tlstunnel firewall explain`; `entries` are those of its rules or limits."""

    name: str
    saw: str
    entries: Sequence[object] = ()


PASSED = Verdict()


@dataclass(frozen=True, slots=True)
class Policy:
    """One site's part of the firewall, that of all sites included; None where a stage has nothing to ask."""

    strict_path: bool
    addresses: AddressLists | None
    addresses_mode: Mode
    origins: OriginCheck | None
    web_origins_mode: Mode
    rules: "Rules | None" = None
    limits: "RateLimits | None" = None
    managed: "ManagedRulesStage | None" = None

    @property
    def empty(self) -> bool:
        """Whether it asks nothing that needs the facts of a request."""
        return not (self.addresses or self.origins or self.rules or self.limits or self.managed)


class Firewall:
    """The policies of all sites, and what they share: lists, counters, the helpers of the managed rules.

    `metrics` count what matched, was exceeded or failed. `counters` are those of the
    firewall that this one replaces, so that requests and open tunnels stay counted; None starts at zero. Raises
    InvalidConfiguration with every problem of the lists, rules, limits and managed rules.
    """

    def __init__(
        self,
        config: Config,
        sites: Sequence[SiteConfig] | None = None,
        *,
        metrics: Registry | None = None,
        counters: "Counters | None" = None,
    ) -> None:
        self.metrics = metrics = Registry() if metrics is None else metrics
        self._failed_checks = metrics[families.FIREWALL_CHECKS_FAILED]
        self._log = structlog.get_logger()
        self._watched = any(isinstance(source, str) for source in config.lists.values())
        self._addresses: AddressLists | None = None
        self._addresses_mode: Mode = config.addresses_mode
        self._refreshing: asyncio.Task[None] | None = None
        self._stages: Stages | None = None
        self._policies: dict[str, Policy] = {}
        self.counters = counters
        sites = config.sites if sites is None else sites
        problems = Problems()
        self._lists = _load_lists(config, problems)
        with problems.collect():
            self._addresses = _addresses(config, self._lists)
        if config.rules or config.rate_limits or any(s.rules or s.rate_limits or s.managed_rules for s in sites):
            with problems.collect():
                stages = import_when_needed("tlstunnel.firewall.stages", "rules, rate limits and managed rules")
                self._stages = stages.Stages(config, sites, self._lists, metrics, counters)
                self.counters = self._stages.counters
        for index, site in enumerate(sites):
            with problems.collect():
                self._policies[site.names[0]] = self._policy(index, site)
        problems.raise_found()

    def _policy(self, index: int, site: SiteConfig) -> Policy:
        checked = site.web_origins is not None or site.require_web_origin
        rules, limits, managed = self._stages.of_sites[index] if self._stages else (None, None, None)
        return Policy(
            strict_path=site.strict_path,
            addresses=_addresses(site, self._lists),
            addresses_mode=site.addresses_mode,
            origins=OriginCheck(site.web_origins or (), site.names, required=site.require_web_origin)
            if checked
            else None,
            web_origins_mode=site.web_origins_mode,
            rules=rules,
            limits=limits,
            managed=managed,
        )

    async def start(self) -> None:
        """Start what runs beside: the helpers, the look at lists' files. Raises ConfigurationError."""
        if self._stages is not None and self._stages.pool is not None:
            await self._stages.pool.start()
        if self._watched:
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())

    async def close(self) -> None:
        """End it."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._refreshing
        if self._stages is not None and self._stages.pool is not None:
            await self._stages.pool.close()

    def objection(self, ip: str) -> Reason | None:
        """Return why no connection from `ip` is accepted, by the lists of all sites, or None. Takes microseconds."""
        if self._addresses is None or (objection := self._addresses.objection(ip)) is None:
            return None
        if self._addresses_mode == "log":
            self._failed_checks.add("", objection, "log")
            return None
        return objection

    async def judge(
        self, request: Request, connection: Connection, trace: list[Stage] | None = None, *, behind: bool = False
    ) -> Verdict:
        """The verdict on a request to the site `connection.site`. `behind` says that a proxy of ours is between.

        Then the client's address was not known at accept, and the lists of all sites are asked here. `trace` receives
        each stage that was asked. Never raises.
        """
        policy = self._policies[connection.site]
        try:
            if policy.empty and trace is None and not (behind and self._addresses):
                if policy.strict_path:
                    refuse_ambiguous(request.target)
                return PASSED
            facts = gather(request, connection, strict_path=policy.strict_path, now=time.time())
        except Refusal as refusal:
            _traced(trace, "target", refusal.text)
            return Verdict(refusal)
        _traced(trace, "target", f"its path is {printable(facts.path)}")
        return await self._judged(policy, facts, trace, behind=behind)

    async def _judged(self, policy: Policy, facts: Facts, trace: list[Stage] | None, *, behind: bool) -> Verdict:
        logged: list[str] = []
        for refusal, name, mode in (
            (self._global_objection(facts, trace) if behind else None, "addresses", self._addresses_mode),
            (self._address_objection(policy, facts, trace), "addresses", policy.addresses_mode),
            (self._origin_objection(policy, facts, trace), "web origin", policy.web_origins_mode),
        ):
            if refusal is not None:
                self._failed_checks.add(facts.site, refusal.reason, mode)
                if mode == "block":
                    return Verdict(refusal, logged=tuple(logged))
                logged.append(name)
        skip: frozenset[str] = frozenset()
        verdict = Verdict(logged=tuple(logged))
        if policy.rules is not None:
            entries: list[Any] | None = None if trace is None else []
            found = policy.rules.judge(facts, entries)
            _traced(trace, "rules", found.rule or "none of them decides", entries or ())
            skip = found.skip
            verdict = Verdict(found.refusal, rule=found.rule, logged=(*logged, *found.logged))
        if verdict.refusal is None and policy.limits is not None:
            if "rate_limits" in skip:
                _traced(trace, "rate limits", "skipped")
            else:
                verdict = await self._limited(policy.limits, facts, trace, verdict)
        if verdict.refusal is None and policy.managed is not None:
            if "managed_rules" in skip:
                _traced(trace, "managed rules", "skipped")
            else:
                verdict = await self._managed(policy.managed, facts, trace, verdict)
        return verdict

    async def _limited(self, stage: "RateLimits", facts: Facts, trace: list[Stage] | None, verdict: Verdict) -> Verdict:
        entries: list[Any] | None = None if trace is None else []
        limits = await stage.judge(facts, entries)
        _traced(trace, "rate limits", limits.limit or "within all of them", entries or ())
        logged = (*verdict.logged, *limits.logged)
        return replace(verdict, refusal=limits.refusal, lease=limits.lease, logged=logged)

    async def _managed(
        self, stage: "ManagedRulesStage", facts: Facts, trace: list[Stage] | None, verdict: Verdict
    ) -> Verdict:
        try:
            managed = await stage.judge(facts)
        except BaseException:
            if verdict.lease is not None:
                verdict.lease.release()
            raise
        _traced(trace, "managed rules", _managed_words(managed), managed.matches)
        if managed.refusal is not None and verdict.lease is not None:
            verdict.lease.release()
        return replace(verdict, refusal=managed.refusal, managed=managed, logged=(*verdict.logged, *managed.logged))

    def _global_objection(self, facts: Facts, trace: list[Stage] | None) -> Refusal | None:
        if self._addresses is None:
            return None
        objection = self._addresses.objection(facts.ip)
        _traced(trace, "addresses of all sites", objection or "may come")
        return _address_refusal(objection)

    def _address_objection(self, policy: Policy, facts: Facts, trace: list[Stage] | None) -> Refusal | None:
        if policy.addresses is None:
            return None
        objection = policy.addresses.objection(facts.ip)
        _traced(trace, "addresses of the site", objection or "may come")
        return _address_refusal(objection)

    def _origin_objection(self, policy: Policy, facts: Facts, trace: list[Stage] | None) -> Refusal | None:
        if policy.origins is None:
            return None
        refusal = policy.origins.refusal(facts)
        _traced(trace, "web origin", refusal.text if refusal else f"{printable(facts.origin) or 'none'} may connect")
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


def _addresses(config: Config | SiteConfig, lists: NamedLists) -> AddressLists | None:
    if not (config.allow_addresses or config.block_addresses):
        return None
    return AddressLists(config.allow_addresses, config.block_addresses, lists)


def _address_refusal(objection: Reason | None) -> Refusal | None:
    return Refusal(403, objection, "this address may not connect") if objection else None


def _traced(trace: list[Stage] | None, name: str, saw: str, entries: Sequence[object] = ()) -> None:
    if trace is not None:
        trace.append(Stage(name, saw, entries))


def _managed_words(managed: "ManagedOutcome") -> str:
    if managed.objection:
        return f"stopped by the guard: {printable(managed.objection)}"
    return managed.failure or f"score {managed.score}"
