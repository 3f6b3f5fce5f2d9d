"""Evaluate requests as the tunnel does: the check, the pool, a helper process, libmodsecurity, OWASP CRS."""

import asyncio
import ctypes
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

from tests.corpus.corpus import Sample, upgrade_request
from tests.harness import missing
from tlstunnel.config import SiteManagedRules, Timeout
from tlstunnel.firewall.facts import Facts, gather
from tlstunnel.firewall.managed.categories import name_category
from tlstunnel.firewall.managed.check import ManagedRulesCheck, ManagedRulesOutcome
from tlstunnel.firewall.managed.messages import Subject
from tlstunnel.firewall.managed.modsecurity import LIBRARY
from tlstunnel.firewall.managed.pool import HelperPool
from tlstunnel.firewall.managed.rule_sets import DEBIAN_CRS, build
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.request import UpgradeRequest
from tlstunnel.metrics.registry import Registry

UNHURRIED = Timeout(10)
"""A deadline for tests of verdicts, which a busy machine does not miss."""

T = TypeVar("T")


def require_libmodsecurity() -> None:
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        missing(f"{LIBRARY} not found: ./scripts/install gets libmodsecurity3")


def require_crs() -> None:
    require_libmodsecurity()
    if not DEBIAN_CRS.is_dir():
        missing(f"{DEBIAN_CRS} not found: ./scripts/install gets modsecurity-crs")


def facts(request: UpgradeRequest, ip: str = "203.0.113.7") -> Facts:
    connection = Connection(
        ip=ip, tls_version="TLSv1.3", tls_cipher="", tls_sni="", tls_ja4="", client_subject="", site="*"
    )
    return gather(request, connection, strict_path=False, now=0.0)


def subject(target: str, *headers: str, ip: str = "203.0.113.7") -> Subject:
    """Return the request of a library that sends a User-Agent, as a helper receives it."""
    request = plain_request(target, *headers)
    return Subject(ip, request.target, request.fields)


def plain_request(target: str, *headers: str) -> UpgradeRequest:
    handshake = [
        "Host: chat.example.com",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ]
    return upgrade_request(target, [*handshake, *headers])


def with_pool(pool: HelperPool, ask: Callable[[HelperPool], Coroutine[Any, Any, T]]) -> T:
    """Run `ask` with a started pool, and close the pool afterwards."""

    async def run() -> T:
        await pool.start()
        try:
            return await ask(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def helper_pids(pool: HelperPool) -> tuple[int, ...]:
    """Return the ids of the evaluating processes, without those that are being replaced."""
    return tuple(helper.child for helper in pool._helpers if helper.child)


def rule_ids(outcome: ManagedRulesOutcome) -> tuple[int, ...]:
    """Return the ids of the rules that matched, in order, without repetition."""
    return tuple(dict.fromkeys(match.id for match in outcome.matches))


def categories(outcome: ManagedRulesOutcome) -> tuple[str, ...]:
    """Return what the rules that matched look for: ``SQL injection``, ``cross-site scripting``, ..."""
    return tuple(dict.fromkeys(name_category(match.id) for match in outcome.matches))


def evaluate_samples(samples: Iterable[Sample], settings: SiteManagedRules) -> dict[str, ManagedRulesOutcome]:
    """Return the outcome of each sample, by its name."""
    rule_set = build(settings)

    async def ask(pool: HelperPool) -> dict[str, ManagedRulesOutcome]:
        check = ManagedRulesCheck(pool, rule_set.name, settings, Registry())
        return {sample.name: await check.check(facts(sample.request)) for sample in samples}

    return with_pool(HelperPool([rule_set]), ask)


def own_rules(folder: Path, text: str) -> SiteManagedRules:
    """Return settings with own rules only, which load fast."""
    path = folder / "own.conf"
    path.write_text(text)
    return SiteManagedRules(rules=str(path), timeout=UNHURRIED)
