"""``tlstunnel start``: starts the tunnel and serves until it is stopped.

Tested by tests/e2e/test_start_errors.py.
"""

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Literal

import click

from tlstunnel import __version__
from tlstunnel.addresses import ListenAddress, OriginAddress
from tlstunnel.cli.control import FOLDERS
from tlstunnel.cli.examples import render_examples
from tlstunnel.config import Config, read
from tlstunnel.config.admin import DEFAULT_LISTEN
from tlstunnel.config.document import DEFAULT_FILE
from tlstunnel.config.invocation import (
    EVERYWHERE,
    LOOPBACK,
    Invocation,
    addresses_to_listen_on,
    sites_to_serve,
    uses_test_certificate,
)
from tlstunnel.errors import ConfigurationError, ListenError
from tlstunnel.journal.events import Event
from tlstunnel.journal.lines import configure_logging
from tlstunnel.journal.log_file import open_log
from tlstunnel.journal.logger import structlog
from tlstunnel.origins.embedded import EchoOrigin
from tlstunnel.processes.children import Startup, try_child
from tlstunnel.processes.fleet import Options
from tlstunnel.processes.handover import Handover
from tlstunnel.processes.parent import Parent
from tlstunnel.processes.slots import Slots, take_passed_sockets
from tlstunnel.program import find_folder, forbid_core_dumps, set_process_name

OPTIONAL = (LOOPBACK[1], EVERYWHERE[1])
"""Addresses that are left out on a machine without IPv6."""


class _Processes(click.ParamType[int | Literal["auto"]]):
    name = "N|auto"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["auto"]:
        if value == "auto":
            return "auto"
        if str(value).isdecimal() and 1 <= int(str(value)) <= 256:
            return int(str(value))
        self.fail(f"{value!r} is neither auto nor a number from 1 to 256", param, ctx)


@click.command(
    short_help="Start the tunnel in front of an origin.",
    epilog=render_examples(
        "tlstunnel start localhost:3000 --cert chain.pem --key key.pem",
        "tlstunnel start --config /etc/tlstunnel/tlstunnel.toml",
        "tlstunnel start localhost:3000 --admin",
    ),
)
@click.argument("origin", required=False, metavar="[ORIGIN]")
@click.option(
    "--listen",
    "listen_texts",
    multiple=True,
    metavar="HOST:PORT",
    help="Listen at this address; may be repeated.  [default: those of the file, else 0.0.0.0:8443 and [::]:8443, or"
    " 127.0.0.1:8443 and [::1]:8443 with a test certificate]",
)
@click.option("--cert", type=click.Path(path_type=Path), help="Certificate and its chain, PEM.")
@click.option("--key", type=click.Path(path_type=Path), help="Its private key, PEM.")
@click.option(
    "--http",
    type=click.Choice(["pass", "refuse"]),
    help="Forward plain HTTP requests, such as for pages, to ORIGIN, or refuse them.  [default: pass; refuse with"
    " --config and for the echo origin]",
)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="Configuration file, TOML.")
@click.option(
    "--control",
    type=click.Path(path_type=Path),
    help=f"The control socket.  [default: control-PORT.sock in {FOLDERS}]",
)
@click.option(
    "--admin",
    "admin_text",
    is_flag=False,
    flag_value=str(DEFAULT_LISTEN),
    metavar="[ADDRESS]",
    help="Serve the dashboard, the API and metrics at HOST:PORT or unix:/PATH.  [default: the file's address; without"
    f" a value: {DEFAULT_LISTEN}]",
)
@click.option(
    "--processes",
    type=_Processes(),
    metavar="N|auto",
    help="The number of serving processes, instead of the file's; the default is 1.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    help="The format of the log, instead of the file's; the default is text.",
)
def command(  # noqa: PLR0913 - the command's options
    *,
    origin: str | None,
    listen_texts: tuple[str, ...],
    cert: Path | None,
    key: Path | None,
    http: Literal["pass", "refuse"] | None,
    config_file: Path | None,
    control: Path | None,
    admin_text: str | None,
    processes: int | Literal["auto"] | None,
    log_format: Literal["text", "json"] | None,
) -> None:
    """Start the tunnel in front of ORIGIN: host:port, ws://host:port or unix:/path.

    Without ORIGIN and --config, it uses the file tlstunnel.toml in the current folder, or an echo origin if there is
    none. Without --cert, it creates and uses a test certificate for localhost in certs/, and listens on loopback only.
    """
    handed = Handover.receive()
    set_process_name("tlstunnel")
    forbid_core_dumps()
    found = config_file is None and _uses_default_file(origin or cert or key or http, handed)
    if found:
        config_file = DEFAULT_FILE
    text = handed.config if handed is not None else read(config_file, trusted_only=found) if config_file else None
    listen = _parse_addresses(listen_texts, "--listen")
    admin = next(iter(_parse_addresses((admin_text,), "--admin")), None) if admin_text is not None else None
    folder = find_folder()
    config = Invocation(config_file, folder=folder, admin=admin).configuration(text)
    if config.sites and (origin or cert or key or http):
        raise click.UsageError(f"{config_file} has [[sites]], so ORIGIN, --cert, --key and --http must be set there")
    if bool(cert) != bool(key):
        raise click.UsageError("--cert and --key must be given together")
    if origin is not None:
        _refuse_invalid_origin(origin, folder)
    style = log_format or config.log.format
    _try_log_file(config.log.file)
    configure_logging(style, config.log.file)
    if found and handed is None:
        hint = "it is in this folder; give an ORIGIN to start without it"
        structlog.get_logger().info(Event.CONFIGURATION_FILE, file=str(DEFAULT_FILE.absolute()), hint=hint)
    if handed is not None and handed.probe is not None:
        echo_port = handed.echo.port if handed.echo else None
        invocation = Invocation(config_file, origin, echo_port, cert, key, listen, http, folder, admin)
        _ensure_test_certificate(invocation, config, log=False)
        given = tuple(map(ListenAddress.parse, handed.slots.passed))
        Slots.try_to_open(addresses_to_listen_on(invocation, config, given), handed.slots, OPTIONAL)
        asyncio.run(try_child(Startup(invocation, text, config, style)))
        os.write(handed.probe, __version__.encode())
        return
    with contextlib.ExitStack() as stack:
        echo = None if config.sites or origin is not None else _start_echo(handed, stack)
        echo_port = echo.port if echo else None
        invocation = Invocation(config_file, origin, echo_port, cert, key, listen, http, folder, admin)
        _ensure_test_certificate(invocation, config, log=handed is None)
        startup = Startup(invocation, text, config, style)
        options = Options(control, processes)
        slots = _open_slots(handed, startup, options)
        stack.callback(slots.close)
        asyncio.run(_run(startup, slots, options, echo, handed))


def _try_log_file(path: Path | None) -> None:
    """Raises ConfigurationError if the log cannot be written there."""
    if path is not None:
        try:
            os.close(open_log(path))
        except OSError as error:
            raise ConfigurationError(f"log.file: {path}: cannot be opened: {error.strerror}") from None


def _uses_default_file(given: object, handed: Handover | None) -> bool:
    """Return whether the file in the current folder is used. `given` is what the command line says about the site."""
    if given:
        return False
    # An upgrade goes on with what was started, even if a file has appeared since.
    return handed.config is not None if handed is not None else os.path.lexists(DEFAULT_FILE)


async def _run(
    startup: Startup, slots: Slots, options: Options, echo: EchoOrigin | None, before: Handover | None
) -> None:
    await Parent(startup, slots, options, echo, before).run()


def _open_slots(handed: Handover | None, startup: Startup, options: Options) -> Slots:
    if handed is None:
        slots = Slots(take_passed_sockets())
        addresses = addresses_to_listen_on(startup.invocation, startup.config, slots.passed)
        slots.update(slots.open(addresses, options.count(startup.config), OPTIONAL), addresses)
        return slots
    slots = Slots.restore(handed.slots)
    addresses = addresses_to_listen_on(startup.invocation, startup.config, slots.passed)
    try:
        gone = slots.update(slots.open(addresses, 1, OPTIONAL), addresses)
    except ListenError as error:
        # The probe could open them, but another program has taken one since. Exiting would end the open tunnels.
        structlog.get_logger().error(Event.UPGRADE_LISTENERS_KEPT, reason=str(error))
        return slots
    for slot in gone:
        slot.listener.remove()
    return slots


def _parse_addresses(texts: tuple[str, ...], option: str) -> tuple[ListenAddress, ...]:
    try:
        return tuple(ListenAddress.parse(text) for text in texts)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from None


def _refuse_invalid_origin(origin: str, folder: Path) -> None:
    try:
        OriginAddress.parse(origin, folder)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="ORIGIN") from None


def _start_echo(handed: Handover | None, stack: contextlib.ExitStack) -> EchoOrigin:
    if handed is not None and handed.echo is not None:
        return stack.enter_context(contextlib.closing(EchoOrigin.restore(handed.echo)))
    echo = stack.enter_context(contextlib.closing(EchoOrigin.start()))
    structlog.get_logger().info(Event.ECHO_ORIGIN, address=f"127.0.0.1:{echo.port}")
    return echo


def _ensure_test_certificate(invocation: Invocation, config: Config, *, log: bool) -> None:
    """Create the test certificate if a site uses it. The parent does this, or each child would create its own."""
    if not uses_test_certificate(sites_to_serve(invocation, config)):
        return
    # Imported here, because the parent otherwise does not need cryptography, which takes memory.
    from tlstunnel.certificates import CERTIFICATES, issue  # noqa: PLC0415

    test = issue.ensure(CERTIFICATES)
    if log:
        hint = "clients that trust this CA accept it"
        structlog.get_logger().info(Event.TEST_CERTIFICATE, cert=str(test.cert), ca=str(test.ca), hint=hint)
