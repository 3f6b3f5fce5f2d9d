"""Counters of several machines against a real server: what they count, and each way in which the server can fail."""

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.counters_model import MODELS, CountersModel, limit_checks, steps
from tests.harness import REPOSITORY
from tests.redis_server import RedisServer, find_free_port, retry, wait_for
from tlstunnel.certificates import issue
from tlstunnel.errors import CertificateError
from tlstunnel.state.counters import CountersUnavailable, LimitCheck, LimitResult, Strategy
from tlstunnel.state.memory import TUNNEL_WAIT, MemoryCounters
from tlstunnel.state.valkey import counters as module
from tlstunnel.state.valkey.address import parse_url
from tlstunnel.state.valkey.counters import MAX_QUESTIONS, ValkeyCounters
from tlstunnel.state.valkey.scripts import SCRIPTS, Script

LONG = 20.0
"""Seconds for an answer where the test is not about time: a busy machine is no fault."""


class Report(list[str]):
    """What was reported, without the address."""

    def __call__(self, line: str, is_failure: bool) -> None:
        assert is_failure != line.endswith("counts again")
        self.append(re.sub(r"^\S+ ", "", line))


@asynccontextmanager
async def connect(
    server: RedisServer | str,
    instance: str = "one",
    *,
    prefix: str = "test",
    timeout: float = LONG,
    password_file: Path | None = None,
) -> AsyncIterator[tuple[ValkeyCounters, Report]]:
    report = Report()
    counters = ValkeyCounters(
        parse_url(server if isinstance(server, str) else server.url),
        prefix=prefix,
        instance=instance,
        timeout=timeout,
        report=report,
        password_file=password_file,
    )
    counters.start()
    try:
        yield counters, report
    finally:
        await counters.close()


def check_result(results: list[LimitResult]) -> str:
    (result,) = results
    return result.exceeded


async def until_answered(counters: ValkeyCounters, check: LimitCheck) -> str:
    """Return what the first answer says, however often there is none before."""
    answer: list[LimitResult] = []

    async def attempt() -> None:
        answer.extend(await counters.check([check]))

    await retry(attempt, CountersUnavailable)
    return check_result(answer)


# The same model as for the counts of one process.


class ServerClock:
    """A clock that scripts read in place of the server's. Advancing it keeps the holders alive."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self.now = 1_000_000.0

    def advance(self, seconds: float, alive: str = "one") -> None:
        self.now += seconds
        script = """
            redis.call("SET", "clock", ARGV[1])
            for _, name in ipairs(redis.call("HKEYS", KEYS[1])) do
              if string.sub(name, 1, #ARGV[2] + 1) == ARGV[2] .. "." then
                local beat = tonumber(redis.call("HGET", KEYS[1], name))
                redis.call("HSET", KEYS[1], name, string.format("%.0f", (beat < 0 and -1 or 1) * ARGV[1] * 1000000))
              end
            end"""
        self._server.command("EVAL", script, 1, "{test}:holders", str(self.now), alive)


@pytest.fixture
def clock(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> ServerClock:
    """Replace the time in all scripts."""
    for name, script in SCRIPTS.items():
        source = script.source.replace(
            b'redis.call("TIME")',
            b'{tonumber(redis.call("GET", "clock")), tonumber(redis.call("GET", "clock")) % 1 * 0}',
        ).replace(b"local now = clock[1] * 1000000 + clock[2]", b"local now = math.floor(clock[1] * 1000000 + 0.5)")
        assert source.count(b'"clock"') == 2
        monkeypatch.setitem(SCRIPTS, name, Script.make(source))
    clock = ServerClock(server)
    clock.advance(0)
    return clock


def test_counts_as_the_model_and_as_the_counters_in_memory(clock: ServerClock) -> None:
    numbers = count()
    with asyncio.Runner() as runner:
        context = connect(clock._server)
        counters, report = runner.run(context.__aenter__())

        @given(st.tuples(*(limit_checks(key) for key in "abc")), steps)
        @example(tuple(LimitCheck(key, 1, 2, "fixed") for key in "abc"), [(0.0, {0}, set()), (2.0, {0}, set())])
        @example(tuple(LimitCheck(key, 1, 2, "moving") for key in "abc"), [(0.0, {0}, set()), (2.0, {0}, set())])
        @example(
            tuple(LimitCheck(key, 2, 2, "moving") for key in "abc"),
            [(0.0, {0}, set()), (1.0, {0}, set()), (1.0, {0}, set()), (0.0, {0}, set())],
        )
        def run(limits: tuple[LimitCheck, ...], steps: list[tuple[float, set[int], set[str]]]) -> None:
            example = f"{next(numbers)} "
            model = CountersModel()
            memory = MemoryCounters(clock=lambda: clock.now)
            for step, asked, ending in steps:
                clock.advance(step)
                ended = sorted(key for key in ending if model.tunnels.get(key))
                memory.return_tunnels(ended)
                counters.return_tunnels([example + key for key in ended])
                for key in ended:
                    model.tunnels[key] -= 1
                checks = [limits[index] for index in sorted(asked)]
                expected = model.check(checks, clock.now)
                in_memory = memory.check_now(checks)
                renamed = [
                    LimitCheck(example + one.key, *(getattr(one, name) for name in LimitCheck.__struct_fields__[1:]))
                    for one in checks
                ]
                shared = runner.run(counters.check(renamed))
                assert [result.exceeded for result in in_memory] == expected
                assert [result.exceeded for result in shared] == expected
                for one, other in zip(in_memory, shared, strict=True):
                    assert other.wait == pytest.approx(one.wait, abs=3e-6)
            for key, number in model.tunnels.items():
                assert runner.run(counters.count_tunnels([example + key])) == [number]
                counters.return_tunnels([example + key] * number)

        run()
        assert report == []
        assert dict(counters.tunnels) == {}
        runner.run(context.__aexit__(None, None, None))


@pytest.mark.parametrize("strategy", MODELS)
def test_wait_is_exact(clock: ServerClock, strategy: Strategy) -> None:
    async def main() -> None:
        async with connect(clock._server) as (counters, _):
            check = LimitCheck("a", 3, 10, strategy)
            clock.advance(0.3)
            for _ in range(9):
                (result,) = await counters.check([check])
                if result.exceeded:
                    clock.advance(result.wait - 2e-6)
                    assert check_result(await counters.check([check])) == "limit"
                    clock.advance(2e-6)
                    assert check_result(await counters.check([check])) == ""
                clock.advance(0.7)

    asyncio.run(main())


@pytest.mark.parametrize("strategy", MODELS)
def test_exact_at_the_limit_for_two_machines_at_once(server: RedisServer, strategy: Strategy) -> None:
    async def main() -> None:
        async with connect(server, "one") as (one, _), connect(server, "two") as (two, _):
            check = LimitCheck("a", 30, 3600, strategy, max_tunnels=25)
            await asyncio.gather(one.count_tunnels(["a"]), two.count_tunnels(["a"]))
            answers: list[str] = []
            for _ in range(50):
                asked = [counters.check([check]) for counters in (one, one, two, two)]
                answers += [check_result(results) for results in await asyncio.gather(*asked)]
            assert answers.count("") == 25
            assert answers.count("tunnels") == 175
            assert one.tunnels["a"] + two.tunnels["a"] == 25
            assert await one.count_tunnels(["a", "b"]) == [25, 0]
            two.return_tunnels(["a"] * two.tunnels["a"])
            one.return_tunnels(["a"] * one.tunnels["a"])
            await two.count_tunnels(["a"])
            answers = [
                check_result(results) for results in await asyncio.gather(*(one.check([check]) for _ in range(9)))
            ]
            assert answers == ["", "", "", "", "", "limit", "limit", "limit", "limit"]

    asyncio.run(main())


def test_counted_under_all_or_none(server: RedisServer) -> None:
    async def main() -> None:
        async with connect(server) as (counters, _):
            strict, shared = LimitCheck("mine", 1, 3600), LimitCheck("shared", 3, 3600, max_tunnels=9)
            loose = LimitCheck("loose", 1, 3600, enforced=False)
            answers = [[result.exceeded for result in await counters.check([strict, shared, loose])] for _ in range(5)]
            assert answers == [["", "", ""], *[["limit", "", "limit"]] * 4]
            assert await counters.count_tunnels(["shared"]) == [1]
            assert await counters.check([LimitCheck("full", max_tunnels=1)]) == [LimitResult()]
            assert await counters.check([LimitCheck("full", max_tunnels=1)]) == [LimitResult("tunnels", TUNNEL_WAIT)]

    asyncio.run(main())


def test_every_key_expires_and_none_shows_what_is_counted(server: RedisServer) -> None:
    async def main() -> None:
        async with connect(server) as (counters, _):
            for strategy in MODELS:
                for _ in range(2):
                    await counters.check([LimitCheck("192.0.2.1", 1, 60, strategy, 5, 600.0)])
                    await counters.check([LimitCheck("192.0.2.2", 1, 60, strategy, 5)])
            names = server.command("KEYS", "*")
            assert isinstance(names, list)
            assert len(names) > 7
            for name in names:
                assert b"192" not in name
                ttl = server.command("TTL", name)
                assert isinstance(ttl, int)
                assert 0 < ttl <= 86400

    asyncio.run(main())
    before = set(server.command("KEYS", "*"))  # type: ignore[call-overload]
    server.command("FLUSHALL")
    asyncio.run(main())
    same = before.intersection(server.command("KEYS", "*"))
    assert same == {b"{test}:holders", b"{test}:answers:one"}  # another secret, other names


# Machines that come and go.


def test_tunnels_of_a_machine_without_heartbeat_do_not_count(clock: ServerClock) -> None:
    async def main() -> None:
        async with connect(clock._server, "one") as (one, _):
            async with connect(clock._server, "two") as (two, _):
                two.take_tunnels(["a", "a"])
                assert await two.count_tunnels(["a"]) == [2]
            assert await one.count_tunnels(["a"]) == [2]
            clock.advance(45)
            assert await one.count_tunnels(["a"]) == [2]
            clock.advance(1)
            assert check_result(await one.check([LimitCheck("a", max_tunnels=1)])) == ""
            assert await one.count_tunnels(["a"]) == [1]

    asyncio.run(main())


def test_heartbeats_keep_a_machine_counted(clock: ServerClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.01)

    async def main() -> None:
        async with connect(clock._server, "one") as (one, report):
            one.take_tunnels(["a"])
            for _ in range(3):
                clock.advance(40, alive="nobody")
                await wait_for(lambda: b"%.0f" % (clock.now * 1e6) in read_beats(clock._server))
            assert await one.count_tunnels(["a"]) == [1]
            assert len(read_beats(clock._server)) == 2  # its own and the secret: it is the holder that it was
            assert report == []

    asyncio.run(main())


def read_beats(server: RedisServer) -> list[bytes]:
    values = server.command("HVALS", "{test}:holders")
    assert isinstance(values, list)
    return values


def test_a_machine_that_was_away_too_long_counts_again(clock: ServerClock) -> None:
    async def main() -> None:
        async with connect(clock._server, "one") as (one, report), connect(clock._server, "two") as (two, _):
            one.take_tunnels(["a", "b"])
            assert await one.count_tunnels(["a", "b"]) == [1, 1]
            assert await two.count_tunnels(["a", "b"]) == [1, 1]
            clock.advance(46, alive="two")
            assert await two.count_tunnels(["a", "b"]) == [0, 0]
            assert check_result(await one.check([LimitCheck("a", max_tunnels=1)])) == "tunnels"
            await wait_for_counts(two, ["a", "b"], [1, 1])
            assert report == []

    asyncio.run(main())


async def wait_for_counts(counters: ValkeyCounters, keys: list[str], expected: list[int]) -> None:
    async def attempt() -> None:
        assert await counters.count_tunnels(keys) == expected

    await retry(attempt, AssertionError)


def test_the_next_process_of_a_machine_replaces_the_last(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with connect(server, "two") as (other, _):
            async with connect(server, "one") as (before, _):
                before.take_tunnels(["kept"] * 3 + ["closed meanwhile"])
                await before.count_tunnels(["kept"])
            assert await other.count_tunnels(["kept", "closed meanwhile"]) == [3, 1]
            monkeypatch.setattr(module, "BEAT", 0.05)
            async with connect(server, "one") as (after, _):
                assert check_result(await after.check([LimitCheck("kept", max_tunnels=3)])) == "tunnels"
                after.take_tunnels(["kept"] * 3)
                await wait_for_counts(other, ["kept", "closed meanwhile"], [3, 0])
                assert check_result(await after.check([LimitCheck("kept", max_tunnels=4)])) == ""
                assert await other.count_tunnels(["kept"]) == [4]

    asyncio.run(main())


def test_many_tunnels_are_stated_anew_in_parts(server: RedisServer) -> None:
    keys = [str(number) for number in range(1300)]

    async def main() -> None:
        async with connect(server, "one") as (one, report), connect(server, "two") as (two, _):
            one.take_tunnels(keys)
            assert await one.count_tunnels(keys) == [1] * 1300
            one.return_tunnels(keys[:50])
            server.command("FLUSHALL")
            await one.count_tunnels(keys[:1])
            await wait_for_counts(two, keys, [0] * 50 + [1] * 1250)
            assert report == []

    asyncio.run(main())


def test_life_of_keys_is_prolonged(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.02)
    monkeypatch.setattr(module, "_TURNS", 1)

    async def main() -> None:
        async with connect(server) as (counters, _):
            counters.take_tunnels(["a", "b"])
            assert await counters.count_tunnels([]) == []
            await wait_for(lambda: len(server.command("KEYS", "{test}:t:*")) == 2)  # type: ignore[arg-type]
            names = server.command("KEYS", "{test}:t:*")
            assert isinstance(names, list)
            for name in names:
                server.command("EXPIRE", name, 100)
            await wait_for(lambda: all(server.command("TTL", name) > 100 for name in names))  # type: ignore[operator]
            assert await counters.count_tunnels(["a", "b"]) == [1, 1]

    asyncio.run(main())


# A connection that breaks.


class Relay:
    """Stands between counters and a server. `drop` ends each connection once the server has replied, without the reply.

    `mute` keeps all further replies of a connection from the client. `held` keeps what a client sends from the server
    until it is set, also after the client has gone.
    """

    def __init__(self, server: RedisServer) -> None:
        self._target = os.fspath(server.socket)
        self.path = server.folder / "relay.sock"
        self.drop = False
        self.mute = False
        self.held: asyncio.Event | None = None

        self.open = 0
        self._handlers: set[asyncio.Task[None]] = set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        self.open += 1
        from_server, to_server = await asyncio.open_unix_connection(self._target)
        sending = asyncio.create_task(self._forward(reader, to_server))
        is_mute = False
        while data := await from_server.read(65536):
            if self.drop:
                self.drop = False
                break
            is_mute = is_mute or self.mute
            if not is_mute and not writer.is_closing():
                writer.write(data)
        writer.close()
        await sending
        await writer.wait_closed()
        self.open -= 1

    async def wait_closed(self) -> None:
        if self._handlers:
            await asyncio.wait(self._handlers)

    async def _forward(self, reader: asyncio.StreamReader, to_server: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.held is not None:
                await self.held.wait()
            to_server.write(data)
        to_server.close()
        await to_server.wait_closed()


@asynccontextmanager
async def relay_to(server: RedisServer) -> AsyncIterator[Relay]:
    relay = Relay(server)
    async with await asyncio.start_unix_server(relay.handle, relay.path):
        yield relay
        await relay.wait_closed()


def test_a_question_whose_answer_was_lost_is_counted_once(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CALM", 0.0)

    async def main() -> None:
        async with relay_to(server) as relay, connect(f"redis+unix://{relay.path}") as (counters, report):
            check = LimitCheck("a", 5, 3600, max_tunnels=5)
            assert check_result(await counters.check([check])) == ""
            for expected in ("", "", "", "", "limit"):
                relay.drop = True
                assert check_result(await counters.check([check])) == expected
                assert not relay.drop
                assert await counters.count_tunnels(["a"]) == [counters.tunnels["a"]]
            assert counters.tunnels == {"a": 5}
            assert report == []

    asyncio.run(main())


def test_commands_of_an_earlier_connection_do_nothing(server: RedisServer) -> None:
    async def main() -> None:
        async with relay_to(server) as relay, connect(f"redis+unix://{relay.path}", timeout=0.3) as (counters, _):
            check = LimitCheck("a", 2, 3600, max_tunnels=2)
            assert await until_answered(counters, check) == ""
            held = relay.held = asyncio.Event()
            counters.take_tunnels(["b"])
            with pytest.raises(CountersUnavailable, match="it did not answer within 300 ms"):
                await counters.check([check])
            relay.held = None
            # The first connection is given up, and its commands reach the server after those of the next one.
            await until_answered(counters, LimitCheck("other", 99, 60))
            assert await counters.count_tunnels(["a", "b"]) == [1, 1]
            held.set()
            await wait_for(lambda: relay.open == 1)
            assert await until_answered(counters, check) == ""
            assert await counters.count_tunnels(["a", "b"]) == [2, 1]

    asyncio.run(main())


def test_what_was_granted_too_late_is_given_back(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has counted it, but neither the answer nor the end of the connection came in time."""
    monkeypatch.setattr(module, "PATIENCE", 0.4)

    async def main() -> None:
        async with relay_to(server) as relay, connect(f"redis+unix://{relay.path}", timeout=0.3) as (counters, _):
            check = LimitCheck("a", max_tunnels=5)
            assert await until_answered(counters, check) == ""
            relay.mute = True
            with pytest.raises(CountersUnavailable, match="it did not answer within 300 ms"):
                await counters.check([check, LimitCheck("b", max_tunnels=5)])
            relay.mute = False
            await until_answered(counters, LimitCheck("other", 99, 60))
            assert counters.tunnels == {"a": 1}
            assert await counters.count_tunnels(["a", "b"]) == [1, 0]

    asyncio.run(main())


def test_returned_tunnel_can_be_taken_at_once(server: RedisServer) -> None:
    async def main() -> None:
        async with connect(server) as (counters, _):
            check = LimitCheck("a", max_tunnels=1)
            assert check_result(await counters.check([check])) == ""
            for _ in range(3):
                counters.return_tunnels(["a"])
                assert check_result(await counters.check([check])) == ""
                assert check_result(await counters.check([check])) == "tunnels"

    asyncio.run(main())


def test_who_asked_may_be_gone(server: RedisServer) -> None:
    async def main() -> None:
        async with connect(server) as (counters, _):
            asking = asyncio.create_task(counters.check([LimitCheck("a", max_tunnels=5)]))
            await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait([asking])
            await wait_for_counts(counters, ["a"], [0])
            assert counters.tunnels == {}

    asyncio.run(main())


def test_who_asked_may_be_gone_in_the_turn_of_the_answer(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with connect(server) as (counters, _):
            asking = asyncio.create_task(counters.check([LimitCheck("a", max_tunnels=5)]))
            answer = counters._answer

            def answer_and_cancel(*args: Any) -> None:
                answer(*args)
                asking.cancel()

            monkeypatch.setattr(counters, "_answer", answer_and_cancel)
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert counters.tunnels == {}
            assert await counters.count_tunnels(["a"]) == [0]

    asyncio.run(main())


def test_questions_that_wait_are_bounded(server: RedisServer) -> None:
    async def main() -> None:
        async with connect(server) as (counters, _):
            asked = [counters.check([LimitCheck(str(n), 1, 60)]) for n in range(MAX_QUESTIONS + 5)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, CountersUnavailable)]
            assert len(refused) == 5
            assert "1024 questions wait for it" in str(refused[0])

    asyncio.run(main())


def test_returning_a_tunnel_that_was_not_taken_raises(server: RedisServer) -> None:
    async def main() -> None:
        async with connect(server) as (counters, _):
            with pytest.raises(KeyError):
                counters.return_tunnels(["a"])

    asyncio.run(main())


# A server that fails.

Change = Callable[[RedisServer], object]


async def fails_and_recovers(server: RedisServer, fail: Change, reason: str, recover: Change, **options: float) -> None:
    """Let the server fail, and see that it is noticed in time, reported in one line, and over when the server is."""
    timeout = options.get("timeout", 1.0)
    async with connect(server, timeout=timeout) as (counters, report):
        check = LimitCheck("a", 4, 3600, max_tunnels=3)
        assert await until_answered(counters, check) == ""
        fail(server)
        began = time.monotonic()
        error = ""
        while not error:
            try:
                await counters.check([LimitCheck("b", 10**6, 60)])
            except CountersUnavailable as raised:
                error = str(raised)
        assert re.search(reason, error)
        assert time.monotonic() - began < timeout + 5
        assert str(server.socket) in error
        counters.take_tunnels(["c"])
        counters.return_tunnels(["a"])
        await wait_for(lambda: len(report) >= 1)
        recover(server)
        assert await until_answered(counters, LimitCheck("d", max_tunnels=1)) == ""
        assert await counters.count_tunnels(["a", "c", "d"]) == [0, 1, 1]
        assert counters.failure == ""
        assert report[-1] == "counts again"
        assert len(report) <= 5
        assert any(re.search(reason, line) for line in report)


def restart(server: RedisServer) -> None:
    server.start()


@pytest.mark.parametrize(
    ("fail", "reason", "recover"),
    [
        pytest.param(
            lambda server: server.command("REPLICAOF", "127.0.0.1", 1),
            "read-only replica",
            lambda server: server.command("REPLICAOF", "NO", "ONE"),
            id="read-only",
        ),
        pytest.param(
            lambda server: server.command("CONFIG", "SET", "maxmemory", 1),
            "its memory is full",
            lambda server: server.command("CONFIG", "SET", "maxmemory", 0),
            id="out of memory",
        ),
        pytest.param(
            lambda server: server.command("CONFIG", "SET", "min-replicas-to-write", 1),
            "too few replicas",
            lambda server: server.command("CONFIG", "SET", "min-replicas-to-write", 0),
            id="too few replicas",
        ),
        pytest.param(
            lambda server: server.command("ACL", "SETUSER", "default", "-rpush"),
            "lacks a permission",
            lambda server: server.command("ACL", "SETUSER", "default", "+rpush"),
            id="no permission",
        ),
    ],
)
def test_server_that_refuses(server: RedisServer, fail: Change, reason: str, recover: Change) -> None:
    def fail_and_disconnect(server: RedisServer) -> None:
        fail(server)
        server.command("CLIENT", "KILL", "TYPE", "normal")

    try:
        asyncio.run(fails_and_recovers(server, fail_and_disconnect, reason, recover))
    finally:
        recover(server)


def test_server_that_is_killed() -> None:
    with RedisServer() as server:
        asyncio.run(fails_and_recovers(server, RedisServer.kill, "No such file|closed the connection|refused", restart))


def test_server_that_is_stopped(shared_server: RedisServer) -> None:
    asyncio.run(
        fails_and_recovers(
            shared_server,
            lambda server: os.kill(server.pid, signal.SIGSTOP),
            "did not answer within 200 ms|does not answer",
            lambda server: os.kill(server.pid, signal.SIGCONT),
            timeout=0.2,
        )
    )


def test_question_to_a_paused_server_is_never_counted(server: RedisServer) -> None:
    async def main() -> None:
        async with connect(server, timeout=0.2) as (counters, report):
            check = LimitCheck("a", 3, 3600, max_tunnels=3)
            assert await until_answered(counters, LimitCheck("b", 1, 60)) == ""
            server.command("CLIENT", "PAUSE", 600)
            for _ in range(9):
                with pytest.raises(CountersUnavailable, match="did not answer within 200 ms"):
                    await counters.check([check])
            assert [await until_answered(counters, check) for _ in range(4)] == ["", "", "", "limit"]
            assert await counters.count_tunnels(["a"]) == [3]
            assert report == ["does not count: it did not answer within 200 ms", "counts again"]

    asyncio.run(main())


def test_flushed_server_is_told_the_tunnels_again(server: RedisServer) -> None:
    async def main() -> None:
        async with connect(server, "one") as (one, report), connect(server, "two") as (two, _):
            check = LimitCheck("a", 2, 3600, max_tunnels=3)
            answers = [check_result(await counters.check([check])) for counters in (one, two, one)]
            assert answers == ["", "", "limit"]
            server.command("FLUSHALL")
            server.command("SCRIPT", "FLUSH")
            answers = [check_result(await counters.check([check])) for counters in (one, two, one)]
            assert answers[0] == ""
            assert answers[2] in ("tunnels", "limit")
            await wait_for_counts(two, ["a"], [3])
            assert report == []

    asyncio.run(main())


def test_server_that_forgets_the_scripts(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CALM", 0.0)

    async def main() -> None:
        async with connect(server) as (counters, report):
            counters.take_tunnels(["a"])
            for _ in range(2):
                server.command("SCRIPT", "FLUSH")
                assert check_result(await counters.check([LimitCheck("a", max_tunnels=1)])) == "tunnels"
            assert report == []

    asyncio.run(main())


def test_password_from_a_file_that_changes(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("first\n")

    async def main() -> None:
        with RedisServer("requirepass first", password="first") as server:
            async with connect(server, password_file=secret) as (counters, report):
                assert await until_answered(counters, LimitCheck("a", 9, 60)) == ""
                server.command("CONFIG", "SET", "requirepass", "second")
                server.password = "second"
                server.command("CLIENT", "KILL", "TYPE", "normal")
                await wait_for(lambda: report)
                assert report == [
                    "does not count: it does not accept the user or the password of state.url and state.password_file"
                ]
                secret.write_text("second")
                assert await until_answered(counters, LimitCheck("a", 9, 60)) == ""
                secret.unlink()
                server.command("CLIENT", "KILL", "TYPE", "normal")
                await wait_for(lambda: "cannot be read: No such file" in report[-1])

    asyncio.run(main())


@pytest.mark.parametrize(
    ("options", "credentials", "reason"),
    [
        (["requirepass right"], "", "it requires a password; set one in state.url or state.password_file"),
        (["requirepass right"], ":wrong@", "it does not accept the user or the password"),
        (["user limited on >right +auth"], "limited:right@", "lacks a permission (.*); see docs/state.md"),
        ([], ":useless@", "it has no password, but state.url or state.password_file has one"),
        (["databases 1"], "DATABASE", "it answers: ERR DB index is out of range"),
    ],
)
def test_log_in_that_fails(options: list[str], credentials: str, reason: str) -> None:
    async def main() -> None:
        with RedisServer(*options) as server:
            url = f"redis+unix://{credentials}{server.socket}"
            if credentials == "DATABASE":
                url = f"{server.url}?db=3"
            async with connect(url) as (counters, report):
                await wait_for(lambda: report)
                assert re.search(reason, report[0])
                assert "wrong" not in report[0]
                with pytest.raises(CountersUnavailable, match=reason):
                    await counters.check([LimitCheck("a", 1, 60)])

    asyncio.run(main())


def test_questions_fail_as_soon_as_the_server_is_known_to_be_away(tmp_path: Path) -> None:
    async def main() -> None:
        async with connect(f"redis+unix://{tmp_path}/nothing", timeout=10 * LONG) as (counters, _):
            began = time.monotonic()
            with pytest.raises(CountersUnavailable, match="No such file"):
                await counters.check([LimitCheck("a", 1, 60)])
            with pytest.raises(CountersUnavailable, match="No such file"):
                await counters.count_tunnels(["a"])
            assert time.monotonic() - began < 5 * LONG

    asyncio.run(main())


def test_user_of_the_documentation() -> None:
    """It may do what is needed, and nothing with other keys."""
    (line,) = re.findall(r"^ +(user tlstunnel .*)$", (REPOSITORY / "docs" / "state.md").read_text(), re.MULTILINE)

    async def main() -> None:
        with RedisServer(line) as server:
            url = f"redis+unix://tlstunnel:PASSWORD@{server.socket}"
            for prefix, reports in (("tlstunnel", 0), ("another", 1)):
                async with connect(url, prefix=prefix) as (counters, report):
                    for strategy in MODELS:
                        check = LimitCheck("a", 3, 60, strategy, 9, 60.0)
                        with suppress(CountersUnavailable):
                            await counters.check([check])
                            counters.return_tunnels(["a"])
                            assert await counters.count_tunnels(["a"]) == [0]
                    assert len(report) == reports
                    assert all("its user lacks a permission" in reason for reason in report)

    asyncio.run(main())


def test_warning_of_a_server_that_drops_keys() -> None:
    async def main() -> None:
        with RedisServer("maxmemory 100mb", "maxmemory-policy allkeys-lru") as server:
            async with connect(server) as (counters, report):
                await counters.check([LimitCheck("a", 1, 60)])
                (line,) = report
                assert line.startswith("drops keys when its memory is full (maxmemory-policy allkeys-lru)")

    asyncio.run(main())


def test_what_is_not_a_server(tmp_path: Path) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n\x1b[2J")
        await reader.read()
        writer.close()

    async def main() -> None:
        async with (
            await asyncio.start_unix_server(handle, tmp_path / "http.sock"),
            connect(f"redis+unix://{tmp_path}/http.sock") as (_, report),
        ):
            await wait_for(lambda: report)
            assert report[0] == "does not count: what it sends is not the protocol of a Valkey or Redis server"

    asyncio.run(main())


@pytest.mark.parametrize("values", [[], [0], [0, 0, 0, 0], [9, 0], [-1, 0], [0, -5]])
def test_answer_that_is_not_one(server: RedisServer, monkeypatch: pytest.MonkeyPatch, values: list[int]) -> None:
    """A server that is not what it seems may answer anything. It ends the connection, and nothing else."""
    answer = ", ".join(map(str, [0, 0, *values]))
    monkeypatch.setitem(SCRIPTS, "check", Script.make(f"return cmsgpack.pack({{{answer}}})".encode()))

    async def main() -> None:
        async with connect(server) as (counters, report):
            with pytest.raises(CountersUnavailable, match="what it answers is not ours"):
                await counters.check([LimitCheck("a", 1, 60)])
            assert report[0] == "does not count: what it answers is not ours"

    asyncio.run(main())


# TLS, sentinels, clusters.


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> tuple[issue.Issued, issue.Issued, issue.Issued]:
    folder, other = tmp_path_factory.mktemp("pki"), tmp_path_factory.mktemp("other")
    return (
        issue.create(["127.0.0.1"], folder),
        issue.create_client("tunnel", folder),
        issue.create(["127.0.0.1"], other),
    )


def test_tls_with_certificates_of_both_sides(pki: tuple[issue.Issued, issue.Issued, issue.Issued]) -> None:
    server_files, client_files, other = pki
    port = find_free_port()
    options = (
        f"tls-port {port}",
        f"tls-cert-file {server_files.cert}",
        f"tls-key-file {server_files.key}",
        f"tls-ca-cert-file {server_files.ca}",
    )

    async def main() -> None:
        with RedisServer(*options) as server:
            assert server
            url = f"rediss://127.0.0.1:{port}?ca={server_files.ca}&cert={client_files.cert}&key={client_files.key}"
            async with connect(url) as (counters, report):
                assert check_result(await counters.check([LimitCheck("a", 1, 60)])) == ""
                assert report == []
            for wrong, reason in (
                (f"rediss://127.0.0.1:{port}?ca={other.ca}", "its certificate is not trusted"),
                (f"rediss://localhost:{port}?ca={server_files.ca}", "its certificate is not trusted .*ostname"),
                (f"rediss://127.0.0.1:{port}?ca={server_files.ca}", "TLS failed|closed the connection"),
                (f"redis://127.0.0.1:{port}", "closed the connection|reset|not the protocol"),
            ):
                async with connect(wrong) as (_, report):
                    await wait_for(lambda report=report: report)  # type: ignore[misc]
                    assert re.search(reason, report[0])

    asyncio.run(main())


def test_certificate_file_that_cannot_be_read(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(CertificateError, match="nothing"):
            async with connect(f"rediss://localhost?ca={tmp_path}/nothing.pem"):
                pass

    asyncio.run(main())


def test_failover_by_sentinels() -> None:
    first, second, watcher = (find_free_port() for _ in range(3))
    replica_of = f"replicaof 127.0.0.1 {first}"
    watching = (
        f"sentinel monitor main 127.0.0.1 {first} 1",
        "sentinel down-after-milliseconds main 300",
        "sentinel failover-timeout main 2000",
    )

    async def main() -> None:
        with (
            RedisServer(port=first) as primary,
            RedisServer(replica_of, "repl-diskless-sync-delay 0", port=second) as replica,
            RedisServer(*watching, port=watcher, mode=["--sentinel"]) as sentinel,
        ):
            assert await until(lambda: b"slave0:ip=127.0.0.1" in sentinel_info(sentinel, primary))
            await wait_for(lambda: b"num-slaves" in fields(sentinel) and fields(sentinel)[b"num-slaves"] == b"1")
            url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{watcher}/main"
            async with connect(url) as (counters, report):
                check = LimitCheck("a", 9, 3600, max_tunnels=2)
                assert check_result(await counters.check([check])) == ""
                counters.take_tunnels(["b"] * 7)
                await wait_for_counts(counters, ["b"], [7])
                primary.kill()
                await wait_for(lambda: report)
                await until_answered(counters, LimitCheck("other", 1, 60))
                assert await counters.count_tunnels(["a", "b"]) == [1, 7]
                assert await until_answered(counters, check) == ""
                assert await until_answered(counters, check) == "tunnels"
                role = replica.command("ROLE")
                assert isinstance(role, list)
                assert role[0] == b"master"
                assert report[-1] == "counts again"
            async with connect(f"redis+sentinel://127.0.0.1:{watcher}/another") as (_, report):
                await wait_for(lambda: report)
                assert 'it watches no service "another"' in report[0]

    asyncio.run(main())


def fields(sentinel: RedisServer) -> dict[bytes, bytes]:
    reply = sentinel.command("SENTINEL", "MASTER", "main")
    assert isinstance(reply, list)
    return dict(zip(reply[::2], reply[1::2], strict=True))


def sentinel_info(sentinel: RedisServer, primary: RedisServer) -> bytes:
    reply = primary.command("INFO", "replication")
    assert isinstance(reply, bytes)
    return reply


async def until(condition: Callable[[], bool]) -> bool:
    await wait_for(condition)
    return True


def test_cluster_says_where_the_keys_are() -> None:
    first, second = find_free_port(), find_free_port()
    options = ("cluster-enabled yes", "cluster-node-timeout 2000")

    async def main() -> None:
        with (
            RedisServer(*options, f"cluster-port {find_free_port()}", port=first) as empty,
            RedisServer(*options, f"cluster-port {find_free_port()}", port=second) as owner,
        ):
            owner.command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            bus = owner.command("CONFIG", "GET", "cluster-port")
            assert isinstance(bus, list)
            async with connect(f"redis+cluster://127.0.0.1:{first}") as (counters, report):
                await wait_for(lambda: report)
                assert report == ["does not count: the cluster is down"]
                empty.command("CLUSTER", "MEET", "127.0.0.1", second, bus[1])
                assert await until_answered(counters, LimitCheck("a", 1, 60, max_tunnels=3, block_for=5.0)) == ""
                assert await until_answered(counters, LimitCheck("a", 1, 60, max_tunnels=3, block_for=5.0)) == "limit"
                keys = owner.command("DBSIZE")
                assert isinstance(keys, int)
                assert keys >= 4
                assert report[-1] == "counts again"

    asyncio.run(main())
