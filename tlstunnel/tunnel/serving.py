"""What a connection is served with.

Tested by tests/unit/test_turn.py.
"""

import asyncio
from dataclasses import dataclass

from tlstunnel.addresses import ListenAddress, Networks
from tlstunnel.config import Timeouts
from tlstunnel.firewall.verdict import Firewall
from tlstunnel.journal.journal import Journal
from tlstunnel.sockets.closing import ClosingSockets
from tlstunnel.sockets.deadlines import Deadlines
from tlstunnel.sockets.readiness import Readiness
from tlstunnel.tunnel.lifetimes import Lifetimes
from tlstunnel.tunnel.sites import Sites
from tlstunnel.tunnel.splice import Splices
from tlstunnel.tunnel.stages import Stages


class Availability:
    """Whether load balancers should send clients here. `ready` is False from the moment a shutdown begins."""

    __slots__ = ("ready",)

    def __init__(self) -> None:
        self.ready = True


@dataclass(frozen=True, slots=True)
class Serving:
    """The configuration in force when a connection was accepted, and what all connections of the process share."""

    sites: Sites
    timeouts: Timeouts
    trusted_proxies: Networks
    proxied_on: frozenset[ListenAddress] | None
    journal: Journal
    firewall: Firewall
    loop: asyncio.AbstractEventLoop
    readiness: Readiness
    deadlines: Deadlines
    closing_sockets: ClosingSockets
    splices: Splices
    lifetimes: Lifetimes
    health_addresses: Networks
    availability: Availability
    stages: Stages

    def proxied(self, listener: ListenAddress) -> bool:
        """Return whether connections of this listener must begin with a PROXY header."""
        return self.proxied_on is None or listener in self.proxied_on
