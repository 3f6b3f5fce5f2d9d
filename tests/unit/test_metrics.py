"""Counters of a process, their snapshots, and sums over processes that come and go."""

import re
from pathlib import Path

import msgspec
import pytest

from tlstunnel.metrics import registry as registry_module
from tlstunnel.metrics.families import (
    BYTES,
    CONNECTIONS,
    CONNECTIONS_ACCEPTED,
    COUNTER_QUESTION_SECONDS,
    FAMILIES,
    TUNNELS,
    TUNNELS_OPENED,
    Family,
)
from tlstunnel.metrics.registry import Registry
from tlstunnel.metrics.snapshot import Snapshot, Totals

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
    registry[BYTES].increase(100, "a.example", "up")
    registry.collect(lambda: [(BYTES, ("a.example", "up"), 11), (TUNNELS, ("a.example",), 1)])
    for _ in range(2):
        snapshot = registry.snapshot()
        assert snapshot[BYTES] == {("a.example", "up"): 111}
        assert snapshot[TUNNELS] == {("a.example",): 1}


def test_a_snapshot_stays_as_it_is() -> None:
    registry = Registry()
    registry[CONNECTIONS].add(*CLOSED)
    snapshot = registry.snapshot()
    registry[CONNECTIONS].add(*CLOSED)
    assert snapshot.total(CONNECTIONS) == 1


def test_the_first_change_after_a_snapshot_is_announced() -> None:
    registry = Registry()
    changes: list[bool] = []
    registry.on_change = lambda: changes.append(True)
    registry[CONNECTIONS].add(*CLOSED)
    registry[BYTES].increase(3, "a.example", "up")
    assert len(changes) == 1
    registry.snapshot()
    assert len(changes) == 1
    registry[BYTES].increase(3, "a.example", "up")
    assert len(changes) == 2


def test_series_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "MOST_SERIES", 2)
    counts = Registry()[TUNNELS_OPENED]
    for number in range(4):
        counts.add(f"{number}.example")
    counts.add("1.example")
    assert counts.values == {("0.example",): 1, ("1.example",): 2, ("other",): 2}


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
    assert {"labels": {"le": "+Inf"}, "value": 1} in snapshot.to_json()[COUNTER_QUESTION_SECONDS.name]


# Sums over processes.


def _snapshot(closed: int, tunnels: int) -> Snapshot:
    return Snapshot.of({CONNECTIONS.name: {CLOSED: closed}, TUNNELS.name: {("a.example",): tunnels}})


def test_processes_are_added_up() -> None:
    totals = Totals()
    totals.update(1, _snapshot(3, 10))
    totals.update(2, _snapshot(4, 20))
    totals.update(2, _snapshot(5, 19))
    assert totals.sum()[CONNECTIONS] == {CLOSED: 8}
    assert totals.sum()[TUNNELS] == {("a.example",): 29}


def test_counters_do_not_decrease_when_a_process_ends_and_its_gauges_are_gone() -> None:
    totals = Totals()
    totals.update(1, _snapshot(3, 10))
    totals.update(2, _snapshot(4, 20))
    totals.ended(1)
    totals.ended(1)
    totals.ended(3)
    assert totals.sum()[CONNECTIONS] == {CLOSED: 7}
    assert totals.sum()[TUNNELS] == {("a.example",): 20}
    # A process with the same number, later.
    totals.update(1, _snapshot(1, 1))
    assert totals.sum()[CONNECTIONS] == {CLOSED: 8}


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
        "tlstunnel_tunnels": [{"labels": {"site": "a.example"}, "value": 1}],
    }
