"""The open tunnels of a serving process: lists them, and ends those that match a command.

Tested by tests/promises/test_tunnels_listed.py and test_tunnels_ended.py.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping

from tlstunnel.commands.command import AnyCommand
from tlstunnel.commands.tunnels import EndTunnels, Tunnels, TunnelsEnded
from tlstunnel.escaping import printable
from tlstunnel.processes.answers.dispatch import Answer
from tlstunnel.processes.answers.listing import Listing
from tlstunnel.processes.pages import Page, parse_selection
from tlstunnel.state.ended_tags import EndedTag
from tlstunnel.tunnel.lifetimes import Ending, Lifetimes
from tlstunnel.tunnel.selection import Selection
from tlstunnel.tunnel.splice import Splice

MOST_WAITING = 10_000
"""Endings of other machines that wait until those before are carried out. More are dropped."""

AT_ONCE = 1_000
"""Endings that are looked for together: the same work for all of them."""


class OpenTunnels:
    """Answers for a serving process, whose tunnels `get_splices` returns, and `get_lifetimes` what ends them.

    `show` returns an address of a client as it may be shown.
    """

    def __init__(
        self,
        get_splices: Callable[[], Iterable[Splice]],
        get_lifetimes: Callable[[], Lifetimes],
        show: Callable[[str], str] = str,
    ) -> None:
        self._get_lifetimes = get_lifetimes
        self._listing = Listing(get_splices, show)
        self._waiting: list[EndedTag] = []
        self._ending: asyncio.Task[None] | None = None

    @property
    def answers(self) -> Mapping[type[AnyCommand], Answer]:
        """What is answered, by the type of the command."""
        return {Tunnels: self._list, EndTunnels: self._end}

    def take_ended(self, ended: Iterable[EndedTag]) -> None:
        """End what other machines have ended."""
        self._waiting += ended
        del self._waiting[MOST_WAITING:]
        if self._ending is None or self._ending.done():
            self._ending = asyncio.ensure_future(self._end_waiting())

    def close(self) -> None:
        """Forget what was looked at, and end nothing more."""
        self._listing.close()
        if self._ending is not None:
            self._ending.cancel()

    async def _list(self, command: Tunnels, _: str) -> Page:
        return await self._listing.list_page(command)

    async def _end(self, command: EndTunnels, who: str) -> TunnelsEnded:
        ending = Ending(parse_selection(command), who, command.why, time.monotonic())
        return TunnelsEnded(number=await self._get_lifetimes().end([ending]))

    async def _end_waiting(self) -> None:
        while self._waiting:
            now = time.monotonic()
            ended, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
            found = [_to_ending(one, now) for one in ended]
            await self._get_lifetimes().end([ending for ending in found if ending is not None])


def _to_ending(ended: EndedTag, now: float) -> Ending | None:
    """Parse what another machine has sent; None if it is not valid. It may have come from anywhere."""
    try:
        selection = Selection.parse(ended.client, tag=ended.tag, site=ended.site, origin=ended.origin)
    except ValueError:
        return None
    return Ending(selection, printable(ended.who), printable(ended.why), now - ended.age)
