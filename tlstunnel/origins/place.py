"""A place at an origin: counts one attempt to use a member, from connecting until it is closed."""

from collections.abc import Sequence

from tlstunnel.addresses import to_client_key
from tlstunnel.escaping import printable
from tlstunnel.origins.members import Member
from tlstunnel.origins.pool import Pool


class Place:
    """A place at `member` of `pool` for a client at the address `ip`, taken by the constructor.

    `keys` are what `Pool.reserve` returned for it.

    The owner must call `close`. While the member is ejected, the place is its one trial, until the member has accepted
    the connection. A place that is closed before that is known leaves the trial to the next.
    """

    __slots__ = ("_decided", "_ip", "_keys", "closed", "member", "pool")

    def __init__(self, pool: Pool, member: Member, ip: str, keys: Sequence[str] = ()) -> None:
        self.pool = pool
        self.member = member
        self.closed = False
        self._ip = ip
        self._keys = keys
        self._decided = False
        member.take()

    def __repr__(self) -> str:
        return f"<Place at {self.member.text}{', closed' if self.closed else ''}>"

    def record_connected(self) -> None:
        """Record that the member accepted the connection, with TLS if it has to."""
        self._decided = True
        self.pool.record_connected(self.member)

    def record_unreachable(self, reason: str) -> None:
        """Record that the member could not be connected to."""
        self._decided = True
        self.pool.record_unreachable(self.member, printable(reason))

    def record_response(self) -> None:
        """Record that the member sent a valid response."""
        if self.pool.compares:
            self.pool.record_response(self.member, to_client_key(self._ip))

    def record_no_response(self, reason: str) -> None:
        """Record that the member closed the connection, or sent no valid response, or none in time."""
        shown = printable(reason)
        self.member.use.note_failure(shown)
        self.pool.record_no_response(self.member, to_client_key(self._ip), shown)

    def close(self) -> None:
        """Return the place. Do nothing if it has already been returned."""
        if self.closed:
            return
        self.closed = True
        if not self._decided:
            self.member.abandon_trial()
        self.member.release()
        if self._keys:
            self.pool.give_back(self._keys)
