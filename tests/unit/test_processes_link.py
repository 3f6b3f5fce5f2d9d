"""What parent and child say to each other."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlstunnel.errors import ProcessError
from tlstunnel.processes.link import MOST_FDS, Link

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(), lambda inner: st.lists(inner, max_size=5)
)


async def _echo(request: Mapping[str, Any], descriptors: list[int]) -> Mapping[str, Any]:
    for fd in descriptors:
        os.close(fd)
    return {"said": request.get("value"), "count": len(descriptors)}


async def _refuse(_: Mapping[str, Any], __: list[int]) -> Mapping[str, Any]:
    raise ProcessError("not today")


async def _fail(_: Mapping[str, Any], __: list[int]) -> Mapping[str, Any]:
    raise ZeroDivisionError


async def _never(_: Mapping[str, Any], __: list[int]) -> Mapping[str, Any]:
    await asyncio.Event().wait()
    return {}


def _linked(work: Callable[[Link, Link, list[str]], Awaitable[None]]) -> None:
    async def run() -> None:
        gone: list[str] = []
        ours, theirs = socket.socketpair()
        handlers = {"echo": _echo, "refuse": _refuse, "fail": _fail, "never": _never}
        near = Link(ours, {}, lambda: gone.append("near"))
        far = Link(theirs, handlers, lambda: gone.append("far"))
        try:
            await work(near, far, gone)
        finally:
            near.close()
            far.close()

    asyncio.run(run())


@settings(deadline=None)
@given(st.lists(JSON, max_size=20))
def test_each_answer_belongs_to_its_question(values: list[Any]) -> None:
    async def work(near: Link, _: Link, __: list[str]) -> None:
        answers = await asyncio.gather(*(near.ask("echo", value=value) for value in values))
        assert [answer["said"] for answer in answers] == values
        assert near.idle

    _linked(work)


def test_a_text_larger_than_the_sockets_buffers() -> None:
    async def work(near: Link, _: Link, __: list[str]) -> None:
        text = "ä" * 3_000_000
        assert (await near.ask("echo", value=text))["said"] == text

    _linked(work)


def test_descriptors_come_with_their_message() -> None:
    async def work(near: Link, _: Link, __: list[str]) -> None:
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with socket.socket() as one:
            counts = [0, 1, MOST_FDS, 2, 0, MOST_FDS]
            answers = await asyncio.gather(
                *(near.ask("echo", [one.fileno()] * count, value="x" * 10_000) for count in counts)
            )
            assert [answer["count"] for answer in answers] == counts
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208

    _linked(work)


def test_a_refusal_and_a_fault() -> None:
    async def work(near: Link, _: Link, __: list[str]) -> None:
        with pytest.raises(ProcessError, match="not today"):
            await near.ask("refuse")
        with pytest.raises(ProcessError, match="ZeroDivisionError"):
            await near.ask("fail")
        assert (await near.ask("echo", value=1))["said"] == 1

    _linked(work)


def test_the_other_sides_end_is_noticed_once() -> None:
    async def work(near: Link, far: Link, gone: list[str]) -> None:
        asked = asyncio.ensure_future(near.ask("never"))
        await asyncio.sleep(0)
        far.close()
        with pytest.raises(ProcessError, match="the process has ended"):
            await asked
        assert gone == ["near"]
        assert near.closed
        with pytest.raises(ProcessError, match="the process has ended"):
            await near.ask("echo")

    _linked(work)
