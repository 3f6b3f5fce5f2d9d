"""The tables of ``tlstunnel status --sites``, ``--origins`` and ``--certificates``.

Tested by tests/unit/test_cli_inventory.py and tests/promises/test_inventory.py.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from tlstunnel.cli.control import ask_tunnel, find_control, print_errors
from tlstunnel.cli.tables import align, render_size
from tlstunnel.commands.command import Command
from tlstunnel.commands.sites import (
    MOST_LISTED,
    Certificates,
    CertificateStatus,
    Origins,
    OriginStatus,
    Sites,
    SiteStatus,
)
from tlstunnel.escaping import printable, shorten

LONGEST_CELL = 50
"""Characters of a cell. `--json` has the whole text."""


def show_inventory(what: str, control: Path | None, *, as_json: bool) -> None:
    """Print all sites, origins or certificates of the running tunnel. Raises ControlError."""
    with print_errors(as_json=as_json):
        found = list(_list_all(find_control(control), what))
    if as_json:
        click.echo(json.dumps({"ok": True, what: msgspec.to_builtins(found)}))
        return
    for line in render_table(what, found):
        click.echo(line)


def render_table(what: str, found: Sequence[Any]) -> Iterator[str]:
    """Yield the lines of a table."""
    headings, make_row = _TABLES[what]
    rows = [[printable(shorten(cell, LONGEST_CELL)) for cell in make_row(one)] for one in found]
    yield from align([headings, *rows]) if rows else [f"no {what}"]
    for one in found:
        if getattr(one, "problem", "") and not (isinstance(one, OriginStatus) and one.state == "healthy"):
            yield f"{printable(_name(one))}: {printable(one.problem)}"


def _name(one: OriginStatus | CertificateStatus) -> str:
    return one.file if isinstance(one, CertificateStatus) else f"{one.site}{one.route}: {one.address}"


_COMMANDS: Mapping[str, type[Command[Any]]] = {
    "sites": Sites,
    "origins": Origins,
    "certificates": Certificates,
}


def _list_all(control: Path, what: str) -> Iterator[Any]:
    """Yield what there is, in as many pages as it takes. Raises ControlError."""
    offset, total = 0, 1
    while offset < total:
        result = ask_tunnel(control, _COMMANDS[what](offset=offset))
        yield from getattr(result, what)
        offset, total = offset + MOST_LISTED, result.total


def _make_site_row(site: SiteStatus) -> list[str]:
    days = site.certificate_days
    return [
        site.shown or site.names[0],
        str(site.tunnels),
        "none" if site.guideline is None else str(site.guideline),
        str(site.handshakes),
        str(sum(site.refused.values())),
        render_size(site.bytes_up),
        render_size(site.bytes_down),
        f"{site.origins - site.ejected}/{site.origins}",
        "?" if days is None else f"{days:.0f} days",
        "removed" if site.removed else "throttled" if site.throttled else "",
    ]


def _make_origin_row(origin: OriginStatus) -> list[str]:
    until = f" until {datetime.fromtimestamp(origin.until, UTC):%H:%M:%S} UTC" if origin.until is not None else ""
    return [
        f"{origin.site}{origin.route}",
        origin.address + (" (backup)" if origin.backup else ""),
        f"{origin.state}{until}",
        str(origin.tunnels) + (f"/{origin.max_tunnels}" if origin.max_tunnels is not None else ""),
        str(origin.connects),
        str(origin.failures),
    ]


def _make_certificate_row(certificate: CertificateStatus) -> list[str]:
    more = len(certificate.sites) - 1 + certificate.more_sites
    return [
        certificate.sites[0] + (f" and {more} more" if more > 0 else ""),
        f"{certificate.days:.0f} days",
        f"{datetime.fromtimestamp(certificate.not_after, UTC):%Y-%m-%d}",
        certificate.key,
        certificate.issuer,
        certificate.file,
    ]


_TABLES: dict[str, tuple[Sequence[str], Callable[[Any], list[str]]]] = {
    "sites": (
        ("site", "tunnels", "guideline", "opened", "refused", "up", "down", "origins", "certificate", ""),
        _make_site_row,
    ),
    "origins": (("site", "origin", "state", "tunnels", "connects", "failures"), _make_origin_row),
    "certificates": (("site", "left", "until", "key", "issuer", "file"), _make_certificate_row),
}
