"""``tlstunnel edge``: shows what an edge worker does with a request, without a client and an origin.

Tested by tests/e2e/test_edge_run.py.
"""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import click
import msgspec

from tlstunnel.addresses import OriginAddress
from tlstunnel.cli.examples import render_examples
from tlstunnel.cli.request import build_request_head, find_site, refuse_invalid_address, request_options
from tlstunnel.config import Config, OriginConfig, SiteConfig, WorkerTable, parse_worker_reference
from tlstunnel.edge.stage import Directions
from tlstunnel.errors import ConfigurationError
from tlstunnel.escaping import printable
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.forwarding import Forwarding, render_forwarded_head
from tlstunnel.handshake.refusal import Refusal, render_refusal
from tlstunnel.handshake.request import RequestReader, UpgradeRequest
from tlstunnel.journal.lines import configure_logging
from tlstunnel.serving.loading import Description, load_workers
from tlstunnel.serving.sites import build_edits, build_pool
from tlstunnel.sockets.channel import Channel
from tlstunnel.sockets.deadlines import Deadlines, Wakeup
from tlstunnel.sockets.readiness import TunnelLoop, readiness

ANYWHERE = ("0.0.0.0/0", "::/0")
"""Where a worker may send requests if no configuration limits it."""

REQUEST_ID = "0123456789abcdef"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker did, in a word; how long it took, in seconds; and what the origin or the client would receive.

    `until` is the Unix time at which the tunnel would end. `tags` are each "name=value".
    """

    result: str
    seconds: float
    origin: str = ""
    head: bytes = b""
    until: float | None = None
    tags: tuple[str, ...] = ()
    refusal: Refusal | None = None

    @property
    def failed(self) -> bool:
        """Whether the worker failed."""
        return self.result not in ("forwarded", "replied")


@click.group(short_help="Try edge workers.")
def command() -> None:
    """Try edge workers."""


@command.command(
    short_help="Call a worker with one request.",
    epilog=render_examples("tlstunnel edge run edge/chat.py:fetch 'GET /chat' --header 'Cookie: sid=1'"),
)
@click.argument("worker", metavar="FILE:FUNCTION")
@request_options
@click.option(
    "--config", "file", type=click.Path(path_type=Path), help="Take origins and limits from the site that Host names."
)
@click.option("--worker-config", metavar="JSON", help="The argument of setup, instead of the site's worker_config.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def run(  # noqa: PLR0913 - the command's options
    *,
    worker: str,
    request: str,
    headers: tuple[str, ...],
    ip: str,
    file: Path | None,
    worker_config: str | None,
    as_json: bool,
) -> None:
    """Call a worker with one request, and show what would happen. No origin is connected to.

    FILE:FUNCTION is FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION. The fields of every WebSocket handshake (Upgrade,
    Sec-WebSocket-Key, ...) are added. The worker's setup and teardown are called. Without --config it may choose any
    origin. The exit status is 1 if it failed, timed out, or chose an origin that is not allowed.
    """
    refuse_invalid_address(ip)
    configured = () if file is None else Description.from_file(file).sites
    sites = configured or (SiteConfig(origins=(OriginConfig(address=_example()),), worker_origins=ANYWHERE),)
    try:
        parsed = RequestReader().feed(build_request_head(request, headers, sites[0]))
    except Refusal as refusal:
        raise ConfigurationError(f"the request is refused before a worker is called: {refusal.text}") from None
    assert parsed is not None  # the head is complete
    site = find_site(sites, parsed)
    if site is None:
        raise ConfigurationError(
            f"{file}: {printable(parsed.host)} is not a name of any site; choose one with --header 'Host: …'"
        )
    site = _with_worker(site, worker, worker_config)
    configure_logging("text")
    with asyncio.Runner(loop_factory=TunnelLoop) as runner:
        outcome = runner.run(_call(site, parsed, ip))
    if as_json:
        click.echo(json.dumps(_to_json(outcome)))
    else:
        for line in _render(site, parsed, outcome):
            click.echo(line)
    if outcome.failed:
        raise SystemExit(1)


def _example() -> OriginAddress:
    return OriginAddress("origin.example", 80, text="the site's own origins")


def _with_worker(site: SiteConfig, worker: str, worker_config: str | None) -> SiteConfig:
    try:
        reference = parse_worker_reference(worker, Path.cwd())
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="FILE:FUNCTION") from None
    changed: dict[str, Any] = {"worker": reference}
    if worker_config is not None:
        try:
            changed["worker_config"] = WorkerTable(json.loads(worker_config))
        except (ValueError, TypeError):
            raise click.BadParameter("expected a JSON object", param_hint="--worker-config") from None
    return msgspec.structs.replace(site, **changed)


async def _call(site: SiteConfig, request: UpgradeRequest, ip: str) -> Outcome:
    """Call the worker as a tunnel does, for a client that waits. Raises ConfigurationError if it cannot be set up."""
    workers = load_workers(Description(Config(), (site,)))
    await workers.start()
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
        pools = [build_pool(site, 30.0, b"", None), *(build_pool(route, 30.0, b"", None) for route in site.routes)]
        edge = workers.build_edge(site, pools, 30.0, b"", None)
        assert edge is not None
        wakeup = Wakeup(loop, loop.time() + edge.timeout)
        deadlines = Deadlines(loop, 0.01)
        deadlines.add(wakeup)
        client = Channel(ours, readiness(loop), wakeup)
        connection = Connection(
            ip=ip,
            tls_version="TLSv1.3",
            tls_cipher="TLS_AES_128_GCM_SHA256",
            tls_sni=request.host,
            site=site.names[0],
            request_id=REQUEST_ID,
        )
        began = time.perf_counter()
        try:
            directions = await edge.call(request, connection, client)
        except Refusal as refusal:
            result = "replied" if refusal.body is not None else refusal.reason.removeprefix("edge: ")
            return Outcome(result, time.perf_counter() - began, refusal=refusal)
        finally:
            deadlines.discard(wakeup)
            client.release()
        return _forwarded(site, directions, time.perf_counter() - began, ip)
    finally:
        ours.close()
        theirs.close()
        await workers.close()


def _forwarded(site: SiteConfig, directions: Directions, seconds: float, ip: str) -> Outcome:
    origin = str(directions.address or "")
    edits = build_edits(site).of(origin or str(site.origins[0].address), "").then(directions.edits)
    head = render_forwarded_head(directions.request, Forwarding(ip, REQUEST_ID, trusted=False), edits)
    return Outcome(directions.outcome, seconds, origin, head, directions.until, directions.tags)


def _render(site: SiteConfig, request: UpgradeRequest, outcome: Outcome) -> Iterator[str]:
    yield f"{'worker':<12}{site.worker}"
    yield f"{'request':<12}GET {printable(request.target.decode('ascii'))}"
    yield f"{'took':<12}{outcome.seconds * 1e3:.1f} ms"
    refusal = outcome.refusal
    if refusal is None:
        yield f"{'outcome':<12}{outcome.result}"
        yield f"{'origin':<12}{outcome.origin or f'chosen by the tunnel: {_render_origins(site)}'}"
        if outcome.until is not None:
            yield f"{'until':<12}{datetime.fromtimestamp(outcome.until, UTC):%Y-%m-%d %H:%M:%S} UTC"
        if outcome.tags:
            yield f"{'tags':<12}{printable(', '.join(outcome.tags))}"
        yield f"{'':<12}receives:"
        yield from (f"  {printable(line.decode('latin-1'))}" for line in outcome.head.split(b"\r\n")[:-2])
        return
    phrase = HTTPStatus(refusal.status).phrase if refusal.status in list(HTTPStatus) else ""
    yield f"{'outcome':<12}{outcome.result}: {refusal.status} {phrase}".rstrip()
    if refusal.detail:
        yield f"{'':<12}{printable(refusal.detail)}"
    yield f"{'client':<12}receives:"
    yield from (
        f"  {printable(line)}" for line in render_refusal(refusal, REQUEST_ID).decode("utf-8", "replace").splitlines()
    )


def _render_origins(site: SiteConfig) -> str:
    return ", ".join(origin.address.text or str(origin.address) for origin in site.origins)


def _to_json(outcome: Outcome) -> dict[str, Any]:
    shown: dict[str, Any] = {"outcome": outcome.result, "seconds": round(outcome.seconds, 6)}
    refusal = outcome.refusal
    if refusal is not None:
        sent = render_refusal(refusal, REQUEST_ID).decode("utf-8", "replace")
        fields = [(name.decode(), value.decode("latin-1")) for name, value in refusal.fields]
        return shown | {
            "status": refusal.status,
            "headers": fields,
            "body": sent.partition("\r\n\r\n")[2],
            "detail": refusal.detail,
        }
    line, *lines = outcome.head.decode("latin-1").split("\r\n")[:-2]
    headers = [line.split(": ", 1) for line in lines]
    return shown | {
        "origin": outcome.origin or None,
        "target": line.split(" ")[1],
        "headers": headers,
        "until": outcome.until,
        "tags": dict(tag.split("=", 1) for tag in outcome.tags),
    }
