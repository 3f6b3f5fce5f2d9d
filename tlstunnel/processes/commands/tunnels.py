"""Lists and ends tunnels of all serving processes, in the parent: asks them, and puts their answers together.

Other machines that share a server are told which tags were ended, through the ledger, and tell the same.

Tested by tests/promises/test_tunnels_listed.py and test_tunnels_ended.py.
"""

import asyncio
import socket
import time
from typing import TypeVar

import msgspec

from tlstunnel.commands.tunnels import EndTunnels, Tunnels, TunnelsEnded, TunnelsResult
from tlstunnel.errors import ControlError, ProcessError
from tlstunnel.escaping import printable, shorten
from tlstunnel.processes.commands.inquiry import ask_serving
from tlstunnel.processes.fleet import Fleet
from tlstunnel.processes.messages import TellEnded
from tlstunnel.processes.pages import Cursor, Page, join_pages, parse_selection
from tlstunnel.state.ended_tags import LONGEST_WHY, EndedTag

TELL_SECONDS = 2.0
"""How long to wait for the ledger at most, which waits for the server."""

FilteredT = TypeVar("FilteredT", Tunnels, EndTunnels)


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


async def end_tunnels(fleet: Fleet, command: EndTunnels, who: str) -> TunnelsEnded:
    """End tunnels of all processes, and with a tag also of other machines. Raises ControlError."""
    selection = parse_selection(command)
    if selection.is_empty:
        raise ControlError("say which tunnels are meant: give at least one filter; tlstunnel drain ends all")
    if len(command.why) > LONGEST_WHY:
        raise ControlError(f"why is longer than {LONGEST_WHY} characters")
    if not selection.is_narrow and not command.confirm:
        raise ControlError(
            "this may be all tunnels of a site, or of everyone: confirm that they are meant (confirm, or --yes)"
        )
    command = msgspec.structs.replace(resolve_site(fleet, command), why=printable(command.why))
    who = shorten(printable(who), LONGEST_WHY)
    telling = asyncio.ensure_future(_tell_others(fleet, command, who))
    try:
        answered = await ask_serving(fleet, command, who)
    finally:
        problem = await telling
    number = sum(result.number for _, result in answered.results if isinstance(result, TunnelsEnded))
    return TunnelsEnded(number=number, announced=problem == "", silent=answered.silent, problem=problem or "")


async def _tell_others(fleet: Fleet, command: EndTunnels, who: str) -> str | None:
    """Tell other machines; return why they could not be told, "" if they were, None if they do not matter."""
    if not command.tag or command.id or command.older or fleet.config.state.url is None:
        return None
    ledger = fleet.wiring.ledger
    if ledger is None:
        return "the ledger is being started; other machines are not told"
    ended = EndedTag(
        tag=command.tag,
        site=command.site,
        client=command.client,
        origin=command.origin,
        who=shorten(f"{who} at {printable(socket.gethostname())}", LONGEST_WHY),
        why=shorten(command.why, LONGEST_WHY),
    )
    try:
        await ledger.request(TellEnded(ended=ended), TELL_SECONDS)
    except ProcessError as error:
        return str(error)
    return ""


def resolve_site(fleet: Fleet, command: FilteredT) -> FilteredT:
    """Return the command with the first name of the site that it names, which is the one in records."""
    names = (site.names for site in fleet.config.sites if command.site in site.names)
    return msgspec.structs.replace(command, site=next(names, (command.site,))[0]) if command.site else command
