"""What rate limits count in, and the one small interface through which they ask it.

`Counters` is that interface: everything that one request has to ask goes in one call, so that a storage across machines
costs one trip. `MemoryCounters` is the one of this process: the strategies of `limits` on `BoundedStorage`, since the
storage that `limits` has itself keeps every key and looks through all of them (300 000 keys: 84 MB, 184 ms a look).
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
"""Keys of all limits together: 50 MB when full, after 1 000 000 distinct keys as after 200 000 (measured)."""

SHARDS = 64
"""See `BoundedStorage`."""

TIMES_PER_SLOT = 32
"""A moving window keeps 8 bytes a request: 32 of them take what an entry of a fixed window takes."""

TUNNEL_WAIT = 10.0
"""Seconds that a client with too many tunnels is told to wait: nobody knows when one of them ends."""

# A sliding window admits only after the moment that the sum gives, not at it.
_MOMENT = 1e-6

Strategy = Literal["fixed", "moving", "sliding"]
Exceeded = Literal["", "limit", "tunnels", "blocked"]


@dataclass(frozen=True, slots=True)
class LimitCheck:
    """Whether one more may be counted under `key`.

    `key` stands for one limit and one of those it counts (a client, a path); it is short, and the same key is never
    asked about with two strategies unless the item's namespace tells them apart. `item` is the number in a time, None
    for none; `max_tunnels` how many may be held at once, 0 for any number. Whoever is over the item's number is
    refused for `block_for` seconds from then on. Without item and `max_tunnels` the check is only whether that is
    going on. What is not `enforced` is counted and never keeps others from being counted.
    """

    key: str
    item: RateLimitItem | None = None
    strategy: Strategy = "fixed"
    max_tunnels: int = 0
    block_for: float = 0.0
    enforced: bool = True


@dataclass(frozen=True, slots=True)
class LimitResult:
    """`over` is empty, or what was exceeded; `wait` then says in how many seconds it is worth asking again."""

    over: Exceeded = ""
    wait: float = 0.0


WITHIN = LimitResult()


class Counters(Protocol):
    """Where limits are counted."""

    async def check(self, checks: Sequence[LimitCheck]) -> list[LimitResult]:
        """Judge one request by all its limits at once, and count it by all or by none.

        When no enforced check is over, the request is counted under each that is not over, and a tunnel is taken
        under each that has `max_tunnels` (to be given back by `release`). Otherwise nothing is counted or taken: else
        someone over a limit of his own could use up one that he shares with others.
        """

    def return_tunnels(self, keys: Sequence[str]) -> None:
        """Give back one tunnel under each key. Never waits: it is called where a tunnel ends, outside any task."""


class MemoryCounters:
    """`Counters` of this process alone, exact: nothing in here suspends.

    Tunnels are counted beside the storage, since a count that is evicted is wrong for ever: they are as many as there
    are tunnels, times their limits. For one event loop; `clock` gives seconds and never goes back.
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
        if not any(result.over and check.enforced for check, result in zip(checks, results, strict=True)):
            for check, result in zip(checks, results, strict=True):
                if not result.over:
                    self._count(check)
        return results

    def return_tunnels(self, keys: Sequence[str]) -> None:
        """See `Counters.return_tunnels`. Raises KeyError for what was not taken."""
        for key in keys:
            held = self._tunnels[key]
            if held > 1:
                self._tunnels[key] = held - 1
            else:
                del self._tunnels[key]

    def open_tunnels(self, key: str) -> int:
        """How many tunnels are held under the key."""
        return self._tunnels.get(key, 0)

    def _evaluate(self, check: LimitCheck) -> LimitResult:
        """What is true of the check alone; a block begins here."""
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
        """In how many seconds the limit, which is used up, admits one again.

        Not by the library's `get_window_stats`: of a sliding window it tells when the sum next changes, which may be
        long before it admits, and in the time of day.
        """
        window = item.get_expiry()
        if strategy == "fixed":
            return self.storage.get_expiry(name) - self._clock()
        if strategy == "moving":
            oldest, _ = self.storage.get_moving_window(name, item.amount, window)
            return oldest + window - self._clock()
        previous, left, current, _ = self.storage.get_sliding_window(name, window)
        if current >= item.amount:  # all of it in this window, which begins to fade when it ends
            return left + _MOMENT
        return left - (item.amount - current) * window / previous + _MOMENT


def _block_name(key: str) -> str:
    """The name under which a block is a fixed window, so that any storage of `limits` can hold it."""
    return f"block/{key}"


# What is kept of a key: when it has come to count nothing, its count, that of the window before; behind them, of a
# moving window, the times of what was admitted, 8 bytes each, oldest first. Bytes, since the garbage collector never
# looks at them: 200 000 tuples or objects hold the loop for 20 ms and more at a full collection (measured).
_COUNTS = struct.Struct("dqq")


def _count_slots(entry: bytes) -> int:
    """How much of a shard's capacity an entry takes."""
    return 1 + (len(entry) - _COUNTS.size) // (8 * TIMES_PER_SLOT)


def _expiry(entry: bytes) -> float:
    until: float = _COUNTS.unpack_from(entry)[0]
    return until


class _Shard:
    """Some of a storage's keys, at most `capacity` slots of them; the least recently used leave first.

    Those that were refused (`protect`) leave after the others while they count for something, up to half of the
    capacity.
    """

    __slots__ = ("_capacity", "_clock", "_protected", "_recent", "_slots")

    def __init__(self, capacity: int, clock: Callable[[], float]) -> None:
        self._capacity = capacity
        self._clock = clock
        self._slots = 0
        # Least recently used first. Not OrderedDict: with 200 000 keys it holds a full collection for 60 ms, whatever
        # the values (measured). What a dict is worse at, finding its first key after removals, is little on a short
        # shard.
        self._recent: dict[str, bytes] = {}
        self._protected: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self._recent) + len(self._protected)

    def __contains__(self, key: str) -> bool:
        return key in self._recent or key in self._protected

    def find(self, key: str) -> bytes | None:
        """What there is of the key, which is now the most recently used."""
        for entries in (self._recent, self._protected):
            entry = entries.pop(key, None)
            if entry is not None:
                entries[key] = entry
                return entry
        return None

    def put(self, key: str, entry: bytes) -> None:
        """Set what there is of the key. Makes room in an amortised step or two: an entry grows by one slot at most."""
        now = self._clock()
        protected = self._protected.pop(key, None)
        old = self._recent.pop(key, None) if protected is None else protected
        (self._protected if protected and _expiry(protected) > now else self._recent)[key] = entry
        self._slots += _count_slots(entry) - (_count_slots(old) if old else 0)
        while self._slots > self._capacity:
            longest = next(iter(self._protected.values()), None)
            leaving = self._recent if self._recent and not (longest and _expiry(longest) <= now) else self._protected
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
            longest = next(iter(self._protected))
            self._recent[longest] = self._protected.pop(longest)


class BoundedStorage(Storage, MovingWindowSupport, SlidingWindowCounterSupport):
    """A storage for `limits` that holds at most `capacity` keys; the least recently used leave first.

    No threads, no timers, no look at all keys: a call takes some microseconds, however many keys there are. What has
    expired stays until its room is needed. A moving window takes one key's room more for each 32 requests it
    remembers, so that memory is bounded however many there are. The keys are spread over `shards`, since a
    table that grows is copied:
    one of 200 000 keys held the loop for 20 ms every now and then, 64 of them for less than one (measured). A key has
    one kind of window: `limits` tells them apart by the namespace of an item.

    Whoever can choose keys can push others out. A key that was refused is therefore protected (`protect`), up to
    half of the capacity, until its time is over: to be forgotten it takes as many other refused keys, each with its
    limit used up. A key that was not refused yet is forgotten after half the capacity in other keys, each at the price
    of a handshake, and what is gained is what that key may do in a window.
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
        """Let this key, which was refused, leave after those that were not. No key, no effect."""
        self._shard(key).protect(key)

    @property
    def base_exceptions(self) -> tuple[type[Exception], ...]:
        """What `limits` should take for a failure of the storage: nothing here fails."""
        return ()

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Count in a fixed window, which begins with the first that is counted and lasts `expiry` seconds."""
        now = self._clock()
        ends, count, _ = self._counts(key)
        if ends <= now:
            ends, count = now + expiry, 0
        self._shard(key).put(key, _COUNTS.pack(ends, count + amount, 0))
        return count + amount

    def get(self, key: str) -> int:
        """The count of a fixed window."""
        ends, count, _ = self._counts(key)
        return count if ends > self._clock() else 0

    def get_expiry(self, key: str) -> float:
        """When a fixed window ends, in the clock's time; now, if there is none."""
        ends, _, _ = self._counts(key)
        return max(ends, self._clock())

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count in a moving window, if the last `expiry` seconds have room for it."""
        now = self._clock()
        times = self._times(key, now, expiry)
        if len(times) + amount > limit:
            return False
        times.extend([now] * amount)
        self._shard(key).put(key, _COUNTS.pack(now + expiry, 0, 0) + times.tobytes())
        return True

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """When the oldest in the last `expiry` seconds was counted (now, if there is none), and how many there are."""
        now = self._clock()
        times = self._times(key, now, expiry)
        return (times[0] if times else now), len(times)

    def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count in a sliding window, if it has room: the window before counts by the share of it that is in view."""
        previous, previous_left, current, _ = self.get_sliding_window(key, expiry)
        if int(previous * previous_left / expiry + current) + amount > limit:
            return False
        ends = _end_of_window(self._clock(), expiry)
        self._shard(key).put(key, _COUNTS.pack(ends + expiry, current + amount, previous))
        return True

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """The count before and the seconds for which it still counts, the count now and the seconds likewise.

        Windows are aligned to the clock.
        """
        now = self._clock()
        ends = _end_of_window(now, expiry)
        counts_until, current, previous = self._counts(key)
        if counts_until == ends:  # the last was counted in the window before
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
        """Whether the storage is there: always."""
        return True

    def reset(self) -> int:
        """Forget everything, and say how many keys that were."""
        number = len(self)
        for shard in self._shards:
            shard.clear()
        return number

    def _shard(self, key: str) -> _Shard:
        # Of a string, Python's hash is salted: nobody chooses a shard.
        return self._shards[hash(key) % len(self._shards)]

    def _counts(self, key: str) -> tuple[float, int, int]:
        until, count, previous = _COUNTS.unpack_from(self._shard(key).find(key) or _NOTHING)
        return until, count, previous

    def _times(self, key: str, now: float, window: int) -> "array[float]":
        """The times that a moving window still remembers."""
        entry = self._shard(key).find(key) or _NOTHING
        times = array("d", entry[_COUNTS.size :])
        # The same sum that tells how long to wait: a difference would be rounded otherwise.
        del times[: bisect_right(times, now, key=lambda time: time + window)]
        return times


_NOTHING = _COUNTS.pack(-math.inf, 0, 0)


def _end_of_window(now: float, window: int) -> float:
    return (now // window + 1) * window
