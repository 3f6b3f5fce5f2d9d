"""A storage of bounded size for the library `limits`.

The library's own storage in memory keeps every key and scans all of them (300 000 keys: 84 MB, 184 ms a scan).

Tested by tests/unit/test_state_memory.py.
"""

import math
import struct
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable
from itertools import zip_longest

import msgspec
from limits.storage import MovingWindowSupport, SlidingWindowCounterSupport, Storage

MAX_KEYS = 200_000
"""Keys of all limits together: 50 MB when full, after 1 000 000 distinct keys as well as after 200 000 (measured)."""

SHARDS = 64
"""See `BoundedStorage`."""

TIMES_PER_SLOT = 32
"""A moving window keeps 8 bytes per request: 32 of them take as much memory as an entry of a fixed window."""

# The entry of a key: the time from which it counts nothing, its count, and the count of the window before. For a moving
# window the times of the admitted requests follow, oldest first, 8 bytes each. Entries are bytes, which the garbage
# collector does not visit: with 200 000 tuples or objects, a full collection takes 20 ms or more (measured).
_COUNTS = struct.Struct("dqq")
_EXPIRY = struct.Struct("d")


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
        if self._slots > self._capacity:
            self._evict()

    def _evict(self) -> None:
        now = self._clock()
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

    def list_entries(self, now: float) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """Return the entries that count something, the protected ones and the others."""
        expiry = _EXPIRY.unpack_from
        protected, recent = (
            {key: entry for key, entry in entries.items() if expiry(entry)[0] > now}
            for entries in (self._protected, self._recent)
        )
        return protected, recent

    def load(self, protected: dict[str, bytes], recent: dict[str, bytes]) -> None:
        """Have these entries, each least recently used first, and no others. Evicts what exceeds the capacity."""
        self._protected, self._recent = protected, recent
        self._slots = 0
        for entries in (protected, recent):
            plain = sum(map(len, entries.values())) == len(entries) * _COUNTS.size  # no moving windows, which is fast
            self._slots += len(entries) if plain else sum(map(_count_slots, entries.values()))
        while len(protected) > self._capacity // 2:
            oldest = next(iter(protected))
            recent[oldest] = protected.pop(oldest)
        self._evict()


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

    def snapshot(self) -> bytes:
        """Return all entries that still count something, for `restore` in another process of this machine."""
        now = self._clock()
        return msgspec.msgpack.encode([shard.list_entries(now) for shard in self._shards])

    def restore(self, snapshot: bytes) -> None:
        """Have the entries of a snapshot, which must be of the same clock. Raises ValueError for what is not one.

        The order of eviction is about the same. In a full storage some of the least recently used are evicted, since
        another process spreads the keys in another way (1 % of them, measured).
        """
        try:
            shards = msgspec.msgpack.decode(snapshot, type=list[tuple[dict[str, bytes], dict[str, bytes]]])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(str(error)) from None
        number = len(self._shards)
        loaded: list[tuple[dict[str, bytes], dict[str, bytes]]] = [({}, {}) for _ in self._shards]
        for kind in (0, 1):
            for shard in shards:
                if wrong := [size for size in set(map(len, shard[kind].values())) if size < _COUNTS.size or size % 8]:
                    raise ValueError(f"an entry of {wrong[0]} bytes")
            # By turns, so that the least recently used of all shards come first.
            for turn in zip_longest(*(shard[kind].items() for shard in shards)):
                for item in turn:
                    if item is not None:
                        key, entry = item
                        loaded[hash(key) % number][kind][key] = entry
        for mine, (protected, recent) in zip(self._shards, loaded, strict=True):
            mine.load(protected, recent)

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
