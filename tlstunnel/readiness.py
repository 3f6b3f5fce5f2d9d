"""Which sockets can be read or written: one epoll for every socket of every tunnel, inside the asyncio loop.

asyncio itself makes a ``Handle`` and a trip through its ready queue of each event, which costs as much as all the rest
of the Python in a spliced message (docs/architecture.md). Here the loop watches one descriptor, the epoll's own, and a
wake-up calls one function for each ready socket.
"""

import asyncio
import contextlib
import select
from collections.abc import Callable

import structlog

Handler = Callable[[int], None]
"""Called with the events that came, as epoll's bits."""

IN = 0x001
OUT = 0x004
ERR = 0x008
HUP = 0x010
RDHUP = 0x2000
EDGE = 1 << 31
"""The bits of epoll_ctl(2), the same on every Linux; named here since ``select`` has them only where epoll is."""

GONE = ERR | HUP | RDHUP
"""The peer has sent its last byte, or the connection has failed."""

EVENTS_A_TURN = 256
"""How many sockets one wake-up serves before asyncio's own work (accepting, handshakes, timers) has its turn."""


class Readiness:
    """Sockets watched by one epoll. A handler that raises loses itself, never the loop."""

    __slots__ = ("_epoll", "_handlers", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        loop.add_reader(self._epoll.fileno(), self._turn)

    def register(self, fd: int, events: int, handler: Handler) -> None:
        """Call `handler` whenever one of `events` (or ERR or HUP, always) holds for `fd`; with EDGE, once a change."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def modify(self, fd: int, events: int, handler: Handler | None = None) -> None:
        """Watch a registered `fd` for other events, for another handler if one is given."""
        self._epoll.modify(fd, events)
        if handler is not None:
            self._handlers[fd] = handler

    def unregister(self, fd: int) -> None:
        """Stop watching `fd`; does nothing when it is not watched."""
        if self._handlers.pop(fd, None) is not None:
            # A descriptor that was closed has left the epoll by itself.
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def __len__(self) -> int:
        return len(self._handlers)

    def close(self) -> None:
        """Stop watching everything."""
        self._loop.remove_reader(self._epoll.fileno())
        self._handlers.clear()
        self._epoll.close()

    def _turn(self) -> None:
        handlers = self._handlers
        for fd, events in self._epoll.poll(0, EVENTS_A_TURN):
            # An earlier handler of this turn may have closed the socket.
            handler = handlers.get(fd)
            if handler is not None:
                try:
                    handler(events)
                except Exception:
                    structlog.get_logger().exception("handler failed", fd=fd)
                    self.unregister(fd)


class PortableReadiness:
    """The same by ``loop.add_reader``, for systems without epoll: slower, and an edge is a look every 10 ms."""

    __slots__ = ("_loop", "_watched")

    EDGE_PAUSE = 0.01

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watched: dict[int, tuple[int, Handler]] = {}

    def register(self, fd: int, events: int, handler: Handler) -> None:
        """As `Readiness.register`."""
        self._watched[fd] = (events, handler)
        self._watch(fd)

    def modify(self, fd: int, events: int, handler: Handler | None = None) -> None:
        """As `Readiness.modify`."""
        self._ignore(fd)
        self._watched[fd] = (events, handler or self._watched[fd][1])
        self._watch(fd)

    def unregister(self, fd: int) -> None:
        """As `Readiness.unregister`."""
        if self._watched.pop(fd, None) is not None:
            self._ignore(fd)

    def __len__(self) -> int:
        return len(self._watched)

    def close(self) -> None:
        """As `Readiness.close`."""
        for fd in list(self._watched):
            self.unregister(fd)

    def _watch(self, fd: int) -> None:
        events, _ = self._watched[fd]
        if events & IN:
            self._loop.add_reader(fd, self._fire, fd, IN)
        if events & OUT:
            self._loop.add_writer(fd, self._fire, fd, OUT)

    def _ignore(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        self._loop.remove_writer(fd)

    def _fire(self, fd: int, event: int) -> None:
        # A handle of what is no longer watched has been cancelled.
        watched = events, handler = self._watched[fd]
        if events & EDGE:
            self._ignore(fd)
            self._loop.call_later(self.EDGE_PAUSE, self._watch_again, fd, watched)
        try:
            handler(event)
        except Exception:
            structlog.get_logger().exception("handler failed", fd=fd)
            self.unregister(fd)

    def _watch_again(self, fd: int, watched: tuple[int, Handler]) -> None:
        if self._watched.get(fd) is watched:
            self._watch(fd)


def readiness(loop: asyncio.AbstractEventLoop) -> "Readiness | PortableReadiness":
    """The readiness that this system has."""
    return Readiness(loop) if hasattr(select, "epoll") else PortableReadiness(loop)


AnyReadiness = Readiness | PortableReadiness
