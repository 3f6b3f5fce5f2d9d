"""The commands that a serving process carries out: those about its own tunnels, origins and connections.

Tested by tests/unit/test_processes_answers.py.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from tlstunnel.commands.catalogue import parse_command
from tlstunnel.commands.command import AnyCommand
from tlstunnel.errors import ControlError

Answer = Callable[[Any, str], Awaitable[msgspec.Struct]]
"""Carries out a command for a person or program, who is named, and returns its result. Raises ControlError."""


class Answers:
    """Carries out the commands that have a handler, by type."""

    def __init__(self, handlers: Mapping[type[AnyCommand], Answer]) -> None:
        self._handlers = handlers

    async def carry_out(self, name: str, fields: Mapping[str, Any], who: str) -> Mapping[str, Any]:
        """Carry out the command with this name and these fields; return those of its result. Raises ControlError."""
        command = parse_command(name, fields)
        handler = self._handlers.get(type(command))
        if handler is None:
            raise ControlError(f"a serving process does not carry out the command {name}")
        result: Mapping[str, Any] = msgspec.to_builtins(await handler(command, who))
        return result
