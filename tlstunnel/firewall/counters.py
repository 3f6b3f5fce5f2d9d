"""The counters of rate limits, and the interface through which rate limits use them.

`Counters` is the interface: one call checks all limits of a request, so that a store shared by several machines costs
one round trip. `MemoryCounters` keeps the counts of this process: the strategies of the library `limits` with a
`BoundedStorage`, since the library's own storage keeps every key and scans all of them (300 000 keys: 84 MB, 184 ms a
scan).
"""

import math
import struct
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from limits import RateLimitItem
from limits.storage import MovingWindowSupport, SlidingWindowCounterSupport, Storage
from limits.strategies import (
    FixedWindowRateLimiter,
    MovingWindowRateLimiter,
    RateLimiter,
    SlidingWindowCounterRateLimiter,
)

MAX_KEYS = 200_000
"""Keys of all limits together: 50 MB when full, after 1 000 000 distinct keys as well as after 200 000 (measured)."""

SHARDS = 64
"""See `BoundedStorage`."""

TIMES_PER_SLOT = 32
"""A moving window keeps 8 bytes per request: 32 of them take as much memory as an entry of a fixed window."""

TUNNEL_WAIT = 10.0
"""Seconds that a client with too many tunnels has to wait, since it is unknown when one of them will end."""

# A sliding window admits only after the computed moment, not at it.
_MOMENT = 1e-6

Strategy = Literal["fixed", "moving", "sliding"]
Exceeded = Literal["", "limit", "tunnels", "blocked"]


@dataclass(frozen=True, slots=True)
class LimitCheck:
    """A check whether one more request may be counted under `key`.

    `key` is short and stands for one limit and one counted value (a client, a path). A key must not be used with two
    strategies unless the namespaces of their items differ. `item` is the number per window, None for no such limit;
    `max_tunnels` is the number of tunnels open at once, 0 for no such limit. A key that exceeds `item` is blocked for
    `block_for` seconds. Without `item` and `max_tunnels`, only an existing block is checked. A limit that is not
    `enforced` is counted, but never keeps the request from being counted by others.
    """

    key: str
    item: RateLimitItem | None = None
    strategy: Strategy = "fixed"
    max_tunnels: int = 0
    block_for: float = 0.0
    enforced: bool = True


@dataclass(frozen=True, slots=True)
class LimitResult:
    """`exceeded` is what was exceeded, or "". `wait` is the number of seconds after which a retry may succeed."""

    exceeded: Exceeded = ""
    wait: float = 0.0


WITHIN = LimitResult()


class Counters(Protocol):
    """Counts the requests and open tunnels of rate limits."""

    async def check(self, checks: Sequence[LimitCheck]) -> list[LimitResult]:
        """Check one request against all its limits at once, and count it under all of them or none.

        If no enforced limit is exceeded, the request is counted under each limit that is not exceeded, and a tunnel is
        taken under each of these with `max_tunnels`, until `return_tunnels`. Otherwise nothing is counted or taken, so
        that a client over its own limit cannot use up one that it shares with others.
        """

    def return_tunnels(self, keys: Sequence[str]) -> None:
        """Return one tunnel under each key. Never waits, since it is called where a tunnel ends, outside any task."""


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

    def open_tunnels(self, key: str) -> int:
        """Return the number of open tunnels under the key."""
        return self._tunnels.get(key, 0)

    def _evaluate(self, check: LimitCheck) -> LimitResult:
        """Return the result of this check alone, and begin a block if it is due."""
        key, item = check.key, check.item
        if check.block_for:
            left = self.storage.get_expiry(_block_name(key)) - self._clock()
            if left > 0:
                return LimitResult("blocked", left)
        if item is not None and not self._limiters[check.strategy].test(item, key):
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
        if check.item is not None:
            self._limiters[check.strategy].hit(check.item, check.key)
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


def _block_name(key: str) -> str:
    """Return the name of a block, which is stored as a fixed window, so that any storage of `limits` can hold it."""
    return f"block/{key}"


# The entry of a key: the time from which it counts nothing, its count, and the count of the window before. For a moving
# window the times of the admitted requests follow, oldest first, 8 bytes each. Entries are bytes, which the garbage
# collector does not visit: with 200 000 tuples or objects, a full collection takes 20 ms or more (measured).
_COUNTS = struct.Struct("dqq")


def _count_slots(entry: bytes) -> int:
    """Return how much of a shard's capacity an entry takes."""
    return 1 + (len(entry) - _COUNTS.size) // (8 * TIMES_PER_SLOT)


def _expiry(entry: bytes) -> float:
    until: float = _COUNTS.unpack_from(entry)[0]
    return until


class _Shard:
    """A part of a storage's keys, with at most `capacity` slots. The least recently used keys are evicted first.

    Protected keys are evicted after the others as long as they count something, up to half of the capacity.
    """

    __slots__ = ("_capacity", "_clock", "_protected", "_recent", "_slots")

    def __init__(self, capacity: int, clock: Callable[[], float]) -> None:
        self._capacity = capacity
        self._clock = clock
        self._slots = 0
        # Least recently used first. Not OrderedDict: with 200 000 keys it prolongs a full collection by 60 ms, whatever
        # the values (measured). A dict is slower at finding its first key after removals, which matters little in a
        # small shard.
        self._recent: dict[str, bytes] = {}
        self._protected: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self._recent) + len(self._protected)

    def __contains__(self, key: str) -> bool:
        return key in self._recent or key in self._protected

    def find(self, key: str) -> bytes | None:
        """Return the entry of the key, or None, and make it the most recently used."""
        for entries in (self._recent, self._protected):
            entry = entries.pop(key, None)
            if entry is not None:
                entries[key] = entry
                return entry
        return None

    def put(self, key: str, entry: bytes) -> None:
        """Set the entry of the key. Evicts an amortised one or two, since an entry grows by at most one slot."""
        now = self._clock()
        protected = self._protected.pop(key, None)
        old = self._recent.pop(key, None) if protected is None else protected
        (self._protected if protected and _expiry(protected) > now else self._recent)[key] = entry
        self._slots += _count_slots(entry) - (_count_slots(old) if old else 0)
        while self._slots > self._capacity:
            oldest = next(iter(self._protected.values()), None)
            leaving = self._recent if self._recent and not (oldest and _expiry(oldest) <= now) else self._protected
            self._slots -= _count_slots(leaving.pop(next(iter(leaving))))

    def remove(self, key: str) -> None:
        entry = self._recent.pop(key, None) or self._protected.pop(key, None)
        if entry:
            self._slots -= _count_slots(entry)

    def clear(self) -> None:
        self._recent.clear()
        self._protected.clear()
        self._slots = 0

    def protect(self, key: str) -> None:
        entry = self._recent.pop(key, None)
        if entry is None:
            return
        self._protected[key] = entry
        if len(self._protected) > self._capacity // 2:
            oldest = next(iter(self._protected))
            self._recent[oldest] = self._protected.pop(oldest)


class BoundedStorage(Storage, MovingWindowSupport, SlidingWindowCounterSupport):
    """A storage for the library `limits` with at most `capacity` keys. The least recently used are evicted first.

    It has no threads and no timers and never scans all keys: a call takes some microseconds, however many keys there
    are. Expired keys stay until their room is needed. A moving window takes the room of another key for each 32
    requests in it, so memory is bounded. The keys are spread over `shards`, since a table that grows is copied: one of
    200 000 keys blocked the loop for 20 ms now and then, 64 smaller ones for less than 1 ms (measured). A key has one
    kind of window, which the namespace of its item ensures.

    A client that can choose keys can evict those of others. So a refused key is protected until it expires, up to half
    of the capacity: evicting it takes as many other refused keys, each with its limit used up. A key that was not
    refused is evicted by other keys for half of the capacity, each at the price of a handshake. The client gains no
    more than the key's limit once again.
    """

    STORAGE_SCHEME = None

    def __init__(
        self, capacity: int = MAX_KEYS, clock: Callable[[], float] = time.monotonic, shards: int = SHARDS
    ) -> None:
        super().__init__()
        self._clock = clock
        self._shards = tuple(_Shard(capacity // shards, clock) for _ in range(shards))

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def __contains__(self, key: str) -> bool:
        return key in self._shard(key)

    def protect(self, key: str) -> None:
        """Evict this key, which was refused, after those that were not. An unknown key is ignored."""
        self._shard(key).protect(key)

    @property
    def base_exceptions(self) -> tuple[type[Exception], ...]:
        """The exceptions that mean a failure of the storage: none, since it cannot fail."""
        return ()

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Count in a fixed window, which begins with the first count and lasts `expiry` seconds."""
        now = self._clock()
        ends, count, _ = self._counts(key)
        if ends <= now:
            ends, count = now + expiry, 0
        self._shard(key).put(key, _COUNTS.pack(ends, count + amount, 0))
        return count + amount

    def get(self, key: str) -> int:
        """Return the count of a fixed window."""
        ends, count, _ = self._counts(key)
        return count if ends > self._clock() else 0

    def get_expiry(self, key: str) -> float:
        """Return when a fixed window ends, by the clock; now, if there is none."""
        ends, _, _ = self._counts(key)
        return max(ends, self._clock())

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count in a moving window, if the last `expiry` seconds have room. Return whether they had."""
        now = self._clock()
        times = self._times(key, now, expiry)
        if len(times) + amount > limit:
            return False
        times.extend([now] * amount)
        self._shard(key).put(key, _COUNTS.pack(now + expiry, 0, 0) + times.tobytes())
        return True

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """Return the time of the oldest request in the last `expiry` seconds (now, if none), and their number."""
        now = self._clock()
        times = self._times(key, now, expiry)
        return (times[0] if times else now), len(times)

    def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count in a sliding window, if it has room. The window before counts by its share that overlaps."""
        previous, previous_left, current, _ = self.get_sliding_window(key, expiry)
        if int(previous * previous_left / expiry + current) + amount > limit:
            return False
        ends = _end_of_window(self._clock(), expiry)
        self._shard(key).put(key, _COUNTS.pack(ends + expiry, current + amount, previous))
        return True

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """Return the count of the window before, the seconds for which it still counts, and both of this window.

        Windows are aligned to the clock.
        """
        now = self._clock()
        ends = _end_of_window(now, expiry)
        counts_until, current, previous = self._counts(key)
        if counts_until == ends:  # the last request was counted in the window before
            current, previous = 0, current
        elif counts_until < ends:
            current = previous = 0
        return previous, ends - now, current, ends - now + expiry

    def clear_sliding_window(self, key: str, expiry: int) -> None:
        """Forget a key."""
        self.clear(key)

    def clear(self, key: str) -> None:
        """Forget a key."""
        self._shard(key).remove(key)

    def check(self) -> bool:
        """Return whether the storage is available: always."""
        return True

    def reset(self) -> int:
        """Forget all keys, and return how many there were."""
        number = len(self)
        for shard in self._shards:
            shard.clear()
        return number

    def _shard(self, key: str) -> _Shard:
        # Python's hash of a string is salted, so clients cannot choose a shard.
        return self._shards[hash(key) % len(self._shards)]

    def _counts(self, key: str) -> tuple[float, int, int]:
        until, count, previous = _COUNTS.unpack_from(self._shard(key).find(key) or _NOTHING)
        return until, count, previous

    def _times(self, key: str, now: float, window: int) -> "array[float]":
        """Return the times of the requests in a moving window."""
        entry = self._shard(key).find(key) or _NOTHING
        times = array("d", entry[_COUNTS.size :])
        # The same sum as in `_wait`: a difference would be rounded in another way.
        del times[: bisect_right(times, now, key=lambda time: time + window)]
        return times


_NOTHING = _COUNTS.pack(-math.inf, 0, 0)


def _end_of_window(now: float, window: int) -> float:
    return (now // window + 1) * window
