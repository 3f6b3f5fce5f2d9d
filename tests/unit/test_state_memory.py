"""Counters: each strategy compared with a simple model, eviction, and counting under all limits or none."""

import asyncio
import gc
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from math import ceil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from limits import RateLimitItemPerSecond
from limits.strategies import (
    FixedWindowRateLimiter,
    MovingWindowRateLimiter,
    RateLimiter,
    SlidingWindowCounterRateLimiter,
)

from tests.counters_model import MODELS
from tlstunnel.state.counters import LimitCheck, LimitResult, Strategy
from tlstunnel.state.memory import TUNNEL_WAIT, MemoryCounters
from tlstunnel.state.storage import MAX_KEYS, TIMES_PER_SLOT, BoundedStorage


class Clock:
    """A clock that the test advances, in seconds."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def run_check(counters: MemoryCounters, *checks: LimitCheck) -> list[LimitResult]:
    """Return the results, without a loop, since no method may suspend."""
    try:
        counters.check(checks).send(None)
    except StopIteration as done:
        results: list[LimitResult] = done.value
        return results
    raise AssertionError("it suspended")


# The strategies beside plain models. Quarters of seconds are exact as floats.

steps = st.lists(st.tuples(st.integers(0, 100).map(lambda quarters: quarters / 4), st.sampled_from("ab")), max_size=80)


LIBRARY: dict[Strategy, Callable[[BoundedStorage], RateLimiter]] = {
    "fixed": FixedWindowRateLimiter,
    "moving": MovingWindowRateLimiter,
    "sliding": SlidingWindowCounterRateLimiter,
}


@pytest.mark.parametrize("strategy", MODELS)
@given(steps=steps, most=st.integers(1, 6), window=st.integers(1, 20))
@example(steps=[(0, "a"), (0, "a"), (20, "a"), (0, "a"), (0.25, "a")], most=1, window=20)
def test_each_strategy_admits_as_its_model(
    strategy: Strategy, steps: list[tuple[float, str]], most: int, window: int
) -> None:
    clock = Clock()
    counters = MemoryCounters(clock=clock)
    models = {key: MODELS[strategy](most, window) for key in "ab"}
    for step, key in steps:
        clock.now += step
        (result,) = run_check(counters, LimitCheck(key, most, window, strategy))
        admits = models[key].admits(clock.now)
        assert (not result.exceeded) == admits
        if admits:
            models[key].count(clock.now)


@pytest.mark.parametrize("strategy", LIBRARY)
@given(steps=steps, most=st.integers(1, 6), window=st.integers(1, 20))
def test_the_library_on_the_storage_admits_as_the_model(
    strategy: Strategy, steps: list[tuple[float, str]], most: int, window: int
) -> None:
    clock = Clock()
    limiter = LIBRARY[strategy](BoundedStorage(clock=clock))
    models = {key: MODELS[strategy](most, window) for key in "ab"}
    limit = RateLimitItemPerSecond(most, window, namespace=strategy)
    for step, key in steps:
        clock.now += step
        admits = limiter.test(limit, key)
        assert limiter.hit(limit, key) == admits == models[key].admits(clock.now)
        if admits:
            models[key].count(clock.now)
        assert (limiter.get_window_stats(limit, key).remaining == 0) >= (not admits)


@pytest.mark.parametrize("strategy", MODELS)
@given(steps=steps, most=st.integers(1, 6), window=st.integers(1, 20), start=st.floats(100, 1e7))
@example(steps=[(0, "a"), (0, "a")], most=1, window=1, start=100.000001)
def test_wait_is_exact(
    strategy: Strategy, steps: list[tuple[float, str]], most: int, window: int, start: float
) -> None:
    clock = Clock(start)
    counters = MemoryCounters(clock=clock)
    check = LimitCheck("a", most, window, strategy)
    for step, _ in steps:
        clock.now += step
        (result,) = run_check(counters, check)
        if result.exceeded:
            assert 0 < result.wait <= 2 * window
            refused_at = clock.now
            clock.now = refused_at + result.wait - 0.001
            assert result.wait < 0.001 or run_check(counters, check)[0].exceeded
            clock.now = refused_at + ceil(result.wait)
            (result,) = run_check(counters, check)
            assert not result.exceeded


# What is kept when the capacity is used up.


@given(
    st.lists(st.tuples(st.sampled_from(["incr", "get", "clear"]), st.integers(0, 9).map(str)), max_size=200),
    st.integers(1, 6),
)
def test_least_recently_used_keys_are_evicted_first(calls: list[tuple[str, str]], capacity: int) -> None:
    storage = BoundedStorage(capacity, Clock(), shards=1)
    model: OrderedDict[str, int] = OrderedDict()
    for call, key in calls:
        if call == "clear":
            storage.clear(key)
            model.pop(key, None)
        elif call == "get":
            assert storage.get(key) == model.get(key, 0)
        else:
            model[key] = model.get(key, 0) + 1
            assert storage.incr(key, 60) == model[key]
        if key in model:
            model.move_to_end(key)
        if len(model) > capacity:
            model.popitem(last=False)
        assert {key for key in map(str, range(10)) if key in storage} == set(model)
        assert len(storage) == len(model)


def test_refused_key_survives_a_flood() -> None:
    clock = Clock()
    counters = MemoryCounters(1000, clock)
    mine = LimitCheck("mine", 2, 3600)
    for _ in range(3):
        (result,) = run_check(counters, mine)
    assert result.exceeded
    for number in range(20_000):
        run_check(counters, LimitCheck(f"flood {number}", 2, 3600))
    assert run_check(counters, mine)[0].exceeded
    assert len(counters.storage) <= 1000


def test_block_survives_a_flood() -> None:
    clock = Clock()
    counters = MemoryCounters(1000, clock)
    mine = LimitCheck("mine", 1, 1, block_for=600)
    for _ in range(2):
        (result,) = run_check(counters, mine)
    assert result.exceeded == "limit"
    clock.now += 1
    for number in range(20_000):
        run_check(counters, LimitCheck(f"flood {number}", 2, 3600))
    assert run_check(counters, mine)[0].exceeded == "blocked"


def test_refused_keys_take_half_of_the_capacity_and_are_evicted_in_order() -> None:
    storage = BoundedStorage(10, Clock(), shards=1)
    for number in range(8):
        storage.incr(f"refused {number}", 60)
        storage.protect(f"refused {number}")
    for number in range(20):
        storage.incr(f"flood {number}", 60)
    assert [number for number in range(8) if f"refused {number}" in storage] == [3, 4, 5, 6, 7]
    assert [number for number in range(20) if f"flood {number}" in storage] == [15, 16, 17, 18, 19]


def test_refused_key_is_not_protected_after_it_has_expired() -> None:
    clock = Clock()
    storage = BoundedStorage(10, clock, shards=1)
    storage.incr("refused", 60)
    storage.protect("refused")
    clock.now += 60
    for number in range(10):
        storage.incr(f"flood {number}", 60)
    assert "refused" not in storage
    assert all(f"flood {number}" in storage for number in range(10))


def test_new_window_is_not_protected() -> None:
    clock = Clock()
    storage = BoundedStorage(4, clock, shards=1)
    storage.incr("refused", 60)
    storage.protect("refused")
    clock.now += 60
    storage.incr("refused", 60)
    for number in range(4):
        storage.incr(f"flood {number}", 60)
    assert "refused" not in storage


def test_refused_keys_are_evicted_if_there_are_no_others() -> None:
    storage = BoundedStorage(1, Clock(), shards=1)
    storage.incr("a", 60)
    storage.protect("a")  # half of one rounds down to none
    storage.incr("b", 60)
    assert "b" in storage
    assert len(storage) == 1
    storage.protect("nobody")
    assert len(storage) == 1


def test_moving_windows_take_room_by_their_number_of_requests() -> None:
    clock = Clock()
    storage = BoundedStorage(100, clock, shards=1)
    for key in range(20):
        for _ in range(30 * TIMES_PER_SLOT):
            assert storage.acquire_entry(str(key), 10**6, 3600)
    remembered = sum(storage.get_moving_window(str(key), 10**6, 3600)[1] for key in range(20))
    assert 2 * 30 * TIMES_PER_SLOT <= remembered < 100 * TIMES_PER_SLOT
    clock.now += 3600
    assert storage.acquire_entry("19", 10**6, 3600)
    for number in range(99):
        storage.incr(f"other {number}", 60)
    assert storage.get_moving_window("19", 10**6, 3600) == (clock.now, 1)


def test_moving_window_larger_than_the_capacity_is_evicted() -> None:
    storage = BoundedStorage(4, Clock(), shards=1)
    for _ in range(10 * TIMES_PER_SLOT):
        storage.acquire_entry("a", 10**6, 60)
    assert len(storage) <= 1
    storage.incr("b", 60)
    assert "b" in storage


def test_flood_of_keys_is_bounded_and_invisible_to_the_garbage_collector() -> None:
    storage = BoundedStorage()
    gc.collect()
    before = len(gc.get_objects())
    for number in range(MAX_KEYS + 20_000):
        storage.incr(f"fixed/{number}", 60)
    assert len(gc.get_objects()) < before + 1000
    assert 0.98 * MAX_KEYS < len(storage) <= MAX_KEYS


def test_interface_that_limits_requires() -> None:
    clock = Clock()
    storage = BoundedStorage(clock=clock)
    assert storage.check()
    assert storage.base_exceptions == ()
    assert storage.incr("a", 60, amount=3) == 3
    assert (storage.get("a"), storage.get_expiry("a")) == (3, 1060)
    assert (storage.get("b"), storage.get_expiry("b")) == (0, 1000)
    clock.now += 60
    assert (storage.get("a"), storage.get_expiry("a")) == (0, 1060)
    assert storage.get_moving_window("m", 5, 60) == (1060, 0)
    assert storage.acquire_entry("m", 5, 60, amount=5)
    assert not storage.acquire_entry("m", 5, 60)
    assert storage.get_moving_window("m", 5, 60) == (1060, 5)
    assert storage.acquire_sliding_window_entry("s", 5, 60, amount=4)
    assert storage.get_sliding_window("s", 60) == (0, 20, 4, 80)
    clock.now += 30
    assert storage.get_sliding_window("s", 60) == (4, 50, 0, 110)
    clock.now += 60
    assert storage.get_sliding_window("s", 60) == (0, 50, 0, 110)
    storage.clear_sliding_window("s", 60)
    assert "s" not in storage
    assert storage.reset() == 2
    assert len(storage) == 0


# Several at once.


def test_counted_under_all_or_none() -> None:
    counters = MemoryCounters(clock=Clock())
    mine, shared = LimitCheck("mine", 1, 60), LimitCheck("shared", 3, 60, max_tunnels=9)
    assert [result.exceeded for result in run_check(counters, mine, shared)] == ["", ""]
    for _ in range(5):
        assert [result.exceeded for result in run_check(counters, mine, shared)] == ["limit", ""]
    assert counters.open_tunnels("shared") == 1
    other = LimitCheck("other", 9, 60)
    assert [[result.exceeded for result in run_check(counters, other, shared)] for _ in range(3)] == [
        ["", ""],
        ["", ""],
        ["", "limit"],
    ]
    assert counters.open_tunnels("shared") == 3


def test_exceeded_limit_that_is_not_enforced_lets_others_count() -> None:
    counters = MemoryCounters(clock=Clock())
    loose = LimitCheck("loose", 1, 60, enforced=False)
    strict = LimitCheck("strict", 2, 60)
    overs = [[result.exceeded for result in run_check(counters, loose, strict)] for _ in range(3)]
    assert overs == [["", ""], ["limit", ""], ["limit", "limit"]]


def test_exceeded_limit_that_is_not_enforced_takes_no_tunnel() -> None:
    counters = MemoryCounters(clock=Clock())
    overs = [run_check(counters, LimitCheck("a", max_tunnels=2, enforced=False))[0].exceeded for _ in range(4)]
    assert overs == ["", "", "tunnels", "tunnels"]
    assert counters.open_tunnels("a") == 2


def test_limit_that_is_not_enforced_is_not_counted_if_another_refuses() -> None:
    counters = MemoryCounters(clock=Clock())
    loose = LimitCheck("loose", 2, 60, enforced=False)
    strict = LimitCheck("strict", 1, 60)
    for _ in range(9):
        run_check(counters, loose, strict)
    assert run_check(counters, loose)[0].exceeded == ""
    assert run_check(counters, loose)[0].exceeded == "limit"


def test_block_lasts_its_time_whatever_the_window() -> None:
    clock = Clock()
    counters = MemoryCounters(clock=clock)
    check = LimitCheck("a", 1, 1, block_for=60.5)
    run_check(counters, check)
    assert run_check(counters, check) == [LimitResult("limit", 60.5)]
    clock.now += 60
    assert run_check(counters, check) == [LimitResult("blocked", 0.5)]
    assert run_check(counters, LimitCheck("a", block_for=60.5)) == [LimitResult("blocked", 0.5)]
    clock.now += 0.5
    assert run_check(counters, check) == [LimitResult()]


def test_attempts_do_not_prolong_a_block() -> None:
    clock = Clock()
    counters = MemoryCounters(clock=clock)
    check = LimitCheck("a", 1, 1, block_for=60)
    results = []
    for _ in range(122):
        results += run_check(counters, check)
        clock.now += 0.5
    assert [result.exceeded for result in results] == ["", "limit", *["blocked"] * 119, ""]


def test_wait_covers_both_block_and_window() -> None:
    counters = MemoryCounters(clock=Clock())
    check = LimitCheck("a", 1, 3600, block_for=60)
    run_check(counters, check)
    assert run_check(counters, check) == [LimitResult("limit", 3600)]


@pytest.mark.parametrize("strategy", MODELS)
def test_exact_at_the_limit_with_200_concurrent_checks(strategy: Strategy) -> None:
    clock = Clock(1200.0)
    counters = MemoryCounters(clock=clock)
    check = LimitCheck("a", 30, 60, strategy)

    async def asker() -> bool:
        await asyncio.sleep(0)
        (result,) = await counters.check([check])
        return not result.exceeded

    async def all_at_once() -> int:
        return sum(await asyncio.gather(*(asker() for _ in range(200))))

    assert asyncio.run(all_at_once()) == 30
    clock.now += 59.75
    assert asyncio.run(all_at_once()) == 0
    clock.now += 0.25
    # A sliding window still sees all of the last one, and admits one for each thirtieth of it that has gone.
    assert asyncio.run(all_at_once()) == (0 if strategy == "sliding" else 30)
    clock.now += 6
    assert asyncio.run(all_at_once()) == (3 if strategy == "sliding" else 0)


def test_tunnels_are_exact_with_200_concurrent_checks() -> None:
    counters = MemoryCounters(clock=Clock())
    check = LimitCheck("a", max_tunnels=50)

    async def asker() -> LimitResult:
        await asyncio.sleep(0)
        return (await counters.check([check]))[0]

    async def all_at_once() -> list[LimitResult]:
        return await asyncio.gather(*(asker() for _ in range(200)))

    results = asyncio.run(all_at_once())
    assert results.count(LimitResult()) == 50
    assert results.count(LimitResult("tunnels", TUNNEL_WAIT)) == 150
    counters.return_tunnels(["a"] * 20)
    assert counters.open_tunnels("a") == 30
    assert asyncio.run(all_at_once()).count(LimitResult()) == 20
    counters.return_tunnels(["a"] * 50)
    assert counters.open_tunnels("a") == 0


def test_tunnels_are_never_evicted() -> None:
    counters = MemoryCounters(64, Clock())
    check = LimitCheck("a", max_tunnels=1)
    run_check(counters, check)
    for number in range(1000):
        run_check(counters, LimitCheck(str(number), 1, 60, max_tunnels=1))
    assert run_check(counters, check)[0].exceeded == "tunnels"
    counters.return_tunnels(["a"])
    assert run_check(counters, check)[0].exceeded == ""


def test_too_many_tunnels_do_not_begin_a_block() -> None:
    counters = MemoryCounters(clock=Clock())
    check = LimitCheck("a", 9, 60, max_tunnels=1, block_for=600)
    assert [run_check(counters, check)[0].exceeded for _ in range(3)] == ["", "tunnels", "tunnels"]
    counters.return_tunnels(["a"])
    assert run_check(counters, check)[0].exceeded == ""


def test_returning_a_tunnel_that_was_not_taken_raises() -> None:
    with pytest.raises(KeyError):
        MemoryCounters().return_tunnels(["a"])


def test_open_tunnels_of_several_keys_are_counted() -> None:
    counters = MemoryCounters()
    for key in ("a", "a", "b"):
        run_check(counters, LimitCheck(key, max_tunnels=9))
    assert asyncio.run(counters.count_tunnels(["b", "nobody", "a"])) == [1, 0, 2]


def test_limits_of_one_key_are_counted_apart() -> None:
    counters = MemoryCounters(clock=Clock())
    checks = [LimitCheck("a", 1, 60), LimitCheck("a", 2, 60), LimitCheck("a", 1, 61), LimitCheck("a", 1, 60, "moving")]
    assert [run_check(counters, check)[0].exceeded for check in checks] == ["", "", "", ""]
    assert run_check(counters, checks[0])[0].exceeded == "limit"


# Moving to another process.

CALLS = st.lists(
    st.tuples(st.integers(0, 100), st.sampled_from("abc"), st.sampled_from(list(MODELS)), st.sampled_from([0, 9])),
    max_size=40,
)


@given(before=CALLS, after=CALLS)
def test_a_snapshot_continues_as_if_nothing_had_happened(
    before: list[tuple[int, str, Strategy, int]], after: list[tuple[int, str, Strategy, int]]
) -> None:
    clock = Clock()
    counters = MemoryCounters(clock=clock)
    for seconds, key, strategy, block in before:
        clock.now += seconds
        run_check(counters, LimitCheck(key, 3, 60, strategy, block_for=block))
    restored = MemoryCounters(clock=clock)
    restored.restore(counters.snapshot())
    for seconds, key, strategy, block in after:
        clock.now += seconds
        check = LimitCheck(key, 3, 60, strategy, block_for=block)
        assert run_check(restored, check) == run_check(counters, check)


RESTORE = """
import asyncio, sys
from tlstunnel.state.counters import LimitCheck
from tlstunnel.state.memory import MemoryCounters
counters = MemoryCounters(64_000, clock=lambda: 1000.0)
counters.restore(sys.stdin.buffer.read())
checks = [LimitCheck(f"key {number}", 1, 3600) for number in range(2000)]
print("".join("." if asyncio.run(counters.check([check]))[0].exceeded else "!" for check in checks))
"""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_another_process_with_other_hashes_of_strings_restores_a_snapshot(seed: str) -> None:
    counters = MemoryCounters(64_000, clock=Clock())
    for number in range(1900):
        run_check(counters, LimitCheck(f"key {number}", 1, 3600))
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", RESTORE]
    run = subprocess.run(command, input=counters.snapshot(), capture_output=True, check=True, env=environment)
    assert run.stdout.decode().strip() == "." * 1900 + "!" * 100


def test_a_full_storage_keeps_nearly_all_and_the_order_of_eviction() -> None:
    storage = BoundedStorage(64_000, Clock(), shards=64)
    for number in range(80_000):
        storage.incr(f"key {number}", 60)
    for number in range(79_000, 80_000):
        storage.protect(f"key {number}")
    restored = BoundedStorage(64_000, Clock(), shards=61)  # as spread by other hashes
    restored.restore(storage.snapshot())
    assert 0.95 * len(storage) < len(restored) <= 64_000
    assert all(f"key {number}" in restored for number in range(79_000, 80_000))
    kept = [number for number in range(80_000) if f"key {number}" in restored]
    lost = [number for number in range(80_000) if f"key {number}" in storage and f"key {number}" not in restored]
    assert sum(lost) / len(lost) < sum(kept) / len(kept) - 20_000


def test_a_snapshot_has_nothing_that_has_expired() -> None:
    clock = Clock()
    counters = MemoryCounters(clock=clock)
    empty = len(counters.snapshot())
    for number in range(100):
        run_check(counters, LimitCheck(str(number), 1, 60, block_for=30))
        run_check(counters, LimitCheck(str(number), 1, 60, block_for=30))
    assert len(counters.snapshot()) > empty + 200 * 24
    clock.now += 60
    assert len(counters.snapshot()) == empty


def test_tunnels_that_are_open_already_are_taken_whatever_their_limit() -> None:
    counters = MemoryCounters()
    check = LimitCheck("a", max_tunnels=1)
    counters.take_tunnels(["a", "a"])
    assert counters.tunnels == {"a": 2}
    counters.return_tunnels(["a"])
    assert run_check(counters, check)[0].exceeded == "tunnels"
    counters.return_tunnels(["a"])
    assert run_check(counters, check) == [LimitResult()]
