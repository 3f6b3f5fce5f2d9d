"""What machines tell each other about a minute, to tell floods from ordinary use: numbers, no addresses. No I/O.

Counts of all machines are in the history of each. But why tunnels ended, whether an origin fails, and whose addresses
are known, is seen by the machine that it happens to, while the clients may come back to another one.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, NamedTuple

import msgspec

MOST_SITES = 1000
"""Sites that a machine tells of for one minute: those with most to tell."""

MAX_BYTES = 400_000
"""Bytes of what a machine tells: `MOST_SITES` with the longest names."""

Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class Sighting(NamedTuple):
    """What one machine has seen of a site in a minute.

    `lost` tunnels were ended by us or by their origin; `failing` is whether the health of an origin has changed.
    `known` of the `addresses` with suspicious connections had a tunnel for a minute or more. `heavy` is the number of
    connections from addresses that have more than `abuse.address_rate` each.
    """

    lost: Number = 0
    failing: bool = False
    addresses: Number = 0
    known: Number = 0
    heavy: Number = 0

    def __bool__(self) -> bool:
        return any(self[:])


NOTHING_SEEN = Sighting()

Sightings = dict[str, Sighting]

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Sightings).decode


def encode_sightings(sites: Mapping[str, Sighting]) -> bytes:
    """Return what is sent to other machines about these sites."""
    return _encode(choose_sightings(sites))


def choose_sightings(sites: Mapping[str, Sighting]) -> Sightings:
    """Return what is sent to other machines: `MOST_SITES` at most."""
    found = [(name, one) for name, one in sites.items() if one]
    found.sort(key=lambda pair: -(pair[1].lost + pair[1].heavy + pair[1].addresses))
    return dict(found[:MOST_SITES])


def decode_sightings(text: bytes) -> Sightings:
    """Parse what another machine has sent; nothing if it is not valid."""
    if len(text) > MAX_BYTES:
        return {}
    try:
        return choose_sightings(_decode(text))
    except msgspec.DecodeError:
        return {}


def add_sightings(sightings: Iterable[Sighting]) -> Sighting:
    """Return what machines have seen together. An address that several have seen counts for each of them."""
    total = NOTHING_SEEN
    for one in sightings:
        total = Sighting(
            total.lost + one.lost,
            total.failing or one.failing,
            total.addresses + one.addresses,
            total.known + min(one.known, one.addresses),
            total.heavy + one.heavy,
        )
    return total
