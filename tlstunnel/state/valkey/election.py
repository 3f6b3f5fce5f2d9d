"""Which of several machines sends notices: the one that has a lease in the server (docs/state.md#several-machines).

A lease lasts for `LEASE` seconds by the server's clock, and is renewed three times meanwhile. A machine is certain to
have it for less than that, counted from when the last renewal was sent, by a clock that goes on while the machine is
suspended. Clocks of machines are not compared. An instance keeps its lease through crashes and upgrades.

The server also has what was delivered, so that another machine does not deliver it again. Deliveries are texts here.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from tlstunnel.backoff import Backoff
from tlstunnel.state.clock import read_clock
from tlstunnel.state.valkey.address import ServerAddress
from tlstunnel.state.valkey.connection import Connection, ServerUnavailable, explain_error
from tlstunnel.state.valkey.outage import Outage
from tlstunnel.state.valkey.scripts import SCRIPTS, decode_election
from tlstunnel.state.valkey.servers import Servers, make_tls_context, run_within

LEASE: Final = 30.0
"""Seconds that a lease lasts, unless it is renewed."""

VARIABLE: Final = "TLSTUNNEL_LEASE"
"""An environment variable with other seconds than `LEASE`, for tests: the same on all machines."""

MARGIN: Final = 1 / 6
"""The part of a lease at whose end nobody relies on it: clocks do not run equally fast, and sending takes time."""

RENEWALS: Final = 3
"""How often a lease is renewed while it lasts, and how often another machine tries for it."""

MOST_UNPUBLISHED: Final = 10_000
"""Deliveries that wait until the server can be reached. The oldest are dropped."""

_PUBLISHED_AT_ONCE = 500
_PATIENCE = 2.0
_CLOSE_SECONDS = 0.5
_RETRIES = Backoff(first=0.5, longest=5.0, jitter=0.25)


def read_lease(environ: Mapping[str, str]) -> float:
    """Return the seconds of a lease: those of `VARIABLE`, or `LEASE` if it is not set or malformed."""
    try:
        seconds = float(environ[VARIABLE])
    except (KeyError, ValueError):
        return LEASE
    return seconds if 0.5 <= seconds <= LEASE else LEASE


class News(NamedTuple):
    """What has changed. This machine is elected until the time `until` of `read_clock`; 0 if it is not.

    `delivered` is what machines have delivered. Some of it may have been told before. `holder` is how the machine is
    shown that is elected; "" if there is none, or the server does not say.
    """

    until: float
    delivered: Sequence[str]
    holder: str = ""


class Request(NamedTuple):
    """What `elect.lua` is asked by one machine, and when, by `read_clock`."""

    fields: tuple[str, str, bool, int, int, list[str], str]
    sent: float


class Candidate:
    """What one machine knows of the election. No I/O.

    `until` is when it is no longer certain to have the lease, 0 if it has none. `behind` says that the server has more
    to tell, or to be told. A candidate that has not read all deliveries is not elected yet. `shown` is how people see
    the machine.
    """

    def __init__(self, instance: str, lease: float = LEASE, shown: str = "") -> None:
        self.until = 0.0
        self.behind = False
        self._instance = instance
        self._token = secrets.token_hex(8)
        self._lease = lease
        self._shown = shown
        self._since = 0
        self._told: Sequence[str] = ()
        """The deliveries of the last answer. The next one repeats some of them."""
        self._unpublished: dict[str, None] = {}

    def publish(self, deliveries: Iterable[str]) -> None:
        """Have the server told what was delivered, with the next requests."""
        self._unpublished.update(dict.fromkeys(deliveries))
        while len(self._unpublished) > MOST_UNPUBLISHED:
            del self._unpublished[next(iter(self._unpublished))]

    def begin_anew(self) -> None:
        """Have the server tell all deliveries again. It may be another one than before."""
        self._since, self._told = 0, ()

    def ask(self, now: float, *, wanted: bool = True) -> Request:
        """Return the next request. If the lease is not `wanted`, it is given back."""
        if not wanted:
            self.until = 0.0
        added = list(islice(self._unpublished, _PUBLISHED_AT_ONCE))
        length = round(self._lease * 1e6)
        return Request((self._instance, self._token, wanted, length, self._since, added, self._shown), now)

    def learn(self, request: Request, answer: tuple[bool, bool, int, str, list[str]]) -> News:
        """Take the answer to a request."""
        has_lease, is_more, self._since, holder, delivered = answer
        *_, published, _ = request.fields
        for delivery in published:
            self._unpublished.pop(delivery, None)
        self.behind = is_more or bool(self._unpublished)
        if not has_lease:
            self.until = 0.0
        elif not is_more:
            self.until = request.sent + self._lease * (1 - MARGIN)
        told, self._told = self._told, delivered
        return News(self.until, [one for one in delivered if one not in set(told)], holder)


class Election:
    """Takes part in the election. For the event loop in which it is made.

    `instance` stands for this machine's tunnel, which people see as `shown`. `on_news` is called when the lease was
    got, renewed or lost, by whichever machine, and with deliveries of all machines. `report` is called with one line,
    and whether it is a failure, when there was no answer for as long as a lease lasts, and when there is one again.
    Raises CertificateError for a file of `address`.
    """

    def __init__(  # noqa: PLR0913 - what is configured
        self,
        address: ServerAddress,
        *,
        prefix: str,
        instance: str,
        on_news: Callable[[News], None],
        report: Callable[[str, bool], None],
        password_file: Path | None = None,
        shown: str = "",
        lease: float = LEASE,
    ) -> None:
        self._address = address
        self._servers = Servers(address, make_tls_context(address), password_file)
        self._keys = [f"{{{prefix}}}:{name}".encode("ascii") for name in ("election", "deliveries")]
        self._candidate = Candidate(instance, lease, shown)
        self._holder = ""
        self._lease = lease
        self._on_news = on_news
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._outage = Outage(self._loop.time, lease)
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    def start(self) -> None:
        """Take part from now on."""
        if self._task is None:
            self._task = self._loop.create_task(self._run())

    def publish(self, deliveries: Iterable[str]) -> None:
        """Tell all machines what was delivered, as soon as the server can be reached."""
        self._candidate.publish(deliveries)
        self._wake.set()

    async def close(self, *, give_back: bool) -> None:
        """Take part no more. Without `give_back` the next process of this instance goes on with the lease."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        connection = self._connection
        if connection is None:
            return
        if give_back:
            with suppress(ServerUnavailable, TimeoutError):
                await run_within(_CLOSE_SECONDS, self._exchange(connection, wanted=False))
        self._disconnect()

    async def _run(self) -> None:
        delay = 0.0
        while True:
            try:
                connecting = self._servers.connect_with(SCRIPTS["elect"], self._wake.set)
                self._connection = connection = await run_within(_PATIENCE, connecting)
                self._candidate.begin_anew()
                while True:
                    self._wake.clear()
                    await run_within(_PATIENCE, self._exchange(connection))
                    delay = 0.0
                    if not self._candidate.behind:
                        await self._pause(connection)
            except (ServerUnavailable, TimeoutError) as error:
                self._disconnect()
                reason = explain_error(error)
                self._note_failure(str(reason))
                delay = await self._servers.wait_after(reason, delay, _RETRIES)

    async def _exchange(self, connection: Connection, *, wanted: bool = True) -> None:
        """Ask once. Raises ServerUnavailable."""
        request = self._candidate.ask(read_clock(), wanted=wanted)
        reply = await connection.call(*SCRIPTS["elect"].build_call(self._keys, request.fields))
        try:
            answer = decode_election(reply)
        except ValueError:
            raise ServerUnavailable("what it answers is not ours") from None
        before = self._candidate.until
        news = self._candidate.learn(request, answer)
        if self._outage.note_answer():
            self._report(f"{self._address} elects again", False)
        if news.until or before or news.delivered or news.holder != self._holder:
            self._holder = news.holder
            self._on_news(news)

    async def _pause(self, connection: Connection) -> None:
        """Wait until it is time to ask, or there is something to publish. Raises ServerUnavailable."""
        timer = self._loop.call_later(self._lease / RENEWALS, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()
        if connection.lost is not None:
            raise connection.lost

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _note_failure(self, reason: str) -> None:
        if self._outage.note_failure():
            if self._holder:
                self._holder = ""
                self._on_news(News(0.0, ()))
            self._report(f"{self._address} does not elect: {reason}", True)
