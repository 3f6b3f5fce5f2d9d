"""The command line: one module for each command."""

import importlib
import os
import sys

import click

from tlstunnel import __version__
from tlstunnel.errors import TlstunnelError


class _Group(click.Group):
    """Imports the module of a command only when it is used. ``certs create`` does not need the server's libraries."""

    _COMMANDS = (
        "start",
        "reload",
        "upgrade",
        "status",
        "top",
        "tunnels",
        "usage",
        "drain",
        "stop",
        "certs",
        "check",
        "config",
        "firewall",
        "edge",
    )

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # Not in an upgrade: the child of a probe ends with it, and nothing waits for the start of the new program.
        first = not ctx.resilient_parsing and "TLSTUNNEL_HANDOVER" not in os.environ
        if args[0] == "start" and first and not {"-h", "--help"} & set(args):
            from tlstunnel.processes.spawn import start_ahead  # noqa: PLC0415 - for this command only

            start_ahead()
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"tlstunnel.cli.{cmd_name}").command
        return command


@click.command(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="tlstunnel")
def cli() -> None:
    """A TLS-terminating, TCP-level tunnel for WebSockets."""


def main() -> None:
    """Run the command line. The exit status is 0, 1 with the reason on standard error, or 2 for wrong usage."""
    try:
        cli(prog_name="tlstunnel")
    except TlstunnelError as error:
        for problem in error.problems:
            click.echo(f"tlstunnel: {problem}", err=True)
        sys.exit(1)
