"""The origins of a site or of one of its routes: their addresses, and the order in which to try them.

Tested by tests/promises/test_origins_several.py.
"""

import asyncio
import contextlib
import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tlstunnel.addresses import Networks, OriginAddress
from tlstunnel.config import Ejection, Health, OriginConfig
from tlstunnel.escaping import printable
from tlstunnel.handshake.request import PlainRequest, Request
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.origins.balance import select_order
from tlstunnel.origins.condition import Condition, State
from tlstunnel.origins.errors import ALL_FULL, NoOrigin, OriginNotAllowed
from tlstunnel.origins.health import Checks
from tlstunnel.origins.members import JITTER, Member, Use
from tlstunnel.origins.sharing import EJECTION, Ejected, list_parts, make_key
from tlstunnel.origins.tls import OriginTLS
from tlstunnel.sockets.resolve import Address, resolve
from tlstunnel.state.counters import CountersUnavailable, LimitCheck
from tlstunnel.state.counting import Counting

_EJECTION = Ejection()

MAX_EARLY = 64
"""Ejections that are noted for members whose names are not resolved yet."""


@dataclass(slots=True)
class _Origin:
    """One origin as configured, and its members."""

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


class PoolMetrics(Protocol):
    """Counts what happens to the members of pools (`tlstunnel.origins.metrics`)."""

    def count_failure(self, pool: "Pool", member: Member, reason: str) -> None:
        """Count an attempt that failed because of `member`."""

    def count_ejection(self, member: Member) -> None:
        """Count that `member` was ejected."""


class Pool:
    """A group of origins that share requests.

    Every address of a name is a member. A name is resolved when it is first needed, and again in the background once
    its addresses are older than `resolve_every` seconds; meanwhile the old addresses are used. Health checks send
    `preface` first. `tls` has the settings for ``wss://`` origins. If `within` is not None, only addresses in it are
    used. With `counting`, the pools of the same `scope` in other processes count their tunnels together with this one.
    """

    def __init__(  # noqa: PLR0913 - the keys of a configuration's table
        self,
        origins: Sequence[OriginConfig],
        *,
        balance: str = "round_robin",
        ejection: Ejection = _EJECTION,
        health: Health | None = None,
        resolve_every: float = 30.0,
        preface: bytes = b"",
        tls: OriginTLS | None = None,
        within: Networks | None = None,
        counting: Counting | None = None,
        scope: Sequence[str] = (),
    ) -> None:
        self.key = make_key("pool", *scope)
        self._counting = counting
        self._compares_tunnels = balance == "least_tunnels"
        self._tls = tls
        self._within = within
        self._origins = [_Origin(config, Use(self._make_key("origin", config)), []) for config in origins]
        self._order = select_order(balance)
        self._ejection = ejection
        self._resolve_every = resolve_every
        self._log = structlog.get_logger()
        self.on_health_change: Callable[[], None] | None = None
        """Called when a member fails or is restored."""
        self.metrics: PoolMetrics | None = None
        self.members: list[Member] = []
        self.name = self._origins[0].text if len(origins) == 1 else ""
        """The only origin; empty if there are several."""
        self._early: dict[str, float] = {}
        """Until when members are ejected, by their keys, whose names were not resolved yet."""
        self._checks = None if health is None else Checks(health, self, preface)
        for origin in self._origins:
            if (known := _parse_literal(origin.config)) is not None:
                self._set_addresses(origin, [known])
                origin.fresh_until = math.inf
        # The most common case: nothing to resolve and no choice.
        self._only = self.members[0] if len(self.members) == len(origins) == 1 else None
        if self._only is not None and (self._only.most is not None or health is not None):
            self._only = None

    def __repr__(self) -> str:
        return f"<Pool {', '.join(origin.text for origin in self._origins)}: {len(self.members)} members>"

    def adopt(self, old: "Pool") -> None:
        """Take over the members of `old` that this pool has too, with their counts of tunnels and failures."""
        before = {member.key: member for member in old.members}
        uses = {origin.text: origin for origin in old._origins}
        for origin in self._origins:
            if (known := uses.get(origin.text)) is not None:
                origin.use = known.use
                if origin.fresh_until != math.inf:
                    origin.fresh_until = known.fresh_until
                    self._set_addresses(origin, [(member.family, member.address) for member in known.members], before)
                else:
                    self._set_addresses(origin, [(member.family, member.address) for member in origin.members], before)
        if self._only is not None:
            self._only = self.members[0]

    def has(self, address: OriginAddress) -> bool:
        """Return whether one of the origins has this address."""
        return any(origin.config.address == address for origin in self._origins)

    async def order(
        self, ip: str, request: Request, deadline: float, chosen: OriginAddress | None = None
    ) -> list[Member]:
        """Return the members to try for this request of the client `ip`, in this order; at least one.

        If `chosen` is not None, only members of the origin with that address, which the pool has. Raises NoOrigin, and
        TimeoutError if no name is resolved by `deadline`, a time of the loop.
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
            # All waiting requests share one look-up; one that times out does not cancel it.
            done, pending = await asyncio.wait(waited_for, timeout=max(deadline - loop.time(), 0.0))
            if pending:
                raise TimeoutError
            for task in done:
                if not task.cancelled():
                    task.result()  # an error in it is a bug
        if self._compares_tunnels:
            await self._count_everywhere()
        return self._order_usable(ip, request, loop.time(), origins)

    def counts(self, member: Member) -> bool:
        """Return whether `reserve` has to be called before `member` is used."""
        return self._counting is not None and (member.most is not None or self._compares_tunnels)

    async def reserve(self, member: Member) -> Sequence[str] | None:
        """Count an attempt to use `member`; return what to `give_back`, None if its origin has reached max_tunnels.

        Raises CountersUnavailable.
        """
        assert self._counting is not None, "see counts"
        keys: list[str] = []
        if member.most is not None:
            check = LimitCheck(member.use.key, max_tunnels=member.most)
            (result,) = await self._counting.counters.check([check])
            if result.exceeded:
                return None
            keys.append(check.key)
        if self._compares_tunnels and self._counting.together:
            self._counting.counters.take_tunnels([member.shared_key])
            keys.append(member.shared_key)
        return keys

    def give_back(self, keys: Sequence[str]) -> None:
        """Give back what was reserved."""
        assert self._counting is not None, "nothing was reserved"
        self._counting.counters.return_tunnels(keys)

    async def _count_everywhere(self) -> None:
        """Count the tunnels of all processes, if that is possible."""
        counting, members = self._counting, list(self.members)
        counts = [0] * len(members)
        if counting is not None and counting.together and len(members) > 1:
            with contextlib.suppress(CountersUnavailable):  # those of this process will do
                counts = await counting.counters.count_tunnels([member.shared_key for member in members])
        for member, count in zip(members, counts, strict=True):
            member.everywhere = count

    def take_ejection(self, ejected: Ejected, age: float = 0.0) -> None:
        """Do as another process has done `age` seconds ago: eject a member, or restore it."""
        member = next((one for one in self.members if one.shared_key == ejected.member), None)
        now = asyncio.get_running_loop().time()
        longest = float(self._ejection.max_delay) * (1.0 + JITTER)
        seconds = min(ejected.seconds, longest) - age
        if member is None:
            self._note_early(ejected.member, now + seconds, now)
        elif not self.compares:
            return
        elif ejected.seconds == 0.0:
            member.record_connected()
        elif seconds > 0.0:
            member.take_ejection(now, seconds)

    def _note_early(self, key: str, until: float, now: float) -> None:
        """Note an ejection of a member whose name is not resolved yet."""
        self._early = {key: until for key, until in self._early.items() if until > now}
        self._early.pop(key, None)
        if until > now and len(self._early) < MAX_EARLY:
            self._early[key] = until

    def announce_ejections(self) -> None:
        """Tell the other processes which members are ejected."""
        now = asyncio.get_running_loop().time()
        for member in self.members:
            if member.ejected and member.out_until > now:
                self._announce(member, member.out_until - now)

    def _announce(self, member: Member, seconds: float) -> None:
        if self._counting is not None and self.compares:
            text = Ejected(self.key, member.shared_key, seconds).encode()
            self._counting.announce(EJECTION, text, member.shared_key, seconds)

    def _order_usable(self, ip: str, request: Request, now: float, origins: Sequence[_Origin]) -> list[Member]:
        """Return those that are usable in the order of the balance, then the others, as the last resort.

        If none is usable, all that are only ejected count as usable, or else all.
        """
        members = [member for origin in origins for member in origin.members]
        if not members:
            failures = "; ".join(origin.failure for origin in origins)
            raise OriginNotAllowed(failures) if any(origin.forbidden for origin in origins) else NoOrigin(failures)
        members = [member for member in members if not member.full]
        if not members:
            raise NoOrigin(ALL_FULL, 1)
        plain = isinstance(request, PlainRequest)
        usable = [member for member in members if member.is_usable(now, plain=plain)]
        usable = usable or [member for member in members if not member.checked_down] or members
        primary = [member for member in usable if not member.backup]
        backup = [member for member in usable if member.backup]
        order = [*self._order(primary, ip, request), *self._order(backup, ip, request)]
        if len(order) < len(members):
            order += sorted((member for member in members if member not in order), key=_rank_unusable)
        return order

    @property
    def compares(self) -> bool:
        """Whether there are several members, so that one can be ejected."""
        return len(self.members) > 1

    def record_connected(self, member: Member) -> None:
        """Record that `member` accepted a connection, with TLS if it has to."""
        member.use.note_connected()
        if member.record_connected() and self.compares:
            self._log.info(Event.ORIGIN_RESTORED, origin=member.text, address=member.address_text)
            self._announce(member, 0.0)
            self._note_health_change()

    def record_unreachable(self, member: Member, reason: str) -> None:
        """Record that `member` could not be connected to."""
        member.use.note_failure(reason)
        self._count_failure(member, "unreachable")
        now, before = asyncio.get_running_loop().time(), member.out_until
        if member.record_unreachable(now, self._ejection) and self.compares:
            self._log_ejection(member, reason)
        if member.out_until != before:
            self._announce(member, member.out_until - now)
            self._note_health_change()

    def record_response(self, member: Member, client: str) -> None:
        """Record that `member` sent `client` a valid response."""
        member.record_response(client, asyncio.get_running_loop().time())

    def record_no_response(self, member: Member, client: str, reason: str) -> None:
        """Record that `member` sent `client` no valid response."""
        self._count_failure(member, "no response")
        if not self.compares:
            return
        now = asyncio.get_running_loop().time()
        if member.record_no_response(client, now, self._ejection):
            self._note_health_change()
            self._log_ejection(member, reason)
            self._announce(member, member.out_until - now)

    def _note_health_change(self) -> None:
        if self.on_health_change is not None:
            self.on_health_change()

    def _count_failure(self, member: Member, reason: str) -> None:
        if self.metrics is not None:
            self.metrics.count_failure(self, member, reason)

    def _log_ejection(self, member: Member, reason: str) -> None:
        if self.metrics is not None:
            self.metrics.count_ejection(member)
        self._log.warning(Event.ORIGIN_EJECTED, origin=member.text, address=member.address_text, reason=reason)

    def record_check(self, member: Member, failure: str) -> None:
        """Record the result of a health check of `member`: what failed, or "" if it succeeded."""
        if failure:
            member.use.note_problem(f"health check: {printable(failure)}")
            self._count_failure(member, "health check")
        if member.record_check(healthy=not failure):
            self._note_health_change()
            if failure:
                self._log.warning(Event.ORIGIN_DOWN, origin=member.text, address=member.address_text, reason=failure)
            else:
                self._log.info(Event.ORIGIN_UP, origin=member.text, address=member.address_text)

    def list_conditions(self) -> list[Condition]:
        """Return what each origin is like, in the order of the configuration."""
        now = asyncio.get_running_loop().time()
        return [self._describe(origin, now) for origin in self._origins]

    def _describe(self, origin: _Origin, now: float) -> Condition:
        use, members = origin.use, origin.members
        state, until = self._find_state(members, now)
        problem = use.problem
        if not members and origin.failure:
            problem = printable(origin.failure)
        return Condition(
            config=origin.config,
            state=state,
            checked=self._checks is not None,
            until=until,
            tunnels=use.tunnels,
            connects=use.connects,
            failures=use.failures,
            connected=use.connected,
            problem=problem,
            failed=use.failed,
            addresses=tuple(member.address_text for member in members),
        )

    def _find_state(self, members: Sequence[Member], now: float) -> tuple[State, float | None]:
        """Return the state of an origin with these members, and until when it is ejected."""
        if not members:
            return "unresolved", None
        if all(member.checked_down for member in members):
            return "down", None
        if not all(member.checked_down or member.ejected for member in members):
            return "healthy", None
        if not self.compares:
            return "down", None  # without another one, it is tried all the same
        until = min(member.out_until for member in members if not member.checked_down)
        return ("ejected", until) if until > now else ("trial", None)

    def start(self) -> None:
        """Start the health checks, if there are any."""
        if self._checks is not None:
            self._checks.start()

    async def resolve(self) -> Sequence[Member]:
        """Resolve the names whose addresses are old, and return the members: for the health checks."""
        loop = asyncio.get_running_loop()
        for origin in self._origins:
            if loop.time() >= origin.fresh_until and origin.resolving is None:
                origin.resolving = loop.create_task(self._resolve(origin))
            if origin.resolving is not None:
                await asyncio.shield(origin.resolving)
        return self.members

    async def close(self) -> None:
        """Stop the health checks and the look-ups."""
        if self._checks is not None:
            await self._checks.close()
        for origin in self._origins:
            if origin.resolving is not None:
                origin.resolving.cancel()

    async def _resolve(self, origin: _Origin) -> None:
        address = origin.config.address
        assert address.host is not None
        try:
            found = await resolve(address.host, address.port)
            within = self._within
            allowed = [(family, where) for family, where in found if within is None or where[0] in within]
            origin.forbidden = bool(found) and not allowed
            if origin.forbidden:
                origin.failure = f"{origin.text}: none of its addresses is in worker_origins"
            self._set_addresses(origin, allowed)
        except OSError as error:
            origin.failure = f"{origin.text}: cannot be resolved: {error.strerror or error}"
        finally:
            origin.resolving = None
        # Also after a failure: not every handshake should query a resolver that is down while old addresses are in use.
        if origin.members:
            origin.fresh_until = asyncio.get_running_loop().time() + self._resolve_every

    def _make_key(self, kind: str, config: OriginConfig, *parts: str) -> str:
        return make_key(kind, self.key, *list_parts(config.address), *parts)

    def _set_addresses(
        self, origin: _Origin, addresses: Sequence[Address], before: dict[tuple[str, str], Member] | None = None
    ) -> None:
        """Set the members of `origin`, one per address, and reuse existing ones."""
        config = origin.config
        known = {member.key: member for member in origin.members} if before is None else before
        members = []
        for family, address in dict.fromkeys(addresses):
            fresh = Member(config.address, family, address, origin.use)
            member = known.get(fresh.key, fresh)
            member.shared_key = self._make_key("member", config, str(address))
            if (until := self._early.pop(member.shared_key, None)) is not None:
                now = asyncio.get_running_loop().time()
                if until > now:
                    member.take_ejection(now, until - now)
            member.use = origin.use
            member.tls = self._tls if config.address.tls else None
            member.weight, member.backup, member.most = config.weight, config.backup, config.max_tunnels
            members.append(member)
        origin.members = members
        self.members = [member for one in self._origins for member in one.members]


def _rank_unusable(member: Member) -> tuple[bool, bool]:
    return member.checked_down, member.backup


def _parse_literal(config: OriginConfig) -> Address | None:
    """Return the address in the configuration; None for a name."""
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
