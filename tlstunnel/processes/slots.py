"""The listening sockets, which the parent holds as long as it runs, and their assignment to children.

An address that is listened on from the start has as many sockets as there are processes, and the kernel spreads the
connections over them (SO_REUSEPORT). Connections wait at a socket where no child accepts, and they are reset if it is
closed (both measured). So every socket has a child at all times, and none is closed while its address is configured.
"""

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from tlstunnel.addresses import ListenAddress
from tlstunnel.errors import ListenError
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.sockets.listeners import Listener, adopt, is_in_use, listen, listen_beside

FIRST_PASSED = 3
"""The first descriptor of socket activation (sd_listen_fds(3))."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A listening socket, and the number by which the parent and its children refer to it."""

    number: int
    listener: Listener


class SlotHandover(msgspec.Struct, frozen=True):
    """A slot as an upgrade hands it over: its number, its descriptor, and its address as configured."""

    number: int
    fd: int
    written: str


class SlotsHandover(msgspec.Struct, frozen=True):
    """All slots, the number of the last one, and the addresses from socket activation."""

    next: int
    open: list[SlotHandover]
    passed: list[str]


class Slots:
    """All slots, by their address as configured. `passed` are the sockets from socket activation."""

    def __init__(self, passed: Sequence[Listener] = ()) -> None:
        self._by_address: dict[ListenAddress, list[Slot]] = {}
        self._next = 0
        self._passed = {listener.address: listener for listener in passed}

    def __iter__(self) -> Iterator[Slot]:
        return (slot for slots in self._by_address.values() for slot in slots)

    @property
    def passed(self) -> tuple[ListenAddress, ...]:
        """The addresses from socket activation."""
        return tuple(self._passed)

    def open(
        self, addresses: tuple[ListenAddress, ...], shares: int, optional: tuple[ListenAddress, ...] = ()
    ) -> dict[ListenAddress, list[Slot]]:
        """Open those of `addresses` that are not open yet, with `shares` sockets each: all or none.

        An `optional` address is left out if this machine does not have its address family. Raises ListenError.
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
                        listeners = self._listen(address, shares)
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

    def _listen(self, address: ListenAddress, shares: int) -> list[Listener]:
        """Listen on `address`, also if a slot has its port: a reload may change 0.0.0.0 to 127.0.0.1, or back."""
        try:
            return listen(address, shares)
        except ListenError as error:
            same_port = [slot.listener for slot in self if _have_same_port(slot.listener.address, address)]
            if not same_port or not is_in_use(error):
                raise
            return listen_beside(address, same_port)

    def update(self, opened: Mapping[ListenAddress, list[Slot]], addresses: tuple[ListenAddress, ...]) -> list[Slot]:
        """Add the slots in `opened`; remove those not for `addresses`, and return them for the caller to close."""
        together = {**self._by_address, **opened}
        self._by_address = {address: slots for address, slots in together.items() if address in addresses}
        return [slot for address, slots in together.items() if address not in addresses for slot in slots]

    def forget(self, opened: Mapping[ListenAddress, list[Slot]]) -> None:
        """Close the slots that `open` has opened."""
        for slots in opened.values():
            for slot in slots:
                slot.listener.remove()

    def close(self) -> None:
        """Close all slots. The kernel refuses connections from now on."""
        for slot in self:
            slot.listener.remove()
        self._by_address = {}

    def _make_slot(self, listener: Listener) -> Slot:
        self._next += 1
        return Slot(self._next, listener)

    def assign(self, children: Sequence[int]) -> dict[int, set[int]]:
        """Return the numbers of each child's slots. Each slot has at least one child, each child at least one slot.

        If an address has as many sockets as there are children, each child has its own; a single socket is shared.
        """
        numbers: dict[int, set[int]] = {child: set() for child in children}
        for slots in self._by_address.values() if children else ():
            for place in range(max(len(slots), len(children))):
                numbers[children[place % len(children)]].add(slots[place % len(slots)].number)
        return numbers

    @staticmethod
    def try_to_open(
        addresses: tuple[ListenAddress, ...], kept: SlotsHandover, optional: tuple[ListenAddress, ...]
    ) -> None:
        """Open and close those of `addresses` that are not in `kept`, as a test. Raises ListenError."""
        written = [ListenAddress.parse(one.written) for one in kept.open]
        slots = Slots()
        for address in addresses:
            if address in written:
                continue
            try:
                slots.forget(slots.open((address,), 1, optional))
            except ListenError as error:
                # The sockets of the running program are not here, so `open` cannot share the port with them.
                if not (is_in_use(error) and any(_have_same_port(one, address) for one in written)):
                    raise

    def hand_over(self) -> SlotsHandover:
        """Return what `restore` takes in the next program."""
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
        """Return the slots of the previous program. Raises ListenError."""
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
    """Return the sockets from systemd's socket activation, if it is used (sd_listen_fds(3)). Raises ListenError."""
    count, process = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if process != str(os.getpid()) or not count.isdecimal():
        return []
    descriptors = range(FIRST_PASSED, FIRST_PASSED + int(count))
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return [adopt(descriptor) for descriptor in descriptors]


def _have_same_port(one: ListenAddress, other: ListenAddress) -> bool:
    return one.path is None and other.path is None and one.port == other.port != 0


def _no_such_family(error: ListenError) -> bool:
    cause = error.__context__
    return isinstance(cause, OSError) and cause.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
