"""Which of several machines delivers notices, and that a change of it neither repeats nor loses any."""

import contextlib
import functools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_plans_delivery import START, Clock, Server, assess, find, hook, read, run, until, wait_for
from tlstunnel.plans import duty as module
from tlstunnel.plans.decisions import Mute
from tlstunnel.plans.delivery import ELSEWHERE, TOO_LATE
from tlstunnel.plans.duty import Duty
from tlstunnel.plans.notice_file import Channel, Delivery, NoticeFile, State, Target
from tlstunnel.plans.notices import (
    DAY,
    HOUR,
    REPEAT_SECONDS,
    RETRY_SECONDS,
    SAME_SECONDS,
    SETTLE_SECONDS,
    make_shared_id,
)
from tlstunnel.plans.notifier import Notifier
from tlstunnel.plans.values import Assessment, Notice, Recipient, Standing

WEBHOOK = Target(Channel.WEBHOOK)
BOTH = [assess(Standing.SUSTAINED), assess(Standing.SUSTAINED, "b")]
EVER = 1e12


def make_notice(
    created: float = START,
    site: str = "a",
    standing: Standing = Standing.SUSTAINED,
    recipient: Recipient = "contact",
) -> Notice:
    return Notice(
        id="notice-1",
        site=site,
        standing=standing,
        created=created,
        recipient=recipient,
        address="",
        assessment=Assessment(site=site, standing=standing, since=START, sentence="It is so."),
        language="en",
    )


def was_delivered(duty: Duty, notice: Notice, target: Target = WEBHOOK) -> bool:
    return duty.was_delivered(Delivery(notice, target, 0))


def test_duty_ends_by_its_clock() -> None:
    clock = Clock()
    duty = Duty(clock=clock)
    found = [duty.is_ours, duty.learn(START + 25, []), duty.is_ours, duty.learn(START + 30, [])]
    assert found == [False, True, True, False]
    clock.now += 30
    found = [duty.is_ours, duty.learn(clock.now + 25, []), duty.learn(0.0, []), duty.is_ours]
    assert found == [False, True, False, False]
    assert Duty(alone=True).is_ours


def test_what_was_delivered_is_told_and_understood() -> None:
    told: list[str] = []
    one, two = Duty(told.extend), Duty()
    one.note_delivered(make_notice(), WEBHOOK)
    assert was_delivered(one, make_notice())
    assert not was_delivered(two, make_notice())
    assert two.learn(0.0, told)
    assert not two.learn(0.0, told)
    assert was_delivered(two, make_notice(START + 60))
    assert was_delivered(two, make_notice(START - SAME_SECONDS + 1))
    assert not was_delivered(two, make_notice(START + REPEAT_SECONDS - 60))
    assert not was_delivered(two, make_notice(START - REPEAT_SECONDS))
    assert not was_delivered(two, make_notice(site="b"))
    assert not was_delivered(two, make_notice(standing=Standing.REPEATED))
    assert not was_delivered(two, make_notice(), Target(Channel.LOG))
    assert not was_delivered(two, make_notice(), Target(Channel.WEBHOOK, "https://owner.example/"))


def test_an_address_that_was_changed_is_no_other_delivery() -> None:
    told: list[str] = []
    Duty(told.extend).note_delivered(make_notice(), Target(Channel.MAIL, "old@a.example"))
    two = Duty()
    two.learn(0.0, told)
    assert was_delivered(two, make_notice(), Target(Channel.MAIL, "new@a.example"))
    assert not was_delivered(two, make_notice(recipient="operator"), Target(Channel.MAIL, "operator@a.example"))
    assert "example" not in told[0]


def test_a_single_machine_tells_nobody() -> None:
    told: list[str] = []
    duty = Duty(told.extend, alone=True)
    duty.note_delivered(make_notice(), WEBHOOK)
    assert told == []
    assert not was_delivered(duty, make_notice())


@given(st.lists(st.one_of(st.text(), st.from_regex(r"[0-9a-f]{24}:[0-9]{1,14}\Z"))))
def test_nothing_that_is_told_does_harm(delivered: list[str]) -> None:
    duty = Duty()
    duty.learn(0.0, delivered)
    assert not duty.is_ours
    assert not was_delivered(duty, make_notice())


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_DELIVERED", 3)
    duty = Duty()
    for number in range(5):
        duty.note_delivered(make_notice(site=str(number)), WEBHOOK)
    assert [was_delivered(duty, make_notice(site=str(number))) for number in range(5)] == [False, False, *[True] * 3]
    assert len(duty._made) == 3


def test_ids_are_those_of_a_site_a_standing_and_a_week() -> None:
    week = START // REPEAT_SECONDS * REPEAT_SECONDS
    make = functools.partial(make_shared_id, "tlstunnel")
    same = {make("a", "sustained", week + seconds) for seconds in (0.0, 1.0, REPEAT_SECONDS - 1)}
    assert len(same) == 1
    others = {make("a", "sustained", week - 1), make("a", "repeated", week), make("b", "sustained", week)}
    assert len(same | others | {make_shared_id("other", "a", "sustained", week)}) == 5


# Notifiers of machines, with stores and a receiver.


class Machine:
    """A machine with notices of its own, that is told what the others deliver unless it is cut off."""

    def __init__(self, folder: Path, server: Server, clock: Clock, others: "list[Machine]") -> None:
        self._folder = folder
        self._server = server
        self._clock = clock
        self._others = others
        self._told: list[str] = []
        self.duty = Duty(self._publish)
        others.append(self)
        self._notifier: Notifier | None = None

    @property
    def notifier(self) -> Notifier:
        assert self._notifier is not None
        return self._notifier

    async def start(self) -> None:
        """Start with what is in the folder, and what the others have told."""
        self.duty = Duty(self._publish)
        self.duty.learn(0.0, self._others[0]._told)
        self._notifier = await Notifier.open(
            self._folder,
            hook(self._server),
            clock=self._clock,
            lock_wait=5,
            duty=self.duty,
            new_id=functools.partial(make_shared_id, "tlstunnel"),
        )

    async def stop(self) -> None:
        """End."""
        if self._notifier is not None:
            await self._notifier.close()

    def elect(self, *, elected: bool = True) -> None:
        """Tell it whether it is to deliver."""
        self.duty.learn(EVER if elected else 0.0, [])
        self.notifier.wake()

    def _publish(self, delivered: list[str]) -> None:
        self._others[0]._told += delivered
        for other in self._others:
            if other is not self and other._notifier is not None and other.duty.learn(other.duty._until, delivered):
                other.notifier.wake()

    async def wait_until_done(self) -> list[str]:
        """Wait until nothing is to be delivered, and return why not, for the webhook of each notice."""

        async def is_done() -> tuple[list[str]] | None:
            records = [one for record in await read(self.notifier) for one in record.deliveries]
            if any(one.state is State.PENDING for one in records):
                return None
            return ([one.reason for one in records if one.target == WEBHOOK],)

        self._clock.now += 60  # an attempt that began before its duty ended is repeated
        for one in self._others:
            if one._notifier is not None:
                one.notifier.wake()
        return (await until(is_done))[0]


@contextlib.asynccontextmanager
async def machines(folder: Path, server: Server, clock: Clock, number: int = 2) -> AsyncIterator[list[Machine]]:
    others: list[Machine] = []
    for place in range(number):
        path = folder / str(place)
        path.mkdir(exist_ok=True)
        await Machine(path, server, clock, others).start()
    try:
        yield others
    finally:
        for one in others:
            await one.stop()


def test_only_the_elected_machine_delivers(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        async with Server().serving() as server, machines(tmp_path, server, clock) as (one, two):
            one.elect()
            for machine in (two, one):
                assert await machine.notifier.assess([assess()]) == 1
                clock.now += 20
            assert await one.wait_until_done() == ["204"]
            assert await two.wait_until_done() == [ELSEWHERE]
            (record,) = await read(two.notifier)
            assert record.accepted
            assert server.ids == [record.notice.id]
            one.elect(elected=False)
            two.elect()
            clock.now += REPEAT_SECONDS
            for machine in (one, two):
                assert await machine.notifier.assess([assess()]) == 1
            assert await one.wait_until_done() == [ELSEWHERE, "204"]
            assert len(server.ids) == 2

    run(main())


def test_what_is_decided_on_one_machine_holds_on_all(tmp_path: Path) -> None:
    """Also on one that was elsewhere meanwhile, and on one that has never had the notice."""

    async def main() -> None:
        clock = Clock()
        async with Server().serving() as server, machines(tmp_path, server, clock, 3) as (one, two, three):
            one.elect()
            for machine in (one, two, three):
                await machine.notifier.assess(BOTH)
            clock.now += SETTLE_SECONDS
            for machine in (one, two):
                assert await machine.notifier.assess(BOTH) == 2
                await machine.wait_until_done()
            await two.notifier.mute("b", 30 * DAY, "ann")
            notice = next(one for one in await read(two.notifier) if one.notice.site == "a").notice
            assert await two.notifier.acknowledge(notice.id, "bob (uid 7)")
            await one.notifier.follow()
            (known,) = [record for record in await read(one.notifier) if record.notice.id == notice.id]
            assert (known.acknowledged, known.acknowledged_by) == (clock.now, "bob (uid 7)")
            assert [mute.site for mute in await one.notifier.store.run(NoticeFile.read_mutes, clock.now)] == ["b"]
            await two.stop()
            two._notifier = None
            clock.now += REPEAT_SECONDS + HOUR
            for machine in (one, three):
                assert await machine.notifier.assess(BOTH) == 0
            one.elect(elected=False)
            three.elect()
            assert await three.notifier.assess(BOTH) == 0
            await three.notifier.mute("b", 0.0, "ann")
            await one.notifier.follow()
            clock.now += HOUR
            for machine in (three, one):
                assert await machine.notifier.assess(BOTH) == 1
                await machine.wait_until_done()
            assert len(server.posts) == 3

    run(main())


def test_a_server_that_has_lost_everything_is_told_again_what_was_decided(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        async with Server().serving() as server, machines(tmp_path, server, clock) as (one, two):
            await two.stop()
            two._notifier = None
            await one.notifier.mute("a", 30 * DAY, "ann")
            one._told.clear()
            await two.start()
            one.elect()
            await until(functools.partial(_was_told, one))
            await two.notifier.follow()
            assert [mute.who for mute in await two.notifier.store.run(NoticeFile.read_mutes, clock.now)] == ["ann"]

    async def _was_told(machine: Machine) -> bool:
        return bool(machine._told)

    run(main())


def test_what_waits_to_be_stored_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_DECISIONS", 2)
    duty = Duty()
    told: list[str] = []
    Duty(told.extend).tell([Mute(site, START, START, "x") for site in "abc"])
    assert not duty.learn(0.0, told)
    assert [one.site for one in duty.decisions] == ["b", "c"]
    Duty(told.extend, alone=True).tell([Mute("d", START, START, "x")])
    assert len(told) == 3


def test_none_is_elected_for_a_while(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        async with Server().serving() as server, machines(tmp_path, server, clock) as (one, two):
            for machine in (one, two):
                await machine.notifier.assess([assess()])
                machine.elect(elected=False)
            clock.now += 2 * DAY
            two.elect()
            assert await two.wait_until_done() == ["204"]
            assert await one.wait_until_done() == [ELSEWHERE]
            assert len(server.posts) == 1

    run(main())


@pytest.mark.parametrize("tried", [False, True])
@pytest.mark.parametrize("elected", [False, True])
def test_what_was_not_delivered_in_time_is_not_sent_later(tmp_path: Path, tried: bool, elected: bool) -> None:
    async def main() -> None:
        clock = Clock()
        async with Server().serving() as server, machines(tmp_path, server, clock, 1) as (one,):
            server.response = b"HTTP/1.1 500 No\r\n\r\n"
            if tried:
                one.elect()
            await one.notifier.assess([assess()])
            if tried:
                await wait_for(one.notifier, State.PENDING)
            one.elect(elected=False)
            clock.now += RETRY_SECONDS + 1
            one.elect(elected=elected)
            assert await one.wait_until_done() == [TOO_LATE]
            assert len(server.posts) == tried

    run(main())


def test_a_machine_that_has_just_lost_its_duty_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is over between the beginning of an attempt and the delivery, and nobody has told it."""

    async def main() -> None:
        clock, duty_clock = Clock(), Clock()
        read_closed = NoticeFile.read_closed

        def read_slowly(file: NoticeFile) -> frozenset[str]:
            duty_clock.now += 30
            return read_closed(file)

        monkeypatch.setattr(NoticeFile, "read_closed", read_slowly)
        async with Server().serving() as server, machines(tmp_path, server, clock, 1) as (one,):
            one.duty._clock = duty_clock
            one.duty.learn(START + 25, [])
            await one.notifier.assess([assess()])
            record = await wait_for(one.notifier, State.PENDING)
            assert find(record, Channel.WEBHOOK) == "it is up to another machine now"
            assert server.posts == []

    run(main())


def test_what_was_told_before_a_machine_started_is_not_sent_by_it(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        async with Server().serving() as server, machines(tmp_path, server, clock) as (one, two):
            await two.notifier.assess([assess()])
            await two.stop()
            two._notifier = None
            one.elect()
            await one.notifier.assess([assess()])
            assert await one.wait_until_done() == ["204"]
            await one.stop()
            one._notifier = None
            await two.start()
            two.elect()
            assert await two.wait_until_done() == [ELSEWHERE]
            assert len(server.posts) == 1

    run(main())


def test_what_the_server_has_lost_is_told_again(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        async with Server().serving() as server, machines(tmp_path, server, clock) as (one, two):
            one.elect()
            await one.notifier.assess([assess()])
            await one.wait_until_done()
            one._told.clear()
            await two.stop()
            await two.start()
            await two.notifier.assess([assess()])
            one.elect(elected=False)
            await until(functools.partial(_is_off_duty, one))
            one.elect()
            assert await two.wait_until_done() == [ELSEWHERE]
            assert len(server.posts) == 1

    async def _is_off_duty(machine: Machine) -> bool:
        return not machine.notifier._courier._was_ours

    run(main())


async def apply(machine: Machine, action: str, elected: Machine | None) -> Machine | None:
    """Do something with a machine, and return which one is elected then."""
    match action:
        case "elect":
            if elected is not None:
                elected.elect(elected=False)
                await until(functools.partial(is_idle, elected))
            machine.elect()
            return machine
        case "assess":
            await machine.notifier.assess([assess()])
        case "restart":
            await machine.stop()
            await machine.start()
            return None if machine is elected else elected
        case "wait" if elected is not None:
            await elected.wait_until_done()
    return elected


async def is_idle(machine: Machine) -> bool:
    return not machine.notifier._courier._busy


@settings(max_examples=max(15, settings().max_examples // 10), deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["elect", "assess", "restart", "wait"]), st.integers(0, 2), st.sampled_from([0.0, 60, HOUR])
        ),
        max_size=20,
    )
)
def test_changes_of_the_elected_machine_repeat_and_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, float]]
) -> None:
    async def main() -> None:
        clock = Clock()
        folder = tmp_path_factory.mktemp("machines")
        async with Server().serving() as server, machines(folder, server, clock, 3) as everyone:
            elected: Machine | None = None
            for action, number, seconds in steps:
                clock.now += seconds
                elected = await apply(everyone[number], action, elected)
            if elected is None:
                everyone[0].elect()
                await everyone[0].wait_until_done()
            for machine in everyone:
                await machine.notifier.assess([assess()])
            for machine in everyone:
                await machine.wait_until_done()
            assert len(server.posts) == 1, "once a week, whoever is elected"

    run(main())
