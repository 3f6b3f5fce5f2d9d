"""Describes what a reload changes."""

from collections.abc import Iterator
from typing import Any

import msgspec

from tlstunnel.config import Config, Duration, SiteConfig

_AT_START = ("log",)
"""Tables that are only read at the start."""

_TABLES = ("timeouts", "limits", "release", "state", "managed_rules")


def describe_changes(old: Config, new: Config) -> list[str]:
    """Return a line for each difference between two configurations, without values that may be secret."""
    return list(_describe(old, new))


def _describe(old: Config, new: Config) -> Iterator[str]:
    for change, one, other in (("added", new, old), ("removed", old, new)):
        for address in one.listen:
            if address not in other.listen:
                yield f"listen: {address} {change}"
    for key in Config.__struct_fields__:
        before, after = getattr(old, key), getattr(new, key)
        if before == after or key in ("listen", "sites"):
            continue
        note = "; this takes effect at the next start" if key in _AT_START else ""
        if key in _TABLES or key in _AT_START:
            for inner, old_value, new_value in _compare(before, after):
                yield f"{key}.{inner}: {_render(old_value)} -> {_render(new_value)}{note}"
        else:
            yield f"{key}: changed"
    yield from _describe_sites(old.sites, new.sites)


def _describe_sites(old: tuple[SiteConfig, ...], new: tuple[SiteConfig, ...]) -> Iterator[str]:
    """Compare sites. Two sites are the same if they have a name in common."""
    before = {name: site for site in old for name in site.names}
    kept = set()
    for site in new:
        name = site.names[0]
        same = next((before[name] for name in site.names if name in before), None)
        if same is None:
            yield f"site {name}: added"
            continue
        kept.add(same.names[0])
        if changed := [key for key, _, _ in _compare(same, site)]:
            yield f"site {name}: changed: {', '.join(changed)}"
    for site in old:
        if site.names[0] not in kept:
            yield f"site {site.names[0]}: removed"


def _compare(old: msgspec.Struct, new: msgspec.Struct) -> Iterator[tuple[str, Any, Any]]:
    for key in old.__struct_fields__:
        before, after = getattr(old, key), getattr(new, key)
        if before != after:
            yield key, before, after


def _render(value: object) -> str:
    if value is None:
        return "off"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, Duration | int | str) else "..."
