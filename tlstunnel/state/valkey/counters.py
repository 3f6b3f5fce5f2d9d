"""`Counters` of several machines, in a Valkey or Redis server (docs/state.md#several-machines).

A script in the server counts, atomically over all limits of a request, by the server's clock. What is here keeps the
counts exact although connections break:

- A question has a number. It is repeated on the next connection, and the server remembers the last answers.
- A question has a deadline by the server's clock, after which it is not counted, however late it is executed.
- The server has the number of tunnels of each holder under each key (`registration.py`). A new connection states them
  anew, those under the keys of a question before the question.
"""

import asyncio
import math
import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

from tlstunnel.backoff import Backoff
from tlstunnel.state.counters import MAX_SECONDS, CountersUnavailable, LimitCheck, LimitResult, find_taken
from tlstunnel.state.memory import TUNNEL_WAIT
from tlstunnel.state.valkey.address import ServerAddress
from tlstunnel.state.valkey.connection import ServerUnavailable, explain_error
from tlstunnel.state.valkey.registration import FOREIGN_KEY, KEYS_AT_ONCE, Registration
from tlstunnel.state.valkey.servers import Servers, make_tls_context, run_within

MAX_QUESTIONS: Final = 1024
"""Questions that wait for an answer, and answers that the server remembers of each instance (`check.lua`)."""

BEAT: Final = 15.0
"""Seconds between heartbeats. A holder counts until 45 s after its last one (`prelude.lua`)."""

PATIENCE: Final = 2.0
"""Seconds to connect, and to wait for a server that is late before the connection is closed."""

_CALM: Final = 2.0
"""Seconds after which a connection was a good one, and is followed by another at once."""

_TURNS: Final = 240
"""Heartbeats in which each key's time to live is renewed once: one hour, of the four that `prelude.lua` gives it."""

_ATTEMPTS: Final = 3
_REDIRECTIONS: Final = 5
_RETRIES: Final = Backoff(first=0.1, longest=2.0, jitter=0.25)
_EXCEEDED: Final = ("", "limit", "tunnels", "blocked")
_NOT_YET: Final = "it is being connected to"


class _Question:
    """A question that waits: `checks`, or a count of `tunnels`.

    `tunnels` are the keys whose numbers the answer depends on. `attempts` is how often it was sent.
    """

    __slots__ = ("attempts", "checks", "deadline", "future", "number", "tunnels")

    def __init__(self, number: int, checks: Sequence[LimitCheck], tunnels: Sequence[str], deadline: float) -> None:
        self.number = number
        self.checks = checks
        self.tunnels = tunnels
        self.deadline = deadline
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.attempts = 0


class ValkeyCounters:
    """`Counters` of all machines that use the same server and `prefix`. For the event loop in which it is made.

    `instance` is random, of letters and digits, and stands for this machine's tunnels. Whoever has it next, after a
    crash or an upgrade, replaces this one. `timeout` is the number of seconds for an answer. `report` is called with
    one line when the server fails or answers again, and whether it is a failure. Raises CertificateError for a file of
    `address`.
    """

    def __init__(  # noqa: PLR0913 - what is configured
        self,
        address: ServerAddress,
        *,
        prefix: str,
        instance: str,
        timeout: float,
        report: Callable[[str, bool], None],
        password_file: Path | None = None,
    ) -> None:
        self._address = address
        self._servers = Servers(address, make_tls_context(address), password_file)
        self._prefix = prefix
        self._instance = instance
        self._timeout = timeout
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._registration: Registration | None = None
        self._holder = ""
        self._questions: dict[int, _Question] = {}
        self._number = secrets.randbits(48)
        self._timer: asyncio.TimerHandle | None = None
        self._tunnels: dict[str, int] = {}
        self._uncertain: set[str] = set()
        """Keys under which the server may have another number than `_tunnels`."""
        self._changes: Counter[str] = Counter()
        """Tunnels taken and returned since the last command."""
        self._renewing: deque[str] = deque()
        self._renewed_at_once = 0
        self._failure = ""
        self._reported = ""
        self._policy = ""
        self._is_late = False
        self._has_reported_key = False
        self._wake = asyncio.Event()

    @property
    def failure(self) -> str:
        """Why the server does not answer, or "". It is "" too while it is being connected to for the first time."""
        return self._failure

    @property
    def tunnels(self) -> Mapping[str, int]:
        """The number of open tunnels under each key that has any, of this instance alone."""
        return self._tunnels

    def start(self) -> None:
        """Connect, and stay connected."""
        self._task = self._loop.create_task(self._run())

    async def close(self) -> None:
        """Send what is to be sent, and disconnect. Tunnels that are left count for another 45 s."""
        if self._registration is not None:
            self._send_changes()
            with suppress(ServerUnavailable, TimeoutError):
                await run_within(self._timeout, self._registration.connection.call(b"PING"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._timer is not None:
            self._timer.cancel()
        self._failure = "it is disconnected"
        self._fail_questions(self._failure)

    # What `Counters` has.

    async def check(self, checks: Sequence[LimitCheck]) -> list[LimitResult]:
        """See `Counters.check`."""
        results: list[LimitResult] = await self._wait(checks, [check.key for check in checks if check.max_tunnels])
        return results

    def return_tunnels(self, keys: Sequence[str]) -> None:
        """See `Counters.return_tunnels`. Raises KeyError for a tunnel that was not taken."""
        for key in keys:
            number = self._tunnels[key]
            if number > 1:
                self._tunnels[key] = number - 1
            else:
                del self._tunnels[key]
            self._change(key, -1)

    def take_tunnels(self, keys: Sequence[str]) -> None:
        """See `Counters.take_tunnels`."""
        for key in keys:
            self._tunnels[key] = self._tunnels.get(key, 0) + 1
            self._change(key, 1)

    def change_tunnels(self, changes: Mapping[str, int]) -> None:
        """See `SumCounters`."""
        for key, change in changes.items():
            number = self._tunnels.get(key, 0) + change
            if number < 0:
                raise KeyError(key)
            if number:
                self._tunnels[key] = number
            else:
                self._tunnels.pop(key, None)
            self._change(key, change)

    async def count_tunnels(self, keys: Sequence[str]) -> list[int]:
        """See `Counters.count_tunnels`."""
        parts = [keys[at : at + KEYS_AT_ONCE] for at in range(0, len(keys), KEYS_AT_ONCE)]
        return [number for part in parts for number in await self._wait((), part)]

    # Questions and their answers.

    async def _wait(self, checks: Sequence[LimitCheck], tunnels: Sequence[str]) -> Any:
        """Ask, and return the answer. Raises CountersUnavailable."""
        if self._failure:
            raise self._unavailable(self._failure)
        if len(self._questions) >= MAX_QUESTIONS:
            raise self._unavailable(f"{MAX_QUESTIONS} questions wait for it")
        self._number += 1
        question = _Question(self._number, checks, tunnels, self._loop.time() + self._timeout)
        self._questions[question.number] = question
        if self._timer is None:
            self._timer = self._loop.call_at(question.deadline, self._expire)
        if self._registration is not None:
            self._send_changes()
            if not self._uncertain.isdisjoint(tunnels):
                self._state_anew(self._registration, self._uncertain.intersection(tunnels))
            self._ask(self._registration, question)
        try:
            return await question.future
        except asyncio.CancelledError:
            if not question.future.cancelled() and not question.future.exception():  # answered in the same turn
                self.return_tunnels(find_taken(checks, question.future.result()) if checks else ())
            raise

    def _ask(self, registration: Registration, question: _Question) -> None:
        again = question.attempts > 0
        question.attempts += 1
        done = partial(self._answer, registration, question, self._loop.time())
        if question.checks:
            registration.check(question.number, question.checks, question.deadline, done, again=again)
        else:
            registration.count(question.tunnels, done)

    def _answer(self, registration: Registration, question: _Question, sent: float, numbers: object) -> None:
        """Receive the answer to a question."""
        if not isinstance(numbers, list):  # it is repeated on the next connection
            self._uncertain.update(question.tunnels)
            return
        status, _, *values = numbers
        if status == 2:  # the server's clock has changed, unless the question was late
            registration.learn_time(numbers, sent)
            is_in_time = question.number in self._questions and self._loop.time() < question.deadline
            if is_in_time and registration is self._registration and question.attempts < _ATTEMPTS:
                self._ask(registration, question)
            return
        if status == FOREIGN_KEY:
            self._fail_question(question, "a key has another type than ours")
            return
        answer = _decode(question, values)
        if answer is None:
            registration.connection.close(ServerUnavailable("what it answers is not ours"))
            return
        is_awaited = self._questions.pop(question.number, None) is not None and not question.future.done()
        if is_awaited:
            question.future.set_result(answer)
        if not question.checks:
            return
        for key in find_taken(question.checks, answer):
            if is_awaited:
                self._tunnels[key] = self._tunnels.get(key, 0) + 1
            if registration is not self._registration:  # repeated: an earlier holder may have it in the server
                self._uncertain.add(key)
            elif not is_awaited:
                self._change(key, -1)

    def _expire(self) -> None:
        """Fail the questions whose time is up."""
        self._timer = None
        now = self._loop.time()
        for question in list(self._questions.values()):
            if question.deadline > now and not question.future.done():
                self._timer = self._loop.call_at(question.deadline, self._expire)
                break
            del self._questions[question.number]
            if question.future.done():  # who asked was cancelled
                continue
            if question.attempts and self._registration is not None and not self._is_late:
                self._is_late = True
                self._fail(self._describe_lateness())
                self._wake.set()
            question.future.set_exception(self._unavailable(self._failure or _NOT_YET))

    def _fail_question(self, question: _Question, reason: str) -> None:
        """Fail one question, and no other."""
        self._uncertain.update(question.tunnels)
        if self._questions.pop(question.number, None) is not None and not question.future.done():
            question.future.set_exception(self._unavailable(reason))
        if not self._has_reported_key:
            self._has_reported_key = True
            self._report(f"{self._address} does not count everything: {reason}; use another state.prefix", True)

    def _fail_questions(self, reason: str) -> None:
        for question in self._questions.values():
            if question.attempts:
                self._uncertain.update(question.tunnels)
            if not question.future.done():
                question.future.set_exception(self._unavailable(reason))
        self._questions.clear()

    # Tunnels.

    def _change(self, key: str, by: int) -> None:
        """Tell the server that a number of tunnels has changed, before the next question."""
        if self._registration is None or key in self._uncertain:
            self._uncertain.add(key)
            return
        if not self._changes:
            self._loop.call_soon(self._send_changes)
        self._changes[key] += by

    def _send_changes(self) -> None:
        if self._changes and self._registration is not None:
            changes, self._changes = self._changes, Counter()
            numbers = {key: number for key, number in changes.items() if number}
            self._registration.change(numbers, self._uncertain.update, absolute=False)

    def _state_anew(self, registration: Registration, keys: Iterable[str]) -> None:
        """Replace the numbers that the server has. No question about these keys may be on its way."""
        numbers = {key: self._tunnels.get(key, 0) for key in keys}
        self._uncertain.difference_update(numbers)
        registration.change(numbers, self._uncertain.update, absolute=True)

    def _renew(self, registration: Registration) -> None:
        """Prolong the life of some keys in the server."""
        if not self._renewing:
            self._renewing.extend(self._tunnels)
            self._renewed_at_once = math.ceil(len(self._renewing) / _TURNS)
        due = [self._renewing.popleft() for _ in range(min(self._renewed_at_once, len(self._renewing)))]
        registration.change(dict.fromkeys(due, 0), self._uncertain.update, absolute=False)

    # The connection.

    async def _run(self) -> None:
        delay, quick, redirections = 0.0, 0, 0
        while True:
            began = self._loop.time()
            try:
                registration = await run_within(PATIENCE, self._open())
                reason = await self._serve(registration)
            except Exception as error:  # whatever it is, the next connection may be better
                reason = explain_error(error)
                quick = 2
            else:
                redirections = 0
                quick = 0 if self._loop.time() - began > _CALM else quick + 1
            if self._servers.learn(reason) and redirections < _REDIRECTIONS:
                redirections += 1
            elif quick < 2:
                delay = 0.0
            else:
                delay = _RETRIES.after(delay)
                self._fail(str(reason))
                self._fail_questions(str(reason))
                await asyncio.sleep(_RETRIES.spread(delay))

    async def _open(self) -> Registration:
        return await Registration.open(self._servers, self._prefix, self._instance)

    async def _serve(self, registration: Registration) -> ServerUnavailable:
        """Use a connection until it is lost. Return why it was."""
        connection = registration.connection
        connection.on_lost = self._wake.set
        try:
            with suppress(ServerUnavailable):
                await self._prepare(registration)
                await self._maintain(registration)
        finally:
            self._registration = None
            self._uncertain.update(self._changes)
            self._changes.clear()
            connection.close()
        return await connection.wait_lost()

    async def _prepare(self, registration: Registration) -> None:
        """Repeat the questions of the connection before, then begin with the others. Raises ServerUnavailable."""
        # The holder before has what these questions took, unless the server has forgotten it, with all that it had.
        is_forgotten = self._holder not in registration.replaced
        self._holder = registration.holder
        for question in list(self._questions.values()):
            if question.attempts:
                if is_forgotten:
                    self._state_anew(registration, question.tunnels)
                self._ask(registration, question)
        with _patience(registration):
            policy = await registration.find_eviction_policy()
        if policy and policy != self._policy:
            self._report(
                f"{self._address} drops keys when its memory is full (maxmemory-policy {policy}), and counts with them;"
                " set maxmemory-policy noeviction",
                True,
            )
        self._policy = policy
        self._uncertain.update(self._tunnels)
        self._registration = registration
        self._settle(registration.took)
        for question in list(self._questions.values()):
            if not question.attempts:
                self._state_anew(registration, self._uncertain.intersection(question.tunnels))
                self._ask(registration, question)

    async def _maintain(self, registration: Registration) -> None:
        """Send heartbeats, state numbers anew, and wait for a server that is late. Raises ServerUnavailable."""
        next_beat, delay = self._loop.time() + BEAT, 0.0
        while registration.connection.lost is None:
            if self._is_late or self._loop.time() >= next_beat:
                with _patience(registration):
                    took = await registration.beat(drop_replaced=not self._uncertain)
                self._settle(took)
                self._renew(registration)
                next_beat = self._loop.time() + BEAT
                delay = _RETRIES.after(delay) if self._is_late else 0.0
                await asyncio.sleep(delay)
            elif self._uncertain:
                self._state_anew(registration, list(islice(self._uncertain, KEYS_AT_ONCE)))
                with _patience(registration):
                    await registration.connection.call(b"PING")
            else:
                self._wake.clear()
                timer = self._loop.call_at(next_beat, self._wake.set)
                try:
                    await self._wake.wait()
                finally:
                    timer.cancel()

    def _settle(self, took: float) -> None:
        """Note that the server has answered, and whether in time."""
        self._is_late = took > self._timeout
        if self._is_late:
            self._fail(self._describe_lateness())
            return
        self._failure = ""
        if self._reported:
            self._reported = ""
            self._report(f"{self._address} counts again", False)

    def _fail(self, reason: str) -> None:
        self._failure = reason
        if reason != self._reported:
            self._reported = reason
            self._report(f"{self._address} does not count: {reason}", True)

    def _describe_lateness(self) -> str:
        return f"it did not answer within {self._timeout * 1000:.0f} ms"

    def _unavailable(self, reason: str) -> CountersUnavailable:
        return CountersUnavailable(f"{self._address} does not count: {reason}")


def _decode(question: _Question, values: list[int]) -> list[Any] | None:
    """Return the answer to a question: results, or numbers of tunnels. None if it is none."""
    if not question.checks:
        return values if len(values) == len(question.tunnels) else None
    if len(values) != 2 * len(question.checks) or min(values) < 0 or max(values[::2]) >= len(_EXCEEDED):
        return None
    return [
        LimitResult(_EXCEEDED[code], TUNNEL_WAIT if code == 2 else min(wait / 1e6, MAX_SECONDS))
        for code, wait in zip(values[::2], values[1::2], strict=True)
    ]


@contextmanager
def _patience(registration: Registration) -> Iterator[None]:
    """Close the connection if the block takes longer than `PATIENCE`."""
    loop = asyncio.get_running_loop()
    timer = loop.call_later(PATIENCE, registration.connection.close, ServerUnavailable("it does not answer"))
    try:
        yield
    finally:
        timer.cancel()
