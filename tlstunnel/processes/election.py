"""What the parent does for the election of the machine that sends notices.

The ledger takes part in it, and the admin process sends. The parent tells the admin process until when this machine is
elected, and what machines have delivered. It tells the ledger what this machine has delivered. It keeps both for a
process that is started later.

Tested by tests/promises/test_elected.py.
"""

from collections.abc import Callable

from tlstunnel.processes.children import Child
from tlstunnel.processes.messages import Delivered, Elected
from tlstunnel.state.clock import read_clock

MOST_KEPT = 20_000
"""Deliveries that are kept: as many as the server keeps. The oldest are forgotten."""

AT_ONCE = 1000
"""Deliveries in one message."""


class Election:
    """Knows what the ledger has said last. `get_ledger` and `get_admin` return the processes, None if there is none."""

    def __init__(self, get_ledger: Callable[[], Child | None], get_admin: Callable[[], Child | None]) -> None:
        self._get_ledger = get_ledger
        self._get_admin = get_admin
        self._place = ""
        self._until = 0.0
        self._holder = ""
        self._delivered: dict[str, None] = {}
        self._unconfirmed: dict[str, None] = {}
        """What this machine has delivered, until the ledger has read in the server that it was."""

    @property
    def is_ours(self) -> bool:
        """Whether this machine is elected."""
        return read_clock() < self._until

    @property
    def holder(self) -> str:
        """How the elected machine is shown, "" if there is none or it is not known."""
        return self._holder

    def take_news(self, _: Child, news: Elected) -> None:
        """Take what the ledger has learned, and tell the admin process."""
        self._until, self._holder = news.until, news.holder
        _remember(self._delivered, news.delivered)
        for one in news.delivered:
            self._unconfirmed.pop(one, None)
        admin = self._get_admin()
        if admin is not None:
            admin.link.notify(news)

    def take_delivered(self, _: Child, delivered: Delivered) -> None:
        """Take what the admin process has delivered, and have the ledger tell other machines."""
        _remember(self._unconfirmed, delivered.deliveries)
        ledger = self._get_ledger()
        if ledger is not None:
            ledger.link.notify(delivered)

    def begin_ledger(self, ledger: Child, place: str) -> None:
        """Tell another ledger what the one before may not have told other machines.

        `place` is where the election takes place. What was learned elsewhere is forgotten.
        """
        if place != self._place and self._place:
            self._forget()
        self._place = place
        for part in _split(self._unconfirmed):
            ledger.link.notify(Delivered(deliveries=part))

    def begin_admin(self, admin: Child) -> None:
        """Tell another admin process what the one before knew."""
        for part in _split(self._delivered):
            admin.link.notify(Elected(until=0.0, delivered=part))
        admin.link.notify(Elected(until=self._until))

    def _forget(self) -> None:
        self._until, self._holder = 0.0, ""
        self._delivered.clear()
        self._unconfirmed.clear()
        admin = self._get_admin()
        if admin is not None:
            admin.link.notify(Elected(until=0.0))


def _remember(kept: dict[str, None], deliveries: list[str]) -> None:
    kept.update(dict.fromkeys(deliveries))
    while len(kept) > MOST_KEPT:
        del kept[next(iter(kept))]


def _split(kept: dict[str, None]) -> list[list[str]]:
    deliveries = list(kept)
    return [deliveries[at : at + AT_ONCE] for at in range(0, len(deliveries), AT_ONCE)]
