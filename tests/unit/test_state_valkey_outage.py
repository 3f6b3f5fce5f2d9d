"""An outage is reported once, when it has lasted, and so is its end."""

from tlstunnel.state.valkey.outage import Outage


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_an_outage_is_reported_once_it_has_lasted_and_when_it_is_over() -> None:
    clock = Clock()
    outage = Outage(clock, 10.0)
    clock.now += 9.9
    assert not outage.note_failure()
    clock.now += 0.1
    assert outage.note_failure()
    clock.now += 100.0
    assert not outage.note_failure(), "it is known"
    assert outage.note_answer()
    assert not outage.note_answer()


def test_an_answer_in_between_begins_anew() -> None:
    clock = Clock()
    outage = Outage(clock, 10.0)
    clock.now += 9.0
    assert not outage.note_answer()
    clock.now += 9.0
    assert not outage.note_failure()
    clock.now += 1.0
    assert outage.note_failure()
