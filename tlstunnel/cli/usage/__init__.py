"""``tlstunnel usage``: how much each site uses, compared with its guideline, and what is done about it."""

import importlib
from collections.abc import Sequence

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


_WITH_VALUES = frozenset({"--address", "--by", "--config", "--control", "--for", "--plot", "--since", "--why"})
"""The options of all commands that have a value, which is the next word."""


class _Group(click.Group):
    """Takes what is no command for a site: `usage SITE` is `usage show SITE`. Options may come before the command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"tlstunnel.cli.usage.{module}"), name)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] in ctx.help_option_names:
            return super().parse_args(ctx, args)
        place = _find_first_argument(args)
        if place is not None and args[place] in _COMMANDS:
            return super().parse_args(ctx, [args[place], *args[:place], *args[place + 1 :]])
        return super().parse_args(ctx, ["show", *args])


def _find_first_argument(args: Sequence[str]) -> int | None:
    """Return the place of the first word that is neither an option nor the value of one."""
    value = False
    for place, word in enumerate(args):
        if not value and not word.startswith("-"):
            return place
        value = not value and word in _WITH_VALUES
    return None


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
