"""What the commands that talk to a running tunnel share."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from tlstunnel.errors import ControlError
from tlstunnel.processes.control import find_control_socket, send_command


def control_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--control`` and ``--json``, which is `as_json`."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)
    where = "Its control socket; by default that of the only tunnel that is running."
    return click.option("--control", type=click.Path(path_type=Path), help=where)(command)


def run_command(control: Path | None, do: str, *, as_json: bool) -> Mapping[str, Any] | None:
    """Have the tunnel `do` that; return its response, or print it and return None. Raises ControlError."""
    try:
        response = send_command(find_control_socket(control), {"do": do})
    except ControlError as error:
        if as_json:
            click.echo(json.dumps({"ok": False, "error": str(error)}))
        raise
    if as_json:
        click.echo(json.dumps(response))
        return None
    return response
