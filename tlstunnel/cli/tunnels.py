"""``tlstunnel tunnels``: lists the open tunnels of a running tunnel, and ends some.

Tested by tests/unit/test_cli_tunnels.py, tests/promises/test_tunnels_listed.py and test_tunnels_ended.py.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import msgspec
from click.core import ParameterSource

from tlstunnel.cli.control import ask_tunnel, control_options, find_control, print_errors
from tlstunnel.cli.examples import render_examples
from tlstunnel.cli.tables import align, count, group, render_duration, render_size
from tlstunnel.commands.tunnels import MOST_LISTED, EndTunnels, Order, Tunnels, TunnelsResult, TunnelStatus
from tlstunnel.config.durations import Duration
from tlstunnel.escaping import printable, shorten

HEADINGS = ("id", "age", "site", "client", "origin", "path", "up", "down", "per second", "tags")

LONGEST_CELL = 40
"""Characters of a cell of the table. `--json` has the whole text."""

CommandT = TypeVar("CommandT", bound=Callable[..., None])


def _parse_age(_: click.Context, __: click.Parameter, text: str | None) -> float:
    try:
        return float(Duration.parse(text)) if text is not None else 0.0
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def filter_options(command: CommandT) -> CommandT:
    """Add the options that select tunnels."""
    options = (
        click.option("--site", default="", metavar="NAME", help="Those of this site."),
        click.option("--client", default="", metavar="IP", help="Those of this address or network."),
        click.option("--origin", default="", help="Those at this origin, as in the log."),
        click.option("--tag", default="", metavar="NAME[=VALUE]", help="Those to which an edge worker gave this tag."),
        click.option("--older", metavar="TIME", callback=_parse_age, help="Those that are at least so old, as 1h."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(
    invoke_without_command=True,
    short_help="List the open tunnels, or end some.",
    epilog=render_examples(
        "tlstunnel tunnels --site chat.example.com --sort rate --limit 20",
        "tlstunnel tunnels --client 198.51.100.0/24 --older 1h --json",
    ),
)
@filter_options
@click.option("--id", default="", help="The tunnel with this id, that of its record in the log.")
@click.option("--sort", type=click.Choice(get_args(Order)), default="age", show_default=True, help="What is first.")
@click.option(
    "--limit", type=click.IntRange(0), default=100, show_default=True, help="The most to list; 0 only counts them."
)
@control_options
@click.pass_context
def command(
    context: click.Context, /, *, sort: Order, limit: int, control: Path | None, as_json: bool, **filters: Any
) -> None:
    """List the open tunnels of all processes: the oldest first, or as --sort says. All filters have to match."""
    if context.invoked_subcommand is not None:
        given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given:
            raise click.UsageError(f"options come after {context.invoked_subcommand}")
        return
    with print_errors(as_json=as_json):
        result = list_tunnels(find_control(control), Tunnels(sort=sort, **filters), limit)
    if as_json:
        click.echo(json.dumps({"ok": True, **msgspec.to_builtins(result)}))
        return
    for line in render(result):
        click.echo(line)


@command.command(
    "end",
    short_help="End some tunnels.",
    epilog=render_examples(
        "tlstunnel tunnels end 5f0c1d3b7a9e2468",
        "tlstunnel tunnels end --tag user=42 --why 'signed out'",
        "tlstunnel tunnels end --site chat.example.com --older 12h --yes",
    ),
)
@click.argument("tunnel", default="", metavar="[ID]")
@filter_options
@click.option("--why", default="", metavar="TEXT", help="The reason, which is logged with who asked for it.")
@click.option("--yes", is_flag=True, help="Do not ask whether all of a site, or whatever else matches, are meant.")
@control_options
def end(*, tunnel: str, why: str, yes: bool, control: Path | None, as_json: bool, **filters: Any) -> None:
    """End the tunnel with this ID, or those that match all filters, at least one.

    What both sides have sent until now is delivered, for a second at most. With --tag, the tunnels of other machines
    that use the same server (state.url) end too. Clients may connect again: whoever must not come back has to be
    refused, by the origin or an edge worker.
    """
    wanted = EndTunnels(id=tunnel, why=why, confirm=yes, **filters)
    with print_errors(as_json=as_json):
        found = find_control(control)
        if not yes and not as_json and _is_wide(wanted):
            total = ask_tunnel(found, Tunnels(limit=0, **filters)).total
            click.confirm(f"End {count(total, 'tunnel')}?", abort=True)
            wanted = msgspec.structs.replace(wanted, confirm=True)
        result = ask_tunnel(found, wanted)
    if as_json:
        click.echo(json.dumps({"ok": True, **msgspec.to_builtins(result)}))
        return
    click.echo(f"{count(result.number, 'tunnel')} ended{', other machines are told' if result.announced else ''}")
    if result.problem:
        click.echo(f"other machines: {result.problem}", err=True)
    if result.silent:
        click.echo(f"processes that do not respond: {', '.join(map(str, result.silent))}", err=True)
    if result.problem or result.silent:
        raise SystemExit(1)


def _is_wide(command: EndTunnels) -> bool:
    """Return whether it needs a confirmation: there is a filter, and none that means a tunnel, a client or a user."""
    filters = command.id, command.site, command.client, command.origin, command.tag, command.older
    return any(filters) and not (command.id or command.client or "=" in command.tag)


def list_tunnels(control: Path, command: Tunnels, limit: int) -> TunnelsResult:
    """Return up to `limit` tunnels, in as many pages as it takes. Raises ControlError."""
    result = ask_tunnel(control, msgspec.structs.replace(command, limit=min(limit, MOST_LISTED)))
    tunnels = result.tunnels
    while result.next and len(tunnels) < limit:
        most = min(limit - len(tunnels), MOST_LISTED)
        result = ask_tunnel(control, msgspec.structs.replace(command, limit=most, after=result.next))
        tunnels += result.tunnels
    return msgspec.structs.replace(result, tunnels=tunnels)


def render(result: TunnelsResult) -> Iterator[str]:
    """Return the lines for people."""
    if result.tunnels:
        yield from align([HEADINGS, *map(_to_cells, result.tunnels)])
    listed = len(result.tunnels)
    total = count(result.total, "tunnel")
    yield total if listed == result.total else f"{group(listed)} of {total}"
    if result.silent:
        yield f"without those of processes that do not respond: {', '.join(map(str, result.silent))}"


def _to_cells(tunnel: TunnelStatus) -> Sequence[str]:
    texts = (tunnel.site, tunnel.client or "unix", tunnel.origin, tunnel.path)
    tags = ", ".join(f"{name}={value}" for name, value in tunnel.tags.items())
    return (
        printable(tunnel.id),
        render_duration(tunnel.seconds),
        *(shorten(text, LONGEST_CELL) for text in texts),
        render_size(tunnel.up),
        render_size(tunnel.down),
        render_size(tunnel.rate),
        shorten(printable(tags), LONGEST_CELL),
    )
