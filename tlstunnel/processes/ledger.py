"""The ledger's process: counts for all serving processes, and serves no connection itself.

It keeps counting as long as there is a process that asks, even if the parent has exited: those drain for a while. The
parent decides when it is replaced. Then it sends the next ledger its counts and its ends of the connections, over a
socket pair of their own (`tlstunnel.processes.succession`).

Tested by tests/promises/test_shared_counts.py.
"""

import asyncio
import functools
import gc
import os
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tlstunnel import __version__
from tlstunnel.config import Config, State
from tlstunnel.config.invocation import Invocation
from tlstunnel.config.together import keeps_history, shares_notices
from tlstunnel.errors import ProcessError
from tlstunnel.journal.events import Event
from tlstunnel.journal.lines import count_lost_lines
from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Collected, Registry
from tlstunnel.plans.elsewhere import Sighting, Sightings, choose_sightings, decode_sightings, encode_sightings
from tlstunnel.processes import messages, succession
from tlstunnel.processes.reporting import Reporter
from tlstunnel.processes.role import RoleProcess, run_role
from tlstunnel.program import import_when_needed
from tlstunnel.sockets.readiness import TunnelLoop
from tlstunnel.state.counters import SumCounters
from tlstunnel.state.ended_tags import EndedTag
from tlstunnel.state.memory import MemoryCounters
from tlstunnel.state.server import LedgerServer

if TYPE_CHECKING:  # it needs a library that a ledger without a history does not use
    from tlstunnel.processes.keeper import Keeper

MEMORY = "memory"
"""What `status` shows if the counts are in this process."""

TELL_SECONDS = 1.0
"""How long a command that ends tunnels waits until the server has it."""

ORPHAN_SECONDS = 0.2
"""How often a ledger without a parent looks whether anyone still asks."""


class LedgerProcess(RoleProcess):
    """Runs a `LedgerServer` as the parent's requests say."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(
            sock,
            {
                messages.Begin: self._begin,
                messages.Connect: self._connect,
                messages.HandOver: self._hand_over,
                messages.TakeOver: self._take_over,
                messages.Resume: self._resume,
                messages.LedgerStatus: self._status,
                messages.Stop: self._stop,
                messages.TellEnded: self._tell_ended,
            },
            {
                messages.Sampled: self._sample,
                messages.Delivered: self._publish,
                messages.SeenHere: self._tell_sightings,
            },
        )
        self._metrics = Registry()
        self._metrics.collect(self._collect)
        self._reporter = Reporter(self._metrics, self._link)
        self._valkey: Any = None  # None if the counts are in this process
        self._valkey_started = False
        self._ended_tags: Any = None  # None if this machine is alone
        self._election: Any = None  # None if no machine is elected
        self._is_elected = False
        self._closing_election: asyncio.Future[None] | None = None
        self._closing_ended_tags: asyncio.Future[None] | None = None
        self._server: LedgerServer | None = None
        self._make_keeper: Callable[[], Keeper] | None = None
        self._keeper: Keeper | None = None
        self._closing_keeper: asyncio.Task[None] | None = None
        self._store = MEMORY
        """What has the counts. They are handed over only to a ledger that counts in the same place."""
        self._waiting: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Count until the parent stops it, or until no one is left to ask."""
        await self._wait_for_exit()
        self._stop_keeping(withdraw=True)
        if self._server is not None:
            self._server.close()
        if self._closing_keeper is not None:
            await self._closing_keeper
        if self._election is not None:
            await self._election.close(give_back=True)
        if self._ended_tags is not None:
            await self._ended_tags.close()
        if self._valkey_started:
            await self._valkey.close()
        await self._reporter.close()
        self._close_link()

    @property
    def _begun_server(self) -> LedgerServer:
        if self._server is None:
            raise ProcessError("this process has not received Begin")
        return self._server

    async def _begin(self, request: messages.Begin, _: list[int]) -> messages.Begun:
        invocation = self._introduce(request)
        config = invocation.configuration(request.config)
        state = config.state
        counters: SumCounters
        if state.url is None:
            counters = MemoryCounters()
        else:
            self._store = f"{state.url} {state.prefix}"
            counters = self._valkey = _make_valkey_counters(state, invocation, request.instance, self._report_valkey)
            self._ended_tags = _make_ended_tags(
                state, invocation, request.instance, self._take_ended, self._report_ended_tags
            )
            if shares_notices(config):
                self._election = _make_election(
                    state, invocation, request.instance, self._take_news, self._report_election
                )
        self._server = LedgerServer(counters, report=self._report)
        if keeps_history(config, os.environ):
            self._make_keeper = functools.partial(self._build_keeper, config, invocation, request.instance)
            self._start_keeping()
        self._reporter.start()
        # What was imported stays, so the garbage collector need not look at it again.
        gc.collect()
        gc.freeze()
        return messages.Begun(version=__version__)

    async def _connect(self, request: messages.Connect, descriptors: list[int]) -> messages.Done:
        (descriptor,) = descriptors
        server, name = self._begun_server, _name(request.process)
        server.add(socket.socket(fileno=descriptor), name)
        server.keep_newest(name, 2)  # a process has closed the one before, or does so when it learns of this one
        self._start_valkey()
        return messages.Done()

    async def _hand_over(self, _: messages.HandOver, descriptors: list[int]) -> messages.Done:
        server = self._begun_server
        (descriptor,) = descriptors
        with socket.socket(fileno=descriptor) as sock:
            self._stop_keeping()
            if self._election is not None:  # the next ledger has the lease
                await self._election.close(give_back=False)
            snapshot = await server.pause()
            await asyncio.to_thread(succession.send, sock, self._store, snapshot, server.sockets)
        return messages.Done()

    async def _take_over(self, _: messages.TakeOver, descriptors: list[int]) -> messages.TakenOver:
        server = self._begun_server
        (descriptor,) = descriptors
        with socket.socket(fileno=descriptor) as sock:
            store, snapshot, socks = await asyncio.to_thread(succession.receive, sock)
        if store != self._store:
            for sock in socks:
                sock.close()
            return messages.TakenOver(processes=None)
        try:
            server.restore(snapshot, socks)
        except BaseException:
            server.close()  # nothing was read yet, so the previous ledger can continue
            raise
        self._start_valkey()
        return messages.TakenOver(processes=[_parse_name(one.name) for one in snapshot.connections])

    async def _resume(self, _: messages.Resume, __: list[int]) -> messages.Done:
        server = self._begun_server
        for name in server.names:
            server.keep_newest(name)
        server.resume()
        self._start_keeping()
        if self._election is not None:
            self._election.start()
        return messages.Done()

    async def _status(self, _: messages.LedgerStatus, __: list[int]) -> messages.LedgerLoad:
        stats = self._begun_server.stats()
        return messages.LedgerLoad(
            answering=self._describe_store(),
            connections=stats.connections,
            questions=stats.questions_per_second,
            keys=stats.keys,
            leases=stats.leases,
            metrics=self._metrics.snapshot(),
            history=self._keeper.describe() if self._keeper is not None else None,
            failing=self._valkey is not None and bool(self._valkey.failure),
        )

    def _collect(self) -> Collected:
        """Return what became of the questions, and the lines lost, for a snapshot of the metrics."""
        yield families.LOG_LINES_LOST, (), count_lost_lines()
        if self._server is not None:
            stats = self._server.stats()
            yield families.LEDGER_QUESTIONS, ("answered",), stats.answered
            yield families.LEDGER_QUESTIONS, ("expired",), stats.expired
            yield families.LEDGER_QUESTIONS, ("failed",), stats.failed

    def _sample(self, sampled: messages.Sampled) -> None:
        if self._keeper is not None:
            self._keeper.take(sampled)

    def _build_keeper(self, config: Config, invocation: Invocation, instance: str) -> "Keeper":
        state = config.state
        folder = invocation.folder / state.dir if state.dir is not None else None
        exchange = None
        if state.url is not None:
            exchange = import_when_needed("tlstunnel.state.valkey.samples", "state.url").SharedSamples(
                _parse_url(state, invocation),
                prefix=state.prefix,
                instance=instance,
                report=self._report_machine,
                on_told=self._take_told,
                password_file=state.password_file,
            )
        keeper: type[Keeper] = import_when_needed("tlstunnel.processes.keeper", "the history").Keeper
        return keeper.configured(config, folder, instance, exchange, self._take_lost)

    def _start_keeping(self) -> None:
        """Open the history, if there is one. The ledger before may still have it for a moment."""
        if self._make_keeper is not None and self._keeper is None:
            self._keeper = self._make_keeper()
            self._keeper.start()

    def _stop_keeping(self, *, withdraw: bool = False) -> None:
        """Close the history, so that another ledger can open it."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            self._closing_keeper = asyncio.ensure_future(keeper.close(withdraw=withdraw))

    def _start_valkey(self) -> None:
        """Connect to the server. Not before this ledger answers: the server then forgets the previous one."""
        if self._valkey is not None and not self._valkey_started:
            self._valkey_started = True
            self._valkey.start()
            self._ended_tags.start()
            if self._election is not None:
                self._election.start()

    def _describe_store(self) -> str:
        """Return what has the counts, and why it cannot be reached if that is so."""
        if self._valkey is None:
            return MEMORY
        url = self._store.partition(" ")[0]
        return f"{url} (out of reach: {self._valkey.failure})" if self._valkey.failure else url

    def _report_valkey(self, sentence: str, is_failure: bool) -> None:
        (self._log.warning if is_failure else self._log.info)(Event.COUNTING, reason=sentence)

    def _report_machine(self, instance: str, is_away: bool) -> None:
        if is_away:
            self._log.warning(Event.MACHINE_AWAY, instance=instance)
        else:
            self._log.info(Event.MACHINE_BACK, instance=instance)

    def _take_news(self, news: Any) -> None:
        """Tell the parent what was learned in the election."""
        if bool(news.until) != self._is_elected:
            self._is_elected = bool(news.until)
            self._log.info(Event.ELECTION, elected=self._is_elected)
        self._link.notify(messages.Elected(until=news.until, delivered=list(news.delivered), holder=news.holder))

    async def _tell_ended(self, request: messages.TellEnded, _: list[int]) -> messages.Done:
        if self._ended_tags is None:
            raise ProcessError("there is no server through which other machines could be told (state.url)")
        try:
            await asyncio.wait_for(asyncio.shield(self._ended_tags.tell(request.ended)), TELL_SECONDS)
        except TimeoutError:
            raise ProcessError("the server does not answer; other machines are told once it does") from None
        return messages.Done()

    def _take_ended(self, ended: list[EndedTag]) -> None:
        self._link.notify(messages.TagsEnded(ended=ended))

    def _report_ended_tags(self, sentence: str, is_failure: bool) -> None:
        (self._log.warning if is_failure else self._log.info)(Event.ENDED_TAGS, reason=sentence)

    def _publish(self, delivered: messages.Delivered) -> None:
        if self._election is not None:
            self._election.publish(delivered.deliveries)

    def _tell_sightings(self, seen: messages.SeenHere) -> None:
        if self._keeper is not None:
            self._keeper.tell(encode_sightings(seen.sites))

    def _take_told(self, text: bytes) -> None:
        """Tell the parent what another machine has seen."""
        self._report_sightings(decode_sightings(text))

    def _take_lost(self, tunnels: Mapping[str, int]) -> None:
        """Tell the parent which tunnels are gone with another machine."""
        self._report_sightings(choose_sightings({site: Sighting(lost=number) for site, number in tunnels.items()}))

    def _report_sightings(self, sightings: Sightings) -> None:
        if sightings:
            self._link.notify(messages.SeenElsewhere(sites=sightings))

    def _report_election(self, sentence: str, is_failure: bool) -> None:
        (self._log.warning if is_failure else self._log.info)(Event.ELECTION, reason=sentence)

    def _report(self, sentence: str) -> None:
        self._log.warning(Event.LEDGER, reason=sentence)

    def _handle_sigterm(self) -> None:
        self._leaving = asyncio.ensure_future(self._report_leaving())  # the parent replaces this process

    def _handle_parent_exit(self) -> None:
        # Nothing will be sampled, and the next tunnel needs the file. Other machines would count what was sampled last.
        self._stop_keeping(withdraw=True)
        if self._election is not None:
            self._closing_election = asyncio.ensure_future(self._election.close(give_back=True))
        if self._ended_tags is not None:
            self._closing_ended_tags = asyncio.ensure_future(self._ended_tags.close())
        self._waiting = asyncio.ensure_future(self._wait_for_askers())

    async def _wait_for_askers(self) -> None:
        """Exit once nobody asks any more; at once if another ledger may have taken over, so that never two answer."""
        server = self._server
        while server is not None and not server.paused and server.stats().connections:  # noqa: ASYNC110 - at the end
            await asyncio.sleep(ORPHAN_SECONDS)
        self._exit.set()


VALKEY_SHARE = 0.8
"""The part of `state.timeout` that the server has, so that askers learn its failure before they stop waiting."""


def _make_valkey_counters(
    state: State, invocation: Invocation, instance: str, report: Callable[[str, bool], None]
) -> SumCounters:
    """Return the counters of several machines. Raises ConfigurationError and CertificateError."""
    counters: SumCounters = import_when_needed("tlstunnel.state.valkey.counters", "state.url").ValkeyCounters(
        _parse_url(state, invocation),
        prefix=state.prefix,
        instance=instance,
        timeout=float(state.timeout) * VALKEY_SHARE,
        report=report,
        password_file=state.password_file,
    )
    return counters


def _make_election(
    state: State,
    invocation: Invocation,
    instance: str,
    on_news: Callable[[Any], None],
    report: Callable[[str, bool], None],
) -> Any:
    election = import_when_needed("tlstunnel.state.valkey.election", "state.url")
    return election.Election(
        _parse_url(state, invocation),
        prefix=state.prefix,
        instance=instance,
        on_news=on_news,
        report=report,
        password_file=state.password_file,
        shown=socket.gethostname(),
        lease=election.read_lease(os.environ),
    )


def _make_ended_tags(
    state: State,
    invocation: Invocation,
    instance: str,
    on_ended: Callable[[list[EndedTag]], None],
    report: Callable[[str, bool], None],
) -> Any:
    return import_when_needed("tlstunnel.state.valkey.ended_tags", "state.url").SharedEndedTags(
        _parse_url(state, invocation),
        prefix=state.prefix,
        instance=instance,
        on_ended=on_ended,
        report=report,
        password_file=state.password_file,
    )


def _parse_url(state: State, invocation: Invocation) -> Any:
    """Return the address of the server. Raises ConfigurationError."""
    assert state.url is not None
    folder = invocation.folder / invocation.file.parent if invocation.file is not None else None
    return import_when_needed("tlstunnel.state.valkey.address", "state.url").parse_url(state.url.text, folder)


def _name(process: int) -> str:
    return f"process {process}"


def _parse_name(name: str) -> int:
    return int(name.removeprefix("process "))


def main() -> None:
    """Run as a child of the process that holds the other end of ``--link``."""
    run_role("ledger", LedgerProcess, TunnelLoop)  # half of the cost of a wake-up of asyncio's own loop


if __name__ == "__main__":
    main()
