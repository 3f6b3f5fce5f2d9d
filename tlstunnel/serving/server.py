"""One process's tunnels: the accept loop, the cap on unfinished handshakes, the switch of what serves, and the end."""

import asyncio
import contextlib
import errno
import gc
import random
import resource
import socket
from collections.abc import Iterable, Iterator

import structlog

from tlstunnel.addresses import ListenAddress
from tlstunnel.backoff import Backoff
from tlstunnel.config import Config, Timeouts
from tlstunnel.firewall.verdict import Firewall
from tlstunnel.journal.events import Event, Reason
from tlstunnel.journal.journal import Journal
from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Collected
from tlstunnel.sockets.closing import ClosingSockets
from tlstunnel.sockets.deadlines import Deadlines
from tlstunnel.sockets.listeners import BACKLOG, Listener
from tlstunnel.sockets.readiness import readiness
from tlstunnel.tunnel.serving import Serving
from tlstunnel.tunnel.sites import Sites
from tlstunnel.tunnel.splice import Splices
from tlstunnel.tunnel.tunnel import Tunnel

ACCEPTS_A_TURN = 64
"""Connections accepted before those already here go on; what waits longer waits in the kernel's backlog."""

SHARE = 10
"""One address may hold this part of the cap on unfinished handshakes: a tenth."""

PAUSES = Backoff(first=0.005, longest=1.0)
"""Between attempts to accept when out of descriptors or memory. The bounds of Go's net/http."""

RESERVED_DESCRIPTORS = 32
"""Kept for everything that is no connection: listeners, epoll, the resolver's files, a close_notify."""

MAX_DESCRIPTORS = 1 << 20
"""What counts where there is no limit: fs.nr_open of Linux."""

_SHORTAGES = {
    errno.EMFILE: Reason.OUT_OF_DESCRIPTORS,
    errno.ENFILE: Reason.OUT_OF_DESCRIPTORS,
    errno.ENOBUFS: Reason.OUT_OF_MEMORY,
    errno.ENOMEM: Reason.OUT_OF_MEMORY,
}


class Unfinished:
    """Connections whose handshake is not done, oldest first, none of them more than a tenth of one address.

    When there are too many the oldest goes: whoever means it is done in a moment, whoever holds on is the oldest.
    """

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self._all: dict[asyncio.Task[None], str] = {}
        self._by_address: dict[str, dict[asyncio.Task[None], None]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[asyncio.Task[None]]:
        return iter(list(self._all))

    def add(self, task: asyncio.Task[None], address: str) -> asyncio.Task[None] | None:
        """Count `task` for `address` ("" belongs to nobody in particular); give the one that has to go for it."""
        self._all[task] = address
        if address:
            own = self._by_address.setdefault(address, {})
            own[task] = None
            if len(own) > max(self.cap // SHARE, 1):
                return next(iter(own))
        return next(iter(self._all)) if len(self._all) > self.cap else None

    def discard(self, task: asyncio.Task[None]) -> None:
        """Forget `task`: its handshake is done, or it is."""
        address = self._all.pop(task, "")
        if address:
            own = self._by_address[address]
            del own[task]
            if not own:
                del self._by_address[address]


class Server:
    """Serves with `config` and `sites` at the listeners that it is told, until it is told to end. One a process."""

    def __init__(self, config: Config, sites: Sites, firewall: Firewall, journal: Journal) -> None:
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Listener] = []
        self._journal = journal
        self._log = structlog.get_logger()
        self._readiness = readiness(self._loop)
        self._closing = ClosingSockets(self._readiness, self._loop)
        self._splices = Splices(self._closing)
        self._serving = self._make_serving(config, sites, firewall)
        self._unfinished = Unfinished(config.limits.unfinished_handshakes)
        self._accepted = journal.metrics[families.CONNECTIONS_ACCEPTED]
        self._evicted = journal.metrics[families.HANDSHAKES_EVICTED]
        journal.metrics.collect(self._collect)
        self._exchanges: set[asyncio.Task[None]] = set()
        self._connections = 0
        self._max_connections = (_raise_descriptor_limit() - RESERVED_DESCRIPTORS) // 2
        self._pause = 0.0
        self._paused: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        # What was made until now stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()

    @property
    def tunnels(self) -> int:
        """How many there are."""
        return len(self._splices.all)

    @property
    def unfinished(self) -> int:
        """Connections whose handshake is not done yet."""
        return len(self._unfinished)

    def _collect(self) -> Collected:
        """Return what can be read off the tunnels that are open, for a snapshot of the metrics."""
        sites: dict[str, tuple[int, int, int]] = {}
        for splice in self._splices.all:
            tunnels, up, down = sites.get(splice.site, (0, 0, 0))
            sites[splice.site] = tunnels + 1, up + splice.up, down + max(splice.down, 0)
        yield families.UNFINISHED_HANDSHAKES, (), len(self._unfinished)
        for site, (tunnels, up, down) in sites.items():
            yield families.TUNNELS, (site,), tunnels
            yield families.BYTES, (site, "up"), up
            yield families.BYTES, (site, "down"), down

    def _make_serving(self, config: Config, sites: Sites, firewall: Firewall) -> Serving:
        return Serving(
            sites=sites,
            timeouts=config.timeouts,
            trusted_proxies=config.trusted_proxies,
            proxied_on=_list_proxied(config),
            journal=self._journal,
            firewall=firewall,
            loop=self._loop,
            readiness=self._readiness,
            deadlines=Deadlines(self._loop, _choose_precision(config.timeouts, sites.shortest_wait)),
            closing_sockets=self._closing,
            splices=self._splices,
        )

    def accept(self, listeners: Iterable[Listener]) -> None:
        """Accept at these from now on, and at no others."""
        wanted = list(listeners)
        self._watch(self._listeners, on=False)
        self._listeners = wanted
        if self._paused is None:
            self._watch(wanted, on=True)

    def close_listener(self, listener: Listener) -> None:
        """Close `listener`. What waits in its backlog is accepted first, if it is this process's: it would be reset."""
        if listener in self._listeners:
            self._listeners.remove(listener)
            self._loop.remove_reader(listener.sock)
            for _ in range(BACKLOG // ACCEPTS_A_TURN):
                self._accept(listener)
        listener.close()

    def switch(self, config: Config, sites: Sites, firewall: Firewall) -> None:
        """Serve what connects from now on with these.

        Whatever has connected before goes on with what it had, to the end of its tunnel.
        """
        self._serving = self._make_serving(config, sites, firewall)
        self._unfinished.cap = config.limits.unfinished_handshakes
        if config.drain_removed:
            for splice in list(self._splices.all):
                if splice.site not in sites:
                    splice.drain(Reason.SITE_REMOVED)

    async def wait_for_handshakes(self) -> None:
        """Wait until every handshake that has begun by now is done, however it ends."""
        begun = set(self._unfinished)
        # Looked at again: one that becomes a plain exchange goes on, but asks the firewall no more.
        while begun := begun.intersection(self._unfinished):
            await asyncio.wait(begun, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)

    async def drain(self, after: float | None, over: float) -> None:
        """Let the tunnels end for `after` seconds (None: for ever), then end them, spread over `over` seconds.

        Oldest first, at even distances with jitter, so that clients do not all come back at one moment. Connections
        whose handshake is not done yet may finish it, and are ended with the rest. Accepts nothing.
        """
        self.accept(())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(after):
                await self._idle.wait()
        tunnels = list(self._splices.all)
        self._log.info(Event.DRAINING, tunnels=len(tunnels), unfinished=len(self._unfinished), seconds=float(over))
        distance = over / max(len(tunnels), 1)
        for place, splice in enumerate(tunnels):
            self._loop.call_later(distance * (place + random.random()), splice.drain, Reason.DRAINED)  # noqa: S311
        try:
            async with asyncio.timeout(over):
                await self._idle.wait()
        except TimeoutError:
            for splice in list(self._splices.all):
                splice.drain(Reason.DRAINED)
            for task in (*self._unfinished, *self._exchanges):
                self._cancel(task)
            # Each of them ends by itself, or is ended once it has made no progress for `timeouts.close`.
            await self._idle.wait()
        # Bounded as a whole: one that takes a byte now and then would hold the release for as long as it likes.
        deadline = self._loop.time() + self._serving.timeouts.close
        while self._closing.open and self._loop.time() < deadline:  # noqa: ASYNC110 - once, at the end
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        """End everything at once."""
        self.accept(())
        for splice in list(self._splices.all):
            splice.abort(Reason.STOPPED)
        for task in (*self._unfinished, *self._exchanges):
            self._cancel(task)

    async def close(self) -> None:
        """Release everything, once `stop` or `drain` is through."""
        self.stop()
        await self._idle.wait()
        self._closing.reset_all()
        self._splices.close()
        self._readiness.close()

    def _watch(self, listeners: Iterable[Listener], *, on: bool) -> None:
        for listener in listeners:
            if listener.sock.fileno() < 0:
                continue
            if on:
                self._loop.add_reader(listener.sock, self._accept, listener)
            else:
                self._loop.remove_reader(listener.sock)

    def _accept(self, listener: Listener) -> None:
        proxied = self._serving.proxied(listener.written)
        for _ in range(ACCEPTS_A_TURN):
            if self._connections >= self._max_connections:
                return self._pause_accepting(Reason.OUT_OF_DESCRIPTORS)
            try:
                sock, address = listener.sock.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _SHORTAGES:
                    return self._pause_accepting(_SHORTAGES[error.errno])
                continue  # the connection failed before it was accepted (accept(2)); the next may be well
            self._pause = 0.0
            # A connection takes two descriptors, what is being closed has one.
            while (
                self._closing.open and 2 * self._connections + len(self._closing.open) >= 2 * self._max_connections - 1
            ):
                self._closing.reset_oldest()
            self._start_tunnel(sock, address[0] if isinstance(address, tuple) else "", proxied=proxied)

    def _start_tunnel(self, sock: socket.socket, peer: str, *, proxied: bool) -> None:
        self._accepted.add()
        if proxied and peer and peer not in self._serving.trusted_proxies:
            self._journal.not_accepted(peer, Reason.UNTRUSTED_PROXY)
            return sock.close()
        if reason := self._serving.firewall.check_address(peer):
            # Before anything is paid for it: no TLS, no task, and a sample in the log at most.
            self._journal.not_accepted(peer, reason)
            return sock.close()
        sock.setblocking(False)
        tunnel = Tunnel(self._serving, sock, peer, self._loop.time(), proxied=proxied)
        self._connections += 1
        self._idle.clear()
        task = self._loop.create_task(tunnel.run(self._count_ended, self._count_exchange))
        task.add_done_callback(self._unfinished.discard)
        evicted = self._unfinished.add(task, self._to_share_key(peer))
        if evicted is not None:
            self._evicted.add()
            self._unfinished.discard(evicted)
            self._cancel(evicted)

    def _count_exchange(self) -> None:
        """Count the connection of the current task no more among those whose handshake is to be done."""
        task = asyncio.current_task()
        assert task is not None
        self._unfinished.discard(task)
        self._exchanges.add(task)
        task.add_done_callback(self._exchanges.discard)

    def _cancel(self, task: asyncio.Task[None]) -> None:
        """Cancel `task` once it has begun: before, it would run nothing, not even what closes its socket."""
        self._loop.call_soon(task.cancel)

    def _count_ended(self) -> None:
        self._connections -= 1
        if not self._connections:
            self._idle.set()
        self._resume_accepting()

    def _to_share_key(self, peer: str) -> str:
        """What `peer` counts as for its share: its address, an IPv6 /64; nothing for a proxy, behind which many are."""
        trusted = self._serving.trusted_proxies
        if not peer or (trusted and peer in trusted):
            return ""
        if ":" in peer:
            return socket.inet_pton(socket.AF_INET6, peer.partition("%")[0])[:8].hex()
        return peer

    def _pause_accepting(self, reason: Reason) -> None:
        """Accept nothing for a moment, or until a connection has ended: level-triggered, accept would spin."""
        self._pause = PAUSES.after(self._pause)
        self._watch(self._listeners, on=False)
        self._journal.accepting_paused(reason, self._connections)
        self._paused = self._loop.call_later(self._pause, self._resume_accepting)

    def _resume_accepting(self) -> None:
        if self._paused is not None:
            self._paused.cancel()
            self._paused = None
            self._watch(self._listeners, on=True)


def _list_proxied(config: Config) -> frozenset[ListenAddress] | None:
    """The listeners on which a PROXY header is required: None for all of them."""
    if config.proxy_protocol == "off":
        return frozenset()
    return frozenset(config.proxy_protocol_listen) or None


def _choose_precision(timeouts: Timeouts, of_workers: float) -> float:
    """How often deadlines are looked through, seconds: a quarter of a second, or a tenth of the shortest timeout."""
    shortest = min(timeouts.shortest, of_workers)
    return max(min(shortest / 10, 0.25), 0.01)


def _raise_descriptor_limit() -> int:
    """The most descriptors that this process may have: the soft limit, raised to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A hard limit above fs.nr_open cannot be asked for, nor can an infinite one everywhere.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else min(soft, MAX_DESCRIPTORS)
