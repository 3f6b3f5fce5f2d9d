"""Maintenance: while a file exists, new tunnels are refused with 503, except from some addresses.

    [[sites]]
    names = ["chat.example.com"]
    origins = ["10.0.0.5:3000"]
    worker = "edge/maintenance.py:fetch"

    [sites.worker_config]
    flag = "/run/tlstunnel/maintenance"
    retry_after = 120
    let_through = ["10.0.0.0/8", "2001:db8:1::/48"]

Create the file with ``touch``, and new clients get 503 with ``Retry-After``. Remove it, and they are served again. No
reload is needed, and open tunnels stay open.
"""

import asyncio
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any

from tlstunnel.edge import Reply, WorkerRequest


@dataclass(frozen=True)
class Env:
    """The file, the value of Retry-After, and the exempt addresses."""

    flag: Path
    retry_after: int
    let_through: tuple[IPv4Network | IPv6Network, ...]


async def setup(config: dict[str, Any]) -> Env:
    """Read the configuration. An exception here makes it invalid."""
    networks = tuple(ip_network(text) for text in config.get("let_through", []))
    return Env(Path(config["flag"]), int(config.get("retry_after", 60)), networks)


async def fetch(request: WorkerRequest, env: Env) -> WorkerRequest | Reply:
    """Refuse clients during maintenance, unless their address is exempt."""
    # In a thread: the disk may have to wake up, and other requests must not wait for it.
    if not await asyncio.to_thread(env.flag.exists) or _let_through(request.client_address, env):
        return request
    return Reply(503, "down for maintenance\n", {"Retry-After": str(env.retry_after)})


def _let_through(address: str, env: Env) -> bool:
    if not address:  # a client on a Unix socket has none
        return False
    ip = ip_address(address)
    return any(ip in network for network in env.let_through)
