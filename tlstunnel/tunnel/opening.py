"""The last stage of a handshake: the verified 101 opens the tunnel, and its splice takes both sockets over.

Tested by tests/promises/test_ending.py.
"""

import asyncio
import random
from collections.abc import Callable

from tlstunnel.handshake.response import Switched
from tlstunnel.journal.events import Decision, Reason
from tlstunnel.tunnel.splice import Endpoint, Splice
from tlstunnel.tunnel.turn import Turn


def open_tunnel(turn: Turn, response: Switched, on_end: Callable[[], None]) -> None:
    """Start the splice. It lives without this connection's task; at its end the turn is closed and `on_end` called."""
    client, origin, record, site = turn.client, turn.origin, turn.record, turn.site
    channel, serving = client.channel, client.serving
    assert origin is not None
    assert channel.tls is not None
    serving.deadlines.discard(client.wakeup)
    record.verdict = Decision.PASS
    serving.journal.opened(record)

    max_age: asyncio.TimerHandle | None = None

    def end(splice: Splice) -> None:
        if max_age is not None:
            max_age.cancel()
        record.ended_by, record.reason = splice.ended_by, splice.reason
        serving.journal.ended(record, splice.up, max(splice.down, 0))
        turn.close()
        on_end()

    splice = Splice(
        serving.splices,
        Endpoint(channel.sock, channel.tls),
        Endpoint(origin.sock, origin.tls),
        to_client=response.head + response.leftover,
        to_origin=turn.early,
        head=len(response.head),
        close_timeout=serving.timeouts.close,
        idle_timeout=serving.timeouts.idle,
        acknowledge_timeout=serving.timeouts.acknowledge,
        site=record.site,
        on_end=end,
    )
    turn.origin = None  # from here on it is the splice that closes it
    turn.forget_request()
    if site.max_age is not None:
        age = site.max_age + site.max_age_jitter * random.random()  # noqa: S311 - it only spreads
        max_age = serving.loop.call_later(age, splice.drain, Reason.MAX_AGE)
    splice.start()
