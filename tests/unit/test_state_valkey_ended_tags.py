"""Machines learn from a real server which tags others have ended, whatever happens to the server meanwhile."""

import asyncio
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.redis_server import RedisServer, wait_for
from tests.unit.test_state_valkey_scripts import packed
from tlstunnel.state.ended_tags import EndedTag
from tlstunnel.state.valkey import ended_tags
from tlstunnel.state.valkey.address import parse_url
from tlstunnel.state.valkey.ended_tags import MOST_KNOWN, MOST_UNTOLD, SharedEndedTags
from tlstunnel.state.valkey.scripts import decode_ended_tags

KEY = "{t}:ended"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _empty(server: RedisServer) -> None:
    server.command("FLUSHALL")


class Machine:
    """What a machine has been told."""

    def __init__(self, server: RedisServer, instance: str) -> None:
        self.ended: list[EndedTag] = []
        self.reports: list[tuple[str, bool]] = []
        self.shared = SharedEndedTags(
            parse_url(server.url),
            prefix="t",
            instance=instance,
            on_ended=self.ended.extend,
            report=lambda sentence, is_failure: self.reports.append((sentence, is_failure)),
        )
        self.shared.start()

    @property
    def tags(self) -> list[str]:
        return [one.tag for one in self.ended]


def make_ended(tag: str = "user=1") -> EndedTag:
    return EndedTag(tag=tag, who="ann", why="signed out")


def test_others_are_told_once(server: RedisServer) -> None:
    async def run() -> None:
        here, there = Machine(server, "a"), Machine(server, "b")
        await asyncio.gather(*(here.shared.tell(make_ended(f"user={number}")) for number in range(120)))
        await wait_for(lambda: len(there.ended) >= 120)
        await asyncio.sleep(0.6)  # asked twice more
        assert sorted(there.tags) == sorted(f"user={number}" for number in range(120))
        assert all((one.who, one.why) == ("ann", "signed out") and 0 <= one.age < 5 for one in there.ended)
        assert here.ended == []
        await here.shared.close()
        await there.shared.close()

    asyncio.run(run())


def test_one_that_begins_learns_of_the_last_minute(server: RedisServer) -> None:
    async def run() -> None:
        here = Machine(server, "a")
        await here.shared.tell(make_ended())
        seconds, microseconds = map(int, server.command("TIME"))  # type: ignore[call-overload]
        now = seconds * 1_000_000 + microseconds
        text = server.command("ZRANGE", KEY, 0, -1)[0]  # type: ignore[index]
        server.command("ZADD", KEY, now - 61_000_000, text)
        later = Machine(server, "b")
        await asyncio.sleep(0.5)
        assert later.ended == []
        server.command("ZADD", KEY, now - 50_000_000, text)
        last = Machine(server, "c")
        await wait_for(lambda: last.ended)
        assert 49 < last.ended[0].age < 60
        for machine in (here, later, last):
            await machine.shared.close()

    asyncio.run(run())


def test_what_was_missed_is_learned_later(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what could not be told is told, with the time that has passed; both are reported once."""
    monkeypatch.setattr(ended_tags, "REPORT_SECONDS", 0.2)

    async def run() -> None:
        with RedisServer() as own:
            here, there = Machine(own, "a"), Machine(own, "b")
            await here.shared.tell(make_ended("user=1"))
            await wait_for(lambda: there.ended)
            own.kill()
            told = here.shared.tell(make_ended("user=2"))
            await wait_for(lambda: here.reports and there.reports)
            assert not told.done()
            await asyncio.to_thread(own.start)
            await told
            await wait_for(lambda: there.tags == ["user=1", "user=2"])
            assert there.ended[1].age > 0.1
            await wait_for(lambda: len(here.reports) == len(there.reports) == 2)
            assert [is_failure for _, is_failure in here.reports] == [True, False]
            assert "does not say which tags other machines end" in here.reports[0][0]
            await here.shared.close()
            await there.shared.close()

    asyncio.run(run())


def test_a_key_of_another_kind(server: RedisServer) -> None:
    """It is an error, and they go on once it is gone."""

    async def run() -> None:
        server.command("SET", KEY, "x")
        here, there = Machine(server, "a"), Machine(server, "b")
        told = here.shared.tell(make_ended())
        await asyncio.sleep(0.3)
        assert not told.done()
        server.command("DEL", KEY)
        await told
        await wait_for(lambda: there.ended)
        await here.shared.close()
        await there.shared.close()

    asyncio.run(run())


def test_garbage_is_skipped(server: RedisServer) -> None:
    """Also more of it, at one moment, than is read at once."""

    async def run() -> None:
        seconds, _ = map(int, server.command("TIME"))  # type: ignore[call-overload]
        for number in range(450):
            server.command("ZADD", KEY, seconds * 1_000_000 - 1, f"garbage{number}")
        server.command("ZADD", KEY, "inf", "a", "-inf", "b", "1.5", "c", (seconds + 1000) * 1_000_000, "d")
        for text in (b"", b"\xff\x00", b"x" * 50_000):
            server.command("ZADD", KEY, seconds * 1_000_000, text)
        here, there = Machine(server, "a"), Machine(server, "b")
        await here.shared.tell(make_ended())
        await wait_for(lambda: there.ended)
        assert there.tags == ["user=1"]
        assert there.reports == []
        await here.shared.close()
        await there.shared.close()

    asyncio.run(run())


def test_what_is_remembered_is_bounded(server: RedisServer) -> None:
    async def run() -> None:
        machine = Machine(server, "a")
        machine.shared._take([(0.0, f"text{number}") for number in range(MOST_KNOWN + 10)])
        assert len(machine.shared._known) == MOST_KNOWN
        assert machine.ended == []
        await machine.shared.close()

    asyncio.run(run())


def test_what_waits_to_be_told_is_bounded(server: RedisServer) -> None:
    """The latest are told."""

    async def run() -> None:
        here, there = Machine(server, "a"), Machine(server, "b")
        told = [here.shared.tell(make_ended(f"user={number}")) for number in range(MOST_UNTOLD + 20)]
        await asyncio.gather(*told[20:])
        await wait_for(lambda: f"user={MOST_UNTOLD + 19}" in there.tags)
        assert not any(one.done() for one in told[:20])
        await here.shared.close()
        await there.shared.close()

    asyncio.run(run())


def test_the_server_keeps_the_latest(server: RedisServer) -> None:
    async def run() -> None:
        for number in range(2_100):
            server.command("ZADD", KEY, number, f"old{number}")
        here = Machine(server, "a")
        await here.shared.tell(make_ended())
        assert server.command("ZCARD", KEY) == 1  # the others are older than an hour
        assert 0 < server.command("PTTL", KEY) <= 3_600_000  # type: ignore[operator]
        await here.shared.close()

    asyncio.run(run())


@given(st.one_of(packed, st.binary(), st.integers(), st.none()))
def test_any_other_reply_is_refused(reply: object) -> None:
    try:
        decode_ended_tags(reply)
    except ValueError:
        return
    assert isinstance(reply, bytes)


def test_a_reply() -> None:
    assert decode_ended_tags(msgspec.msgpack.encode([7, 1, 1_500_000, "a", -5, "b"])) == (
        7,
        True,
        [(1.5, "a"), (0.0, "b")],
    )
