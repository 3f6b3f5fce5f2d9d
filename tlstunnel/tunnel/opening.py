"""The last stage of a handshake: the verified 101 opens the tunnel, and its splice takes both sockets over.

Tested by tests/promises/test_ending.py.
"""

import asyncio
import random
from collections.abc import Callable

from tlstunnel.handshake.response import Switched
from tlstunnel.journal.events import Decision, Reason
from tlstunnel.journal.journal import Journal
from tlstunnel.tunnel.splice import Endpoint, Splice
from tlstunnel.tunnel.turn import Turn


class _OpenTunnel:
    """What is needed at the end of a tunnel. Its turn and its client are freed: together they have 1 KiB."""

    __slots__ = ("_journal", "_lease", "_on_end", "_place", "_record", "max_age")

    def __init__(self, turn: Turn, on_end: Callable[[], None]) -> None:
        self._record = turn.record
        self._journal: Journal = turn.client.serving.journal
        self._lease, self._place = turn.lease, turn.place
        self._on_end = on_end
        self.max_age: asyncio.TimerHandle | None = None

    def end(self, splice: Splice) -> None:
        """Write the record, and return what the tunnel held."""
        if self.max_age is not None:
            self.max_age.cancel()
        self._record.ended_by, self._record.reason = splice.ended_by, splice.reason
        self._journal.ended(self._record, splice.up, max(splice.down, 0))
        if self._lease is not None:
            self._lease.close()
        if self._place is not None:
            self._place.close()
        self._on_end()


def open_tunnel(turn: Turn, response: Switched, on_end: Callable[[], None]) -> None:
    """Start the splice, which lives without this connection's task.

    At its end, what the turn held is returned, and `on_end` is called.
    """
    client, origin, record, site, early = turn.client, turn.origin, turn.record, turn.site, turn.early
    channel, serving = client.channel, client.serving
    assert origin is not None
    assert channel.tls is not None
    serving.deadlines.discard(client.wakeup)
    record.verdict = Decision.PASS
    serving.journal.opened(record)
    opened = _OpenTunnel(turn, on_end)
    splice = Splice(
        serving.splices,
        Endpoint(channel.sock, channel.tls),
        Endpoint(origin.sock, origin.tls),
        to_client=response.head + response.leftover,
        to_origin=early,
        head=len(response.head),
        close_timeout=serving.timeouts.close,
        idle_timeout=serving.timeouts.idle,
        acknowledge_timeout=serving.timeouts.acknowledge,
        site=record.site,
        on_end=opened.end,
    )
    turn.give_up()
    if site.max_age is not None:
        age = site.max_age + site.max_age_jitter * random.random()  # noqa: S311 - it only spreads
        opened.max_age = serving.loop.call_later(age, splice.drain, Reason.MAX_AGE)
    splice.start()
