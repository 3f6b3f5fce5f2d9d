"""``tlstunnel upgrade``: replaces the program of a running tunnel by the release that is installed now.

Tested by tests/promises/test_upgrade.py.
"""

from pathlib import Path

import click

from tlstunnel.cli.control import control_options, run_command
from tlstunnel.cli.examples import render_examples


@click.command(
    short_help="Continue with the release that is installed now.", epilog=render_examples("tlstunnel upgrade")
)
@control_options
def command(*, control: Path | None, as_json: bool) -> None:
    """Continue with the release that is installed now, and with the current configuration and certificates.

    The new release is tried first, in everything except accepting. If it fails to start, nothing is changed and the
    exit status is 1. Then it serves new connections. The old processes keep their tunnels until these end, at most for
    release.drain_after. No client is disconnected by the upgrade itself.
    """
    if response := run_command(control, "upgrade", as_json=as_json):
        click.echo(f"{response['before']} -> {response['version']}, generation {response['generation']}")
