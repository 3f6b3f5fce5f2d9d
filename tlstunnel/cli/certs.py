"""``tlstunnel certs``: creates and revokes test certificates, and shows the certificates in a PEM file."""

import json
import shlex
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import click

from tlstunnel.certificates import describe, issue
from tlstunnel.certificates.describe import CertificateDescription
from tlstunnel.cli.examples import render_examples


@click.group(short_help="Create, revoke and show certificates.")
def command() -> None:
    """Create and revoke test certificates, or show the certificates in a PEM file."""


_folder = click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("certs"),
    show_default=True,
    help="The folder for the files. A CA in it is used again.",
)


@command.command(
    short_help="Create a certificate for tests.",
    epilog=render_examples(
        "tlstunnel certs create chat.example.com 192.0.2.7", "tlstunnel certs create --client alice"
    ),
)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--client", metavar="NAME", help="Create a certificate for a client with this common name instead.")
@_folder
@click.option("--force", is_flag=True, help="Replace an existing certificate and key. Never replaces the CA.")
def create(names: tuple[str, ...], client: str | None, folder: Path, force: bool) -> None:
    """Create a certificate for NAMEs (as in a site's names), signed by a test CA.

    The files are named after the first NAME. The default is localhost, 127.0.0.1 and ::1.
    """
    if client is None:
        return _print_server(issue.create(names, folder, force=force))
    if names:
        raise click.UsageError("--client has a name of its own: leave the NAMEs out")
    _print_client(issue.create_client(client, folder, force=force))


def _print_server(issued: issue.Issued) -> None:
    click.echo(f"""\
{issued.ca}  the test CA ({_state(issued)}), which clients must trust
{issued.cert}  the certificate and its chain, for --cert
{issued.key}  its private key, for --key

To trust the CA:
  curl --cacert {issued.ca} ...
  SSL_CERT_FILE={issued.ca} websockets wss://...
  NODE_EXTRA_CA_CERTS={issued.ca} node ...
Keep {issued.ca.with_name("ca-key.pem")} secret: its holder can impersonate any site to these clients.""")


def _print_client(issued: issue.Issued) -> None:
    cert, key = shlex.quote(str(issued.cert)), shlex.quote(str(issued.key))
    click.echo(f"""\
{issued.ca}  the test CA ({_state(issued)}), for the site's client_ca
{issued.cert}  the client's certificate and its chain
{issued.key}  its private key

To use it:
  tlstunnel check wss://... --cert {cert} --key {key}
  curl --cert {cert} --key {key} ...
  openssl pkcs12 -export -in {cert} -inkey {key} -out client.p12    (for browsers)
To revoke it: tlstunnel certs revoke {cert}""")


def _state(issued: issue.Issued) -> str:
    return "new" if issued.ca_created else "used again"


@command.command(
    short_help="Add certificates to a revocation list.",
    epilog=render_examples("tlstunnel certs revoke certs/alice.pem"),
)
@click.argument("certs", metavar="[PEM]...", type=click.Path(path_type=Path), nargs=-1)
@_folder
def revoke(certs: tuple[Path, ...], folder: Path) -> None:
    """Add the certificates in PEM files to the revocation list of the test CA, ca.crl, for a site's client_crl.

    Without PEM, the list is only renewed: it expires after 397 days, and no client is accepted then.
    """
    click.echo(f"{issue.revoke(certs, folder)}  the revocation list, for the site's client_crl")


@command.command(
    short_help="Show the certificates in a PEM file.",
    epilog=render_examples("tlstunnel certs show certs/localhost.pem"),
)
@click.argument("pem", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array with an object for each certificate.")
def show(pem: Path, as_json: bool) -> None:
    """Show every certificate in PEM: names, key, validity, fingerprint."""
    now = datetime.now(UTC)
    certificates = [describe.describe(cert) for cert in describe.read_certificates(pem)]
    if as_json:
        rows = [asdict(facts) | {"days_left": facts.days_left(now)} for facts in certificates]
        click.echo(json.dumps(rows, indent=2, default=datetime.isoformat))
        return
    blocks = [f"certificate {n} of {len(certificates)}\n{_text(each, now)}" for n, each in enumerate(certificates, 1)]
    click.echo("\n\n".join(blocks))


def _text(facts: CertificateDescription, now: datetime) -> str:
    days = facts.days_left(now)
    if now < facts.not_before:
        state = "not valid yet"
    elif days < 0:
        state = f"expired, {days} days left"
    else:
        state = f"{days} days left"
    rows = [
        ("subject", facts.subject),
        ("issuer", facts.issuer),
        # A line for each, because a name may contain a comma.
        *(("name", name) for name in facts.names),
        ("ca", "yes" if facts.is_ca else "no"),
        ("key", facts.key),
        ("valid", f"{facts.not_before:%Y-%m-%d %H:%M:%S} to {facts.not_after:%Y-%m-%d %H:%M:%S} UTC ({state})"),
        ("serial", facts.serial),
        ("sha256", facts.sha256),
    ]
    return "\n".join(f"  {label:<8} {value}" for label, value in rows)
