"""Reaching an origin: connected, and for ``wss://`` with TLS on it; the next one where either fails."""

from collections.abc import Sequence

from tlstunnel.origins.connect import connect
from tlstunnel.origins.members import Member
from tlstunnel.origins.pool import Pool
from tlstunnel.origins.tls import OriginTLSFailed
from tlstunnel.sockets.channel import Channel
from tlstunnel.sockets.deadlines import Wakeup
from tlstunnel.sockets.readiness import Readiness


async def reach(  # noqa: PLR0913, PLR0917 - whom, by what, for whom
    pool: Pool,
    members: Sequence[Member],
    preface: bytes,
    readiness: Readiness,
    wakeup: Wakeup,
    client: Channel,
) -> tuple[Member, Channel]:
    """Reach the first of `members` that can be, by the deadline of `wakeup`; that one is counted as taken.

    `preface`, a PROXY header or nothing, goes before TLS. No byte of a request has been sent then.
    Raises OriginUnreachable, OriginTLSFailed among it; TimeoutError; ClientGone when the client does not wait for it.
    """
    while True:
        member, channel = await connect(pool, members, readiness, wakeup, client)
        if member.tls is None and not preface:
            return member, channel
        try:
            if preface:
                await channel.send(preface)
            if member.tls is not None:
                await member.tls.begin(channel, member.origin, client)
        except OriginTLSFailed as error:
            pool.failed(member, error.reason)
            member.released()
            members = members[members.index(member) + 1 :]
            if not members:
                raise
        except BaseException:
            member.given_up()
            member.released()
            if channel.sock.fileno() >= 0:
                channel.release()
                channel.sock.close()
            raise
        else:
            return member, channel
