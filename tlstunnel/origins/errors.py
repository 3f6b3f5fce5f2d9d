"""Errors that are raised when a request cannot reach an origin, before any byte of the request has been sent.

OriginError
 +-- NoOrigin               no member of the pool may be tried
 |    +-- OriginNotAllowed  its name resolves to no allowed address
 +-- OriginUnreachable      no connection
      +-- OriginTLSFailed   a connection, but no TLS on it
"""

from tlstunnel.journal.events import Reason

ALL_FULL = "all origins have reached max_tunnels"


class OriginError(Exception):
    """The base class. `reason` is for the log."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NoOrigin(OriginError):
    """No member may be tried. `retry_after` is in seconds; None if the pool has no address at all."""

    def __init__(self, reason: str, retry_after: int | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class OriginNotAllowed(NoOrigin):
    """The origin's name resolves, but not to an address that is allowed for this pool."""


class OriginUnreachable(OriginError):
    """No connection to an origin. With `shortage`, the tunnel is the cause: no descriptor, port or memory left."""

    def __init__(self, reason: str, *, shortage: bool = False) -> None:
        super().__init__(reason)
        self.shortage = shortage


class OriginTLSFailed(OriginUnreachable):
    """The TLS handshake with an origin failed.

    `kind` is for the record; `reason` names the origin and explains the failure.
    """

    def __init__(self, kind: Reason, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
