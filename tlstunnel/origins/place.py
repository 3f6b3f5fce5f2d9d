"""A place at an origin: counts one attempt to use a member, from connecting until it is closed."""

from tlstunnel.escaping import printable
from tlstunnel.origins.members import Member
from tlstunnel.origins.pool import Pool


class Place:
    """A place at `member` of `pool`, taken by the constructor. The owner must call `close`.

    While the member is ejected, the place is its one trial. A place that is closed before it has recorded a success or
    a failure leaves the trial to the next.
    """

    __slots__ = ("_decided", "closed", "member", "pool")

    def __init__(self, pool: Pool, member: Member) -> None:
        self.pool = pool
        self.member = member
        self.closed = False
        self._decided = False
        member.take()

    def __repr__(self) -> str:
        return f"<Place at {self.member.text}{', closed' if self.closed else ''}>"

    def record_success(self) -> None:
        """Record that the member sent a valid response."""
        self._decided = True
        self.pool.record_success(self.member)

    def record_failure(self, reason: str) -> None:
        """Record that the member could not be reached, or sent no valid response."""
        self._decided = True
        self.pool.record_failure(self.member, printable(reason))

    def close(self) -> None:
        """Return the place. Do nothing if it has already been returned."""
        if self.closed:
            return
        self.closed = True
        if not self._decided:
            self.member.abandon_trial()
        self.member.release()
