"""``tlstunnel drain``: shuts a tunnel down slowly enough that its clients do not all reconnect at once.

Tested by tests/promises/test_drain.py.
"""

from pathlib import Path

import click

from tlstunnel.cli.control import control_options, run_command
from tlstunnel.cli.examples import render_examples


@click.command(
    short_help="End the open tunnels one after another, and exit.", epilog=render_examples("tlstunnel drain")
)
@control_options
def command(*, control: Path | None, as_json: bool) -> None:
    """Stop accepting, end the open tunnels over release.drain_over, oldest first, and exit. SIGTERM does the same.

    Waits until that is done. Meanwhile, `tlstunnel stop` ends it at once.
    """
    if run_command(control, "drain", as_json=as_json):
        click.echo("ended")
