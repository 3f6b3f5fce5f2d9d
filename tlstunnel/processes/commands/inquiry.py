"""Asks all serving processes at once, also those that drain: each knows its own tunnels.

Tested by tests/promises/test_processes.py.
"""

import asyncio
from typing import NamedTuple

import msgspec

from tlstunnel.commands.command import AnyCommand
from tlstunnel.errors import ControlError, ProcessError
from tlstunnel.processes.children import Child
from tlstunnel.processes.fleet import Fleet
from tlstunnel.processes.messages import Ask

ANSWER_SECONDS = 2.0
"""How long a process may take. One that drains or has ten thousand tunnels takes some milliseconds."""


class Answered(NamedTuple):
    """What the processes have answered, and which have not: they hang, or are of a release without the command."""

    results: list[tuple[Child, msgspec.Struct]]
    silent: list[int]


async def ask_serving(
    fleet: Fleet, command: AnyCommand, who: str, most: int | None = None, result: type[msgspec.Struct] | None = None
) -> Answered:
    """Have every serving process carry out a command. Raises ControlError if all refuse it.

    With `most`, only so many are asked, of those that accept connections. `result` is the type of their results, if it
    is not that of the command.
    """
    children = [child for child in (fleet.serving() if most is None else fleet.accepting()) if child.ready][:most]
    request = Ask(command=command.name, fields=msgspec.to_builtins(command), who=who)
    replies = await asyncio.gather(
        *(child.request(request, ANSWER_SECONDS) for child in children), return_exceptions=True
    )
    results, silent, problems = [], [], []
    for child, reply in zip(children, replies, strict=True):
        if isinstance(reply, ProcessError):
            silent.append(child.pid)
            problems.append(str(reply))
        elif isinstance(reply, BaseException):
            raise reply
        else:
            results.append((child, msgspec.convert(reply.fields, result or command.result)))
    if problems and not results:
        raise ControlError(*dict.fromkeys(problems))
    return Answered(results, silent)
