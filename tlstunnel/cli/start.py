"""``tlstunnel start``: serve until told to end."""

import asyncio
import contextlib
from pathlib import Path
from typing import Literal

import click
import structlog

from tlstunnel.addresses import ListenAddress, OriginAddress
from tlstunnel.certificates import issue
from tlstunnel.config import Config, OriginConfig, SiteConfig, load
from tlstunnel.origins.embedded import EchoOrigin
from tlstunnel.readiness import new_loop
from tlstunnel.record import Journal, configure_logging
from tlstunnel.service import CERTIFICATES, Listeners, Loaded, Service, Wanted
from tlstunnel.service import load as load_all


@click.command()
@click.argument("origin", required=False, metavar="[ORIGIN]")
@click.option("--listen", "listen_texts", multiple=True, metavar="HOST:PORT", help="Where to listen; may be repeated.")
@click.option("--cert", type=click.Path(path_type=Path), help="Certificate and chain, PEM.")
@click.option("--key", type=click.Path(path_type=Path), help="Its private key, PEM.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="Configuration file, TOML.")
@click.option("--control", type=click.Path(path_type=Path), help="Where the control socket is.")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="How to log; text unless the file says json.")
def command(  # noqa: PLR0913 - the command's options
    *,
    origin: str | None,
    listen_texts: tuple[str, ...],
    cert: Path | None,
    key: Path | None,
    config_file: Path | None,
    control: Path | None,
    log_format: Literal["text", "json"] | None,
) -> None:
    """Start the tunnel in front of ORIGIN: host:port, ws://host:port or unix:/path.

    Without ORIGIN it tunnels to an echo origin of its own; without --cert it makes and uses a test certificate for
    localhost in certs/, and listens on this machine only.
    """
    config = load(config_file) if config_file else Config()
    if config.sites and (origin or cert or key):
        raise click.UsageError(f"{config_file} has [[sites]]: ORIGIN, --cert and --key belong there")
    if bool(cert) != bool(key):
        raise click.UsageError("--cert and --key go together")
    configure_logging(log_format or config.log.format)
    with contextlib.ExitStack() as stack:
        wanted = Wanted(
            file=config_file,
            site=None if config.sites else _site(origin, cert, key, stack),
            listen=_parsed(listen_texts),
            control=control,
        )
        if any(not site.pairs for site in (config.sites or [wanted.site]) if site):
            test = issue.ensure(CERTIFICATES)
            hint = "clients trust it with this CA"
            structlog.get_logger().info("test certificate", cert=str(test.cert), ca=str(test.ca), hint=hint)
        journal = Journal(opened=config.log.opened)
        loaded = load_all(wanted, config, journal.counters)
        listeners = Listeners()
        stack.callback(listeners.close)
        listeners.settle(listeners.open(loaded.listen), loaded.listen)
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(_serve(wanted, loaded, listeners, journal))


async def _serve(wanted: Wanted, loaded: Loaded, listeners: Listeners, journal: Journal) -> None:
    await Service(wanted, loaded, listeners, journal).run()


def _parsed(texts: tuple[str, ...]) -> tuple[ListenAddress, ...]:
    try:
        return tuple(ListenAddress.parse(text) for text in texts)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--listen") from None


def _site(origin: str | None, cert: Path | None, key: Path | None, stack: contextlib.ExitStack) -> SiteConfig:
    if origin is None:
        echo = stack.enter_context(contextlib.closing(EchoOrigin()))
        structlog.get_logger().info("embedded echo origin", address=f"127.0.0.1:{echo.port}")
        address = OriginAddress("127.0.0.1", echo.port, text="echo")
    else:
        try:
            address = OriginAddress.parse(origin, Path.cwd())
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="ORIGIN") from None
    return SiteConfig(origins=(OriginConfig(address=address),), cert=cert, key=key)
