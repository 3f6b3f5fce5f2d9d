"""A connection that is registered in the server as a holder of tunnels, and what is sent over it.

Each connection is a holder of its own. It replaces the earlier ones of its instance, whose commands then do nothing,
however late the server executes them. Times are seconds of the loop's clock.

Tested by tests/unit/test_state_valkey_counters.py.
"""

import asyncio
import math
import secrets
from binascii import b2a_base64
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Final, Self

import hiredis

from tlstunnel.escaping import printable
from tlstunnel.state.counters import LimitCheck
from tlstunnel.state.valkey.connection import Connection, Done, ServerUnavailable, explain_error
from tlstunnel.state.valkey.scripts import SCRIPTS, decode_numbers, decode_registration
from tlstunnel.state.valkey.servers import Servers

KEYS_AT_ONCE: Final = 500
"""Keys in one call of a script, so that none keeps the server from others for more than some hundred microseconds."""

FOREIGN_KEY: Final = 3
"""The status of a question about a key that is not ours. Closing the connection for it would fail all others too."""

_SECOND: Final = 1_000_000
"""Scripts count in microseconds."""


class Names:
    """The names of keys in the server. All have one hash tag, so that a cluster keeps them on one node.

    What is counted is replaced by a keyed hash of 96 bits: without the secret, an address cannot be found by trying
    all of them.
    """

    def __init__(self, prefix: str, instance: str, secret: str = "") -> None:
        self._prefix = b"{%b}:" % prefix.encode("ascii")
        self._secret = secret.encode("ascii")
        self.holders = self._prefix + b"holders"
        self.probe = self._prefix + b"probe"
        self.answers = b"%banswers:%b" % (self._prefix, instance.encode("ascii"))

    def hash(self, key: str) -> bytes:
        """Return what stands for a key that is counted."""
        digest = blake2b(key.encode("utf-8", "surrogatepass"), key=self._secret, digest_size=12).digest()
        return b2a_base64(digest, newline=False)

    def window(self, check: LimitCheck, hashed: bytes) -> bytes:
        """Return the name of the window of a check."""
        kind = check.strategy[:1].encode("ascii")
        return b"%b%b:%b:%d/%d" % (self._prefix, kind, hashed, check.amount, check.window)

    def block(self, hashed: bytes) -> bytes:
        """Return the name of a block."""
        return b"%bb:%b" % (self._prefix, hashed)

    def tunnels(self, hashed: bytes) -> bytes:
        """Return the name of the numbers of tunnels."""
        return b"%bt:%b" % (self._prefix, hashed)


class Registration:
    """A connection that is registered. `replaced` are the holders before it, which count until `beat` drops them."""

    def __init__(  # noqa: PLR0913 - what registering has found out
        self,
        connection: Connection,
        names: Names,
        holder: str,
        replaced: list[str],
        *,
        offset: float,
        took: float,
    ) -> None:
        self.connection = connection
        self.holder = holder
        self.replaced = replaced
        self.took = took
        """Seconds that registering took."""
        self._names = names
        self._offset = offset
        """The server's time minus the loop's, at most."""
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, servers: Servers, prefix: str, instance: str) -> Self:
        """Connect and register. Raises ServerUnavailable."""
        connection = await servers.connect()
        try:
            loads = [connection.call(b"SCRIPT", b"LOAD", script.source) for script in SCRIPTS.values()]
            await asyncio.gather(*loads)
            holder = f"{instance}.{secrets.token_hex(4)}"
            names = Names(prefix, instance)
            request = (instance, holder, secrets.token_hex(16))
            loop = asyncio.get_running_loop()
            sent = loop.time()
            keys = [names.holders, names.answers, names.probe]
            reply = await connection.call(*SCRIPTS["register"].build_call(keys, request))
            now, secret, replaced = decode_registration(reply)
        except ValueError:
            connection.close()
            raise ServerUnavailable("what it answers is not ours") from None
        except BaseException:
            connection.close()
            raise
        names = Names(prefix, instance, secret)
        return cls(connection, names, holder, replaced, offset=now / _SECOND - sent, took=loop.time() - sent)

    async def find_eviction_policy(self) -> str:
        """Return how the server chooses the keys that it drops when its memory is full, "" if it drops none."""
        try:
            info = await self.connection.call(b"INFO", b"memory")
        except ServerUnavailable:
            return ""  # INFO may be forbidden, and nothing depends on it
        lines = info.decode("ascii", "replace").splitlines() if isinstance(info, bytes) else ()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        policy = printable(fields.get("maxmemory_policy", "noeviction")[:32])
        return "" if fields.get("maxmemory", "0") == "0" or policy == "noeviction" else policy

    def check(self, number: int, checks: Sequence[LimitCheck], deadline: float, done: Done, *, again: bool) -> None:
        """Send a question. `done` is called with a list of numbers, or None if it has to be repeated elsewhere.

        `again` says that it may have been counted already. The server discards it after the deadline.
        """
        names = self._names
        keys = [names.holders, names.answers]
        encoded = []
        for check in checks:
            hashed = names.hash(check.key)
            if check.amount:
                keys.append(names.window(check, hashed))
            if check.block_for:
                keys.append(names.block(hashed))
            if check.max_tunnels:
                keys.append(names.tunnels(hashed))
            window, block_for = check.window * _SECOND, math.ceil(check.block_for * _SECOND)
            encoded.append((check.strategy, check.amount, window, check.max_tunnels, block_for, check.enforced))
        latest = math.ceil((deadline + self._offset) * _SECOND)
        call = SCRIPTS["check"].build_call(keys, (self.holder, number, again, latest, encoded))
        self.connection.send(call, partial(self._read, done))

    def count(self, keys: Sequence[str], done: Done) -> None:
        """Ask for the number of open tunnels under each key. `done` is called as by `check`."""
        call = SCRIPTS["count"].build_call([self._names.holders, *self._name_tunnels(keys)], (self.holder,))
        self.connection.send(call, partial(self._read, done))

    def change(self, numbers: Mapping[str, int], done: Callable[[Mapping[str, int]], None], *, absolute: bool) -> None:
        """Add to the numbers of this holder's tunnels, or replace them and those of the replaced holders.

        `done` is called with those that may not have arrived.
        """
        items = list(numbers.items())
        for at in range(0, len(items), KEYS_AT_ONCE):
            part = dict(items[at : at + KEYS_AT_ONCE])
            request = (self.holder, self.replaced if absolute else (), list(part.values()), absolute)
            call = SCRIPTS["tunnels"].build_call([self._names.holders, *self._name_tunnels(part)], request)

            def confirm(numbers: object, part: Mapping[str, int] = part) -> None:
                if numbers is None:
                    done(part)

            self.connection.send(call, partial(self._read, confirm))

    async def beat(self, *, drop_replaced: bool) -> float:
        """Send a heartbeat, and drop the replaced holders. Return the seconds it took. Raises ServerUnavailable."""
        sent = self._loop.time()
        request = (self.holder, self.replaced if drop_replaced else ())
        future: asyncio.Future[object] = self._loop.create_future()

        def done(numbers: object) -> None:
            if not future.done():
                future.set_result(numbers)

        call = SCRIPTS["beat"].build_call([self._names.holders, self._names.answers], request)
        self.connection.send(call, partial(self._read, done))
        numbers = await future
        if not isinstance(numbers, list):
            raise await self.connection.wait_lost()
        self.learn_time(numbers, sent)
        if drop_replaced:
            self.replaced = []
        return self._loop.time() - sent

    def learn_time(self, numbers: list[int], sent: float) -> None:
        """Learn the server's time from the reply to a command."""
        self._offset = numbers[1] / _SECOND - sent

    def _name_tunnels(self, keys: Sequence[str] | Mapping[str, int]) -> list[bytes]:
        return [self._names.tunnels(self._names.hash(key)) for key in keys]

    def _read(self, done: Done, reply: object) -> None:
        """Give the numbers in a reply to `done`. For any other reply close the connection."""
        if isinstance(reply, hiredis.ReplyError) and "WRONGTYPE" in str(reply):
            done([FOREIGN_KEY, 0])
            return
        if isinstance(reply, Exception):
            self.connection.close(explain_error(reply))
            done(None)
            return
        try:
            numbers = decode_numbers(reply)
        except ValueError:
            self.connection.close(ServerUnavailable("what it answers is not ours"))
            done(None)
            return
        if numbers[0] == 1:
            self.connection.close(ServerUnavailable("it has forgotten this process"))
            done(None)
        else:
            done(numbers)
