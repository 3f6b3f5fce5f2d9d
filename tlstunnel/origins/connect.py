"""Connecting to the first of several origins that takes it, the next asked while a slow one still may (RFC 8305)."""

import asyncio
import errno
import os
import socket
from collections.abc import Sequence

from tlstunnel.backoff import Backoff
from tlstunnel.origins.members import Member
from tlstunnel.origins.pool import Pool
from tlstunnel.sockets.channel import Channel, ClientGone
from tlstunnel.sockets.deadlines import Wakeup
from tlstunnel.sockets.options import tune
from tlstunnel.sockets.readiness import Readiness

RETRIES = Backoff(first=0.02, longest=0.5)
"""Between attempts at a Unix socket whose backlog is full: unlike TCP, connect(2) does not wait there."""

STAGGER = 0.25
"""Seconds after which the next address of the same name is tried beside one that has not answered: the Connection
Attempt Delay of RFC 8305 section 5."""

PATIENCE = 1.0
"""Seconds after which another origin is tried beside one that has not answered: it may be far away and well."""

_CONNECTED = frozenset({0, errno.EISCONN})
_UNDER_WAY = frozenset({errno.EALREADY, errno.EINPROGRESS})


class OriginUnreachable(Exception):
    """No connection to an origin. `shortage` says that we are the reason: no descriptor, port or memory left."""

    def __init__(self, reason: str, *, shortage: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.shortage = shortage


async def connect(
    pool: Pool, members: Sequence[Member], readiness: Readiness, wakeup: Wakeup, client: Channel
) -> tuple[Member, Channel]:
    """Connect to the first of `members` that takes it, by the deadline of `wakeup`; that one is counted as taken.

    Raises OriginUnreachable, TimeoutError, or ClientGone when the client does not wait for it.
    """
    attempts = _Attempts(pool, readiness, wakeup)
    try:
        return await attempts.run(members, client)
    except TimeoutError:
        for member, _ in attempts.under_way:
            pool.failed(member, "did not take the connection in time")
        raise
    finally:
        attempts.close()


class _Attempts:
    """Connections that are being made; `under_way` are those whose end is not known yet."""

    def __init__(self, pool: Pool, readiness: Readiness, wakeup: Wakeup) -> None:
        self._pool = pool
        self._readiness = readiness
        self._wakeup = wakeup
        self._failure: OriginUnreachable | None = None
        self.under_way: list[tuple[Member, Channel]] = []

    async def run(self, members: Sequence[Member], client: Channel) -> tuple[Member, Channel]:
        pause = 0.0
        last = len(members) - 1
        for place, member in enumerate(members):
            while (channel := self._begin(member)) is None:
                # The backlog of a Unix socket is full.
                if client.gone:
                    raise ClientGone
                pause = RETRIES.after(pause)
                await self._wakeup.sleep(pause)
            if isinstance(channel, Channel):
                return member, channel
            if self.under_way:
                seconds = None
                if place < last:
                    seconds = STAGGER if members[place + 1].text == member.text else PATIENCE
                if connected := await self._wait(seconds, client):
                    return connected
        raise self._failure or OriginUnreachable("no origin took the connection")

    def _begin(self, member: Member) -> "Channel | bool | None":
        """Begin to connect: the channel where that is done at once, True where it is under way or has failed.

        None where the backlog of a Unix socket has no room.
        """
        try:
            sock = socket.socket(member.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise OriginUnreachable(f"{member.text}: {error.strerror}", shortage=True) from None
        code = errno.EAGAIN
        member.taken()
        try:
            if member.family != socket.AF_UNIX:
                tune(sock)
            code = sock.connect_ex(member.address)
            if code == errno.EINPROGRESS:
                # Asked again, connect(2) says how it went: an origin on this machine is connected by now.
                code = sock.connect_ex(member.address)
        except OSError as error:
            code = error.errno or errno.EIO
        finally:
            if code not in _CONNECTED and code not in _UNDER_WAY:
                sock.close()
                if code != errno.EAGAIN:
                    self._failed(member, code)
                member.given_up()
                member.released()
        if code == errno.EAGAIN:
            return None
        if code not in _CONNECTED and code not in _UNDER_WAY:
            return True
        channel = Channel(sock, self._readiness, self._wakeup)
        if code in _CONNECTED:
            return channel
        channel.ask_for_writing()
        self.under_way.append((member, channel))
        return True

    async def _wait(self, seconds: float | None, client: Channel) -> tuple[Member, Channel] | None:
        """Wait until one is connected, or all have failed, or for so long."""
        loop = asyncio.get_running_loop()
        until = None if seconds is None else loop.time() + seconds
        while self.under_way:
            if client.gone:
                raise ClientGone
            if until is None:
                await self._wakeup.wait()
            elif (left := until - loop.time()) > 0:
                await self._wakeup.sleep(left)
            else:
                return None
            for attempt in list(self.under_way):
                member, channel = attempt
                code = channel.sock.connect_ex(member.address)
                if code in _UNDER_WAY:
                    continue
                self.under_way.remove(attempt)
                if code in _CONNECTED:
                    # What has happened until now was connecting: HUP holds for a socket that is not connected yet.
                    channel.gone = False
                    return attempt
                self._failed(member, code)
                _end(attempt)
        return None

    def _failed(self, member: Member, code: int) -> None:
        reason = os.strerror(code)
        shortage = code == errno.EADDRNOTAVAIL
        self._failure = OriginUnreachable(f"{member.text}: {reason}", shortage=shortage)
        if not shortage:
            self._pool.failed(member, reason)

    def close(self) -> None:
        """End those whose end nobody waits for."""
        for attempt in self.under_way:
            _end(attempt)
        self.under_way.clear()


def _end(attempt: tuple[Member, Channel]) -> None:
    member, channel = attempt
    channel.release()
    channel.sock.close()
    member.released()
    member.given_up()
