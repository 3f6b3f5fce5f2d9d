"""Pages of lists of open tunnels: what a serving process answers, and how the parent joins the answers of several.

Tested by tests/unit/test_processes_listing.py.
"""

import base64
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self, assert_never

import msgspec

from tlstunnel.commands.tunnels import Order, TunnelsCommand, TunnelsResult, TunnelStatus
from tlstunnel.errors import ControlError
from tlstunnel.tunnel.selection import Selection

_LONGEST_CURSOR = 4096

_decode = msgspec.json.Decoder(list[TunnelStatus]).decode

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


def parse_selection(command: TunnelsCommand[Any]) -> Selection:
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


def join_pages(pages: Sequence[Page], order: Order, limit: int) -> tuple[list[TunnelStatus], str]:
    """Return the first tunnels of several pages, and the cursor at which the list goes on, "" at its end."""
    lists = [_decode(page.packed) for page in pages]
    # Sorted again: while a process described them in slices, the counters went on.
    merged = sorted(itertools.chain(*lists), key=lambda tunnel: find_place(tunnel, order))
    tunnels = merged[:limit]
    if not tunnels or not (len(merged) > limit or any(page.next for page in pages)):
        return tunnels, ""
    return tunnels, Cursor(order, *find_place(tunnels[-1], order)).encode()
