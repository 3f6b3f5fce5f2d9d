"""What the parent does about single tunnels: it asks all serving processes, and puts together what they answer.

Tested by tests/promises/test_tunnels_listed.py.
"""

import time
from typing import TypeVar

import msgspec

from tlstunnel.commands.tunnels import Tunnels, TunnelsResult
from tlstunnel.processes.fleet import Fleet
from tlstunnel.processes.inquiry import ask_serving
from tlstunnel.processes.listing import Cursor, Page, join_pages, parse_selection

FilteredT = TypeVar("FilteredT", bound=Tunnels)


async def list_tunnels(fleet: Fleet, command: Tunnels, who: str) -> TunnelsResult:
    """List tunnels of all processes. Raises ControlError."""
    parse_selection(command)
    if command.after:
        Cursor.decode(command.after, command.sort)
    answered = await ask_serving(fleet, resolve_site(fleet, command), who, result=Page)
    pages = [page for _, page in answered.results if isinstance(page, Page)]
    tunnels, next_ = join_pages(pages, command.sort, command.limit)
    total = sum(page.total for page in pages)
    return TunnelsResult(now=time.time(), total=total, tunnels=tunnels, next=next_, silent=answered.silent)


def resolve_site(fleet: Fleet, command: FilteredT) -> FilteredT:
    """Return the command with the first name of the site that it names, which is the one in records."""
    names = (site.names for site in fleet.config.sites if command.site in site.names)
    return msgspec.structs.replace(command, site=next(names, (command.site,))[0]) if command.site else command
