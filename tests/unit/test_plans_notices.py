"""Which notices are due: minute by minute, with a clock of the test."""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.plans.notices import (
    CALM_SECONDS,
    DAY,
    HOUR,
    LONGEST_WAIT,
    MAX_ATTEMPTS,
    MINUTE,
    NOTIFIED,
    REPEAT_SECONDS,
    RETRY_SECONDS,
    SETTLE_SECONDS,
    Addresses,
    Notices,
    Sent,
    make_id,
    plan_retry,
)
from tlstunnel.plans.values import Assessment, Notice, Standing

SITE = "chat.example.com"
CONTACT = "mailto:ops@chat.example.com"
OPERATOR = "mailto:operator@example.net"
START = 1_800_000_000.0
WITHIN, SPIKE, REPEATED, SUSTAINED, DISPROPORTIONATE, ABUSE = Standing


def assess(standing: Standing, site: str = SITE) -> Assessment:
    return Assessment(site=site, standing=standing, since=START, sentence="It is so.")


class Months:
    """Assesses a site every `step` seconds, stores what is due, and restarts from what is stored when told to."""

    def __init__(self, *, step: float = MINUTE, contacts: Mapping[str, str] | None = None) -> None:
        self.now = START
        self.made: list[Notice] = []
        self.sent: dict[tuple[str, Standing], Sent] = {}
        self.mutes: dict[str, float] = {}
        self.full = False
        self._step = step
        self._addresses = Addresses({SITE: CONTACT} if contacts is None else contacts, OPERATOR, "de")
        self.restart()

    def restart(self) -> None:
        self.notices = Notices(self.sent.values(), self.mutes)

    def spend(self, seconds: float, *standings: Standing) -> list[Notice]:
        """Let time pass with these standings in turn. Return the notices that were made."""
        before, end, turn = len(self.made), self.now + seconds, 0
        while self.now < end:
            self.assess(assess(standings[turn % len(standings)]))
            self.now += self._step
            turn += 1
        return self.made[before:]

    def assess(self, *assessments: Assessment) -> None:
        due = self.notices.decide(assessments, self._addresses, self.now)
        if self.full:
            return
        for one in due.changed:
            self.sent[one.site, one.standing] = one
        for notice in due.notices:
            self.sent[notice.site, notice.standing] = Sent(notice.id, notice.site, notice.standing, notice.created)
        self.made += due.notices
        self.notices.apply(due)

    def acknowledge(self, notice: Notice) -> None:
        key = notice.site, notice.standing
        self.sent[key] = msgspec.structs.replace(self.sent[key], acknowledged=True)
        self.notices.acknowledge(notice.id)


@pytest.mark.parametrize("standing", [WITHIN, SPIKE])
def test_what_is_tolerated_makes_no_notice(standing: Standing) -> None:
    assert Months(step=HOUR).spend(60 * DAY, standing) == []


@pytest.mark.parametrize("standing", NOTIFIED)
def test_one_notice_a_week_while_a_standing_lasts(standing: Standing) -> None:
    months = Months(step=10 * MINUTE)
    made = months.spend(28 * DAY, standing)
    assert [notice.standing for notice in made] == [standing] * 4
    assert all(later.created - earlier.created >= REPEAT_SECONDS for earlier, later in pairwise(made))
    assert len({notice.id for notice in made}) == 4


def test_a_standing_has_to_settle_first() -> None:
    months = Months()
    assert months.spend(SETTLE_SECONDS, SUSTAINED) == []
    assert len(months.spend(MINUTE, SUSTAINED)) == 1


def test_suspected_abuse_does_not() -> None:
    assert len(Months().spend(MINUTE, ABUSE)) == 1


def test_a_site_that_flaps_at_a_threshold_makes_none() -> None:
    assert Months().spend(3 * DAY, WITHIN, REPEATED) == []
    assert Months().spend(3 * DAY, *[SUSTAINED] * 10, SPIKE) == []


def test_a_site_that_flaps_between_two_standings_makes_one_for_each() -> None:
    made = Months().spend(6 * DAY, *[REPEATED] * 60, *[SUSTAINED] * 60)
    assert [notice.standing for notice in made] == [REPEATED, SUSTAINED]


def test_a_lesser_standing_is_no_news_after_a_heavier_one() -> None:
    months = Months(step=10 * MINUTE)
    assert [notice.standing for notice in months.spend(DAY, DISPROPORTIONATE)] == [DISPROPORTIONATE]
    assert months.spend(5 * DAY, SUSTAINED, REPEATED) == []
    assert [notice.standing for notice in months.spend(3 * DAY, SUSTAINED)] == [SUSTAINED]


def test_abuse_and_the_use_of_a_site_are_separate() -> None:
    months = Months()
    made = months.spend(HOUR, SUSTAINED) + months.spend(HOUR, ABUSE) + months.spend(HOUR, SUSTAINED)
    assert [(notice.standing, notice.recipient, notice.address) for notice in made] == [
        (SUSTAINED, "contact", CONTACT),
        (ABUSE, "operator", OPERATOR),
    ]
    months = Months()
    assert [notice.standing for notice in months.spend(HOUR, ABUSE) + months.spend(HOUR, REPEATED)] == [ABUSE, REPEATED]


def test_without_a_contact_the_operator_gets_it() -> None:
    (notice,) = Months(contacts={}).spend(HOUR, SUSTAINED)
    assert (notice.recipient, notice.address, notice.language) == ("operator", OPERATOR, "de")


def test_the_notice_has_the_assessment() -> None:
    (notice,) = Months().spend(HOUR, SUSTAINED)
    assert notice.assessment == assess(SUSTAINED)
    assert notice.site == SITE


def test_an_acknowledged_notice_is_not_repeated_while_the_standing_lasts() -> None:
    months = Months(step=10 * MINUTE)
    (notice,) = months.spend(DAY, SUSTAINED)
    months.acknowledge(notice)
    assert months.spend(40 * DAY, SUSTAINED) == []
    # Neither short breaks, nor lesser standings, nor suspected abuse, nor restarts end it.
    assert months.spend(20 * DAY, *[SUSTAINED] * 20, *[WITHIN] * 20, *[REPEATED] * 20) == []
    months.restart()
    assert [notice.standing for notice in months.spend(8 * DAY, ABUSE)] == [ABUSE, ABUSE]
    assert months.spend(8 * DAY, REPEATED) == []
    assert months.spend(8 * DAY, SUSTAINED) == []
    assert len(months.spend(DAY, DISPROPORTIONATE)) == 1


def test_an_acknowledged_notice_counts_no_more_after_a_calm_day() -> None:
    months = Months(step=10 * MINUTE)
    (notice,) = months.spend(DAY, SUSTAINED)
    months.acknowledge(notice)
    months.spend(10 * DAY, SUSTAINED)
    months.spend(CALM_SECONDS / 2, WITHIN)
    months.restart()
    months.spend(CALM_SECONDS / 2 + 10 * MINUTE, WITHIN)
    months.restart()
    assert len(months.spend(HOUR, SUSTAINED)) == 1


def test_an_acknowledgement_of_an_unknown_notice_changes_nothing() -> None:
    months = Months()
    months.notices.acknowledge("notice-0")
    assert len(months.spend(HOUR, SUSTAINED)) == 1


def test_a_muted_site_gets_none_and_later_one() -> None:
    months = Months(step=10 * MINUTE)
    months.mutes[SITE] = START + 30 * DAY
    months.restart()
    assert months.spend(30 * DAY, SUSTAINED, ABUSE) == []
    assert len(months.spend(HOUR, SUSTAINED)) == 1


def test_a_mute_can_be_ended() -> None:
    months = Months()
    months.notices.mute(SITE, START + DAY)
    assert months.spend(HOUR, SUSTAINED) == []
    months.notices.mute(SITE, 0.0)
    assert len(months.spend(MINUTE, SUSTAINED)) == 1


def test_a_restart_repeats_nothing_and_loses_nothing() -> None:
    months = Months()
    (notice,) = months.spend(HOUR, SUSTAINED)
    months.restart()
    assert months.spend(DAY, SUSTAINED) == []
    assert months.made == [notice]
    months.spend(SETTLE_SECONDS / 2, DISPROPORTIONATE)
    months.restart()
    assert months.spend(SETTLE_SECONDS, DISPROPORTIONATE) == []  # it settles again
    assert len(months.spend(MINUTE, DISPROPORTIONATE)) == 1


def test_what_could_not_be_stored_is_due_again() -> None:
    months = Months()
    months.full = True
    assert months.spend(DAY, SUSTAINED) == []
    months.full = False
    assert len(months.spend(DAY, SUSTAINED)) == 1


def test_a_gap_changes_nothing() -> None:
    months = Months(step=10 * MINUTE)
    (notice,) = months.spend(DAY, SUSTAINED)
    months.acknowledge(notice)
    months.now += 30 * DAY
    months.assess()
    assert months.spend(DAY, SUSTAINED) == []


def test_a_clock_that_was_years_ahead_keeps_nothing_back() -> None:
    months = Months()
    months.now += 3_000 * DAY
    assert len(months.spend(HOUR, SUSTAINED)) == 1
    months.now = START
    assert len(months.spend(HOUR, SUSTAINED)) == 1
    months.acknowledge(months.made[-1])
    months.now += 3_000 * DAY
    months.spend(HOUR, WITHIN)
    months.now = START + DAY
    months.spend(CALM_SECONDS + HOUR, WITHIN)
    months.now += REPEAT_SECONDS
    assert len(months.spend(HOUR, SUSTAINED)) == 1


def test_sites_are_independent() -> None:
    months = Months()
    for _ in range(30):
        months.assess(assess(SUSTAINED, "a"), assess(WITHIN, "b"), assess(REPEATED, "c"))
        months.now += MINUTE
    assert [(notice.site, notice.standing) for notice in months.made] == [("a", SUSTAINED), ("c", REPEATED)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(Standing), st.integers(1, 60), st.sampled_from(["", "restart", "acknowledge", "full disk"])
        ),
        max_size=40,
    )
)
def test_never_two_in_a_week(turns: Iterable[tuple[Standing, int, str]]) -> None:
    months = Months(step=HOUR)
    for standing, hours, event in turns:
        months.full = event == "full disk"
        if event == "restart":
            months.restart()
        elif event == "acknowledge" and months.made:
            months.acknowledge(months.made[-1])
        months.spend(hours * HOUR, standing)
    last: dict[Standing, float] = {}
    for notice in months.made:
        assert notice.created - last.get(notice.standing, 0.0) >= REPEAT_SECONDS
        last[notice.standing] = notice.created
        assert notice.standing in NOTIFIED


def test_ids_are_safe_everywhere() -> None:
    ids = {make_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch(r"notice-[0-9a-f]{16}", one) for one in ids)


def attempt_all(wait: float = 0.0, off: float = 0.0) -> list[float]:
    times, now = [], START + off
    again: float | None = now
    while again is not None:
        times.append(again)
        again = plan_retry(len(times), START, again, wait)
    return times


def test_retries_for_three_days_with_growing_delays() -> None:
    times = attempt_all()
    delays = [later - earlier for earlier, later in pairwise(times)]
    assert 15 <= len(times) <= 30
    assert 30 <= delays[0] <= 33
    assert all(later > earlier for earlier, later in pairwise(delays[:10]))
    assert max(delays) <= 6.6 * HOUR
    assert RETRY_SECONDS - 6.6 * HOUR <= times[-1] - START <= RETRY_SECONDS


def test_a_receiver_can_ask_for_a_longer_wait() -> None:
    assert attempt_all(wait=7 * HOUR) == [START + 7 * HOUR * number for number in range(11)]
    assert attempt_all(wait=1e300) == [START + LONGEST_WAIT * number for number in range(4)]


def test_a_machine_that_was_off_for_longer_tries_once() -> None:
    assert len(attempt_all(off=10 * DAY)) == 1


def test_attempts_end_when_a_clock_was_ahead() -> None:
    assert plan_retry(MAX_ATTEMPTS, START + 3_000 * DAY, START) is None
    assert plan_retry(MAX_ATTEMPTS - 1, START + 3_000 * DAY, START) is not None
