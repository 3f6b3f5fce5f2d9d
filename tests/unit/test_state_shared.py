"""`SharedCounters` beside a ledger that the test plays: what is late, lost, cancelled or refused."""

import asyncio
import functools
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tlstunnel.metrics.families import COUNTER_QUESTION_SECONDS, COUNTER_QUESTIONS, LEDGER_FAILURES, SUM
from tlstunnel.metrics.registry import Registry
from tlstunnel.sockets.readiness import TunnelLoop
from tlstunnel.state import asker as asking
from tlstunnel.state import wire
from tlstunnel.state.counters import CountersUnavailable, LimitCheck, LimitResult
from tlstunnel.state.shared import LEDGER, MEMORY, SharedCounters

TWO = [LimitCheck("two", max_tunnels=2)]
ONCE = [LimitCheck("once", 1, 3600)]
WITHIN = [LimitResult()]
LONG = 20.0
"""A timeout that does not pass in a test."""


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in the loop of a serving process."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        with asyncio.Runner(loop_factory=TunnelLoop) as runner:
            runner.run(asyncio.wait_for(test(**arguments), 30))

    return run


def void(_: object) -> None:
    """Return nothing."""


class PlayedLedger:
    """The other end of an asker's connection."""

    def __init__(self) -> None:
        self.sock, self.theirs = socket.socketpair()
        self.sock.setblocking(False)
        self._rest = b""
        self._batches: list[wire.Batch] = []
        self._greeted = False

    def __enter__(self) -> "PlayedLedger":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    async def receive(self) -> list[wire.AskerMessage]:
        """Return the messages of the next frame."""
        return (await self.receive_batch()).messages

    async def receive_batch(self) -> wire.Batch:
        while not self._batches:
            data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 20)
            assert data, "the asker has closed the connection"
            payloads, self._rest = wire.split(self._rest + data)
            for payload in payloads:
                if self._greeted:
                    self._batches.append(wire.DIALECTS[1].decode_batch(payload))
                else:
                    assert wire.decode_hello(payload) == wire.Hello(wire.VERSION)
                    self._greeted = True
        return self._batches.pop(0)

    def greet(self, refusal: str = "") -> None:
        self.sock.send(wire.encode_hello(wire.Hello(wire.VERSION, refusal)))

    def send(self, *replies: wire.LedgerMessage) -> None:
        self.sock.send(wire.DIALECTS[1].encode_replies(replies))


class Asker:
    """Shared counters with what they report, attached to a played ledger that has read their declaration."""

    def __init__(self, timeout: float = LONG, **options: Any) -> None:
        self.reports: list[str] = []
        self.metrics = Registry()
        self.counters = SharedCounters(timeout=timeout, report=self.reports.append, metrics=self.metrics, **options)

    async def attach(self, ledger: PlayedLedger, held: dict[str, int] | None = None) -> None:
        self.counters.attach(ledger.theirs)
        ledger.greet()
        assert await ledger.receive() == [wire.Declare(held or {})]
        assert await ledger.receive() == [wire.Probe()]

    async def hear(self, ledger: PlayedLedger, *replies: wire.LedgerMessage) -> None:
        """Return once these have arrived."""
        heard: list[str] = []
        self.counters.on_announcement = lambda topic, *_: heard.append(topic)
        ledger.send(*replies, wire.Announced("heard", ""))
        while not heard:
            await asyncio.sleep(0)

    def check(self, checks: list[LimitCheck]) -> "asyncio.Task[list[LimitResult]]":
        return asyncio.ensure_future(self.counters.check(checks))

    async def wait_until(self, answering: str) -> None:
        while self.counters.answering != answering:
            await asyncio.sleep(0)


@in_loop
async def test_without_a_ledger_the_process_counts_alone() -> None:
    asker = Asker(on_failure="refuse")
    assert asker.counters.answering == MEMORY
    assert await asker.counters.check(TWO) == WITHIN
    assert [result.exceeded for _ in range(2) for result in await asker.counters.check(ONCE)] == ["", "limit"]
    assert await asker.counters.count_tunnels(["two", "one"]) == [1, 0]
    asker.counters.return_tunnels(["two"])
    assert await asker.counters.count_tunnels(["two"]) == [0]
    assert (asker.reports, asker.metrics[COUNTER_QUESTIONS].values) == ([], {})


@in_loop
async def test_questions_of_one_turn_are_one_frame_with_a_deadline() -> None:
    """Except the first, which is sent at once because no other one waits."""
    asker = Asker()
    with PlayedLedger() as ledger:
        await asker.attach(ledger)
        tasks = [asker.check(TWO), asker.check(ONCE)]
        before = asyncio.get_running_loop().time()
        tasks += [asker.check(ONCE)]
        assert await ledger.receive() == [wire.Ask(1, TWO)]
        batch = await ledger.receive_batch()
        assert batch.messages == [wire.Ask(2, ONCE), wire.Ask(3, ONCE)]
        assert before < batch.deadline - LONG < before + 1
        ledger.send(wire.Answer(3))
        ledger.send(wire.Answer(2, [LimitResult("limit", 7.0)]), wire.Answer(1))
        assert await asyncio.gather(*tasks) == [WITHIN, [LimitResult("limit", 7.0)], WITHIN]
        counting = asyncio.ensure_future(asker.counters.count_tunnels(["two"]))
        assert await ledger.receive() == [wire.Count(4, ["two"])]
        ledger.send(wire.Counted(4, [5]))
        assert await counting == [5]
        asker.counters.return_tunnels(["two"])
        assert await ledger.receive() == [wire.Return(["two"])]
        with pytest.raises(KeyError):
            asker.counters.return_tunnels(["two"])
        assert asker.metrics[COUNTER_QUESTIONS].values == {("ledger",): 4}
        values = asker.metrics.snapshot()[COUNTER_QUESTION_SECONDS]
        assert sum(count for labels, count in values.items() if labels != (SUM,)) == 4
        assert values[SUM,] > 0
        asker.counters.close()


@in_loop
async def test_after_one_timeout_the_process_counts_alone_until_the_ledger_replies_to_a_probe() -> None:
    asker = Asker(timeout=0.05)
    with PlayedLedger() as ledger:
        await asker.attach(ledger)
        ledger.send(wire.Alive())
        tasks = [asker.check(TWO), asker.check(TWO), asker.check(TWO)]
        assert [one for task in tasks for one in await task] == [*WITHIN * 2, LimitResult("tunnels", 10.0)]
        reason = "the ledger did not answer within 50 ms"
        assert asker.counters.answering == f"local: {reason}"
        assert asker.reports == [f"{reason}: this process counts alone until the ledger answers"]
        # At once, and without a word to the ledger.
        assert (await asker.counters.check(TWO))[0].exceeded == "tunnels"
        assert await asker.counters.count_tunnels(["two"]) == [2]
        asker.counters.return_tunnels(["two"])
        assert await ledger.receive() == [wire.Ask(1, TWO)]
        assert await ledger.receive() == [wire.Ask(2, TWO), wire.Ask(3, TWO)]
        assert await ledger.receive() == [wire.Probe()]
        # An answer that comes now has taken a tunnel, which is given back at once.
        ledger.send(wire.Answer(1), wire.Answer(2, [LimitResult("tunnels", 1.0)]))
        assert await ledger.receive() == [wire.Return(["two"])]
        ledger.send(wire.Alive())
        assert await ledger.receive() == [wire.Declare({"two": 1})]
        assert await ledger.receive() == [wire.Probe()]
        assert asker.counters.answering != LEDGER
        # What was declared since is told; what the declaration has given back is not given back again.
        assert await asker.counters.check(TWO) == WITHIN
        assert await ledger.receive() == [wire.Take({"two": 1})]
        ledger.send(wire.Answer(3))
        ledger.send(wire.Alive())
        await asker.wait_until(LEDGER)
        assert asker.reports[1:] == ["the ledger answers again: all processes count together"]
        asker.counters.return_tunnels(["two"])
        assert await ledger.receive() == [wire.Return(["two"])]
        assert asker.metrics[COUNTER_QUESTIONS].values == {("local",): 6}
        assert asker.metrics[LEDGER_FAILURES].values == {("timed out",): 1}
        asker.counters.close()


@in_loop
async def test_a_ledger_that_fails_again_and_again_is_probed_less_often() -> None:
    asker = Asker(timeout=0.01)
    loop = asyncio.get_running_loop()
    delays = []
    with PlayedLedger() as ledger:
        await asker.attach(ledger)
        ledger.send(wire.Alive())
        for _ in range(4):
            await asker.wait_until(LEDGER)
            began = loop.time()
            await asker.counters.check(ONCE)
            assert isinstance((await ledger.receive())[0], wire.Ask)
            assert await ledger.receive() == [wire.Probe()]
            delays.append(loop.time() - began - 0.01)
            ledger.send(wire.Alive())
            assert await ledger.receive() == [wire.Declare({})]
            assert await ledger.receive() == [wire.Probe()]
            ledger.send(wire.Alive())
        assert delays[0] < delays[3]
        assert all(delay >= least for delay, least in zip(delays, (0, 0.1, 0.2, 0.4), strict=True))
        assert asker.metrics[LEDGER_FAILURES].values == {("timed out",): 4}
        asker.counters.close()


@in_loop
async def test_refusing_instead_of_counting_alone() -> None:
    asker = Asker(timeout=0.2, on_failure="refuse")
    with PlayedLedger() as ledger:
        await asker.attach(ledger)
        ledger.send(wire.Alive())
        waiting = asker.check(TWO)
        assert isinstance((await ledger.receive())[0], wire.Ask)
        ledger.send(wire.Failed(1, "the server is away"))
        with pytest.raises(CountersUnavailable, match=r"^the server is away$"):
            await waiting
        assert asker.counters.answering == LEDGER
        for _ in range(2):
            with pytest.raises(CountersUnavailable, match=r"^the ledger did not answer within 200 ms$"):
                await asker.counters.check(TWO)
        with pytest.raises(CountersUnavailable):
            await asker.counters.count_tunnels(["two"])
        assert asker.reports == [
            "the ledger did not answer within 200 ms: what has a limit is refused until the ledger answers"
        ]
        assert asker.metrics[COUNTER_QUESTIONS].values == {("refused",): 4}
        asker.counters.close()


@in_loop
async def test_counts_that_the_ledger_cannot_reach_are_replaced_by_own_ones() -> None:
    asker = Asker()
    with PlayedLedger() as ledger:
        await asker.attach(ledger)
        waiting = asker.check(TWO)
        assert isinstance((await ledger.receive())[0], wire.Ask)
        ledger.send(wire.Failed(1, "the server is away"))
        assert await waiting == WITHIN
        assert await ledger.receive() == [wire.Take({"two": 1})]
        asker.counters.close()


@in_loop
async def test_a_cancelled_question_gives_back_what_it_takes() -> None:
    asker = Asker()
    with PlayedLedger() as ledger:
        await asker.attach(ledger)
        early, late = asker.check(TWO), asker.check(TWO)
        assert [len(await ledger.receive()) for _ in range(2)] == [1, 1]
        early.cancel()
        await asyncio.sleep(0)
        ledger.send(wire.Answer(1))
        assert await ledger.receive() == [wire.Return(["two"])]
        # Cancelled after the answer has arrived, before the task runs again.
        asker.counters.on_announcement = lambda *_: void(late.cancel())
        ledger.send(wire.Answer(2), wire.Announced("now", ""))
        with pytest.raises(asyncio.CancelledError):
            await late
        assert await ledger.receive() == [wire.Return(["two"])]
        counting = asyncio.ensure_future(asker.counters.count_tunnels(["two"]))
        await ledger.receive()
        ledger.sock.close()
        assert await counting == [0]
        asker.counters.close()


@in_loop
async def test_the_loop_expects_an_answer_while_a_question_waits() -> None:
    asker = Asker(timeout=0.1)

    def expects() -> bool:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, TunnelLoop)
        return loop.readiness.expecting

    with PlayedLedger() as ledger:
        await asker.attach(ledger)
        await asker.hear(ledger, wire.Alive())
        waiting = [asker.check(ONCE), asker.check(TWO)]
        await asyncio.sleep(0)
        assert expects()
        await asker.hear(ledger, wire.Answer(1))
        assert expects()
        await asker.hear(ledger, wire.Answer(2))
        assert not expects()
        assert await asyncio.gather(*waiting) == [WITHIN, WITHIN]
        assert await asker.counters.check(ONCE) == WITHIN  # this process counts alone after the timeout
        assert asker.counters.answering != LEDGER
        assert not expects()
        asker.counters.close()
    with PlayedLedger() as ledger:
        await asker.attach(ledger, {"two": 1})
        await asker.hear(ledger, wire.Alive())
        cut = asker.check(ONCE)
        await asyncio.sleep(0)
        assert expects()
        asker.counters.close()
        assert not expects()
        await cut


@in_loop
async def test_a_closed_connection_is_noticed_at_once_and_replaced() -> None:
    asker = Asker()
    with PlayedLedger() as ledger:
        await asker.attach(ledger)
        granted = asker.check(TWO)
        await ledger.receive()
        ledger.send(wire.Answer(1))
        assert await granted == WITHIN
        waiting = asker.check(TWO)
        await ledger.receive()
    assert await waiting == WITHIN
    assert asker.counters.answering == "local: the ledger has closed the connection"
    with PlayedLedger() as ledger:
        await asker.attach(ledger, {"two": 2})
        assert asker.counters.answering.startswith("local: ")
        ledger.send(wire.Alive())
        await asker.wait_until(LEDGER)
    await asker.wait_until("local: the ledger has closed the connection")
    closed = "the ledger has closed the connection: this process counts alone until the ledger answers"
    assert asker.reports == [closed, "the ledger answers again: all processes count together", closed]
    asker.counters.detach()
    assert asker.counters.answering == MEMORY


@in_loop
async def test_a_second_connection_replaces_the_first() -> None:
    asker = Asker()
    with PlayedLedger() as first, PlayedLedger() as second:
        await asker.attach(first)
        waiting = asker.check(TWO)
        await first.receive()
        await asker.attach(second)
        assert await waiting == WITHIN
        assert await second.receive() == [wire.Take({"two": 1})]
        second.send(wire.Alive())
        await asker.wait_until(LEDGER)
        assert await asyncio.get_running_loop().sock_recv(first.sock, 1) == b""
        assert asker.reports == []
        asker.counters.close()


@in_loop
async def test_a_ledger_of_another_version_is_not_asked() -> None:
    asker = Asker()
    with PlayedLedger() as ledger:
        asker.counters.attach(ledger.theirs)
        ledger.greet("the ledger speaks version 7")
        ledger.sock.shutdown(socket.SHUT_RDWR)
        await asker.wait_until("local: the ledger speaks version 7")
    assert await asker.counters.check(TWO) == WITHIN
    assert asker.metrics[LEDGER_FAILURES].values == {("refused",): 1}


@in_loop
async def test_what_is_no_reply_ends_the_connection() -> None:
    replies: list[wire.LedgerMessage] = [wire.Answer(1, WITHIN * 2), wire.Counted(1, [2])]
    frames = [wire.DIALECTS[1].encode_replies([reply]) for reply in replies]
    for sent in (b"\xff" * 8, wire.frame(b"\xc1"), *frames):
        asker = Asker()
        with PlayedLedger() as ledger:
            await asker.attach(ledger)
            waiting = asker.check(TWO)
            await ledger.receive()
            ledger.sock.send(sent)
            assert await waiting == WITHIN
            assert len(asker.reports) == 1
            assert asker.metrics[LEDGER_FAILURES].values == {("closed",): 1}


@in_loop
async def test_while_another_process_takes_over_answers_may_take_longer() -> None:
    asker = Asker(timeout=0.2)
    loop = asyncio.get_running_loop()
    with PlayedLedger() as ledger:
        await asker.attach(ledger)
        early = asker.check(TWO)
        assert isinstance((await ledger.receive())[0], wire.Ask)
        until = loop.time() + 0.45
        await asker.hear(ledger, wire.Pausing(until))
        later = asker.check(TWO)
        assert (await ledger.receive_batch()).deadline == until
        await asyncio.sleep(0.3)  # longer than the timeout
        ledger.send(wire.Resumed())
        ledger.send(wire.Answer(1), wire.Answer(2))
        assert [await early, await later] == [WITHIN, WITHIN]
        assert asker.counters.answering == LEDGER
        third = asker.check(TWO)
        assert (await ledger.receive_batch()).deadline < loop.time() + 0.2
        await third
        assert asker.counters.answering == "local: the ledger did not answer within 200 ms"
        asker.counters.close()


@in_loop
async def test_patience_ends() -> None:
    asker = Asker(timeout=0.01)
    loop = asyncio.get_running_loop()
    with PlayedLedger() as ledger:
        await asker.attach(ledger)
        began = loop.time()
        await asker.hear(ledger, wire.Pausing(began + 3600))
        await asker.counters.check(TWO)
        assert 0.4 < loop.time() - began < 5
        assert asker.counters.answering == "local: the ledger did not answer within 10 ms"
        asker.counters.close()


@in_loop
async def test_questions_that_wait_are_bounded() -> None:
    asker = Asker()
    with PlayedLedger() as ledger:
        await asker.attach(ledger)
        tasks = [asker.check(ONCE) for _ in range(wire.MAX_WAITING + 3)]
        await asyncio.sleep(0)
        assert [task.done() for task in tasks].count(True) == 3
        assert [result.exceeded for task in tasks[-3:] for result in task.result()] == ["", "limit", "limit"]
        asker.counters.close()
        await asyncio.gather(*tasks)


@in_loop
async def test_what_waits_for_a_ledger_that_does_not_read_is_bounded() -> None:
    asker = Asker()
    with PlayedLedger() as ledger:
        await asker.attach(ledger)
        await asker.hear(ledger, wire.Alive())
        keys = [f"{number:0120}" for number in range(2_000)]
        sent = 0
        while asker.counters.answering == LEDGER:
            asker.counters.take_tunnels(keys)
            sent += 1
            await asyncio.sleep(0)
        assert sent * 240_000 < asking.MAX_UNSENT + 2_000_000
        assert asker.metrics[LEDGER_FAILURES].values == {("not reading",): 1}
        asker.counters.return_tunnels(keys[:10])
        await asyncio.sleep(0)
        # Once it reads again, it learns what is held in the end.
        seen: list[wire.AskerMessage] = []
        while wire.Probe() not in seen:
            seen += await ledger.receive()
        ledger.send(wire.Alive())
        held: dict[str, int] = {}
        while (message := (await ledger.receive())[0]) != wire.Probe():
            assert isinstance(message, wire.Declare | wire.Take)
            held.update(message.leases)
        assert held == {key: sent - (index < 10) for index, key in enumerate(keys)}
        asker.counters.close()


@in_loop
async def test_a_large_declaration_is_sent_in_parts() -> None:
    asker = Asker()
    keys = [f"{number:032x}" for number in range(100_000)]
    asker.counters.take_tunnels(keys)
    with PlayedLedger() as ledger:
        asker.counters.attach(ledger.theirs)
        held: dict[str, int] = {}
        while (message := (await ledger.receive())[0]) != wire.Probe():
            assert isinstance(message, wire.Take if held else wire.Declare)
            held.update(message.leases)
        assert held == dict.fromkeys(keys, 1)
        asker.counters.close()


@in_loop
async def test_announcements() -> None:
    asker = Asker()
    heard: list[tuple[str, str]] = []
    asker.counters.announce("lost", "there is no ledger")
    with PlayedLedger() as ledger:
        await asker.attach(ledger)
        ledger.send(wire.Announced("early", "nobody listens"), wire.Alive())
        asker.counters.announce("origin", "x" * 9999)
        assert await ledger.receive() == [wire.Announce("origin", "x" * wire.MAX_TEXT)]
        asker.counters.on_announcement = lambda topic, text, _: heard.append((topic, text))
        ledger.send(wire.Announced("origin", "down"))
        while not heard:
            await asyncio.sleep(0)
        assert heard == [("origin", "down")]
        asker.counters.close()
