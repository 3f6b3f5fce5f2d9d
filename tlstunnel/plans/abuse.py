"""Floods of refused, short and unfinished connections, told apart from clients that only want to connect again. No I/O.

What is suspicious is counted for each site and minute: refused handshakes, tunnels that end within a second,
connections without a request. What an origin refuses is not: that is the origin's affair, or its failure. From this
number is taken what has another reason:

- Clients whose tunnel has just ended, because we drained it, its origin was lost or the machine was off, come back and
  may try again some times a minute. That is a reconnect storm. They may have been on another machine.
- Short tunnels while an origin of the site is failing are the origin's doing.
- Connections from known addresses, which had a tunnel for a minute or more in the last day, are of clients: even if a
  mistake in them makes them connect again and again.
- What the site usually has of it, such as the connections of a load balancer's checks.

A minute is hot if what is left is more than `rate` per second, either from few addresses, each with more than
`address_rate` per second, or from many strangers, and then at least a third of all connections. Abuse is suspected
after three hot minutes of the last five, and no longer after ten in a row that are not. A minute that was not measured
is not counted at all.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tlstunnel.config.usage import Abuse
from tlstunnel.plans.addresses import AddressFigures, Heavy
from tlstunnel.plans.elsewhere import NOTHING_SEEN, Sighting
from tlstunnel.plans.values import Flood
from tlstunnel.state.history.samples import Counts

MINUTE = 60

RETRIES = 6
"""Connections per minute that each client whose tunnel has just ended may make: one in ten seconds. Clients with a
back-off make fewer."""

RECONNECT_MINUTES = 15
"""How long such clients are expected back."""

HOT_MINUTES, WINDOW_MINUTES = 3, 5
CALM_MINUTES = 10

WARM_UP_MINUTES = 15
"""How long nobody is suspected for being a stranger after this began, since at first everybody is."""

FLOOD_SHARE = 1 / 3
"""The part of all connections that a flood of strangers is. Of readers who come and go, one in six leaves at once."""

MANY = 20
"""Addresses of strangers in a flood of many: fewer are the nodes of a load balancer, or all of them are heavy."""

USUAL_FACTOR = 4
"""How many times the usual number a flood has to be."""

LEARNING_MINUTES = 360
"""The time constant of the usual number. It does not learn from hot minutes, and four times as much takes it hours."""

_HELD = 0.5
"""The part of each threshold that is enough while abuse is suspected."""


NO_ADDRESSES = AddressFigures()


class Attempts(NamedTuple):
    """The connections to a site in one minute that was measured. `addresses` are those of the suspicious ones.

    `lost` is the number of tunnels that ended because we or an origin ended them, or a process died. `origin_failing`
    is whether the health of an origin changed, or an origin was ejected, in this minute. Both are of all machines.
    `elsewhere` is what other machines have seen.
    """

    opened: int = 0
    short: int = 0
    unfinished: int = 0
    refused: int = 0
    by_origin: int = 0
    lost: int = 0
    origin_failing: bool = False
    addresses: AddressFigures = NO_ADDRESSES
    elsewhere: Sighting = NOTHING_SEEN

    @property
    def total(self) -> int:
        """All connections."""
        return self.opened + self.unfinished + self.refused + self.by_origin

    @property
    def suspicious(self) -> int:
        """All connections that could be part of a flood."""
        return self.refused + self.unfinished + (0 if self.origin_failing else self.short)

    @property
    def are_many(self) -> bool:
        """Whether there are many strangers among the addresses, or nothing is known of these."""
        addresses = self.addresses.addresses + self.elsewhere.addresses
        return not addresses or addresses - (self.addresses.known + self.elsewhere.known) >= MANY


class Suspicion(NamedTuple):
    """A flood: what most of it is, how much of that there is per second, and its part of all connections.

    If it comes from `few` addresses, `culprits` are those that connect to this machine. If not, it is the site that
    needs protection. They are kept in memory only.
    """

    flood: Flood
    rate: float
    share: float
    addresses: int
    culprits: tuple[str, ...]
    minutes: int
    """For how many measured minutes it has been suspected."""
    few: bool


@dataclass(frozen=True, slots=True)
class Weighed:
    """What is left of a minute's suspicious connections: from few addresses, and from strangers however many."""

    few: float
    strangers: float


def to_attempts(
    counts: Counts,
    addresses: AddressFigures = NO_ADDRESSES,
    *,
    lost: int = 0,
    origin_failing: bool = False,
    elsewhere: Sighting = NOTHING_SEEN,
) -> Attempts:
    """Return the attempts of a minute with these counts."""
    return Attempts(
        opened=counts.handshakes,
        short=counts.short,
        unfinished=counts.unfinished,
        refused=counts.invalid + counts.blocked + counts.limited + counts.worker,
        by_origin=counts.origin + counts.declined,
        lost=lost,
        origin_failing=origin_failing,
        addresses=addresses,
        elsewhere=elsewhere,
    )


def weigh(attempts: Attempts, recently_lost: int, address_rate: int) -> Weighed:
    """Return what of a minute's suspicious connections has no other reason.

    `recently_lost` is the number of tunnels that were lost in this minute and those before.
    """
    excess = max(0, attempts.suspicious - RETRIES * recently_lost)
    seen, elsewhere = attempts.addresses, attempts.elsewhere
    heavy = count_heavy(seen.heavy, address_rate) + elsewhere.heavy
    addresses = seen.addresses + elsewhere.addresses
    strange = 1.0 - min(seen.known + elsewhere.known, addresses) / addresses if addresses else 1.0
    return Weighed(min(excess, heavy), excess * strange)


def count_heavy(heavy: Iterable[Heavy], address_rate: int) -> int:
    """Return the connections from addresses with more than so many per second each."""
    return sum(one.number for one in _find_heavy(heavy, address_rate))


def find_usual(minutes: Iterable[Counts], seconds: int) -> float:
    """Return how many suspicious connections per second a site usually has: the median of times of this length."""
    rates = sorted(to_attempts(counts).suspicious / seconds for counts in minutes)
    return rates[len(rates) // 2] if rates else 0.0


class _Site:
    """What is remembered of a site."""

    __slots__ = ("calm", "hot", "lost", "recent", "suspected", "usual")

    def __init__(self, usual: float) -> None:
        self.usual = usual * MINUTE  # suspicious connections per minute
        self.recent: deque[Attempts] = deque(maxlen=WINDOW_MINUTES)
        self.hot: deque[bool] = deque(maxlen=WINDOW_MINUTES)
        self.lost: deque[int] = deque(maxlen=RECONNECT_MINUTES)
        self.suspected = 0
        self.calm = 0


class AbuseWatch:
    """Suspects abuse of sites, from what happened in each measured minute.

    `usual` has the suspicious connections per second that sites usually have, from `find_usual` and the history.
    """

    def __init__(self, thresholds: Abuse, usual: Mapping[str, float] | None = None) -> None:
        self.thresholds = thresholds
        self._usual = dict(usual or {})
        self._sites: dict[str, _Site] = {}
        self._minutes = 0

    def observe(self, sites: Mapping[str, Attempts]) -> dict[str, Suspicion]:
        """Add a measured minute of all sites, and return those with suspected abuse.

        A site that is missing was not measured, and stays as it was. One that nothing is remembered of and that had no
        connections costs nothing.
        """
        self._minutes += 1
        for name, attempts in sites.items():
            site = self._sites.get(name)
            if site is None:
                if not attempts.total and not attempts.lost:
                    continue
                site = self._sites[name] = _Site(self._usual.get(name, 0.0))
            self._observe_site(site, attempts)
        return self.list_suspicions()

    def list_suspicions(self) -> dict[str, Suspicion]:
        """Return the sites with suspected abuse, as of the last minute that was measured."""
        return {name: self._describe(site) for name, site in self._sites.items() if site.suspected}

    def forget(self, sites: Iterable[str]) -> None:
        """Forget sites that are no longer there."""
        for name in sites:
            self._sites.pop(name, None)

    def note_lost(self, site: str, tunnels: int) -> None:
        """Note tunnels that were open before a time in which nothing was measured: their clients come back."""
        self._sites.setdefault(site, _Site(self._usual.get(site, 0.0))).lost.append(tunnels)

    def _observe_site(self, site: _Site, attempts: Attempts) -> None:
        site.lost.append(attempts.lost)
        site.recent.append(attempts)
        weighed = weigh(attempts, sum(site.lost), self.thresholds.address_rate)
        hot = self._is_hot(site, attempts, weighed, 1.0)
        site.hot.append(hot)
        if not hot:
            site.usual += (attempts.suspicious - site.usual) / LEARNING_MINUTES
        if site.suspected:
            site.calm = 0 if self._is_hot(site, attempts, weighed, _HELD) else site.calm + 1
            site.suspected = site.suspected + 1 if site.calm < CALM_MINUTES else 0
        elif sum(site.hot) >= HOT_MINUTES:
            site.suspected, site.calm = 1, 0

    def _is_hot(self, site: _Site, attempts: Attempts, weighed: Weighed, part: float) -> bool:
        least = self.thresholds.rate * MINUTE
        few = weighed.few >= least * part
        threshold = max(least, USUAL_FACTOR * site.usual, FLOOD_SHARE * attempts.total)
        many = attempts.are_many and weighed.strangers >= threshold * part
        return few or (many and (self._minutes > WARM_UP_MINUTES or site.suspected > 0))

    def _describe(self, site: _Site) -> Suspicion:
        minutes = [one for one in site.recent if one.suspicious] or list(site.recent)
        sums: dict[Flood, int] = {
            "refused": sum(one.refused for one in minutes),
            "short": sum(one.short for one in minutes),
            "unfinished": sum(one.unfinished for one in minutes),
        }
        flood = max(sums, key=lambda kind: sums[kind])
        suspicious = sum(one.suspicious for one in minutes)
        counts: dict[str, int] = {}
        for one in minutes:
            for heavy in _find_heavy(one.addresses.heavy, self.thresholds.address_rate):
                counts[heavy.address] = counts.get(heavy.address, 0) + heavy.number
        elsewhere = sum(one.elsewhere.heavy for one in minutes)
        few = (sum(counts.values()) + elsewhere) * 2 >= suspicious > 0
        return Suspicion(
            flood=flood,
            rate=sums[flood] / (MINUTE * max(len(minutes), 1)),
            share=min(suspicious / max(sum(one.total for one in minutes), 1), 1.0),
            addresses=max((one.addresses.addresses + one.elsewhere.addresses for one in minutes), default=0),
            culprits=tuple(sorted(counts, key=lambda address: -counts[address])) if few else (),
            minutes=site.suspected,
            few=few,
        )


def _find_heavy(heavy: Iterable[Heavy], address_rate: int) -> list[Heavy]:
    return [one for one in heavy if one.number >= address_rate * MINUTE]
