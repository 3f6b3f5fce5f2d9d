"""Tells other machines through the server which tags have been ended here, and learns which have been there.

Each machine asks four times a second. The latest 2 000 are kept for an hour: a machine that was cut off learns what it
has missed. One that begins learns of the last minute: handshakes may have begun before it.

Tested by tests/unit/test_state_valkey_ended_tags.py.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from tlstunnel.backoff import Backoff
from tlstunnel.state.clock import read_clock
from tlstunnel.state.ended_tags import EndedTag, decode_ended, encode_ended
from tlstunnel.state.valkey.address import ServerAddress
from tlstunnel.state.valkey.connection import Connection, ServerUnavailable, explain_error
from tlstunnel.state.valkey.outage import Outage
from tlstunnel.state.valkey.scripts import SCRIPTS, decode_ended_tags
from tlstunnel.state.valkey.servers import Servers, make_tls_context, run_within

ASK_SECONDS: Final = 0.25
"""How often the server is asked. A tunnel on another machine ends within a second."""

PAUSE_SECONDS: Final = 0.05
"""How long to wait at least until the server is asked again, however much there is."""

REPORT_SECONDS: Final = 10.0
"""After so many seconds without an answer, that is reported."""

MOST_UNTOLD: Final = 1_000
"""Those that wait until the server can be reached. The oldest are dropped."""

LONGEST_AGE: Final = 3_600.0
"""Seconds after which it makes no sense any more to tell them."""

MOST_KNOWN: Final = 4_096
"""Texts that are remembered, since the server tells some of them twice."""

_AT_ONCE = 50
_PATIENCE = 2.0
_RETRIES = Backoff(first=0.25, longest=2.0, jitter=0.25)


class _Untold(NamedTuple):
    """What other machines are to be told, and when that was asked for, by `read_clock`. `done` is set afterwards."""

    ended: EndedTag
    token: str
    asked: float
    done: "asyncio.Future[None]"


class SharedEndedTags:
    """Sends other machines the tags that are ended here, and receives theirs. For the event loop in which it is made.

    `on_ended` is called with what other machines have told. `report` is called with one line, and whether it is a
    failure, when there was no answer for some time, and when there is one again. Raises CertificateError for a file of
    `address`.
    """

    def __init__(  # noqa: PLR0913 - what is configured
        self,
        address: ServerAddress,
        *,
        prefix: str,
        instance: str,
        on_ended: Callable[[list[EndedTag]], None],
        report: Callable[[str, bool], None],
        password_file: Path | None = None,
    ) -> None:
        self._address = address
        self._servers = Servers(address, make_tls_context(address), password_file)
        self._key = f"{{{prefix}}}:ended".encode("ascii")
        self._instance = instance
        self._on_ended = on_ended
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._since = 0
        self._known: dict[str, None] = {}
        self._untold: deque[_Untold] = deque(maxlen=MOST_UNTOLD)
        self._outage = Outage(self._loop.time, REPORT_SECONDS)
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    def start(self) -> None:
        """Connect, and stay connected."""
        if self._task is None:
            self._task = self._loop.create_task(self._run())

    def tell(self, ended: EndedTag) -> "asyncio.Future[None]":
        """Tell other machines, as soon as the server can be reached. Return a future that is done when it was told."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._untold.append(_Untold(ended, secrets.token_hex(8), read_clock(), done))
        self._wake.set()
        return done

    async def close(self) -> None:
        """Disconnect. What other machines were not told yet is lost."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._disconnect()

    async def _run(self) -> None:
        delay = 0.0
        while True:
            try:
                connecting = self._servers.connect_with(SCRIPTS["ended"], self._wake.set)
                self._connection = connection = await run_within(_PATIENCE, connecting)
                while True:
                    self._wake.clear()
                    is_more = await run_within(_PATIENCE, self._exchange(connection))
                    delay = 0.0
                    await asyncio.sleep(PAUSE_SECONDS)
                    if not is_more:
                        with suppress(TimeoutError):
                            await run_within(ASK_SECONDS - PAUSE_SECONDS, self._wake_up())
                    if connection.lost is not None:
                        raise connection.lost
            except (ServerUnavailable, TimeoutError) as error:
                self._disconnect()
                reason = explain_error(error)
                self._note_failure(str(reason))
                delay = await self._servers.wait_after(reason, delay, _RETRIES)

    async def _wake_up(self) -> None:
        await self._wake.wait()

    async def _exchange(self, connection: Connection) -> bool:
        """Tell and ask once; return whether there is more of either. Raises ServerUnavailable."""
        now = read_clock()
        while self._untold and now - self._untold[0].asked > LONGEST_AGE:
            self._untold.popleft()
        telling = list(islice(self._untold, _AT_ONCE))
        texts = [self._encode(one, now) for one in telling]
        reply = await connection.call(*SCRIPTS["ended"].build_call([self._key], (self._since, texts)))
        try:
            self._since, is_more, told = decode_ended_tags(reply)
        except ValueError:
            raise ServerUnavailable("what it answers is not ours") from None
        for one in telling:
            with suppress(ValueError):  # it was dropped for others meanwhile
                self._untold.remove(one)
            if not one.done.done():
                one.done.set_result(None)
        if self._outage.note_answer():
            self._report(f"{self._address} says again which tags other machines end", False)
        self._take(told)
        return is_more or bool(self._untold)

    def _encode(self, untold: _Untold, now: float) -> str:
        ended = msgspec.structs.replace(untold.ended, age=min(untold.ended.age + now - untold.asked, LONGEST_AGE))
        return encode_ended(ended, self._instance, untold.token)

    def _take(self, told: list[tuple[float, str]]) -> None:
        """Pass on what is new, and comes from another machine."""
        new = []
        for ago, text in told:
            if text in self._known:
                continue
            self._known[text] = None
            found = decode_ended(text)
            if found is not None and found[0] != self._instance:
                new.append(msgspec.structs.replace(found[1], age=found[1].age + ago))
        while len(self._known) > MOST_KNOWN:
            del self._known[next(iter(self._known))]
        if new:
            self._on_ended(new)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _note_failure(self, reason: str) -> None:
        if self._outage.note_failure():
            self._report(f"{self._address} does not say which tags other machines end: {reason}", True)
