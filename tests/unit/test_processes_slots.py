"""Which child serves which listening socket."""

import fcntl
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.addresses import ListenAddress
from tlstunnel.errors import ListenError
from tlstunnel.processes.slots import Slot, Slots, SlotsHandover
from tlstunnel.sockets import listeners
from tlstunnel.sockets.listeners import Listener, listen

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


@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize(("before", "after"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0")])
def test_an_address_that_overlaps_another_replaces_it(before: str, after: str, shares: int) -> None:
    with ExitStack() as stack:
        slots, new, kept = _open_where_all_is_free(stack, before, after, shares)
        Slots.try_to_open((new,), kept, ())
        opened = slots.open((new,), 1)
        for slot in slots.update(opened, (new,)):
            slot.listener.remove()
        with socket.create_connection(("127.0.0.1", new.port), 5):
            accepted, _ = opened[new][0].listener.sock.accept()
            accepted.close()
        with pytest.raises(ListenError, match="in use"):  # another tunnel's start
            listen(new)


def _open_where_all_is_free(
    stack: ExitStack, before: str, after: str, shares: int
) -> tuple[Slots, ListenAddress, SlotsHandover]:
    """Listen on `before`, at a port that is free on all addresses; return it on `after`, and a handover that has it."""
    while True:
        with socket.create_server(("0.0.0.0", 0)) as everywhere:
            port = everywhere.getsockname()[1]
        slots = Slots()
        old = ListenAddress(before, port)
        try:
            slots.update(slots.open((old,), shares), (old,))
        except ListenError:  # another program was faster
            continue
        stack.enter_context(closing(slots))
        return slots, ListenAddress(after, port), slots.hand_over()


def test_of_simultaneous_starts_one_gets_a_stale_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    unlink = Path.unlink

    def unlink_slowly(path: Path) -> None:
        time.sleep(0.02)  # the others find the stale socket, too
        unlink(path)

    monkeypatch.setattr(Path, "unlink", unlink_slowly)
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))

        def start() -> Listener | None:
            try:
                return listen(ListenAddress(None, 0, str(path)))[0]
            except ListenError:
                return None

        with ThreadPoolExecutor(4) as pool:
            (listener,) = filter(None, pool.map(lambda _: start(), range(4)))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            listener.sock.accept()[0].close()
        listener.remove()


def test_a_folder_that_another_user_keeps_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "LOCK_SECONDS", 0.0)
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    folder = os.open(tmp_path, os.O_RDONLY)  # all that reading it needs
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        (listener,) = listen(ListenAddress(None, 0, str(path)))
    finally:
        os.close(folder)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    listener.remove()


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
