"""How many addresses connect to a site, which of them are known, and which connect most. In memory only.

A set of addresses is a bitmap (linear counting: Whang, Vander-Zanden, Taylor, "A linear-time probabilistic counting
algorithm for database applications", 1990), from which no address can be read. The few that connect most are counted by
name (Metwally, Agrawal, El Abbadi, "Efficient computation of frequent and top-k elements in data streams", 2005), since
they are the ones to throttle. Nothing of this is ever written to a disk.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

BITS = 1 << 16
"""8 KiB for each set: right within 1 % up to 100 000 addresses (measured), and at most 500 000 or so are told apart."""

BUSIEST = 64
"""Addresses that are counted by name, for each site and process."""

LONGEST_KEY = 64
"""Bytes of the key of a set's hash."""


class AddressSet:
    """A set of addresses of which only the number is known, and whether an address is likely in it.

    Sets with the same key can be united, also those of other processes. The key keeps people from choosing addresses
    that look like one.
    """

    __slots__ = ("_bits", "_key")

    def __init__(self, key: bytes, bits: bytes = b"") -> None:
        self._key = key[:LONGEST_KEY]
        self._bits = bytearray(bits) if len(bits) == BITS // 8 else bytearray()

    def add(self, address: str) -> None:
        """Add an address, as `to_client_key` returns it."""
        if not self._bits:
            self._bits = bytearray(BITS // 8)
        number = self._hash(address)
        self._bits[number >> 3] |= 1 << (number & 7)

    def __contains__(self, address: str) -> bool:
        number = self._hash(address)
        return bool(self._bits) and bool(self._bits[number >> 3] >> (number & 7) & 1)

    def __or__(self, other: "AddressSet") -> "AddressSet":
        if not self._bits or not other._bits:
            return AddressSet(self._key, bytes(self._bits or other._bits))
        return AddressSet(self._key, (self._to_number() | other._to_number()).to_bytes(BITS // 8, "little"))

    def __bool__(self) -> bool:
        return bool(self._bits)

    def __len__(self) -> int:
        """The number of addresses, about."""
        empty = max(BITS - self._to_number().bit_count(), 1)
        return round(-BITS * math.log(empty / BITS))

    def count_common(self, other: "AddressSet") -> int:
        """Return how many addresses are in both, about."""
        return min(max(len(self) + len(other) - len(self | other), 0), len(self), len(other))

    def to_bytes(self) -> bytes:
        """Return it for another process; nothing for an empty set."""
        return bytes(self._bits)

    def _to_number(self) -> int:
        return int.from_bytes(self._bits, "little")

    def _hash(self, address: str) -> int:
        digest = hashlib.blake2b(address.encode("utf-8", "replace"), digest_size=8, key=self._key).digest()
        return int.from_bytes(digest, "little") % BITS


class Heavy(NamedTuple):
    """An address that connects often: `number` suspicious connections, `excusable` of which a mistake may explain.

    A client with a mistake in it that connects again and again makes tunnels, or requests that rate limits or a worker
    refuse. Requests that are no handshakes, or that rules refuse, and connections without a request, are not excusable.
    """

    address: str
    number: int
    excusable: int


class Busiest:
    """The addresses with the most suspicious connections. Each number is a lower bound, so none is blamed by chance."""

    def __init__(self, most: int = BUSIEST) -> None:
        self._most = most
        self._counts: dict[str, list[int]] = {}  # count, of which inherited, excusable

    def add(self, address: str, excusable: bool, number: int = 1) -> None:
        """Count suspicious connections of an address."""
        entry = self._counts.get(address)
        if entry is None:
            inherited = 0
            if len(self._counts) >= self._most:
                least = min(self._counts, key=lambda one: self._counts[one][0])
                inherited = self._counts.pop(least)[0]
            entry = self._counts[address] = [inherited, inherited, 0]
        entry[0] += number
        entry[2] += number * excusable

    def list(self) -> tuple[Heavy, ...]:
        """Return them, the busiest first."""
        found = [
            Heavy(address, count - inherited, min(excusable, count - inherited))
            for address, (count, inherited, excusable) in self._counts.items()
        ]
        return tuple(sorted(found, key=lambda heavy: (-heavy.number, heavy.address)))


class AddressReport(NamedTuple):
    """What one process has seen of a site's suspicious connections in a minute, and who is known there."""

    suspicious: bytes = b""
    known: bytes = b""
    heavy: tuple[Heavy, ...] = ()


class AddressFigures(NamedTuple):
    """What all processes have seen together. `known` of the `addresses` had a tunnel for a minute or more."""

    addresses: int = 0
    known: int = 0
    heavy: tuple[Heavy, ...] = ()
    """The busiest addresses. Of one that is known, only what no mistake explains is counted."""


class SiteAddresses:
    """The addresses of one site in one process.

    An address is known for half a day at least, and a day at most, after a tunnel of a minute or more.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._suspicious = AddressSet(key)
        self._busiest = Busiest()
        self._known = AddressSet(key)
        self._known_before = AddressSet(key)

    def note_suspicious(self, address: str, excusable: bool) -> None:
        """Note a connection that was refused, ended within a second or sent no request."""
        self._suspicious.add(address)
        self._busiest.add(address, excusable)

    def note_lasting(self, address: str) -> None:
        """Note a tunnel that has lasted for a minute."""
        self._known.add(address)

    def age(self) -> None:
        """Forget the addresses that were last known two calls ago. Called every half a day."""
        self._known_before, self._known = self._known, AddressSet(self._key)

    def take(self) -> AddressReport:
        """Return what was seen since the last call."""
        known = (self._known | self._known_before).to_bytes()
        report = AddressReport(self._suspicious.to_bytes(), known, self._busiest.list())
        self._suspicious, self._busiest = AddressSet(self._key), Busiest()
        return report


def merge_reports(key: bytes, reports: Iterable[AddressReport]) -> AddressFigures:
    """Return what several processes have seen of a site together."""
    suspicious, known = AddressSet(key), AddressSet(key)
    counts: dict[str, tuple[int, int]] = {}
    for report in reports:
        suspicious |= AddressSet(key, report.suspicious)
        known |= AddressSet(key, report.known)
        for address, count, excusable in report.heavy:
            before = counts.get(address, (0, 0))
            counts[address] = (before[0] + count, before[1] + excusable)
    return AddressFigures(len(suspicious), suspicious.count_common(known), _list_heavy(counts, known))


def _list_heavy(counts: Mapping[str, tuple[int, int]], known: AddressSet) -> tuple[Heavy, ...]:
    found = [
        Heavy(address, count - excusable * (address in known), excusable)
        for address, (count, excusable) in counts.items()
    ]
    return tuple(sorted(found, key=lambda heavy: (-heavy.number, heavy.address))[:BUSIEST])
