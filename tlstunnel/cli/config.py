"""``tlstunnel config``: checks or shows a configuration file without starting the tunnel."""

import asyncio
import json
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tlstunnel.addresses import quoted
from tlstunnel.cli.examples import render_examples
from tlstunnel.config import Config, Duration, OriginConfig, SiteConfig, load
from tlstunnel.config.firewall import RateLimitConfig
from tlstunnel.config.rendering import render_schema, render_toml
from tlstunnel.config.together import list_pools
from tlstunnel.plans.guidelines import describe_plan, find_plans

if TYPE_CHECKING:
    from tlstunnel.serving.loading import LoadedConfig


@click.group(short_help="Check or show a configuration file.")
def command() -> None:
    """Check a configuration file, show all its values, or print the schema of such files."""


@command.command(
    short_help="Check a file, and all that it names.",
    epilog=render_examples("tlstunnel config check /etc/tlstunnel/tlstunnel.toml"),
)
@click.argument("file", type=click.Path(path_type=Path), required=False)
def check(file: Path | None) -> None:
    """Check FILE, and the certificates, lists, rules and edge workers that it names, as a start would.

    FILE defaults to tlstunnel.toml, if only you can write it and this folder. Every problem is reported. No address is
    looked up or listened on. The modules of edge workers are executed, but their setup is not called.
    """
    # Imported here, because it needs libraries that the other commands do not.
    from tlstunnel.serving.loading import Description, load  # noqa: PLC0415

    description = Description.from_file(file)
    # A start creates the test certificate in the folder where it runs, which need not be this one.
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(description, test_folder=Path(folder))
    asyncio.run(_try_helpers(loaded))
    for warning in (*loaded.certificate_warnings(datetime.now(UTC)), *loaded.warnings()):
        click.echo(f"tlstunnel: {description.locate(warning.path)}: warning: {warning.hint}", err=True)
    for line in _summary(description.config):
        click.echo(line)


async def _try_helpers(loaded: "LoadedConfig") -> None:
    """Start and stop the helpers of the managed rules, because some mistakes are only found by libmodsecurity."""
    try:
        await loaded.start_firewall()
    finally:
        await loaded.close()


@command.command(
    short_help="Print a file with all its values.", epilog=render_examples("tlstunnel config show tlstunnel.toml")
)
@click.argument("file", type=click.Path(path_type=Path), default="tlstunnel.toml")
def show(file: Path) -> None:
    """Print FILE as TOML with every key and its value, defaults included.

    Paths are absolute. Fields for origins whose names look like secrets are hidden, and so are secrets in URLs.
    """
    for line in render_toml(load(file)):
        click.echo(line)


@command.command(
    short_help="Print the JSON Schema of such files.",
    epilog=render_examples("tlstunnel config schema > tlstunnel.schema.json"),
)
def schema() -> None:
    """Print the JSON Schema of configuration files, for completion and checks in editors."""
    click.echo(json.dumps(render_schema(), indent=2))


def _summary(config: Config) -> Iterator[str]:
    yield f"listen    {', '.join(map(str, config.listen)) or 'chosen by start'}"
    for site in config.sites:
        yield f"site      {_render_site(site)}"
    for plan in find_plans(config).values():
        yield f"plan      {plan.site}: {describe_plan(plan, config.usage.notices)}"
    if not config.sites:
        yield "site      none: start chooses the origin"
    yield from _render_limits(config)
    times = {name: getattr(config.timeouts, name) for name in config.timeouts.__struct_fields__}
    yield f"timeouts  {', '.join(f'{name} {_render_time(time)}' for name, time in times.items())}"
    yield "ok"


def _render_limits(config: Config) -> Iterator[str]:
    """Yield what each limit means: what it counts across."""
    url = config.state.url
    across = f"across all machines that use {url}" if url is not None else "across all processes of this machine"
    for where, limits in (("", config.rate_limits), *((site.names[0], site.rate_limits) for site in config.sites)):
        for limit in limits:
            of = f" of {where}" if where else ""
            yield f"limit     {quoted(limit.name)}{of}: {', '.join(_list_parts(limit))}, {across}"
    for _, table in list_pools(config):
        for origin in table.origins:
            if origin.max_tunnels is not None:
                yield f"limit     origin {origin.address}: {origin.max_tunnels} tunnels, {across}"
    yield f"limit     unfinished handshakes: {config.limits.unfinished_handshakes}, per process"


def _list_parts(limit: RateLimitConfig) -> Iterator[str]:
    if limit.limit is not None:
        yield f"{limit.limit}{f', then blocked for {limit.block_for}' if limit.block_for is not None else ''}"
    if limit.max_tunnels:
        yield f"{limit.max_tunnels} tunnels"
    if limit.mode == "log":
        yield "only logged"


def _render_site(site: SiteConfig) -> str:
    default = " (default)" if site.default else ""
    certificate = f", certificate {site.cert}" if site.cert else ""
    worker = f", worker {site.worker}" if site.worker else ""
    return f"{', '.join(site.names)}{default} -> {_render_origins(site.origins)}{certificate}{worker}"


def _render_origins(origins: tuple[OriginConfig, ...]) -> str:
    return ", ".join(f"{origin.address}{' (backup)' if origin.backup else ''}" for origin in origins)


def _render_time(time: Duration | None) -> str:
    return "off" if time is None else str(time)
