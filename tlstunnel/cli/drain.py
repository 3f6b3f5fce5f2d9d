"""``tlstunnel drain``: shuts a tunnel down slowly enough that its clients do not all reconnect at once.

Tested by tests/promises/test_drain.py.
"""

from pathlib import Path

import click

from tlstunnel.cli.control import control_options, run_command


@click.command()
@control_options
def command(*, control: Path | None, as_json: bool) -> None:
    """Stop accepting, end the open tunnels over release.drain_over, oldest first, and exit. SIGTERM does the same.

    Waits until that is done. Meanwhile, `tlstunnel stop` ends it at once.
    """
    if run_command(control, "drain", as_json=as_json):
        click.echo("ended")
