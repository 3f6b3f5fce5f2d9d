"""``tlstunnel config``: look at a configuration file without starting anything."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click

from tlstunnel.config import Config, Duration, OriginConfig, SiteConfig, load
from tlstunnel.config.rendering import render_schema, render_toml
from tlstunnel.errors import CertificateError, ConfigurationError

OPEN_TO_ALL = (
    "without web_origins any web page may connect, with the cookies of whoever looks at it;"
    ' write web_origins = ["same"], or the origins of your pages'
)

UNVERIFIED = (
    'origin_verify = "off": whoever is on the way to its origins can read and change everything; give origin_ca instead'
)


@click.group()
def command() -> None:
    """Check a configuration file, show what it amounts to, or what it may hold."""


@command.command()
@click.argument("file", type=click.Path(path_type=Path), default="tlstunnel.toml")
def check(file: Path) -> None:
    """Check FILE, its policy, and the certificates, lists and edge workers that it names.

    FILE is tlstunnel.toml where it is left out. Nothing is started; no address is looked up or listened on. The modules
    of edge workers are executed, as a start would.
    """
    config = load(file)
    problems = 0
    for index, site in enumerate(config.sites):
        try:
            warning = _load_certificate(site)
        except CertificateError as error:
            problems += 1
            click.echo(f"tlstunnel: {file}: sites[{index}]: {error}", err=True)
        else:
            if warning:
                click.echo(f"tlstunnel: {file}: sites[{index}]: warning: {warning}", err=True)
    try:
        # Only here, for the same reason as the certificates.
        from tlstunnel.firewall.verdict import Firewall  # noqa: PLC0415

        Firewall(config)
    except ConfigurationError as error:
        problems += 1
        click.echo(f"tlstunnel: {file}: {error}", err=True)
    try:
        _load_workers(config)
    except ConfigurationError as error:
        problems += 1
        click.echo(f"tlstunnel: {file}: {error}", err=True)
    if problems:
        raise SystemExit(1)
    for index, site in enumerate(config.sites):
        if site.web_origins is None:
            click.echo(f"tlstunnel: {file}: sites[{index}]: warning: {OPEN_TO_ALL}", err=True)
        if site.origin_verify == "off":
            click.echo(f"tlstunnel: {file}: sites[{index}]: warning: {UNVERIFIED}", err=True)
    for line in _summary(config):
        click.echo(line)


@command.command()
@click.argument("file", type=click.Path(path_type=Path), default="tlstunnel.toml")
def show(file: Path) -> None:
    """Print what FILE amounts to, as TOML: every key with its value, defaults too.

    Paths are absolute. Fields for origins whose names look like secrets are hidden.
    """
    for line in render_toml(load(file)):
        click.echo(line)


@command.command()
def schema() -> None:
    """Print the JSON Schema of a configuration file, by which editors complete and check it."""
    click.echo(json.dumps(render_schema(), indent=2))


def _load_certificate(site: SiteConfig) -> str | None:
    """Load the site's pair as the server would, and give what is to be said about its dates, if anything."""
    if not (site.cert and site.key):
        return None
    # Only here: it brings OpenSSL and cryptography, which a file without certificates does not need.
    from tlstunnel.certificates.serving import expiry_warning, server_context  # noqa: PLC0415

    server_context(site.cert, site.key)
    return expiry_warning(site.cert, datetime.now(UTC))


def _load_workers(config: Config) -> None:
    """Load the code of edge workers, as a start would; none is set up. Raises ConfigurationError."""
    if any(site.worker for site in config.sites):
        from tlstunnel.edge.workers import Workers  # noqa: PLC0415 - as above
        from tlstunnel.metrics.registry import Registry  # noqa: PLC0415 - as above

        Workers(config.sites, Registry())


def _summary(config: Config) -> Iterator[str]:
    yield f"listen    {', '.join(map(str, config.listen)) or 'what start is told, or its default'}"
    for site in config.sites:
        yield f"site      {_described(site)}"
    if not config.sites:
        yield "site      none here: any name, to the origin that start is told, or its echo"
    times = {name: getattr(config.timeouts, name) for name in config.timeouts.__struct_fields__}
    yield f"timeouts  {', '.join(f'{name} {_time(time)}' for name, time in times.items())}"
    yield "ok"


def _described(site: SiteConfig) -> str:
    default = " (default)" if site.default else ""
    certificate = f", certificate {site.cert}" if site.cert else ""
    worker = f", worker {site.worker}" if site.worker else ""
    return f"{', '.join(site.names)}{default} -> {_origins(site.origins)}{certificate}{worker}"


def _origins(origins: tuple[OriginConfig, ...]) -> str:
    return ", ".join(f"{origin.address}{' (backup)' if origin.backup else ''}" for origin in origins)


def _time(time: Duration | None) -> str:
    return "off" if time is None else str(time)
