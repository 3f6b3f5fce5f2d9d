"""A place is counted once while it is held; a trial of an ejected member without a result passes to the next."""

import asyncio

import pytest

from tlstunnel.addresses import OriginAddress
from tlstunnel.config import Ejection, OriginConfig, Timeout
from tlstunnel.origins.members import Member
from tlstunnel.origins.place import Place
from tlstunnel.origins.pool import FIRST_TRY_AGAIN, Pool

EJECTION = Ejection(failures=1, delay=Timeout(1), max_delay=Timeout(4))


@pytest.fixture
def pool() -> Pool:
    return Pool([OriginConfig(address=OriginAddress.parse(f"192.0.2.{n}:80")) for n in (1, 2)], ejection=EJECTION)


def eject(pool: Pool) -> Member:
    member = pool.members[0]

    async def fail() -> None:
        place = Place(pool, member)
        place.record_failure("no")
        place.close()

    asyncio.run(fail())
    assert member.ejected
    return member


def is_usable(member: Member) -> bool:
    return member.is_usable(member.back_at(FIRST_TRY_AGAIN), FIRST_TRY_AGAIN)


def test_a_place_is_returned_once(pool: Pool) -> None:
    member = pool.members[0]
    first, second = Place(pool, member), Place(pool, member)
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
    place = Place(pool, member)
    assert not is_usable(member)
    place.close()
    assert is_usable(member)


def test_a_success_ends_the_ejection(pool: Pool) -> None:
    member = eject(pool)
    place = Place(pool, member)
    place.record_success()
    assert not member.ejected
    place.close()
    assert member.tunnels == 0


def test_a_tunnel_that_ends_does_not_end_the_trial_of_another(pool: Pool) -> None:
    """That tunnel had its result long before the member was ejected."""
    long = Place(pool, pool.members[0])
    long.record_success()
    member = eject(pool)
    trial = Place(pool, member)
    long.close()
    assert not is_usable(member)
    trial.close()
    assert is_usable(member)
