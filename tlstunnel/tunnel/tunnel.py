"""One connection, from accept to its record. Only `Tunnel.run` defines the order of the stages.

Tested by tests/unit/test_turn.py.
"""

import asyncio
import socket
from collections.abc import Callable

from tlstunnel.handshake.request import PlainRequest
from tlstunnel.handshake.response import Switched
from tlstunnel.tunnel import ends
from tlstunnel.tunnel.arrival import accept_tls, choose_site, read_hello, read_proxy_header
from tlstunnel.tunnel.client import Client
from tlstunnel.tunnel.exchange import pass_on
from tlstunnel.tunnel.opening import open_tunnel
from tlstunnel.tunnel.origin import reach_origin, relay, request_upgrade
from tlstunnel.tunnel.request import call_worker, check_firewall, read_request
from tlstunnel.tunnel.serving import Serving
from tlstunnel.tunnel.turn import Turn


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

    async def run(
        self, on_end: Callable[[], None], on_exchange: Callable[[], None], on_client: Callable[[str], None]
    ) -> None:
        """Serve the connection until its tunnel is open, which then lives without this task, or until its end.

        `on_end` is called once, when the connection is recorded and its sockets are closed or closing; `on_exchange`
        when a plain request is passed on, which is no handshake and may take long; `on_client` with the client's
        address, when a proxy in front has named it.
        """
        client = self._client
        turn: Turn | None = None
        opened = False
        try:
            if client.proxied:
                await read_proxy_header(client)
                on_client(client.peer)
            site = choose_site(client, await read_hello(client))
            await accept_tls(client, site)
            turn = self._turn = Turn(client, client.accepted)
            await read_request(turn)
            if client.trusted:
                on_client(turn.record.client)
            await check_firewall(turn)
            await call_worker(turn)
            await reach_origin(turn)
            if isinstance(turn.request, PlainRequest):
                on_exchange()
                end = await pass_on(turn)
            else:
                response, reader = await request_upgrade(turn)
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
