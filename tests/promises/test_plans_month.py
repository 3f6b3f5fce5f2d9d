"""A month of all kinds of sites: where they stand, what is said about it, and that every handshake is answered.

The ledger and the process that serves are real, started by the parent's own code. The clock is the test's: it sends the
samples, as the parent does each second, with the times of a month that ends now. What the admin process does is done
here, by that clock; the throttles that it decides on go to the process that serves.
"""

import asyncio
import json
import math
import os
import re
import signal
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.harness import TIMEOUT, RawOrigin, upgrade
from tests.promises.counted import hold
from tests.unit import test_processes_administration as simulation
from tests.unit.test_plans_delivery import Server
from tests.unit.test_processes_administration import (
    BOTNET,
    BUSY,
    IDLE,
    NORMAL,
    ONE_ADDRESS,
    SHOPS,
    STORM,
    Behaviour,
    World,
    live,
    report,
)
from tlstunnel.addresses import ListenAddress
from tlstunnel.certificates import issue
from tlstunnel.commands import usage
from tlstunnel.config.invocation import Invocation
from tlstunnel.plans.values import Standing
from tlstunnel.processes.children import Child, Role, Startup
from tlstunnel.processes.fleet import Fleet, Options
from tlstunnel.processes.messages import LedgerStatus, Sampled, Throttled
from tlstunnel.processes.slots import Slots
from tlstunnel.state.history.samples import MINUTE, Counts, Totals

DAY = 1440
"""Minutes."""

HOUR = 60


class Parent(Fleet):
    """The parent's part that starts processes. The test has the place of the admin process, and the clock."""

    def count(self, role: Role = Role.SERVING) -> int:
        return 0 if role is Role.ADMIN else super().count(role)


class Machine(World):
    """A machine with a real ledger and a real process that serves."""

    def __init__(self, folder: Path, sites: Mapping[str, Behaviour], server: Server, **options: Any) -> None:
        super().__init__(folder, sites, server, **options)
        self.file = folder / "tlstunnel.toml"
        self.file.write_text(self.text)
        self.statuses: dict[str, list[int]] = {name: [] for name in sites}
        self._slots = Slots()
        self._parent: Parent | None = None
        self._ledger: Child | None = None
        self._context = ssl.create_default_context(cafile=options["ca"])

    @property
    def parent(self) -> Parent:
        assert self._parent is not None
        return self._parent

    async def open_history(self) -> None:
        """Start the processes, as the parent does."""
        if self._parent is not None:
            return
        address = ListenAddress("127.0.0.1", 0)
        self._slots.update(self._slots.open((address,), 1), (address,))
        startup = Startup(Invocation(self.file, folder=self.folder), self.text, self.config, "json", "x" * 32)
        parent = self._parent = Parent(startup, self._slots, Options(processes=1), 1)
        await asyncio.gather(*parent.start())
        parent.mark_started()
        await parent.assign()

    async def close_history(self) -> None:
        await self.parent.stop()
        self._slots.close()

    async def record(self, minute: int, sites: Mapping[str, Totals]) -> None:
        """Send two samples, the second of which ends the minute, and wait until the ledger has stored it."""
        await self._pass_throttles()
        now = simulation.START + minute * MINUTE
        values = {name: [totals.tunnels, *totals.counts] for name, totals in sites.items()}
        ledger = await self._find_ledger()
        whole = ledger is not self._ledger
        self._ledger = ledger
        ledger.link.notify(Sampled(now + 30, now + 30 - simulation.START, values, whole))
        ledger.link.notify(Sampled(now + MINUTE + 1, now + MINUTE + 1 - simulation.START, {}, whole=False))
        async with asyncio.timeout(TIMEOUT):
            while not await self._has_stored(ledger, now):
                await asyncio.sleep(0.001)

    async def kill(self, role: Role) -> None:
        """Kill a process, and wait until there is another one."""
        (child,) = [one for one in self.parent if one.identity.role is role]
        os.kill(child.pid, signal.SIGKILL)
        async with asyncio.timeout(TIMEOUT):
            while not any(one.identity.role is role and one.ready and one is not child for one in self.parent):
                await asyncio.sleep(0.01)
        await self.parent.assign()

    async def connect(self) -> None:
        """Make a handshake with each site, and note the response."""
        await self._pass_throttles()
        for site in self.sites:
            self.statuses[site].append(await asyncio.to_thread(self._connect, site))

    def _connect(self, site: str) -> int:
        (slot,) = self._slots
        with (
            socket.create_connection((slot.listener.address.host, slot.listener.address.port), TIMEOUT) as sock,
            self._context.wrap_socket(sock, server_hostname=site) as client,
        ):
            return upgrade(client, host=site).status

    async def _find_ledger(self) -> Child:
        async with asyncio.timeout(TIMEOUT):
            while self.parent.wiring.ledger is None:
                await asyncio.sleep(0.01)
        return self.parent.wiring.ledger

    @staticmethod
    async def _has_stored(ledger: Child, since: float) -> bool:
        history = (await ledger.request(LedgerStatus())).history
        return history is not None and history.last is not None and history.last >= since and not history.waiting

    async def _pass_throttles(self) -> None:
        """Have the parent tell the process that serves which throttles hold."""
        (serving,) = self.parent.serving()
        self.parent.overseer.take_throttles(serving, Throttled(rules=list(self.rules[-1]) if self.rules else []))
        await self.parent.overseer._send_throttles()


@pytest.fixture(scope="module")
def origin() -> Iterator[RawOrigin]:
    with RawOrigin(hold) as origin:
        yield origin


def live_through(
    folder: Path, origin: RawOrigin, sites: Mapping[str, Behaviour], story: Any, start: float, **options: Any
) -> Machine:
    """Tell a story of a machine that begins at this time."""
    issued = issue.create(list(sites), folder)
    site = f'cert = "{issued.cert}"\nkey = "{issued.key}"\n'
    top = f'listen = ["127.0.0.1:0"]\nstate.dir = "{folder}"\n'
    options |= {"origin": origin.address, "site": site, "top": top, "ca": issued.ca}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "START", start)
        machine = live(folder, sites, story, Machine, **options)
    assert isinstance(machine, Machine)
    return machine


def hour_of(minute: int) -> int:
    return minute // 60 % 24


def daily(minute: int, least: float, most: float) -> int:
    return round(least + (most - least) * (0.5 + 0.5 * math.cos((minute / 60 - 15) / 24 * 2 * math.pi)))


def viral(minute: int) -> int:
    return 900 if 12 * DAY + 13 * 60 <= minute < 12 * DAY + 18 * 60 else daily(minute, 5, 40)


def weekend(minute: int) -> int:
    return 250 if minute // DAY % 7 >= 5 and 14 <= hour_of(minute) < 18 else 30


MONTH = {
    "viral.test": Behaviour(viral),
    "growing.test": Behaviour(lambda minute: round(50 + 150 * minute / (31 * DAY))),
    "batch.test": Behaviour(lambda minute: 300 if 2 <= hour_of(minute) < 5 else 20),
    "weekend.test": Behaviour(weekend),
    "quiet.test": Behaviour(lambda _: 0),
}


OFF = range(22 * DAY, 23 * DAY)
"""When the machine is off."""

BLAMING = ("limit", "exceed", "violat", "cut you off")


def find_midnight() -> float:
    """Return when 31 days begin that end today, in UTC. Throttles of the last day would hold now."""
    return float((time.time() // 86_400 - 30) * 86_400)


async def live_through_a_day(machine: Machine, day: int) -> None:
    """Live through a day of the month, with what happens on it."""
    if day in {6, 13, 23}:
        await machine.restart()
    if day in {9, 25}:
        await machine.kill(Role.LEDGER)
    if day == 17:
        await machine.kill(Role.SERVING)
    await machine.run(range(day * DAY, (day + 1) * DAY, 2 * HOUR))
    await machine.connect()
    for one in await machine.notices("growing.test"):
        await machine.ask(usage.AckNotice(one.notice.id), usage.Acknowledged)


def test_a_month(tmp_path: Path, origin: RawOrigin) -> None:
    """The ledger and the process that serves are killed, the rest is started anew, and the machine is off for a day."""

    counted: dict[str, list[Standing]] = {}

    async def story(world: World) -> None:
        assert isinstance(world, Machine)
        for day in range(31):
            if day * DAY not in OFF:
                await live_through_a_day(world, day)
        for site in MONTH:
            found = await world.notices(site)
            times = [one.notice.created for one in found]
            assert all(later - earlier >= 7 * 86_400 for earlier, later in pairwise(times)), site
            assert all(one.accepted and one.notice.recipient == "contact" for one in found)
            counted[site] = [one.notice.standing for one in found]

    machine = live_through(tmp_path, origin, MONTH, story, find_midnight())
    assert machine.statuses == {site: [101] * 30 for site in MONTH}
    assert not any(machine.rules)
    assert machine.standings("quiet.test") == [Standing.WITHIN]
    assert machine.standings("viral.test") == [Standing.WITHIN, Standing.SPIKE, Standing.WITHIN]
    assert machine.standings("growing.test") == [Standing.WITHIN, Standing.SPIKE, Standing.SUSTAINED]
    assert machine.standings("batch.test") == [Standing.WITHIN, Standing.SPIKE, Standing.REPEATED]
    assert machine.standings("weekend.test")[-1] is Standing.REPEATED
    assert counted == {
        "viral.test": [],
        "growing.test": [Standing.SUSTAINED],
        "batch.test": [Standing.REPEATED] * 4,
        "weekend.test": [Standing.REPEATED] * 2,
        "quiet.test": [],
    }
    spike = next(one for _, one in machine.assessments["viral.test"] if one.standing is Standing.SPIKE)
    assert "and a spike now and then is fine" in spike.sentence
    (grown,) = machine.texts("growing.test")
    assert grown["subject"] == "growing.test: steadily above its guideline of 100 tunnels"
    assert "has outgrown its guideline.\nIt is good to see it used so much" in grown["text"]
    for site in ("batch.test", "weekend.test"):
        for text in machine.texts(site):
            assert text["subject"] == f"{site}: several times above its guideline of 100 tunnels"
    for site in MONTH:
        for text in machine.texts(site):
            assert "Nothing is cut off" in text["text"]
            assert "The plan Pro may suit it better." in text["text"]
            assert not any(word in json.dumps(text).lower() for word in BLAMING)
    # The day that was off is a gap: everything is as it was.
    before = [one for minute, one in machine.assessments["batch.test"] if minute < OFF.start][-1]
    after = next(one for minute, one in machine.assessments["batch.test"] if minute >= OFF.stop)
    assert (before.standing, before.since) == (after.standing, after.since)
    assert after.figures.hours_measured <= 22 * 24 + 1
    assert len({headers["webhook-id"] for headers, _ in machine.server.posts}) == 7


def test_half_of_a_machine_matters_only_while_it_is_busy(tmp_path: Path, origin: RawOrigin) -> None:
    async def story(world: World) -> None:
        assert isinstance(world, Machine)
        await world.run(range(0, 60, 2))
        assert await world.notices() == []
        await world.connect()
        await world.run(range(60, 110, 2))
        await world.connect()
        assert [one.notice.site for one in await world.notices()] == ["greedy.test"]

    start = find_minutes_ago(110)
    machine = live_through(tmp_path, origin, SHOPS, story, start, load=lambda minute: IDLE if minute < 60 else BUSY)
    assert machine.statuses == {site: [101, 101] for site in SHOPS}
    assert not any(machine.rules)
    assert machine.standings("greedy.test") == [Standing.WITHIN, Standing.DISPROPORTIONATE]
    assert all(machine.standings(site) == [Standing.WITHIN] for site in SHOPS if site != "greedy.test")
    (text,) = machine.texts("greedy.test")
    assert text["subject"] == "greedy.test: a large share of a busy machine"
    assert re.search(r"In use on the machine: [89]\d(\.\d)?% of the CPU time", text["text"])
    assert "Nothing is cut off" in text["text"]


ATTACKS = {"single.test": ONE_ADDRESS["a.test"], "botnet.test": BOTNET["a.test"]}
NO_ATTACKS = {
    "storm.test": simulation.flooded(STORM, report(*((bot, 3) for bot in simulation.BOTS), lost=2500), end=42)[
        "a.test"
    ],
    "flapping.test": simulation.flooded(Counts(handshakes=3000, short=2900, origin=1), report(failing=True))["a.test"],
    "normal.test": Behaviour(lambda _: 50, lambda _: NORMAL),
}


def test_floods_are_told_to_the_operator_and_what_only_looks_like_one_is_not(tmp_path: Path, origin: RawOrigin) -> None:
    sites = ATTACKS | NO_ATTACKS

    async def story(world: World) -> None:
        assert isinstance(world, Machine)
        await world.run(range(45))
        await world.connect()  # while they are suspected
        await world.run(range(45, 80))
        await world.connect()
        told = [(one.notice.site, one.notice.recipient, one.notice.standing) for one in await world.notices()]
        assert sorted(told) == [(site, "operator", Standing.SUSPECTED_ABUSE) for site in sorted(ATTACKS)]

    machine = live_through(tmp_path, origin, sites, story, find_minutes_ago(80))
    assert machine.statuses == {site: [101, 101] for site in sites}
    assert not any(machine.rules)
    for site in ATTACKS:
        assert machine.standings(site) == [Standing.WITHIN, Standing.SUSPECTED_ABUSE, Standing.WITHIN]
        (text,) = machine.texts(site)
        assert text["subject"] == f"{site}: suspected abuse"
        assert "The owner of the site was not asked yet." in text["text"]
    for site in NO_ATTACKS:
        assert machine.standings(site) == [Standing.WITHIN]


def find_minutes_ago(minutes: int) -> float:
    """Return the beginning of a minute, so long ago."""
    return float((time.time() // MINUTE - minutes) * MINUTE)
