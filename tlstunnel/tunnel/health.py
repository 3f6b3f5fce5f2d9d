"""Health checks of load balancers, which the tunnel answers itself, before the firewall.

They are counted but not recorded: several load balancers that ask every second would fill the log.

Tested by tests/promises/test_health_path.py.
"""

import contextlib

from tlstunnel.handshake.refusal import render_head
from tlstunnel.handshake.request import PlainRequest, has_path
from tlstunnel.journal.events import EndedBy, Reason
from tlstunnel.metrics import families
from tlstunnel.tunnel.client import Client
from tlstunnel.tunnel.ends import End, close_connection
from tlstunnel.tunnel.turn import Turn

READY, DRAINING = (200, b"OK", b"ready\n"), (503, b"Service Unavailable", b"draining\n")
"""The responses: the status, its reason phrase, and the body."""


def find_health_path(client: Client) -> bytes:
    """Return the path at which this client gets the state of the tunnel, empty if it may not ask.

    Those in `health_addresses` and trusted proxies may, which includes a connection of a proxy's own with a PROXY
    header. Others do not learn that there is such a path.
    """
    site, peer, serving = client.site, client.peer, client.serving
    if site is None or not site.health_path:
        return b""
    is_proxy = peer == client.socket_peer and peer in serving.trusted_proxies
    return site.health_path if is_proxy or peer in serving.health_addresses else b""


def is_health_check(turn: Turn) -> bool:
    """Return whether the request is a health check by a load balancer, and not one that it passes on."""
    client, request = turn.client, turn.request
    if not isinstance(request, PlainRequest) or request.method not in {"GET", "HEAD"}:
        return False
    path = find_health_path(client)
    return bool(path) and has_path(request, path) and turn.record.client == client.peer


async def answer_health_check(turn: Turn) -> None:
    """Say whether new clients should be sent here, and end the connection."""
    client, request = turn.client, turn.request
    assert isinstance(request, PlainRequest)
    serving = client.serving
    status, phrase, body = READY if serving.availability.ready else DRAINING
    fields = (
        (b"Content-Type", b"text/plain; charset=utf-8"),
        (b"Content-Length", b"%d" % len(body)),
        (b"Cache-Control", b"no-store"),
        (b"Connection", b"close"),
    )
    head = render_head(b"HTTP/1.1 %d %b" % (status, phrase), fields)
    client.set_timeout(serving.timeouts.close)
    reset = True
    with contextlib.suppress(OSError):
        await client.channel.send(head if request.method == "HEAD" else head + body, last=True)
        reset = False
    serving.journal.metrics[families.HEALTH_CHECKS].add(str(status))
    close_connection(client, End(EndedBy.TUNNEL, Reason.RESPONDED, reset=reset, lingers=True))
