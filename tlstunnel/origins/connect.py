"""Connect to the first of several members that accepts; a slow one does not delay the next (RFC 8305).

Tested by tests/promises/test_origin_down.py.
"""

import asyncio
import errno
import os
import socket
from collections.abc import Sequence

from tlstunnel.backoff import Backoff
from tlstunnel.origins.errors import ALL_FULL, NoOrigin, OriginUnreachable
from tlstunnel.origins.members import Member
from tlstunnel.origins.place import Place
from tlstunnel.origins.pool import Pool
from tlstunnel.sockets.channel import Channel, ClientGone
from tlstunnel.sockets.deadlines import Wakeup
from tlstunnel.sockets.options import tune
from tlstunnel.sockets.readiness import Readiness

RETRIES = Backoff(first=0.02, longest=0.5)
"""Between attempts at a Unix socket whose backlog is full, where connect(2) does not wait, unlike with TCP."""

STAGGER = 0.25
"""Seconds after which the next address of the same name is tried in parallel to one that has not accepted: the
Connection Attempt Delay of RFC 8305 section 5."""

ORIGIN_STAGGER = 1.0
"""Seconds after which another origin is tried in parallel to one that has not accepted, which may be far away and
healthy."""

_CONNECTED = frozenset({0, errno.EISCONN})
_IN_PROGRESS = frozenset({errno.EALREADY, errno.EINPROGRESS})


async def connect(  # noqa: PLR0913 - the members, the sockets and the client
    pool: Pool, members: Sequence[Member], ip: str, *, readiness: Readiness, wakeup: Wakeup, client: Channel
) -> tuple[Place, Channel]:
    """Connect to the first of `members` that accepts before the deadline of `wakeup`; return the place there.

    The place is for the address `ip`. Its result is recorded only if it failed: TLS may follow.

    Raises OriginUnreachable; NoOrigin if all are full; CountersUnavailable; TimeoutError; ClientGone if the client
    disconnects.
    """
    attempts = _Attempts(pool, ip, readiness, wakeup)
    try:
        return await attempts.run(members, client)
    except TimeoutError:
        for place, _ in attempts.in_progress:
            place.record_unreachable("did not accept the connection in time")
        raise
    finally:
        attempts.close()


class _Attempts:
    """The attempts to connect for one request; those `in_progress` have no result yet."""

    def __init__(self, pool: Pool, ip: str, readiness: Readiness, wakeup: Wakeup) -> None:
        self._pool = pool
        self._ip = ip
        self._readiness = readiness
        self._wakeup = wakeup
        self._failure: OriginUnreachable | None = None
        self.in_progress: list[tuple[Place, Channel]] = []

    async def run(self, members: Sequence[Member], client: Channel) -> tuple[Place, Channel]:
        pause = 0.0
        last = len(members) - 1
        full = 0
        for index, member in enumerate(members):
            while (connected := await self._reserve_and_begin(member)) is None:
                # The backlog of a Unix socket is full.
                if client.check_gone():
                    raise ClientGone
                pause = RETRIES.after(pause)
                await self._wakeup.sleep(pause)
            if not isinstance(connected, bool):
                return connected
            full += not connected
            if self.in_progress:
                seconds = None
                if index < last:
                    seconds = STAGGER if members[index + 1].text == member.text else ORIGIN_STAGGER
                if first := await self._wait(seconds, client):
                    return first
        if full == len(members):
            raise NoOrigin(ALL_FULL, 1)
        raise self._failure or OriginUnreachable("no origin accepted the connection")

    async def _reserve_and_begin(self, member: Member) -> "tuple[Place, Channel] | bool | None":
        """Begin to connect, unless other processes have filled the origin: then return False."""
        keys: Sequence[str] | None = ()
        if self._pool.counts(member):
            keys = await self._pool.reserve(member)
        return False if keys is None else self._begin(member, keys)

    def _begin(self, member: Member, keys: Sequence[str]) -> "tuple[Place, Channel] | bool | None":
        """Begin to connect. Return the connection if it succeeds at once, True if it is in progress or has failed.

        None if the backlog of a Unix socket is full.
        """
        place = Place(self._pool, member, self._ip, keys)
        try:
            sock = socket.socket(member.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            place.close()
            raise OriginUnreachable(f"{member.text}: {error.strerror}", shortage=True) from None
        code = _begin_to_connect(sock, member)
        if code in _CONNECTED or code in _IN_PROGRESS:
            try:
                channel = Channel(sock, self._readiness, self._wakeup)
            except BaseException:
                place.close()
                raise
            if code in _CONNECTED:
                return place, channel
            self.in_progress.append((place, channel))
            channel.watch_writability()
            return True
        sock.close()
        if code != errno.EAGAIN:
            self._record_failure(place, code)
        place.close()
        return None if code == errno.EAGAIN else True

    async def _wait(self, seconds: float | None, client: Channel) -> tuple[Place, Channel] | None:
        """Wait until one is connected, all have failed, or `seconds` have passed."""
        loop = asyncio.get_running_loop()
        until = None if seconds is None else loop.time() + seconds
        while self.in_progress:
            if client.check_gone():
                raise ClientGone
            if until is None:
                await self._wakeup.wait()
            elif (left := until - loop.time()) > 0:
                await self._wakeup.sleep(left)
            else:
                return None
            for attempt in list(self.in_progress):
                place, channel = attempt
                code = channel.sock.connect_ex(place.member.address)
                if code in _IN_PROGRESS:
                    continue
                self.in_progress.remove(attempt)
                if code in _CONNECTED:
                    # Earlier events belong to the attempt: HUP is reported for a socket that is not connected yet.
                    channel.gone = channel.failed = False
                    return attempt
                self._record_failure(place, code)
                _close(attempt)
        return None

    def _record_failure(self, place: Place, code: int) -> None:
        reason = os.strerror(code)
        shortage = code == errno.EADDRNOTAVAIL
        self._failure = OriginUnreachable(f"{place.member.text}: {reason}", shortage=shortage)
        if not shortage:
            place.record_unreachable(reason)

    def close(self) -> None:
        """Close the attempts that are no longer needed."""
        for attempt in self.in_progress:
            _close(attempt)
        self.in_progress.clear()


def _begin_to_connect(sock: socket.socket, member: Member) -> int:
    """Return an error number: 0 once connected, one of `_IN_PROGRESS` before that."""
    try:
        if member.family != socket.AF_UNIX:
            tune(sock)
        code = sock.connect_ex(member.address)
        if code == errno.EINPROGRESS:
            # A second connect(2) reports the result. An origin on this machine is connected by now.
            code = sock.connect_ex(member.address)
    except OSError as error:
        return error.errno or errno.EIO
    return code


def _close(attempt: tuple[Place, Channel]) -> None:
    place, channel = attempt
    channel.release()
    channel.sock.close()
    place.close()
