"""The counts of one process, in memory, in a storage of bounded size.

The strategies are those of the library `limits`, which would admit the same on this storage (a test compares them). To
ask the storage directly takes half of the time.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from tlstunnel.state.counters import WITHIN, LimitCheck, LimitResult
from tlstunnel.state.storage import MAX_KEYS, BoundedStorage

TUNNEL_WAIT = 10.0
"""Seconds that a client with too many tunnels has to wait, since it is unknown when one of them will end."""

# A sliding window admits only after the computed moment, not at it.
_MOMENT = 1e-6


class MemoryCounters:
    """`Counters` of this process alone. They are exact, since no method suspends.

    Open tunnels are counted outside the storage, since an evicted count would stay wrong; their number is bounded by
    the tunnels times their limits. For one event loop. `clock` returns seconds and is monotonic.
    """

    def __init__(self, capacity: int = MAX_KEYS, clock: Callable[[], float] = time.monotonic) -> None:
        self.storage = BoundedStorage(capacity, clock)
        self._clock = clock
        self._tunnels: dict[str, int] = {}

    async def check(self, checks: Sequence[LimitCheck]) -> list[LimitResult]:
        """See `Counters.check`."""
        return self.check_now(checks)

    def check_now(self, checks: Sequence[LimitCheck]) -> list[LimitResult]:
        """Do as `check`, without a coroutine."""
        results = []
        refused = False
        for check in checks:
            result = self._evaluate(check)
            results.append(result)
            if result.exceeded and check.enforced:
                refused = True
        if not refused:
            for check, result in zip(checks, results, strict=True):
                if not result.exceeded:
                    self._count(check)
        return results

    def return_tunnels(self, keys: Sequence[str]) -> None:
        """See `Counters.return_tunnels`. Raises KeyError for a tunnel that was not taken."""
        for key in keys:
            held = self._tunnels[key]
            if held > 1:
                self._tunnels[key] = held - 1
            else:
                del self._tunnels[key]

    def take_tunnels(self, keys: Sequence[str]) -> None:
        """See `Counters.take_tunnels`."""
        for key in keys:
            self._tunnels[key] = self.open_tunnels(key) + 1

    def change_tunnels(self, changes: Mapping[str, int]) -> None:
        """See `SumCounters`."""
        tunnels = self._tunnels
        for key, change in changes.items():
            number = tunnels.get(key, 0) + change
            if number > 0:
                tunnels[key] = number
            elif number == 0:
                tunnels.pop(key, None)
            else:
                raise KeyError(key)

    def open_tunnels(self, key: str) -> int:
        """Return the number of open tunnels under the key."""
        return self._tunnels.get(key, 0)

    @property
    def tunnels(self) -> Mapping[str, int]:
        """The number of open tunnels under each key that has any."""
        return self._tunnels

    async def count_tunnels(self, keys: Sequence[str]) -> list[int]:
        """See `Counters.count_tunnels`."""
        return [self.open_tunnels(key) for key in keys]

    def snapshot(self) -> bytes:
        """Return windows and blocks, for `restore` in another process of this machine. Open tunnels are not in it."""
        return self.storage.snapshot()

    def restore(self, snapshot: bytes) -> None:
        """Have the windows and blocks of a snapshot. Raises ValueError for what is not one."""
        self.storage.restore(snapshot)

    def _evaluate(self, check: LimitCheck) -> LimitResult:
        """Return the result of this check alone, and begin a block if it is due."""
        key = check.key
        if check.block_for:
            left = self.storage.get_expiry(_block_name(key)) - self._clock()
            if left > 0:
                return LimitResult("blocked", left)
        if check.amount and not self._has_room(check, name := _window_name(check)):
            self.storage.protect(name)
            if check.block_for:
                self.storage.incr(_block_name(key), check.block_for)
                self.storage.protect(_block_name(key))
            return LimitResult("limit", max(self._wait(check, name), check.block_for))
        if check.max_tunnels and self._tunnels.get(key, 0) >= check.max_tunnels:
            return LimitResult("tunnels", TUNNEL_WAIT)
        return WITHIN

    def _has_room(self, check: LimitCheck, name: str) -> bool:
        """Return whether one more request is within the amount. The comparisons are those of the library's `test`."""
        if check.strategy == "fixed":
            return self.storage.get(name) < check.amount
        if check.strategy == "moving":
            return self.storage.get_moving_window(name, check.amount, check.window)[1] < check.amount
        previous, left, current, _ = self.storage.get_sliding_window(name, check.window)
        return int(previous * left / check.window + current) < check.amount

    def _count(self, check: LimitCheck) -> None:
        if check.amount:
            name = _window_name(check)
            if check.strategy == "fixed":
                self.storage.incr(name, check.window)
            elif check.strategy == "moving":
                self.storage.acquire_entry(name, check.amount, check.window)
            else:
                self.storage.acquire_sliding_window_entry(name, check.amount, check.window)
        if check.max_tunnels:
            self._tunnels[check.key] = self._tunnels.get(check.key, 0) + 1

    def _wait(self, check: LimitCheck, name: str) -> float:
        """Return the seconds until the exceeded limit admits a request again.

        The library's `get_window_stats` does not say: for a sliding window it returns when the sum changes next, which
        may be long before that, and as a time of day.
        """
        amount, window = check.amount, check.window
        if check.strategy == "fixed":
            return self.storage.get_expiry(name) - self._clock()
        if check.strategy == "moving":
            oldest, _ = self.storage.get_moving_window(name, amount, window)
            return oldest + window - self._clock()
        previous, left, current, _ = self.storage.get_sliding_window(name, window)
        if current >= amount:  # all in this window, whose share shrinks after its end
            return left + _MOMENT
        return left - (amount - current) * window / previous + _MOMENT


def _window_name(check: LimitCheck) -> str:
    """Return what the storage calls a window: as in the library, apart for each amount, window and strategy."""
    return f"{check.strategy}/{check.key}/{check.amount}/{check.window}"


def _block_name(key: str) -> str:
    """Return the name of a block, which is stored as a fixed window, so that any storage of `limits` can hold it."""
    return f"block/{key}"
