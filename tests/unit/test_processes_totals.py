"""What sites have used, over processes that come and go."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.metrics.usage import FIELDS
from tlstunnel.processes import totals as module
from tlstunnel.processes.totals import SiteTotals, TotalsHandover


def values(**given: int) -> list[int]:
    return [given.get(name, 0) for name in FIELDS]


def total(totals: SiteTotals, site: str) -> dict[str, int]:
    return {name: value for name, value in zip((*FIELDS, "cpu"), totals.sites[site], strict=True) if value}


def test_processes_are_added_up() -> None:
    totals = SiteTotals()
    totals.update(1, {"a.example": values(tunnels=2, handshakes=3)}, 0)
    totals.update(2, {"a.example": values(tunnels=1, handshakes=1), "b.example": values(limited=4)}, 0)
    assert total(totals, "a.example") == {"tunnels": 3, "handshakes": 4}
    assert set(totals.take_changes()) == {"a.example", "b.example"}
    totals.update(1, {"a.example": values(tunnels=1, handshakes=5)}, 0)
    assert total(totals, "a.example") == {"tunnels": 2, "handshakes": 6}
    assert totals.count_tunnels() == {"a.example": 2}
    assert set(totals.take_changes()) == {"a.example"}


def test_a_process_that_ends_takes_its_tunnels_and_leaves_its_counts() -> None:
    totals = SiteTotals()
    totals.update(1, {"a.example": values(tunnels=2, handshakes=3, bytes_up=10)}, 0)
    totals.update(2, {"a.example": values(tunnels=1, handshakes=1)}, 0)
    totals.take_changes()
    totals.ended(1)
    totals.ended(1)
    assert total(totals, "a.example") == {"tunnels": 1, "handshakes": 4, "bytes_up": 10}
    assert set(totals.take_changes()) == {"a.example"}
    totals.update(1, {"a.example": values(tunnels=1, handshakes=1)}, 0)  # another one with its pid
    assert total(totals, "a.example") == {"tunnels": 2, "handshakes": 5, "bytes_up": 10}


def test_cpu_time_is_divided_by_handshakes_and_bytes() -> None:
    totals = SiteTotals()
    totals.update(1, {"a.example": values(handshakes=3, short=3), "b.example": values(blocked=1)}, 4000)
    assert (totals.sites["a.example"][-1], totals.sites["b.example"][-1]) == (3000, 1000)
    as_much = module.HANDSHAKE_COST // module.BYTE_COST
    changes = {"a.example": values(handshakes=3, short=3, bytes_down=as_much), "b.example": values(blocked=2)}
    totals.update(1, changes, 6000)
    assert (totals.sites["a.example"][-1], totals.sites["b.example"][-1]) == (4000, 2000)


def test_cpu_time_without_use_waits_for_the_next() -> None:
    totals = SiteTotals()
    totals.update(1, {}, 700)
    totals.update(1, {"a.example": values(handshakes=1)}, 1000)
    assert totals.sites["a.example"][-1] == 1000


def test_sites_are_there_before_they_are_used_and_go_when_they_are_idle() -> None:
    totals = SiteTotals()
    totals.configure(["a.example", "b.example"])
    assert totals.take_changes() == {"a.example": [*values(), 0], "b.example": [*values(), 0]}
    totals.update(1, {"a.example": values(tunnels=1)}, 0)
    totals.configure(["c.example"])
    totals.forget_idle()
    assert set(totals.sites) == {"a.example", "c.example"}
    totals.ended(1)
    totals.forget_idle()
    assert set(totals.sites) == {"c.example"}
    assert set(totals.take_changes()) == {"c.example"}


def test_the_number_of_sites_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SITES", 2)
    totals = SiteTotals()
    for number in range(10):
        totals.update(1, {f"{number}.example": values(handshakes=1)}, 0)
    assert len(totals.sites) <= 2


def test_the_next_program_continues() -> None:
    totals = SiteTotals()
    totals.update(1, {"a.example": values(tunnels=2, handshakes=3)}, 100)
    text = json.dumps(msgspec.to_builtins(totals.hand_over()))
    following = SiteTotals(msgspec.convert(json.loads(text), TotalsHandover))
    assert following.sites == totals.sites
    assert following.age >= totals.age - 0.001
    following.update(1, {"a.example": values(tunnels=1, handshakes=4)}, 300)
    assert total(following, "a.example") == {"tunnels": 1, "handshakes": 4, "cpu": 300}
    following.ended(1)
    assert total(following, "a.example") == {"handshakes": 4, "cpu": 300}


def test_values_of_other_releases() -> None:
    totals = SiteTotals()
    totals.update(1, {"a.example": [1, 2]}, 0)
    totals.update(2, {"a.example": [*values(tunnels=1), 5, 5]}, 0)
    assert total(totals, "a.example") == {"tunnels": 2, "handshakes": 2}


@given(
    st.lists(
        st.tuples(
            st.integers(1, 3),
            st.dictionaries(st.sampled_from("abc"), st.integers(0, 50)),
            st.integers(0, 10_000),
            st.booleans(),
        )
    )
)
def test_the_sum_of_all_sites_is_what_was_used(steps: list[tuple[int, dict[str, int], int, bool]]) -> None:
    """Totals never decrease, and all CPU time but what is owed is divided."""
    totals = SiteTotals()
    used: dict[int, dict[str, int]] = {}
    cpu: dict[int, int] = {}
    handshakes = spent = 0
    for process, sites, more, ends in steps:
        before = {site: list(row) for site, row in totals.sites.items()}
        mine = used.setdefault(process, {})
        for site, number in sites.items():
            mine[site] = mine.get(site, 0) + number
        cpu[process] = cpu.get(process, 0) + more
        handshakes += sum(sites.values())
        spent += more
        totals.update(process, {site: values(handshakes=mine[site]) for site in sites}, cpu[process])
        for site, row in before.items():
            assert all(new >= old for new, old in zip(totals.sites[site], row, strict=True))
        if ends:
            owed = next(one.owed for one in totals.hand_over().processes if one.process == process)
            totals.ended(process)
            spent -= owed
            del used[process], cpu[process]
    owed = sum(one.owed for one in totals.hand_over().processes)
    assert sum(row[1] for row in totals.sites.values()) == handshakes
    assert sum(row[-1] for row in totals.sites.values()) == spent - owed
