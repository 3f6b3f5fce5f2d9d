"""Throttles: who may throttle a site, for how long, and what `on_abuse = "throttle"` does by itself.

A throttle is stored before it holds, and survives restarts. Serving processes carry it out
(`tlstunnel.state.throttles`).

- A site's owner was told before: without a notice that the contact's webhook or mail server has accepted, a throttle
  has to be against abuse.
- By itself, only suspected abuse is throttled: the addresses that it comes from, or the site if they are many.
- What a person has released is not throttled by itself for an hour.
- Where several machines share a server, a person's throttle of a whole site holds on all of them.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from tlstunnel.addresses import Networks, quoted
from tlstunnel.config.usage import Abuse
from tlstunnel.plans.abuse import Suspicion
from tlstunnel.plans.decisions import Decision
from tlstunnel.plans.notice_file import TUNNEL, NoticeFile, Throttle
from tlstunnel.plans.notice_store import NoticeStore
from tlstunnel.state.counters import MAX_AMOUNT, MAX_SECONDS
from tlstunnel.state.throttles import ThrottleRule

_KINDS = 3
"""Kinds of suspicious connections: in a flood, the most frequent one is a third of it at least."""

RELEASED_SECONDS = 3600.0

MOST_ADDRESSES = 256
"""Networks in one throttle."""

MOST_THROTTLES = 1000
"""Throttles that hold at once. What a serving process looks up grows with those of a site."""

MOST_OF_SITE = 16

_UNITS = {"second": 1, "minute": 60, "hour": 3600}
_RATE = re.compile(r"([0-9]{1,15})/(second|minute|hour)")
_HEXADECIMAL = re.compile(r"[0-9a-f]{16}")


def parse_rate(text: str) -> tuple[int, int]:
    """Return a number and the seconds in which so many are accepted. Raises ValueError."""
    match = _RATE.fullmatch(text)
    if match is None or not 0 < int(match[1]) <= MAX_AMOUNT:
        raise ValueError(f'expected a rate such as "10/second", "30/minute" or "100/hour", got {quoted(text)}')
    return int(match[1]), _UNITS[match[2]]


def parse_networks(texts: Iterable[str]) -> tuple[str, ...]:
    """Return addresses and networks in one form. Raises ValueError."""
    networks = tuple(map(str, Networks.parse(texts)))
    if len(networks) > MOST_ADDRESSES:
        raise ValueError(f"expected at most {MOST_ADDRESSES} addresses, got {len(networks)}")
    return networks


def to_network(client: str) -> str:
    """Return the network of a client, as `to_client_key` names it: for IPv6 it is a /64."""
    if not _HEXADECIMAL.fullmatch(client):
        return client
    return ":".join(client[start : start + 4] for start in range(0, 16, 4)) + "::/64"


class Throttling:
    """Keeps the throttles in the store, and gives `on_change` those that hold. `tell` tells other machines.

    Every method but `rules` raises StateError if it was not stored.
    """

    def __init__(
        self,
        store: NoticeStore,
        on_change: Callable[[Sequence[ThrottleRule]], None],
        clock: Callable[[], float] = time.time,
        tell: Callable[[Sequence[Decision]], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._tell = tell
        self._on_change = on_change
        self._clock = clock
        self._holding: dict[int, Throttle] = {}
        self._announced: Sequence[ThrottleRule] | None = None

    @property
    def holding(self) -> tuple[Throttle, ...]:
        """The throttles that hold now."""
        now = self._clock()
        return tuple(one for one in self._holding.values() if now < one.until)

    @property
    def rules(self) -> tuple[ThrottleRule, ...]:
        """What serving processes need of them."""
        return tuple(map(_to_rule, self.holding))

    async def refresh(self) -> list[Throttle]:
        """Read the throttles that hold, also those of other machines, and return those that were not known."""
        found = await self._store.run(NoticeFile.read_throttles, self._clock())
        before, self._holding = self._holding, {}
        sites: Counter[str] = Counter()
        for one in found:
            if _is_usable(one) and sites[one.site] < MOST_OF_SITE and len(self._holding) < MOST_THROTTLES:
                sites[one.site] += 1
                self._holding[one.id] = one
        self._announce()
        return [one for key, one in self._holding.items() if key not in before]

    async def throttle(  # noqa: PLR0913 - what the record keeps
        self, site: str, rate: str, seconds: float, *, why: str, who: str, abuse: bool, addresses: Sequence[str] = ()
    ) -> Throttle:
        """Throttle a site, or addresses at this site. Raises ValueError, and NotContactedError."""
        parse_rate(rate)
        if not 1.0 <= seconds <= MAX_SECONDS:
            raise ValueError("expected a time between a second and 366 days")
        holding = self.holding
        if len(holding) >= MOST_THROTTLES or sum(one.site == site for one in holding) >= MOST_OF_SITE:
            raise ValueError(f"{site} has too many throttles already; release it first")
        now = self._clock()
        throttle = Throttle(
            site=site,
            addresses=parse_networks(addresses),
            rate=rate,
            since=now,
            until=now + seconds,
            why=why,
            who=who,
            abuse=abuse,
        )
        stored = await self._store.run(NoticeFile.add_throttle, throttle)
        self._holding[stored.id] = stored
        self._announce()
        if stored.is_told:
            self._tell([stored.to_decision()])
        return stored

    async def release(self, site: str, who: str) -> int:
        """Lift the throttles of a site, and return how many there were."""
        now = self._clock()
        number = await self._store.run(NoticeFile.release, site, who, now)
        released = [one for one in self._holding.values() if one.site == site and one.is_told]
        self._tell(
            [msgspec.structs.replace(one, released=now, released_by=who).to_decision() for one in released],
        )
        self._holding = {key: one for key, one in self._holding.items() if one.site != site}
        self._announce()
        return number

    async def react(
        self, suspicions: Mapping[str, Suspicion], abuse: Abuse, sentences: Mapping[str, str]
    ) -> list[Throttle]:
        """Throttle what is suspected of abuse and is not throttled yet. `sentences` say why. Return what is new."""
        now = self._clock()
        new = []
        for site, suspicion in suspicions.items():
            if len(self.holding) >= MOST_THROTTLES:
                break
            if suspicion.rate * _KINDS < abuse.rate:
                continue  # it is over, and only suspected for some minutes more
            addresses = self._find_unthrottled(site, suspicion)
            if addresses is None or await self._was_released(site, now):
                continue
            throttle = await self.throttle(
                site,
                f"{abuse.throttle_rate}/second",
                float(abuse.throttle_for),
                why=sentences.get(site, "suspected abuse"),
                who=TUNNEL,
                abuse=True,
                addresses=addresses,
            )
            new.append(throttle)
        return new

    def expire(self) -> None:
        """Forget the throttles that have ended."""
        now = self._clock()
        self._holding = {key: one for key, one in self._holding.items() if now < one.until}
        self._announce()

    def _find_unthrottled(self, site: str, suspicion: Suspicion) -> tuple[str, ...] | None:
        """Return the addresses to throttle, none for the whole site; None if there is nothing to do."""
        holding = [one for one in self.holding if one.site == site]
        if any(not one.addresses for one in holding) or len(holding) >= MOST_OF_SITE:
            return None
        if not suspicion.few:
            return ()
        throttled = {address for one in holding for address in one.addresses}
        culprits = parse_networks(list(map(to_network, suspicion.culprits))[:MOST_ADDRESSES])
        return tuple(one for one in culprits if one not in throttled) or None

    async def _was_released(self, site: str, now: float) -> bool:
        found = await self._store.run(NoticeFile.read_throttles_of, site)
        return any(
            one.released is not None and one.released_by and abs(now - one.released) < RELEASED_SECONDS for one in found
        )

    def _announce(self) -> None:
        rules = self.rules
        if rules != self._announced:
            self._announced = rules
            self._on_change(rules)


def _is_usable(throttle: Throttle) -> bool:
    try:
        parse_rate(throttle.rate)
        parse_networks(throttle.addresses)
    except ValueError:
        return False
    return True


def _to_rule(throttle: Throttle) -> ThrottleRule:
    amount, window = parse_rate(throttle.rate)
    return ThrottleRule(
        id=throttle.id,
        site=throttle.site,
        amount=amount,
        window=window,
        until=throttle.until,
        addresses=throttle.addresses,
    )
