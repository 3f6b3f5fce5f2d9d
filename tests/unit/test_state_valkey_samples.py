"""Samples of several machines over a real server: who sees whom, who is away, and what is not understood."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.redis_server import RedisServer, wait_for
from tlstunnel.state.history.samples import Counts, Instance, Totals
from tlstunnel.state.valkey import samples as module
from tlstunnel.state.valkey.address import parse_url
from tlstunnel.state.valkey.samples import SharedSamples, decode_sample

SITES = {"a.example": Totals(3, Counts(handshakes=7, bytes_up=1 << 40)), "b.example": Totals(0)}


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30.0))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take machines that are missing soon after a connection for ended."""
    monkeypatch.setattr(module, "RETURN_SECONDS", 0.3)


class Machine:
    """One machine."""

    def __init__(self, server: RedisServer, instance: str) -> None:
        self.reports: list[tuple[str, bool]] = []
        self.sites = SITES
        self.told: list[bytes] = []
        self.samples = SharedSamples(
            parse_url(server.url),
            prefix="t",
            instance=instance,
            report=lambda *what: self.reports.append(what),
            on_told=self.told.append,
        )

    async def publish(self) -> None:
        """Publish until cancelled."""
        while True:
            self.samples.publish(5.0, self.sites)
            await asyncio.sleep(0.02)

    async def wait_for(self, *expected: str) -> dict[str, Instance]:
        """Wait until these other machines are there, and no others; return what they have told."""
        while True:
            await asyncio.sleep(0.01)
            found = {name: self.samples.decode(name, text) for name, text in self.samples.list_others()}
            if set(found) == set(expected):
                return {name: instance for name, instance in found.items() if instance is not None}


@asynccontextmanager
async def machine(server: RedisServer, instance: str, *, withdraw: bool = True) -> AsyncIterator[Machine]:
    made = Machine(server, instance)
    made.samples.start()
    publishing = asyncio.create_task(made.publish())
    try:
        yield made
    finally:
        publishing.cancel()
        await made.samples.close(withdraw=withdraw)


async def see_each_other(one: Machine, two: Machine) -> dict[str, Instance]:
    found, _ = await asyncio.gather(one.wait_for("two"), two.wait_for("one"))
    return found


def test_machines_see_each_other(server: RedisServer) -> None:
    async def main() -> None:
        async with machine(server, "one") as one:
            async with machine(server, "two") as two:
                assert await see_each_other(one, two) == {"two": Instance("two", 5.0, SITES)}
                two.sites = {"c.example": Totals(1)}
                while await see_each_other(one, two) != {"two": Instance("two", 5.0, two.sites)}:
                    pass
            await one.wait_for()  # it has ended, and says so
            assert one.reports == []

    run(main())


def test_a_machine_that_died_is_away_after_a_while(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then it counts as it was. A machine that starts afterwards does not take it for one that lives."""

    async def main() -> None:
        async with machine(server, "one") as one:
            async with machine(server, "two", withdraw=False) as two:
                await see_each_other(one, two)
            await one.wait_for("two")
            monkeypatch.setattr(module, "AWAY_SECONDS", 0.0)
            await one.wait_for()
            assert one.reports == [("two", True)]
            monkeypatch.undo()
            server.command("DEL", "{t}:u:two")  # as it is after 5 s
            async with machine(server, "three") as three:
                await asyncio.gather(three.wait_for("one"), one.wait_for("three"))
            async with machine(server, "two") as two:
                await see_each_other(one, two)
            assert one.reports == [("two", True), ("two", False)]

    run(main())


def test_a_machine_that_was_killed_is_withdrawn_by_the_next(server: RedisServer) -> None:
    """Here and for limits at once. One that lives after all comes back."""

    async def main() -> None:
        server.command("HSET", "{t}:holders", "secret", "s", "one.0", 1, "two.0", 1, "two.1", -1, "twofold.0", 1)
        async with machine(server, "one") as one:
            async with machine(server, "two", withdraw=False) as two:
                await see_each_other(one, two)
            async with machine(server, "three") as three:
                await three.wait_for("one", "two")  # its last sample is still there
                three.samples.withdraw("two")
                await asyncio.gather(three.wait_for("one"), one.wait_for("three"))
                found: Any = server.command("HKEYS", "{t}:holders")
                assert set(found) == {b"secret", b"one.0", b"twofold.0"}
                three.samples.withdraw("one")
                await three.wait_for()
                await three.wait_for("one")

    run(main())


def test_a_machine_that_is_away_for_long_is_removed(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with machine(server, "one") as one:
            async with machine(server, "two", withdraw=False) as two:
                await see_each_other(one, two)
            monkeypatch.setattr(module, "FORGET_SECONDS", 0.1)
            await asyncio.sleep(0.2)
            await one.wait_for()
            while len(server.command("HKEYS", "{t}:samples")) > 1:  # type: ignore[arg-type]
                await one.wait_for()

    run(main())


def test_a_server_that_is_away_and_comes_back(server: RedisServer) -> None:
    """Machines count as they were seen last, for some time."""

    async def main() -> None:
        with RedisServer() as own:
            async with machine(own, "one") as one, machine(own, "two") as two:
                await see_each_other(one, two)
                own.kill()
                await one.wait_for("two")
                own.start()
                two.sites = {"c.example": Totals(9)}
                while await see_each_other(one, two) != {"two": Instance("two", 5.0, two.sites)}:
                    pass

    run(main())


def test_what_is_told_once_comes_once(server: RedisServer) -> None:
    """Also to a machine that starts, and after the server was away; not to the one that has told it."""

    async def main() -> None:
        with RedisServer() as own:
            async with machine(own, "one") as one, machine(own, "two") as two:
                await see_each_other(one, two)
                one.samples.tell(b"first")
                await wait_for(lambda: two.told == [b"first"])
                async with machine(own, "three") as three:
                    await wait_for(lambda: three.told == [b"first"])
                    one.samples.tell(b"second")
                    await wait_for(lambda: three.told == two.told == [b"first", b"second"])
                own.kill()
                one.samples.tell(b"lost")
                one.samples.tell(b"third")
                own.start()
                await wait_for(lambda: two.told[-1] == b"third")
                own.command("HSET", "{t}:samples", "two:told", 1, "none:told", 1, ":told", 1)
                two.samples.tell(b"fourth")
                await wait_for(lambda: one.told == [b"fourth"])
                left = own.command("PTTL", "{t}:told:two")
                assert isinstance(left, int)
                assert 0 < left <= 60_000
            assert own.command("HKEYS", "{t}:samples") == [b"none:told", b":told"]

    run(main())


def test_what_is_not_a_sample_is_ignored(server: RedisServer) -> None:
    async def main() -> None:
        async with machine(server, "one") as one, machine(server, "two") as two:
            await see_each_other(one, two)
            server.command("SET", "{t}:u:odd", b"\xc1")
            number = 0
            while [name for name, _ in one.samples.list_others()] != ["two", "odd"]:
                number += 1
                server.command(
                    "HSET", "{t}:samples", "odd", number, b"b\xff", number, "x" * 100, number, "none", number
                )
                await asyncio.sleep(0.05)
            assert set(await one.wait_for("two", "odd")) == {"two"}

    run(main())


def test_keys_expire(server: RedisServer) -> None:
    async def main() -> None:
        async with machine(server, "one") as one, machine(server, "two") as two:
            await see_each_other(one, two)
            for key in ("{t}:samples", "{t}:u:one"):
                left = server.command("PTTL", key)
                assert isinstance(left, int)
                assert left > 0

    run(main())


@pytest.mark.parametrize(
    "sample",
    [
        [1.0, {"a": [1, 2]}, 2],
        [1.0, {"a": []}, 1],
        [1.0, {"a": [-1]}, 1],
        [1.0, {"a": [1 << 60]}, 1],
        [-1.0, {}, 1],
        [1.0, {"a": ["x"]}, 1],
        [1.0],
        {},
    ],
)
def test_samples_that_are_not_understood(sample: object) -> None:
    assert decode_sample("x", msgspec.msgpack.encode(sample)) is None


def test_a_sample_of_a_release_that_counts_more_or_less() -> None:
    more = [1.0, {"a": [1, *range(len(Counts._fields)), 99]}, 1, "new"]
    assert decode_sample("x", msgspec.msgpack.encode(more)) == Instance(
        "x", 1.0, {"a": Totals(1, Counts(*range(len(Counts._fields))))}
    )
    assert decode_sample("x", msgspec.msgpack.encode([1, {"a": [4, 5]}, 1])) == Instance(
        "x", 1.0, {"a": Totals(4, Counts(5))}
    )


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_ignored(text: bytes) -> None:
    found = decode_sample("x", text)
    assert found is None or isinstance(found, Instance)
