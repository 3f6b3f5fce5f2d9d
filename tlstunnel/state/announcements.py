"""What processes announce to each other, as far as the ledger keeps it for those that connect later. No I/O.

Tested by tests/unit/test_state_ledger.py.
"""

from collections.abc import Callable, Iterable

import msgspec

from tlstunnel.state import wire

MAX_PER_SECOND = 256
"""Announcements of one asker per second. More are dropped, so that no process can keep the others busy."""

MAX_KEPT = 1024
"""Announcements that are kept. The oldest is forgotten first."""

MAX_KEPT_TEXT = 512
"""A longer announcement is not kept, in characters."""


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """An announcement for askers that connect until `until`. Both times are on CLOCK_MONOTONIC, in seconds."""

    topic: str
    key: str
    text: str
    announced: float
    until: float


class Announcements:
    """The announcements that are kept."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: dict[tuple[str, str], Kept] = {}

    def keep(self, message: wire.Announce) -> None:
        """Keep what is announced, if it says for how long. It replaces what has its topic and key."""
        if not message.key:
            return
        name, now = (message.topic, message.key), self._clock()
        self._kept.pop(name, None)
        if message.seconds and len(message.text) <= MAX_KEPT_TEXT:
            self._kept[name] = Kept(*name, message.text, now, now + message.seconds)
            if len(self._kept) > MAX_KEPT:
                del self._kept[next(iter(self._kept))]

    def restore(self, kept: Iterable[Kept]) -> None:
        """Keep what another ledger has kept."""
        self._kept.update(((one.topic, one.key), one) for one in kept)

    def list_kept(self) -> list[Kept]:
        """Return what is kept, oldest first."""
        now = self._clock()
        self._kept = {name: one for name, one in self._kept.items() if now < one.until}
        return list(self._kept.values())

    def repeat(self) -> list[wire.LedgerMessage]:
        """Return what is kept for an asker that has connected."""
        now = self._clock()
        return [
            wire.Announced(one.topic, one.text, min(now - one.announced, wire.MAX_LIFE)) for one in self.list_kept()
        ]


class Allowance:
    """How much one asker has announced in this second."""

    __slots__ = ("_began", "_number")

    def __init__(self) -> None:
        self._began = 0.0
        self._number = 0

    def take(self, now: float) -> bool:
        """Count an announcement, and return whether it is not one too many."""
        if now >= self._began + 1.0:
            self._began, self._number = now, 0
        self._number += 1
        return self._number <= MAX_PER_SECOND
