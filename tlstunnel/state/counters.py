"""What is asked of counters, and the interface through which it is asked.

One call checks all limits of a request, so that a store shared by several processes or machines costs one round trip.

Tested by tests/unit/test_state_memory.py.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Protocol

import msgspec

from tlstunnel.errors import TlstunnelError

Strategy = Literal["fixed", "moving", "sliding"]
Exceeded = Literal["", "limit", "tunnels", "blocked"]

MAX_KEY = 128
"""The longest key, in characters. Ours have 40: what is counted is hashed."""

MAX_AMOUNT = 10**15 - 1
"""The largest number per window, since it is sent as an Integer of RFC 9651 (section 3.3.1)."""

MAX_MOVING = 1_000
"""The largest number per moving window, which keeps the time of each request in the window, 8 bytes each."""

MAX_SECONDS = 366 * 86_400
"""The longest window, and the longest block."""

MAX_TUNNELS = 1 << 20
"""The largest number of tunnels under one key."""

Key = Annotated[str, msgspec.Meta(max_length=MAX_KEY)]


class LimitCheck(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A check whether one more request may be counted under `key`.

    `key` is short and stands for one limit and one counted value (a client, a path). `amount` is the number per
    `window` seconds, 0 for no such limit; a key is counted apart for each amount, window and strategy. `max_tunnels` is
    the number of tunnels open at once, 0 for no such limit. A key that exceeds its amount is blocked for `block_for`
    seconds. Without `amount` and `max_tunnels`, only an existing block is checked. A limit that is not `enforced` is
    counted, but never keeps the request from being counted by others.

    The fields, their order and their bounds are part of the ledger's protocol (`state/wire.py`).
    """

    key: Key
    amount: Annotated[int, msgspec.Meta(ge=0, le=MAX_AMOUNT)] = 0
    window: Annotated[int, msgspec.Meta(ge=0, le=MAX_SECONDS)] = 0
    strategy: Strategy = "fixed"
    max_tunnels: Annotated[int, msgspec.Meta(ge=0, le=MAX_TUNNELS)] = 0
    block_for: Annotated[float, msgspec.Meta(ge=0.0, le=MAX_SECONDS)] = 0.0
    enforced: bool = True

    @property
    def possible(self) -> bool:
        """Whether it can be counted. The bounds of the fields do not say that an amount needs a window."""
        return not self.amount or (self.window > 0 and (self.strategy != "moving" or self.amount <= MAX_MOVING))


class LimitResult(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`exceeded` is what was exceeded, or "". `wait` is the number of seconds after which a retry may succeed.

    `wait` may be a moment below 0.
    """

    exceeded: Exceeded = ""
    wait: Annotated[float, msgspec.Meta(ge=-1.0, le=2.0 * MAX_SECONDS)] = 0.0


WITHIN = LimitResult()


class CountersUnavailable(TlstunnelError):
    """The counts cannot be reached, and the configuration says to refuse what cannot be counted."""


class Counters(Protocol):
    """Counts the requests and open tunnels of rate limits."""

    async def check(self, checks: Sequence[LimitCheck]) -> list[LimitResult]:
        """Check one request against all its limits at once, and count it under all of them or none.

        If no enforced limit is exceeded, the request is counted under each limit that is not exceeded, and a tunnel is
        taken under each of these with `max_tunnels`, until `return_tunnels`. Otherwise nothing is counted or taken, so
        that a client over its own limit cannot use up one that it shares with others.

        Raises CountersUnavailable. Then nothing is counted or taken.
        """

    def return_tunnels(self, keys: Sequence[str]) -> None:
        """Return one tunnel under each key. Never waits, since it is called where a tunnel ends, outside any task."""

    def take_tunnels(self, keys: Sequence[str]) -> None:
        """Take one tunnel under each key, whatever its limit, for tunnels that are open already. Never waits."""

    async def count_tunnels(self, keys: Sequence[str]) -> list[int]:
        """Return the number of open tunnels under each key. Raises CountersUnavailable."""


class SumCounters(Counters, Protocol):
    """What a ledger counts in, for several processes at once."""

    def change_tunnels(self, changes: Mapping[str, int]) -> None:
        """Take so many tunnels under each key, or return them if the number is negative. Never waits.

        Takes as long for a million tunnels under one key as for one. Raises KeyError for tunnels that were not taken.
        """


def find_taken(checks: Sequence[LimitCheck], results: Sequence[LimitResult]) -> list[str]:
    """Return the keys under which `Counters.check` has taken a tunnel, by its results."""
    taken = []
    for check, result in zip(checks, results, strict=True):
        if result.exceeded:
            if check.enforced:
                return []
        elif check.max_tunnels:
            taken.append(check.key)
    return taken
