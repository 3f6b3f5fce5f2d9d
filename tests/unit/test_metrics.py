"""Counters of a process, their snapshots, and sums over processes that come and go."""

import re
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tlstunnel.metrics.families import (
    BYTES,
    CONNECTIONS,
    CONNECTIONS_ACCEPTED,
    COUNTER_QUESTION_SECONDS,
    FAMILIES,
    HANDSHAKES,
    OPEN_CONNECTIONS,
    ORIGIN_UP,
    SITE_CPU_SECONDS,
    SITE_FAMILIES,
    SITE_VALUES,
    SUM,
    TUNNELS,
    TUNNELS_OPENED,
    Family,
)
from tlstunnel.metrics.registry import Counts, Registry
from tlstunnel.metrics.snapshot import Labels, Snapshot, Totals
from tlstunnel.metrics.usage import FIELDS

CLOSED = "a.example", "client", "closed"


# The table.


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_names_and_labels_are_valid_for_prometheus(family: Family) -> None:
    assert re.fullmatch(r"tlstunnel_[a-z_]+", family.name)
    assert family.name.endswith("_total") == (family.kind == "counter")
    assert all(re.fullmatch(r"[a-z][a-z_]*", label) for label in family.labels)
    assert family.help.endswith(".")


def test_the_table_of_the_documentation_is_this_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(tlstunnel_\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    assert rows == [
        (family.name, family.kind, ", ".join(f"`{label}`" for label in family.labels), family.help)
        for family in FAMILIES.values()
    ]


# Counting.


def test_counts_by_labels() -> None:
    registry = Registry()
    registry[CONNECTIONS].add(*CLOSED)
    registry[CONNECTIONS].add(*CLOSED)
    registry[CONNECTIONS].add("a.example", "origin", "reset")
    registry[CONNECTIONS_ACCEPTED].add()
    snapshot = registry.snapshot()
    assert snapshot[CONNECTIONS] == {CLOSED: 2, ("a.example", "origin", "reset"): 1}
    assert snapshot.total(CONNECTIONS) == 3
    assert snapshot.total(CONNECTIONS, ended_by="origin") == 1
    assert snapshot[CONNECTIONS_ACCEPTED] == {(): 1}
    assert snapshot[TUNNELS_OPENED] == {}


def test_collected_values_are_added_to_counted_ones() -> None:
    registry = Registry()
    registry[CONNECTIONS_ACCEPTED].increase(100)
    registry.collect(lambda: [(CONNECTIONS_ACCEPTED, (), 11), (OPEN_CONNECTIONS, (), 1)])
    for _ in range(2):
        snapshot = registry.snapshot()
        assert snapshot[CONNECTIONS_ACCEPTED] == {(): 111}
        assert snapshot[OPEN_CONNECTIONS] == {(): 1}


def test_of_some_gauges_the_lowest_value_counts() -> None:
    registry = Registry()
    origin = "10.0.0.1:80", "10.0.0.1"
    registry.collect(lambda: [(ORIGIN_UP, origin, up) for up in (1, 0, 1)])
    assert registry.snapshot()[ORIGIN_UP] == {origin: 0}
    totals = Totals()
    for process, up in enumerate((1, 0, 1)):
        totals.update(process, Snapshot.of({ORIGIN_UP.name: {origin: up}}))
    assert totals.sum()[ORIGIN_UP] == {origin: 0}
    totals.ended(1)
    assert totals.sum()[ORIGIN_UP] == {origin: 1}


def test_a_snapshot_stays_as_it_is() -> None:
    registry = Registry()
    registry[CONNECTIONS].add(*CLOSED)
    snapshot = registry.snapshot()
    registry[CONNECTIONS].add(*CLOSED)
    assert snapshot.total(CONNECTIONS) == 1


def test_of_counters_only_changes_are_sent() -> None:
    registry = Registry()
    registry.collect(lambda: [(OPEN_CONNECTIONS, (), 3)])
    registry[CONNECTIONS].add(*CLOSED)
    registry[CONNECTIONS_ACCEPTED].add()
    assert registry.take_changes() == registry.snapshot()
    registry[CONNECTIONS_ACCEPTED].increase(2)
    assert registry.take_changes() == Snapshot.of({CONNECTIONS_ACCEPTED.name: {(): 3}, OPEN_CONNECTIONS.name: {(): 3}})
    assert registry.take_changes() == Snapshot.of({OPEN_CONNECTIONS.name: {(): 3}})
    assert registry.snapshot().total(CONNECTIONS) == 1


def test_the_first_change_after_those_that_were_taken_is_announced() -> None:
    registry = Registry()
    changes: list[bool] = []
    registry.on_change = lambda: changes.append(True)
    registry[CONNECTIONS].add(*CLOSED)
    registry[CONNECTIONS_ACCEPTED].increase(3)
    registry.note_change()
    assert len(changes) == 1
    registry.take_changes()
    assert len(changes) == 1
    registry.note_change()
    assert len(changes) == 2


def test_series_are_limited_and_the_rest_keeps_its_reason() -> None:
    counts = Counts(Registry(), Family("x_total", "counter", ("site", "reason"), ".", most=2))
    for number in range(4):
        counts.add(f"{number}.example", "closed")
    counts.add("1.example", "closed")
    assert counts.values == {("0.example", "closed"): 1, ("1.example", "closed"): 2, ("other", "closed"): 2}
    for number in range(10):
        counts.add("0.example", f"reason {number}")
    assert counts.values["other", "other"] == 9
    assert len(counts.values) == 5


def test_a_histogram_counts_in_the_bucket_of_the_next_bound() -> None:
    registry = Registry()
    histogram = registry.histogram(COUNTER_QUESTION_SECONDS)
    for seconds in (0.0, 0.0001, 0.00011, 0.1, 0.2):
        histogram.observe(seconds)
    snapshot = registry.snapshot()
    assert snapshot[COUNTER_QUESTION_SECONDS] == {
        ("0.0001",): 2,
        ("0.00025",): 1,
        ("0.1",): 1,
        ("+Inf",): 1,
        ("sum",): 300_210,
    }
    totals = Totals()
    totals.update(1, snapshot)
    totals.update(2, snapshot)
    assert totals.sum()[COUNTER_QUESTION_SECONDS]["0.0001",] == 4
    histogram.observe_since(time.monotonic())
    assert (
        sum(value for (bucket,), value in registry.snapshot()[COUNTER_QUESTION_SECONDS].items() if bucket != SUM) == 6
    )
    assert {"labels": {"le": "+Inf"}, "value": 1} in snapshot.to_json()[COUNTER_QUESTION_SECONDS.name]


# Sums over processes.


def _snapshot(closed: int, connections: int) -> Snapshot:
    return Snapshot.of({CONNECTIONS.name: {CLOSED: closed}, OPEN_CONNECTIONS.name: {(): connections}})


def test_processes_are_added_up() -> None:
    totals = Totals()
    totals.update(1, _snapshot(3, 10))
    totals.update(2, _snapshot(4, 20))
    totals.update(2, _snapshot(5, 19))
    assert totals.sum()[CONNECTIONS] == {CLOSED: 8}
    assert totals.sum()[OPEN_CONNECTIONS] == {(): 29}


def test_counters_do_not_decrease_when_a_process_ends_and_its_gauges_are_gone() -> None:
    totals = Totals()
    totals.update(1, _snapshot(3, 10))
    totals.update(2, _snapshot(4, 20))
    totals.ended(1)
    totals.ended(1)
    totals.ended(3)
    assert totals.sum()[CONNECTIONS] == {CLOSED: 7}
    assert totals.sum()[OPEN_CONNECTIONS] == {(): 20}
    # A process with the same number, later.
    totals.update(1, _snapshot(1, 1))
    assert totals.sum()[CONNECTIONS] == {CLOSED: 8}


class ProcessesCountAndEnd(RuleBasedStateMachine):
    """Whatever is sent, whole or as changes, the totals are what was counted, and never decrease."""

    def __init__(self) -> None:
        super().__init__()
        self.totals = Totals()
        self.running: dict[int, Registry] = {}
        self.sent: Counter[Labels] = Counter()
        self.unsent: dict[int, Counter[Labels]] = {}
        self.started = 0

    @rule()
    def start(self) -> None:
        self.started += 1
        self.running[self.started], self.unsent[self.started] = Registry(), Counter()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), site=st.sampled_from("abc"), amount=st.integers(1, 9))
    def count(self, data: st.DataObject, site: str, amount: int) -> None:
        process = data.draw(st.sampled_from(sorted(self.running)))
        self.running[process][CONNECTIONS].increase(amount, site, "client", "closed")
        self.unsent[process][site, "client", "closed"] += amount

    @precondition(lambda self: self.running)
    @rule(data=st.data(), whole=st.booleans(), ends=st.booleans())
    def send(self, data: st.DataObject, whole: bool, ends: bool) -> None:
        process = data.draw(st.sampled_from(sorted(self.running)))
        registry = self.running[process]
        self.totals.update(process, registry.snapshot() if whole else registry.take_changes())
        self.sent += self.unsent[process]
        self.unsent[process].clear()
        if ends:
            self.totals.ended(process)
            del self.running[process], self.unsent[process]

    @rule()
    def upgrade(self) -> None:
        before = self.totals
        self.totals = Totals(msgspec.json.decode(msgspec.json.encode(before.base), type=Snapshot))
        for process in self.running:
            if (last := before.last(process)) is not None:
                self.totals.update(process, msgspec.json.decode(msgspec.json.encode(last), type=Snapshot))

    @invariant()
    def the_totals_are_what_was_sent(self) -> None:
        assert self.totals.sum()[CONNECTIONS] == dict(self.sent)


TestProcessesCountAndEnd = ProcessesCountAndEnd.TestCase


def test_the_next_release_continues_the_totals() -> None:
    totals = Totals()
    totals.update(1, _snapshot(3, 10))
    totals.update(2, _snapshot(4, 20))
    totals.ended(1)
    last = totals.last(2)
    assert last is not None
    encoded = msgspec.json.encode((totals.base, last))
    base, running = msgspec.json.decode(encoded, type=tuple[Snapshot, Snapshot])
    successor = Totals(base)
    successor.update(2, running)
    assert successor.sum() == totals.sum()


def test_metrics_that_another_release_counts_differently_are_ignored() -> None:
    totals = Totals(Snapshot.of({CONNECTIONS.name: {("client", "closed"): 7}}))
    totals.update(1, Snapshot.of({"tlstunnel_new_total": {("x",): 1}, CONNECTIONS.name: {CLOSED: 2}}))
    assert totals.sum()[CONNECTIONS] == {CLOSED: 2}
    assert "tlstunnel_new_total" not in totals.sum().families


def test_json_names_the_labels() -> None:
    assert _snapshot(3, 1).to_json() == {
        "tlstunnel_connections_total": [
            {"labels": {"site": "a.example", "ended_by": "client", "reason": "closed"}, "value": 3}
        ],
        "tlstunnel_open_connections": [{"labels": {}, "value": 1}],
    }
    lifetime = Snapshot.of({SITE_CPU_SECONDS.name: {("a.example",): 1_500_000}})
    assert lifetime.to_json()[SITE_CPU_SECONDS.name] == [{"labels": {"site": "a.example"}, "value": 1.5}]


def test_what_sites_have_used_is_in_the_families_of_sites() -> None:
    values = {"tunnels": 2, "handshakes": 7, "blocked": 3, "bytes_up": 100, "cpu": 5}
    usage = [values.get(field, 0) for field in (*FIELDS, "cpu")]
    snapshot = Snapshot(
        {TUNNELS_OPENED.name: [(("a.example",), 1)]}, {"a.example": usage, "b.example": [0] * len(usage)}
    )
    assert snapshot[TUNNELS] == {("a.example",): 2, ("b.example",): 0}
    assert snapshot[TUNNELS_OPENED] == {("a.example",): 8, ("b.example",): 0}  # of a process of an earlier release too
    assert snapshot[BYTES]["a.example", "up"] == 100
    opened, blocked = ("a.example", "opened"), ("a.example", "blocked")
    assert snapshot[HANDSHAKES] == {opened: 7, blocked: 3, ("b.example", "opened"): 0}
    assert snapshot.total(HANDSHAKES, outcome="blocked") == 3
    assert {family.name for family, _, _ in SITE_VALUES} == {
        f.name for f in FAMILIES.values() if f.name in SITE_FAMILIES
    }
    assert {field for _, _, field in SITE_VALUES} == {*FIELDS, "cpu"}
    assert msgspec.json.decode(msgspec.json.encode(snapshot), type=Snapshot) == snapshot
