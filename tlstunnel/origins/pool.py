"""The origins of a site or of one of its routes: their addresses, and who is asked in which order."""

import asyncio
import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from tlstunnel.addresses import Networks, OriginAddress
from tlstunnel.config import Ejection, Health, OriginConfig
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.origins.balance import Asking, order_by
from tlstunnel.origins.health import Checks
from tlstunnel.origins.members import Member, SocketAddress, Use

if TYPE_CHECKING:
    from tlstunnel.origins.tls import OriginTLS

FIRST_TRY_AGAIN = 1.0
"""Seconds after which an ejected origin may be tried again while all others are out too, whatever its own delay is."""

_EJECTION = Ejection()

Address = tuple[socket.AddressFamily, SocketAddress]


class NoOrigin(Exception):
    """Nobody can be asked. `reason` is for the log; `retry_after`, in seconds, None where the name is not known.

    `forbidden` says that the name is known, and stands for no address that is allowed.
    """

    def __init__(self, reason: str, retry_after: int | None = None, *, forbidden: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after
        self.forbidden = forbidden


def forbidden(reason: str) -> Refusal:
    """The refusal of an origin that an edge worker has chosen and may not have."""
    text = "the edge worker chose an origin that it may not have"
    return Refusal(502, "edge: origin not allowed", text, detail=reason)


@dataclass(slots=True)
class _Origin:
    """One origin as written, and its members."""

    config: OriginConfig
    use: Use
    members: list[Member]
    fresh_until: float = float("-inf")
    resolving: "asyncio.Task[None] | None" = None
    failure: str = ""
    forbidden: bool = False

    @property
    def text(self) -> str:
        return str(self.config.address)


class Pool:
    """The origins that are asked together. `resolve_every` is how long the addresses of a name are used, seconds.

    Every address of a name is a member. A name is asked for when it is first needed, and again beside the handshakes
    once its addresses are old; those of before are used until there are new ones. `preface` goes before what a health
    check asks; `tls` is how the ``wss://`` ones are spoken to. Of a name's addresses only those `within` are asked,
    where that is not None.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - a table of the configuration
        self,
        origins: Sequence[OriginConfig],
        balance: str = "round_robin",
        ejection: Ejection = _EJECTION,
        health: Health | None = None,
        resolve_every: float = 30.0,
        preface: bytes = b"",
        tls: "OriginTLS | None" = None,
        within: Networks | None = None,
    ) -> None:
        self._tls = tls
        self._within = within
        self._origins = [_Origin(config, Use(), []) for config in origins]
        self._order = order_by(balance)
        self._ejection = ejection
        self._resolve_every = resolve_every
        self._log = structlog.get_logger()
        self.members: list[Member] = []
        self.name = self._origins[0].text if len(origins) == 1 else ""
        """What is asked, as far as that is known before anybody is chosen."""
        self._checks = None if health is None else Checks(health, self, preface)
        for origin in self._origins:
            if (known := _literal(origin.config)) is not None:
                self._learned(origin, [known])
                origin.fresh_until = math.inf
        # The one case that nearly everybody has: nothing to resolve, nobody to choose from.
        self._only = self.members[0] if len(self.members) == len(origins) == 1 else None
        if self._only is not None and (self._only.most is not None or health is not None):
            self._only = None

    def adopt(self, old: "Pool") -> None:
        """Go on with the members of `old` where this one has them too: their tunnels and failures stay counted."""
        before = {member.key: member for member in old.members}
        uses = {origin.text: origin for origin in old._origins}
        for origin in self._origins:
            if (known := uses.get(origin.text)) is not None:
                origin.use = known.use
                if origin.fresh_until != math.inf:
                    origin.fresh_until = known.fresh_until
                    self._learned(origin, [(member.family, member.address) for member in known.members], before)
                else:
                    self._learned(origin, [(member.family, member.address) for member in origin.members], before)
        if self._only is not None:
            self._only = self.members[0]

    def has(self, address: OriginAddress) -> bool:
        """Whether one of the origins is there."""
        return any(origin.config.address == address for origin in self._origins)

    async def order(self, asking: Asking, deadline: float, chosen: OriginAddress | None = None) -> list[Member]:
        """Those that may be asked, in the order in which to ask them; at least one. `deadline` is a loop time.

        Only the origin at `chosen`, which the pool has, where that is not None. Raises NoOrigin, or TimeoutError when a
        name is not known by then.
        """
        if self._only is not None:
            return [self._only]
        loop = asyncio.get_running_loop()
        now = loop.time()
        origins = [origin for origin in self._origins if chosen is None or origin.config.address == chosen]
        for origin in origins:
            if now >= origin.fresh_until and origin.resolving is None:
                origin.resolving = loop.create_task(self._resolve(origin))
        waited_for = [o.resolving for o in origins if not o.members and o.resolving is not None]
        if waited_for and not any(origin.members for origin in origins):
            # One question for all who wait; one who gives up does not end it.
            async with asyncio.timeout_at(deadline):
                await asyncio.shield(asyncio.gather(*waited_for))
        return self._ordered(asking, loop.time(), origins)

    def _ordered(self, asking: Asking, now: float, origins: Sequence[_Origin]) -> list[Member]:
        members = [member for origin in origins for member in origin.members]
        if not members:
            failures = "; ".join(origin.failure for origin in origins)
            raise NoOrigin(failures, forbidden=any(origin.forbidden for origin in origins))
        able = [member for member in members if member.usable(now)]
        if not able:
            able = [member for member in members if member.usable(now, FIRST_TRY_AGAIN)]
        if not able and len(origins) == 1:
            # Who has no other origin loses nothing by asking: a restarted origin is there at once.
            able = [member for member in members if not member.checked_down]
        if not able:
            waits = [member.back_at(FIRST_TRY_AGAIN) - now for member in members if not member.checked_down]
            wait = math.ceil(min((wait for wait in waits if wait > 0), default=FIRST_TRY_AGAIN))
            raise NoOrigin("all origins are down", wait)
        free = [member for member in able if not member.full]
        if not free:
            raise NoOrigin("all origins have as many tunnels as they may", 1)
        primary = [member for member in free if not member.backup]
        backup = [member for member in free if member.backup]
        return [*self._order(primary, asking), *self._order(backup, asking)]

    def succeeded(self, member: Member) -> None:
        """`member` has answered."""
        if member.succeeded():
            self._log.info("origin is back", origin=member.text, address=_shown(member))

    def failed(self, member: Member, why: str) -> None:
        """`member` could not be reached, or gave no answer."""
        if member.failed(asyncio.get_running_loop().time(), self._ejection) and len(self.members) > 1:
            self._log.warning("origin ejected", origin=member.text, address=_shown(member), reason=why)

    def checked(self, member: Member, failure: str) -> None:
        """A health check of `member` has ended, with a failure or with ""."""
        if member.checked(well=not failure):
            if failure:
                self._log.warning("origin is down", origin=member.text, address=_shown(member), reason=failure)
            else:
                self._log.info("origin is up", origin=member.text, address=_shown(member))

    def start(self) -> None:
        """Begin the health checks, if there are any."""
        if self._checks is not None:
            self._checks.start()

    async def known(self) -> Sequence[Member]:
        """The members, those of names looked up where they are old: for the health checks."""
        loop = asyncio.get_running_loop()
        for origin in self._origins:
            if loop.time() >= origin.fresh_until and origin.resolving is None:
                origin.resolving = loop.create_task(self._resolve(origin))
            if origin.resolving is not None:
                await asyncio.shield(origin.resolving)
        return self.members

    async def close(self) -> None:
        """End the health checks and the look-ups."""
        if self._checks is not None:
            await self._checks.close()
        for origin in self._origins:
            if origin.resolving is not None:
                origin.resolving.cancel()

    async def _resolve(self, origin: _Origin) -> None:
        loop = asyncio.get_running_loop()
        address = origin.config.address
        try:
            found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            within = self._within
            allowed = [(family, where) for family, _, _, _, where in found if within is None or where[0] in within]
            origin.forbidden = bool(found) and not allowed
            if origin.forbidden:
                origin.failure = f"{origin.text}: none of its addresses is in worker_origins"
            self._learned(origin, allowed)
        except OSError as error:
            origin.failure = f"{origin.text}: cannot be resolved: {error.strerror or error}"
        finally:
            origin.resolving = None
        # Failed or not: a resolver that is down is not asked at each handshake that has an answer of before.
        if origin.members:
            origin.fresh_until = loop.time() + self._resolve_every

    def _learned(
        self, origin: _Origin, addresses: Sequence[Address], before: dict[tuple[str, str], Member] | None = None
    ) -> None:
        """Give `origin` a member for each address, those of before where there are any."""
        config = origin.config
        known = {member.key: member for member in origin.members} if before is None else before
        members = []
        for family, address in dict.fromkeys(addresses):
            fresh = Member(config.address, family, address, origin.use)
            member = known.get(fresh.key, fresh)
            member.use = origin.use
            member.tls = self._tls if config.address.tls else None
            member.weight, member.backup, member.most = config.weight, config.backup, config.max_tunnels
            members.append(member)
        origin.members = members
        self.members = [member for one in self._origins for member in one.members]


def _literal(config: OriginConfig) -> Address | None:
    """The address that the configuration itself holds; None for a name."""
    address = config.address
    if address.path is not None:
        return socket.AF_UNIX, address.path
    assert address.host is not None
    try:
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        )
    except OSError:
        return None
    family, _, _, _, where = found[0]
    return family, where


def _shown(member: Member) -> str:
    address = member.address
    return address if isinstance(address, str) else str(address[0])
