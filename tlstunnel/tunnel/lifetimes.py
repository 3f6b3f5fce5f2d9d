"""Ends open tunnels before either side does: at a time that an edge worker has set, or by request.

A tunnel that is to be found by its tag may still be in its handshake when somebody asks: then it ends as it opens.

Tested by tests/unit/test_lifetimes.py.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tlstunnel.journal.events import Reason
from tlstunnel.journal.record import Record
from tlstunnel.tunnel.open_tunnel import OpenTunnel
from tlstunnel.tunnel.selection import Selection
from tlstunnel.tunnel.slices import SLICE_SECONDS, Slices
from tlstunnel.tunnel.splice import Splice, Splices

CLOSE_SECONDS = 1.0
"""The most that `timeouts.close` is for these tunnels: a user who was logged out must not go on by not stopping."""

REMEMBER_SECONDS = 60.0
"""How long it is remembered which tags have been ended: longer than a handshake takes."""

MOST_REMEMBERED = 4_096
"""Endings that are remembered. The oldest are forgotten."""

LOOK_AGAIN_SECONDS = 60.0
"""How often the system's clock is read at least, which may be set, or have gone on while the machine was suspended."""


@dataclass(frozen=True, slots=True, eq=False)
class Ending:
    """Who has asked for the end of the selected tunnels, why, and when, by ``time.monotonic``.

    Tunnels whose connection was accepted later are not meant.
    """

    selection: Selection
    who: str
    why: str
    at: float

    def matches(self, record: Record, now: float) -> bool:
        """Return whether the tunnel with this record is meant."""
        return record.started <= self.at and self.selection.matches(record, now)


class Endings:
    """Endings, by their tags: ten thousand tunnels are compared with a thousand of them in one go."""

    def __init__(self, endings: Iterable[Ending] = ()) -> None:
        self._by_tag: dict[str, list[Ending]] = {}
        for ending in endings:
            self.add(ending)

    def add(self, ending: Ending) -> None:
        """Add an ending."""
        self._by_tag.setdefault(ending.selection.tag, []).append(ending)

    def remove(self, ending: Ending) -> None:
        """Remove an ending."""
        same = self._by_tag[ending.selection.tag]
        same.remove(ending)
        if not same:
            del self._by_tag[ending.selection.tag]

    def find(self, record: Record, now: float) -> Ending | None:
        """Return one that matches, None if there is none."""
        for tag in ("", *record.tags):
            for key in {tag, tag.partition("=")[0]}:
                for ending in self._by_tag.get(key, ()):
                    if ending.matches(record, now):
                        return ending
        return None


class PlannedEnd:
    """The planned end of a tunnel at the Unix time `until`."""

    __slots__ = ("_expiries", "splice", "until")

    def __init__(self, expiries: "Expiries", splice: Splice, until: float) -> None:
        self._expiries = expiries
        self.splice = splice
        self.until = until

    def cancel(self) -> None:
        """Forget it: the tunnel has ended."""
        self._expiries.discard(self)


class Expiries:
    """Ends tunnels at their times, up to a second later.

    One timer for all: those of one second are together, and the timer is that of the next second for which there are
    any. `end` is called with a splice whose time is over.
    """

    def __init__(self, splices: Splices, end: Callable[[Splice], None], clock: Callable[[], float] = time.time) -> None:
        self._loop = splices.loop
        self._end = end
        self._clock = clock
        self._seconds: dict[int, dict[PlannedEnd, None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._next = math.inf
        self._due: deque[PlannedEnd] = deque()

    def add(self, splice: Splice, until: float) -> PlannedEnd:
        """Plan the end of a tunnel."""
        expiry = PlannedEnd(self, splice, until)
        second = math.ceil(until)
        self._seconds.setdefault(second, {})[expiry] = None
        if second < self._next:
            self._look_at(second)
        return expiry

    def discard(self, expiry: PlannedEnd) -> None:
        """Plan it no more."""
        second = math.ceil(expiry.until)
        same = self._seconds.get(second)
        if same is not None:
            same.pop(expiry, None)
            if not same:
                del self._seconds[second]

    def close(self) -> None:
        """End no tunnel any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due.clear()

    def _look_at(self, second: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next = second
        wait = min(max(second - self._clock(), 0.0), LOOK_AGAIN_SECONDS)
        self._timer = self._loop.call_later(wait, self._look)

    def _look(self) -> None:
        """End what is due."""
        now = self._clock()
        self._timer, self._next = None, math.inf
        idle = not self._due
        for second in sorted(second for second in self._seconds if second <= now):
            self._due.extend(self._seconds.pop(second))
        if self._seconds:
            self._look_at(min(self._seconds))
        if idle:
            self._end_some()

    def _end_some(self) -> None:
        """End some of those that are due, then let others have a turn: thousands of tokens may expire at once."""
        slices = Slices(SLICE_SECONDS)
        while self._due:
            self._end(self._due.popleft().splice)
            if slices.is_over and self._due:
                self._loop.call_soon(self._end_some)
                return


class Lifetimes:
    """Ends tunnels of one process. `remember_seconds` is how long a handshake may take."""

    def __init__(self, splices: Splices) -> None:
        self._splices = splices
        self._expiries = Expiries(splices, _end_expired)
        self._remembered = Endings()
        self._in_order: deque[Ending] = deque()
        self.remember_seconds = REMEMBER_SECONDS

    def limit(self, splice: Splice, until: float) -> None:
        """End a tunnel that is about to start at this Unix time."""
        tunnel = splice.about
        assert isinstance(tunnel, OpenTunnel)
        tunnel.expiry = self._expiries.add(splice, until)

    def catch(self, splice: Splice, record: Record) -> None:
        """End a tunnel that has just started, if that was requested during its handshake."""
        ending = self._remembered.find(record, time.monotonic())
        if ending is not None:
            _end_by_request(splice, record, ending)

    async def end(self, endings: Sequence[Ending]) -> int:
        """End all tunnels that match one of these; return how many. Those with a tag are remembered."""
        for ending in endings:
            self._remember(ending)
        index = Endings(endings)
        slices = Slices()
        now = time.monotonic()
        number = 0
        for splice in list(self._splices.all):
            if slices.is_over:
                await slices.pause()
                now = time.monotonic()
            tunnel = splice.about
            if splice.closed or splice.draining_since or not isinstance(tunnel, OpenTunnel):
                continue
            found = index.find(tunnel.record, now)
            if found is not None:
                _end_by_request(splice, tunnel.record, found)
                number += 1
        return number

    def close(self) -> None:
        """End no tunnel any more."""
        self._expiries.close()

    def _remember(self, ending: Ending) -> None:
        selection = ending.selection
        oldest = time.monotonic() - self.remember_seconds
        while self._in_order and (self._in_order[0].at < oldest or len(self._in_order) >= MOST_REMEMBERED):
            self._remembered.remove(self._in_order.popleft())
        if selection.tag and not selection.older and ending.at >= oldest:
            self._in_order.append(ending)
            self._remembered.add(ending)


def _end_by_request(splice: Splice, record: Record, ending: Ending) -> None:
    record.asked_by, record.why = ending.who, ending.why
    splice.drain(Reason.ENDED_BY_REQUEST, CLOSE_SECONDS)


def _end_expired(splice: Splice) -> None:
    splice.drain(Reason.EXPIRED, CLOSE_SECONDS)
