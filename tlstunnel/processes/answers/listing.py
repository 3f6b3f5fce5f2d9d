"""Lists the open tunnels of one process, a page at a time, and puts the pages of several processes together.

Tested by tests/unit/test_processes_listing.py.
"""

import asyncio
import base64
import itertools
import os
import time
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Self, assert_never

import msgspec

from tlstunnel.commands.tunnels import EndTunnels, Order, Tunnels, TunnelsResult, TunnelStatus
from tlstunnel.errors import ControlError
from tlstunnel.tunnel.open_tunnel import OpenTunnel
from tlstunnel.tunnel.selection import Selection
from tlstunnel.tunnel.slices import Slices
from tlstunnel.tunnel.splice import Splice

LOOK_SECONDS = 0.5
"""The least time between two looks at the counters of a tunnel, from which its rate is computed."""

FORGET_SECONDS = 30.0
"""How long a measurement is kept until the next one."""

STEP_SECONDS = 1.0
"""If the system's clock differs by so much from what it was, it was set, or the machine was suspended."""

_LONGEST_CURSOR = 4096

Key = float | str


class Place(NamedTuple):
    """The place of a tunnel in a list."""

    key: Key
    id: str


class Cursor(msgspec.Struct, frozen=True, array_like=True):
    """Where a page ends: in a list of this order, at this place."""

    order: Order
    key: Key
    id: str

    def encode(self) -> str:
        """Return it as text."""
        return base64.urlsafe_b64encode(msgspec.json.encode(self)).decode("ascii")

    @classmethod
    def decode(cls, text: str, order: Order) -> Self:
        """Raises ControlError for a text that is not the cursor of a list of this order."""
        try:
            if len(text) > _LONGEST_CURSOR:
                raise ValueError
            cursor = msgspec.json.decode(base64.b64decode(text.encode("ascii"), b"-_", validate=True), type=cls)
            if cursor.order != order or isinstance(cursor.key, str) != (order in {"site", "client", "origin"}):
                raise ValueError
        except (ValueError, msgspec.MsgspecError):
            raise ControlError(
                f"after: not the end of a list that is sorted by {order}; pass `next` of the list before"
            ) from None
        return cursor

    @property
    def place(self) -> Place:
        """The place of the last tunnel of the page."""
        return Place(self.key, self.id)


def find_place(tunnel: TunnelStatus, order: Order) -> Place:
    """Return the place of a tunnel in a list of this order."""
    match order:
        case "age":
            key: Key = tunnel.opened
        case "rate":
            key = -tunnel.rate
        case "up":
            key = -tunnel.up
        case "down":
            key = -tunnel.down
        case "site":
            key = tunnel.site
        case "client":
            key = tunnel.client
        case "origin":
            key = tunnel.origin
        case _:
            assert_never(order)
    return Place(key, tunnel.id)


def parse_selection(command: Tunnels | EndTunnels) -> Selection:
    """Return the filters of a command. Raises ControlError."""
    try:
        return Selection.parse(
            id=command.id,
            site=command.site,
            client=command.client,
            origin=command.origin,
            tag=command.tag,
            older=command.older,
        )
    except ValueError as error:
        raise ControlError(str(error)) from None


class Page(TunnelsResult, frozen=True, kw_only=True):
    """The part of a list that one process has. `packed` is the JSON of the tunnels.

    Most of the work of encoding a thousand of them is done in slices this way, before the link encodes it all at once.
    """

    packed: str = "[]"


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


_decode = msgspec.json.Decoder(list[TunnelStatus]).decode


def join_pages(pages: Sequence[Page], order: Order, limit: int) -> tuple[list[TunnelStatus], str]:
    """Return the first tunnels of several pages, and the cursor at which the list goes on, "" at its end."""
    lists = [_decode(page.packed) for page in pages]
    # Sorted again: while a process described them in slices, the counters went on.
    merged = sorted(itertools.chain(*lists), key=lambda tunnel: find_place(tunnel, order))
    tunnels = merged[:limit]
    if not tunnels or not (len(merged) > limit or any(page.next for page in pages)):
        return tunnels, ""
    return tunnels, Cursor(order, *find_place(tunnels[-1], order)).encode()
