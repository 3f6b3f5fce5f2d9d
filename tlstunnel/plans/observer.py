"""What one serving process sees of its connections, for telling floods from ordinary use. No I/O.

Only connections of sites with a plan or a guideline are looked at. A handshake that opens a tunnel costs one entry in a
list, and a connection that could be part of a flood what `AddressSet` costs. Where nobody wants to know, nothing of
this exists. The addresses never leave the processes of the tunnel, and are kept in memory only.
"""

import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from tlstunnel.addresses import to_client_key
from tlstunnel.journal.events import EndedBy
from tlstunnel.journal.kinds import Kind
from tlstunnel.journal.record import Record
from tlstunnel.plans.addresses import BITS, AddressReport, Heavy, SiteAddresses

LASTING_SECONDS = 60.0
"""After so long a tunnel is one of an ordinary client."""

SHORT_SECONDS = 1.0
"""A tunnel that ends within this time could be part of a flood (`tlstunnel.journal.journal`)."""

AGE_SECONDS = 43_200.0
"""How often the known addresses age: they are known for half a day at least, and a day at most."""

MOST_SITES = 2000
"""Sites whose addresses one process keeps: 24 KiB each at most."""

MOST_REPORTED = 64
"""Sites whose addresses are reported for one minute: those with the most suspicious connections."""

_EXCUSABLE: Mapping[Kind, bool] = {
    "unfinished": False,
    "invalid": False,
    "blocked": False,
    "limited": True,
    "worker": True,
}
"""Which refusals a mistake in a client may explain. What origins do is not the client's doing."""


class Observed(NamedTuple):
    """What one process has seen of a site since it was last asked.

    `lost` is the number of tunnels that we or their origin ended, `failing` whether the health of an origin changed.
    `suspicious` and `known` are sets of addresses, compressed; empty if there is nothing suspicious.
    """

    lost: int = 0
    failing: bool = False
    suspicious: bytes = b""
    known: bytes = b""
    heavy: tuple[Heavy, ...] = ()

    def to_report(self) -> AddressReport:
        """Return its addresses. Raises ValueError if they are none."""
        return AddressReport(_expand(self.suspicious), _expand(self.known), self.heavy)


class _Site:
    __slots__ = ("addresses", "failing", "lost", "suspicious")

    def __init__(self, key: bytes) -> None:
        self.addresses = SiteAddresses(key)
        self.suspicious = 0
        self.lost = 0
        self.failing = False


class Observer:
    """Observes the connections of these sites. `key` is the same in all processes, so that their sets can be united."""

    def __init__(self, key: bytes, sites: Collection[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.key = key
        self._clock = clock
        self._wanted = frozenset(sites)
        self._sites: dict[str, _Site] = {}
        self._young: deque[Record] = deque()
        self._aged = clock()

    def configure(self, sites: Collection[str]) -> None:
        """Observe these sites from now on, and forget the others."""
        self._wanted = frozenset(sites)
        self._sites = {name: site for name, site in self._sites.items() if name in self._wanted}

    def opened(self, record: Record) -> None:
        """Note a tunnel that begins."""
        if record.site in self._wanted:
            self._young.append(record)

    def ended(self, record: Record, kind: Kind | None, seconds: float) -> None:
        """Note the end of a connection. `kind` is None if it had a tunnel."""
        if kind is not None:
            excusable = _EXCUSABLE.get(kind)
            if excusable is not None:
                self._note_suspicious(record, excusable)
            return
        if record.site not in self._wanted:
            return
        if seconds < SHORT_SECONDS:
            return self._note_suspicious(record, excusable=True)
        if seconds < LASTING_SECONDS and record.ended_by == EndedBy.CLIENT:
            return None
        site = self._find(record.site)
        if site is not None:
            if seconds >= LASTING_SECONDS and record.client:
                site.addresses.note_lasting(to_client_key(record.client))
            site.lost += record.ended_by != EndedBy.CLIENT

    def failed(self, record: Record) -> None:
        """Note a connection that sent no request."""
        self._note_suspicious(record, excusable=False)

    def note_failing(self, site: str) -> None:
        """Note that the health of an origin of a site has changed."""
        found = self._find(site)
        if found is not None:
            found.failing = True

    def take(self) -> dict[str, Observed]:
        """Return what was seen since the last call. To be called once a minute."""
        now = self._clock()
        self._note_young(now)
        suspicious = [(site.suspicious, name) for name, site in self._sites.items() if site.suspicious]
        reported = {name for _, name in sorted(suspicious)[-MOST_REPORTED:]}
        found = {}
        for name, site in self._sites.items():
            if name in reported or site.lost or site.failing:
                found[name] = _observe(site, with_addresses=name in reported)
            if site.suspicious and name not in reported:
                site.addresses.take()
            site.suspicious, site.lost, site.failing = 0, 0, False
        if now - self._aged >= AGE_SECONDS:
            self._aged = now
            for site in self._sites.values():
                site.addresses.age()
        return found

    def _note_young(self, now: float) -> None:
        """Note the tunnels that have lasted long enough by now."""
        young = self._young
        while young and now - young[0].started >= LASTING_SECONDS:
            record = young.popleft()
            if not record.ended_by and record.client and (site := self._find(record.site)) is not None:
                site.addresses.note_lasting(to_client_key(record.client))

    def _note_suspicious(self, record: Record, excusable: bool) -> None:
        site = self._find(record.site)
        if site is not None:
            site.suspicious += 1
            if record.client:
                site.addresses.note_suspicious(to_client_key(record.client), excusable)

    def _find(self, name: str) -> _Site | None:
        site = self._sites.get(name)
        if site is None and name in self._wanted and len(self._sites) < MOST_SITES:
            site = self._sites[name] = _Site(self.key)
        return site


def _observe(site: _Site, *, with_addresses: bool) -> Observed:
    if not with_addresses:
        return Observed(site.lost, site.failing)
    report = site.addresses.take()
    suspicious, known = (zlib.compress(one, 1) if one else b"" for one in (report.suspicious, report.known))
    return Observed(site.lost, site.failing, suspicious, known, report.heavy)


def _expand(compressed: bytes) -> bytes:
    if not compressed:
        return b""
    try:
        return zlib.decompressobj().decompress(compressed, BITS // 8)
    except zlib.error as error:
        raise ValueError(str(error)) from None
