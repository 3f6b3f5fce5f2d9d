"""``tlstunnel check``: connects to a ``wss://`` URL as a client does, and reports each step."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.text import Text

from tlstunnel.certificates.describe import CertificateDescription
from tlstunnel.check.results import (
    CloseResult,
    DnsResult,
    PingResult,
    Result,
    Step,
    TcpResult,
    TlsResult,
    UpgradeResult,
)
from tlstunnel.check.steps import run
from tlstunnel.check.target import Target, Trust, check_subprotocols, parse_connect, parse_field
from tlstunnel.cli.examples import render_examples
from tlstunnel.errors import TlstunnelError
from tlstunnel.escaping import printable

_LABEL_WIDTH: Final = 11
_TEXT_WIDTH: Final = 62
# A day. A socket's timeout has a limit, too.
_MAX_SECONDS: Final = 86_400


def _make_callback(parse: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Return a callback that parses a value; a ValueError is reported as wrong usage."""

    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        try:
            return parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from None

    return callback


def _parse_fields(texts: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple(map(parse_field, texts))


def _check_seconds(seconds: float) -> float:
    if not 0 < seconds <= _MAX_SECONDS:
        raise ValueError(f"must be more than 0 and at most {_MAX_SECONDS} seconds")
    return seconds


@click.command(
    short_help="Connect to a wss:// URL, and report each step.",
    epilog=render_examples(
        "tlstunnel check wss://chat.example.com/socket",
        "tlstunnel check wss://localhost:8443/ --ca certs/ca.pem",
    ),
)
@click.argument("target", metavar="URL", callback=_make_callback(Target.parse))
@click.option("--ca", type=click.Path(path_type=Path), metavar="PEM", help="Trust only the certificates in PEM.")
@click.option(
    "--cert", type=click.Path(path_type=Path), metavar="PEM", help="Present this certificate if the server asks."
)
@click.option("--key", type=click.Path(path_type=Path), metavar="PEM", help="Its private key, if not in the same file.")
@click.option(
    "--connect",
    metavar="HOST[:PORT]",
    callback=_make_callback(lambda text: None if text is None else parse_connect(text)),
    help="Connect there, with the URL's name and port in everything else.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option(
    "--header",
    "fields",
    multiple=True,
    metavar="'N: V'",
    callback=_make_callback(_parse_fields),
    help="Add a field to the request; may be repeated.",
)
@click.option(
    "--subprotocol",
    "subprotocols",
    multiple=True,
    metavar="NAME",
    callback=_make_callback(check_subprotocols),
    help="Offer a subprotocol; may be repeated, the preferred one first.",
)
@click.option(
    "--timeout",
    type=float,
    callback=_make_callback(_check_seconds),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="Timeout for the whole check.",
)
def command(  # noqa: PLR0913 - the command's options
    *,
    target: Target,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    connect: tuple[str, int | None] | None,
    as_json: bool,
    fields: tuple[tuple[str, str], ...],
    subprotocols: tuple[str, ...],
    timeout: float,
) -> None:
    """Connect to wss://HOST[:PORT]/PATH as a client does, and report each step.

    The steps are DNS, TCP, TLS, the WebSocket handshake, a ping and its pong, and a clean close. If one fails, the
    reason is printed and the exit status is 1.
    """
    if key is not None and cert is None:
        raise click.UsageError("--key requires --cert")
    trust = Trust.load(ca, cert, key)
    steps = run(replace(target, connect=connect), trust, fields=fields, subprotocols=subprotocols, timeout=timeout)
    if as_json:
        done = list(steps)
        click.echo(json.dumps({"url": target.url, "ok": done[-1].ok, "steps": [_to_json(step) for step in done]}))
        sys.exit(0 if done[-1].ok else 1)
    show = _make_writer()
    for step in steps:
        for line in _render(step):
            show(line, "" if step.ok else "red")
        if step.error is not None:
            raise TlstunnelError(f"{step.name} failed: {step.error}")
    show("ok", "green")


def _make_writer() -> Callable[[str, str], None]:
    if not sys.stdout.isatty():
        # A name in a certificate may contain characters that the output's encoding does not have.
        encoding = sys.stdout.encoding
        return lambda line, _style: click.echo(line.encode(encoding, "backslashreplace").decode(encoding))
    console = Console()
    return lambda line, style: console.print(Text(line, style), soft_wrap=True)


def _to_json(step: Step) -> dict[str, Any]:
    found = {} if step.result is None else asdict(step.result)
    if isinstance(step.result, TlsResult):
        found["chain"] = [_certificate_to_json(certificate) for certificate in step.result.chain]
    error = {} if step.ok else {"error": step.error}
    return {"step": step.name, "ok": step.ok, "seconds": round(step.seconds, 6)} | error | found


def _certificate_to_json(certificate: CertificateDescription) -> dict[str, Any]:
    times = {"not_before": certificate.not_before.isoformat(), "not_after": certificate.not_after.isoformat()}
    return asdict(certificate) | times | {"days_left": certificate.days_left(datetime.now(UTC))}


def _render(step: Step) -> Iterator[str]:
    first, *more = _describe(step.result) or [""]
    text = first if step.ok else f"failed; {first}" if first else "failed"
    yield f"{step.name:<{_LABEL_WIDTH}}{text:<{_TEXT_WIDTH}} {step.seconds * 1000:>8.1f} ms"
    for line in more:
        yield " " * _LABEL_WIDTH + line


def _describe(found: Result | None) -> list[str]:
    """Return the text for the line of the step, then the lines below it. Everything from the server is escaped."""
    lines: list[str] = []
    match found:
        case DnsResult(host, addresses):
            lines = [f"{host} -> {', '.join(addresses) or 'nothing'}"]
        case TcpResult(address, failed):
            lines = [address or "no address accepted the connection", *(f"{other}: {why}" for other, why in failed)]
        case TlsResult():
            lines = _describe_tls(found)
        case UpgradeResult():
            lines = _describe_handshake(found)
        case PingResult(round_trip):
            lines = [f"pong after {round_trip * 1000:.1f} ms"]
        case CloseResult(code, reason):
            lines = [f"{code} {printable(reason)}".rstrip()]
    return lines


def _describe_tls(found: TlsResult) -> list[str]:
    agreed = " ".join(each for each in (found.version, found.cipher, found.group) if each)
    lines = [f"{agreed or 'nothing agreed'}, ALPN {printable(found.alpn) if found.alpn else 'none'}"]
    now = datetime.now(UTC)
    for certificate in found.chain:
        names = f"names {', '.join(certificate.names)}; " if certificate.names else ""
        life = f"{certificate.days_left(now)} days left"
        lines.append(
            f"{certificate.subject or 'no subject'}; {names}{life}; {certificate.key}; by {certificate.issuer}"
        )
    if found.unreadable:
        lines.append(f"certificates that cannot be decoded: {found.unreadable}")
    return lines


def _describe_handshake(found: UpgradeResult) -> list[str]:
    lines = [
        f"{found.status} {printable(found.reason)}".rstrip(),
        *(f"{printable(name)}: {printable(value)}" for name, value in found.fields),
    ]
    if found.status == 101:
        lines.append(f"subprotocol {printable(found.subprotocol or 'none')}")
        lines.append(f"extensions {printable(found.extensions or 'none')}")
    return lines
