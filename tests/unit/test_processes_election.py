"""What the parent passes on between the ledger and the admin process, and keeps for those that start later."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from tests.redis_server import wait_for
from tlstunnel.processes import election as module
from tlstunnel.processes.children import Child, Identity, Role
from tlstunnel.processes.election import Election
from tlstunnel.processes.link import Link
from tlstunnel.processes.messages import Delivered, Elected


class Process:
    """A child whose side of the link is here. `received` are the notifications to it."""

    def __init__(self, child: Child, sock: socket.socket) -> None:
        self.child = child
        self.received: list[Elected | Delivered] = []
        take = self.received.append
        self.link = Link(sock, {}, lambda: None, {Elected: take, Delivered: take})


@contextlib.asynccontextmanager
async def children() -> AsyncIterator[tuple[Process, Process]]:
    """Return a ledger and an admin process. The process itself only waits."""
    waiting = await asyncio.create_subprocess_exec("sleep", "60")
    made: list[Process] = []
    for role in (Role.LEDGER, Role.ADMIN):
        ours, theirs = socket.socketpair()
        made.append(Process(Child(waiting.pid, Identity(role, 1, 1), ours, {}), theirs))
    try:
        yield made[0], made[1]
    finally:
        waiting.kill()
        await waiting.wait()
        for one in made:
            one.child.link.close()
            one.link.close()


def test_news_go_to_the_admin_process_and_deliveries_to_the_ledger() -> None:
    async def main() -> None:
        async with children() as (ledger, admin):
            election = Election(lambda: ledger.child, lambda: admin.child)
            election.take_news(ledger.child, Elected(until=25.0, delivered=["a"]))
            election.take_delivered(admin.child, Delivered(deliveries=["b"]))
            await wait_for(lambda: ledger.received and admin.received)
            assert admin.received == [Elected(until=25.0, delivered=["a"])]
            assert ledger.received == [Delivered(deliveries=["b"])]

    asyncio.run(main())


def test_a_process_that_starts_learns_what_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 2)
    monkeypatch.setattr(module, "MOST_KEPT", 3)

    async def main() -> None:
        async with children() as (ledger, admin):
            election = Election(lambda: None, lambda: None)
            election.begin_ledger(ledger.child, "here")
            election.take_news(ledger.child, Elected(until=25.0, delivered=["a", "b", "c", "d"]))
            election.take_delivered(admin.child, Delivered(deliveries=["e", "f"]))
            election.take_news(ledger.child, Elected(until=35.0, delivered=["e"]))
            election.begin_ledger(ledger.child, "here")
            election.begin_admin(admin.child)
            await wait_for(lambda: len(admin.received) == 3 and ledger.received)
            assert ledger.received == [Delivered(deliveries=["f"])], "it may not know what was not read in the server"
            assert admin.received == [
                Elected(until=0.0, delivered=["c", "d"]),
                Elected(until=0.0, delivered=["e"]),
                Elected(until=35.0),
            ]

    asyncio.run(main())


def test_what_was_learned_elsewhere_is_forgotten() -> None:
    async def main() -> None:
        async with children() as (ledger, admin):
            election = Election(lambda: None, lambda: admin.child)
            election.begin_ledger(ledger.child, "here")
            election.take_news(ledger.child, Elected(until=25.0, delivered=["a"]))
            election.take_delivered(admin.child, Delivered(deliveries=["b"]))
            election.begin_ledger(ledger.child, "there")
            election.begin_admin(admin.child)
            await wait_for(lambda: len(admin.received) == 3)
            assert admin.received[1:] == [Elected(until=0.0), Elected(until=0.0)]
            assert ledger.received == []

    asyncio.run(main())
