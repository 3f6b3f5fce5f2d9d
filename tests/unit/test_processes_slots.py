"""Which child serves which listening socket."""

import socket
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.addresses import ListenAddress
from tlstunnel.errors import ListenError
from tlstunnel.processes.slots import Slot, Slots
from tlstunnel.sockets.listeners import Listener

ADDRESSES = [ListenAddress("127.0.0.1", port) for port in range(1, 6)]


def _slots(shares: list[int]) -> Slots:
    slots = Slots()
    number = 0
    opened = {}
    for address, count in zip(ADDRESSES, shares, strict=False):
        made = []
        for _ in range(count):
            number += 1
            made.append(Slot(number, Listener(socket.socket(), address, address)))
        opened[address] = made
    slots.update(opened, tuple(opened))
    return slots


@given(st.lists(st.integers(1, 5), max_size=5), st.lists(st.integers(1, 10_000), unique=True, max_size=7))
def test_every_slot_is_served_and_every_child_serves(shares: list[int], children: list[int]) -> None:
    slots = _slots(shares)
    try:
        of = slots.assign(children)
        assert set(of) == set(children)
        numbers = {slot.number for slot in slots}
        if children:
            assert set().union(*of.values()) == numbers
        if numbers:
            assert all(of[child] for child in children)
        # With as many children as sockets, none is shared.
        for count, address in zip(shares, ADDRESSES, strict=False):
            if count == len(children):
                own = [slot.number for slot in slots if slot.listener.written == address]
                assert all(sum(number in mine for mine in of.values()) == 1 for number in own)
    finally:
        slots.close()


def test_addresses_are_added_and_removed() -> None:
    slots = Slots()
    with closing(slots):
        first, second = ListenAddress.parse("127.0.0.1:0"), ListenAddress.parse("[::1]:0")
        slots.update(slots.open((first,), 2), (first,))
        kept = [slot.number for slot in slots]
        assert len(kept) == 2
        assert len({slot.listener.address for slot in slots}) == 1, "both on the port of the first"
        opened = slots.open((first, second), 1)
        assert list(opened) == [second]
        assert slots.update(opened, (first, second)) == []
        gone = slots.update({}, (second,))
        assert [slot.number for slot in gone] == kept
        for slot in gone:
            slot.listener.remove()


def test_all_addresses_are_opened_or_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, closing(Slots()) as slots:
        port = taken.getsockname()[1]
        addresses = (ListenAddress("127.0.0.1", 0), ListenAddress("127.0.0.1", port))
        with pytest.raises(ListenError, match="in use by another program"):
            slots.open(addresses, 3)
        assert list(slots) == []


def test_slots_are_handed_over_to_the_next_program() -> None:
    slots = Slots()
    address = ListenAddress.parse("127.0.0.1:0")
    slots.update(slots.open((address,), 2), (address,))
    again = Slots.restore(slots.hand_over())
    assert [slot.number for slot in again] == [slot.number for slot in slots]
    assert [slot.listener.address for slot in again] == [slot.listener.address for slot in slots]
    assert not any(slot.listener.sock.get_inheritable() for slot in again)
    # Numbers are not reused.
    more = again.open((ListenAddress.parse("[::1]:0"),), 1)
    assert min(slot.number for opened in more.values() for slot in opened) > max(slot.number for slot in slots)
    again.forget(more)
    for slot in slots:
        slot.listener.sock.detach()
    again.close()
