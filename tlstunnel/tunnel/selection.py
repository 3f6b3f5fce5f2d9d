"""Which open tunnels are meant: those that match every filter that is given. No I/O.

Tested by tests/unit/test_selection.py.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

from tlstunnel.addresses import Networks
from tlstunnel.journal.record import Record

LONGEST_FILTER = 1024
"""Characters of a filter: more than any value that it is compared with has."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Filters for open tunnels. Those that are empty match every tunnel.

    `tag` is "name=value", or "name" for any value. `older` is the least age in seconds.
    """

    id: str = ""
    site: str = ""
    clients: Networks | None = None
    origin: str = ""
    tag: str = ""
    older: float = 0.0

    @classmethod
    def parse(cls, client: str = "", **filters: Any) -> Self:
        """`client` is an address or a network. Raises ValueError."""
        selection = cls(clients=Networks.parse([client]) if client else None, **filters)
        for name in ("id", "site", "origin", "tag"):
            if len(getattr(selection, name)) > LONGEST_FILTER:
                raise ValueError(f"{name} is longer than {LONGEST_FILTER} characters")
        if not 0.0 <= selection.older < math.inf:
            raise ValueError("older must be a number of seconds")
        return selection

    @property
    def is_empty(self) -> bool:
        """Whether it matches every tunnel."""
        return self == Selection()

    @property
    def is_narrow(self) -> bool:
        """Whether it means a certain tunnel, client or user, and not whatever is open at a site or an origin."""
        return bool(self.id or self.clients is not None or "=" in self.tag)

    def matches(self, record: Record, now: float) -> bool:
        """Return whether it matches the tunnel with this record. `now` is a time of ``time.monotonic``."""
        if self.id and record.id != self.id:
            return False
        if self.site and record.site != self.site:
            return False
        if self.origin and record.origin != self.origin:
            return False
        if self.tag and not has_tag(record.tags, self.tag):
            return False
        if self.older and now - record.started < self.older:
            return False
        return self.clients is None or record.client in self.clients


def has_tag(tags: tuple[str, ...], tag: str) -> bool:
    """Return whether one of the `tags` is `tag`, or has it as its name if it is "name" and not "name=value"."""
    if "=" in tag:
        return tag in tags
    return any(one.startswith(f"{tag}=") for one in tags)
