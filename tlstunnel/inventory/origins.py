"""The origins: what one process knows of them, and how what several know is put together.

An ejection is announced, so that all processes share it. Numbers are added up, and the latest problem counts.

Tested by tests/unit/test_inventory_origins.py.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

from tlstunnel.commands.sites import OriginStatus
from tlstunnel.inventory.sites import OriginEntry
from tlstunnel.origins.condition import Condition, State

if TYPE_CHECKING:  # the parent has no sites that are served, and does without their libraries
    from tlstunnel.tunnel.sites import Site


def describe_origins(site: "Site", offset: float) -> Iterator[OriginStatus]:
    """Yield what this process knows of a site's origins. Unix time is the loop's time and `offset`."""
    for route, pool in site.pools:
        for condition in pool.list_conditions():
            yield _describe(site.name, route, condition, offset)


def is_unhealthy(origin: OriginStatus) -> bool:
    """Return whether an origin has a problem now. A name that was never looked up has none."""
    return origin.state not in {"healthy", "unresolved"} or (origin.state == "unresolved" and bool(origin.problem))


def merge_origins(entries: Iterable[OriginEntry], reports: Sequence[Iterable[OriginStatus]]) -> list[OriginStatus]:
    """Return the origins that `entries` lists, each put together from the reports of all processes."""
    known: dict[OriginEntry, list[OriginStatus]] = {}
    for report in reports:
        for one in report:
            known.setdefault(OriginEntry(one.site, one.route, one.address), []).append(one)
    return [_merge(entry, known.get(entry, ())) for entry in entries]


def _describe(site: str, route: str, condition: Condition, offset: float) -> OriginStatus:
    config = condition.config
    return OriginStatus(
        site=site,
        route=route,
        address=str(config.address),
        backup=config.backup,
        weight=config.weight,
        state=condition.state,
        checked=condition.checked,
        until=_to_unix(condition.until, offset),
        tunnels=condition.tunnels,
        max_tunnels=config.max_tunnels,
        connects=condition.connects,
        failures=condition.failures,
        connected_at=_to_unix(condition.connected or None, offset),
        problem=condition.problem,
        problem_at=_to_unix(condition.failed or None, offset),
        resolved=list(condition.addresses),
    )


def _to_unix(at: float | None, offset: float) -> float | None:
    return None if at is None else round(at + offset, 3)


_WORST_FIRST: tuple[State, ...] = ("ejected", "trial", "down", "healthy", "unresolved")


def _merge(entry: OriginEntry, found: Sequence[OriginStatus]) -> OriginStatus:
    if not found:
        return OriginStatus(site=entry.site, route=entry.route, address=entry.address, state="unresolved")
    connected = max((one.connected_at for one in found if one.connected_at is not None), default=None)
    latest = max(found, key=lambda one: (one.problem_at or 0.0, bool(one.problem)))
    by_state = {one.state: one for one in found if one.state != "down" or _is_down(one, connected)}
    state = next((state for state in _WORST_FIRST if state in by_state), "healthy")
    return replace(
        found[0],
        state=state,
        until=max((one.until for one in found if one.until is not None), default=None) if state == "ejected" else None,
        tunnels=sum(one.tunnels for one in found),
        connects=sum(one.connects for one in found),
        failures=sum(one.failures for one in found),
        connected_at=connected,
        problem=latest.problem,
        problem_at=latest.problem_at,
        resolved=sorted({address for one in found for address in one.resolved}),
    )


def _is_down(origin: OriginStatus, connected: float | None) -> bool:
    """Return whether an origin that is down in one process is down. Another may have reached it since."""
    return origin.checked or connected is None or connected < (origin.problem_at or 0.0)
