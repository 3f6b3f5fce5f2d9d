"""Throttles: rates, addresses, what on_abuse throttles by itself, and that they are read again."""

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_plans_delivery import Clock
from tlstunnel.addresses import Networks, to_client_key
from tlstunnel.config.usage import Abuse
from tlstunnel.plans.abuse import Suspicion
from tlstunnel.plans.decisions import Decision, SiteThrottle
from tlstunnel.plans.notice_file import TUNNEL, NotContactedError, NoticeFile, Throttle
from tlstunnel.plans.notice_store import NoticeStore
from tlstunnel.plans.throttling import (
    MOST_ADDRESSES,
    MOST_OF_SITE,
    Throttling,
    parse_networks,
    parse_rate,
    to_network,
)
from tlstunnel.state.throttles import ThrottleRule


class Case:
    """Throttles in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.clock = Clock()
        self.store = NoticeStore(folder)
        self.changes: list[Sequence[ThrottleRule]] = []
        self.told: list[Decision] = []
        self.throttling = Throttling(self.store, self.changes.append, self.clock, self.told.extend)

    async def throttle(self, site: str = "a.test", seconds: float = 60.0, *addresses: str) -> Throttle:
        return await self.throttling.throttle(
            site, "5/second", seconds, why="x", who="alice", abuse=True, addresses=addresses
        )

    async def react(self, *culprits: str, rate: float = 50.0, site: str = "a.test") -> list[Throttle]:
        suspicion = Suspicion("refused", rate, 0.9, 5, culprits, 3, few=bool(culprits))
        return await self.throttling.react({site: suspicion}, Abuse(), {site: "Why."})


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


@pytest.mark.parametrize(("text", "expected"), [("10/second", (10, 1)), ("30/minute", (30, 60)), ("7/hour", (7, 3600))])
def test_rates(text: str, expected: tuple[int, int]) -> None:
    assert parse_rate(text) == expected


@pytest.mark.parametrize(
    "text", ["", "10", "0/second", "10/day", "-1/second", "10/seconds", "٣/second", "9" * 15 + "9/hour"]
)
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match=r'expected a rate such as "10/second"'):
        parse_rate(text)


@given(text=st.text(max_size=30))
def test_any_text_is_a_rate_or_refused(text: str) -> None:
    found = (1, 1)
    with contextlib.suppress(ValueError):
        found = parse_rate(text)
    assert min(found) > 0


@given(address=st.ip_addresses())
def test_a_client_is_in_its_network(address: Any) -> None:
    network = to_network(to_client_key(str(address)))
    assert str(address) in Networks.parse(parse_networks([network]))


def test_too_many_addresses_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 256"):
        parse_networks(f"10.0.{number // 200}.{number % 200}" for number in range(MOST_ADDRESSES + 1))


def test_throttles_are_read_again_and_keep_their_identity(tmp_path: Path) -> None:
    async def main() -> None:
        case = Case(tmp_path)
        await case.throttling.refresh()
        await case.throttle()
        await case.throttle("b.test", 10.0, "192.0.2.1", "2001:db8::/64")
        assert await case.store.close()
        again = Case(tmp_path)
        await again.throttling.refresh()
        assert again.changes == [case.changes[-1]]
        again.clock.now += 10
        again.throttling.expire()
        assert [rule.site for rule in again.changes[-1]] == ["a.test"]
        assert await again.throttling.release("a.test", "bob") == 1
        assert again.changes[-1] == ()
        assert await again.throttling.release("a.test", "bob") == 0
        await again.store.close()

    run(main())


def test_what_has_not_changed_is_not_said_again(tmp_path: Path) -> None:
    async def main() -> None:
        case = Case(tmp_path)
        await case.throttling.refresh()
        await case.throttle()
        case.throttling.expire()
        case.throttling.expire()
        assert [len(rules) for rules in case.changes] == [0, 1]
        await case.store.close()

    run(main())


def test_a_throttle_that_this_release_does_not_understand_is_left_out(tmp_path: Path) -> None:
    async def main() -> None:
        case = Case(tmp_path)
        now = case.clock()
        throttle = Throttle(site="a.test", rate="5/fortnight", since=now, until=now + 9, why="", who="", abuse=True)
        await case.store.run(NoticeFile.add_throttle, throttle)
        await case.throttling.refresh()
        assert case.changes == [()]
        await case.store.close()

    run(main())


def test_without_a_notice_it_has_to_be_abuse(tmp_path: Path) -> None:
    async def main() -> None:
        case = Case(tmp_path)
        with pytest.raises(NotContactedError):
            await case.throttling.throttle("a.test", "5/second", 60.0, why="x", who="alice", abuse=False)
        assert case.changes == []
        await case.store.close()

    run(main())


def test_a_site_has_a_bounded_number_of_throttles(tmp_path: Path) -> None:
    async def main() -> None:
        case = Case(tmp_path)
        for _ in range(MOST_OF_SITE):
            await case.throttle()
        with pytest.raises(ValueError, match="release it first"):
            await case.throttle()
        await case.throttle("b.test")
        await case.store.close()

    run(main())


def test_few_culprits_are_throttled_and_later_the_new_ones(tmp_path: Path) -> None:
    async def main() -> None:
        case = Case(tmp_path)
        (first,) = await case.react("192.0.2.1", "20010db800000000")
        assert (first.addresses, first.who, first.why) == (("192.0.2.1/32", "2001:db8::/64"), TUNNEL, "Why.")
        assert await case.react("192.0.2.1") == []
        (second,) = await case.react("192.0.2.1", "192.0.2.2")
        assert second.addresses == ("192.0.2.2/32",)
        (whole,) = await case.react()
        assert whole.addresses == ()
        assert await case.react() == []
        case.clock.now = whole.until
        assert len(await case.react()) == 1
        await case.store.close()

    run(main())


def test_a_flood_that_is_over_is_not_throttled_again(tmp_path: Path) -> None:
    async def main() -> None:
        case = Case(tmp_path)
        assert await case.react(rate=0.2) == []
        await case.store.close()

    run(main())


def test_what_a_person_has_released_is_left_alone_for_an_hour(tmp_path: Path) -> None:
    async def main() -> None:
        case = Case(tmp_path)
        await case.react()
        await case.throttling.release("a.test", "bob")
        assert await case.react() == []
        case.clock.now += 3600
        assert len(await case.react()) == 1
        await case.store.close()

    run(main())


def test_a_persons_throttle_of_a_site_holds_on_all_machines(tmp_path: Path) -> None:
    """Its addresses, and what a machine throttles by itself, do not leave the machine."""

    async def main() -> None:
        one, two = Case(tmp_path / "one"), Case(tmp_path / "two")
        await one.throttle("a.test", 60.0, "192.0.2.1")
        await one.react(site="b.test")
        assert one.told == []
        stored = await one.throttle("c.test")
        for told in (*one.told, *one.told):
            assert isinstance(told, SiteThrottle)
            await two.store.run(NoticeFile.follow_throttle, told, two.clock())
        (known,) = await two.throttling.refresh()
        assert (known.site, known.rate, known.who, known.until) == ("c.test", "5/second", "alice", stored.until)
        assert await two.throttling.refresh() == []
        assert await two.throttling.release("c.test", "bob") == 1
        (released,) = two.told
        assert isinstance(released, SiteThrottle)
        assert await one.store.run(NoticeFile.follow_throttle, released, one.clock())
        await one.throttling.refresh()
        assert [throttle.site for throttle in one.throttling.holding] == ["a.test", "b.test"]
        assert await one.store.run(NoticeFile.read_decisions, 10, one.clock()) == [released]
        assert await one.store.run(NoticeFile.read_decisions, 10, stored.until) == []
        for case in (one, two):
            await case.store.close()

    run(main())


def test_machines_that_learn_of_a_release_first_do_not_throttle(tmp_path: Path) -> None:
    async def main() -> None:
        one, two = Case(tmp_path / "one"), Case(tmp_path / "two")
        await one.throttle()
        await one.throttling.release("a.test", "bob")
        for told in reversed(one.told):
            assert isinstance(told, SiteThrottle)
            await two.store.run(NoticeFile.follow_throttle, told, two.clock())
        assert await two.throttling.refresh() == []
        for case in (one, two):
            await case.store.close()

    run(main())


def test_throttles_of_other_machines_are_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        case = Case(tmp_path)
        now = case.clock()
        for number in range(MOST_OF_SITE + 3):
            told = SiteThrottle("a.test", "5/second", now - number, now + 60, "alice", "x", "", True)
            assert await case.store.run(NoticeFile.follow_throttle, told, now)
        ended = SiteThrottle("b.test", "5/second", now - 60, now, "alice", "x", "", True)
        assert not await case.store.run(NoticeFile.follow_throttle, ended, now)
        assert len(await case.throttling.refresh()) == len(case.throttling.holding) == MOST_OF_SITE
        await case.store.close()

    run(main())
