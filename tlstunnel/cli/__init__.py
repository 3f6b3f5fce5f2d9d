"""The command line: one module a command."""

import sys

import click

from tlstunnel import __version__
from tlstunnel.errors import TlstunnelError


class _Group(click.Group):
    """Imports a command's module when it is used: ``certs create`` must not pay for the server's imports."""

    _COMMANDS = ("start", "reload", "upgrade", "status", "drain", "stop", "certs", "check", "config", "firewall")

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._COMMANDS:
            return None
        module = __import__(f"tlstunnel.cli.{cmd_name}", fromlist=["command"])
        command: click.Command = module.command
        return command


@click.command(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="tlstunnel")
def cli() -> None:
    """A TLS-terminating, TCP-level tunnel for WebSockets."""


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 failed with the reason on standard error, 2 wrong usage."""
    try:
        cli(prog_name="tlstunnel")
    except TlstunnelError as error:
        click.echo(f"tlstunnel: {error}", err=True)
        sys.exit(1)
