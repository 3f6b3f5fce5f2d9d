"""All commands, by name.

Tested by tests/unit/test_commands.py.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from tlstunnel.commands import configuration, metrics, processes, records, sites, tunnels, usage
from tlstunnel.commands.command import AnyCommand
from tlstunnel.errors import ControlError

_COMMANDS: tuple[type[AnyCommand], ...] = (
    processes.Reload,
    processes.Upgrade,
    processes.Status,
    processes.Ready,
    processes.Drain,
    processes.Stop,
    metrics.Metrics,
    sites.Sites,
    sites.Origins,
    sites.Certificates,
    configuration.Configuration,
    configuration.Loads,
    records.Refusals,
    records.WatchRecords,
    tunnels.Tunnels,
    tunnels.EndTunnels,
    usage.Usage,
    usage.Notices,
    usage.AckNotice,
    usage.MuteSite,
    usage.ThrottleSite,
    usage.ReleaseSite,
)

COMMANDS: Mapping[str, type[AnyCommand]] = {command.name: command for command in _COMMANDS}
"""The commands, by name."""


def parse_command(name: str, fields: Mapping[str, Any]) -> AnyCommand:
    """Return the command with this name and these fields. Raises ControlError."""
    command = COMMANDS.get(name)
    if command is None:
        raise ControlError(f"unknown command: {name}")
    try:
        return msgspec.convert(fields, command)
    except msgspec.ValidationError as error:
        raise ControlError(f"invalid request: {error}") from None
