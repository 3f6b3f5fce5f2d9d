"""``tlstunnel usage``: how much each site uses, compared with its guideline, and what is done about it."""

import importlib

import click

from tlstunnel.cli.examples import render_examples

_COMMANDS = {
    "show": ("show", "command"),
    "notices": ("notices", "list_notices"),
    "ack": ("notices", "acknowledge"),
    "mute": ("notices", "mute"),
    "throttle": ("notices", "throttle"),
    "release": ("notices", "release"),
}
"""The commands, each with its module and its name in it. A module is imported when its command is used."""


class _Group(click.Group):
    """Takes what is no command for a site: `usage SITE` is `usage show SITE`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"tlstunnel.cli.usage.{module}"), name)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in _COMMANDS and args[0] not in ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


@click.command(
    cls=_Group,
    short_help="Show how much each site uses.",
    options_metavar="[SITE]",
    subcommand_metavar="[OPTIONS] | COMMAND [ARGS]...",
    epilog=render_examples(
        "tlstunnel usage",
        "tlstunnel usage chat.example.com --since 30d",
        "tlstunnel usage --csv --since 2026-11-01 > november.csv",
    ),
)
def command() -> None:
    """Show how much each site uses, compared with its guideline, and do something about it.

    Without a command, it is `show`, which has the options.
    """
