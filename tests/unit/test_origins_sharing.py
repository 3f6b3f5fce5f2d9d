"""What processes that use the same origins share."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.addresses import OriginAddress
from tlstunnel.config import Ejection, OriginConfig
from tlstunnel.config.durations import Timeout
from tlstunnel.origins.pool import MAX_EARLY, Pool
from tlstunnel.origins.sharing import Ejected, list_parts, make_key


@given(st.text(), st.text(), st.floats(0, 1e9))
def test_an_announcement_arrives(pool: str, member: str, seconds: float) -> None:
    with contextlib.suppress(UnicodeEncodeError):  # keys are hexadecimal
        ejected = Ejected(pool, member, seconds)
        assert Ejected.decode(ejected.encode()) == ejected


@given(st.text())
def test_any_other_text_is_ignored(text: str) -> None:
    assert Ejected.decode(text) is None


@pytest.mark.parametrize("seconds", ["-1", "1e999", "NaN", '"1"', "null"])
def test_impossible_times_are_ignored(seconds: str) -> None:
    assert Ejected.decode(f'{{"pool": "a", "member": "b", "seconds": {seconds}}}') is None


@given(st.lists(st.text(alphabet="ab/1:", max_size=4), max_size=4), st.lists(st.text(alphabet="ab/1:"), max_size=4))
def test_keys_are_equal_only_for_equal_parts(one: list[str], other: list[str]) -> None:
    assert (make_key("origin", *one) == make_key("origin", *other)) == (one == other)


@pytest.mark.parametrize("text", ["localhost:1", "a.localhost:1", "127.0.0.9:1", "[::1]:1", "unix:/run/a.sock"])
def test_an_origin_of_this_machine_has_its_name(text: str) -> None:
    assert list(list_parts(OriginAddress.parse(text)))[1:] == [socket.gethostname()]


@pytest.mark.parametrize("text", ["10.0.0.1:1", "a.example:1", "wss://a.example"])
def test_another_origin_is_the_same_from_everywhere(text: str) -> None:
    address = OriginAddress.parse(text)
    assert list(list_parts(address)) == [str(address)]


@pytest.fixture
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def _make_pool(*addresses: str) -> Pool:
    origins = [OriginConfig(address=OriginAddress.parse(address)) for address in addresses]
    return Pool(origins, scope=("a.example",), ejection=Ejection(max_delay=Timeout(60)))


@pytest.mark.parametrize("addresses", [("127.0.0.1:1",), ("127.0.0.1:1", "127.0.0.1:2")])
def test_a_change_of_health_is_noted(loop: asyncio.Runner, addresses: tuple[str, ...]) -> None:
    """Nothing else is: clients that make single requests fail must not make an origin look as if it failed."""
    changes: list[str] = []

    async def work() -> None:
        pool = _make_pool(*addresses)
        pool.on_health_change = lambda: changes.append("changed")
        member = pool.members[0]
        pool.record_connected(member)
        pool.record_response(member, "192.0.2.1")
        pool.record_no_response(member, "192.0.2.1", "it closed")
        pool.record_unreachable(member, "refused")
        assert changes == []
        for _ in range(10):
            pool.record_unreachable(member, "refused")
        assert changes
        del changes[:]
        if len(addresses) > 1:
            pool.record_connected(member)
            assert changes == ["changed"]
        pool.record_check(member, "no response")
        pool.record_check(member, "no response")
        pool.record_check(member, "no response")
        assert changes[-1:] == ["changed"]

    loop.run(work())


def test_an_ejection_of_another_process_is_bounded(loop: asyncio.Runner) -> None:
    async def work() -> None:
        pool = _make_pool("127.0.0.1:1", "127.0.0.1:2")
        first, second = pool.members
        now = asyncio.get_running_loop().time()
        pool.take_ejection(Ejected(pool.key, first.shared_key, 1e9))
        pool.take_ejection(Ejected(pool.key, "member/unknown", 10.0))
        assert (first.ejected, second.ejected) == (True, False)
        assert now + 60 <= first.out_until <= asyncio.get_running_loop().time() + 66.0
        pool.take_ejection(Ejected(pool.key, first.shared_key, 0.0))
        assert not first.ejected

    loop.run(work())


def test_an_ejection_is_shorter_by_its_age(loop: asyncio.Runner) -> None:
    async def work() -> None:
        pool = _make_pool("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")
        first, second, _ = pool.members
        now = asyncio.get_running_loop().time()
        pool.take_ejection(Ejected(pool.key, first.shared_key, 50.0), 20.0)
        assert now + 29 <= first.out_until <= asyncio.get_running_loop().time() + 30.0
        pool.take_ejection(Ejected(pool.key, second.shared_key, 50.0), 51.0)
        assert not second.ejected

    loop.run(work())


def test_an_ejection_is_noted_until_the_name_is_resolved(loop: asyncio.Runner) -> None:
    async def work() -> None:
        named = _make_pool("localhost:1", "127.0.0.1:2")
        assert len(named.members) == 1
        (origin,) = (one for one in named._origins if not one.members)
        addresses = [(socket.AF_INET, ("127.0.0.1", 1)), (socket.AF_INET, ("127.0.0.2", 1))]
        resolved = _make_pool("localhost:1", "127.0.0.1:2")
        resolved._set_addresses(resolved._origins[0], addresses)
        out = resolved.members[0]
        for number in range(2 * MAX_EARLY):
            named.take_ejection(Ejected(named.key, f"member/{number}", 1e-9))
        named.take_ejection(Ejected(named.key, out.shared_key, 10.0))
        named._set_addresses(origin, addresses)
        assert [member.ejected for member in named.members] == [True, False, False]

    loop.run(work())


def test_the_only_member_is_not_ejected(loop: asyncio.Runner) -> None:
    async def work() -> None:
        pool = _make_pool("127.0.0.1:1")
        pool.take_ejection(Ejected(pool.key, pool.members[0].shared_key, 10.0))
        assert not pool.members[0].ejected

    loop.run(work())


def test_pools_of_the_same_scope_have_the_same_keys() -> None:
    one, same = _make_pool("127.0.0.1:1", "127.0.0.1:2"), _make_pool("127.0.0.1:2", "127.0.0.1:1")
    assert one.key == same.key
    assert {member.shared_key for member in one.members} == {member.shared_key for member in same.members}
    assert len({member.shared_key for member in one.members}) == 2
