"""The audit lines: each command that changes something is logged, with who gave it.

Tested by tests/promises/test_admin_actions.py.
"""

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
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
def log_action(command: AnyCommand, who: str, via: Via, show: Callable[[str], str] = str) -> Iterator[None]:
    """Log what becomes of a command that acts; nothing of others.

    `show` returns an address or a network of clients as it may be shown.
    """
    if not command.acts:
        yield
        return
    long = isinstance(command, _LONG)
    fields = _render_fields(command, show)
    log = functools.partial(_log, command.name, fields, who, via)
    if long:
        log("begun")
    try:
        yield
    except TlstunnelError as error:
        log("refused", str(error))
        raise
    except asyncio.CancelledError:
        if not long:
            log("cancelled")
        raise
    except Exception:
        log("failed")
        raise
    if not long:
        log("done")


def _render_fields(command: AnyCommand, show: Callable[[str], str]) -> Mapping[str, Any]:
    given = {name: value for name, value in msgspec.to_builtins(command).items() if value or value == 0}
    if client := given.get("client"):
        given["client"] = show(client)
    if addresses := given.get("addresses"):
        given["addresses"] = tuple(map(show, addresses))
    return {name: _render(value) for name, value in given.items()}


def _log(  # noqa: PLR0913, PLR0917 - what is in the line
    command: str, fields: Mapping[str, Any], who: str, via: Via, result: str, reason: str = ""
) -> None:
    structlog.get_logger().info(
        Event.ACTION,
        command=command,
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
