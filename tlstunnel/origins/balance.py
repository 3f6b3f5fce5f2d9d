"""Which origin a handshake asks, and whom it asks next should that one fail. Pure: members in, an order out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from tlstunnel.handshake.request import Request
from tlstunnel.origins.members import Member


@dataclass(frozen=True, slots=True)
class Asking:
    """Who asks for what: the client's address, and its request."""

    ip: str
    request: Request


Order = Callable[[Sequence[Member], Asking], list[Member]]
"""Puts members that may be asked into the order in which to ask them."""


def order_by(balance: str) -> Order:
    """The order that a configuration's ``balance`` names."""
    if balance == "round_robin":
        return round_robin
    if balance == "least_tunnels":
        return least_tunnels
    kind, _, name = balance.removeprefix("hash:").partition(":")
    wanted = name.encode("ascii")
    if kind == "header":
        return lambda members, asking: rendezvous(members, _field(asking, wanted.lower()))
    if kind == "cookie":
        return lambda members, asking: rendezvous(members, _cookie(asking, wanted))
    return lambda members, asking: rendezvous(members, asking.ip.encode())


def round_robin(members: Sequence[Member], _: Asking) -> list[Member]:
    """Smooth weighted round robin, nginx's: whoever has waited longest for its weight comes first."""
    if len(members) < 2:
        return list(members)
    total = 0
    for member in members:
        member.current += member.weight
        total += member.weight
    order = sorted(members, key=lambda member: -member.current)
    order[0].current -= total
    return order


def least_tunnels(members: Sequence[Member], asking: Asking) -> list[Member]:
    """Fewest tunnels for its weight first, in turn where several have as few."""
    return sorted(round_robin(members, asking), key=lambda member: (member.tunnels + 1) / member.weight)


def rendezvous(members: Sequence[Member], key: bytes) -> list[Member]:
    """Weighted rendezvous hashing: every process agrees, and one origin less moves only its own clients.

    Thaler and Ravishankar 1998; weights by Schindelhauer and Schomaker 2005: ``-weight / log(hash)``.
    """
    return sorted(members, key=lambda member: _score(member, key))


def _score(member: Member, key: bytes) -> float:
    text = "\n".join(member.key).encode("utf-8", "surrogateescape")
    digest = blake2b(text, key=blake2b(key, digest_size=32).digest(), digest_size=8).digest()
    # In the open interval from 0 to 1.
    return member.weight / math.log((int.from_bytes(digest) + 0.5) / 2.0**64)


def _field(asking: Asking, name: bytes) -> bytes:
    values = asking.request.by_name.get(name)
    return b"\n".join(values) if values else asking.ip.encode()


def _cookie(asking: Asking, wanted: bytes) -> bytes:
    for pair in b";".join(asking.request.by_name.get(b"cookie", ())).split(b";"):
        name, equals, value = pair.partition(b"=")
        if equals and name.strip(b" \t") == wanted:
            return value.strip(b" \t")
    return asking.ip.encode()
