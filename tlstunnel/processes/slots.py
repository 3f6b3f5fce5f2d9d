"""The listening sockets, which the parent holds for as long as it lives, and which child serves which.

For each address that is listened on from the start there are as many sockets as processes, so that the kernel spreads
the connections (SO_REUSEPORT). A connection waits at a socket from which no child accepts, and closing that socket
would reset it (both seen): so every socket has a child at all times, and none is closed while its address is wanted.
"""

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import structlog

from tlstunnel.addresses import ListenAddress
from tlstunnel.errors import ListenError
from tlstunnel.journal.events import Event
from tlstunnel.sockets.listeners import Listener, adopt, listen

FIRST_PASSED = 3
"""The first descriptor of socket activation (sd_listen_fds(3))."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One listening socket, and the number by which the parent and its children call it."""

    number: int
    listener: Listener


class SlotHandover(msgspec.Struct, frozen=True):
    """A slot as an upgrade hands it over: its number, its descriptor, and the address as it was written."""

    number: int
    fd: int
    written: str


class SlotsHandover(msgspec.Struct, frozen=True):
    """All of them, the number that the last one has got, and the addresses given by socket activation."""

    next: int
    open: list[SlotHandover]
    passed: list[str]


class Slots:
    """All of them, by the address as it was written."""

    def __init__(self, passed: Sequence[Listener] = ()) -> None:
        self._by_address: dict[ListenAddress, list[Slot]] = {}
        self._next = 0
        self._passed = {listener.address: listener for listener in passed}

    def __iter__(self) -> Iterator[Slot]:
        return (slot for slots in self._by_address.values() for slot in slots)

    @property
    def passed(self) -> tuple[ListenAddress, ...]:
        """The addresses that were given by socket activation."""
        return tuple(self._passed)

    def open(
        self, addresses: tuple[ListenAddress, ...], shares: int, optional: tuple[ListenAddress, ...] = ()
    ) -> dict[ListenAddress, list[Slot]]:
        """Open those of `addresses` that are not open yet, with `shares` sockets each: all or none. Raises ListenError.

        An `optional` address of a family that this machine does not have is left out.
        """
        opened: dict[ListenAddress, list[Slot]] = {}
        try:
            for address in addresses:
                if address in self._by_address:
                    continue
                if address in self._passed:
                    listeners = [self._passed[address]]
                else:
                    try:
                        listeners = listen(address, shares)
                    except ListenError as error:
                        if address not in optional or not _no_such_family(error):
                            raise
                        structlog.get_logger().warning(Event.NO_IPV6, reason=str(error))
                        continue
                opened[address] = [self._make_slot(listener) for listener in listeners]
        except ListenError:
            self.forget(opened)
            raise
        return opened

    def update(self, opened: Mapping[ListenAddress, list[Slot]], wanted: tuple[ListenAddress, ...]) -> list[Slot]:
        """Keep these, and those of before that are wanted; return the others, which the caller closes."""
        together = {**self._by_address, **opened}
        self._by_address = {address: slots for address, slots in together.items() if address in wanted}
        return [slot for address, slots in together.items() if address not in wanted for slot in slots]

    def forget(self, opened: Mapping[ListenAddress, list[Slot]]) -> None:
        """Close what `open` has opened."""
        for slots in opened.values():
            for slot in slots:
                slot.listener.remove()

    def close(self) -> None:
        """Close them all: what connects from now on is refused by the kernel."""
        for slot in self:
            slot.listener.remove()
        self._by_address = {}

    def _make_slot(self, listener: Listener) -> Slot:
        self._next += 1
        return Slot(self._next, listener)

    def assign(self, children: Sequence[int]) -> dict[int, set[int]]:
        """Return the slots of each of these children. Every slot has at least one child, every child at least one slot.

        With as many children as an address has sockets, each has its own; a socket that is alone is shared by all.
        """
        of: dict[int, set[int]] = {child: set() for child in children}
        for slots in self._by_address.values() if children else ():
            for place in range(max(len(slots), len(children))):
                of[children[place % len(children)]].add(slots[place % len(slots)].number)
        return of

    @staticmethod
    def try_to_open(
        addresses: tuple[ListenAddress, ...], kept: SlotsHandover, optional: tuple[ListenAddress, ...]
    ) -> None:
        """See whether those that are not `kept` could be opened, as a probe does. Raises ListenError."""
        written = {one.written for one in kept.open}
        slots = Slots()
        slots.forget(slots.open(tuple(one for one in addresses if str(one) not in written), 1, optional))

    def hand_over(self) -> SlotsHandover:
        """Return what `restore` takes in the program that is executed next."""
        return SlotsHandover(
            next=self._next,
            open=[
                SlotHandover(number=slot.number, fd=slot.listener.sock.fileno(), written=str(address))
                for address, slots in self._by_address.items()
                for slot in slots
            ],
            passed=[str(address) for address in self._passed],
        )

    @classmethod
    def restore(cls, kept: SlotsHandover) -> "Slots":
        """Return the slots that the program executed before this one has held. Raises ListenError."""
        slots = cls()
        slots._next = kept.next
        for one in kept.open:
            written = ListenAddress.parse(one.written)
            os.set_inheritable(one.fd, False)
            slot = Slot(one.number, adopt(one.fd, written))
            slots._by_address.setdefault(written, []).append(slot)
            if one.written in kept.passed:
                slots._passed[written] = slot.listener
        return slots


def take_passed_sockets() -> list[Listener]:
    """Return the sockets of systemd's socket activation, none without it (sd_listen_fds(3)). Raises ListenError."""
    count, process = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if process != str(os.getpid()) or not count.isdecimal():
        return []
    descriptors = range(FIRST_PASSED, FIRST_PASSED + int(count))
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return [adopt(descriptor) for descriptor in descriptors]


def _no_such_family(error: ListenError) -> bool:
    cause = error.__context__
    return isinstance(cause, OSError) and cause.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
