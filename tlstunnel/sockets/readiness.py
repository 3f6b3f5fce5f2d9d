"""Which sockets can be read or written: one epoll for every socket of every tunnel and for asyncio itself.

asyncio makes a ``Handle`` and a trip through its ready queue of each event, which costs as much as all the rest of the
Python in a spliced message (docs/architecture.md). Here a wake-up calls one function for each ready socket of a tunnel,
from within the loop's own selector; in a loop that somebody else made, the epoll's descriptor is one reader of it.
"""

import asyncio
import contextlib
import math
import select
import selectors
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
    """The sockets of one process, each with its events and its handler.

    A handler that fails loses its own socket, never the loop. `loop` is one that waits by itself, and then watches the
    epoll; without it somebody else has to call `turn`.
    """

    __slots__ = ("_epoll", "_handlers", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        if loop is not None:
            loop.add_reader(self._epoll.fileno(), self.turn, 0)

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

    def forget(self, fd: int) -> None:
        """Stop watching `fd`, which is closed next: that takes it out of the epoll, and saves a system call."""
        self._handlers.pop(fd, None)

    def __len__(self) -> int:
        return len(self._handlers)

    def close(self) -> None:
        """Stop watching everything."""
        if self._loop is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
        else:
            for fd in list(self._handlers):
                self.unregister(fd)
        self._handlers.clear()

    def turn(self, timeout: float) -> list[tuple[int, int]]:
        """Wait up to `timeout` seconds (-1: for ever) and call the handlers of what is ready; give what has none."""
        handlers = self._handlers
        others = []
        for fd, events in self._epoll.poll(timeout, EVENTS_A_TURN):
            # An earlier handler of this turn may have closed the socket.
            handler = handlers.get(fd)
            if handler is None:
                others.append((fd, events))
                continue
            try:
                handler(events)
            except Exception:
                structlog.get_logger().exception("handler failed", fd=fd)
                self.unregister(fd)
        return others


class _KeysByFile(Mapping[Any, selectors.SelectorKey]):
    """The keys of a `_Selector`, found by file object or by descriptor.

    The selectors of the standard library have such a map, and since Python 3.13 asyncio relies on it: `add_reader` and
    `remove_reader` look in ``get_map()`` for the object they were given.
    """

    def __init__(self) -> None:
        self.by_descriptor: dict[int, selectors.SelectorKey] = {}

    def descriptor(self, fileobj: Any) -> int:
        """Return the descriptor of a file object: for a closed one, that with which it was registered, or -1."""
        fd: int = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        if fd < 0:
            return next((key.fd for key in self.by_descriptor.values() if key.fileobj is fileobj), -1)
        return fd

    def __getitem__(self, fileobj: Any) -> selectors.SelectorKey:
        return self.by_descriptor[self.descriptor(fileobj)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.by_descriptor)

    def __len__(self) -> int:
        return len(self.by_descriptor)


class _Selector(selectors.BaseSelector):
    """Lets asyncio wait for its own files (listeners, signals, the resolver's pipe) in the epoll of the tunnels.

    Nested, with asyncio waiting for that epoll's descriptor, a message that comes alone took four ``epoll_wait`` and a
    ``Handle`` where one does (docs/performance.md).
    """

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness
        self._epoll = readiness._epoll
        self._map = _KeysByFile()
        self._keys = self._map.by_descriptor

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = self._map.descriptor(fileobj)
        self._epoll.register(fd, _epoll_events(events))
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        key = self._keys.pop(self._map.descriptor(fileobj))
        with contextlib.suppress(OSError):
            self._epoll.unregister(key.fd)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = self._map.descriptor(fileobj)
        if events != self._keys[fd].events:
            self._epoll.modify(fd, _epoll_events(events))
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # Milliseconds, and rounded up: down, it would spin through the last one before a timer.
        wait = -1 if timeout is None else math.ceil(timeout * 1e3) * 1e-3 if timeout > 0 else 0
        ready = []
        for fd, events in self._readiness.turn(wait):
            if (key := self._keys.get(fd)) is not None:
                found = (selectors.EVENT_READ if events & ~OUT else 0) | (selectors.EVENT_WRITE if events & ~IN else 0)
                ready.append((key, found & key.events))
        return ready

    def close(self) -> None:
        self._keys.clear()
        self._epoll.close()

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._map


def _epoll_events(events: int) -> int:
    return (IN if events & selectors.EVENT_READ else 0) | (OUT if events & selectors.EVENT_WRITE else 0)


class TunnelLoop(asyncio.SelectorEventLoop):
    """asyncio's loop, waiting in the one epoll in which the tunnels are: `readiness`."""

    def __init__(self) -> None:
        self.readiness = Readiness()
        super().__init__(_Selector(self.readiness))


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

    forget = unregister

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


def new_loop() -> asyncio.AbstractEventLoop:
    """The loop to serve tunnels with."""
    return TunnelLoop() if hasattr(select, "epoll") else asyncio.new_event_loop()


def readiness(loop: asyncio.AbstractEventLoop) -> "Readiness | PortableReadiness":
    """The readiness of `loop`, or the one that this system has in a loop that is not ours."""
    if isinstance(loop, TunnelLoop):
        return loop.readiness
    return Readiness(loop) if hasattr(select, "epoll") else PortableReadiness(loop)


AnyReadiness = Readiness | PortableReadiness
