"""A place is counted once while it is held; a trial without a result passes to the next; what no client can eject."""

import asyncio
import time

import pytest

from tests.corpus.corpus import upgrade_request
from tlstunnel.addresses import OriginAddress
from tlstunnel.config import Ejection, OriginConfig, Timeout
from tlstunnel.origins.members import Member
from tlstunnel.origins.place import Place
from tlstunnel.origins.pool import Pool

EJECTION = Ejection(failures=1, delay=Timeout(1), max_delay=Timeout(4))


@pytest.fixture
def pool() -> Pool:
    return Pool([OriginConfig(address=OriginAddress.parse(f"192.0.2.{n}:80")) for n in (1, 2)], ejection=EJECTION)


VALID = [
    "Host: a",
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
]
IP = "198.51.100.1"
REQUEST = upgrade_request("/", VALID)


def eject(pool: Pool, number: int = 0) -> Member:
    member = pool.members[number]

    async def fail() -> None:
        place = Place(pool, member, IP)
        place.record_unreachable("no")
        place.close()

    asyncio.run(fail())
    assert member.ejected
    return member


def is_usable(member: Member) -> bool:
    return member.is_usable(time.monotonic() + 1.2)


def order(pool: Pool) -> list[Member]:
    return asyncio.run(pool.order(IP, REQUEST, 0.0))


def test_a_place_is_returned_once(pool: Pool) -> None:
    member = pool.members[0]
    first, second = Place(pool, member, IP), Place(pool, member, IP)
    assert (member.tunnels, member.use.tunnels) == (2, 2)
    assert "closed" not in repr(first)
    for _ in range(3):
        first.close()
    assert (member.tunnels, member.use.tunnels) == (1, 1)
    assert "closed" in repr(first)
    second.close()
    assert (member.tunnels, member.use.tunnels) == (0, 0)


def test_a_trial_without_a_result_passes_to_the_next(pool: Pool) -> None:
    member = eject(pool)
    place = Place(pool, member, IP)
    assert not is_usable(member)
    place.close()
    assert is_usable(member)


def test_an_accepted_connection_ends_the_ejection(pool: Pool) -> None:
    member = eject(pool)
    place = Place(pool, member, IP)
    place.record_connected()
    assert not member.ejected
    place.close()
    assert member.tunnels == 0


def test_a_tunnel_that_ends_does_not_end_the_trial_of_another(pool: Pool) -> None:
    """That tunnel had its result long before the member was ejected."""
    long = Place(pool, pool.members[0], IP)
    long.record_connected()
    member = eject(pool)
    trial = Place(pool, member, IP)
    long.close()
    assert not is_usable(member)
    trial.close()
    assert is_usable(member)


def test_an_ejected_member_is_the_last_resort(pool: Pool) -> None:
    first, second = pool.members
    eject(pool)
    for _ in range(3):
        assert order(pool) == [second, first]


def test_if_all_are_ejected_they_are_used_as_if_none_was(pool: Pool) -> None:
    first, second = pool.members
    eject(pool)
    eject(pool, 1)
    assert {tuple(order(pool)) for _ in range(4)} == {(first, second), (second, first)}


def test_if_all_others_are_down_an_ejected_one_is_used(pool: Pool) -> None:
    first, second = pool.members
    eject(pool)
    for _ in range(2):
        second.record_check(healthy=False)
    assert order(pool) == [first, second]
    for _ in range(2):
        first.record_check(healthy=False)
    assert {tuple(order(pool)) for _ in range(4)} == {(first, second), (second, first)}


def test_one_client_without_responses_ejects_nothing(pool: Pool) -> None:
    """One /64 is one client; five of them are enough."""

    async def fail(*addresses: str) -> None:
        for ip in addresses:
            place = Place(pool, pool.members[0], ip)
            place.record_connected()
            place.record_no_response("it closed the connection")
            place.close()

    asyncio.run(fail(*(f"2001:db8::{number}" for number in range(1, 100))))
    assert not pool.members[0].ejected
    asyncio.run(fail(*(f"2001:db8:0:{number}::1" for number in range(1, 5))))
    assert pool.members[0].ejected
