"""One address of an origin and its state: how many tunnels it has, and whether it may be tried.

Passive checks: it is ejected after `Ejection.failures` failures in a row to connect or to make the TLS handshake, or
when requests of most of several clients failed, for `Ejection.delay`, doubled each time up to `Ejection.max_delay`.
Then a single upgrade request tries it, and no other until it has accepted the connection. No client can eject it alone:
one that gets no response, as for an unknown path at some servers, counts once. Active checks: it is tried last while
its health check fails. All times are in seconds of the loop's clock, which callers pass in.

Tested by tests/unit/test_origins_balance.py.
"""

import socket
import time
from dataclasses import dataclass, field

from tlstunnel.addresses import OriginAddress
from tlstunnel.backoff import Backoff
from tlstunnel.config import Ejection
from tlstunnel.escaping import shorten
from tlstunnel.origins.tls import OriginTLS
from tlstunnel.sockets.resolve import SocketAddress

CHECKS_DOWN = 2
"""Health checks in a row that must fail before an origin is down: one lost packet is not an outage. One success brings
it up again."""

PLAIN_WAIT = 10.0
"""Seconds after the delay of an ejection after which plain requests use the member too. Before, they leave it to an
upgrade request; a site may have none for hours."""

JITTER = 0.1
"""Part by which a delay varies, so that processes that ejected an origin together do not retry it together."""


LONGEST_PROBLEM = 300
"""Characters of what went wrong last."""


class Responses:
    """The last result of each client's requests at one member: a valid response, or none.

    Only the last one counts, so one client, however many requests it sends, has one vote. IPv6 clients are their /64.
    """

    WINDOW = 60.0
    """Seconds after which the results are forgotten: more than `timeouts.origin_response`, so that those of a server
    that does not respond come together."""

    MOST_CLIENTS = 200
    """Clients that are remembered. The next one begins a new window."""

    FAILED_CLIENTS = 5
    """Clients that must have failed. Envoy's outlier detection wants 5 hosts and 50 requests for its failure rate."""

    FAILED_SHARE = 0.8
    """Share of the clients that must have failed. Envoy's is 0.85 (failure_percentage_threshold)."""

    __slots__ = ("_began", "_failed", "_succeeded")

    def __init__(self) -> None:
        self._began = float("-inf")
        self._failed: set[str] = set()
        self._succeeded: set[str] = set()

    def __repr__(self) -> str:
        return f"<Responses: {len(self._failed)} clients without, {len(self._succeeded)} with>"

    def add(self, client: str, now: float, *, succeeded: bool) -> bool:
        """Add a result; return whether so many clients have failed that the member should be ejected."""
        if now - self._began > self.WINDOW or len(self._failed) + len(self._succeeded) >= self.MOST_CLIENTS:
            self._began = now
            self.clear()
        if succeeded:
            self._succeeded.add(client)
            self._failed.discard(client)
            return False
        self._failed.add(client)
        self._succeeded.discard(client)
        failed = len(self._failed)
        return failed >= self.FAILED_CLIENTS and failed >= self.FAILED_SHARE * (failed + len(self._succeeded))

    def clear(self) -> None:
        """Forget all results."""
        self._failed.clear()
        self._succeeded.clear()


class Use:
    """What a configured origin does at all its addresses, in this process.

    `tunnels` is their number, including handshakes in progress; all processes count them under `key`. `connects` and
    `failures` count since the start, `connected` is when it was connected to last, and `problem` what went wrong last,
    `failed` when; these are of ``time.monotonic``, 0 if it has not happened.
    """

    __slots__ = ("connected", "connects", "failed", "failures", "key", "problem", "tunnels")

    def __init__(self, key: str = "") -> None:
        self.key = key
        self.tunnels = 0
        self.connects = self.failures = 0
        self.connected = self.failed = 0.0
        self.problem = ""

    def __repr__(self) -> str:
        return f"<Use {self.tunnels} tunnels>"

    def note_connected(self) -> None:
        """Note that it was connected to."""
        self.connects += 1
        self.connected = time.monotonic()

    def note_failure(self, problem: str) -> None:
        """Note that a request failed because of it."""
        self.failures += 1
        self.note_problem(problem)

    def note_problem(self, problem: str) -> None:
        """Note what is wrong with it. It must be escaped."""
        self.problem = shorten(problem, LONGEST_PROBLEM)
        self.failed = time.monotonic()


@dataclass(eq=False, slots=True, repr=False)
class Member:
    """One `address` of an `origin`, connected to with `tls` if that is not None.

    It survives reloads that keep the origin and the address. `tunnels` are those of this process, and `everywhere`, as
    far as they are counted, those of all processes at the last count. They have the member under `shared_key`.
    """

    origin: OriginAddress
    family: socket.AddressFamily
    address: SocketAddress
    use: Use
    shared_key: str = ""
    tunnels: int = 0
    everywhere: int = 0
    weight: int = 1
    backup: bool = False
    most: int | None = None
    tls: OriginTLS | None = None
    current: float = 0.0  # for smooth weighted round robin
    _responses: Responses = field(default_factory=Responses)
    _failures: int = 0
    _ejected: bool = False
    _delay: float = 0.0  # of the last ejection; 0 once it has responded since
    _out_until: float = float("-inf")
    _trial: bool = False
    _checks_failed: int = 0
    text: str = field(init=False)
    """The origin as written in the configuration."""

    def __post_init__(self) -> None:
        self.text = str(self.origin)

    def __repr__(self) -> str:
        state = "down" if self.checked_down else "ejected" if self.ejected else "up"
        return f"<Member {self.text} at {self.address_text}: {state}, {self.tunnels} tunnels>"

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
        """Whether its origin has reached max_tunnels in this process alone."""
        return self.most is not None and self.use.tunnels >= self.most

    @property
    def ejected(self) -> bool:
        """Whether it has failed too often and has not accepted a connection since."""
        return self._ejected

    @property
    def checked_down(self) -> bool:
        """Whether it is down according to its health check."""
        return self._checks_failed >= CHECKS_DOWN

    @property
    def out_until(self) -> float:
        """The end of its last ejection. A trial after that decides whether it is ejected again."""
        return self._out_until

    def is_usable(self, now: float, *, plain: bool = False) -> bool:
        """Return whether a request may use it, an upgrade request or a `plain` one, while others are usable."""
        if self.checked_down:
            return False
        if not self._ejected:
            return True
        return now >= self._out_until + PLAIN_WAIT if plain else not self._trial and now >= self._out_until

    def take(self) -> None:
        """Count an attempt to use it."""
        self.tunnels += 1
        self.use.tunnels += 1
        self._trial = self.ejected

    def release(self) -> None:
        """Stop counting an attempt, when it has failed or its tunnel has ended."""
        self.tunnels -= 1
        self.use.tunnels -= 1

    def record_connected(self) -> bool:
        """Record that it accepted a connection, with TLS if it has to; return whether it had been ejected."""
        was = self._ejected
        self._failures, self._ejected, self._trial = 0, False, False
        return was

    def record_unreachable(self, now: float, ejection: Ejection) -> bool:
        """Record that it could not be connected to; return whether this ejects it."""
        self._failures += 1
        self._trial = False
        if self._ejected:
            if now >= self._out_until:  # otherwise the attempt began before the ejection, or there was no other member
                self._eject(now, ejection)
            return False
        if self._failures < ejection.failures:
            return False
        self._eject(now, ejection)
        return True

    def record_response(self, client: str, now: float) -> None:
        """Record that it sent `client` a valid response."""
        if not self._ejected:
            self._delay = 0.0
        self._responses.add(client, now, succeeded=True)

    def record_no_response(self, client: str, now: float, ejection: Ejection) -> bool:
        """Record that it sent `client` no valid response; return whether this ejects it."""
        if not self._responses.add(client, now, succeeded=False) or self._ejected:
            return False
        self._eject(now, ejection)
        return True

    def _eject(self, now: float, ejection: Ejection) -> None:
        backoff = Backoff(float(ejection.delay), float(ejection.max_delay), JITTER)
        self._delay = backoff.after(self._delay)
        self._out_until = now + backoff.spread(self._delay)
        self._ejected = True
        self._responses.clear()

    def take_ejection(self, now: float, seconds: float) -> None:
        """Count as ejected for so many seconds, because another process has ejected it."""
        self._ejected = True
        self._out_until = max(self._out_until, now + seconds)
        self._delay = max(self._delay, seconds)
        self._responses.clear()

    def abandon_trial(self) -> None:
        """Let another attempt try it, because this one ended without a result."""
        self._trial = False

    def record_check(self, *, healthy: bool) -> bool:
        """Record the result of a health check; return whether this has brought the member up or down."""
        was = self.checked_down
        self._checks_failed = 0 if healthy else self._checks_failed + 1
        if healthy and was:
            self.record_connected()
            self._delay = 0.0
        return was != self.checked_down
