"""Connecting to an origin."""

import asyncio
import errno
import os
import socket

from tlstunnel.addresses import OriginAddress
from tlstunnel.channel import Channel, ClientGone, Wakeup
from tlstunnel.readiness import AnyReadiness

RESOLVE_SECONDS = 30.0
"""How long a name's addresses are used before it is asked for again."""

RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.02, 0.5
"""Pause before a Unix socket is tried again whose backlog is full: unlike TCP, connect(2) does not wait there."""

# What SO_KEEPALIVE needs to notice a dead origin within 2 minutes, and how long sent data may stay unacknowledged.
_NAMED = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 120_000))
KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *((socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in _NAMED if hasattr(socket, name)),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)

_NON_BLOCKING = getattr(socket, "SOCK_NONBLOCK", 0)  # of Linux: from the first system call on

SocketAddress = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes] | str


class OriginUnreachable(Exception):
    """No connection to the origin. `shortage` says that we are the reason: no descriptor, port or memory left."""

    def __init__(self, reason: str, *, shortage: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.shortage = shortage


def tune(sock: socket.socket) -> None:
    """Set keep-alive 60/15/4, TCP_USER_TIMEOUT 120 s and TCP_NODELAY on a TCP socket, as far as the system has them.

    On a listening socket: what it accepts inherits them.
    """
    set_option = sock.setsockopt
    for option in KEEP_ALIVE:
        set_option(*option)


class Origin:
    """Where a site leads, with the addresses that its name had last."""

    def __init__(self, address: OriginAddress) -> None:
        self.address = address
        self.name = str(address)
        self._addresses: list[tuple[socket.AddressFamily, SocketAddress]] = []
        self._fresh_until = float("-inf")
        self._resolving: asyncio.Task[None] | None = None

    @property
    def known(self) -> list[tuple[socket.AddressFamily, SocketAddress]] | None:
        """What can be connected to, in the resolver's order; None when it has to be asked for."""
        return self._addresses if asyncio.get_running_loop().time() < self._fresh_until else None

    async def addresses(self, deadline: float) -> list[tuple[socket.AddressFamily, SocketAddress]]:
        """Ask for `known`. `deadline` is a loop time.

        Raises OriginUnreachable when the name is not known, or TimeoutError.
        """
        if self._resolving is None:
            self._resolving = asyncio.get_running_loop().create_task(self._resolve())
        # One question for all who wait; one who gives up does not end it.
        async with asyncio.timeout_at(deadline):
            await asyncio.shield(self._resolving)
        return self._addresses

    async def _resolve(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            if self.address.path is not None:
                self._addresses = [(socket.AF_UNIX, self.address.path)]
            else:
                found = await loop.getaddrinfo(self.address.host, self.address.port, type=socket.SOCK_STREAM)
                self._addresses = [(family, address) for family, _, _, _, address in found]
        except OSError as error:
            if not self._addresses:
                reason = error.strerror or str(error)
                raise OriginUnreachable(f"{self.name}: cannot be resolved: {reason}") from None
        finally:
            self._resolving = None
        self._fresh_until = loop.time() + RESOLVE_SECONDS


async def connect(origin: Origin, readiness: AnyReadiness, wakeup: Wakeup, client: Channel) -> Channel:
    """Connect to the first of the origin's addresses that takes it, by the deadline of `wakeup`.

    Raises OriginUnreachable, TimeoutError, or ClientGone when the client does not wait for it.
    """
    failure = OriginUnreachable(f"{origin.name}: has no address")
    for family, address in origin.known or await origin.addresses(wakeup.deadline):
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | _NON_BLOCKING)
        except OSError as error:
            raise OriginUnreachable(f"{origin.name}: {error.strerror}", shortage=True) from None
        try:
            if not _NON_BLOCKING:
                sock.setblocking(False)
            if family != socket.AF_UNIX:
                tune(sock)
            return await _connected(sock, address, readiness, wakeup, client)
        except TimeoutError:
            sock.close()
            raise
        except OSError as error:
            sock.close()
            failure = OriginUnreachable(f"{origin.name}: {error.strerror}", shortage=error.errno == errno.EADDRNOTAVAIL)
        except BaseException:
            sock.close()
            raise
    raise failure


async def _connected(
    sock: socket.socket, address: SocketAddress, readiness: AnyReadiness, wakeup: Wakeup, client: Channel
) -> Channel:
    pause = RETRY_SECONDS
    while (code := sock.connect_ex(address)) == errno.EAGAIN:
        if client.gone:
            raise ClientGone
        await wakeup.sleep(pause)
        pause = min(pause * 2, LONGEST_RETRY_SECONDS)
    if code == errno.EINPROGRESS:
        # Asked again, connect(2) says how it went: an origin on this machine is connected by now.
        code = sock.connect_ex(address)
    channel = Channel(sock, readiness, wakeup)
    try:
        while code == errno.EALREADY:
            if client.gone:
                raise ClientGone
            await channel.writable()
            code = sock.connect_ex(address)
        if code not in {0, errno.EISCONN}:
            raise OSError(code, os.strerror(code))
    except BaseException:
        channel.release()
        raise
    # What has happened until now was connecting: HUP holds for a socket that is not connected yet.
    channel.gone = False
    return channel
