"""Simulated days and attacks through the real history, the real notices and what the admin process does with them.

The samples are those of the parent's feed, one in some minutes; the clock is the test's. Notices go to a real server.
A month, with real processes, is in tests/promises/test_plans_month.py.
"""

import asyncio
import contextlib
import email
import email.policy
import importlib.util
import json
import math
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from aiosmtpd.smtp import SMTP
from structlog.testing import capture_logs

from tests.harness import missing
from tests.unit.test_plans_delivery import Clock, Server
from tests.unit.test_plans_mail import Mailboxes, serving
from tlstunnel.commands import usage
from tlstunnel.config import decode
from tlstunnel.errors import ControlError
from tlstunnel.journal.record import Record
from tlstunnel.plans.addresses import SiteAddresses
from tlstunnel.plans.channels import load_channels
from tlstunnel.plans.duty import Duty
from tlstunnel.plans.elsewhere import Sightings, decode_sightings, encode_sightings
from tlstunnel.plans.notice_file import NoticeFile
from tlstunnel.plans.observer import Observed, Observer
from tlstunnel.plans.standing import MachineLoad
from tlstunnel.plans.values import Assessment, Standing
from tlstunnel.processes import administration
from tlstunnel.processes.administration import Administration
from tlstunnel.state.history.reader import HistoryReader
from tlstunnel.state.history.samples import MINUTE, NOTHING, Counts, Instance, Sampler, Totals, add_counts
from tlstunnel.state.history.writer import History
from tlstunnel.state.throttles import ThrottleRule

START = 1_699_833_600.0
"""A Monday, 00:00 UTC."""

DAY = 1440
"""Minutes."""

KEY = b"k" * 32
IDLE, BUSY = MachineLoad(0.2, 0.1, 0.2), MachineLoad(0.95, 0.1, 0.2)
SECRET = "whsec_" + "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
T = TypeVar("T")


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for the thread that assesses, however busy the machine is."""
    monkeypatch.setattr(administration, "QUICK_SECONDS", 60.0)


class Behaviour(NamedTuple):
    """What a site does in a minute: its open tunnels, what is counted, and what processes see."""

    tunnels: Callable[[int], int]
    counts: Callable[[int], Counts] = lambda _: NOTHING
    seen: Callable[[int], Observed | None] = lambda _: None


class World:
    """A machine with these sites, which are all on the plan free unless `plans` says otherwise."""

    def __init__(self, folder: Path, sites: Mapping[str, Behaviour], server: Server, **options: Any) -> None:
        self.folder = folder
        self.sites = sites
        self.server = server
        self.clock = Clock()
        self.clock.now = START
        self.load: Callable[[int], MachineLoad] = options.get("load", lambda _: IDLE)
        self.rules: list[Sequence[ThrottleRule]] = []
        self.assessments: dict[str, list[tuple[int, Assessment]]] = {name: [] for name in sites}
        secret = folder / "secret"
        secret.write_text(SECRET)
        text = (
            f'{options.get("top", "")}[usage]\n{options.get("usage", "")}\n[usage.notices]\nwebhook = "{server.url}"\n'
        )
        text += f'secret_file = "{secret}"\n'
        for name in sites:
            text += (
                f'[[sites]]\nnames = ["{name}"]\norigins = ["{options.get("origin", "localhost:1")}"]\nplan = "free"\n'
            )
            text += f'contact = "mailto:owner@{name}"\n{options.get("site", "")}'
        self.text = text
        self.config = decode(text, folder, "t.toml")
        self.sampler = Sampler()
        self.totals: dict[str, Counts] = dict.fromkeys(sites, NOTHING)
        self._history: History | None = None
        self._administration: Administration | None = None

    @property
    def administration(self) -> Administration:
        assert self._administration is not None
        return self._administration

    async def open_history(self) -> None:
        """Begin to keep the history."""
        if self._history is None:
            self._history = await History.open(self.folder)

    async def close_history(self) -> None:
        assert self._history is not None
        assert await self._history.close()

    async def record(self, minute: int, sites: Mapping[str, Totals]) -> None:
        """Store what was sampled in a minute."""
        assert self._history is not None
        now = START + minute * MINUTE
        self.sampler.sample(now + 30, [Instance("x", now - START + 30, sites)])
        sampled = self.sampler.take()
        assert sampled is not None
        self._history.append(sampled)
        await asyncio.wrap_future(self._history.flush())

    async def start(self) -> None:
        await self.open_history()
        self._administration = Administration(
            self.folder, self.config, load_channels(self.config), KEY, self.rules.append, clock=self.clock
        )
        await self.administration.start()

    async def restart(self) -> None:
        await self.administration.close()
        await self.start()

    async def close(self) -> None:
        await self.administration.close()
        await self.close_history()

    async def run(self, minutes: Iterable[int]) -> None:
        """Live through these minutes. The others are a gap."""
        for minute in minutes:
            now = START + minute * MINUTE
            tunnels = {name: site.tunnels(minute) for name, site in self.sites.items()}
            for name, site in self.sites.items():
                self.totals[name] = add_counts(self.totals[name], site.counts(minute))
            sites = {name: Totals(tunnels[name], self.totals[name]) for name in self.sites}
            await self.record(minute, sites)
            self.clock.now = now + MINUTE + 3
            seen = {name: one for name, site in self.sites.items() if (one := site.seen(minute)) is not None}
            await self.administration.take(seen)
            await self.administration.handle_minute(tunnels, self.load(minute))
            found = await self.ask(usage.Usage(), usage.UsageResult, tunnels)
            assert found.problem == ""
            for assessment in found.assessments:
                self.assessments[assessment.site].append((minute, assessment))

    async def ask(
        self, command: Any, result: type[T], tunnels: Mapping[str, int] | None = None, who: str = "alice (uid 1000)"
    ) -> T:
        found = await self.administration.carry_out(command, who, tunnels or {})
        assert isinstance(found, result)
        return found

    async def notices(self, site: str = "") -> list[usage.NoticeStatus]:
        """Return the notices, the first one first, when they are delivered."""
        async with asyncio.timeout(30):
            while True:
                found = await self.ask(usage.Notices(site, 10_000), usage.NoticesResult)
                pending = [one for each in found.notices for one in each.deliveries if one.state == "pending"]
                if not pending:
                    return list(reversed(found.notices))
                await asyncio.sleep(0.01)

    def standings(self, site: str) -> list[Standing]:
        """The standings that the site had, one after another."""
        return [standing for standing, _ in groupby(one.standing for _, one in self.assessments[site])]

    def texts(self, site: str) -> list[dict[str, Any]]:
        """What the webhook got about a site."""
        bodies = [json.loads(body)["data"] for _, body in self.server.posts]
        return [body for body in bodies if body["site"] == site]


def live(
    folder: Path,
    sites: Mapping[str, Behaviour],
    story: Callable[[World], Coroutine[Any, Any, None]],
    make: type[World] = World,
    **options: Any,
) -> World:
    """Tell a story of a world. It is returned for what it has become."""

    @contextlib.asynccontextmanager
    async def living() -> AsyncIterator[World]:
        async with Server().serving() as server:
            world = make(folder, sites, server, **options)
            await world.start()
            try:
                yield world
            finally:
                await world.close()

    async def main() -> World:
        async with living() as world:
            await story(world)
        return world

    with capture_logs():
        return asyncio.run(main())


# --- a busy machine ---------------------------------------------------------------------------------------------------


def shop(_: int) -> Counts:
    return Counts(handshakes=120, bytes_up=3_000_000, cpu=1_200_000)


def greedy(_: int) -> Counts:
    return Counts(handshakes=1200, bytes_up=30_000_000, cpu=12_000_000)


SHOPS = {"greedy.test": Behaviour(lambda _: 90, greedy)} | {
    f"shop{number}.test": Behaviour(lambda _: 50, shop) for number in range(9)
}


@pytest.mark.parametrize(("load", "number"), [(BUSY, 1), (IDLE, 0)])
def test_half_of_a_machine_matters_only_while_it_is_busy(tmp_path: Path, load: MachineLoad, number: int) -> None:
    async def story(world: World) -> None:
        await world.run(range(50))
        found = await world.notices()
        assert [one.notice.site for one in found] == ["greedy.test"] * number

    world = live(tmp_path, SHOPS, story, load=lambda _: load)
    expected = [Standing.WITHIN, Standing.DISPROPORTIONATE] if number else [Standing.WITHIN]
    assert world.standings("greedy.test") == expected
    assert all(world.standings(site) == [Standing.WITHIN] for site in SHOPS if site != "greedy.test")
    for text in world.texts("greedy.test"):
        assert "95 % of the machine's CPU" in json.dumps(text)


def test_a_mail_shows_the_tunnels_of_the_site(tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        missing("matplotlib not found: ./scripts/install gets it")
    boxes = Mailboxes()

    async def story(world: World) -> None:
        async with serving(lambda: SMTP(boxes, hostname="localhost"), None) as port:
            more = f'[usage.notices]\nemail = "smtp://127.0.0.1:{port}"\nsender = "tunnel@example.net"\n'
            config = decode(world.text.replace("[usage.notices]\n", more), tmp_path, "t.toml")
            await world.administration.configure(config, load_channels(config))
            await world.run(range(50))
            await world.notices()

    live(tmp_path, SHOPS, story, load=lambda _: BUSY)
    (envelope,) = boxes.envelopes
    assert envelope.rcpt_tos == ["owner@greedy.test"]
    assert isinstance(envelope.content, bytes)
    message = email.message_from_bytes(envelope.content, policy=email.policy.default)
    (plot,) = (part for part in message.walk() if part.get_content_type() == "image/png")
    assert plot.get_content().startswith(b"\x89PNG")


# --- abuse, and what looks like it ------------------------------------------------------------------------------------


def report(*addresses: tuple[str, int], known: Iterable[str] = (), lost: int = 0, failing: bool = False) -> Observed:
    """Return what a process reports that has seen so many refused handshakes of these addresses."""
    now = [0.0]
    observer = Observer(KEY, ["a.test"], lambda: now[0])
    for address in known:
        observer.ended(Record(id="", peer=address, site="a.test", ended_by="client"), None, 90.0)
    for address, number in addresses:
        record = Record(id="", peer=address, site="a.test", ended_by="tunnel")
        for _ in range(number):
            observer.ended(record, "blocked", 0.1)
    found = observer.take().get("a.test", Observed())
    return found._replace(lost=lost, failing=failing)


NORMAL = Counts(handshakes=60, short=2, unfinished=3, blocked=4)
BOTS = [f"198.51.{number // 250}.{number % 250}" for number in range(2000)]


def flooded(
    counts: Counts, seen: Observed, begin: int = 40, end: int = 60, later: Observed | None = None
) -> dict[str, Behaviour]:
    def flood(minute: int) -> bool:
        return begin <= minute < end

    return {
        "a.test": Behaviour(
            lambda _: 50,
            lambda minute: counts if flood(minute) else NORMAL,
            lambda minute: seen if flood(minute) else later,
        )
    }


ONE_ADDRESS = flooded(NORMAL._replace(blocked=6000), report(("198.51.100.7", 6000), ("192.0.2.1", 4)))
BOTNET = flooded(NORMAL._replace(blocked=6000), report(*((bot, 3) for bot in BOTS)))


@pytest.mark.parametrize(("sites", "culprits"), [(ONE_ADDRESS, ("198.51.100.7/32",)), (BOTNET, ())])
def test_a_flood_is_told_to_the_operator_at_once_and_nothing_else_happens(
    tmp_path: Path, sites: dict[str, Behaviour], culprits: tuple[str, ...]
) -> None:
    async def story(world: World) -> None:
        await world.run(range(80))
        (notice,) = await world.notices()
        assert (notice.notice.recipient, notice.notice.standing) == ("operator", Standing.SUSPECTED_ABUSE)
        assert START + 42 * MINUTE < notice.notice.created < START + 44 * MINUTE

    world = live(tmp_path, sites, story)
    assert world.standings("a.test") == [Standing.WITHIN, Standing.SUSPECTED_ABUSE, Standing.WITHIN]
    assert world.rules == [()]
    assert len(world.texts("a.test")) == 1


@pytest.mark.parametrize(("sites", "culprits"), [(ONE_ADDRESS, ("198.51.100.7/32",)), (BOTNET, ())])
def test_with_on_abuse_throttle_a_flood_is_throttled_for_a_while(
    tmp_path: Path, sites: dict[str, Behaviour], culprits: tuple[str, ...]
) -> None:
    async def story(world: World) -> None:
        await world.run(range(50))
        (throttle,) = (await world.ask(usage.Usage("a.test"), usage.UsageResult)).throttles
        assert (throttle.rate, throttle.addresses, throttle.who) == ("5/second", culprits, "tlstunnel")
        assert "handshakes are refused each second" in throttle.why
        await world.restart()
        assert len((await world.ask(usage.Usage(), usage.UsageResult)).throttles) == 1
        await world.run(range(50, 100))
        assert (await world.ask(usage.Usage(), usage.UsageResult)).throttles == ()

    world = live(tmp_path, sites, story, usage='on_abuse = "throttle"\nabuse.throttle_for = "10m"')
    held = [rules for rules in world.rules if rules]
    assert all(rule.until - START <= 82 * MINUTE for rules in held for rule in rules)
    assert {(rule.amount, rule.window, rule.addresses) for rules in held for rule in rules} == {(5, 1, culprits)}
    assert world.rules[-1] == ()


def test_what_somebody_has_released_is_left_alone(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.run(range(50))
        released = await world.ask(usage.ReleaseSite("a.test"), usage.Released)
        assert released == usage.Released("a.test", 1)
        await world.run(range(50, 58))
        assert (await world.ask(usage.Usage(), usage.UsageResult)).throttles == ()
        assert world.assessments["a.test"][-1][1].standing is Standing.SUSPECTED_ABUSE

    live(tmp_path, BOTNET, story, usage='on_abuse = "throttle"')


STORM = Counts(handshakes=2500, short=1500, unfinished=9000, blocked=4000)


def test_a_reconnect_storm_after_a_release_is_no_abuse(tmp_path: Path) -> None:
    seen = report(*((bot, 3) for bot in BOTS), lost=2500)
    sites = flooded(STORM, seen, end=42, later=None)

    async def story(world: World) -> None:
        await world.run(range(70))
        assert await world.notices() == []

    world = live(tmp_path, sites, story, usage='on_abuse = "throttle"')
    assert world.standings("a.test") == [Standing.WITHIN]
    assert world.rules == [()]


def test_the_same_without_lost_tunnels_is(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.run(range(60))

    world = live(tmp_path, flooded(STORM, report(*((bot, 3) for bot in BOTS))), story)
    assert Standing.SUSPECTED_ABUSE in world.standings("a.test")


@pytest.mark.parametrize(
    "sites",
    [
        flooded(Counts(handshakes=3000, short=2900, origin=1), report(failing=True), end=400),
        flooded(Counts(handshakes=3000, short=2900, origin=900), report(), end=400),
    ],
    ids=["its health changes", "it refuses"],
)
def test_an_origin_that_flaps_is_no_abuse(tmp_path: Path, sites: dict[str, Behaviour]) -> None:
    async def story(world: World) -> None:
        await world.run(range(70))
        assert await world.notices() == []

    world = live(tmp_path, sites, story, usage='on_abuse = "throttle"')
    assert world.standings("a.test") == [Standing.WITHIN]


def test_after_a_gap_everybody_may_come_back(tmp_path: Path) -> None:
    """The machine was off for a day, and 4 000 clients with it."""
    back = Counts(handshakes=3000, unfinished=8000, blocked=3000)
    behaviour = Behaviour(
        lambda _: 4000,
        lambda minute: back if 1500 <= minute < 1506 else NORMAL,
        lambda minute: report(*((bot, 3) for bot in BOTS)) if 1500 <= minute < 1506 else None,
    )

    async def story(world: World) -> None:
        await world.run(range(30))
        await world.restart()
        world.clock.now = START + 1500 * MINUTE
        await world.restart()
        await world.run(range(1500, 1530))

    world = live(tmp_path, {"a.test": behaviour}, story, usage='on_abuse = "throttle"')
    assert Standing.SUSPECTED_ABUSE not in world.standings("a.test")


class Machines:
    """A second machine, which has the history of all too, but sees other connections. It tells what it sees, or not."""

    def __init__(self, world: World, folder: Path) -> None:
        self._world = world
        self._folder = folder
        self.rules: list[Sequence[ThrottleRule]] = []
        self.standings: list[Standing] = []

    async def run(self, minutes: Iterable[int], seen: Callable[[int], Observed | None], *, told: bool) -> None:
        """Live through these minutes with both machines."""
        world = self._world
        config = decode(world.text, self._folder, "t.toml")
        told_here: list[Sightings] = []
        world.administration._duty = Duty()
        world.administration._on_sightings = told_here.append
        other = Administration(
            self._folder, config, load_channels(config), KEY, self.rules.append, duty=Duty(), clock=world.clock
        )
        other._assessor._reader = HistoryReader(world.folder)
        await other.start()
        try:
            for minute in minutes:
                await world.run([minute])
                if (observed := seen(minute)) is not None:
                    await other.take({"a.test": observed})
                await other.handle_minute({"a.test": 50}, IDLE)
                if told:  # for the next minute
                    for sightings in told_here:
                        await other.take_elsewhere(decode_sightings(encode_sightings(sightings)))
                told_here.clear()
                found = await other.carry_out(usage.Usage("a.test"), "alice", {})
                assert isinstance(found, usage.UsageResult)
                self.standings += [one.standing for one in found.assessments]
        finally:
            await other.close()


@pytest.mark.parametrize("told", [True, False])
def test_a_drain_on_one_machine_is_no_flood_on_another(tmp_path: Path, told: bool) -> None:
    """Only the first machine knows that it has ended 2 500 tunnels, whose clients come to the second one."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    drained = flooded(STORM, report(lost=2500), end=48)

    async def story(world: World) -> None:
        machines = Machines(world, tmp_path / "two")
        came = report(*((bot, 3) for bot in BOTS))
        await machines.run(range(60), lambda minute: came if 40 <= minute < 48 else None, told=told)
        assert (Standing.SUSPECTED_ABUSE in machines.standings) != told
        assert any(machines.rules) != told

    world = live(tmp_path / "one", drained, story, usage='on_abuse = "throttle"')
    assert world.standings("a.test") == [Standing.WITHIN]


def test_an_origin_that_fails_for_one_machine_explains_short_tunnels_of_all(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    failing = flooded(Counts(handshakes=3000, short=2900), report(failing=True), end=55)

    async def story(world: World) -> None:
        machines = Machines(world, tmp_path / "two")
        await machines.run(range(55), lambda _: None, told=True)
        assert set(machines.standings) == {Standing.WITHIN}

    live(tmp_path / "one", failing, story)


def test_a_flood_of_few_addresses_on_one_machine_throttles_nobody_on_another(tmp_path: Path) -> None:
    """Both suspect it; only the first one has the address, and the site itself is not throttled on the second."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()

    async def story(world: World) -> None:
        machines = Machines(world, tmp_path / "two")
        await machines.run(range(55), lambda _: None, told=True)
        assert Standing.SUSPECTED_ABUSE in machines.standings
        assert machines.rules == [()]

    world = live(tmp_path / "one", ONE_ADDRESS, story, usage='on_abuse = "throttle"')
    assert [rule.addresses for rule in world.rules[-1]] == [("198.51.100.7/32",)]


# --- commands ---------------------------------------------------------------------------------------------------------


BUSY_SITE = {"a.test": Behaviour(lambda _: 300), "b.test": Behaviour(lambda _: 3)}


def test_an_owner_who_was_told_can_be_throttled(tmp_path: Path) -> None:
    throttle = usage.ThrottleSite(site="a.test", rate="10/second", seconds=3600.0, why="agreed\nwith the owner")

    async def story(world: World) -> None:
        await world.run(range(30))
        with pytest.raises(ControlError, match=r"a\.test got no notice yet"):
            await world.ask(throttle, usage.Throttled)
        await world.run(range(30, 6 * DAY, 60))
        notice = (await world.notices("a.test"))[-1].notice
        done = await world.ask(throttle, usage.Throttled)
        assert (done.notice, done.who, done.abuse) == (notice.id, "alice (uid 1000)", False)
        assert "\n" not in done.why
        (rule,) = world.rules[-1]
        assert (rule.site, rule.amount, rule.window, rule.addresses) == ("a.test", 10, 1, ())
        with pytest.raises(ControlError, match=r"b\.test got no notice yet"):
            await world.ask(usage.ThrottleSite(site="b.test", rate="1/second", seconds=9.0, why="x"), usage.Throttled)
        stored = await world.administration._opened[0].store.run(NoticeFile.read_throttles_of, "a.test")
        assert [one.id for one in stored] == [rule.id]

    live(tmp_path, BUSY_SITE, story)


def test_a_muted_site_gets_no_notice(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.run(range(2))
        muted = await world.ask(usage.MuteSite("a.test", 30 * 86_400.0), usage.Muted)
        assert muted.who == "alice (uid 1000)"
        await world.run(range(30, 6 * DAY, 60))
        assert await world.notices() == []
        found = await world.ask(usage.Usage("a.test"), usage.UsageResult)
        assert [one.site for one in found.mutes] == ["a.test"]
        assert found.assessments[0].standing is Standing.SUSTAINED
        await world.ask(usage.MuteSite("a.test", 0.0), usage.Muted)
        await world.run(range(6 * DAY, 6 * DAY + 60, 10))
        assert len(await world.notices()) == 1

    live(tmp_path, BUSY_SITE, story)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (usage.Usage("a.tset"), 'there is no site "a.tset"; did you mean "a.test"?'),
        (usage.AckNotice("notice-1"), "there is no notice"),
        (usage.MuteSite("a.test", -1.0), "366 days at most"),
        (usage.MuteSite("a.test", math.nan), "366 days at most"),
        (usage.ReleaseSite("c.example"), "there is no site"),
        (usage.ThrottleSite(site="a.test", rate="1/s", seconds=1.0, why="x", abuse=True), "expected a rate"),
        (usage.ThrottleSite(site="a.test", rate="1/second", seconds=math.inf, why="x", abuse=True), "expected a time"),
        (usage.ThrottleSite(site="a.test", rate="1/second", seconds=1.0, why="\t", abuse=True), "say why"),
    ],
)
def test_wrong_commands(tmp_path: Path, command: Any, problem: str) -> None:
    async def story(world: World) -> None:
        await world.run(range(1))
        with pytest.raises(ControlError) as raised:
            await world.ask(command, object)
        assert problem in str(raised.value)
        assert "\n" not in str(raised.value)

    live(tmp_path, BUSY_SITE, story)


def test_usage_does_not_wait_while_the_history_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        await world.run(range(2))
        await world.restart()
        reading = threading.Event()
        world.administration._thread.submit(reading.wait)
        monkeypatch.setattr(administration, "QUICK_SECONDS", 0.05)
        found = await world.ask(usage.Usage(), usage.UsageResult, {"a.test": 320, "b.test": 1})
        reading.set()
        assert found.problem == administration.BUSY
        now = {one.site: (one.standing, one.figures.now, one.figures.peak) for one in found.assessments}
        assert now == {"a.test": (Standing.SPIKE, 320, 320), "b.test": (Standing.WITHIN, 1, 3)}
        monkeypatch.setattr(administration, "QUICK_SECONDS", 60.0)
        assert (await world.ask(usage.Usage(), usage.UsageResult)).problem == ""

    live(tmp_path, BUSY_SITE, story)


def test_without_a_history_there_is_a_reason_and_later_none(tmp_path: Path) -> None:
    async def main() -> None:
        async with Server().serving() as server:
            world = World(tmp_path, BUSY_SITE, server)
            world._administration = Administration(
                tmp_path, world.config, load_channels(world.config), KEY, world.rules.append, clock=world.clock
            )
            await world.administration.start()
            found = await world.ask(usage.Usage(), usage.UsageResult, {"a.test": 300})
            assert found.problem == ""
            assert [(one.site, one.standing) for one in found.assessments] == [("a.test", Standing.SPIKE)]
            with capture_logs() as logs:
                await world.administration.handle_minute({"a.test": 300}, IDLE)
                await world.administration.handle_minute({"a.test": 300}, IDLE)
            (log,) = logs
            found = await world.ask(usage.Usage(), usage.UsageResult)
            assert log["event"] == "sites not assessed"
            assert log["reason"] == found.problem == f"{tmp_path}/history.db: no history yet"
            world._history = await History.open(tmp_path)
            await world.run(range(3))
            await world.close()
            assert world.assessments["a.test"][-1][1].figures.hours_measured == 1

    asyncio.run(main())


def test_notices_that_cannot_be_used_are_used_when_they_can(tmp_path: Path) -> None:
    (tmp_path / "notices.sqlite").mkdir()

    async def story(world: World) -> None:
        with pytest.raises(ControlError, match="notices and throttles cannot be used now"):
            await world.ask(usage.Notices(), usage.NoticesResult)
        found = await world.ask(usage.Usage(), usage.UsageResult)
        assert "notices and throttles cannot be used now" in found.problem
        (tmp_path / "notices.sqlite").rmdir()
        await world.run(range(1))
        assert await world.notices() == []

    live(tmp_path, BUSY_SITE, story)


def test_addresses_of_several_processes_are_put_together(tmp_path: Path) -> None:
    one, other = SiteAddresses(KEY), SiteAddresses(KEY)
    assert one.take().suspicious == other.take().suspicious == b""

    async def story(world: World) -> None:
        await world.run(range(40))
        for minute in range(40, 45):
            for part in (BOTS[:500], BOTS[400:900]):
                await world.administration.take({"a.test": report(*((bot, 3) for bot in part))})
            await world.run([minute])
        (found,) = (await world.ask(usage.Usage("a.test"), usage.UsageResult)).assessments
        assert found.standing is Standing.SUSPECTED_ABUSE
        assert found.figures.flood_addresses == pytest.approx(900, rel=0.02)

    counts = {
        "a.test": Behaviour(lambda _: 50, lambda minute: NORMAL._replace(blocked=3000) if minute >= 40 else NORMAL)
    }
    live(tmp_path, counts, story)
