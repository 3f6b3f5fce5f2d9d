"""``tlstunnel top``: what a running tunnel does, live in a terminal.

Tested by tests/e2e/test_top.py.
"""

import sys
from pathlib import Path

import click

from tlstunnel.cli.control import FOLDERS
from tlstunnel.cli.examples import render_examples
from tlstunnel.processes.reach import find_control_socket, send_command


@click.command(
    short_help="Watch a running tunnel in the terminal.",
    epilog=render_examples("tlstunnel top", "tlstunnel top --every 5"),
)
@click.option(
    "--control",
    type=click.Path(path_type=Path),
    help=f"The control socket of the tunnel.  [default: the only one that responds in {FOLDERS}]",
)
@click.option(
    "--every", type=click.FloatRange(0.2, 3600), default=1.0, show_default=True, help="Seconds between two looks."
)
def command(*, control: Path | None, every: float) -> None:
    """Watch sites, tunnels, origins and refusals of the tunnel. The keys are at the bottom of the screen.

    Enter opens a site, a tunnel, an origin or a refusal. Typing after / filters. s sorts by the next column.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):  # Textual writes to standard error
        raise click.UsageError("top needs a terminal; tlstunnel status --sites prints the same once")
    control = find_control_socket() if control is None else control
    send_command(control, {"do": "status"})  # so that an error is not lost with the screen
    # It takes half a second to import.
    from tlstunnel.cli.top.app import Top  # noqa: PLC0415
    from tlstunnel.cli.top.source import Source  # noqa: PLC0415

    Top(Source(control), every).run()
