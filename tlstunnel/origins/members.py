"""One address of an origin, and what is known of how it does: how many tunnels it has, whether it may be asked.

Passive: after `Ejection.failures` failures in a row it is left alone for `Ejection.delay`, doubled each time up to
`Ejection.max_delay`; then one handshake tries it, and one only, until that has shown how it is. Active: while its
health check says that it is down, it is not asked. Time is a loop's, seconds; nothing here asks the clock.
"""

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tlstunnel.addresses import OriginAddress
from tlstunnel.backoff import Backoff
from tlstunnel.config import Ejection

if TYPE_CHECKING:
    from tlstunnel.origins.tls import OriginTLS

SocketAddress = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes] | str

CHECKS_DOWN = 2
"""Health checks that must fail in a row before an origin counts as down: one lost packet is no outage. One that
succeeds brings it back."""

_JITTER = 0.1
"""Part of a delay by which it varies: processes that ejected an origin together do not try it together."""


class Use:
    """What an origin as written has, over all its addresses: the tunnels, and the handshakes on their way to one."""

    __slots__ = ("tunnels",)

    def __init__(self) -> None:
        self.tunnels = 0


@dataclass(eq=False, slots=True)
class Member:
    """`address` of an `origin`, spoken to by `tls` if that is not None.

    It outlives reloads that keep that origin and that address.
    """

    origin: OriginAddress
    family: socket.AddressFamily
    address: SocketAddress
    use: Use
    tunnels: int = 0
    weight: int = 1
    backup: bool = False
    most: int | None = None
    tls: "OriginTLS | None" = None
    current: float = 0.0  # of smooth weighted round robin
    _failures: int = 0
    _delay: float = 0.0
    _out_until: float = float("-inf")
    _trial: bool = False
    _checks_failed: int = 0

    @property
    def text(self) -> str:
        """The origin as it is written."""
        return str(self.origin)

    @property
    def key(self) -> tuple[str, str]:
        """What makes it the same member in another pool."""
        return self.text, str(self.address)

    @property
    def full(self) -> bool:
        """Whether its origin has as many tunnels as it may."""
        return self.most is not None and self.use.tunnels >= self.most

    @property
    def ejected(self) -> bool:
        """Whether it has failed too often and has not shown since that it is well."""
        return self._delay > 0

    @property
    def checked_down(self) -> bool:
        """Whether its health check says that it is down."""
        return self._checks_failed >= CHECKS_DOWN

    def usable(self, now: float, soonest: float | None = None) -> bool:
        """Whether a handshake may ask it. `soonest` bounds the delay where there is nobody else to ask."""
        if self.checked_down:
            return False
        return not self.ejected or (not self._trial and now >= self.back_at(soonest))

    def back_at(self, soonest: float | None = None) -> float:
        """When it may be tried again."""
        return self._out_until if soonest is None else min(self._out_until, self._out_until - self._delay + soonest)

    def taken(self) -> None:
        """Count a handshake that begins to ask it."""
        self.tunnels += 1
        self.use.tunnels += 1
        self._trial = self.ejected

    def released(self) -> None:
        """Count down when its tunnel, or what was to become one, has ended."""
        self.tunnels -= 1
        self.use.tunnels -= 1

    def succeeded(self) -> bool:
        """It has answered; say whether it had been ejected."""
        was = self.ejected
        self._failures, self._delay, self._trial = 0, 0.0, False
        return was

    def failed(self, now: float, ejection: Ejection) -> bool:
        """It could not be reached, or gave no answer; say whether that has ejected it just now."""
        self._failures += 1
        was, trial, self._trial = self.ejected, self._trial, False
        if was and not trial:
            return False  # begun before it was ejected
        if self._failures < ejection.failures:
            return False
        backoff = Backoff(float(ejection.delay), float(ejection.max_delay), _JITTER)
        self._delay = backoff.after(self._delay)
        self._out_until = now + backoff.spread(self._delay)
        return not was

    def given_up(self) -> None:
        """Who asked it went before it showed anything: another may try."""
        self._trial = False

    def checked(self, *, well: bool) -> bool:
        """Take a health check's result; say whether that has changed whether it is down."""
        was = self.checked_down
        self._checks_failed = 0 if well else self._checks_failed + 1
        if well and was:
            self.succeeded()
        return was != self.checked_down
