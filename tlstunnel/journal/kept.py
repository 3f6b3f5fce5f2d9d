"""The latest connections that ended without a tunnel, kept in memory so that an operator can see why.

Tested by tests/unit/test_journal_kept.py.
"""

import random
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from tlstunnel.escaping import shorten
from tlstunnel.journal.events import Event
from tlstunnel.journal.record import MAX_DETAIL, MAX_PATH, Record

MOST_RECORDS = 400
MOST_BYTES = 1 << 20
"""What one process keeps, about: a record without long texts has 700 bytes."""

RECORD_BYTES = 700

_ids = random.Random()  # noqa: S311 - an id must be unique, not secret


class Kept(NamedTuple):
    """A record, when its connection ended (Unix time), the event of its line, and how many bytes it has, about."""

    at: float
    event: Event
    record: Record
    size: int


class KeptRecords:
    """The latest records of each site; those without a site by their reason.

    When they are too many, the oldest goes of the site that has the most bytes: a flood at one site displaces its own.
    """

    def __init__(self, most: int = MOST_RECORDS, most_bytes: int = MOST_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._groups: dict[str, deque[Kept]] = {}
        self._sizes: dict[str, int] = {}
        self._count = 0
        self._bytes = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Kept]:
        """Iterate over all, the latest first."""
        return iter(sorted((one for group in self._groups.values() for one in group), key=lambda one: -one.at))

    def add(self, event: Event, record: Record) -> None:
        """Keep a record that has been logged. Its long texts are cut."""
        record.id = record.id or f"{_ids.getrandbits(64):016x}"
        record.path, record.detail = shorten(record.path, MAX_PATH), shorten(record.detail, MAX_DETAIL)
        kept = Kept(time.time(), event, record, _measure(record))
        group = record.site or record.reason.partition(": ")[0]
        self._groups.setdefault(group, deque()).append(kept)
        self._sizes[group] = self._sizes.get(group, 0) + kept.size
        self._count += 1
        self._bytes += kept.size
        while self._count > self._most or self._bytes > self._most_bytes:
            self._drop_oldest(max(self._sizes, key=self._sizes.__getitem__))

    def _drop_oldest(self, name: str) -> None:
        group = self._groups[name]
        size = group.popleft().size
        self._sizes[name] -= size
        self._count -= 1
        self._bytes -= size
        if not group:
            del self._groups[name], self._sizes[name]


def _measure(record: Record) -> int:
    texts = record.path, record.detail, record.reason, record.raw_web_origin, record.raw_user_agent
    size = RECORD_BYTES + sum(map(len, (*texts, record.host, record.client_subject, *record.tags)))
    size += sum(len(name) + len(str(value)) for name, value in record.edge_log)
    return size + len(str(record.firewall)) if record.firewall else size
