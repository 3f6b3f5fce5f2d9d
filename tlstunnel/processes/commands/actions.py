"""The audit lines: each command that changes something is logged, with who gave it.

Tested by tests/promises/test_admin_actions.py.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from tlstunnel.commands.command import AnyCommand
from tlstunnel.commands.processes import Drain, Stop, Upgrade
from tlstunnel.errors import TlstunnelError
from tlstunnel.escaping import printable, shorten
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog

Via = Literal["control socket", "HTTP"]
"""How a command has come."""

LONGEST_FIELD = 200
"""Characters of a field's text in an audit line."""

_LONG: tuple[type[AnyCommand], ...] = (Drain, Stop, Upgrade)
"""These end the program or replace it, so their line is logged when they begin, and another one if they fail."""


@contextlib.contextmanager
def log_action(command: AnyCommand, who: str, via: Via) -> Iterator[None]:
    """Log what becomes of a command that acts; nothing of others."""
    if not command.acts:
        yield
        return
    long = isinstance(command, _LONG)
    if long:
        _log(command, who, via, "begun")
    try:
        yield
    except TlstunnelError as error:
        _log(command, who, via, "refused", str(error))
        raise
    except asyncio.CancelledError:
        if not long:
            _log(command, who, via, "cancelled")
        raise
    except Exception:
        _log(command, who, via, "failed")
        raise
    if not long:
        _log(command, who, via, "done")


def _log(command: AnyCommand, who: str, via: Via, result: str, reason: str = "") -> None:
    fields = {name: _render(value) for name, value in msgspec.to_builtins(command).items() if value or value == 0}
    structlog.get_logger().info(
        Event.ACTION,
        command=command.name,
        who=shorten(printable(who), LONGEST_FIELD),
        via=via,
        result=result,
        **({"fields": fields} if fields else {}),
        **({"reason": shorten(printable(reason), LONGEST_FIELD)} if reason else {}),
    )


def _render(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        return value
    return shorten(printable(value if isinstance(value, str) else str(value)), LONGEST_FIELD)
