"""``tlstunnel start``: serve until told to end."""

import asyncio
import contextlib
import errno
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import click
import structlog

from tlstunnel import __version__
from tlstunnel.addresses import ListenAddress, OriginAddress
from tlstunnel.certificates import issue
from tlstunnel.certificates.serving import expiry_warning
from tlstunnel.config import Config, SiteConfig, load
from tlstunnel.errors import ConfigurationError, ListenError
from tlstunnel.firewall.verdict import Firewall
from tlstunnel.listeners import Listener, listen
from tlstunnel.origins.embedded import EchoOrigin
from tlstunnel.readiness import new_loop
from tlstunnel.record import Journal, configure_logging
from tlstunnel.server import Server
from tlstunnel.sites import Sites, load_sites

PORT = 8443
LOOPBACK = (ListenAddress("127.0.0.1", PORT), ListenAddress("::1", PORT))
EVERYWHERE = (ListenAddress("0.0.0.0", PORT), ListenAddress("::", PORT))  # noqa: S104 - with a certificate of its own
CERTIFICATES = Path("certs")

SIGINT_SECONDS = 5.0
"""Over how long SIGINT spreads the closings: someone waits at a terminal."""


@click.command()
@click.argument("origin", required=False, metavar="[ORIGIN]")
@click.option("--listen", "listen_texts", multiple=True, metavar="HOST:PORT", help="Where to listen; may be repeated.")
@click.option("--cert", type=click.Path(path_type=Path), help="Certificate and chain, PEM.")
@click.option("--key", type=click.Path(path_type=Path), help="Its private key, PEM.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="Configuration file, TOML.")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="How to log; text unless the file says json.")
def command(  # noqa: PLR0913 - the command's options
    *,
    origin: str | None,
    listen_texts: tuple[str, ...],
    cert: Path | None,
    key: Path | None,
    config_file: Path | None,
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
    listen_addresses = _parsed(listen_texts) or config.listen
    configure_logging(log_format or config.log.format)
    with contextlib.ExitStack() as stack:
        configured = config.sites or (_site(origin, cert, key, stack),)
        journal = Journal(opened=config.log.opened)
        with _told_of(config_file):
            firewall = Firewall(config, configured, counted=journal.counters)
        sites, tested = _load(configured)
        listeners = _listeners(listen_addresses, tested=tested)
        for listener in listeners:
            stack.callback(listener.close)
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(_serve(config, sites, firewall, listeners, journal))


@contextlib.contextmanager
def _told_of(file: Path | None) -> Iterator[None]:
    """Name `file` in what is wrong with the policy, as `load` names it in all else."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{file}: {error}") from None


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
    return SiteConfig(origins=(address,), cert=cert, key=key)


def _load(configured: tuple[SiteConfig, ...]) -> tuple[Sites, bool]:
    """The sites, and whether one of them has the test certificate. Raises CertificateError."""
    log = structlog.get_logger()
    test_pair = None
    if any(site.cert is None for site in configured):
        test = issue.ensure(CERTIFICATES)
        log.info("test certificate", cert=str(test.cert), ca=str(test.ca), hint="clients trust it with this CA")
        test_pair = test.cert, test.key
    sites = load_sites(configured, test_pair)
    for site in configured:
        cert = site.cert or (test_pair and test_pair[0])
        if cert and (warning := expiry_warning(cert, datetime.now(UTC))):
            log.warning("certificate", reason=warning)
    return sites, test_pair is not None


def _listeners(addresses: tuple[ListenAddress, ...], *, tested: bool) -> list[Listener]:
    """Open the listeners, all or none. Raises ListenError."""
    listeners: list[Listener] = []
    defaults = LOOPBACK if tested else EVERYWHERE
    try:
        for address in addresses or defaults:
            try:
                listeners.append(listen(address))
            except ListenError as error:
                # Nobody asked for IPv6 by name: a machine without it is served without it.
                if addresses or address is not defaults[1] or not _no_such_family(error):
                    raise
                structlog.get_logger().warning("no IPv6 here", reason=str(error))
    except ListenError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _no_such_family(error: ListenError) -> bool:
    cause = error.__context__
    return isinstance(cause, OSError) and cause.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


async def _serve(config: Config, sites: Sites, firewall: Firewall, listeners: list[Listener], journal: Journal) -> None:
    log = structlog.get_logger()
    await firewall.start()
    server = Server(config, sites, firewall, listeners, journal)
    told: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.put_nowait, number)
    server.start()
    for listener in listeners:
        log.info("listening", address=str(listener.address))
    log.info("ready", version=__version__)
    number = await told.get()
    log.info("ending", signal=number.name)
    wait, over = (config.release.drain_wait, config.release.drain_over)
    drain = loop.create_task(server.drain(0, SIGINT_SECONDS) if number == signal.SIGINT else server.drain(wait, over))
    again = loop.create_task(told.get())
    await asyncio.wait((drain, again), return_when=asyncio.FIRST_COMPLETED)
    for task in (drain, again):
        task.cancel()
    await server.close()
    await firewall.close()
    log.info("stopped")
