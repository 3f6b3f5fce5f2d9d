"""``tlstunnel usage notices``, and what an operator does about a site: ack, mute, throttle, release.

Notices are read from the state folder. What changes something is done by the running tunnel.

Tested by tests/unit/test_cli_usage.py and tests/e2e/test_usage.py.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import msgspec

from tlstunnel.cli.control import control_options
from tlstunnel.cli.examples import render_examples
from tlstunnel.cli.usage.gather import config_option, find_source, gather, read_notices, render_time
from tlstunnel.cli.usage.period import parse_period
from tlstunnel.cli.usage.text import describe_throttle
from tlstunnel.commands.command import AnyCommand
from tlstunnel.commands.usage import (
    AckNotice,
    Acknowledged,
    Muted,
    MuteSite,
    Released,
    ReleaseSite,
    Throttled,
    ThrottleSite,
)
from tlstunnel.config.durations import Duration, Timeout
from tlstunnel.errors import ControlError
from tlstunnel.escaping import printable
from tlstunnel.plans.notice_file import DeliveryRecord, NoticeRecord, State
from tlstunnel.processes.reach import find_control_socket, send_command

_RECIPIENTS = {"contact": "the site's contact", "operator": "the operator"}


@click.command(
    "notices",
    short_help="List notices and their deliveries.",
    epilog=render_examples("tlstunnel usage notices", "tlstunnel usage notices chat.example.com --json"),
)
@click.argument("site", default="", metavar="[SITE]")
@config_option
@control_options
def list_notices(*, site: str, file: Path | None, control: Path | None, as_json: bool) -> None:
    """List the latest notices, of all sites or of one: what they are about, and what became of each delivery."""
    source = find_source(control, file)
    records = read_notices(source.folder, site or None)
    if site and not records:
        gather(source, parse_period("1d", None, source.result.now)).find(site)
    if as_json:
        click.echo(json.dumps({"notices": [to_json(record) for record in records]}))
        return
    for record in records:
        for line in render_notice(record, with_site=True):
            click.echo(line)
    if not records:
        click.echo("no notices")


@click.command(
    "ack",
    short_help="Say that a notice was read.",
    epilog=render_examples("tlstunnel usage ack notice-6f1d2c3b4a5e6978"),
)
@click.argument("notice", metavar="ID")
@control_options
def acknowledge(*, notice: str, control: Path | None, as_json: bool) -> None:
    """Say that a notice was read. No further one is sent about its standing, until the site has been calm for a day."""
    response = send(AckNotice(notice), control, as_json=as_json)
    if response is not None:
        found = msgspec.convert(response, Acknowledged)
        click.echo(f"{printable(found.id)} is acknowledged: no further notice about it while it lasts")


@click.command(
    "mute",
    short_help="Send no notices about a site for a time.",
    epilog=render_examples("tlstunnel usage mute chat.example.com --for 30d"),
)
@click.argument("site")
@click.option("--for", "duration", required=True, metavar="TIME", help="How long, such as 30d; 0s ends it.")
@control_options
def mute(*, site: str, duration: str, control: Path | None, as_json: bool) -> None:
    """Send no notices about a site for a time. Its usage is measured as before."""
    response = send(MuteSite(site, float(_parse(Duration, duration))), control, as_json=as_json)
    if response is not None:
        muted = msgspec.convert(response, Muted)
        until = f"no notices until {render_time(muted.until)}" if muted.until > muted.since else ""
        click.echo(f"{printable(muted.site)}: {until or 'notices are sent again'}")


@click.command(
    "throttle",
    short_help="Answer a site's new handshakes above a rate with 429.",
    epilog=render_examples(
        "tlstunnel usage throttle chat.example.com 10/second --for 1h --why loops",
        "tlstunnel usage throttle a.example 5/second --for 15m --why flood --abuse",
    ),
)
@click.argument("site")
@click.argument("rate")
@click.option("--for", "duration", required=True, metavar="TIME", help="How long, such as 1h. It ends by itself.")
@click.option("--why", required=True, help="The reason, which is kept with who asked for it.")
@click.option("--abuse", is_flag=True, help="It is against an attack, so the owner need not have been contacted.")
@click.option(
    "--address", "addresses", multiple=True, metavar="IP", help="Only for this address or network; may be repeated."
)
@control_options
def throttle(  # noqa: PLR0913 - the command's options
    *,
    site: str,
    rate: str,
    duration: str,
    why: str,
    abuse: bool,
    addresses: tuple[str, ...],
    control: Path | None,
    as_json: bool,
) -> None:
    """Answer new handshakes of a site above a rate with 429, for a time. Open tunnels are not touched.

    RATE is written as in rate limits: 10/second. Without --abuse, it is refused unless a notice to the site's contact
    was delivered: talk first.
    """
    seconds = float(_parse(Timeout, duration))
    command = ThrottleSite(site=site, rate=rate, seconds=seconds, why=why, abuse=abuse, addresses=addresses)
    response = send(command, control, as_json=as_json)
    if response is not None:
        throttled = msgspec.convert(response, Throttled)
        click.echo(f"{printable(throttled.site)} is {describe_throttle(throttled)}")


@click.command(
    "release",
    short_help="Lift the throttles of a site.",
    epilog=render_examples("tlstunnel usage release chat.example.com"),
)
@click.argument("site")
@control_options
def release(*, site: str, control: Path | None, as_json: bool) -> None:
    """Lift all throttles of a site now."""
    response = send(ReleaseSite(site), control, as_json=as_json)
    if response is not None:
        released = msgspec.convert(response, Released)
        what = {0: "was not throttled", 1: "is not throttled any more"}
        click.echo(f"{printable(released.site)} {what[min(released.throttles, 1)]}")


def send(command: AnyCommand, control: Path | None, *, as_json: bool) -> Mapping[str, Any] | None:
    """Have the running tunnel carry out a command. Return the response, or print it as JSON and return None.

    Raises ControlError.
    """
    try:
        if control is None:
            control = find_control_socket()
        response = send_command(control, {"do": command.name, **msgspec.to_builtins(command)})
    except ControlError as error:
        if as_json:
            click.echo(json.dumps({"ok": False, "error": str(error)}))
        raise
    if as_json:
        click.echo(json.dumps(response))
        return None
    return response


def _parse(kind: type[Duration], text: str) -> Duration:
    try:
        return kind.parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--for") from None


def render_notice(record: NoticeRecord, *, with_site: bool) -> Iterator[str]:
    """Return the lines about a notice, with and without the name of its site."""
    notice = record.notice
    site = f"{printable(notice.site)}  " if with_site else ""
    yield click.style(
        f"{printable(notice.id)}  {render_time(notice.created)}  {site}{notice.standing}, to"
        f" {_RECIPIENTS[notice.recipient]}",
        bold=True,
    )
    yield f"  {printable(notice.assessment.sentence)}"
    for delivery in record.deliveries:
        yield f"  {_describe_delivery(delivery)}"
    if record.acknowledged is not None:
        yield f"  acknowledged {render_time(record.acknowledged)} by {printable(record.acknowledged_by)}"


def _describe_delivery(delivery: DeliveryRecord) -> str:
    where = f"{delivery.target.channel}{_shorten_address(delivery.target.address)}: {delivery.state}"
    reason = f" ({printable(delivery.reason)})" if delivery.reason and delivery.state is not State.ACCEPTED else ""
    if delivery.state is not State.PENDING:
        when = f" {render_time(delivery.attempted)}" if delivery.attempted is not None else ""
        return f"{where}{when}{reason}"
    again = f", again {render_time(delivery.next_at)}" if delivery.next_at and delivery.attempts else ""
    attempts = "1 attempt" if delivery.attempts == 1 else f"{delivery.attempts} attempts"
    return f"{where} after {attempts}{again}{reason}"


def _shorten_address(address: str) -> str:
    """Return where a notice goes, without what may be a secret in the URL of a webhook."""
    if "://" in address:
        address = urlsplit(address).hostname or "?"
    return f" to {printable(address)}" if address else ""


def to_json(record: NoticeRecord) -> dict[str, Any]:
    """Return a notice for programs."""
    notice = record.notice
    return {
        "id": notice.id,
        "site": notice.site,
        "standing": notice.standing,
        "created": notice.created,
        "recipient": notice.recipient,
        "sentence": notice.assessment.sentence,
        "figures": msgspec.to_builtins(notice.assessment.figures),
        "accepted": record.accepted,
        "acknowledged": record.acknowledged,
        "acknowledged_by": record.acknowledged_by,
        "deliveries": [
            {
                "channel": delivery.target.channel,
                "to": _shorten_address(delivery.target.address).removeprefix(" to "),
                "state": delivery.state,
                "attempts": delivery.attempts,
                "attempted": delivery.attempted,
                "next_at": delivery.next_at,
                "reason": delivery.reason,
            }
            for delivery in record.deliveries
        ],
    }
