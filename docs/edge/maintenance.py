"""Maintenance: while a file is there, new tunnels are refused with 503, but for those of the addresses let through.

    [[sites]]
    names = ["chat.example.com"]
    origins = ["10.0.0.5:3000"]
    worker = "edge/maintenance.py:fetch"

    [sites.worker_config]
    flag = "/run/tlstunnel/maintenance"
    retry_after = 120
    let_through = ["10.0.0.0/8", "2001:db8:1::/48"]

``touch`` the file, and new clients are told to come back; ``rm`` it, and they are served. Nothing is reloaded, and
tunnels that are open go on.
"""

import asyncio
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any

from tlstunnel.edge import Reply, UpgradeRequest


@dataclass(frozen=True)
class Env:
    """The file, what clients are told, and who is let through."""

    flag: Path
    retry_after: int
    let_through: tuple[IPv4Network | IPv6Network, ...]


async def setup(config: dict[str, Any]) -> Env:
    """Read the table. What is wrong with it refuses the configuration."""
    networks = tuple(ip_network(text) for text in config.get("let_through", []))
    return Env(Path(config["flag"]), int(config.get("retry_after", 60)), networks)


async def fetch(request: UpgradeRequest, env: Env) -> UpgradeRequest | Reply:
    """Refuse who is not let through during maintenance."""
    # In a thread: a file may be on a disk that has to wake up, and other requests are not to wait for it.
    if not await asyncio.to_thread(env.flag.exists) or _let_through(request.client_address, env):
        return request
    return Reply(503, "down for maintenance\n", {"Retry-After": str(env.retry_after)})


def _let_through(address: str, env: Env) -> bool:
    if not address:  # of a client on a Unix socket, nothing is known
        return False
    ip = ip_address(address)
    return any(ip in network for network in env.let_through)
