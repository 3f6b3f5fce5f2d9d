"""One request and its response: what the tunnel knows of it, and what it holds until the end."""

import random
from typing import TYPE_CHECKING

from tlstunnel.firewall.verdict import Verdict
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.request import Request
from tlstunnel.journal.record import Record
from tlstunnel.origins.place import Place
from tlstunnel.sockets.channel import Channel
from tlstunnel.tunnel.client import Client

if TYPE_CHECKING:  # they import libraries that most sites do not need
    from tlstunnel.edge.stage import Directions
    from tlstunnel.firewall.rate_limits import Lease

_ids = random.Random()  # noqa: S311 - an id must be unique, not secret


class Turn:
    """One request of `client`, whose TLS handshake is done; `started` is a time of the loop.

    The stages fill it in: `request` and `early`, the bytes that came after its head; `connection`, what the firewall
    and the edge see; then `verdict`, `directions`, and with `place` and `origin` the connection to an origin. The
    creator of a turn calls `close` at the end, in every case.
    """

    __slots__ = (
        "client",
        "closed",
        "connection",
        "directions",
        "early",
        "origin",
        "place",
        "record",
        "request",
        "site",
        "verdict",
    )

    def __init__(self, client: Client, started: float) -> None:
        assert client.site is not None
        self.client = client
        self.site = client.site
        self.record = Record(
            id=f"{_ids.getrandbits(64):016x}",
            peer=client.socket_peer,
            client=client.peer,
            site=client.site.name,
            sni=client.sni,
            ja4=client.ja4,
            tls_version=client.tls_version,
            cipher=client.cipher,
            started=started,
        )
        self.request: Request | None = None
        self.early = b""
        self.connection: Connection | None = None
        self.verdict: Verdict | None = None
        self.directions: Directions | None = None
        self.place: Place | None = None
        self.origin: Channel | None = None
        self.closed = False

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"at {self.place}" if self.place is not None else "without a place"
        return f"<Turn {self.record.id} of {self.client}: {state}>"

    @property
    def lease(self) -> "Lease | None":
        """What the request holds of the rate limits."""
        return self.verdict.lease if self.verdict is not None else None

    def give_up(self) -> None:
        """Return nothing at the end: an open tunnel holds it all from now on."""
        self.closed = True

    def close(self) -> None:
        """Return what the request holds: its lease, its place, and the connection to its origin unless spliced.

        They are returned once, however often this is called.
        """
        if self.closed:
            return
        self.closed = True
        if self.lease is not None:
            self.lease.close()
        if self.place is not None:
            self.place.close()
        if self.origin is not None:
            self.origin.release()
            self.origin.sock.close()
