"""Notices, their deliveries, mutes and throttles on disk: the file `notices.sqlite` in the state folder.

A notice is stored with its deliveries in one transaction, then delivered, and the result is stored. An attempt is
stored before it begins, with the time of the next one. So a process that is killed at any moment delivers again what
has no stored result, later and with the same id, and forgets nothing.

The file is made, migrated, checked and locked as that of the history: `tlstunnel.state.history.database`. All of this
blocks, so in a process with a loop it is for the thread of `tlstunnel.plans.notice_store`.

Tested by tests/unit/test_plans_notice_store.py.
"""

import contextlib
import json
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from tlstunnel.errors import StateError
from tlstunnel.plans.decisions import MOST_DECISIONS, Acknowledgement, Decision, Mute, SiteThrottle
from tlstunnel.plans.notices import DAY, LONGEST_WAIT, SAME_SECONDS, Due, Sent
from tlstunnel.plans.values import Assessment, Notice, Standing
from tlstunnel.state.history.database import Schema, describe_damage, is_damage, open_for_reading, transaction

FILE_NAME = "notices.sqlite"

KEEP_SECONDS = 400 * DAY
"""How long notices, and throttles that have ended, are kept: as long as the days of the history."""

TUNNEL = "tlstunnel"
"""Who puts throttles in place by itself."""

MOST_FORGOTTEN = 20
"""Notices, and throttles, that `NoticeFile.tidy` deletes at a time."""

NOTICES = Schema(
    application_id=0x544C536E,  # "TLSn", for notices
    steps=(
        (
            """
            CREATE TABLE notices (
                id TEXT PRIMARY KEY, site TEXT NOT NULL, standing TEXT NOT NULL, created REAL NOT NULL,
                recipient TEXT NOT NULL, address TEXT NOT NULL, language TEXT NOT NULL, assessment TEXT NOT NULL,
                acknowledged REAL, acknowledged_by TEXT NOT NULL DEFAULT '', calm_since REAL,
                ended INTEGER NOT NULL DEFAULT 0
            )
            """,
            "CREATE INDEX notices_by_site ON notices (site, standing, created)",
            """
            CREATE TABLE deliveries (
                notice TEXT NOT NULL REFERENCES notices (id), channel TEXT NOT NULL, address TEXT NOT NULL,
                state TEXT NOT NULL, attempts INTEGER NOT NULL, next_at REAL NOT NULL, attempted REAL,
                reason TEXT NOT NULL DEFAULT '', PRIMARY KEY (notice, channel, address)
            )
            """,
            "CREATE INDEX deliveries_pending ON deliveries (next_at) WHERE state = 'pending'",
            "CREATE TABLE closed (url TEXT PRIMARY KEY, since REAL NOT NULL, notice TEXT NOT NULL)",
            "CREATE TABLE mutes (site TEXT PRIMARY KEY, until REAL NOT NULL, since REAL NOT NULL, who TEXT NOT NULL)",
            """
            CREATE TABLE throttles (
                id INTEGER PRIMARY KEY AUTOINCREMENT, site TEXT NOT NULL, addresses TEXT NOT NULL, rate TEXT NOT NULL,
                since REAL NOT NULL, until REAL NOT NULL, why TEXT NOT NULL, who TEXT NOT NULL, notice TEXT NOT NULL,
                abuse INTEGER NOT NULL, released REAL, released_by TEXT NOT NULL DEFAULT ''
            )
            """,
            "CREATE INDEX throttles_by_end ON throttles (until)",
        ),
    ),
)
"""Times are Unix times. `assessment` and `addresses` are JSON. `closed` are URLs whose receivers responded with 410."""


class Channel(StrEnum):
    """How a notice is delivered."""

    LOG = "log"
    WEBHOOK = "webhook"
    MAIL = "mail"


class State(StrEnum):
    """What became of a delivery."""

    PENDING = "pending"
    ACCEPTED = "accepted"
    GIVEN_UP = "given up"


class Target(msgspec.Struct, frozen=True):
    """Where to deliver a notice. `address` is "" for the log, and for the webhook of the configuration."""

    channel: Channel
    address: str = ""


class Delivery(msgspec.Struct, frozen=True):
    """A delivery that is due. `attempts` were made before."""

    notice: Notice
    target: Target
    attempts: int


class DeliveryRecord(msgspec.Struct, frozen=True):
    """What is known of a delivery. `next_at` is when it is tried again, None if it is not."""

    target: Target
    state: State
    attempts: int
    attempted: float | None
    next_at: float | None
    reason: str


class NoticeRecord(msgspec.Struct, frozen=True):
    """What is known of a notice."""

    notice: Notice
    acknowledged: float | None
    acknowledged_by: str
    deliveries: tuple[DeliveryRecord, ...]

    @property
    def accepted(self) -> bool:
        """Whether a webhook or a mail server has accepted it. The log does not count."""
        return any(one.state is State.ACCEPTED and one.target.channel is not Channel.LOG for one in self.deliveries)


class Throttle(msgspec.Struct, frozen=True, kw_only=True):
    """A rate for new handshakes of a site, or of `addresses` (networks) at this site.

    Without addresses, it is for the whole site. `notice` is the one that the site got before. `released` is when it was
    lifted. The addresses are forgotten when it has ended. `id` is 0 until it is stored.
    """

    id: int = 0
    site: str
    addresses: tuple[str, ...] = ()
    rate: str
    since: float
    until: float
    why: str
    who: str
    notice: str = ""
    abuse: bool = False
    released: float | None = None
    released_by: str = ""

    @property
    def is_told(self) -> bool:
        """Whether other machines are told: people have decided it, and it is for all clients of the site."""
        return not self.addresses and self.who != TUNNEL

    def to_decision(self) -> SiteThrottle:
        """Return what other machines are told."""
        return SiteThrottle(
            site=self.site,
            rate=self.rate,
            since=self.since,
            until=self.until,
            who=self.who,
            why=self.why,
            notice=self.notice,
            abuse=self.abuse,
            released=self.released,
            released_by=self.released_by,
        )


class NotContactedError(StateError):
    """A site is to be throttled that got no notice before."""


class NoticeReader:
    """Queries, each of which is one transaction. They block, so they are for a thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def read_sent(self) -> list[Sent]:
        """Return the last notice about each standing of each site, for `Notices`.

        It is the last one that was stored, since a clock may have been ahead.
        """
        rows = self._connection.execute("""
            SELECT id, site, standing, created, acknowledged IS NOT NULL, calm_since, ended FROM notices
            WHERE rowid IN (SELECT max(rowid) FROM notices GROUP BY site, standing)
        """)
        return [
            Sent(identifier, site, Standing(standing), created, bool(acknowledged), calm_since, bool(ended))
            for identifier, site, standing, created, acknowledged, calm_since, ended in rows
        ]

    def read_notices(self, site: str | None = None, most: int = 100) -> list[NoticeRecord]:
        """Return the last notices, or those about a site, with their deliveries. The latest is first."""
        records = []
        with _reading(self._connection):
            rows = self._connection.execute(
                f"SELECT {_NOTICE}, acknowledged, acknowledged_by FROM notices WHERE ? IS NULL OR site = ?"  # noqa: S608
                " ORDER BY rowid DESC LIMIT ?",
                (site, site, most),
            ).fetchall()
            for *notice, acknowledged, acknowledged_by in rows:
                query = """
                    SELECT channel, address, state, attempts, attempted, next_at, reason FROM deliveries
                    WHERE notice = ? ORDER BY channel, address
                """
                deliveries = tuple(_to_record(*row) for row in self._connection.execute(query, (notice[0],)))
                records.append(NoticeRecord(_to_notice(*notice), acknowledged, acknowledged_by, deliveries))
        return records

    def read_pending(self, most: int) -> list[Delivery]:
        """Return deliveries that are not done, the oldest first."""
        query = f"""
            SELECT {_NOTICE}, channel, place, attempts FROM (
                SELECT notice, channel, address AS place, attempts FROM deliveries WHERE state = 'pending'
            ) JOIN notices ON id = notice ORDER BY created LIMIT ?
        """  # noqa: S608 - names of ours
        return [_to_delivery(*row) for row in self._connection.execute(query, (most,))]

    def read_accepted(self, since: float, besides: str, most: int) -> list[Delivery]:
        """Return deliveries that were accepted, of notices made since then, the latest first.

        Those that were accepted for the reason `besides` are left out.
        """
        query = f"""
            SELECT {_NOTICE}, channel, place, attempts FROM (
                SELECT notice, channel, address AS place, attempts FROM deliveries
                WHERE state = 'accepted' AND reason != :besides
            ) JOIN notices ON id = notice WHERE created >= :since ORDER BY created DESC LIMIT :most
        """  # noqa: S608 - names of ours
        values = {"since": since, "besides": besides, "most": most}
        return [_to_delivery(*row) for row in self._connection.execute(query, values)]

    def read_mutes(self, now: float) -> list[Mute]:
        """Return the sites that are muted."""
        query = "SELECT site, until, since, who FROM mutes WHERE until > ? ORDER BY site"
        return [Mute(*row) for row in self._connection.execute(query, (now,))]

    def read_decisions(self, most: int, now: float) -> list[Decision]:
        """Return what people have decided, for other machines. The latest are last.

        They are the mutes, also those that have ended, the acknowledgements of the last notices, unless they no longer
        count, and the throttles of sites until their time is over, also those that were released.
        """
        mutes = "SELECT site, until, since, who FROM mutes ORDER BY since DESC LIMIT ?"
        acknowledged = """
            SELECT site, standing, created, acknowledged, acknowledged_by FROM notices
            WHERE rowid IN (SELECT max(rowid) FROM notices GROUP BY site, standing)
            AND acknowledged IS NOT NULL AND NOT ended ORDER BY acknowledged DESC LIMIT ?
        """
        throttles = f"""
            SELECT {_THROTTLE} FROM throttles WHERE until > ? AND addresses = '[]' AND who != ? ORDER BY id DESC LIMIT ?
        """  # noqa: S608 - names of ours
        with _reading(self._connection):
            found: list[Decision] = [Mute(*row) for row in self._connection.execute(mutes, (most,))]
            for site, standing, created, since, who in self._connection.execute(acknowledged, (most,)):
                found.append(Acknowledgement(site, Standing(standing), created, since, who))
            rows = self._connection.execute(throttles, (now, TUNNEL, most))
            found += [_to_throttle(row).to_decision() for row in rows]
        return sorted(found, key=lambda one: one.since)[-most:]

    def read_throttles(self, now: float) -> list[Throttle]:
        """Return the throttles that hold."""
        query = f"SELECT {_THROTTLE} FROM throttles WHERE until > ? AND since <= ? AND released IS NULL ORDER BY id"  # noqa: S608
        return [_to_throttle(row) for row in self._connection.execute(query, (now, now))]

    def read_throttles_of(self, site: str) -> list[Throttle]:
        """Return all throttles of a site, the latest first, also those that have ended."""
        query = f"SELECT {_THROTTLE} FROM throttles WHERE site = ? ORDER BY id DESC"  # noqa: S608
        return [_to_throttle(row) for row in self._connection.execute(query, (site,))]

    def find_contacted(self, site: str) -> str | None:
        """Return the last notice to the contact of a site that a webhook or mail server has accepted."""
        row = self._connection.execute(
            """
            SELECT id FROM notices JOIN deliveries ON notice = id
            WHERE site = ? AND recipient = 'contact' AND state = 'accepted' AND channel != 'log'
            ORDER BY notices.rowid DESC LIMIT 1
            """,
            (site,),
        ).fetchone()
        return row[0] if row else None


class NoticeFile(NoticeReader):
    """Queries and changes, each of which is on the disk when it returns, or raises and changes nothing."""

    def record(self, due: Due, targets: Mapping[str, Sequence[Target]]) -> None:
        """Store what is due, and a delivery to each of the targets of each notice."""
        with transaction(self._connection):
            for notice in due.notices:
                # The id of a notice of several machines is there already if a clock was ahead meanwhile.
                self._connection.execute(
                    f"INSERT INTO notices ({_NOTICE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
                    " ON CONFLICT DO NOTHING",
                    (
                        *(notice.id, notice.site, notice.standing, notice.created, notice.recipient, notice.address),
                        *(notice.language, msgspec.json.encode(notice.assessment).decode()),
                    ),
                )
                self._connection.executemany(
                    "INSERT INTO deliveries (notice, channel, address, state, attempts, next_at)"
                    " VALUES (?, ?, ?, 'pending', 0, ?) ON CONFLICT DO NOTHING",
                    [(notice.id, one.channel, one.address, notice.created) for one in targets[notice.id]],
                )
            self._connection.executemany(
                "UPDATE notices SET calm_since = ?, ended = ? WHERE id = ?",
                [(one.calm_since, one.ended, one.id) for one in due.changed],
            )

    def read_due(self, now: float, busy: Collection[Target], most: int) -> tuple[list[Delivery], float | None]:
        """Return deliveries that are due, one for each target that is not busy, and when the next one is due.

        A time that is further ahead than any delay is of a clock that was wrong, so it is due as well.
        """
        values = {
            "now": now,
            "wrong": now + 2 * LONGEST_WAIT,
            "busy": json.dumps([[one.channel, one.address] for one in busy], ensure_ascii=False),
            "most": most,
        }
        pending = """
            FROM deliveries WHERE state = 'pending' AND json_array(channel, address) NOT IN (
                SELECT json(value) FROM json_each(:busy)
            )
        """
        query = f"""
            SELECT {_NOTICE}, channel, place, attempts FROM (
                SELECT notice, channel, address AS place, attempts, min(next_at) AS first {pending}
                AND (next_at <= :now OR next_at > :wrong) GROUP BY channel, address ORDER BY first LIMIT :most
            ) JOIN notices ON id = notice ORDER BY first
        """  # noqa: S608 - names of ours
        with _reading(self._connection):
            rows = self._connection.execute(query, values).fetchall()
            query = f"SELECT min(next_at) {pending} AND next_at > :now"
            (following,) = self._connection.execute(query, values).fetchone()
        return [_to_delivery(*row) for row in rows], following

    def begin(self, delivery: Delivery, now: float, again: float) -> None:
        """Store that an attempt begins, and when there is another one should it have no result."""
        self._connection.execute(
            "UPDATE deliveries SET attempts = ?, attempted = ?, next_at = ?, reason = 'no result'"
            " WHERE notice = ? AND channel = ? AND address = ?",
            (delivery.attempts + 1, now, again, *_key_of(delivery)),
        )

    def finish(self, delivery: Delivery, state: State, reason: str, again: float | None = None) -> None:
        """Store the result of an attempt, and when there is another one."""
        self._connection.execute(
            "UPDATE deliveries SET state = ?, reason = ?, next_at = coalesce(?, next_at)"
            " WHERE notice = ? AND channel = ? AND address = ?",
            (state, reason, again, *_key_of(delivery)),
        )

    def close_url(self, url: str, notice: str, now: float) -> None:
        """Store that the receiver at a URL wants no more notices."""
        self._connection.execute(
            "INSERT OR IGNORE INTO closed (url, since, notice) VALUES (?, ?, ?)", (url, now, notice)
        )

    def open_url(self, url: str) -> None:
        """Deliver to a URL again."""
        self._connection.execute("DELETE FROM closed WHERE url = ?", (url,))

    def read_closed(self) -> frozenset[str]:
        """Return the URLs whose receivers want no more notices."""
        return frozenset(url for (url,) in self._connection.execute("SELECT url FROM closed"))

    def acknowledge(self, notice: str, who: str, now: float) -> Acknowledgement | None:
        """Store that a notice was read and understood, and return what is stored; None if there is no such notice."""
        with transaction(self._connection):
            self._connection.execute(
                "UPDATE notices SET acknowledged = ?, acknowledged_by = ? WHERE id = ? AND acknowledged IS NULL",
                (now, who, notice),
            )
            row = self._connection.execute(
                "SELECT site, standing, created, acknowledged, acknowledged_by FROM notices WHERE id = ?", (notice,)
            ).fetchone()
        if row is None:
            return None
        site, standing, created, since, by = row
        return Acknowledgement(site, Standing(standing), created, since, by)

    def acknowledge_same(self, one: Acknowledgement) -> None:
        """Store that a notice was read and understood that another machine has made in the place of ours."""
        self._connection.execute(
            "UPDATE notices SET acknowledged = ?, acknowledged_by = ?"
            " WHERE site = ? AND standing = ? AND abs(created - ?) < ? AND acknowledged IS NULL",
            (one.since, one.who, one.site, one.standing, one.created, SAME_SECONDS),
        )

    def mute(self, mute: Mute) -> Mute:
        """Store a mute instead of the previous one of the site, and return it as stored. One that has ended ends it.

        It is later than the previous one, even if a clock was ahead.
        """
        with transaction(self._connection):
            before = self._find_mute(mute.site)
            if before is not None and not mute.replaces(before):
                mute = msgspec.structs.replace(mute, since=before.since + 0.001)
            self._store_mute(mute)
        return mute

    def follow_mute(self, mute: Mute) -> bool:
        """Store a mute of another machine, and return whether it is later than the one that is known."""
        with transaction(self._connection):
            before = self._find_mute(mute.site)
            if before is not None and not mute.replaces(before):
                return False
            self._store_mute(mute)
        return True

    def _find_mute(self, site: str) -> Mute | None:
        row = self._connection.execute("SELECT site, until, since, who FROM mutes WHERE site = ?", (site,)).fetchone()
        return Mute(*row) if row else None

    def _store_mute(self, mute: Mute) -> None:
        self._connection.execute(
            "INSERT OR REPLACE INTO mutes (site, until, since, who) VALUES (?, ?, ?, ?)",
            (mute.site, mute.until, mute.since, mute.who),
        )

    def add_throttle(self, throttle: Throttle) -> Throttle:
        """Store a throttle, and return it as stored: with its id, and with the notice that the site got before.

        Raises NotContactedError if there is none, unless it is for abuse.
        """
        with transaction(self._connection):
            notice = throttle.notice or (self.find_contacted(throttle.site) or "")
            if not notice and not throttle.abuse:
                raise NotContactedError(
                    f"{throttle.site} got no notice yet that its contact's webhook or mail server has accepted: talk to"
                    " its owner first; against an attack, add --abuse"
                )
            return self._insert_throttle(msgspec.structs.replace(throttle, notice=notice))

    def follow_throttle(self, one: SiteThrottle, now: float) -> bool:
        """Store a throttle of another machine, or that it was released, and return whether that was not known yet."""
        with transaction(self._connection):
            row = self._connection.execute(
                "SELECT id, released FROM throttles WHERE site = ? AND since = ? AND addresses = '[]'",
                (one.site, one.since),
            ).fetchone()
            if row is not None:
                identifier, released = row
                if released is not None or one.released is None:
                    return False
                self._connection.execute(
                    "UPDATE throttles SET released = ?, released_by = ? WHERE id = ?",
                    (one.released, one.released_by, identifier),
                )
                return True
            (known,) = self._connection.execute("SELECT count(*) FROM throttles WHERE until > ?", (now,)).fetchone()
            if one.until <= now or known >= MOST_DECISIONS:
                return False
            self._insert_throttle(Throttle(**msgspec.structs.asdict(one)))
        return True

    def _insert_throttle(self, throttle: Throttle) -> Throttle:
        fields = msgspec.structs.asdict(throttle) | {"id": None, "addresses": json.dumps(throttle.addresses)}
        names = ", ".join(fields)
        marks = ", ".join(f":{name}" for name in fields)
        cursor = self._connection.execute(f"INSERT INTO throttles ({names}) VALUES ({marks})", fields)  # noqa: S608
        return msgspec.structs.replace(throttle, id=cursor.lastrowid)

    def release(self, site: str, who: str, now: float) -> int:
        """Lift the throttles of a site, and return how many there were."""
        return self._connection.execute(
            "UPDATE throttles SET released = ?, released_by = ? WHERE site = ? AND until > ? AND released IS NULL",
            (now, who, site, now),
        ).rowcount

    def tidy(self, now: float) -> None:
        """Forget what is older than `KEEP_SECONDS`, and the addresses of throttles that have ended.

        It forgets `MOST_FORGOTTEN` notices and throttles at most, so that a clock that is wrong by years for a minute
        does no more harm than that.
        """
        values = {"oldest": now - KEEP_SECONDS, "now": now, "most": MOST_FORGOTTEN}
        old = "SELECT id FROM notices WHERE created < :oldest ORDER BY created LIMIT :most"
        with transaction(self._connection):
            self._connection.execute(f"DELETE FROM deliveries WHERE notice IN ({old})", values)  # noqa: S608
            self._connection.execute(f"DELETE FROM notices WHERE id IN ({old})", values)  # noqa: S608
            self._connection.execute(
                "DELETE FROM throttles WHERE id IN ("
                "SELECT id FROM throttles WHERE until < :oldest ORDER BY until LIMIT :most)",
                values,
            )
            self._connection.execute("DELETE FROM mutes WHERE until < :oldest", values)
            # Without addresses it would be a throttle of the whole site, so it is over whatever the clock says later.
            self._connection.execute(
                "UPDATE throttles SET addresses = '[]', released = coalesce(released, until)"
                " WHERE (until < :now OR released IS NOT NULL) AND addresses != '[]'",
                values,
            )


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[NoticeReader]:
    """Open the file for queries of another process than the one that writes it. Raises StateError."""
    path = folder / FILE_NAME
    if not path.exists():
        raise StateError(f"{path}: no notices yet")
    try:
        with contextlib.closing(open_for_reading(path, NOTICES)) as connection:
            yield NoticeReader(connection)
    except sqlite3.Error as error:
        if is_damage(error):
            raise describe_damage(path, str(error)) from error
        raise StateError(f"{path}: cannot be read: {error}") from error


@contextlib.contextmanager
def _reading(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN")
    try:
        yield
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


_NOTICE = "id, site, standing, created, recipient, address, language, assessment"
_THROTTLE = ", ".join(Throttle.__struct_fields__)


def _to_notice(*row: Any) -> Notice:
    identifier, site, standing, created, recipient, address, language, assessment = row
    return Notice(
        id=identifier,
        site=site,
        standing=Standing(standing),
        created=created,
        recipient=recipient,
        address=address,
        assessment=msgspec.json.decode(assessment, type=Assessment),
        language=language,
    )


def _to_delivery(*row: Any) -> Delivery:
    *notice, channel, place, attempts = row
    return Delivery(_to_notice(*notice), Target(Channel(channel), place), attempts)


def _to_record(*row: Any) -> DeliveryRecord:
    channel, address, state, attempts, attempted, next_at, reason = row
    again = next_at if state == State.PENDING else None
    return DeliveryRecord(Target(Channel(channel), address), State(state), attempts, attempted, again, reason)


def _to_throttle(row: Sequence[Any]) -> Throttle:
    fields = dict(zip(Throttle.__struct_fields__, row, strict=True))
    fields |= {"addresses": tuple(json.loads(fields["addresses"])), "abuse": bool(fields["abuse"])}
    return Throttle(**fields)


def _key_of(delivery: Delivery) -> tuple[str, str, str]:
    return delivery.notice.id, delivery.target.channel, delivery.target.address
