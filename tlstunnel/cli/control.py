"""The shared part of the commands for a running tunnel."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from tlstunnel.errors import ControlError
from tlstunnel.processes.reach import find_control_socket, send_command

FOLDERS = "$RUNTIME_DIRECTORY, else $XDG_RUNTIME_DIR/tlstunnel or /run/tlstunnel"
"""Where control sockets are (`tlstunnel.processes.reach.list_folders`)."""


def control_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options ``--control`` and ``--json``, whose parameter is `as_json`."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)
    where = f"The control socket of the tunnel.  [default: the only one that responds in {FOLDERS}]"
    return click.option("--control", type=click.Path(path_type=Path), help=where)(command)


def run_command(control: Path | None, do: str, *, as_json: bool) -> Mapping[str, Any] | None:
    """Send the command `do`; return the response, or with `as_json` print it and return None. Raises ControlError.

    Without `control`, the only tunnel is found, and standard error says which one it is.
    """
    try:
        if control is None:
            control = find_control_socket()
            click.echo(f"using {control}", err=True)
        response = send_command(control, {"do": do})
    except ControlError as error:
        if as_json:
            several = {"problems": error.problems} if len(error.problems) > 1 else {}
            click.echo(json.dumps({"ok": False, "error": str(error), **several}))
        raise
    if as_json:
        click.echo(json.dumps(response))
        return None
    return response
