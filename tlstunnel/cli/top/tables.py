"""The tables that ``tlstunnel top`` shows: their columns, how they are sorted, and which rows a filter keeps. Sans-IO.

Tested by tests/unit/test_cli_top.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from tlstunnel.cli.tables import render_duration, render_size
from tlstunnel.commands.records import Refusal
from tlstunnel.commands.sites import OriginStatus, SiteStatus
from tlstunnel.escaping import printable

Tab = Literal["sites", "tunnels", "origins", "refusals"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading, the text of a cell, and what rows are sorted by. Numbers are sorted from the largest."""

    heading: str
    render: Callable[[Any], str]
    value: Callable[[Any], Any]
    number: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its columns, what tells its rows apart, and the site of a row."""

    columns: tuple[Column, ...]
    identify: Callable[[Any], str]
    find_site: Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class View:
    """What is shown of a table: sorted by which column, in reverse, and only rows that contain the text `search`."""

    column: int = 0
    reverse: bool = False
    search: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it is shown."""

    key: str
    site: str
    cells: tuple[str, ...]


def arrange(table: Table, items: Sequence[Any], view: View) -> list[Row]:
    """Return the rows of `items` that `view` keeps, in its order."""
    column = table.columns[view.column]
    search = view.search.casefold()
    kept: list[tuple[Any, Row]] = []
    for item in items:
        cells = tuple(printable(one.render(item)) for one in table.columns)
        if not search or any(search in cell.casefold() for cell in cells):
            kept.append((column.value(item), Row(table.identify(item), table.find_site(item), cells)))
    kept.sort(key=lambda one: one[1].key)
    kept.sort(key=lambda one: one[0], reverse=column.number != view.reverse)
    return [row for _, row in kept]


def _text(heading: str, get: Callable[[Any], str]) -> Column:
    return Column(heading, get, lambda item: get(item).casefold())


def _count(heading: str, get: Callable[[Any], int]) -> Column:
    return Column(heading, lambda item: f"{get(item)}", get, number=True)


def _size(heading: str, get: Callable[[Any], float], unit: str = "") -> Column:
    return Column(heading, lambda item: render_size(get(item)) + unit, get, number=True)


def _age(heading: str, get: Callable[[Any], float]) -> Column:
    return Column(heading, lambda item: render_duration(get(item)), get, number=True)


def _describe_standing(site: SiteStatus) -> str:
    if site.throttled:
        return "throttled"
    if site.guideline is not None and site.tunnels > site.guideline:
        return "above its guideline"
    return ""


def _describe_health(origin: OriginStatus) -> str:
    return f"{origin.state}: {origin.problem}" if origin.state != "healthy" and origin.problem else origin.state


def _find_refusal_site(refusal: Refusal) -> str:
    return str(refusal.record.get("site", ""))


def _of_record(name: str) -> Callable[[Refusal], str]:
    return lambda refusal: str(refusal.record.get(name, ""))


def _render_time(refusal: Refusal) -> str:
    return f"{datetime.fromtimestamp(refusal.at, UTC):%H:%M:%S}"


TABLES: dict[Tab, Table] = {
    "sites": Table(
        (
            _count("tunnels", lambda site: site.tunnels),
            _text("site", lambda site: site.names[0]),
            _count("handshakes", lambda site: site.handshakes),
            _count("refused", lambda site: sum(site.refused.values())),
            _size("up", lambda site: site.bytes_up),
            _size("down", lambda site: site.bytes_down),
            Column("plan", lambda site: site.plan, lambda site: site.plan),
            Column(
                "guideline",
                lambda site: "" if site.guideline is None else str(site.guideline),
                lambda site: site.guideline or 0,
                number=True,
            ),
            _text("notes", _describe_standing),
        ),
        lambda site: str(site.names[0]),
        lambda site: str(site.names[0]),
    ),
    "tunnels": Table(
        (
            _size("rate", lambda tunnel: tunnel.rate, "/s"),
            _text("client", lambda tunnel: tunnel.client),
            _text("site", lambda tunnel: tunnel.site),
            _age("age", lambda tunnel: tunnel.seconds),
            _size("up", lambda tunnel: tunnel.up),
            _size("down", lambda tunnel: tunnel.down),
            _text("origin", lambda tunnel: tunnel.origin),
            _text("path", lambda tunnel: tunnel.path),
            _text("tags", lambda tunnel: " ".join(f"{name}={value}" for name, value in sorted(tunnel.tags.items()))),
            _text("id", lambda tunnel: tunnel.id),
        ),
        lambda tunnel: str(tunnel.id),
        lambda tunnel: str(tunnel.site),
    ),
    "origins": Table(
        (
            _text("state", _describe_health),
            _text("origin", lambda origin: origin.address),
            _text("site", lambda origin: origin.site + origin.route),
            _count("tunnels", lambda origin: origin.tunnels),
            _count("connects", lambda origin: origin.connects),
            _count("failures", lambda origin: origin.failures),
            _text("last problem", lambda origin: origin.problem),
        ),
        lambda origin: f"{origin.site} {origin.route} {origin.address}",
        lambda origin: str(origin.site),
    ),
    "refusals": Table(
        (
            Column("time", _render_time, lambda refusal: refusal.at, number=True),
            _text("client", _of_record("client")),
            _text("site", _find_refusal_site),
            _text("status", _of_record("status")),
            _text("reason", _of_record("reason")),
            _text("detail", _of_record("detail")),
            _text("path", _of_record("path")),
        ),
        lambda refusal: f"{refusal.at} {refusal.record.get('id', '')} {refusal.record.get('client', '')}",
        _find_refusal_site,
    ),
}
"""The tables, in the order of their keys."""
