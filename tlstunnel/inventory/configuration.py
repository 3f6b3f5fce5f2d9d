"""The configuration as it is served, with defaults, without secrets, and with where each value comes from.

Tested by tests/unit/test_inventory_configuration.py.
"""

import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from msgspec.structs import replace

from tlstunnel.config import Config, SiteConfig
from tlstunnel.config.invocation import Invocation
from tlstunnel.config.tables import TableKind

Source = Literal["file", "command line"]


def render_configuration(config: Config, sites: Sequence[SiteConfig]) -> dict[str, Any]:
    """Return the values as a file may hold them, with these of the sites. Secrets are hidden."""
    rendered: dict[str, Any] = TableKind(Config).render(replace(config, sites=tuple(sites)))
    return rendered


def list_arguments(invocation: Invocation) -> dict[str, Any]:
    """Return the options of the command line that change the configuration, without those not given."""
    given = {
        "origin": invocation.origin,
        "echo": invocation.echo,
        "cert": str(invocation.cert) if invocation.cert is not None else None,
        "key": str(invocation.key) if invocation.key is not None else None,
        "listen": [str(address) for address in invocation.listen] or None,
        "http": invocation.http,
        "admin": str(invocation.admin) if invocation.admin is not None else None,
    }
    return {name: value for name, value in given.items() if value is not None}


def find_sources(text: str | None, overridden: Collection[str], numbers: Collection[int]) -> dict[str, Source]:
    """Return where values come from, by the path of their key, such as ``timeouts.idle`` and ``sites[0].names``.

    A key that is missing has its default. `overridden` are the paths that the command line decides. Of the sites, those
    with these `numbers` are looked at.
    """
    table = tomllib.loads(text) if text is not None else {}
    sites = table.pop("sites", [])
    sources: dict[str, Source] = dict.fromkeys(_list_paths(table, ""), "file")
    if isinstance(sites, list):
        for number in numbers:
            if number < len(sites) and isinstance(sites[number], dict):
                sources |= dict.fromkeys(_list_paths(sites[number], f"sites[{number}]."), "file")
    for path in overridden:
        sources[path] = "command line"
    return sources


def _list_paths(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Yield the paths of all keys in a table. Arrays of tables are one value."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _list_paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
