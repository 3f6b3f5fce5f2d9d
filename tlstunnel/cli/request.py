"""The shared part of commands that take a request: its options, its head, the client's address, and its site.

Tested by tests/e2e/test_edge_run.py.
"""

from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import TypeVar

import click

from tlstunnel.config import SiteConfig
from tlstunnel.handshake.request import Request
from tlstunnel.handshake.text import build_head, parse_field
from tlstunnel.tunnel.sites import candidates

Command = TypeVar("Command", bound=Callable[..., None])


def request_options(command: Command) -> Command:
    """Add the argument `request` and the options `headers` and `ip` to a command."""
    command = click.option("--ip", default="127.0.0.1", show_default=True, help="The client's address.")(command)
    command = click.option(
        "--header", "headers", multiple=True, metavar="'NAME: VALUE'", help="A header field; may be repeated."
    )(command)
    return click.argument("request", metavar="'GET /path?query'")(command)


def build_request_head(request: str, headers: Sequence[str], site: SiteConfig, *, plain: bool = False) -> bytes:
    """Return the complete head of `request`, with the site's name as Host if it has none. Raises click.BadParameter."""
    try:
        fields = [parse_field(header) for header in headers]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--header") from None
    try:
        return build_head(request, fields, site.names[0], plain=plain)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="request") from None


def refuse_invalid_address(ip: str) -> None:
    """Raise click.BadParameter if `ip` is not an IP address."""
    try:
        ip_address(ip)
    except ValueError:
        raise click.BadParameter(f"{ip!r} is not an IP address", param_hint="--ip") from None


def find_site(sites: Sequence[SiteConfig], request: Request) -> SiteConfig | None:
    """Return the site that the Host field names, or None."""
    by_name = {name: site for site in sites for name in site.names}
    return next((by_name[name] for name in candidates(request.host) if name in by_name), None)
