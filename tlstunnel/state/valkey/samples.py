"""What the sites of each machine use, told to the others every second through the server, for the history of all.

Each machine has a key with its last sample, and a field in one hash with the number of that sample. So a machine reads
the small hash, and of the samples only those that are new. A machine is away if its number does not change; no clock
is compared with that of another machine. Whatever else is in these keys is ignored. In the same way, machines tell each
other texts once, such as what they have seen in a minute.

Tested by tests/unit/test_state_valkey_samples.py.
"""

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final

import msgspec

from tlstunnel.backoff import Backoff
from tlstunnel.state.history.samples import Counts, Instance, Totals
from tlstunnel.state.valkey.address import ServerAddress
from tlstunnel.state.valkey.connection import Connection, ServerUnavailable, explain_error
from tlstunnel.state.valkey.servers import Servers, make_tls_context, run_within

AWAY_SECONDS: Final = 45.0
"""How long a machine counts as it was last seen: as long as its tunnels count for limits (`prelude.lua`)."""

RETURN_SECONDS: Final = 5.0
"""How long other machines may take to come back to a server that was away, before they count as ended."""

FORGET_SECONDS: Final = 3600.0
"""How long the number of a machine that is away stays in the server."""

MOST_MACHINES: Final = 256
"""Machines whose samples are read. More would be read late, and not at all in a second."""

FORMAT: Final = 1
"""The version of a sample. A machine ignores the samples of versions that it does not know."""

_SAMPLE_TTL = 5_000
"""Milliseconds. So whoever starts does not take a machine that died for one that lives."""

_TOLD = b":told"
"""The end of the field with the number of what a machine has told once. Earlier releases ignore such fields."""

_TOLD_TTL = 60_000
_NUMBERS_TTL = 86_400_000
_PATIENCE = 2.0
_CLOSE_SECONDS = 0.5
_RETRIES = Backoff(first=0.25, longest=0.75, jitter=0.25)
"""So that counts are right within a sample after the server is back."""

_LONGEST_NAME = 64

Value = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """What a machine's sites use. `sites` has their open tunnels and totals; those that are left out have no tunnels.

    `age` is the number of seconds since the totals began at zero.
    """

    age: Annotated[float, msgspec.Meta(ge=0)]
    sites: dict[str, list[Value]]
    format: int = FORMAT


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Sample).decode


def decode_sample(name: str, text: bytes) -> Instance | None:
    """Return the totals of another machine, None if this is no sample that is known."""
    try:
        sample = _decode(text)
    except msgspec.DecodeError:
        return None
    number = 1 + len(Counts._fields)
    if sample.format != FORMAT or not all(sample.sites.values()):
        return None
    sites = {site: Totals(tunnels, Counts(*counts[: number - 1])) for site, (tunnels, *counts) in sample.sites.items()}
    return Instance(name, sample.age, sites)


class _Machine:
    """Another machine: the number of its last sample, when that changed, and the sample, empty if it was gone."""

    __slots__ = ("away", "number", "seen", "text")

    def __init__(self, number: bytes, now: float) -> None:
        self.number = number
        self.seen = now
        self.text = b""
        self.away = True


class SharedSamples:
    """Sends this machine's samples and has those of the others. For the event loop in which it is made.

    `instance` stands for this machine's tunnel. `report` is called with the instance of another machine when it is away
    or back, and whether it is away. `on_told` is called with what another machine tells once (`tell`). Raises
    CertificateError for a file of `address`.
    """

    def __init__(  # noqa: PLR0913 - what is configured
        self,
        address: ServerAddress,
        *,
        prefix: str,
        instance: str,
        report: Callable[[str, bool], None],
        on_told: Callable[[bytes], None] = lambda _: None,
        password_file: Path | None = None,
    ) -> None:
        self._servers = Servers(address, make_tls_context(address), password_file)
        self._prefix = f"{{{prefix}}}:".encode("ascii")
        self._instance = instance.encode("ascii")
        self._report = report
        self._on_told = on_told
        self._telling = b""
        self._told: dict[bytes, bytes] = {}
        """The number of what each machine has told last."""
        self._loop = asyncio.get_running_loop()
        self._machines: dict[bytes, _Machine] = {}
        self._number = secrets.randbits(48)
        self._own = b""
        self._killed = b""
        """An instance that is to be withdrawn, "" if there is none."""
        self._new = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._connected = 0.0

    def start(self) -> None:
        """Connect, and stay connected."""
        self._task = self._loop.create_task(self._run())

    def publish(self, age: float, sites: Mapping[str, Totals]) -> None:
        """Send this sample, unless there is a newer one before it is sent. For any thread.

        Sites that are left out have no tunnels. Their totals are those of a sample before, which some machines may not
        have read, so each site is in one of the samples of each minute.
        """
        text = _encode(Sample(age, {site: [tunnels, *counts] for site, (tunnels, counts) in sites.items()}))
        self._loop.call_soon_threadsafe(self._take, text)

    def tell(self, text: bytes) -> None:
        """Tell the other machines this once, with the next sample. Those that start within a minute learn of it too."""
        self._telling = text

    def withdraw(self, instance: str) -> None:
        """Withdraw what an instance has told that was killed, and so could not do it itself.

        Its tunnels count for nothing from now on, neither here nor for limits. If it lives after all, it comes back
        with its next sample and its next heartbeat.
        """
        self._killed = instance.encode("ascii")

    def decode(self, instance: str, text: bytes) -> Instance | None:
        """Return the totals of another machine, None if this is no sample that is known. For any thread."""
        return decode_sample(instance, text)

    def _take(self, text: bytes) -> None:
        self._own = text
        self._new.set()

    def list_others(self) -> Sequence[tuple[str, bytes]]:
        """Return the instances of the other machines that are not away, and their last samples."""
        now = self._loop.time()
        for name, machine in self._machines.items():
            if not machine.away and now - machine.seen > AWAY_SECONDS:
                machine.away = True
                self._report(name.decode("ascii"), True)
        return [(name.decode("ascii"), machine.text) for name, machine in self._machines.items() if not machine.away]

    async def close(self, *, withdraw: bool) -> None:
        """Disconnect. With `withdraw` the others are told that this machine has no tunnels any more."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        connection = self._connection
        if connection is not None:
            if withdraw:
                with suppress(ServerUnavailable, TimeoutError):
                    await run_within(_CLOSE_SECONDS, self._withdraw(connection))
            connection.close()

    async def _withdraw(self, connection: Connection) -> None:
        await connection.call(b"HDEL", self._numbers_key, self._instance, self._instance + _TOLD)

    async def _withdraw_killed(self, connection: Connection, instance: bytes) -> None:
        holders_key = b"%bholders" % self._prefix
        _, holders = await asyncio.gather(
            connection.call(b"HDEL", self._numbers_key, instance, instance + _TOLD),
            connection.call(b"HGETALL", holders_key),
        )
        names = holders[::2] if isinstance(holders, list) else []
        its = [name for name in names if isinstance(name, bytes) and name.startswith(instance + b".")]
        if its:
            await connection.call(b"HDEL", holders_key, *its)
        self._machines.pop(instance, None)
        self._killed = b""

    @property
    def _numbers_key(self) -> bytes:
        return b"%bsamples" % self._prefix

    def _sample_key(self, name: bytes) -> bytes:
        return b"%bu:%b" % (self._prefix, name)

    def _told_key(self, name: bytes) -> bytes:
        return b"%btold:%b" % (self._prefix, name)

    async def _run(self) -> None:
        delay = 0.0
        while True:
            try:
                self._connection = await run_within(_PATIENCE, self._servers.connect())
                self._connected = self._loop.time()
                while True:
                    await self._new.wait()
                    self._new.clear()
                    await run_within(_PATIENCE, self._exchange(self._connection))
                    delay = 0.0
            except (ServerUnavailable, TimeoutError) as error:
                self._disconnect()
                delay = await self._servers.wait_after(explain_error(error), delay, _RETRIES)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    async def _exchange(self, connection: Connection) -> None:
        """Send the own sample, and read those that are new. Raises ServerUnavailable."""
        if self._killed:
            await self._withdraw_killed(connection, self._killed)
        self._number += 1
        if telling := self._telling:
            await asyncio.gather(
                connection.call(b"SET", self._told_key(self._instance), telling, b"PX", _TOLD_TTL),
                connection.call(b"HSET", self._numbers_key, self._instance + _TOLD, self._number),
            )
            if self._telling is telling:
                self._telling = b""
        # Sent at once, and executed in this order.
        *_, numbers = await asyncio.gather(
            connection.call(b"SET", self._sample_key(self._instance), self._own, b"PX", _SAMPLE_TTL),
            connection.call(b"HSET", self._numbers_key, self._instance, self._number),
            connection.call(b"PEXPIRE", self._numbers_key, _NUMBERS_TTL),
            connection.call(b"HGETALL", self._numbers_key),
        )
        new = self._find_new(numbers)
        texts = await asyncio.gather(*(connection.call(b"GET", self._sample_key(name)) for name in new))
        for name, text in zip(new, texts, strict=True):
            if isinstance(text, bytes):
                self._receive(name, text)
        told = self._find_told(numbers)
        for text in await asyncio.gather(*(connection.call(b"GET", self._told_key(name)) for name in told)):
            if isinstance(text, bytes):
                self._on_told(text)
        old = [name for name, one in self._machines.items() if self._loop.time() - one.seen > FORGET_SECONDS]
        for name in old:
            await connection.call(b"HDEL", self._numbers_key, name, name + _TOLD)
            del self._machines[name]

    def _find_new(self, numbers: object) -> list[bytes]:
        """Note the machines that there are, and return those whose number has changed."""
        if not isinstance(numbers, list) or not all(isinstance(one, bytes) for one in numbers):
            raise ServerUnavailable("what it answers is not ours")
        found = {
            name: number
            for name, number in zip(numbers[::2], numbers[1::2], strict=False)
            if name != self._instance and name.isalnum() and len(name) <= _LONGEST_NAME
        }
        now = self._loop.time()
        if now - self._connected > RETURN_SECONDS:  # before, the server may have lost its data
            for name in self._machines.keys() - found.keys():  # it has ended
                del self._machines[name]
        new = []
        for name, number in found.items():
            machine = self._machines.get(name)
            if machine is None:
                if len(self._machines) < MOST_MACHINES:
                    self._machines[name] = _Machine(number, now)
                    new.append(name)
            elif machine.number != number:
                machine.number = number
                new.append(name)
        return new

    def _find_told(self, numbers: object) -> list[bytes]:
        """Return the machines that have told something new, of those that there are."""
        assert isinstance(numbers, list)  # `_find_new` has checked it
        found = dict(zip(numbers[::2], numbers[1::2], strict=False))
        before = self._told
        self._told = {name: found[name + _TOLD] for name in self._machines if name + _TOLD in found}
        return [name for name, number in self._told.items() if before.get(name) != number]

    def _receive(self, name: bytes, text: bytes) -> None:
        machine = self._machines[name]
        was_away = machine.away and bool(machine.text)
        machine.text, machine.seen, machine.away = text, self._loop.time(), False
        if was_away:
            self._report(name.decode("ascii"), False)
