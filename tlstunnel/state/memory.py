"""The counts of one process, in memory: the strategies of the library `limits` over a storage of bounded size."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from limits import RateLimitItem, RateLimitItemPerSecond
from limits.strategies import (
    FixedWindowRateLimiter,
    MovingWindowRateLimiter,
    RateLimiter,
    SlidingWindowCounterRateLimiter,
)

from tlstunnel.state.counters import WITHIN, LimitCheck, LimitResult, Strategy
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
        self._limiters: dict[Strategy, RateLimiter] = {
            "fixed": FixedWindowRateLimiter(self.storage),
            "moving": MovingWindowRateLimiter(self.storage),
            "sliding": SlidingWindowCounterRateLimiter(self.storage),
        }

    async def check(self, checks: Sequence[LimitCheck]) -> list[LimitResult]:
        """See `Counters.check`."""
        return self.check_now(checks)

    def check_now(self, checks: Sequence[LimitCheck]) -> list[LimitResult]:
        """Do as `check`, without a coroutine."""
        results = [self._evaluate(check) for check in checks]
        if not any(result.exceeded and check.enforced for check, result in zip(checks, results, strict=True)):
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
        """Add the windows and blocks of a snapshot. Raises ValueError for what is not one."""
        self.storage.restore(snapshot)

    def _evaluate(self, check: LimitCheck) -> LimitResult:
        """Return the result of this check alone, and begin a block if it is due."""
        key = check.key
        if check.block_for:
            left = self.storage.get_expiry(_block_name(key)) - self._clock()
            if left > 0:
                return LimitResult("blocked", left)
        if check.amount and not self._limiters[check.strategy].test(item := _item(check), key):
            name = item.key_for(key)
            self.storage.protect(name)
            if check.block_for:
                self.storage.incr(_block_name(key), check.block_for)
                self.storage.protect(_block_name(key))
            return LimitResult("limit", max(self._wait(check.strategy, item, name), check.block_for))
        if check.max_tunnels and self.open_tunnels(key) >= check.max_tunnels:
            return LimitResult("tunnels", TUNNEL_WAIT)
        return WITHIN

    def _count(self, check: LimitCheck) -> None:
        if check.amount:
            self._limiters[check.strategy].hit(_item(check), check.key)
        if check.max_tunnels:
            self._tunnels[check.key] = self.open_tunnels(check.key) + 1

    def _wait(self, strategy: Strategy, item: RateLimitItem, name: str) -> float:
        """Return the seconds until the exceeded limit admits a request again.

        The library's `get_window_stats` does not say: for a sliding window it returns when the sum changes next, which
        may be long before that, and as a time of day.
        """
        window = item.get_expiry()
        if strategy == "fixed":
            return self.storage.get_expiry(name) - self._clock()
        if strategy == "moving":
            oldest, _ = self.storage.get_moving_window(name, item.amount, window)
            return oldest + window - self._clock()
        previous, left, current, _ = self.storage.get_sliding_window(name, window)
        if current >= item.amount:  # all in this window, whose share shrinks after its end
            return left + _MOMENT
        return left - (item.amount - current) * window / previous + _MOMENT


def _item(check: LimitCheck) -> RateLimitItem:
    return _make_item(check.amount, check.window, check.strategy)


# Making one takes a microsecond, and there are as many as different limits.
@lru_cache(maxsize=1024)
def _make_item(amount: int, window: int, strategy: Strategy) -> RateLimitItem:
    """Return what the library calls a limit. The namespace keeps the entries of strategies apart, which differ."""
    return RateLimitItemPerSecond(amount, window, namespace=strategy)


def _block_name(key: str) -> str:
    """Return the name of a block, which is stored as a fixed window, so that any storage of `limits` can hold it."""
    return f"block/{key}"
