"""Reach an origin: connect, and make the TLS handshake for ``wss://``; try the next member if either fails.

Tested by tests/promises/test_origin_tls.py.
"""

from collections.abc import Sequence

from tlstunnel.origins.connect import connect
from tlstunnel.origins.errors import OriginTLSFailed
from tlstunnel.origins.members import Member
from tlstunnel.origins.place import Place
from tlstunnel.origins.pool import Pool
from tlstunnel.sockets.channel import Channel
from tlstunnel.sockets.deadlines import Wakeup
from tlstunnel.sockets.readiness import Readiness


async def reach(  # noqa: PLR0913 - the members, the sockets and the client
    pool: Pool,
    members: Sequence[Member],
    *,
    preface: bytes,
    readiness: Readiness,
    wakeup: Wakeup,
    client: Channel,
) -> tuple[Place, Channel]:
    """Reach the first of `members` that can be reached before the deadline of `wakeup`; return the place there.

    `preface`, a PROXY header or nothing, is sent before TLS. No byte of a request has been sent when this returns.
    Raises OriginUnreachable, or its subclass OriginTLSFailed; TimeoutError; ClientGone if the client disconnects.
    """
    while True:
        place, channel = await connect(pool, members, readiness, wakeup, client)
        tls = place.member.tls
        if tls is None and not preface:
            return place, channel
        try:
            if preface:
                await channel.send(preface)
            if tls is not None:
                await tls.begin(channel, place.member.origin, client)
        except OriginTLSFailed as error:
            place.record_failure(error.reason)
            place.close()
            members = members[members.index(place.member) + 1 :]
            if not members:
                raise
        except BaseException:
            place.close()
            if channel.sock.fileno() >= 0:
                channel.release()
                channel.sock.close()
            raise
        else:
            return place, channel
