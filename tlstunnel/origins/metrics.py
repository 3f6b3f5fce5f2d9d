"""The metrics of the origins in the configuration: failures, ejections, and which addresses are up.

Those that an edge worker chooses from `worker_origins` have none: their number has no bound.

Tested by tests/unit/test_origins_metrics.py.
"""

from collections.abc import Iterable
from itertools import islice

from tlstunnel.metrics import families
from tlstunnel.metrics.families import MOST_ORIGINS
from tlstunnel.metrics.registry import Collected, Registry
from tlstunnel.origins.members import Member
from tlstunnel.origins.pool import Pool


class OriginMetrics:
    """Counts for the pools that `watch` was called with last.

    Of the members' present state, `MOST_ORIGINS` are shown at most, in the order of the configuration, and as many
    others that have failed.
    """

    def __init__(self, metrics: Registry) -> None:
        self._failures = metrics[families.ORIGIN_FAILURES]
        self._ejections = metrics[families.ORIGIN_EJECTIONS]
        self._first: tuple[Pool, ...] = ()
        self._failing: dict[Pool, None] = {}
        metrics.collect(self._collect)

    def watch(self, pools: Iterable[Pool]) -> None:
        """Count for these pools from now on."""
        watched = list(pools)
        for pool in watched:
            pool.metrics = self
        self._first = tuple(watched[:MOST_ORIGINS])
        first = frozenset(self._first)
        self._failing = {pool: None for pool in watched if pool not in first and not all(map(_is_up, pool.members))}

    def count_failure(self, pool: Pool, member: Member, reason: str) -> None:
        """Count an attempt that failed because of `member`. The `reason` is one of a few."""
        self._failures.add(*_label(member), reason)
        if len(self._first) == MOST_ORIGINS and len(self._failing) < MOST_ORIGINS:
            self._failing[pool] = None

    def count_ejection(self, member: Member) -> None:
        """Count that `member` was ejected."""
        self._ejections.add(*_label(member))

    def _collect(self) -> Collected:
        for pool in [pool for pool in self._failing if all(map(_is_up, pool.members))]:
            del self._failing[pool]
        first = (member for pool in self._first for member in pool.members)
        failing = (member for pool in self._failing for member in pool.members)
        for member in (*islice(first, MOST_ORIGINS), *islice(failing, MOST_ORIGINS)):
            labels = _label(member)
            yield families.ORIGIN_UP, labels, int(_is_up(member))
            yield families.ORIGIN_TUNNELS, labels, member.tunnels


def _label(member: Member) -> tuple[str, str]:
    return member.text, member.address_text


def _is_up(member: Member) -> bool:
    return not (member.ejected or member.checked_down)
