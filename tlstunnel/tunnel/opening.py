"""The last stage of a handshake: the verified 101 opens the tunnel, and its splice takes both sockets over.

Tested by tests/promises/test_ending.py.
"""

import random
from collections.abc import Callable

from tlstunnel.handshake.response import Switched
from tlstunnel.journal.events import Decision, Reason
from tlstunnel.tunnel.open_tunnel import OpenTunnel
from tlstunnel.tunnel.splice import Endpoint, Splice
from tlstunnel.tunnel.turn import Turn


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
    opened = OpenTunnel(record, serving.journal, turn.lease, turn.place, on_end)
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
        about=opened,
    )
    turn.give_up()
    serving.stages.handshake.observe_since(client.accepted)
    if site.max_age is not None:
        age = site.max_age + site.max_age_jitter * random.random()  # noqa: S311 - it only spreads
        opened.max_age = serving.loop.call_later(age, splice.drain, Reason.MAX_AGE)
    if turn.directions is not None and turn.directions.until is not None:
        serving.lifetimes.limit(splice, turn.directions.until)
    splice.start()
    if record.tags:
        serving.lifetimes.catch(splice, record)
