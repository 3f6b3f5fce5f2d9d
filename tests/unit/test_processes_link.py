"""The link between a parent and a child."""

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.errors import ProcessError
from tlstunnel.processes.link import MAX_FDS, Link, Notifications, Requests
from tlstunnel.processes.messages import Commit, Done, LinkReply, Load, Notification, Request, Status

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(), lambda inner: st.lists(inner, max_size=5)
)


class Echoed(LinkReply, frozen=True):
    """Return the same value, and the number of descriptors that came with it."""

    said: Any
    count: int


class Echo(Request[Echoed], frozen=True, tag="echo"):
    """Send it back."""

    value: Any = None
    reply: ClassVar[type[LinkReply]] = Echoed


class Refuse(Request[Done], frozen=True, tag="refuse"):
    """Refuse it."""


class Fail(Request[Done], frozen=True, tag="fail"):
    """Fail."""


class Hang(Request[Done], frozen=True, tag="hang"):
    """Send no reply."""


class Seen(Notification, frozen=True, tag="seen"):
    """Record the number."""

    number: int


class Unseen(Notification, frozen=True, tag="unseen"):
    """A message whose type the other side does not know."""


async def _echo(request: Echo, descriptors: list[int]) -> Echoed:
    for fd in descriptors:
        os.close(fd)
    return Echoed(request.value, len(descriptors))


async def _refuse(_: Refuse, __: list[int]) -> Done:
    raise ProcessError("not today")


async def _fail(_: Fail, __: list[int]) -> Done:
    raise ZeroDivisionError


async def _hang(_: Hang, __: list[int]) -> Done:
    await asyncio.Event().wait()
    return Done()


def _linked(work: Callable[[Link, Link, list[str]], Awaitable[None]]) -> None:
    async def run() -> None:
        events: list[str] = []
        ours, theirs = socket.socketpair()
        handlers: Requests = {Echo: _echo, Refuse: _refuse, Fail: _fail, Hang: _hang}
        seen: Notifications = {Seen: lambda notification: events.append(f"seen {notification.number}")}
        near = Link(ours, {}, lambda: events.append("near"), seen)
        far = Link(theirs, handlers, lambda: events.append("far"))
        try:
            await work(near, far, events)
        finally:
            near.close()
            far.close()

    asyncio.run(run())


def test_messages_sent_before_the_exit_are_handled() -> None:
    """The process has exited, and its last notifications have not been read yet."""

    async def work(near: Link, far: Link, events: list[str]) -> None:
        for number in range(200):
            far.notify(Seen(number))
        far.close()
        near.read_rest()
        assert events[:200] == [f"seen {number}" for number in range(200)]
        assert near.closed
        near.read_rest()

    _linked(work)


def test_a_request_that_comes_too_late_loses_no_message() -> None:
    """The process has closed its end; sending to it fails before its last notification was read."""

    async def work(near: Link, far: Link, events: list[str]) -> None:
        far.notify(Seen(1))
        far.close()
        with pytest.raises(ProcessError):
            await near.request(Echo())
        assert events == ["seen 1", "near"]

    _linked(work)


def test_the_rest_of_a_link_that_another_process_holds_open_is_read_too() -> None:
    async def work(near: Link, far: Link, events: list[str]) -> None:
        far.notify(Seen(1))
        near.read_rest()
        assert events == ["seen 1"]
        assert near.closed

    _linked(work)


@given(st.lists(JSON, max_size=20))
def test_each_reply_belongs_to_its_request(values: list[Any]) -> None:
    async def work(near: Link, _: Link, __: list[str]) -> None:
        replies = await asyncio.gather(*(near.request(Echo(value)) for value in values))
        assert [reply.said for reply in replies] == values
        assert near.idle

    _linked(work)


def test_a_text_larger_than_the_sockets_buffers() -> None:
    async def work(near: Link, _: Link, __: list[str]) -> None:
        text = "ä" * 3_000_000
        assert (await near.request(Echo(text))).said == text

    _linked(work)


def test_a_path_that_is_not_utf_8() -> None:
    async def work(near: Link, _: Link, __: list[str]) -> None:
        path = os.fsdecode(b"/etc/\xff.toml")
        assert (await near.request(Echo(path))).said == path

    _linked(work)


def test_descriptors_come_with_their_message() -> None:
    async def work(near: Link, _: Link, __: list[str]) -> None:
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with socket.socket() as one:
            counts = [0, 1, MAX_FDS, 2, 0, MAX_FDS]
            replies = await asyncio.gather(
                *(near.request(Echo("x" * 10_000), [one.fileno()] * count) for count in counts)
            )
            assert [reply.count for reply in replies] == counts
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208

    _linked(work)


def test_a_refusal_and_a_fault() -> None:
    async def work(near: Link, _: Link, __: list[str]) -> None:
        with pytest.raises(ProcessError, match="not today"):
            await near.request(Refuse())
        with pytest.raises(ProcessError, match="ZeroDivisionError"):
            await near.request(Fail())
        with pytest.raises(ProcessError, match="invalid request"):
            await near.request(Commit())
        assert (await near.request(Echo(1))).said == 1

    _linked(work)


def test_a_side_that_accepts_no_requests() -> None:
    async def work(_: Link, far: Link, __: list[str]) -> None:
        with pytest.raises(ProcessError, match="invalid request"):
            await far.request(Commit())

    _linked(work)


def test_the_end_of_the_other_side_is_noticed_once() -> None:
    async def work(near: Link, far: Link, events: list[str]) -> None:
        pending = asyncio.ensure_future(near.request(Hang()))
        await asyncio.sleep(0)
        far.close()
        with pytest.raises(ProcessError, match="the process has exited"):
            await pending
        assert events == ["near"]
        assert near.closed
        near.notify(Seen(1))
        with pytest.raises(ProcessError, match="the process has exited"):
            await near.request(Echo())

    _linked(work)


# --- notifications ----------------------------------------------------------------------------------------------------


def test_notifications_come_in_order_and_before_what_follows() -> None:
    async def work(near: Link, far: Link, events: list[str]) -> None:
        far.notify(Seen(1))
        far.notify(Unseen())
        far.notify(Seen(2))
        await near.request(Echo())
        assert events == ["seen 1", "seen 2"]

    _linked(work)


def test_a_notification_that_cannot_be_handled_harms_nothing() -> None:
    async def work(near: Link, far: Link, events: list[str]) -> None:
        far.notify(Seen("x"))  # type: ignore[arg-type]
        far.notify(Seen(2))
        await near.request(Echo())
        assert events == ["seen 2"]

    _linked(work)


# --- the wire format, which other releases use too --------------------------------------------------------------------


def _lines(sock: socket.socket) -> list[dict[str, Any]]:
    return [json.loads(line) for line in sock.recv(65_536).splitlines()]


def test_the_wire_format() -> None:
    """The lines that the code of format 2 wrote and read."""

    async def work() -> None:
        ours, theirs = socket.socketpair()
        link = Link(ours, {Echo: _echo, Refuse: _refuse}, lambda: None)
        with theirs:
            pending = asyncio.ensure_future(link.request(Status()))
            await asyncio.sleep(0)
            assert _lines(theirs) == [{"ask": 1, "do": "status", "scraped": False, "fds": 0}]
            theirs.sendall(b'{"answer": 1, "ok": true, "tunnels": 3, "handshakes": 4, "later": 5, "fds": 0}\n')
            assert await pending == Load(3, 4)
            theirs.sendall(
                b'{"ask": 9, "do": "echo", "value": 1, "later": 2, "fds": 0}\n{"ask": 10, "do": "refuse", "fds": 0}\n'
            )
            theirs.settimeout(0)
            received: list[dict[str, Any]] = []
            while len(received) < 2:
                await asyncio.sleep(0.001)
                try:
                    received += _lines(theirs)
                except BlockingIOError:
                    continue
            assert received == [
                {"answer": 9, "ok": True, "said": 1, "count": 0, "fds": 0},
                {"answer": 10, "ok": False, "error": "not today", "fds": 0},
            ]
            link.notify(Seen(7))
            assert _lines(theirs) == [{"answer": 0, "do": "seen", "number": 7, "fds": 0}]
            link.close()

    asyncio.run(work())


def test_a_reply_without_its_fields() -> None:
    async def work() -> None:
        ours, theirs = socket.socketpair()
        link = Link(ours, {}, lambda: None)
        with theirs:
            pending = asyncio.ensure_future(link.request(Status()))
            await asyncio.sleep(0)
            theirs.sendall(b'{"answer": 1, "ok": true, "fds": 0}\n')
            with pytest.raises(ProcessError, match="an invalid reply"):
                await pending
            link.close()

    asyncio.run(work())
