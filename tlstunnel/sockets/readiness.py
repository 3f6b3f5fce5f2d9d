"""Wait until sockets can be read or written: one epoll for all sockets of all tunnels and for asyncio itself.

For each event, asyncio makes a ``Handle`` and puts it through its ready queue, which costs as much as all other Python
of a spliced message (docs/architecture.md). Here a wake-up calls one function for each ready socket of a tunnel, from
within the loop's own selector. In any other loop, the epoll's descriptor is a reader.
"""

import asyncio
import contextlib
import math
import select
import selectors
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog

Handler = Callable[[int], None]
"""Called with the events, as the bits of epoll."""

IN = select.EPOLLIN
OUT = select.EPOLLOUT
ERR = select.EPOLLERR
HUP = select.EPOLLHUP
RDHUP = select.EPOLLRDHUP
EDGE_TRIGGERED = select.EPOLLET
"""The bits of epoll_ctl(2)."""

GONE = ERR | HUP | RDHUP
"""The peer has sent its last byte, or the connection has failed."""

EVENTS_PER_TURN = 256
"""How many sockets one wake-up serves before asyncio's own work (accepting, handshakes, timers) continues."""

EVENTS_WHILE_EXPECTING = 8
"""The same while an answer is expected, which waits for so many steps of handshakes, of 0.2 to 0.5 ms each.

More turns of the loop cost time too: with four, a handshake took 0.05 to 0.1 ms more, with one 0.2 ms (measured).
"""


class Readiness:
    """The sockets of one process, each with its events and its handler.

    If a handler raises, only its own socket is unregistered. `loop`, if given, watches the epoll; without it, the
    caller has to call `turn`.
    """

    __slots__ = ("_epoll", "_expected", "_handlers", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._expected = -1
        if loop is not None:
            loop.add_reader(self._epoll.fileno(), self.turn, 0)

    def register(self, fd: int, events: int, handler: Handler) -> None:
        """Call `handler` whenever one of `events` (or ERR or HUP, always) holds for `fd`.

        With EDGE_TRIGGERED it is called once for each change.
        """
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def modify(self, fd: int, events: int, handler: Handler | None = None) -> None:
        """Watch a registered `fd` for other events, with another handler unless it is None."""
        self._epoll.modify(fd, events)
        if handler is not None:
            self._handlers[fd] = handler

    def unregister(self, fd: int) -> None:
        """Stop watching `fd`, if it is watched."""
        if self._handlers.pop(fd, None) is not None:
            # A closed descriptor has left the epoll already.
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def forget(self, fd: int) -> None:
        """Stop watching `fd`, which the caller closes next: that removes it from the epoll and saves a system call."""
        self._handlers.pop(fd, None)

    @property
    def expecting(self) -> bool:
        """Whether an answer is expected, so that little should be done in a turn of the loop."""
        return self._expected >= 0

    def begin_expecting(self, fd: int) -> None:
        """Serve `fd` before all other sockets, and few of them in a turn, since an answer is expected there.

        There is one such descriptor; another one replaces it.
        """
        self._expected = fd

    def end_expecting(self, fd: int) -> None:
        """Serve `fd` as all others."""
        if self._expected == fd:
            self._expected = -1

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
        """Wait up to `timeout` seconds (-1: forever), call the handlers of ready sockets, return the other events."""
        handlers = self._handlers
        others = []
        expected = self._expected
        ready = self._epoll.poll(timeout, EVENTS_PER_TURN if expected < 0 else EVENTS_WHILE_EXPECTING)
        if expected >= 0 and len(ready) > 1:
            # Also if it is not among them, since more may be ready than were asked for.
            ready = [(expected, IN), *(one for one in ready if one[0] != expected)]
        for fd, events in ready:
            # An earlier handler of this turn may have closed the socket.
            handler = handlers.get(fd)
            if handler is None:
                others.append((fd, events))
                continue
            try:
                handler(events)
            except Exception:
                structlog.get_logger().exception(Event.HANDLER_FAILED, fd=fd)
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

    With a nested epoll, whose descriptor asyncio waits for, a single message took four ``epoll_wait`` and a ``Handle``
    instead of one ``epoll_wait`` (docs/performance.md).
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
        # Rounded up to milliseconds: rounded down, it would spin through the last one before a timer.
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
    """asyncio's loop, waiting in the epoll of the tunnels, `readiness`."""

    def __init__(self) -> None:
        self.readiness = Readiness()
        super().__init__(_Selector(self.readiness))


def readiness(loop: asyncio.AbstractEventLoop) -> Readiness:
    """Return the readiness of a `TunnelLoop`; for any other loop, a new one that the loop watches."""
    return loop.readiness if isinstance(loop, TunnelLoop) else Readiness(loop)
