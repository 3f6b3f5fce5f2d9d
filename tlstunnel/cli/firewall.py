"""``tlstunnel firewall``: shows what the firewall decides about a request, without sending it."""

import asyncio
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import click

from tlstunnel.cli.examples import render_examples
from tlstunnel.cli.request import build_request_head, find_site, refuse_invalid_address, request_options
from tlstunnel.config import SiteConfig
from tlstunnel.errors import ConfigurationError
from tlstunnel.escaping import printable
from tlstunnel.firewall.facts import normalise_path
from tlstunnel.firewall.managed.categories import name_category
from tlstunnel.firewall.managed.messages import Match
from tlstunnel.firewall.rate_limits import LimitTrace
from tlstunnel.firewall.rules import RuleTrace
from tlstunnel.firewall.verdict import CheckTrace, Verdict
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import Request, RequestReader, UpgradeRequest
from tlstunnel.journal.events import Reason
from tlstunnel.journal.logger import structlog
from tlstunnel.serving.loading import Description, load_firewall

CHECKS = (
    "target",
    "addresses of all sites",
    "addresses of the site",
    "web origin",
    "rules",
    "rate limits",
    "managed rules",
)


@click.group(short_help="Test the firewall's policy.")
def command() -> None:
    """Test the firewall's policy."""


@command.command(
    short_help="Show what the firewall decides about a request.",
    epilog=render_examples("tlstunnel firewall explain 'GET /admin' --ip 198.51.100.7"),
)
@request_options
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    default="tlstunnel.toml",
    show_default=True,
    help="The configuration file.",
)
@click.option("--ja4", default="", help="The JA4 fingerprint of the client's TLS, as in the log.")
@click.option("--tls-version", default="TLSv1.3", show_default=True, help="The version of TLS, as in the log.")
@click.option("--plain", is_flag=True, help='Make it a plain request, for a site with http = "pass".')
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def explain(  # noqa: PLR0913 - the command's options
    *,
    request: str,
    headers: tuple[str, ...],
    ip: str,
    file: Path,
    ja4: str,
    tls_version: str,
    plain: bool,
    as_json: bool,
) -> None:
    """Show what each check and rule of the firewall decides about a request, the verdict, and where it would go.

    The Host field chooses the site; without it, the first site is used. The fields of every WebSocket handshake
    (Upgrade, Sec-WebSocket-Key, ...) are added. Counters start at zero, and no origin is connected to.
    """
    description = Description.from_file(file)
    if not description.sites:
        raise ConfigurationError(f"{file}: there are no [[sites]], so there is no policy to explain")
    refuse_invalid_address(ip)
    # The output contains everything that would be logged about this request.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    trace: list[CheckTrace] = []
    connection = Connection(ip=ip, tls_version=tls_version, tls_ja4=ja4)
    head = build_request_head(request, headers, description.sites[0], plain=plain)
    destination, verdict = asyncio.run(_check(description, head, connection, trace))
    if as_json:
        click.echo(json.dumps(_to_json(destination, verdict, trace), default=_encode, ensure_ascii=True))
    else:
        for line in _render(destination, verdict, trace):
            click.echo(line)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a request would go: its site, "" without one; the path of the route, "" without one; the origins.

    `worker` is the edge worker that can choose another origin, "" without one.
    """

    site: str = ""
    route: str = ""
    origins: tuple[str, ...] = ()
    worker: str = ""


def _find_destination(site: SiteConfig, request: Request) -> Destination:
    path = normalise_path(request.target.partition(b"?")[0])
    route = next((route for route in site.routes if path.startswith(route.path)), None)
    origins = tuple(printable(origin.address.text) for origin in (site.origins if route is None else route.origins))
    worker = str(site.worker) if site.worker is not None and isinstance(request, UpgradeRequest) else ""
    return Destination(site.names[0], "" if route is None else route.path, origins, worker)


async def _check(
    description: Description, head: bytes, connection: Connection, trace: list[CheckTrace]
) -> tuple[Destination, Verdict]:
    """Return where the request would go, and the verdict. Raises ConfigurationError."""
    try:
        request = RequestReader(True).feed(head)
        assert request is not None  # the head is complete
        site = find_site(description.sites, request)
        if site is None:
            return Destination(), Verdict(Refusal(421, Reason.MISDIRECTED, "the Host field does not name a site"))
        if site.http == "refuse":
            RequestReader().feed(head)
    except Refusal as refusal:
        return Destination(), Verdict(refusal)
    firewall = load_firewall(description)
    await firewall.start()
    try:
        connection = dataclasses.replace(connection, tls_sni=request.host, site=site.names[0])
        verdict = await firewall.check(request, connection, trace, behind_proxy=True)
    finally:
        await firewall.close()
    return _find_destination(site, request), verdict


def _render(destination: Destination, verdict: Verdict, trace: Sequence[CheckTrace]) -> Iterator[str]:
    if destination.site:
        yield f"{'site':<24}{destination.site}"
    reached = {check.name: check for check in trace}
    for name in CHECKS if destination.site else ():
        check = reached.get(name)
        after = any(CHECKS.index(later) > CHECKS.index(name) for later in reached)
        skipped = "nothing to check" if after or not verdict.refusal else "not reached"
        yield f"{name:<24}{check.result if check else skipped}"
        for entry in check.entries if check else ():
            yield f"  {_render_entry(entry)}"
    for name in verdict.logged:
        yield f"{'would refuse':<24}{name} (in mode log)"
    refusal = verdict.refusal
    if refusal is None:
        yield f"{'verdict':<24}pass"
        if destination.route:
            yield f"{'route':<24}{printable(destination.route)}"
        yield f"{'origins':<24}{', '.join(destination.origins)}"
        if destination.worker:
            yield f"{'worker':<24}{printable(destination.worker)}, which may choose another origin, or refuse"
        return
    phrase = HTTPStatus(refusal.status).phrase
    yield f"{'verdict':<24}{refusal.status} {phrase}: {printable(refusal.reason)}"
    yield f"{'':<24}{printable(refusal.detail or refusal.text)}"


def _render_entry(entry: object) -> str:
    if isinstance(entry, RuleTrace):
        values = ", ".join(f"{name}={printable(repr(value))[:200]}" for name, value in entry.values.items())
        mode = ", only logged" if entry.mode == "log" else ""
        error = f": {entry.error}" if entry.error else ""
        return f"{entry.rule}: {entry.result}{error} ({entry.action}{mode}){f'; {values}' if values else ''}"
    if isinstance(entry, LimitTrace):
        key = ", ".join(f"{name}={printable(value)[:200]}" for name, value in entry.key)
        return f"{entry.limit}: {entry.result}{' (only logged)' if entry.mode == 'log' else ''}; {key}"
    if isinstance(entry, Match):
        return f"{entry.id} {name_category(entry.id)}: {printable(entry.message)}"
    return printable(str(entry))


def _to_json(destination: Destination, verdict: Verdict, trace: Sequence[CheckTrace]) -> dict[str, Any]:
    refusal = verdict.refusal
    return {
        **asdict(destination),
        "checks": [{"name": check.name, "result": check.result, "entries": list(check.entries)} for check in trace],
        "verdict": "pass" if refusal is None else "refused",
        **({} if refusal is None else {"status": refusal.status, "reason": refusal.reason, "detail": refusal.detail}),
        **verdict.to_record(),
    }


def _encode(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "__struct_fields__"):
        return {name: getattr(value, name) for name in value.__struct_fields__}
    if isinstance(value, datetime):
        return value.isoformat()
    return dict(value) if isinstance(value, Mapping) else str(value)
