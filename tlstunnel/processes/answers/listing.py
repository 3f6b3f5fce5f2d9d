"""Lists the open tunnels of one process, a page at a time, and puts the pages of several processes together.

Tested by tests/unit/test_processes_listing.py.
"""

import asyncio
import os
import time
from bisect import insort
from collections.abc import Callable, Iterable
from typing import NamedTuple, assert_never

import msgspec

from tlstunnel.commands.tunnels import Order, Tunnels, TunnelStatus
from tlstunnel.processes.pages import Cursor, Key, Page, Place, parse_selection
from tlstunnel.tunnel.open_tunnel import OpenTunnel
from tlstunnel.tunnel.slices import Slices
from tlstunnel.tunnel.splice import Splice

LOOK_SECONDS = 0.5
"""The least time between two looks at the counters of a tunnel, from which its rate is computed."""

FORGET_SECONDS = 30.0
"""How long a measurement is kept until the next one."""

STEP_SECONDS = 1.0
"""If the system's clock differs by so much from what it was, it was set, or the machine was suspended."""


class _Look(NamedTuple):
    """The bytes that a tunnel has moved both ways until then."""

    moved: int
    at: float


class Rates:
    """The rates of tunnels, from two measurements of their counters. They are kept only while the list is asked for.

    `clock` is that of the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._before: dict[str, _Look] = {}
        self._latest: dict[str, _Look] = {}
        self._latest_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Begin to look at tunnels."""
        now = self._loop.time()
        if now - self._latest_at >= LOOK_SECONDS:
            self._before, self._latest = self._latest, {}
            self._latest_at = now
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(FORGET_SECONDS, self.forget)

    def measure(self, tunnel: str, moved: int, now: float, started: float) -> float:
        """Return the bytes per second since the tunnel with this id was looked at before, or since it began."""
        before = self._before.get(tunnel)
        self._latest.setdefault(tunnel, _Look(moved, now))
        if before is not None and now - before.at >= LOOK_SECONDS and moved >= before.moved:
            return (moved - before.moved) / (now - before.at)
        return moved / max(now - started, 1e-3)

    def forget(self) -> None:
        """Forget all measurements: the list is no longer asked for."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._before, self._latest, self._latest_at = {}, {}, 0.0


class Listing:
    """Lists the tunnels that `get_splices` returns. `show` returns an address of a client as it may be shown."""

    def __init__(self, get_splices: Callable[[], Iterable[Splice]], show: Callable[[str], str] = str) -> None:
        loop = asyncio.get_running_loop()
        self._show = show
        self._get_splices = get_splices
        self._rates = Rates(loop)
        self._epoch = time.time() - time.monotonic()

    def close(self) -> None:
        """Forget what was looked at."""
        self._rates.forget()

    async def list_page(self, command: Tunnels) -> Page:
        """Return the tunnels that match, in order, from the cursor on. Raises ControlError."""
        selection = parse_selection(command)
        order, limit = command.sort, command.limit
        after = Cursor.decode(command.after, order).place if command.after else None
        self._follow_clock()
        self._rates.begin()
        slices = Slices()
        now = time.monotonic()
        found: list[tuple[Place, int, Splice]] = []
        total = beyond = 0
        for splice in list(self._get_splices()):
            if slices.is_over:
                await slices.pause()
                now = time.monotonic()
            tunnel = splice.about
            if splice.closed or not isinstance(tunnel, OpenTunnel) or not selection.matches(tunnel.record, now):
                continue
            total += 1
            place = self._place(splice, tunnel, order, now)
            if after is not None and place <= after:
                continue
            beyond += 1
            # The number tells apart two tunnels with the same id, which a trusted proxy may have chosen.
            if len(found) < limit or (found and place < found[-1][0]):
                insort(found, (place, total, splice))
                del found[limit:]
        packed = []
        for (key, _), _, splice in found:
            if slices.is_over:
                await slices.pause()
                now = time.monotonic()
            packed.append(msgspec.json.encode(self._describe(splice, now, key if order == "rate" else None)))
        more = beyond > len(found)
        return Page(
            now=time.time(),
            total=total,
            packed=f"[{b','.join(packed).decode()}]",
            next="more" if more else "",
        )

    def _follow_clock(self) -> None:
        """Learn when the clock was set. Otherwise the times stay exactly the same, as a list that goes on needs it."""
        epoch = time.time() - time.monotonic()
        if abs(epoch - self._epoch) >= STEP_SECONDS:
            self._epoch = epoch

    def _opened(self, tunnel: OpenTunnel) -> float:
        return round(self._epoch + tunnel.record.started, 6)

    def _place(self, splice: Splice, tunnel: OpenTunnel, order: Order, now: float) -> Place:
        record = tunnel.record
        match order:
            case "age":
                key: Key = self._opened(tunnel)
            case "rate":
                key = -self._measure(splice, tunnel, now)
            case "up":
                key = -splice.up
            case "down":
                key = -max(splice.down, 0)
            case "site":
                key = record.site
            case "client":
                key = self._show(record.client)
            case "origin":
                key = record.origin
            case _:
                assert_never(order)
        return Place(key, record.id)

    def _measure(self, splice: Splice, tunnel: OpenTunnel, now: float) -> float:
        moved = splice.up + max(splice.down, 0)
        return self._rates.measure(tunnel.record.id, moved, now, tunnel.record.started)

    def _describe(self, splice: Splice, now: float, key: Key | None) -> TunnelStatus:
        """Return what is known of a tunnel. With `key`, its rate was measured already."""
        tunnel = splice.about
        assert isinstance(tunnel, OpenTunnel)
        record = tunnel.record
        closed = splice.closed  # in the meantime: it has no sides any more
        return TunnelStatus(
            id=record.id,
            process=os.getpid(),
            site=record.site,
            client=self._show(record.client),
            origin=record.origin,
            path=record.path,
            opened=self._opened(tunnel),
            seconds=now - record.started,
            up=record.up if closed else splice.up,
            down=record.down if closed else max(splice.down, 0),
            rate=-key if isinstance(key, float) else 0.0 if closed else self._measure(splice, tunnel, now),
            sni=record.sni,
            tls_version=record.tls_version,
            cipher=record.cipher,
            ja4=record.ja4,
            peer=self._show(record.peer),
            user_agent=record.user_agent,
            web_origin=record.web_origin,
            client_subject=record.client_subject,
            edge=record.edge,
            until=tunnel.find_end(),
            draining=closed or bool(splice.draining_since),
            tags=record.tags_by_name,
        )
