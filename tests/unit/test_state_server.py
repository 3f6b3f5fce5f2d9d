"""The ledger over real sockets: leases of processes that die or stop, broken askers, hand-over."""

import asyncio
import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tlstunnel.sockets.readiness import TunnelLoop
from tlstunnel.state import wire
from tlstunnel.state.counters import LimitCheck, LimitResult
from tlstunnel.state.memory import MemoryCounters
from tlstunnel.state.server import MAX_UNSENT, MOST_UNSENT, LedgerServer, Snapshot, SnapshotError
from tlstunnel.state.shared import LEDGER, SharedCounters

NINE = [LimitCheck("nine", 9, 3600)]
THREE_TUNNELS = [LimitCheck("three", max_tunnels=3)]
MANY_TUNNELS = [LimitCheck("many", max_tunnels=10**6)]
WITHIN = [LimitResult()]
RECOVERED = "the ledger answers again: all processes count together"


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in the loop of a serving process."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        with asyncio.Runner(loop_factory=TunnelLoop) as runner:
            runner.run(asyncio.wait_for(test(**arguments), 60))

    return run


async def wait_until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@dataclass
class Running:
    """A ledger on this loop, and what it and its askers have reported."""

    server: LedgerServer
    counters: MemoryCounters
    reports: list[str] = field(default_factory=list)

    def connect(self, timeout: float = 20.0) -> SharedCounters:
        """Return an asker. By default its timeout does not pass in a test."""
        ours, theirs = socket.socketpair()
        self.server.add(ours, "an asker")
        asker = SharedCounters(timeout=timeout, report=self.reports.append)
        asker.attach(theirs)
        return asker

    def connect_raw(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.server.add(ours, "serving 7")
        theirs.setblocking(False)
        return theirs


@contextlib.asynccontextmanager
async def ledger() -> AsyncIterator[Running]:
    counters = MemoryCounters()
    reports: list[str] = []
    server = LedgerServer(counters, report=reports.append)
    try:
        yield Running(server, counters, reports)
    finally:
        server.close()


@in_loop
async def test_askers_count_together() -> None:
    async with ledger() as running:
        askers = [running.connect() for _ in range(3)]
        results = await asyncio.gather(*(asker.check(NINE) for _ in range(5) for asker in askers))
        assert [result.exceeded for (result,) in results].count("") == 9
        stats = running.server.stats()
        assert (stats.connections, stats.keys, stats.answered, stats.expired) == (3, 1, 15, 0)
        for asker in askers:
            asker.close()


@in_loop
async def test_leases_are_returned_one_by_one_and_with_their_holder() -> None:
    async with ledger() as running:
        first, second = running.connect(), running.connect()
        for asker in (first, second, first):
            assert await asker.check(THREE_TUNNELS) == WITHIN
        assert (await second.check(THREE_TUNNELS))[0].exceeded == "tunnels"
        assert await second.count_tunnels(["three", "other"]) == [3, 0]
        assert running.server.stats().leases == 3
        first.return_tunnels(["three"])
        assert await first.count_tunnels(["three"]) == [2]
        first.close()
        await wait_until(lambda: running.server.stats().connections == 1)
        assert running.counters.tunnels == {"three": 1}
        assert await second.check(THREE_TUNNELS) == WITHIN
        second.close()


@in_loop
async def test_announcements_reach_all_others() -> None:
    async with ledger() as running:
        askers = [running.connect() for _ in range(3)]
        heard: list[tuple[int, str, str]] = []
        for number, asker in enumerate(askers):
            asker.on_announcement = lambda topic, text, _, number=number: heard.append((number, topic, text))
            await asker.count_tunnels([])
        askers[1].announce("origin", "10.0.0.1:80 down")
        await wait_until(lambda: len(heard) == 2)
        await askers[1].count_tunnels([])
        assert sorted(heard) == [(0, "origin", "10.0.0.1:80 down"), (2, "origin", "10.0.0.1:80 down")]
        for asker in askers:
            asker.close()


async def hear(asker: SharedCounters) -> list[tuple[str, str]]:
    """Return what an asker hears that has just connected."""
    heard: list[tuple[str, str]] = []

    def note(topic: str, text: str, age: float) -> None:
        assert age > 0.0
        heard.append((topic, text))

    asker.on_announcement = note
    await wait_until(lambda: heard)
    return heard


@in_loop
async def test_who_connects_later_learns_of_what_is_kept() -> None:
    """Not of what was replaced, has expired, or is not kept; also from the next ledger, and with its age."""
    async with ledger() as first:
        running = first
        asker = running.connect()
        asker.announce("ejection", "one is out", "one", 60.0)
        asker.announce("ejection", "two is out", "two", 60.0)
        asker.announce("ejection", "three is out for a moment", "three", 0.001)
        asker.announce("other", "about one", "one", 60.0)
        asker.announce("ejection", "one is out again", "one", 60.0)
        asker.announce("ejection", "two is back", "two", 0.0)
        asker.announce("ejection", "heard once")
        await asker.count_tunnels([])
        await asyncio.sleep(0.002)
        for _ in range(2):
            late = running.connect()
            assert await hear(late) == [("other", "about one"), ("ejection", "one is out again")]
            late.close()
            running = await hand_over(running)
        asker.close()
        running.server.close()


# Askers that are broken or slow.

HELLO = wire.encode_hello(wire.Hello(wire.VERSION))


def batch(*messages: wire.AskerMessage) -> bytes:
    return wire.encode_batch(wire.Batch(0.0, list(messages)))[0]


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"\xff\xff\xff\xff", "a frame of 4294967295 bytes; 1048576 is the most"),
        (wire.frame(b"\xc1"), r"not a hello: MessagePack data is malformed: invalid opcode '\\xc1' (byte 0)"),
        (wire.frame(b"\x91\xa1\x07"), "not a hello: Expected `int`, got `str` - at `$[0]`"),
        (HELLO + wire.frame(b"\x90"), "not a batch: Expected `array` of at least length 2, got 0"),
        (HELLO + wire.frame(b"\x92\x00\x91\x91\x63"), "not a batch: Invalid value 99 - at `$[1][0][0]`"),
        (
            HELLO + wire.frame(b"\x92\x00\x91\x92\x04\x81\xa1a\xd2\xff\xff\xff\xff"),
            "not a batch: Expected `int` >= 0 - at `$[1][0][1][...]`",
        ),
        (
            HELLO + wire.encode_batch(wire.Batch(1e12, [wire.Ask(1, [LimitCheck("a", 1, 0, "sliding")])]))[0],
            "a check that nothing can be counted by",
        ),
        (
            wire.encode_hello(wire.Hello(99)),
            "the ledger speaks version 1 of its protocol, and this process version 99",
        ),
    ],
    ids=["length", "no MessagePack", "no hello", "no batch", "unknown message", "negative", "no window", "version"],
)
@in_loop
async def test_a_broken_asker_is_disconnected_and_no_other(sent: bytes, reason: str) -> None:
    async with ledger() as running:
        good = running.connect()
        assert await good.check(THREE_TUNNELS) == WITHIN
        with running.connect_raw() as broken:
            broken.send(HELLO + batch(wire.Take({"three": 1})) + sent if sent[:1] == b"\xff" else sent)
            await wait_until(lambda: running.reports)
            assert running.reports == [f"the ledger has closed the connection of serving 7: {reason}"]
            assert await good.count_tunnels(["three"]) == [1]
            assert running.server.stats().connections == 1
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while data := await asyncio.get_running_loop().sock_recv(broken, 1 << 16):
                    received += data
        if "version" in reason:
            (payload,), _ = wire.split(received)
            assert wire.decode_hello(payload) == wire.Hello(wire.VERSION, reason)
        good.close()


@in_loop
async def test_an_asker_of_a_later_version_counts_alone_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ledger() as running:
        monkeypatch.setattr(wire, "VERSION", 2)
        asker = running.connect()
        reason = "the ledger speaks version 1 of its protocol, and this process version 2"
        assert await asker.check(NINE) == WITHIN
        assert asker.answering == f"local: {reason}"
        assert sorted(running.reports) == [
            f"the ledger has closed the connection of an asker: {reason}",
            f"{reason}: this process counts alone until the ledger answers",
        ]


class Backwards(wire.Dialect):
    """A version of the protocol whose payloads are written from their end to their beginning."""

    def decode_batch(self, payload: bytes) -> wire.Batch:
        return super().decode_batch(payload[::-1])

    def encode_replies(self, replies: Sequence[wire.LedgerMessage]) -> bytes:
        return wire.frame(super().encode_replies(replies)[4:][::-1])


@in_loop
async def test_askers_of_this_version_and_the_two_before_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is answered in its own, also by the ledger that takes the connections over."""
    monkeypatch.setattr(wire, "DIALECTS", {1: Backwards(), 2: Backwards(), 3: wire.Dialect()})
    monkeypatch.setattr(wire, "VERSION", 3)
    async with ledger() as running:
        present = running.connect()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + 60
        takes = wire.Batch(deadline, [wire.Ask(1, THREE_TUNNELS), wire.Count(2, ["three"])])
        question = wire.frame(wire.encode_batch(takes)[0][4:][::-1])
        before = [running.connect_raw() for _ in range(2)]

        async def ask(sock: socket.socket) -> list[wire.LedgerMessage]:
            """Ask, and return the messages in the last frame that the ledger sends."""
            received = b""
            await loop.sock_sendall(sock, question)
            while True:
                received += await loop.sock_recv(sock, 1 << 16)
                payloads, rest = wire.split(received)
                with contextlib.suppress(wire.WireError, IndexError):
                    if not rest and len(replies := wire.decode_replies(payloads[-1][::-1])) == 2:
                        return replies

        for version, sock in enumerate(before, 1):
            await loop.sock_sendall(sock, wire.encode_hello(wire.Hello(version)))
            assert await ask(sock) == [wire.Answer(1, []), wire.Counted(2, [version])]
        assert await present.check(THREE_TUNNELS) == WITHIN
        following = await hand_over(running)
        full, counted = await ask(before[0])
        assert isinstance(full, wire.Answer)
        assert [result.exceeded for result in full.results] == ["tunnels"]
        assert counted == wire.Counted(2, [3])
        assert (await present.check(THREE_TUNNELS))[0].exceeded == "tunnels"
        present.close()
        for sock in before:
            sock.close()
        following.server.close()


@in_loop
async def test_an_asker_that_does_not_read_is_not_read_and_holds_its_leases() -> None:
    async with ledger() as running:
        good = running.connect()
        with running.connect_raw() as stuck:
            stuck.send(HELLO + batch(wire.Take({"three": 1})))
            probes = batch(*[wire.Probe()] * 1000)
            blocked = 0
            while blocked < 50:
                try:
                    assert stuck.send(probes) == len(probes)
                    blocked = 0
                except BlockingIOError:
                    blocked += 1
                await asyncio.sleep(0)
            (connection, _) = sorted(running.server._connections.values(), key=lambda one: -one.channel.unsent_bytes)
            assert MOST_UNSENT < connection.channel.unsent_bytes < MOST_UNSENT + 10_000
            # What others announce is dropped after a while.
            for _ in range(600):
                good.announce("origin", "x" * 4000)
                await good.count_tunnels([])
            assert MAX_UNSENT <= connection.channel.unsent_bytes < MAX_UNSENT + 10_000
            assert await good.count_tunnels(["three"]) == [1]
            # It reads again, and everything continues.
            received = b""
            while len(received) < MAX_UNSENT:
                received += await asyncio.get_running_loop().sock_recv(stuck, 1 << 20)
                await asyncio.sleep(0)
            await wait_until(lambda: connection.channel.unsent_bytes == 0)
        await wait_until(lambda: running.counters.tunnels == {})
        good.close()


# Hand-over to another process.


async def hand_over(old: Running) -> Running:
    """Return another ledger, which continues the old one."""
    snapshot = Snapshot.decode((await old.server.pause()).encode())
    socks = [socket.socket(fileno=os.dup(sock.fileno())) for sock in old.server.sockets]
    counters = MemoryCounters()
    server = LedgerServer(counters, report=old.reports.append)
    server.restore(snapshot, socks)
    old.server.close()
    return Running(server, counters, old.reports)


@in_loop
async def test_a_hand_over_loses_nothing() -> None:
    async with ledger() as first:
        running = first
        askers = [running.connect() for _ in range(3)]
        limit = [LimitCheck("limited", 1000, 3600, max_tunnels=10**6)]
        done = asyncio.Event()

        async def ask(asker: SharedCounters) -> int:
            granted = 0
            while not done.is_set():
                (result,) = await asker.check(limit)
                granted += not result.exceeded
                await asyncio.sleep(0)
            return granted

        tasks = [asyncio.ensure_future(ask(asker)) for asker in askers for _ in range(20)]
        for _ in range(5):
            await askers[0].count_tunnels([])
            running = await hand_over(running)
        await wait_until(lambda: running.server.stats().answered > 2000)
        done.set()
        assert sum(await asyncio.gather(*tasks)) == 1000
        assert running.counters.tunnels == {"limited": 1000}
        assert {asker.answering for asker in askers} == {LEDGER}
        assert running.reports == []
        askers[0].close()
        await wait_until(lambda: running.server.stats().connections == 2)
        for asker in askers:
            asker.close()
        running.server.close()


@in_loop
async def test_a_half_received_and_a_half_sent_frame_are_handed_over() -> None:
    async with ledger() as running:
        with running.connect_raw() as asker:
            question = wire.encode_batch(wire.Batch(1e12, [wire.Ask(5, THREE_TUNNELS)]))[0]
            asker.send(HELLO + question[:20])
            await wait_until(
                lambda: (
                    running.server._connections and next(iter(running.server._connections.values())).channel.received
                )
            )
            snapshot = await running.server.pause()
            assert snapshot.connections[0].received == question[:20]
            running.server.resume()
            # The answers fill the socket.
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(asker, question[20:] + batch(*[wire.Probe()] * 4_000) * 50)
            (connection,) = running.server._connections.values()
            await wait_until(lambda: connection.channel.unsent_bytes)
            later = await hand_over(running)
            replies: list[wire.LedgerMessage] = []
            rest = (await loop.sock_recv(asker, 7))[7:]  # the hello
            while replies.count(wire.Resumed()) < 2 or replies.count(wire.Alive()) < 200_000:
                payloads, rest = wire.split(rest + await loop.sock_recv(asker, 1 << 16))
                for payload in payloads:
                    replies += wire.decode_replies(payload)
            assert replies.count(wire.Alive()) == 200_000
            assert wire.Answer(5, []) in replies
            assert later.counters.tunnels == {"three": 1}
            later.server.close()


@in_loop
async def test_a_hand_over_that_fails_is_resumed() -> None:
    async with ledger() as running:
        asker = running.connect(timeout=0.2)
        assert await asker.check(THREE_TUNNELS) == WITHIN
        await running.server.pause()
        waiting = asyncio.ensure_future(asker.check(THREE_TUNNELS))
        await asyncio.sleep(0.3)  # longer than the timeout
        assert not waiting.done()
        running.server.resume()
        assert await waiting == WITHIN
        assert asker.answering == LEDGER
        assert running.counters.tunnels == {"three": 2}
        asker.close()


@in_loop
async def test_a_ledger_that_does_not_take_over_in_time_makes_askers_count_alone() -> None:
    async with ledger() as running:
        asker = running.connect(timeout=0.2)
        assert await asker.check(THREE_TUNNELS) == WITHIN
        await running.server.pause()
        assert await asker.check(THREE_TUNNELS) == WITHIN
        assert asker.answering == "local: the ledger did not answer within 200 ms"
        running.server.resume()
        await wait_until(lambda: asker.answering == LEDGER)
        # The question that expired was not counted; the tunnel that was taken alone is.
        assert await asker.count_tunnels(["three"]) == [2]
        assert running.server.stats().expired == 1
        asker.close()


@in_loop
async def test_a_snapshot_of_something_else_is_refused() -> None:
    async with ledger() as running:
        snapshot = await running.server.pause()
        running.server.resume()
        for data, message in (
            (b"", "the ledger's snapshot is invalid: Input data was truncated"),
            (Snapshot(0, 0, [], format=2).encode(), "the ledger's snapshot has format 2, this release reads format 1"),
        ):
            with pytest.raises(SnapshotError) as raised:
                Snapshot.decode(data)
            assert str(raised.value) == message
        with pytest.raises(SnapshotError, match="has 0 connections, not 1"), socket.socket() as sock:
            running.server.restore(snapshot, [sock])
        for counts in (b"", b"\x91\x92\x81\xa1a\xc4\x01x\x80"):
            with pytest.raises(SnapshotError, match="the ledger's snapshot is invalid"):
                running.server.restore(Snapshot(0, 0, [], counts), [])


# Other processes.

LEDGER_PROCESS = """
    import asyncio, socket, sys
    from tlstunnel.sockets.readiness import TunnelLoop
    from tlstunnel.state.memory import MemoryCounters
    from tlstunnel.state.server import LedgerServer

    async def main():
        server = LedgerServer(MemoryCounters(), report=print)
        for fd in sys.argv[1:]:
            server.add(socket.socket(fileno=int(fd)))
        print("ready", flush=True)
        await asyncio.Event().wait()

    with asyncio.Runner(loop_factory=TunnelLoop) as runner:
        runner.run(main())
"""

ASKER_PROCESS = """
    import asyncio, socket, sys
    from tlstunnel.state.counters import LimitCheck
    from tlstunnel.state.shared import SharedCounters

    async def main():
        asker = SharedCounters(timeout=20, report=print)
        asker.attach(socket.socket(fileno=int(sys.argv[1])))
        for _ in range(50):
            await asker.check([LimitCheck("many", max_tunnels=1000000)])
        print("ready", flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())
"""


@contextlib.contextmanager
def process(code: str, *socks: socket.socket) -> Iterator[subprocess.Popen[str]]:
    """Run another process with these sockets, until it is ready; kill it in the end."""
    fds = [sock.fileno() for sock in socks]
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, fds)]
    with subprocess.Popen(command, pass_fds=fds, stdout=subprocess.PIPE, text=True) as child:
        try:
            for sock in socks:
                sock.close()
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            yield child
        finally:
            child.kill()


@in_loop
async def test_leases_of_a_killed_process_are_returned_at_once_and_of_a_stopped_one_kept() -> None:
    async with ledger() as running:
        asker = running.connect()
        await asker.check(MANY_TUNNELS)
        ours, theirs = socket.socketpair()
        running.server.add(ours)
        with contextlib.ExitStack() as stack:
            child = await asyncio.to_thread(stack.enter_context, process(ASKER_PROCESS, theirs))
            assert await asker.count_tunnels(["many"]) == [51]
            child.send_signal(signal.SIGSTOP)
            assert await asker.count_tunnels(["many"]) == [51]
            child.kill()
            child.wait()
            assert await asker.count_tunnels(["many"]) == [1]
        asker.close()


@in_loop
async def test_a_stopped_ledger_costs_one_timeout_and_recovers() -> None:
    reports: list[str] = []
    first, second = (SharedCounters(timeout=0.2, report=reports.append) for _ in range(2))
    pairs = [socket.socketpair() for _ in range(2)]
    with process(LEDGER_PROCESS, *(theirs for _, theirs in pairs)) as child:
        for asker, (ours, _) in zip((first, second), pairs, strict=True):
            asker.attach(ours)
            assert await asker.check(MANY_TUNNELS) == WITHIN
        child.send_signal(signal.SIGSTOP)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.gather(*(first.check(MANY_TUNNELS) for _ in range(100)))
        assert 0.19 < loop.time() - began < 5
        for _ in range(100):
            with pytest.raises(StopIteration):  # it waits for nothing
                first.check(MANY_TUNNELS).send(None)
        first.return_tunnels(["many"] * 11)
        child.send_signal(signal.SIGCONT)
        await wait_until(lambda: first.answering == LEDGER)
        # 1 and 200 of the first, without the 11 returned, and 1 of the second: the expired ones were not counted.
        assert await second.count_tunnels(["many"]) == [191]
        assert reports == [
            "the ledger did not answer within 200 ms: this process counts alone until the ledger answers",
            RECOVERED,
        ]
        first.close()
        second.close()


@in_loop
async def test_a_killed_ledger_is_replaced() -> None:
    reports: list[str] = []
    askers = [SharedCounters(timeout=20, report=reports.append) for _ in range(2)]
    for round_ in range(2):
        pairs = [socket.socketpair() for _ in askers]
        with process(LEDGER_PROCESS, *(theirs for _, theirs in pairs)) as child:
            for asker, (ours, _) in zip(askers, pairs, strict=True):
                asker.attach(ours)
            await wait_until(lambda: all(asker.answering == LEDGER for asker in askers))
            for asker in askers:
                assert await asker.check(MANY_TUNNELS) == WITHIN
            assert await askers[0].count_tunnels(["many"]) == [[2], [6]][round_]
            child.kill()
            for asker in askers:
                await wait_until(lambda asker=asker: asker.answering != LEDGER)  # type: ignore[misc]
                assert await asker.check(MANY_TUNNELS) == WITHIN
    assert reports.count(RECOVERED) == 2
    assert len(reports) == 6
