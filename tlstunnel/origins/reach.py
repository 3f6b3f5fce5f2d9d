"""Reach an origin: connect, and make the TLS handshake for ``wss://``; try the next member if either fails.

Tested by tests/promises/test_origin_tls.py.
"""

from collections.abc import Sequence

from tlstunnel.origins.connect import connect
from tlstunnel.origins.errors import OriginTLSFailed, OriginUnreachable
from tlstunnel.origins.members import Member
from tlstunnel.origins.place import Place
from tlstunnel.origins.pool import Pool
from tlstunnel.sockets.channel import Channel
from tlstunnel.sockets.deadlines import Wakeup
from tlstunnel.sockets.readiness import Readiness


async def reach(  # noqa: PLR0913 - the members, the sockets and the client
    pool: Pool,
    members: Sequence[Member],
    ip: str,
    *,
    preface: bytes,
    readiness: Readiness,
    wakeup: Wakeup,
    client: Channel,
) -> tuple[Place, Channel]:
    """Reach the first of `members` that can be reached before the deadline of `wakeup`, for a client at `ip`.

    Returns the place there.

    `preface`, a PROXY header or nothing, is sent before TLS. No byte of a request has been sent when this returns.
    Raises OriginUnreachable, or its subclass OriginTLSFailed; NoOrigin; CountersUnavailable; TimeoutError; ClientGone
    if the client disconnects.
    """
    while True:
        place, channel = await connect(pool, members, ip, readiness=readiness, wakeup=wakeup, client=client)
        tls = place.member.tls
        if tls is None and not preface:
            place.record_connected()
            return place, channel
        try:
            if preface:
                await channel.send(preface)
            if tls is not None:
                await tls.begin(channel, place.member.origin, client)
        except TimeoutError:
            place.record_unreachable("did not complete the TLS handshake in time")
            _close(place, channel)
            raise
        except (OriginTLSFailed, OSError) as error:
            failure = _explain(place.member, error)
            place.record_unreachable(failure.reason)
            _close(place, channel)
            members = members[members.index(place.member) + 1 :]
            if not members:
                raise failure from None
        except BaseException:
            _close(place, channel)
            raise
        else:
            place.record_connected()
            return place, channel


def _explain(member: Member, error: OriginTLSFailed | OSError) -> OriginUnreachable:
    if isinstance(error, OriginTLSFailed):
        return error
    return OriginUnreachable(f"{member.text}: {error.strerror or error}")


def _close(place: Place, channel: Channel) -> None:
    place.close()
    if channel.sock.fileno() >= 0:
        channel.release()
        channel.sock.close()
