"""What the commands have in common that a running tunnel answers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from tlstunnel.errors import ControlError
from tlstunnel.processes.control import ask, find


def options(command: Callable[..., None]) -> Callable[..., None]:
    """``--control`` and ``--json``, which is `as_json`."""
    command = click.option("--json", "as_json", is_flag=True, help="One JSON object.")(command)
    where = "Its control socket; the only one where left out."
    return click.option("--control", type=click.Path(path_type=Path), help=where)(command)


def answered(control: Path | None, do: str, *, as_json: bool) -> Mapping[str, Any] | None:
    """Ask the tunnel to `do` that; give its answer, or print it and give None. Raises ControlError."""
    try:
        answer = ask(find(control), {"do": do})
    except ControlError as error:
        if as_json:
            click.echo(json.dumps({"ok": False, "error": str(error)}))
        raise
    if as_json:
        click.echo(json.dumps(answer))
        return None
    return answer
