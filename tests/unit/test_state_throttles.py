"""Throttles: above the rate 429, for a time, for a site or for addresses; nothing without them, or without counts."""

import asyncio
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.handshake.refusal import Refusal
from tlstunnel.state.counters import Counters, CountersUnavailable, LimitCheck, LimitResult
from tlstunnel.state.memory import MemoryCounters
from tlstunnel.state.throttles import ThrottleRule, Throttles


class Clock:
    """A clock that the test advances, in seconds."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Case:
    """Throttles that count here, at a time that the test sets."""

    def __init__(self, *rules: ThrottleRule) -> None:
        self.clock = Clock()
        self.counters = MemoryCounters(clock=self.clock)
        self.throttles = Throttles(lambda: self.counters, self.clock)
        self.throttles.replace(rules)

    def check(self, ip: str = "192.0.2.1", site: str = "a.test") -> Refusal | None:
        return asyncio.run(self.throttles.check(site, ip))

    def count_passed(self, number: int, ip: str = "192.0.2.1", site: str = "a.test") -> int:
        return sum(self.check(ip, site) is None for _ in range(number))


RULE = ThrottleRule(id=1, site="a.test", amount=5, window=10, until=1060.0)


def test_handshakes_above_the_rate_get_429_and_retry_after() -> None:
    case = Case(RULE)
    assert case.count_passed(5) == 5
    refusal = case.check("2001:db8::1")
    assert refusal is not None
    assert (refusal.status, refusal.reason) == (429, "throttled")
    (name, value), *more = refusal.fields
    assert (name, more) == (b"Retry-After", [])
    case.clock.now += int(value)
    assert case.count_passed(9) == 5


def test_other_sites_are_not_affected() -> None:
    case = Case(RULE)
    assert case.count_passed(100, site="b.test") == 100


def test_a_throttle_ends_by_itself() -> None:
    case = Case(RULE)
    assert case.count_passed(100) == 5
    case.clock.now = 1060.0
    assert case.count_passed(100) == 100


def test_a_throttle_of_addresses_is_for_them_together() -> None:
    case = Case(
        ThrottleRule(id=1, site="a.test", amount=5, window=10, until=1060.0, addresses=("192.0.2.1", "2001:db8::/64"))
    )
    assert case.count_passed(100, "192.0.2.2") == 100
    assert case.count_passed(3, "::ffff:192.0.2.1") == 3
    assert case.count_passed(9, "2001:db8::7") == 2
    assert case.count_passed(9, "") == 9


def test_what_is_replaced_holds_no_more() -> None:
    case = Case(RULE)
    assert case.throttles
    assert case.count_passed(9) == 5
    case.throttles.replace([])
    assert not case.throttles
    assert case.count_passed(9) == 9


def test_the_same_throttle_again_goes_on_counting() -> None:
    case = Case(RULE)
    assert case.count_passed(9) == 5
    case.throttles.replace([RULE])
    assert case.count_passed(9) == 0
    # On another machine it has another number.
    case.throttles.replace([RULE, msgspec.structs.replace(RULE, id=2)])
    assert case.count_passed(9) == 0
    case.throttles.replace([msgspec.structs.replace(RULE, id=3, amount=6)])
    assert case.count_passed(9) == 6


def test_several_throttles_of_a_site_all_hold() -> None:
    case = Case(RULE, ThrottleRule(id=2, site="a.test", amount=2, window=10, until=1010.0, addresses=("192.0.2.9",)))
    assert case.count_passed(9, "192.0.2.9") == 2
    assert case.count_passed(9) == 3


def test_an_address_that_is_none_is_left_out() -> None:
    case = Case(ThrottleRule(id=1, site="a.test", amount=5, window=10, until=1060.0, addresses=("nonsense",)))
    assert case.count_passed(9) == 9


def test_what_cannot_be_counted_is_not_refused() -> None:
    class Unreachable(MemoryCounters):
        async def check(self, checks: Sequence[LimitCheck]) -> list[LimitResult]:
            raise CountersUnavailable("out of reach")

    throttles = Throttles(Unreachable)
    throttles.replace([ThrottleRule(id=1, site="a.test", amount=1, window=10, until=1e12)])
    assert [asyncio.run(throttles.check("a.test", "192.0.2.1")) for _ in range(3)] == [None] * 3


def test_without_throttles_no_counters_are_made() -> None:
    def fail() -> Counters:
        pytest.fail("counters were made")

    assert asyncio.run(Throttles(fail).check("a.test", "192.0.2.1")) is None


@given(site=st.text(max_size=300), number=st.integers(0, 2**63))
def test_each_key_can_be_counted(site: str, number: int) -> None:
    seen: list[LimitCheck] = []

    class Counted(MemoryCounters):
        async def check(self, checks: Sequence[LimitCheck]) -> list[LimitResult]:
            seen.extend(checks)
            return []

    throttles = Throttles(Counted, lambda: 0.0)
    throttles.replace([ThrottleRule(id=number, site=site, amount=1, window=1, until=1.0)])
    assert asyncio.run(throttles.check(site, "192.0.2.1")) is None
    assert len(seen[0].key) == 32
