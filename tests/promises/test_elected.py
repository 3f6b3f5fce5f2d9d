"""One of several machines sends notices: nobody gets one twice, and the others take over."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.harness import Certificate, RawOrigin, Tunnel, eventually
from tests.promises.counted import ask, hold, ledger_of
from tests.promises.firewalled import config_for
from tests.promises.versions import Versions, upgraded
from tests.redis_server import RedisServer
from tlstunnel.plans.delivery import ELSEWHERE
from tlstunnel.plans.notice_file import Channel, NoticeFile, Target, reading
from tlstunnel.plans.notice_store import NoticeStore
from tlstunnel.plans.notices import Due
from tlstunnel.plans.values import Assessment, Notice, Standing
from tlstunnel.processes.reach import send_command

ELECTION = "{tlstunnel}:election"

LEASE = 3.0
"""Seconds that a lease lasts in these tests."""


@pytest.fixture(scope="module")
def origin() -> Iterator[RawOrigin]:
    with RawOrigin(hold) as origin:
        yield origin


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """Return a server that has been there for long, and so gives a lease at once."""
    with RedisServer() as server:
        info = server.command("INFO", "replication")
        assert isinstance(info, bytes)
        fields = dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
        server.command("HSET", ELECTION, "server", fields["master_replid"], "began", 1)
        yield server


def store_notices(folder: Path, *sites: str) -> None:
    """Store notices that are to be delivered to the log."""
    folder.mkdir()
    now = time.time()
    notices = [
        Notice(
            id=f"notice-{site}",
            site=site,
            standing=Standing.SUSTAINED,
            created=now,
            recipient="operator",
            address="",
            assessment=Assessment(site=site, standing=Standing.SUSTAINED, since=now, sentence="It is so."),
            language="en",
        )
        for site in sites
    ]

    async def store() -> None:
        store = NoticeStore(folder)
        await store.run(NoticeFile.record, Due(tuple(notices)), {one.id: [Target(Channel.LOG)] for one in notices})
        assert await store.close()

    asyncio.run(store())


def read_reasons(folder: Path) -> dict[str, tuple[str, str]]:
    """Return the state of each notice's delivery, and why it has it."""
    with reading(folder) as file:
        return {
            record.notice.id: (record.deliveries[0].state.value, record.deliveries[0].reason)
            for record in file.read_notices()
        }


@contextlib.contextmanager
def running(
    origin: RawOrigin,
    certificate: Certificate,
    folder: Path,
    server: RedisServer,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Tunnel]:
    top = f'processes = 1\nrelease.drain_over = "0s"\n[state]\ndir = "{folder}"\nurl = "{server.url}"'
    config = config_for(origin.address, certificate, top=top, site="guideline = 10")
    with Tunnel(
        None,
        certificate,
        config=config,
        environment={"TLSTUNNEL_WATCH": "0.1,60,90,90", "TLSTUNNEL_LEASE": str(LEASE), **environment},
        errors_expected=True,
    ) as tunnel:
        yield tunnel


def count_elections(tunnel: Tunnel) -> int:
    """Return how often its ledgers have found that it is elected."""
    return sum(record["elected"] for record in tunnel.records("election"))


def list_sent(tunnel: Tunnel) -> list[str]:
    return [record["id"] for record in tunnel.records("notice")]


def find_decisions(tunnel: Tunnel) -> tuple[set[str], set[str]]:
    """Return the notices that are acknowledged, and the sites that are muted."""
    notices = send_command(tunnel.control, {"do": "notices"})["notices"]
    mutes = send_command(tunnel.control, {"do": "usage"})["mutes"]
    return {one["notice"]["id"] for one in notices if one["acknowledged"]}, {one["site"] for one in mutes}


def test_one_machine_sends_and_the_other_takes_over(
    origin: RawOrigin, certificate: Certificate, tmp_path: Path, server: RedisServer
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    store_notices(first, "a.example")
    store_notices(second, "a.example", "b.example")
    with running(origin, certificate, first, server) as one:
        eventually(lambda: list_sent(one) == ["notice-a.example"])
        with running(origin, certificate, second, server) as two:
            expected = {"notice-a.example": ("accepted", ELSEWHERE), "notice-b.example": ("pending", "")}
            eventually(lambda: read_reasons(second) == expected)
            assert count_elections(two) == 0
            host = socket.gethostname()
            assert one.status()["election"] == {"here": True, "holder": host}
            eventually(lambda: two.status()["election"] == {"here": False, "holder": host})
            assert f"notices: sent by this machine, {host}" in one.run_command("status")
            assert f"notices: sent by another machine, {host}" in two.run_command("status")
            two.run_command("usage", "ack", "notice-a.example")
            two.run_command("usage", "mute", "localhost", "--for", "30d")
            eventually(lambda: find_decisions(one) == ({"notice-a.example"}, {"localhost"}))
            one.run_command("usage", "mute", "localhost", "--for", "0s")
            eventually(lambda: find_decisions(two) == ({"notice-a.example"}, set()))
            two.run_command("usage", "throttle", "localhost", "1/hour", "--for", "1h", "--why", "a test", "--abuse")
            eventually(lambda: one.status()["throttles"])
            assert [ask(one, "/"), ask(two, "/")] == [101, 429], "one rate for all"
            one.run_command("usage", "release", "localhost")
            eventually(lambda: two.status()["throttles"] == [])
            holder = server.command("HGET", ELECTION, "holder")
            os.kill(ledger_of(one)["process"], signal.SIGKILL)
            eventually(lambda: count_elections(one) == 2)
            assert server.command("HGET", ELECTION, "holder") == holder
            assert one.stop() == 0
            assert server.command("HGET", ELECTION, "holder") != holder
            eventually(lambda: list_sent(two) == ["notice-b.example"])
            assert read_reasons(first) == {"notice-a.example": ("accepted", "")}


def test_upgrade_keeps_the_lease(
    origin: RawOrigin, certificate: Certificate, tmp_path: Path, server: RedisServer
) -> None:
    folder = tmp_path / "state"
    store_notices(folder, "a.example")
    versions = Versions(tmp_path / "versions")
    with running(origin, certificate, folder, server, versions.environment) as tunnel:
        eventually(lambda: list_sent(tunnel) == ["notice-a.example"])
        holder = server.command("HGET", ELECTION, "holder")
        token = server.command("HGET", ELECTION, "token")
        versions.install("2.0.0")
        upgraded(tunnel)
        eventually(lambda: server.command("HGET", ELECTION, "token") != token)
        assert server.command("HGET", ELECTION, "holder") == holder
        assert list_sent(tunnel) == ["notice-a.example"]
