"""The tables of ``tlstunnel top``: every sort and filter gives the rows that it should."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.cli.top.details import describe_refusal
from tlstunnel.cli.top.tables import TABLES, Tab, View, arrange
from tlstunnel.commands.records import Decision, Refusal, StageStatus
from tlstunnel.commands.sites import OriginStatus, SiteStatus
from tlstunnel.commands.tunnels import TunnelStatus

NAMES = st.text(alphabet="abcXYZ.-\x1b\u202e<é", min_size=1, max_size=8)
NUMBERS = st.integers(0, 2**40)

SITES = st.builds(
    SiteStatus,
    names=st.lists(NAMES, min_size=1, max_size=2),
    tunnels=NUMBERS,
    handshakes=NUMBERS,
    refused=st.dictionaries(st.sampled_from(["invalid", "blocked"]), NUMBERS),
    bytes_up=NUMBERS,
    bytes_down=NUMBERS,
    guideline=st.none() | NUMBERS,
    plan=NAMES,
)
TUNNELS = st.builds(
    TunnelStatus,
    id=st.uuids().map(str),
    process=NUMBERS,
    site=NAMES,
    client=NAMES,
    origin=NAMES,
    path=NAMES,
    opened=st.floats(0, 1e9),
    seconds=st.floats(0, 1e9),
    up=NUMBERS,
    down=NUMBERS,
    rate=st.floats(0, 1e9),
    tags=st.dictionaries(NAMES, NAMES, max_size=2),
)
ORIGINS = st.builds(
    OriginStatus,
    site=NAMES,
    address=NAMES,
    tunnels=NUMBERS,
    state=st.sampled_from(["healthy", "ejected"]),
    problem=NAMES,
)
REFUSALS = st.builds(
    Refusal,
    at=st.floats(0, 1e9),
    process=NUMBERS,
    record=st.fixed_dictionaries({"client": NAMES, "site": NAMES}, optional={"status": NUMBERS, "detail": NAMES}),
    stages=st.just([StageStatus("tls", "passed")]),
)
ITEMS: dict[Tab, st.SearchStrategy[object]] = {
    "sites": SITES,
    "tunnels": TUNNELS,
    "origins": ORIGINS,
    "refusals": REFUSALS,
}


@pytest.mark.parametrize("tab", TABLES)
@given(data=st.data())
def test_rows_are_sorted_by_each_column_and_none_is_lost(tab: Tab, data: st.DataObject) -> None:
    table = TABLES[tab]
    items = data.draw(st.lists(ITEMS[tab], max_size=8))
    column = data.draw(st.integers(0, len(table.columns) - 1))
    reverse = data.draw(st.booleans())
    rows = arrange(table, items, View(column, reverse))
    assert sorted(row.key for row in rows) == sorted(table.identify(item) for item in items)
    by_key = {table.identify(item): table.columns[column].value(item) for item in items}
    if len(by_key) == len(items):
        values = [by_key[row.key] for row in rows]
        assert values == sorted(values, reverse=table.columns[column].number != reverse)


@pytest.mark.parametrize("tab", TABLES)
@given(data=st.data())
def test_a_filter_keeps_the_rows_that_contain_it_in_any_case(tab: Tab, data: st.DataObject) -> None:
    table = TABLES[tab]
    items = data.draw(st.lists(ITEMS[tab], max_size=8))
    search = data.draw(st.sampled_from(["x", "AB", ".", "é"]))
    kept = arrange(table, items, View(search=search))
    every = arrange(table, items, View())
    assert kept == [row for row in every if any(search.casefold() in cell.casefold() for cell in row.cells)]


@pytest.mark.parametrize("tab", TABLES)
@given(data=st.data())
def test_what_clients_chose_cannot_control_the_terminal(tab: Tab, data: st.DataObject) -> None:
    for row in arrange(TABLES[tab], data.draw(st.lists(ITEMS[tab], max_size=4)), View()):
        assert all(cell.isprintable() for cell in row.cells)


def test_advice_comes_before_the_stages_whatever_they_decided() -> None:
    stages = [StageStatus("TLS", decision) for decision in get_args(Decision)]
    refusal = Refusal(at=0.0, process=1, record={"reason": "rule: x"}, stages=stages, advice="Change the rule.")
    lines = describe_refusal(refusal).plain.splitlines()
    assert [line[:15].rstrip() for line in lines[-len(stages) :]] == list(get_args(Decision))
    assert "Change the rule." in lines[: -len(stages)]


def test_a_site_above_its_guideline_is_noted_and_not_more() -> None:
    site = SiteStatus(names=["a.test"], tunnels=11, guideline=10)
    (row,) = arrange(TABLES["sites"], [site], View())
    assert row.cells[-1] == "above its guideline"
