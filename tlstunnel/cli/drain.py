"""``tlstunnel drain``: end a running tunnel without a storm of clients that come back."""

from pathlib import Path

import click

from tlstunnel.cli.control import control_options, run_command


@click.command()
@control_options
def command(*, control: Path | None, as_json: bool) -> None:
    """Accept no more, and end the tunnels spread over release.drain_over, oldest first. Then end. SIGTERM does it too.

    Waits until that is done. `tlstunnel stop` meanwhile ends it at once.
    """
    if run_command(control, "drain", as_json=as_json):
        click.echo("ended")
