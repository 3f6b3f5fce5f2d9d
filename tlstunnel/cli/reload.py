"""``tlstunnel reload``: let a running tunnel read its configuration and its certificates again."""

import json
from pathlib import Path

import click

from tlstunnel.control import ask, find
from tlstunnel.errors import ControlError


@click.command()
@click.option("--control", type=click.Path(path_type=Path), help="Its control socket; the only one where left out.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(*, control: Path | None, as_json: bool) -> None:
    """Read the configuration, the certificates and the lists again, and serve what connects from now on with them.

    Waits until that is done and says what has changed. Nobody is disconnected. Where anything in it is wrong, nothing
    is changed: the exit status is 1.
    """
    try:
        answer = ask(find(control), {"do": "reload"})
    except ControlError as error:
        if as_json:
            click.echo(json.dumps({"ok": False, "error": str(error)}))
        raise
    if as_json:
        click.echo(json.dumps(answer))
        return
    for line in answer["changes"] or ["nothing has changed"]:
        click.echo(line)
