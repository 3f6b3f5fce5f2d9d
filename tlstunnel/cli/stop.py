"""``tlstunnel stop``: end a running tunnel within seconds."""

from pathlib import Path

import click

from tlstunnel.cli.control import control_options, run_command


@click.command()
@control_options
def command(*, control: Path | None, as_json: bool) -> None:
    """Accept no more, and end the tunnels within five seconds; at once where it is ending already. SIGINT does it too.

    Waits until that is done.
    """
    if run_command(control, "stop", as_json=as_json):
        click.echo("ended")
