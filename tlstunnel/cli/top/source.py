"""What ``tlstunnel top`` shows, asked of a running tunnel over its control socket.

Tested by tests/e2e/test_top.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlstunnel.cli.control import ask_tunnel
from tlstunnel.cli.top.tables import Tab
from tlstunnel.commands.command import Command, ResultT
from tlstunnel.commands.records import Refusals
from tlstunnel.commands.sites import Origins, Sites
from tlstunnel.commands.tunnels import MOST_LISTED, EndTunnels, Tunnels, TunnelsEnded

MOST_REFUSALS = 500


@dataclass(frozen=True, slots=True)
class Items:
    """The rows of a table, of `total` that there are."""

    items: Sequence[Any]
    total: int


class Source:
    """Asks the tunnel that listens at `control`. Every method raises ControlError if that fails."""

    def __init__(self, control: Path) -> None:
        self._control = control

    def ask(self, command: Command[ResultT]) -> ResultT:
        """Have a command carried out, and return its result."""
        return ask_tunnel(self._control, command)

    def list_items(self, tab: Tab, site: str) -> Items:
        """Return what a table shows: of a site, or of all if it is empty."""
        match tab:
            case "sites":
                sites = self.ask(Sites(site=site, sort="tunnels"))
                return Items(sites.sites, sites.total)
            case "tunnels":
                tunnels = self.ask(Tunnels(site=site, sort="rate", limit=MOST_LISTED))
                return Items(tunnels.tunnels, tunnels.total)
            case "origins":
                origins = self.ask(Origins(site=site))
                return Items(origins.origins, origins.total)
            case "refusals":
                refusals = self.ask(Refusals(site=site, limit=MOST_REFUSALS)).refusals
                return Items(refusals, len(refusals))

    def end_tunnel(self, tunnel: str) -> TunnelsEnded:
        """End the tunnel with this id."""
        return self.ask(EndTunnels(id=tunnel, why="tlstunnel top"))
