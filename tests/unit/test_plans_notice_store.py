"""The file with notices: what is stored, what is due, and files that cannot be used."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from structlog.testing import capture_logs

from tests.unit.test_plans_templates import make_notice
from tlstunnel.errors import StateError
from tlstunnel.plans.decisions import Acknowledgement, Mute
from tlstunnel.plans.notice_file import (
    FILE_NAME,
    KEEP_SECONDS,
    MOST_FORGOTTEN,
    NOTICES,
    Channel,
    Delivery,
    DeliveryRecord,
    NotContactedError,
    NoticeFile,
    NoticeRecord,
    State,
    Target,
    Throttle,
    reading,
)
from tlstunnel.plans.notice_store import NoticeStore
from tlstunnel.plans.notices import DAY, HOUR, Due, Sent
from tlstunnel.plans.values import Notice, Standing
from tlstunnel.state.history.database import LockedError, open_for_writing

NOW = 1_800_086_400.0
LOG, HOOK = Target(Channel.LOG), Target(Channel.WEBHOOK)
MAIL = Target(Channel.MAIL, "ops@chat.example.com")
T = TypeVar("T")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[NoticeFile]:
    with contextlib.closing(open_for_writing(tmp_path / FILE_NAME, NOTICES)) as connection:
        yield NoticeFile(connection)


def make(number: int = 1, **values: Any) -> Notice:
    return msgspec.structs.replace(make_notice(), id=f"notice-{number}", created=NOW, **values)


def record(file: NoticeFile, *notices: Notice, targets: tuple[Target, ...] = (LOG, MAIL)) -> None:
    file.record(Due(notices), {notice.id: targets for notice in notices})


def due(file: NoticeFile, now: float, *busy: Target, most: int = 10) -> list[tuple[str, Channel, int]]:
    deliveries, _ = file.read_due(now, busy, most)
    return [(one.notice.id, one.target.channel, one.attempts) for one in deliveries]


def accept(file: NoticeFile, notice: Notice, target: Target = MAIL) -> None:
    file.finish(Delivery(notice, target, 0), State.ACCEPTED, "250 OK")


# Notices and deliveries


def test_a_notice_is_read_as_it_was_stored(file: NoticeFile) -> None:
    notice = make(recipient="operator", address="https://a.example/?ä=\"'", language="de")
    record(file, notice, targets=(LOG, Target(Channel.WEBHOOK, notice.address)))
    (found,) = file.read_notices()
    assert found == NoticeRecord(
        notice,
        None,
        "",
        (
            DeliveryRecord(LOG, State.PENDING, 0, None, NOW, ""),
            DeliveryRecord(Target(Channel.WEBHOOK, notice.address), State.PENDING, 0, None, NOW, ""),
        ),
    )
    deliveries, following = file.read_due(NOW, [LOG], 10)
    assert deliveries == [Delivery(notice, Target(Channel.WEBHOOK, notice.address), 0)]
    assert following is None
    assert file.read_due(NOW, [one.target for one in found.deliveries], 10) == ([], None)


def test_notices_are_read_by_site_the_latest_first(file: NoticeFile) -> None:
    record(file, make(1), make(2, site="b"), make(3))
    assert [one.notice.id for one in file.read_notices()] == ["notice-3", "notice-2", "notice-1"]
    assert [one.notice.id for one in file.read_notices("b")] == ["notice-2"]
    assert [one.notice.id for one in file.read_notices(most=1)] == ["notice-3"]


def test_all_is_stored_or_nothing(file: NoticeFile) -> None:
    record(file, make(1))
    with pytest.raises(KeyError):
        file.record(Due((make(2), make(3))), {make(2).id: [LOG]})
    assert [one.notice.id for one in file.read_notices()] == ["notice-1"]
    assert due(file, NOW) == [("notice-1", Channel.LOG, 0), ("notice-1", Channel.MAIL, 0)]


def test_what_has_the_same_id_is_the_same(file: NoticeFile) -> None:
    record(file, make(1))
    record(file, make(2), make(1, site="other.example.com"))
    assert [(one.notice.id, one.notice.site) for one in file.read_notices()] == [
        ("notice-2", "chat.example.com"),
        ("notice-1", "chat.example.com"),
    ]
    assert len(file.read_notices("chat.example.com")[1].deliveries) == 2


def test_pending_and_accepted_deliveries(file: NoticeFile) -> None:
    record(file, make(1), make(2))
    assert [(one.notice.id, one.target) for one in file.read_pending(3)] == [
        ("notice-1", LOG),
        ("notice-1", MAIL),
        ("notice-2", LOG),
    ]
    for one in file.read_pending(9):
        file.finish(one, State.ACCEPTED, "yes" if one.target == MAIL else "elsewhere")
    assert file.read_pending(9) == []
    created = make(1).created
    accepted = file.read_accepted(created, "elsewhere", 9)
    assert {(one.notice.id, one.target) for one in accepted} == {("notice-1", MAIL), ("notice-2", MAIL)}
    assert len(file.read_accepted(created, "elsewhere", 1)) == 1
    assert file.read_accepted(created + 1, "elsewhere", 9) == []


def test_an_attempt_has_a_next_one_before_it_begins(file: NoticeFile) -> None:
    record(file, make(), targets=(MAIL,))
    (delivery,), _ = file.read_due(NOW, (), 10)
    file.begin(delivery, NOW, NOW + 30)
    assert file.read_due(NOW, (), 10) == ([], NOW + 30)
    (found,) = file.read_notices()[0].deliveries
    assert found == DeliveryRecord(MAIL, State.PENDING, 1, NOW, NOW + 30, "no result")
    assert due(file, NOW + 30) == [("notice-1", Channel.MAIL, 1)]


@pytest.mark.parametrize("state", [State.ACCEPTED, State.GIVEN_UP])
def test_what_has_its_result_is_not_due(file: NoticeFile, state: State) -> None:
    record(file, make(), targets=(MAIL,))
    (delivery,), _ = file.read_due(NOW, (), 10)
    file.begin(delivery, NOW, NOW + 30)
    file.finish(delivery, state, "why")
    assert file.read_due(NOW + 1000 * DAY, (), 10) == ([], None)
    assert file.read_notices()[0].deliveries == (DeliveryRecord(MAIL, state, 1, NOW, None, "why"),)
    assert file.read_notices()[0].accepted is (state is State.ACCEPTED)


def test_the_log_does_not_count_as_accepted(file: NoticeFile) -> None:
    record(file, make())
    accept(file, make(), LOG)
    assert not file.read_notices()[0].accepted


def test_one_delivery_for_each_target(file: NoticeFile) -> None:
    record(file, *(make(number) for number in range(5)), targets=(LOG, HOOK, MAIL))
    assert due(file, NOW) == [("notice-0", channel, 0) for channel in (Channel.LOG, Channel.MAIL, Channel.WEBHOOK)]
    assert due(file, NOW, LOG, HOOK) == [("notice-0", Channel.MAIL, 0)]
    assert len(due(file, NOW, most=2)) == 2


def test_the_longest_due_is_first(file: NoticeFile) -> None:
    record(file, make(1), targets=(MAIL,))
    record(file, make(2), make(3), targets=(Target(Channel.MAIL, "b"),))
    file.finish(Delivery(make(1), MAIL, 0), State.PENDING, "x", NOW + 60)
    file.finish(Delivery(make(2), Target(Channel.MAIL, "b"), 0), State.PENDING, "x", NOW + 50)
    assert file.read_due(NOW - 1, (), 10) == ([], NOW)
    assert due(file, NOW + 10) == [("notice-3", Channel.MAIL, 0)]
    assert [identifier for identifier, _, _ in due(file, NOW + 60)] == ["notice-3", "notice-1"]


def test_what_a_clock_has_put_years_ahead_is_due(file: NoticeFile) -> None:
    record(file, make(), targets=(MAIL,))
    file.finish(Delivery(make(), MAIL, 1), State.PENDING, "x", NOW + 3000 * DAY)
    assert len(due(file, NOW)) == 1


def test_what_was_sent_is_the_last_for_each_standing(file: NoticeFile) -> None:
    record(file, make(1), make(2, site="b"), make(3, standing=Standing.REPEATED))
    ahead = msgspec.structs.replace(make(4), created=NOW + 3000 * DAY)
    record(file, ahead)
    record(file, make(5))
    assert file.read_sent() == [
        Sent("notice-2", "b", Standing.SUSTAINED, NOW),
        Sent("notice-3", "chat.example.com", Standing.REPEATED, NOW),
        Sent("notice-5", "chat.example.com", Standing.SUSTAINED, NOW),
    ]


def test_acknowledging_and_calm_are_stored(file: NoticeFile) -> None:
    record(file, make())
    stored = Acknowledgement("chat.example.com", Standing.SUSTAINED, NOW, NOW + 5, "ann")
    assert file.acknowledge("notice-1", "ann", NOW + 5) == stored
    assert file.acknowledge("notice-1", "bob", NOW + 9) == stored
    assert file.acknowledge("notice-2", "ann", NOW) is None
    assert file.read_decisions(10, NOW) == [stored]
    (found,) = file.read_notices()
    assert (found.acknowledged, found.acknowledged_by) == (NOW + 5, "ann")
    (sent,) = file.read_sent()
    assert sent == Sent("notice-1", "chat.example.com", Standing.SUSTAINED, NOW, acknowledged=True)
    changed = msgspec.structs.replace(sent, calm_since=NOW + 7, ended=True)
    file.record(Due((), (changed,)), {})
    assert file.read_sent() == [changed]


def test_a_url_that_wants_no_more_is_known(file: NoticeFile) -> None:
    file.close_url("https://a.example/", "notice-1", NOW)
    file.close_url("https://a.example/", "notice-2", NOW)
    assert file.read_closed() == {"https://a.example/"}
    file.open_url("https://a.example/")
    assert file.read_closed() == frozenset()


# Mutes and throttles


def test_a_mute_lasts_until_its_end(file: NoticeFile) -> None:
    mute = Mute("a", NOW + 60, NOW, "ann")
    file.mute(Mute("a", NOW + 5, NOW, "bob"))
    file.mute(mute)
    assert file.read_mutes(NOW + 59) == [mute]
    assert file.read_mutes(NOW + 60) == []
    ended = file.mute(Mute("a", NOW, NOW, "ann"))
    assert file.read_mutes(NOW) == []
    assert file.read_decisions(10, NOW) == [ended]
    assert ended.replaces(mute), "it was ended later, though the clock says the same"


def throttle(**values: Any) -> Throttle:
    usual = Throttle(site="chat.example.com", rate="10/second", since=NOW, until=NOW + HOUR, why="a flood", who="ann")
    return msgspec.structs.replace(usual, **values)


def test_no_site_is_throttled_without_having_been_contacted(file: NoticeFile) -> None:
    record(file, make(1), targets=(LOG, MAIL))
    record(file, make(2, recipient="operator"), targets=(LOG, MAIL))
    record(file, make(3, site="b"), targets=(LOG, MAIL))
    accept(file, make(1), LOG)  # the log does not count
    accept(file, make(2), MAIL)  # nor does the operator
    accept(file, make(3), MAIL)  # nor another site
    file.finish(Delivery(make(1), MAIL, 0), State.GIVEN_UP, "550")
    with pytest.raises(NotContactedError, match=r"^chat.example.com got no notice yet .*--abuse$"):
        file.add_throttle(throttle())
    assert file.read_throttles(NOW) == []
    record(file, make(4))
    accept(file, make(4))
    added = file.add_throttle(throttle())
    assert added == throttle(id=1, notice="notice-4")
    assert file.read_throttles(NOW) == file.read_throttles_of("chat.example.com") == [added]
    assert file.find_contacted("chat.example.com") == "notice-4"


def test_abuse_needs_no_contact(file: NoticeFile) -> None:
    added = file.add_throttle(throttle(abuse=True, addresses=("192.0.2.0/24", "2001:db8::/64")))
    assert added == throttle(id=1, abuse=True, addresses=("192.0.2.0/24", "2001:db8::/64"))
    assert file.read_throttles(NOW + HOUR - 1) == [added]
    assert file.read_throttles(NOW + HOUR) == []
    assert file.read_throttles(NOW - 1) == []


def test_a_throttle_is_lifted(file: NoticeFile) -> None:
    for site in ("a", "a", "b"):
        file.add_throttle(throttle(site=site, abuse=True))
    assert file.release("a", "bob", NOW + 5) == 2
    assert file.release("a", "bob", NOW + 6) == 0
    assert [one.site for one in file.read_throttles(NOW + 7)] == ["b"]
    latest, first = file.read_throttles_of("a")
    assert (latest.id, first.id, first.released, first.released_by) == (2, 1, NOW + 5, "bob")


def test_the_addresses_of_a_throttle_are_forgotten_at_its_end(file: NoticeFile) -> None:
    file.add_throttle(throttle(abuse=True, addresses=("192.0.2.1",)))
    file.tidy(NOW + HOUR)
    assert file.read_throttles_of("chat.example.com")[0].addresses == ("192.0.2.1",)
    file.tidy(NOW + HOUR + 1)
    (found,) = file.read_throttles_of("chat.example.com")
    assert found.addresses == ()
    # It is not one of the whole site when a wrong clock is right again.
    assert file.read_throttles(NOW + 1) == []


def test_what_is_old_is_forgotten_a_little_at_a_time(file: NoticeFile) -> None:
    record(file, *(make(number) for number in range(MOST_FORGOTTEN + 5)))
    file.add_throttle(throttle(abuse=True))
    file.mute(Mute("a", NOW, NOW, "ann"))
    file.tidy(NOW + KEEP_SECONDS)
    assert len(file.read_notices()) == MOST_FORGOTTEN + 5
    file.tidy(NOW + KEEP_SECONDS + DAY)
    assert len(file.read_notices()) == 5
    assert file.read_throttles_of("chat.example.com") == []
    file.tidy(NOW + KEEP_SECONDS + DAY)
    assert file.read_notices() == []
    assert file.read_due(NOW, (), 10) == ([], None)


# The thread, and files that cannot be used


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, 30))


def test_operations_run_in_a_thread(tmp_path: Path) -> None:
    async def main() -> None:
        store = NoticeStore(tmp_path)
        names = await store.run(lambda _: threading.current_thread().name)
        assert names == "notices"
        await store.run(NoticeFile.mute, Mute("a", NOW, NOW, "ann"))
        with reading(tmp_path) as reader:
            assert len(reader.read_mutes(NOW - 1)) == 1
        assert await store.close()

    run(main())


def test_an_error_of_ours_is_passed_on(tmp_path: Path) -> None:
    async def main() -> None:
        store = NoticeStore(tmp_path)
        with pytest.raises(NotContactedError):
            await store.run(NoticeFile.add_throttle, throttle())
        with pytest.raises(ZeroDivisionError):
            await store.run(lambda _: 1 // 0)
        assert store.problem == ""
        await store.close()

    run(main())


def test_one_process_writes(tmp_path: Path) -> None:
    async def main() -> None:
        first, second = NoticeStore(tmp_path), NoticeStore(tmp_path)
        await first.run(NoticeFile.tidy, NOW)
        with pytest.raises(LockedError):
            await second.run(NoticeFile.tidy, NOW)
        waiting = NoticeStore(tmp_path, lock_wait=20)
        tidied = asyncio.create_task(waiting.run(NoticeFile.tidy, NOW))
        await asyncio.sleep(0)
        await first.close()
        await tidied
        await waiting.close()
        await second.run(NoticeFile.tidy, NOW)
        await second.close()

    run(main())


def damage(path: Path) -> None:
    path.write_bytes(b"no database at all" * 300)


def make_newer(path: Path) -> None:
    with contextlib.closing(open_for_writing(path, NOTICES)) as connection:
        connection.execute("PRAGMA user_version = 7")


def drop_a_table(path: Path) -> None:
    with contextlib.closing(open_for_writing(path, NOTICES)) as connection:
        connection.execute("DROP TABLE mutes")


def damage_pages(path: Path) -> None:
    with contextlib.closing(open_for_writing(path, NOTICES)) as connection:
        file = NoticeFile(connection)
        for number in range(50):
            record(file, make(number))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (damage, "is not an SQLite database: move it away"),
        (make_newer, "has version 7, and this release of tlstunnel knows up to 1"),
        (drop_a_table, r"is damaged \(no such table: mutes\): move it away"),
        (damage_pages, r"is damaged \(.*\): move it away"),
    ],
)
def test_a_file_that_cannot_be_used_is_left_alone(tmp_path: Path, spoil: Callable[[Path], None], reason: str) -> None:
    path = tmp_path / FILE_NAME
    spoil(path)
    before = path.read_bytes()

    async def main() -> None:
        store = NoticeStore(tmp_path)
        with capture_logs() as logs:
            for _ in range(3):
                with pytest.raises(StateError, match=reason):
                    await store.run(NoticeFile.read_mutes, NOW)
            assert str(path) in store.problem
            assert path.read_bytes() == before
            path.rename(tmp_path / "away")
            for companion in ("-wal", "-shm"):
                (tmp_path / f"{FILE_NAME}{companion}").unlink(missing_ok=True)
            await store.run(NoticeFile.mute, Mute("a", NOW, NOW, "ann"))
            assert store.problem == ""
        assert [log["event"] for log in logs] == ["notices not written", "notices written again"]
        assert await store.close()

    run(main())


def test_a_file_that_is_moved_away_is_not_written_any_more(tmp_path: Path) -> None:
    async def main() -> None:
        store = NoticeStore(tmp_path)
        await store.run(NoticeFile.mute, Mute("a", NOW, NOW, "ann"))
        (tmp_path / FILE_NAME).rename(tmp_path / "moved")
        await store.run(NoticeFile.mute, Mute("b", NOW, NOW, "ann"))
        await store.close()

    run(main())
    with reading(tmp_path) as reader:
        assert [mute.site for mute in reader.read_mutes(0.0)] == ["b"]


def test_a_reader_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"notices\.sqlite: no notices yet"), reading(tmp_path):
        pass
    damage(tmp_path / FILE_NAME)
    with pytest.raises(StateError, match="is not an SQLite database"), reading(tmp_path):
        pass
    (tmp_path / FILE_NAME).unlink()
    drop_a_table(tmp_path / FILE_NAME)
    with pytest.raises(StateError, match="is damaged"), reading(tmp_path) as reader:
        reader.read_mutes(NOW)
