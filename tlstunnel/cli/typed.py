"""What the commands have in common that are given a request: the request, its fields, whom it is from, and its site."""

from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import TypeVar

import click

from tlstunnel.config import SiteConfig
from tlstunnel.handshake.request import Request
from tlstunnel.handshake.text import build_head, parse_field
from tlstunnel.tunnel.sites import candidates

Command = TypeVar("Command", bound=Callable[..., None])


def options(command: Command) -> Command:
    """The request's argument, and `headers` and `ip`."""
    command = click.option("--ip", default="127.0.0.1", show_default=True, help="The client's address.")(command)
    command = click.option(
        "--header", "headers", multiple=True, metavar="'NAME: VALUE'", help="A field; may be repeated."
    )(command)
    return click.argument("request", metavar="'GET /path?query'")(command)


def head(request: str, headers: Sequence[str], site: SiteConfig, *, plain: bool = False) -> bytes:
    """The whole head of `request`; without a Host field it is for the site. Raises click.BadParameter."""
    try:
        fields = [parse_field(header) for header in headers]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--header") from None
    try:
        return build_head(request, fields, site.names[0], plain=plain)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="request") from None


def refuse_no_address(ip: str) -> None:
    """Raise click.BadParameter where `ip` is none."""
    try:
        ip_address(ip)
    except ValueError:
        raise click.BadParameter(f"{ip!r} is not an IP address", param_hint="--ip") from None


def site_of(sites: Sequence[SiteConfig], request: Request) -> SiteConfig | None:
    """The site that the Host field means."""
    by_name = {name: site for site in sites for name in site.names}
    return next((by_name[name] for name in candidates(request.host) if name in by_name), None)
