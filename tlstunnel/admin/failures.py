"""How often wrong tokens were tried, by client and in all.

Too many are refused with 429 and logged no more, but a valid token is always accepted: tokens are too long to be
guessed, and a limit that also stops who has one would let anybody lock the operator out.

Tested by tests/unit/test_admin_access.py.
"""

from collections import OrderedDict
from collections.abc import Callable

WINDOW = 60.0
"""Seconds."""

MOST_OF_CLIENT = 10
"""Wrong tokens of a client in a window."""

MOST = 100
"""Wrong tokens of all clients in a window."""

MOST_CLIENTS = 1_000
"""Clients that are counted one by one."""


class Failures:
    """Counts in fixed windows."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self._all = 0
        self._clients: OrderedDict[str, int] = OrderedDict()

    def add(self, client: str) -> float:
        """Count a wrong token; return after how many seconds the client may try again, 0 if at once."""
        now = self._clock()
        if now - self._began >= WINDOW:
            self._began, self._all = now, 0
            self._clients.clear()
        self._all += 1
        count = self._clients[client] = self._clients.pop(client, 0) + 1
        if len(self._clients) > MOST_CLIENTS:
            self._clients.popitem(last=False)
        if count > MOST_OF_CLIENT or self._all > MOST:
            return max(self._began + WINDOW - now, 1.0)
        return 0.0
