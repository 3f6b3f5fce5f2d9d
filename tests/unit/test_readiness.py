"""Readiness on real sockets: which events a handler gets, when, and that its faults do not affect others."""

import asyncio
import contextlib
import functools
import selectors
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator

import pytest
from structlog.testing import capture_logs

from tlstunnel.sockets import readiness as module
from tlstunnel.sockets.readiness import (
    EDGE_TRIGGERED,
    ERR,
    EVENTS_WHILE_EXPECTING,
    HUP,
    IN,
    OUT,
    RDHUP,
    Readiness,
    TunnelLoop,
    readiness,
)

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pairs() -> Iterator[Callable[[], Pair]]:
    """Connected sockets, non-blocking."""
    with contextlib.ExitStack() as stack:

        def pair() -> Pair:
            both = socket.socketpair()
            for sock in both:
                sock.setblocking(False)
                stack.enter_context(sock)
            return both

        yield pair


def run(test: Callable[[Readiness], Awaitable[None]]) -> None:
    """Run `test`, and check for failures that only the loop would report."""
    faults: list[object] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: faults.append(context))
        watched = Readiness(loop)
        try:
            await test(watched)
        finally:
            watched.close()

    asyncio.run(main(), debug=True)
    assert faults == []


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0)


async def some_turns(watched: Readiness) -> None:
    """Let ten wake-ups pass."""
    turns = 0

    def count(_: int) -> None:
        nonlocal turns
        turns += 1

    reader, writer = socket.socketpair()
    with reader, writer:
        writer.send(b"x")
        watched.register(reader.fileno(), IN, count)
        await until(lambda: turns >= 10)
        watched.unregister(reader.fileno())


def test_handler_is_called_as_long_as_there_is_something_to_read(pairs: Callable[[], Pair]) -> None:
    near, far = pairs()
    events: list[int] = []

    async def test(watched: Readiness) -> None:
        watched.register(near.fileno(), IN, events.append)
        await some_turns(watched)
        assert events == []
        far.send(b"x")
        await until(lambda: len(events) >= 3)
        assert set(events) == {IN}
        near.recv(1)
        await some_turns(watched)  # one more call may have been due
        events.clear()
        await some_turns(watched)
        assert events == []

    run(test)


def test_handler_is_called_when_there_is_room_to_write(pairs: Callable[[], Pair]) -> None:
    near, far = pairs()
    events: list[int] = []
    sent = 0

    async def test(watched: Readiness) -> None:
        nonlocal sent
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += near.send(bytes(65_536))
        watched.register(near.fileno(), OUT, events.append)
        await some_turns(watched)
        assert events == []
        while sent > 0:
            sent -= len(far.recv(sent))
        await until(lambda: events)
        assert set(events) == {OUT}

    run(test)


def test_both_directions_can_be_watched(pairs: Callable[[], Pair]) -> None:
    near, far = pairs()
    seen = 0

    def note(events: int) -> None:
        nonlocal seen
        seen |= events

    async def test(watched: Readiness) -> None:
        far.send(b"x")
        watched.register(near.fileno(), IN | OUT, note)
        await until(lambda: seen == IN | OUT)

    run(test)


def test_what_is_expected_comes_first_and_few_others_with_it(pairs: Callable[[], Pair]) -> None:
    called: list[int] = []

    def note(fd: int, _: int) -> None:
        called.append(fd)

    others = [pairs() for _ in range(2 * EVENTS_WHILE_EXPECTING)]
    near, far = pairs()
    with contextlib.closing(Readiness()) as watched:
        for one, other in (*others, (near, far)):
            other.send(b"x")
            watched.register(one.fileno(), IN, functools.partial(note, one.fileno()))
        watched.begin_expecting(near.fileno())
        for _ in range(3):
            called.clear()
            watched.turn(0)
            assert called[0] == near.fileno()
            assert called.count(near.fileno()) == 1
            assert len(called) <= EVENTS_WHILE_EXPECTING + 1
        watched.end_expecting(others[0][0].fileno())
        assert watched.expecting, "another one was meant"
        watched.end_expecting(near.fileno())
        called.clear()
        watched.turn(0)
        assert sorted(called) == sorted(one.fileno() for one, _ in (*others, (near, far)))


def test_end_of_the_peer_is_readable(pairs: Callable[[], Pair]) -> None:
    near, far = pairs()
    seen = 0

    def note(events: int) -> None:
        nonlocal seen
        seen |= events

    async def test(watched: Readiness) -> None:
        watched.register(near.fileno(), IN, note)
        far.close()
        await until(lambda: seen & IN)
        assert near.recv(1) == b""

    run(test)


def test_modify_changes_what_is_watched(pairs: Callable[[], Pair]) -> None:
    near, far = pairs()
    events: list[int] = []

    async def test(watched: Readiness) -> None:
        far.send(b"x")
        watched.register(near.fileno(), IN, events.append)
        await until(lambda: events)
        watched.modify(near.fileno(), 0)
        events.clear()
        await some_turns(watched)
        assert events == []
        watched.modify(near.fileno(), OUT)
        await until(lambda: events)
        assert set(events) == {OUT}
        watched.modify(near.fileno(), IN)
        events.clear()
        await until(lambda: events)
        assert set(events) == {IN}

    run(test)


def test_modify_may_change_the_handler(pairs: Callable[[], Pair]) -> None:
    near, far = pairs()
    first: list[int] = []
    second: list[int] = []

    async def test(watched: Readiness) -> None:
        far.send(b"x")
        watched.register(near.fileno(), IN, first.append)
        watched.modify(near.fileno(), IN, second.append)
        await until(lambda: second)
        assert first == []
        assert len(watched) == 1

    run(test)


def test_unregistered_is_not_called(pairs: Callable[[], Pair]) -> None:
    near, far = pairs()
    events: list[int] = []

    async def test(watched: Readiness) -> None:
        far.send(b"x")
        watched.register(near.fileno(), IN | OUT, events.append)
        watched.unregister(near.fileno())
        await some_turns(watched)
        assert events == []

    run(test)


def test_a_socket_that_is_not_watched_can_be_unregistered(pairs: Callable[[], Pair]) -> None:
    near, _ = pairs()

    async def test(watched: Readiness) -> None:
        watched.unregister(near.fileno())
        watched.register(near.fileno(), IN, print)
        watched.unregister(near.fileno())
        watched.unregister(near.fileno())
        assert len(watched) == 0

    run(test)


def test_closed_socket_can_be_unregistered_and_its_descriptor_used_again(pairs: Callable[[], Pair]) -> None:
    near, _ = pairs()
    stale: list[int] = []
    fresh: list[int] = []

    async def test(watched: Readiness) -> None:
        fd = near.fileno()
        watched.register(fd, IN, stale.append)
        near.close()
        watched.unregister(fd)
        again, far = pairs()
        assert fd in (again.fileno(), far.fileno())
        watched.register(again.fileno(), IN, fresh.append)
        far.send(b"x")
        await until(lambda: fresh)
        assert stale == []

    run(test)


def test_handler_may_unregister_itself(pairs: Callable[[], Pair]) -> None:
    near, far = pairs()
    calls = 0

    async def test(watched: Readiness) -> None:
        def once(_: int) -> None:
            nonlocal calls
            calls += 1
            watched.unregister(near.fileno())

        far.send(b"x")
        watched.register(near.fileno(), IN | OUT, once)
        await some_turns(watched)
        assert calls == 1

    run(test)


def test_handler_may_close_a_socket_that_is_ready_too(pairs: Callable[[], Pair]) -> None:
    ready = [pairs() for _ in range(2)]
    called: list[int] = []

    async def test(watched: Readiness) -> None:
        def handler(own: int) -> Callable[[int], None]:
            def close_the_other(_: int) -> None:
                called.append(own)
                near = ready[1 - own][0]
                watched.unregister(near.fileno())
                near.close()
                watched.unregister(ready[own][0].fileno())

            return close_the_other

        for number, (near, far) in enumerate(ready):
            far.send(b"x")
            watched.register(near.fileno(), IN, handler(number))
        with capture_logs() as logs:
            await some_turns(watched)
        assert len(called) == 1
        assert logs == []

    run(test)


def test_handler_may_register_another(pairs: Callable[[], Pair]) -> None:
    (near, far), (other, _) = pairs(), pairs()
    events: list[int] = []

    async def test(watched: Readiness) -> None:
        def begin(_: int) -> None:
            watched.unregister(near.fileno())
            watched.register(other.fileno(), OUT, events.append)

        far.send(b"x")
        watched.register(near.fileno(), IN, begin)
        await until(lambda: events)

    run(test)


def test_handler_that_raises_loses_only_itself(pairs: Callable[[], Pair]) -> None:
    (near, far), (other, other_far) = pairs(), pairs()
    calls = 0
    events: list[int] = []

    async def test(watched: Readiness) -> None:
        def fault(_: int) -> None:
            nonlocal calls
            calls += 1
            raise LookupError("of ours")

        far.send(b"x")
        other_far.send(b"x")
        watched.register(near.fileno(), IN, fault)
        watched.register(other.fileno(), IN, events.append)
        with capture_logs() as logs:
            await until(lambda: calls)
            events.clear()
            await until(lambda: len(events) >= 3)
        assert calls == 1
        assert len(watched) == 1
        assert [line["event"] for line in logs] == ["handler failed"]

    run(test)


def test_length_is_the_number_of_watched_sockets(pairs: Callable[[], Pair]) -> None:
    async def test(watched: Readiness) -> None:
        socks = [pairs()[0] for _ in range(3)]
        for number, sock in enumerate(socks, 1):
            watched.register(sock.fileno(), IN, print)
            assert len(watched) == number
        watched.modify(socks[0].fileno(), OUT)
        assert len(watched) == 3
        watched.unregister(socks[0].fileno())
        assert len(watched) == 2

    run(test)


def test_nothing_is_called_after_close(pairs: Callable[[], Pair]) -> None:
    ready = [pairs() for _ in range(3)]
    events: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        watched, others = Readiness(loop), Readiness(loop)
        for near, far in ready:
            far.send(b"x")
            watched.register(near.fileno(), IN | OUT, events.append)
        watched.close()
        assert len(watched) == 0
        await some_turns(others)
        assert events == []

    asyncio.run(main(), debug=True)


def test_edge_is_reported_once(pairs: Callable[[], Pair]) -> None:
    near, far = pairs()
    events: list[int] = []

    async def test(watched: Readiness) -> None:
        far.send(b"x")
        watched.register(near.fileno(), EDGE_TRIGGERED | IN | RDHUP, events.append)
        await some_turns(watched)
        assert events == [IN]

    run(test)


def test_edge_is_reported_again_with_new_bytes(pairs: Callable[[], Pair]) -> None:
    near, far = pairs()
    events: list[int] = []

    async def test(watched: Readiness) -> None:
        watched.register(near.fileno(), EDGE_TRIGGERED | IN | RDHUP, events.append)
        for _ in range(3):
            events.clear()
            far.send(b"x")
            await until(lambda: events)

    run(test)


def test_edge_is_reported_after_modify(pairs: Callable[[], Pair]) -> None:
    """EPOLL_CTL_MOD checks again: a handler that waits for room to write is called at once."""
    near, _ = pairs()
    events: list[int] = []

    async def test(watched: Readiness) -> None:
        watched.register(near.fileno(), EDGE_TRIGGERED | IN | RDHUP, events.append)
        await some_turns(watched)
        assert events == []
        watched.modify(near.fileno(), EDGE_TRIGGERED | IN | OUT | RDHUP)
        await until(lambda: events)
        assert set(events) == {OUT}

    run(test)


@pytest.mark.parametrize("mask", [0, OUT, IN])
def test_error_and_hang_up_are_reported_whatever_is_watched(mask: int) -> None:
    """Also while paused (mask 0): a handler that ignores them there spins."""
    seen = 0

    def note(events: int) -> None:
        nonlocal seen
        seen |= events

    async def test(watched: Readiness) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.create_connection(listener.getsockname())
            far, _ = listener.accept()
        with near:
            watched.register(near.fileno(), mask, note)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            far.close()
            await until(lambda: seen & (ERR | HUP) == ERR | HUP)
            watched.unregister(near.fileno())

    run(test)


def test_half_close_is_reported_as_rdhup(pairs: Callable[[], Pair]) -> None:
    near, far = pairs()
    seen = 0

    def note(events: int) -> None:
        nonlocal seen
        seen |= events

    async def test(watched: Readiness) -> None:
        watched.register(near.fileno(), EDGE_TRIGGERED | IN | RDHUP, note)
        far.shutdown(socket.SHUT_WR)
        await until(lambda: seen & RDHUP)

    run(test)


def test_one_wake_up_serves_a_limited_number_and_then_the_loop(
    pairs: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVENTS_PER_TURN", 2)
    ready = [pairs() for _ in range(6)]
    log: list[int | str] = []

    async def test(watched: Readiness) -> None:
        loop = asyncio.get_running_loop()

        def tick() -> None:
            log.append("loop")
            loop.call_soon(tick)

        def serve(fd: int) -> Callable[[int], None]:
            return lambda _: log.append(fd)

        for near, far in ready:
            far.send(b"x")
            watched.register(near.fileno(), IN, serve(near.fileno()))
        loop.call_soon(tick)
        await until(lambda: {near.fileno() for near, _ in ready} <= set(log))

    run(test)
    served = "".join("." if entry == "loop" else "x" for entry in log).split(".")
    assert max(len(turn) for turn in served) == 2


def test_idle_costs_no_wake_up(pairs: Callable[[], Pair]) -> None:
    near, _ = pairs()
    events: list[int] = []

    async def test(watched: Readiness) -> None:
        watched.register(near.fileno(), IN | RDHUP, events.append)
        await asyncio.sleep(0.05)
        assert events == []

    run(test)


# Descriptors that asyncio itself watches, in the same epoll.


@pytest.fixture
def selector() -> Iterator[selectors.BaseSelector]:
    with contextlib.closing(module._Selector(Readiness())) as made:
        yield made


def test_asyncio_finds_what_it_registered_by_file_object_and_by_descriptor(
    selector: selectors.BaseSelector, pairs: Callable[[], Pair]
) -> None:
    """As `add_reader` and `remove_reader` look for it since Python 3.13, where a listener is given as an object."""
    near, far = pairs()
    assert selector.get_map().get(near) is None
    key = selector.register(near, selectors.EVENT_READ, "reader")
    assert selector.get_map().get(near) == key
    assert selector.get_map()[near.fileno()] == key
    assert selector.get_key(near) == selector.get_key(near.fileno()) == key
    changed = selector.modify(near, selectors.EVENT_READ | selectors.EVENT_WRITE, "both")
    assert selector.get_map().get(near) == changed
    assert selector.get_map().get(far) is None
    assert list(selector.get_map()) == [near.fileno()]
    assert len(selector.get_map()) == 1
    assert selector.unregister(near) == changed
    assert selector.get_map().get(near) is None
    with pytest.raises(KeyError):
        selector.get_key(near)


def test_asyncio_finds_a_file_object_that_was_closed(
    selector: selectors.BaseSelector, pairs: Callable[[], Pair]
) -> None:
    """As with the selectors of the standard library: the reader of a listener can still be removed."""
    near, far = pairs()
    key = selector.register(near, selectors.EVENT_READ)
    near.close()
    far.close()
    assert selector.get_map().get(near) == key
    assert selector.get_map().get(far) is None
    selector.unregister(near)
    assert len(selector.get_map()) == 0
    assert selector.select(0) == []


def test_reader_of_a_listener_is_replaced_and_removed() -> None:
    """Every reload does this, with the listener's socket rather than its descriptor."""
    first: list[None] = []
    second: list[None] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
            loop.add_reader(listener, first.append, None)
            loop.add_reader(listener, second.append, None)
            await until(lambda: second)
            assert loop.remove_reader(listener)
            assert not loop.remove_reader(listener)
            second.clear()
            for _ in range(10):
                await asyncio.sleep(0)
        assert first == second == []

    with asyncio.Runner(loop_factory=TunnelLoop, debug=True) as runner:
        runner.run(main())


# Which instance a loop has.


def test_the_loop_of_the_tunnels_has_one_and_any_other_gets_one() -> None:
    async def own() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, TunnelLoop)
        assert readiness(loop) is loop.readiness

    async def foreign() -> None:
        loop = asyncio.get_running_loop()
        with contextlib.closing(readiness(loop)) as first, contextlib.closing(readiness(loop)) as second:
            assert first is not second

    with asyncio.Runner(loop_factory=TunnelLoop) as runner:
        runner.run(own())
    asyncio.run(foreign())
