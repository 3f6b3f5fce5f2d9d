"""Which notices are due, to whom, and when a failed delivery is tried again. No I/O: the caller has the clock.

- One about a standing of a site is due when the standing has lasted for `SETTLE_SECONDS` without a break, and about
  suspected abuse at once. A site that is just at a threshold, now over it and now under, never gets that far.
- The next one about the same standing is due `REPEAT_SECONDS` later, if it still holds.
- None is due in this time about a standing that weighs less: to drop from sustained to repeated is no news.
- Once a notice is acknowledged, none is due about its standing or a lighter one, until the site had no standing that
  notices are about for `CALM_SECONDS` without a break.
- Suspected abuse has nothing to do with the others, since notices about it go to other people.
- Sites that are muted get none.

What was sent before comes from the store, and what changes goes there first. So a restart, or a disk that is full for
a while, neither loses a notice nor makes a second one. Only the time in which a standing has to settle begins again.
A site without an assessment, such as in a gap, stays as it was. A clock that was wrong cannot keep notices back for
longer than `REPEAT_SECONDS` after it is right again.
"""

import secrets
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from hashlib import blake2b

import msgspec

from tlstunnel.backoff import Backoff
from tlstunnel.plans.values import Assessment, Notice, Recipient, Standing

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0

SETTLE_SECONDS = 15 * MINUTE
CALM_SECONDS = DAY
REPEAT_SECONDS = 7 * DAY

SAME_SECONDS = REPEAT_SECONDS - HOUR
"""Notices of two machines about the same standing of a site are the same if they were made closer together than this.

It is a little less than the time between two notices of one machine, because machines do not make theirs at once.
"""

RETRY_SECONDS = 3 * DAY
"""How long after a notice was made its delivery is tried again: of the schedules that Standard Webhooks suggests
("spanning multiple days"), and less than the 4 to 5 days of mail servers (RFC 5321 section 4.5.4.1)."""

RETRIES = Backoff(30.0, 6 * HOUR, jitter=0.1)
"""Ten attempts in the first 8 hours, then one in 6 hours."""

MAX_ATTEMPTS = 40
"""Twice as many as there are in `RETRY_SECONDS`: for a notice made while the clock was years ahead."""

LONGEST_WAIT = DAY
"""The longest wait that a server can ask for."""

NOTIFIED = tuple(standing for standing in Standing if standing.recipient is not None)
"""Standings that notices are about."""


class Outcome(StrEnum):
    """How an attempt to deliver a notice ended."""

    ACCEPTED = "accepted"
    FAILED = "failed"
    """It is tried again."""
    REFUSED = "refused"
    """It will not be accepted later either: no such mailbox."""
    GONE = "gone"
    """The receiver wants no notices any more: 410."""


class Result(msgspec.Struct, frozen=True):
    """The result of an attempt. `reason` is one printable line; `wait` is what the receiver asked for, in seconds."""

    outcome: Outcome
    reason: str
    wait: float = 0.0


class Sent(msgspec.Struct, frozen=True):
    """The last notice about a standing of a site.

    Once it is `acknowledged`: `calm_since` is since when the site has no standing of this kind, and `ended` whether
    that was so for `CALM_SECONDS`.
    """

    id: str
    site: str
    standing: Standing
    created: float
    acknowledged: bool = False
    calm_since: float | None = None
    ended: bool = False


class Due(msgspec.Struct, frozen=True):
    """What to store: new notices, and acknowledged ones whose site became calm, or did so no more."""

    notices: tuple[Notice, ...] = ()
    changed: tuple[Sent, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.notices or self.changed)


class Addresses(msgspec.Struct, frozen=True):
    """Where notices go: URLs (`mailto:` or `https:`) of sites' contacts and of the operator, "" for none."""

    contacts: Mapping[str, str] = {}
    operator: str = ""
    language: str = "en"


NewId = Callable[[str, Standing, float], str]
"""Returns the id of a notice about a site and a standing that is made at this time."""

_Key = tuple[str, Standing]


def make_id(_site: str = "", _standing: str = "", _created: float = 0.0) -> str:
    """Return a new id: short enough to type, and with 64 random bits.

    It has no dot, which would be a way around a signature (Standard Webhooks, "Signature scheme"), and nothing that has
    a meaning in a header.
    """
    return f"notice-{secrets.token_hex(8)}"


def make_shared_id(prefix: str, site: str, standing: str, created: float) -> str:
    """Return the id that the machines with the same `prefix` give a notice about a site, a standing and a week.

    Weeks begin on Thursday, as Unix time did. Two notices of a machine about the same standing are never in one.
    """
    text = "\0".join((prefix, site, standing, str(int(created // REPEAT_SECONDS))))
    return f"notice-{blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}"


class Notices:
    """Decides which notices are due. `sent` are the last ones in the store, `mutes` until when sites get none."""

    def __init__(self, sent: Iterable[Sent], mutes: Mapping[str, float], *, new_id: NewId = make_id) -> None:
        self._sent: dict[_Key, Sent] = {(one.site, one.standing): one for one in sent}
        self._mutes = dict(mutes)
        self._new_id = new_id
        self._began: dict[_Key, float] = {}

    def decide(self, assessments: Iterable[Assessment], addresses: Addresses, now: float) -> Due:
        """Return what is due. Nothing changes until `apply`, so the same is due again if it could not be stored."""
        notices: list[Notice] = []
        changed: list[Sent] = []
        for assessment in assessments:
            changed += self._observe(assessment, now)
            if self._is_due(assessment, now):
                notices.append(self._make_notice(assessment, addresses, now))
        return Due(tuple(notices), tuple(changed))

    def apply(self, due: Due) -> None:
        """Take into account what was stored."""
        for one in due.changed:
            self._sent[one.site, one.standing] = one
        for notice in due.notices:
            self._sent[notice.site, notice.standing] = Sent(notice.id, notice.site, notice.standing, notice.created)

    def acknowledge(self, notice: str) -> None:
        """Send no further notice about the standing of this one while it lasts."""
        for key, one in self._sent.items():
            if one.id == notice:
                self._sent[key] = msgspec.structs.replace(one, acknowledged=True)

    def acknowledge_same(self, site: str, standing: Standing, created: float) -> None:
        """Do so for the notice that another machine has made at that time, whether or not this one has one too."""
        key = site, standing
        sent = self._sent.get(key)
        if sent is not None and abs(sent.created - created) < SAME_SECONDS:
            self._sent[key] = msgspec.structs.replace(sent, acknowledged=True)
        elif sent is None or sent.created < created:
            self._sent[key] = Sent("", site, standing, created, acknowledged=True)

    def mute(self, site: str, until: float) -> None:
        """Send nothing about a site until then; a time in the past ends that."""
        self._mutes[site] = until

    def _observe(self, assessment: Assessment, now: float) -> Iterable[Sent]:
        """Note which standings the site has, and return the acknowledged notices for which that changes something."""
        now_has = assessment.standing
        for standing in NOTIFIED:
            key = assessment.site, standing
            same_kind = _is_of_same_kind(standing, now_has)
            if same_kind and standing.weight <= now_has.weight:
                self._began[key] = min(self._began.get(key, now), now)
            elif now_has is not Standing.SUSPECTED_ABUSE:  # which hides the others
                self._began.pop(key, None)
            else:
                continue
            sent = self._sent.get(key)
            if sent is not None and (changed := _follow(sent, same_kind, now)) is not sent:
                yield changed

    def _is_due(self, assessment: Assessment, now: float) -> bool:
        standing, site = assessment.standing, assessment.site
        if standing.recipient is None or now < self._mutes.get(site, now):
            return False
        settle = 0.0 if standing is Standing.SUSPECTED_ABUSE else SETTLE_SECONDS
        if now - self._began[site, standing] < settle:
            return False
        for other in NOTIFIED:
            if other.weight >= standing.weight and _is_of_same_kind(other, standing):
                sent = self._sent.get((site, other))
                if sent is not None and _rules_out(sent, now):
                    return False
        return True

    def _make_notice(self, assessment: Assessment, addresses: Addresses, now: float) -> Notice:
        contact = addresses.contacts.get(assessment.site, "")
        recipient: Recipient = "contact" if assessment.standing.recipient == "contact" and contact else "operator"
        return Notice(
            id=self._new_id(assessment.site, assessment.standing, now),
            site=assessment.site,
            standing=assessment.standing,
            created=now,
            recipient=recipient,
            address=contact if recipient == "contact" else addresses.operator,
            assessment=assessment,
            language=addresses.language,
        )


def plan_retry(attempts: int, created: float, now: float, wait: float = 0.0) -> float | None:
    """Return when to deliver a notice again after so many failed attempts, or None if it was tried for long enough.

    `wait` is what the receiver asked for. If the machine was off for longer than `RETRY_SECONDS`, there is one attempt.
    """
    again = now + max(RETRIES.spread(find_delay(attempts)), min(wait, LONGEST_WAIT))
    return again if attempts < MAX_ATTEMPTS and again <= created + RETRY_SECONDS else None


def find_delay(attempts: int) -> float:
    """Return the seconds between the last of so many attempts and the next one, before the jitter."""
    delay = 0.0
    for _ in range(min(attempts, 32)):
        delay = RETRIES.after(delay)
    return delay


def _is_of_same_kind(one: Standing, other: Standing) -> bool:
    """Return whether notices about both go to the same people. Abuse says nothing about what a site's owner does."""
    return one.recipient == other.recipient


def _follow(sent: Sent, concerned: bool, now: float) -> Sent:
    if sent.ended or not sent.acknowledged:
        return sent
    if concerned:
        return sent if sent.calm_since is None else msgspec.structs.replace(sent, calm_since=None)
    if sent.calm_since is None or sent.calm_since > now:
        return msgspec.structs.replace(sent, calm_since=now)
    if now - sent.calm_since >= CALM_SECONDS:
        return msgspec.structs.replace(sent, ended=True)
    return sent


def _rules_out(sent: Sent, now: float) -> bool:
    """Return whether no further notice is due because of this one."""
    return abs(now - sent.created) < REPEAT_SECONDS or (sent.acknowledged and not sent.ended)
