"""``tlstunnel upgrade``: let a running tunnel go on with the code that is installed now."""

from pathlib import Path

import click

from tlstunnel.cli.control import control_options, run_command


@click.command()
@control_options
def command(*, control: Path | None, as_json: bool) -> None:
    """Go on with the code that is installed now, with the configuration and the certificates as they are now.

    The new code is tried first, whole but for accepting. Where it does not start, nothing is changed: the exit status
    is 1. Then it serves what connects, and the old processes finish their tunnels for up to release.drain_after. Nobody
    is disconnected.
    """
    if response := run_command(control, "upgrade", as_json=as_json):
        click.echo(f"{response['before']} -> {response['version']}, generation {response['generation']}")
