"""A serving process that was taken over cannot bloat, block or crash the ledger, nor other processes."""

import asyncio
import contextlib
import math
import socket
import time
from pathlib import Path

import msgspec
import pytest

from tests.unit.test_state_server import HELLO, THREE_TUNNELS, WITHIN, Running, batch, in_loop, ledger, wait_until
from tlstunnel.state import wire
from tlstunnel.state.announcements import MAX_KEPT, MAX_PER_SECOND
from tlstunnel.state.counters import MAX_KEY, MAX_MOVING, MAX_SECONDS, MAX_TUNNELS, LimitCheck
from tlstunnel.state.ledger import MAX_CHECKS, MAX_KEYS_HELD
from tlstunnel.state.server import LONGEST_REASON

ENDLESS = 1e12


def ask(*checks: LimitCheck, deadline: float = ENDLESS) -> bytes:
    return wire.encode_batch(wire.Batch(deadline, [wire.Ask(1, list(checks))]))[0]


def raw(*items: object) -> bytes:
    """Return a frame with messages that the classes would not encode."""
    return wire.frame(msgspec.msgpack.encode([ENDLESS, list(items)]))


LONG = "k" * (MAX_KEY + 1)

REFUSED = {
    "long key": ask(LimitCheck(LONG, 1, 1)),
    "key of 1 MB": ask(LimitCheck("k" * 1_000_000, 1, 1)),
    "long key of a count": batch(wire.Count(1, [LONG])),
    "long key of a lease": batch(wire.Take({LONG: 1})),
    "long key to return": batch(wire.Return([LONG])),
    "amount of 2^63": ask(LimitCheck("k", 1 << 63, 60)),
    "negative amount": ask(LimitCheck("k", -1, 60)),
    "no window": ask(LimitCheck("k", 1, 0)),
    "negative window": ask(LimitCheck("k", 1, -60)),
    "endless window": ask(LimitCheck("k", 1, 1 << 62)),
    "moving window of any size": ask(LimitCheck("k", MAX_MOVING + 1, 60, "moving")),
    "tunnels": ask(LimitCheck("k", max_tunnels=1 << 63)),
    "block for ever": ask(LimitCheck("k", 1, 60, block_for=math.inf)),
    "block for NaN": ask(LimitCheck("k", 1, 60, block_for=math.nan)),
    "block into the past": ask(LimitCheck("k", 1, 60, block_for=-1.0)),
    "block beyond all measure": ask(LimitCheck("k", 1, 60, block_for=1e300)),
    "many checks": ask(*[LimitCheck("k", 1, 60)] * (MAX_CHECKS + 1)),
    "many checks in a frame": raw(*([1, 0, [["k"]] * 1000] for _ in range(10))),
    "many keys in a frame": batch(wire.Return(["k"] * (wire.MAX_ITEMS + 1))),
    "many messages in a frame": batch(*[wire.Probe()] * (wire.MAX_ITEMS + 1)),
    "many tunnels": batch(*[wire.Take({"k": MAX_TUNNELS})] * 2),
    "text of 1 MB": raw([6, "t", "x" * 1_000_000]),
    "kept for ever": raw([6, "t", "x", "k", math.inf]),
    "kept for NaN": raw([6, "t", "x", "k", math.nan]),
    "a strategy with escape characters": raw([1, 0, [["k", 1, 60, "\x1b[2J" + "x" * 100_000]]]),
    "not UTF-8": wire.frame(b"\x92\x00\x91\x92\x03\x91\xa1\xff"),
    "nested": wire.frame(b"\x91" * 100_000),
    "an array that is not there": wire.frame(b"\x92\x00\xdd\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("sent", REFUSED.values(), ids=REFUSED)
@in_loop
async def test_what_no_process_sends_ends_its_connection(sent: bytes) -> None:
    """With one short line in the log. Nothing of it is kept, and others notice nothing."""
    async with ledger() as running:
        good = running.connect()
        assert await good.check(THREE_TUNNELS) == WITHIN
        with running.connect_raw() as hostile:
            await send(hostile, HELLO + sent)
            await wait_until(lambda: running.reports)
        (report,) = running.reports
        assert report.isprintable()
        assert len(report) <= len("the ledger has closed the connection of serving 7: ") + LONGEST_REASON
        assert running.counters.tunnels == {"three": 1}
        assert len(running.counters.storage) == 0
        assert await good.count_tunnels(["three"]) == [1]
        good.close()


async def send(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


@pytest.mark.parametrize("deadline", [math.nan, math.inf, -math.inf, 1e300, -1e300])
@in_loop
async def test_any_deadline_is_one(deadline: float) -> None:
    async with ledger() as running:
        with running.connect_raw() as hostile:
            await send(hostile, HELLO + ask(LimitCheck("k", 1, 60), deadline=deadline) + batch(wire.Probe()))
            await wait_until(lambda: sum_of(running) == 1)
            assert running.reports == []


def sum_of(running: Running) -> int:
    stats = running.server.stats()
    return stats.answered + stats.expired


@pytest.mark.parametrize("most", [3_000, pytest.param(MAX_KEYS_HELD, marks=pytest.mark.soak)])
@in_loop
async def test_no_process_can_use_more_than_its_part_of_the_memory(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many times as many keys are declared, asked for and counted."""
    monkeypatch.setattr("tlstunnel.state.ledger.MAX_KEYS_HELD", most)
    async with ledger() as running:
        good = running.connect()
        assert await good.check(THREE_TUNNELS) == WITHIN
        before = resident()
        for how in range(3):
            hostile = running.connect_raw()
            with hostile:
                await send(hostile, HELLO)
                number = 0
                while not running.reports and number < 4 * most:
                    keys = [f"{number + index:0128}" for index in range(1000)]
                    number += 1000
                    message: wire.AskerMessage
                    if how == 0:
                        message = wire.Take(dict.fromkeys(keys, 1))
                    elif how == 1:
                        message = wire.Ask(number, [LimitCheck(key, max_tunnels=1) for key in keys])
                    else:
                        message = wire.Ask(number, [LimitCheck(key, 1, 3600) for key in keys])
                    frame = wire.encode_batch(wire.Batch(ENDLESS, [message]))[0]
                    with contextlib.suppress(OSError):
                        await send(hostile, frame)
                        if how and not running.reports:
                            await asyncio.get_running_loop().sock_recv(hostile, 1 << 20)
                    assert len(running.counters.tunnels) <= most + 1001
                if how < 2:
                    await wait_until(lambda: running.reports)
                    reason = f"tunnels under more than {most} keys"
                    assert running.reports.pop() == f"the ledger has closed the connection of serving 7: {reason}"
            await wait_until(lambda: running.counters.tunnels == {"three": 1})
        assert len(running.counters.storage) <= 200_000
        assert resident() - before < 250e6
        assert await good.check(THREE_TUNNELS) == WITHIN
        good.close()


def resident() -> float:
    """Return the resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.alone
@in_loop
async def test_no_process_can_keep_the_ledger_from_others() -> None:
    """One sends the most expensive frames as fast as it can; others get their answers within a moment."""
    expensive = {
        "checks": batch_of_checks(),
        "declarations": batch(*[wire.Declare({})] * 4000),
        "leases": batch(wire.Take({f"{key}": MAX_TUNNELS // 1000 for key in range(4000)}), wire.Declare({})),
        "announcements": batch(*[wire.Announce("t", "x", f"{key}", 60.0) for key in range(4000)]),
        "returns": batch(wire.Return([f"{key}" for key in range(4000)])),
        "small frames": raw([1, 0, [["k"]] * 1000]),
        "probes": batch(*[wire.Probe()] * 4000),
    }
    async with ledger() as running:
        good = running.connect()
        for name, frame in expensive.items():
            with running.connect_raw() as hostile:
                await send(hostile, HELLO)
                flooding = asyncio.ensure_future(flood(hostile, frame))
                slowest = 0.0
                for _ in range(30):
                    began = time.monotonic()
                    await good.count_tunnels(["three"])
                    slowest = max(slowest, time.monotonic() - began)
                flooding.cancel()
                await asyncio.gather(flooding, return_exceptions=True)
            assert not running.reports, name
            assert slowest < 0.5, name  # usually 0.1 s: one frame of each, which is bounded
            await wait_until(lambda: running.server.stats().connections == 1)
        good.close()


def batch_of_checks() -> bytes:
    checks = [LimitCheck(f"{key}", MAX_MOVING, 3600, "moving") for key in range(MAX_CHECKS)]
    return wire.encode_batch(wire.Batch(ENDLESS, [wire.Ask(number, checks) for number in range(3)]))[0]


async def flood(sock: socket.socket, frame: bytes) -> None:
    """Send a frame again and again, and read what is answered, until cancelled."""
    reading = asyncio.ensure_future(read_all(sock))
    try:
        while True:
            await send(sock, frame * 20)
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def read_all(sock: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(sock, 1 << 20):
        pass


@in_loop
async def test_no_process_changes_the_leases_of_another() -> None:
    async with ledger() as running:
        good = running.connect()
        assert await good.check(THREE_TUNNELS) == WITHIN
        with running.connect_raw() as hostile:
            await send(hostile, HELLO + batch(wire.Return(["three"] * 100), wire.Declare({"three": 0})))
            await send(hostile, batch(wire.Take({"three": 0}), wire.Return(["other"]), wire.Probe()))
            await wait_until(lambda: hostile_has_read(hostile))
            assert running.counters.tunnels == {"three": 1}
        await wait_until(lambda: running.server.stats().connections == 1)
        assert running.counters.tunnels == {"three": 1}
        good.close()
        assert running.reports == []


def hostile_has_read(sock: socket.socket) -> bytes:
    try:
        data: bytes = sock.recv(1 << 16)
    except BlockingIOError:
        return b""
    return data if len(data) > len(HELLO) else b""


@in_loop
async def test_announcements_are_bounded() -> None:
    """A process hears at most so many of another, and one that connects later the last ones."""
    async with ledger() as running:
        good = running.connect()
        heard: list[str] = []
        good.on_announcement = lambda _, text, __: heard.append(text)
        await good.count_tunnels([])
        with running.connect_raw() as hostile:
            await send(hostile, HELLO)
            texts = ["\x1b[2J" * 1000, "\U0001f600" * 4096, *map(str, range(2 * MAX_PER_SECOND))]
            for text in texts:
                await send(hostile, batch(wire.Announce("t", text, text[:9], wire.MAX_LIFE)))
            await send(hostile, batch(*[wire.Announce("t", text) for text in texts * 4]))
            await wait_until(lambda: len(heard) >= MAX_PER_SECOND)
            await good.count_tunnels([])
            assert MAX_PER_SECOND <= len(heard) <= 2 * MAX_PER_SECOND
        late = running.connect()
        later: list[str] = []
        late.on_announcement = lambda _, text, age: later.append(text) if age >= 0 else None
        await late.count_tunnels([])
        await wait_until(lambda: later)
        await late.count_tunnels([])
        assert "0" in later
        assert len(later) <= MAX_KEPT
        assert max(map(len, later)) < 512
        late.close()
        good.close()
        assert running.reports == []


def test_no_window_lasts_for_ever() -> None:
    """The longest that can be asked for are the longest that can be configured."""
    longest = LimitCheck("k", 1, MAX_SECONDS, block_for=MAX_SECONDS)
    decoded = wire.DIALECTS[1].decode_batch(ask(longest)[4:]).messages[0]
    assert isinstance(decoded, wire.Ask)
    assert decoded.checks == [longest]
