"""``tlstunnel reload``: makes a running tunnel read its configuration and its certificates again."""

from pathlib import Path

import click

from tlstunnel.cli.control import control_options, run_command
from tlstunnel.cli.examples import render_examples


@click.command(
    short_help="Load the configuration, certificates and lists again.", epilog=render_examples("tlstunnel reload")
)
@control_options
def command(*, control: Path | None, as_json: bool) -> None:
    """Read the configuration, the certificates and the lists again, and use them for new connections.

    Waits until that is done, and prints what has changed. No client is disconnected. If there is a problem, nothing is
    changed and the exit status is 1.
    """
    if response := run_command(control, "reload", as_json=as_json):
        for line in response["changes"] or ["nothing has changed"]:
            click.echo(line)
