"""``tlstunnel stop``: shuts a tunnel down within seconds.

Tested by tests/promises/test_drain.py.
"""

from pathlib import Path

import click

from tlstunnel.cli.control import control_options, run_command
from tlstunnel.cli.examples import render_examples


@click.command(
    short_help="End the open tunnels within seconds, and exit.",
    epilog=render_examples("tlstunnel stop --control /run/tlstunnel/control-443.sock"),
)
@control_options
def command(*, control: Path | None, as_json: bool) -> None:
    """Stop accepting, end the open tunnels over five seconds, and exit. SIGINT does the same.

    If the tunnel is already shutting down, it ends at once. Waits until that is done.
    """
    if run_command(control, "stop", as_json=as_json):
        click.echo("ended")
