"""One address of an origin and its state: how many tunnels it has, and whether it may be tried.

Passive checks: after `Ejection.failures` failures in a row, it is ejected for `Ejection.delay`, doubled each time up to
`Ejection.max_delay`. Then a single handshake tries it, and no other until the result is known. Active checks: it is not
tried while its health check fails. All times are in seconds of the loop's clock, which callers pass in.

Tested by tests/unit/test_origins_balance.py.
"""

import socket
from dataclasses import dataclass

from tlstunnel.addresses import OriginAddress
from tlstunnel.backoff import Backoff
from tlstunnel.config import Ejection
from tlstunnel.origins.tls import OriginTLS

SocketAddress = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes] | str

CHECKS_DOWN = 2
"""Health checks in a row that must fail before an origin is down: one lost packet is not an outage. One success brings
it up again."""

_JITTER = 0.1
"""Part by which a delay varies, so that processes that ejected an origin together do not retry it together."""


class Use:
    """The number of tunnels of a configured origin at all its addresses, including handshakes in progress."""

    __slots__ = ("tunnels",)

    def __init__(self) -> None:
        self.tunnels = 0

    def __repr__(self) -> str:
        return f"<Use {self.tunnels} tunnels>"


@dataclass(eq=False, slots=True, repr=False)
class Member:
    """One `address` of an `origin`, connected to with `tls` if that is not None.

    It survives reloads that keep the origin and the address.
    """

    origin: OriginAddress
    family: socket.AddressFamily
    address: SocketAddress
    use: Use
    tunnels: int = 0
    weight: int = 1
    backup: bool = False
    most: int | None = None
    tls: OriginTLS | None = None
    current: float = 0.0  # for smooth weighted round robin
    _failures: int = 0
    _delay: float = 0.0
    _out_until: float = float("-inf")
    _trial: bool = False
    _checks_failed: int = 0

    def __repr__(self) -> str:
        state = "down" if self.checked_down else "ejected" if self.ejected else "up"
        return f"<Member {self.text} at {self.address_text}: {state}, {self.tunnels} tunnels>"

    @property
    def text(self) -> str:
        """The origin as written in the configuration."""
        return str(self.origin)

    @property
    def address_text(self) -> str:
        """The IP address, or the path of a Unix socket."""
        return self.address if isinstance(self.address, str) else str(self.address[0])

    @property
    def key(self) -> tuple[str, str]:
        """Identifies the same member in another pool."""
        return self.text, str(self.address)

    @property
    def full(self) -> bool:
        """Whether its origin has reached max_tunnels."""
        return self.most is not None and self.use.tunnels >= self.most

    @property
    def ejected(self) -> bool:
        """Whether it has failed too often and has not succeeded since."""
        return self._delay > 0

    @property
    def checked_down(self) -> bool:
        """Whether it is down according to its health check."""
        return self._checks_failed >= CHECKS_DOWN

    def is_usable(self, now: float, soonest: float | None = None) -> bool:
        """Return whether a handshake may try it. `soonest` limits the delay if there is no other member to try."""
        if self.checked_down:
            return False
        return not self.ejected or (not self._trial and now >= self.back_at(soonest))

    def back_at(self, soonest: float | None = None) -> float:
        """Return when it may be tried again."""
        return self._out_until if soonest is None else min(self._out_until, self._out_until - self._delay + soonest)

    def take(self) -> None:
        """Count an attempt to use it."""
        self.tunnels += 1
        self.use.tunnels += 1
        self._trial = self.ejected

    def release(self) -> None:
        """Stop counting an attempt, when it has failed or its tunnel has ended."""
        self.tunnels -= 1
        self.use.tunnels -= 1

    def record_success(self) -> bool:
        """Record a valid response; return whether the member had been ejected."""
        was = self.ejected
        self._failures, self._delay, self._trial = 0, 0.0, False
        return was

    def record_failure(self, now: float, ejection: Ejection) -> bool:
        """Record that it could not be reached or sent no valid response; return whether this ejects it."""
        self._failures += 1
        was, trial, self._trial = self.ejected, self._trial, False
        if was and not trial:
            return False  # the attempt began before the ejection
        if self._failures < ejection.failures:
            return False
        backoff = Backoff(float(ejection.delay), float(ejection.max_delay), _JITTER)
        self._delay = backoff.after(self._delay)
        self._out_until = now + backoff.spread(self._delay)
        return not was

    def abandon_trial(self) -> None:
        """Let another attempt try it, because this one ended without a result."""
        self._trial = False

    def record_check(self, *, healthy: bool) -> bool:
        """Record the result of a health check; return whether this has brought the member up or down."""
        was = self.checked_down
        self._checks_failed = 0 if healthy else self._checks_failed + 1
        if healthy and was:
            self.record_success()
        return was != self.checked_down
