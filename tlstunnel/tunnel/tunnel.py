"""One connection, from accept to its record. Only `Tunnel.run` defines the order of the stages.

Tested by tests/unit/test_turn.py.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Protocol

from tlstunnel.handshake.request import PlainRequest
from tlstunnel.handshake.response import Switched
from tlstunnel.tunnel import ends
from tlstunnel.tunnel.arrival import accept_tls, choose_site, read_hello, read_proxy_header
from tlstunnel.tunnel.client import Client
from tlstunnel.tunnel.exchange import pass_on, too_many_uploads
from tlstunnel.tunnel.health import answer_health_check, is_health_check
from tlstunnel.tunnel.opening import open_tunnel
from tlstunnel.tunnel.origin import reach_origin, relay, request_upgrade
from tlstunnel.tunnel.request import call_worker, check_firewall, check_request, read_request
from tlstunnel.tunnel.serving import Serving
from tlstunnel.tunnel.turn import Turn


class Counts(Protocol):
    """What the server counts of the connection of the current task."""

    def identify(self, ip: str) -> None:
        """The client's address is known: a proxy has sent it."""

    def begin_upload(self, ip: str) -> bool:
        """A plain request with a body has arrived; return whether its address may have one more."""

    def begin_exchange(self) -> None:
        """A plain request is passed on, which is no handshake and may take long."""

    def begin_response(self) -> None:
        """The response to a plain request has begun."""


class Tunnel:
    """A connection on `sock` from `peer` (an IP address; "" for a Unix socket), accepted at that time of the loop.

    `proxied` means that it must begin with a PROXY header.
    """

    def __init__(
        self, serving: Serving, sock: socket.socket, peer: str, accepted: float, *, proxied: bool = False
    ) -> None:
        self._client = Client(serving, sock, peer, accepted, proxied=proxied)
        self._turn: Turn | None = None

    def __repr__(self) -> str:
        return f"<Tunnel of {self._turn or self._client}>"

    async def run(self, on_end: Callable[[], None], counts: Counts) -> None:
        """Serve the connection until its tunnel is open, which then lives without this task, or until its end.

        `on_end` is called once, when the connection is recorded and its sockets are closed or closing.
        """
        client = self._client
        turn: Turn | None = None
        opened = False
        stages, began = client.serving.stages, client.accepted
        try:
            if client.proxied:
                await read_proxy_header(client)
                counts.identify(client.peer)
                began = stages.proxy_header.observe_since(began)
            site = choose_site(client, await read_hello(client))
            began = stages.hello.observe_since(began)
            await accept_tls(client, site)
            began = stages.tls.observe_since(began)
            turn = self._turn = Turn(client, client.accepted)
            await read_request(turn)
            if client.trusted:
                counts.identify(turn.record.client)
            if is_health_check(turn):
                return await answer_health_check(turn)
            check_request(turn)
            began = stages.request.observe_since(began)
            await check_firewall(turn)
            began = stages.firewall.observe_since(began)
            await call_worker(turn)
            if turn.directions is not None:
                began = stages.edge.observe_since(began)
            if isinstance(turn.request, PlainRequest):
                if turn.request.has_body and not counts.begin_upload(turn.record.client):
                    raise too_many_uploads()
                await reach_origin(turn)
                counts.begin_exchange()
                end = await pass_on(turn, counts.begin_response)
            else:
                await reach_origin(turn)
                began = stages.origin_connect.observe_since(began)
                response, reader = await request_upgrade(turn)
                stages.origin_response.observe_since(began)
                if isinstance(response, Switched):
                    open_tunnel(turn, response, on_end)
                    opened = True
                    return
                end = await relay(turn, response, reader)
            ends.finish(client, turn, end)
        except (Exception, asyncio.CancelledError) as error:
            await ends.end_with_error(client, turn, error)
        finally:
            if not opened:
                if turn is not None:
                    turn.close()
                on_end()
