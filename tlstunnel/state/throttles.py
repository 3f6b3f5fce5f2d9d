"""Throttles: new handshakes of a site, or of some addresses at a site, are answered with 429 above a rate, for a time.

A throttle is put in place by the operator, or against suspected abuse, and ends by itself (docs/plans.md). Its rate is
counted with everything else that processes count together, so it is exact across all of them. If that cannot be
counted, nothing is refused.
"""

import math
import time
from collections.abc import Callable, Iterable
from hashlib import blake2b

import msgspec

from tlstunnel.addresses import Networks
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.journal.events import Reason
from tlstunnel.state.counters import Counters, CountersUnavailable, LimitCheck


class ThrottleRule(msgspec.Struct, frozen=True, kw_only=True):
    """What serving processes need of a throttle: at most `amount` new handshakes per `window` seconds.

    It holds until the Unix time `until`, for all clients of a site or for those in `addresses`, together. `id` tells it
    from the others and stays the same.
    """

    id: int
    site: str
    amount: int
    window: int
    until: float
    addresses: tuple[str, ...] = ()


class Throttles:
    """The throttles of a process. `get_counters` is called only if there are some."""

    def __init__(self, get_counters: Callable[[], Counters], clock: Callable[[], float] = time.time) -> None:
        self._get_counters = get_counters
        self._clock = clock
        self._by_site: dict[str, tuple[tuple[Networks, float, LimitCheck], ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_site)

    def replace(self, rules: Iterable[ThrottleRule]) -> None:
        """Use these throttles, and no others, from now on. One with an address that is none is left out."""
        by_site: dict[str, list[tuple[Networks, float, LimitCheck]]] = {}
        for rule in rules:
            try:
                networks = Networks.parse(rule.addresses)
            except ValueError:
                continue
            check = LimitCheck(_make_key(rule), rule.amount, rule.window)
            by_site.setdefault(rule.site, []).append((networks, rule.until, check))
        self._by_site = {site: tuple(found) for site, found in by_site.items()}

    async def check(self, site: str, ip: str) -> Refusal | None:
        """Count a new handshake of the client `ip`, or return its refusal."""
        found = self._by_site.get(site)
        if not found:
            return None
        now = self._clock()
        # Two that are the same count once.
        checks = list(
            {check: 0 for networks, until, check in found if now < until and (not networks or ip in networks)}
        )
        if not checks:
            return None
        try:
            results = await self._get_counters().check(checks)
        except CountersUnavailable:
            return None
        waits = [result.wait for result in results if result.exceeded]
        if not waits:
            return None
        seconds = max(math.ceil(max(waits)), 1)
        text = f"too many new connections at the moment; try again in {seconds} s"
        return Refusal(429, Reason.THROTTLED, text, ((b"Retry-After", b"%d" % seconds),))


def _make_key(rule: ThrottleRule) -> str:
    """Return what the same throttle has on all machines, whose numbers differ."""
    return blake2b("\0".join(("throttle", rule.site, *sorted(rule.addresses))).encode(), digest_size=16).hexdigest()
