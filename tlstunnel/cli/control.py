"""The shared part of the commands for a running tunnel."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from tlstunnel.commands.command import Command, ResultT
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
    with print_errors(as_json=as_json):
        response = send_command(find_control(control), {"do": do})
    if as_json:
        click.echo(json.dumps(response))
        return None
    return response


def find_control(control: Path | None) -> Path:
    """Return the control socket that is given, or that of the only tunnel, and say which one. Raises ControlError."""
    if control is None:
        control = find_control_socket()
        click.echo(f"using {control}", err=True)
    return control


@contextlib.contextmanager
def print_errors(*, as_json: bool) -> Iterator[None]:
    """Print a ControlError as JSON too, if that is wanted."""
    try:
        yield
    except ControlError as error:
        if as_json:
            several = {"problems": error.problems} if len(error.problems) > 1 else {}
            click.echo(json.dumps({"ok": False, "error": str(error), **several}))
        raise


def ask_tunnel(control: Path, command: Command[ResultT]) -> ResultT:
    """Have the running tunnel carry out a command, and return its result. Raises ControlError."""
    response = send_command(control, {"do": command.name, **msgspec.to_builtins(command)})
    result: ResultT = msgspec.convert(response, command.result)  # type: ignore[assignment] # it is ResultT
    return result
