"""Counting addresses: their number, those that are known, and the few that connect most. No address can be read out."""

import ipaddress
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.plans.addresses import (
    BUSIEST,
    AddressReport,
    AddressSet,
    Busiest,
    Heavy,
    SiteAddresses,
    merge_reports,
)

KEY = b"k" * 32


def make_addresses(number: int, first: int = 0) -> list[str]:
    return [str(ipaddress.IPv4Address(0x0A000000 + first + one)) for one in range(number)]


def make_set(addresses: list[str], key: bytes = KEY) -> AddressSet:
    found = AddressSet(key)
    for address in addresses:
        found.add(address)
    return found


@pytest.mark.parametrize("number", [0, 1, 10, 1000, 50_000])
def test_the_number_is_about_right(number: int) -> None:
    addresses = make_addresses(number)
    assert len(make_set(addresses * 2)) == pytest.approx(number, rel=0.02, abs=1)


def test_more_than_can_be_told_apart_are_many() -> None:
    full = AddressSet(KEY, b"\xff" * 8192)
    assert len(full) > 500_000


@pytest.mark.parametrize("common", [0, 100, 1000])
def test_how_many_are_in_both(common: int) -> None:
    first, second = make_set(make_addresses(1000)), make_set(make_addresses(1000, 1000 - common))
    assert first.count_common(second) == pytest.approx(common, abs=30)
    assert len(first | second) == pytest.approx(2000 - common, rel=0.03)


def test_a_set_survives_the_way_to_another_process() -> None:
    first = make_set(make_addresses(30))
    second = AddressSet(KEY, first.to_bytes())
    assert len(second) == 30
    assert "10.0.0.3" in second
    assert "10.9.0.3" not in second
    assert AddressSet(KEY).to_bytes() == b""
    assert not AddressSet(KEY, b"too short")


def test_nobody_without_the_key_can_choose_addresses_that_look_like_one() -> None:
    addresses = make_addresses(5000)
    by_bit: dict[bytes, str] = {}
    same = [
        (by_bit[bits], address)
        for address in addresses
        if (bits := make_set([address]).to_bytes()) in by_bit or by_bit.setdefault(bits, address) is None
    ]
    assert same
    assert all(make_set([one], b"other").to_bytes() != make_set([two], b"other").to_bytes() for one, two in same)


@given(numbers=st.lists(st.integers(0, 300), max_size=1500))
def test_a_number_of_the_busiest_is_never_too_high(numbers: list[int]) -> None:
    busiest = Busiest(20)
    for number in numbers:
        busiest.add(str(number), excusable=number % 2 == 0)
    found = busiest.list()
    assert len(found) <= 20
    for address, number, excusable in found:
        assert number <= numbers.count(int(address))
        assert excusable <= number


def test_the_busiest_of_a_botnet_are_found() -> None:
    busiest = Busiest()
    connections = ["198.51.100.1"] * 3000 + ["198.51.100.2"] * 2000 + make_addresses(5000)
    random.Random(3).shuffle(connections)
    for address in connections:
        busiest.add(address, excusable=False)
    first, second, *others = busiest.list()
    assert (first.address, second.address) == ("198.51.100.1", "198.51.100.2")
    assert first.number > 2500
    assert len(others) == BUSIEST - 2
    assert all(one.number < 20 for one in others)


def test_processes_count_together() -> None:
    first, second = SiteAddresses(KEY), SiteAddresses(KEY)
    for address in make_addresses(100):
        first.note_lasting(address)
    for address in make_addresses(200, 50):
        second.note_suspicious(address, excusable=True)
    for _ in range(70):
        first.note_suspicious("198.51.100.1", excusable=False)
        second.note_suspicious("198.51.100.1", excusable=True)
        second.note_suspicious("10.0.0.1", excusable=True)
        second.note_suspicious("10.0.0.2", excusable=False)
    found = merge_reports(KEY, [first.take(), second.take()])
    assert found.addresses == pytest.approx(203, abs=2)
    assert found.known == pytest.approx(52, abs=3)
    assert found.heavy[0] == Heavy("198.51.100.1", 140, 70)
    known = {one.address: one.number for one in found.heavy}
    assert (known["10.0.0.1"], known["10.0.0.2"]) == (0, 70)


def test_what_was_taken_is_gone_and_who_is_known_stays_for_a_day() -> None:
    addresses = SiteAddresses(KEY)
    addresses.note_lasting("10.0.0.1")
    addresses.note_suspicious("10.0.0.1", excusable=True)
    assert merge_reports(KEY, [addresses.take()]).known == 1
    assert addresses.take()._replace(known=b"") == AddressReport()
    addresses.age()
    addresses.note_suspicious("10.0.0.1", excusable=True)
    assert merge_reports(KEY, [addresses.take()]).known == 1
    addresses.age()
    addresses.note_suspicious("10.0.0.1", excusable=True)
    assert merge_reports(KEY, [addresses.take()]).known == 0


def test_no_reports_are_no_addresses() -> None:
    assert merge_reports(KEY, []) == (0, 0, ())
