"""Balance modes: in which order a handshake tries the origins. Pure functions."""

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b

from tlstunnel.handshake.request import Request
from tlstunnel.origins.members import Member

Order = Callable[[Sequence[Member], str, Request], list[Member]]
"""Sorts members into the order in which to try them, given a client's IP address and its request."""


def select_order(balance: str) -> Order:
    """Return the function for the value of ``balance`` in the configuration."""
    if balance == "round_robin":
        return round_robin
    if balance == "least_tunnels":
        return least_tunnels
    kind, _, name = balance.removeprefix("hash:").partition(":")
    field = name.encode("ascii")
    if kind == "header":
        return lambda members, ip, request: rendezvous(members, _read_field(ip, request, field.lower()))
    if kind == "cookie":
        return lambda members, ip, request: rendezvous(members, _read_cookie(ip, request, field))
    return lambda members, ip, request: rendezvous(members, ip.encode())


def round_robin(members: Sequence[Member], _ip: str, _request: Request) -> list[Member]:
    """Order by smooth weighted round robin, as in nginx: the member that has waited longest for its weight is first."""
    if len(members) < 2:
        return list(members)
    total = 0
    for member in members:
        member.current += member.weight
        total += member.weight
    order = sorted(members, key=lambda member: -member.current)
    order[0].current -= total
    return order


def least_tunnels(members: Sequence[Member], ip: str, request: Request) -> list[Member]:
    """Order by the number of tunnels relative to the weight, fewest first; equal members by round robin."""

    def rank(member: Member) -> float:
        return (max(member.tunnels, member.everywhere) + 1) / member.weight

    return sorted(round_robin(members, ip, request), key=rank)


def rendezvous(members: Sequence[Member], key: bytes) -> list[Member]:
    """Order by weighted rendezvous hashing: all processes agree, and removing an origin moves only its own clients.

    Thaler and Ravishankar 1998; weights by Schindelhauer and Schomaker 2005: ``-weight / log(hash)``.
    """
    return sorted(members, key=lambda member: _score(member, key))


def _score(member: Member, key: bytes) -> float:
    text = "\n".join(member.key).encode("utf-8", "surrogateescape")
    digest = blake2b(text, key=blake2b(key, digest_size=32).digest(), digest_size=8).digest()
    # The argument of log is in the open interval from 0 to 1.
    return member.weight / math.log((int.from_bytes(digest) + 0.5) / 2.0**64)


def _read_field(ip: str, request: Request, name: bytes) -> bytes:
    values = request.by_name.get(name)
    return b"\n".join(values) if values else ip.encode()


def _read_cookie(ip: str, request: Request, cookie: bytes) -> bytes:
    for pair in b";".join(request.by_name.get(b"cookie", ())).split(b";"):
        name, equals, value = pair.partition(b"=")
        if equals and name.strip(b" \t") == cookie:
            return value.strip(b" \t")
    return ip.encode()
