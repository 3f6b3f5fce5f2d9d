"""The tunnels of one process: accepts connections, limits unfinished handshakes, switches configurations, drains."""

import asyncio
import contextlib
import errno
import gc
import random
import resource
import socket
from collections import Counter
from collections.abc import Iterable, Iterator

from tlstunnel.addresses import ListenAddress, to_client_key
from tlstunnel.backoff import Backoff
from tlstunnel.config import Config, Timeouts
from tlstunnel.firewall.verdict import Firewall
from tlstunnel.journal.events import Event, Reason
from tlstunnel.journal.journal import Journal
from tlstunnel.journal.logger import structlog
from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Collected
from tlstunnel.sockets.closing import ClosingSockets
from tlstunnel.sockets.deadlines import Deadlines
from tlstunnel.sockets.listeners import BACKLOG, Listener
from tlstunnel.sockets.readiness import readiness
from tlstunnel.tunnel.lifetimes import REMEMBER_SECONDS, Lifetimes
from tlstunnel.tunnel.serving import Availability, Serving
from tlstunnel.tunnel.sites import Sites
from tlstunnel.tunnel.splice import Splice, Splices
from tlstunnel.tunnel.stages import Stages
from tlstunnel.tunnel.tunnel import Tunnel

ACCEPTS_A_TURN = 64
"""How many connections are accepted at once before others get a turn. The rest wait in the kernel's backlog."""

ACCEPTS_WHILE_EXPECTING = 8
"""The same while an answer is expected, see `Readiness.begin_expecting`."""

SHARE = 10
"""One address may have at most a tenth of the unfinished handshakes, and of the connections for uploads."""

PAUSES = Backoff(first=0.005, longest=1.0)
"""The delays between attempts to accept when out of descriptors or memory. The bounds are those of Go's net/http."""

RESERVED_DESCRIPTORS = 32
"""Descriptors kept for other things than connections: listeners, epoll, the resolver's files, a close_notify."""

MAX_DESCRIPTORS = 1 << 20
"""The limit if none is set: fs.nr_open of Linux."""

_SHORTAGES = {
    errno.EMFILE: Reason.OUT_OF_DESCRIPTORS,
    errno.ENFILE: Reason.OUT_OF_DESCRIPTORS,
    errno.ENOBUFS: Reason.OUT_OF_MEMORY,
    errno.ENOMEM: Reason.OUT_OF_MEMORY,
}


class Unfinished:
    """Connections whose handshake is not complete, oldest first, at most a tenth of them from one address.

    When there are too many, the oldest is evicted: an honest client completes its handshake in a moment, so the oldest
    connection is most likely an attacker's.
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
        """Add `task` for `address` ("" is not counted for any address); return the one to evict for it, if any."""
        self._all[task] = address
        return self._count(task, address) or (next(iter(self._all)) if len(self._all) > self.cap else None)

    def move(self, task: asyncio.Task[None], address: str) -> asyncio.Task[None] | None:
        """Count `task` for another address from now on; return the one to evict for it, if any. It stays as old."""
        before = self._all.get(task)
        if before is None or before == address:
            return None
        self._forget(task, before)
        self._all[task] = address
        return self._count(task, address)

    def discard(self, task: asyncio.Task[None]) -> None:
        """Remove `task`, because its handshake is complete or it has ended."""
        self._forget(task, self._all.pop(task, ""))

    def _count(self, task: asyncio.Task[None], address: str) -> asyncio.Task[None] | None:
        if not address:
            return None
        own = self._by_address.setdefault(address, {})
        own[task] = None
        return next(iter(own)) if len(own) > max(self.cap // SHARE, 1) else None

    def _forget(self, task: asyncio.Task[None], address: str) -> None:
        if address:
            own = self._by_address[address]
            del own[task]
            if not own:
                del self._by_address[address]


class Uploads:
    """Plain requests with a body whose response has not begun, at most a tenth of `cap` from one address.

    The newest is refused, not the oldest evicted as with `Unfinished`: it may be a large upload, far advanced.
    """

    def __init__(self, cap: int) -> None:
        self.most = max(cap // SHARE, 1)
        self._addresses: dict[asyncio.Task[None], str] = {}
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._addresses)

    def add(self, task: asyncio.Task[None], address: str) -> bool:
        """Add `task` for `address` ("" is not counted); return whether there was room."""
        if self._counts[address] >= self.most:
            return False
        if address:
            self._addresses[task] = address
            self._counts[address] += 1
        return True

    def discard(self, task: asyncio.Task[None]) -> None:
        """Remove `task`, because its response has begun or it has ended."""
        if address := self._addresses.pop(task, ""):
            self._counts[address] -= 1
            if not self._counts[address]:
                del self._counts[address]


class Server:
    """Serves `config` and `sites` at the listeners given to `accept`, until drained or stopped. One per process."""

    def __init__(self, config: Config, sites: Sites, firewall: Firewall, journal: Journal) -> None:
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Listener] = []
        self._journal = journal
        self._log = structlog.get_logger()
        self._readiness = readiness(self._loop)
        self._closing = ClosingSockets(self._readiness, self._loop)
        self._splices = Splices(self._closing)
        self.lifetimes = Lifetimes(self._splices)
        self._availability = Availability()
        self._stages = Stages(journal.metrics)
        self._serving = self._make_serving(config, sites, firewall)
        self._unfinished = Unfinished(config.limits.unfinished_handshakes)
        self._accepted = journal.metrics[families.CONNECTIONS_ACCEPTED]
        self._evicted = journal.metrics[families.HANDSHAKES_EVICTED]
        journal.metrics.collect(self._collect)
        self._exchanges: set[asyncio.Task[None]] = set()
        self._on_end = self._count_ended  # one bound method for all tunnels, which each of them keeps
        self._connections = 0
        self._max_connections = (_raise_descriptor_limit() - RESERVED_DESCRIPTORS) // 2
        self._uploads = Uploads(self._max_connections)
        self._pause = 0.0
        self._paused: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        # Everything created so far stays, so the garbage collector need not look at it again.
        gc.collect()
        gc.freeze()

    @property
    def tunnels(self) -> int:
        """The number of open tunnels."""
        return len(self._splices.all)

    @property
    def splices(self) -> Iterable[Splice]:
        """The open tunnels, oldest first."""
        return self._splices.all

    @property
    def unfinished(self) -> int:
        """The number of connections whose handshake is not complete."""
        return len(self._unfinished)

    def _collect(self) -> Collected:
        """Return the metrics of this moment, for a snapshot, and note what the open tunnels have moved."""
        sites: dict[str, tuple[int, int, int]] = {}
        for splice in self._splices.all:
            tunnels, up, down = sites.get(splice.site, (0, 0, 0))
            sites[splice.site] = tunnels + 1, up + splice.up, down + max(splice.down, 0)
        usage = self._journal.metrics.usage
        usage.connections, usage.most_connections = self._connections, self._max_connections
        usage.note_open(sites)
        yield families.UNFINISHED_HANDSHAKES, (), len(self._unfinished)
        yield families.OPEN_CONNECTIONS, (), self._connections
        yield families.MOST_OPEN_CONNECTIONS, (), self._max_connections

    def _make_serving(self, config: Config, sites: Sites, firewall: Firewall) -> Serving:
        self.lifetimes.remember_seconds = _bound_handshake(config.timeouts)
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
            lifetimes=self.lifetimes,
            health_addresses=config.health_addresses,
            availability=self._availability,
            stages=self._stages,
        )

    def accept(self, listeners: Iterable[Listener]) -> None:
        """Accept at these listeners from now on, and at no others."""
        new = list(listeners)
        self._watch(self._listeners, on=False)
        self._listeners = new
        if self._paused is None:
            self._watch(new, on=True)

    def close_listener(self, listener: Listener) -> None:
        """Close `listener`. If this process accepts at it, the backlog is accepted first: it would be reset."""
        if listener in self._listeners:
            self._listeners.remove(listener)
            self._loop.remove_reader(listener.sock)
            self._accept(listener, BACKLOG)
        listener.close()

    def switch(self, config: Config, sites: Sites, firewall: Firewall) -> None:
        """Serve new connections with these from now on.

        Connections that are already open keep the previous ones to the end.
        """
        self._serving = self._make_serving(config, sites, firewall)
        self._unfinished.cap = config.limits.unfinished_handshakes
        if config.drain_removed:
            for splice in list(self._splices.all):
                if splice.site not in sites:
                    splice.drain(Reason.SITE_REMOVED)

    async def wait_for_handshakes(self) -> None:
        """Wait until every handshake that has begun by now is complete or has failed."""
        begun = set(self._unfinished)
        # Checked repeatedly: a plain exchange continues, but no longer uses the firewall.
        while begun := begun.intersection(self._unfinished):
            await asyncio.wait(begun, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)

    def announce_drain(self) -> None:
        """Tell load balancers that ask from now on to send no more clients."""
        self._availability.ready = False

    async def drain(self, after: float | None, over: float) -> None:
        """Wait `after` seconds (None: no limit) for the tunnels to end, then end the rest over `over` seconds.

        The oldest come first, at even intervals with jitter, so that clients do not all reconnect at the same moment.
        Unfinished handshakes may complete, and are ended with the rest. Nothing is accepted.
        """
        self.announce_drain()
        self.accept(())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(after):
                await self._idle.wait()
        tunnels = list(self._splices.all)
        self._log.info(Event.DRAINING, tunnels=len(tunnels), unfinished=len(self._unfinished), seconds=float(over))
        interval = over / max(len(tunnels), 1)
        for place, splice in enumerate(tunnels):
            self._loop.call_later(interval * (place + random.random()), splice.drain, Reason.DRAINED)  # noqa: S311
        try:
            async with asyncio.timeout(over):
                await self._idle.wait()
        except TimeoutError:
            for splice in list(self._splices.all):
                splice.drain(Reason.DRAINED)
            for task in (*self._unfinished, *self._exchanges):
                self._cancel(task)
            # Each of them ends, at the latest when it has made no progress for `timeouts.close`.
            await self._idle.wait()
        # Limited in total: a client that reads a byte now and then could delay the exit without limit.
        deadline = self._loop.time() + self._serving.timeouts.close
        while self._closing.open and self._loop.time() < deadline:  # noqa: ASYNC110 - once, at the end
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        """Abort every tunnel and handshake at once."""
        self.accept(())
        for splice in list(self._splices.all):
            splice.abort(Reason.STOPPED)
        for task in (*self._unfinished, *self._exchanges):
            self._cancel(task)

    async def close(self) -> None:
        """Stop, and close everything."""
        self.stop()
        await self._idle.wait()
        self._closing.reset_all()
        self._splices.close()
        self.lifetimes.close()
        self._readiness.close()

    def _watch(self, listeners: Iterable[Listener], *, on: bool) -> None:
        for listener in listeners:
            if listener.sock.fileno() < 0:
                continue
            if on:
                self._loop.add_reader(listener.sock, self._accept_some, listener)
            else:
                self._loop.remove_reader(listener.sock)

    def _accept_some(self, listener: Listener) -> None:
        self._accept(listener, ACCEPTS_WHILE_EXPECTING if self._readiness.expecting else ACCEPTS_A_TURN)

    def _accept(self, listener: Listener, most: int) -> None:
        proxied = self._serving.proxied(listener.written)
        for _ in range(most):
            if self._connections >= self._max_connections:
                return self._pause_accepting(Reason.OUT_OF_DESCRIPTORS)
            try:
                sock, address = listener.sock.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _SHORTAGES:
                    return self._pause_accepting(_SHORTAGES[error.errno])
                continue  # the connection failed before it was accepted (accept(2)); the next one may work
            self._pause = 0.0
            # A connection needs two descriptors, a socket that is being closed one.
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
            # Refused before it costs anything: no TLS, no task, and only a sample of them is logged.
            self._journal.not_accepted(peer, reason)
            return sock.close()
        sock.setblocking(False)
        tunnel = Tunnel(self._serving, sock, peer, self._loop.time(), proxied=proxied)
        self._connections += 1
        self._idle.clear()
        task = self._loop.create_task(tunnel.run(self._on_end, self))
        task.add_done_callback(self._unfinished.discard)
        self._evict(self._unfinished.add(task, self._to_share_key(peer)))

    def _evict(self, task: asyncio.Task[None] | None) -> None:
        if task is not None:
            self._evicted.add()
            self._unfinished.discard(task)
            self._cancel(task)

    def identify(self, ip: str) -> None:
        """Count the unfinished handshake of the current task for its client at `ip`, not for the proxy before it."""
        self._evict(self._unfinished.move(_get_task(), self._to_share_key(ip)))

    def begin_upload(self, ip: str) -> bool:
        """Count the plain request of the current task, from `ip`, as one with a body; return whether there is room."""
        task = _get_task()
        added = self._uploads.add(task, self._to_share_key(ip))
        task.add_done_callback(self._uploads.discard)
        return added

    def begin_exchange(self) -> None:
        """Move the connection of the current task from the unfinished handshakes to the plain exchanges."""
        task = _get_task()
        self._unfinished.discard(task)
        self._exchanges.add(task)
        task.add_done_callback(self._exchanges.discard)

    def begin_response(self) -> None:
        """Count the plain request of the current task no longer as an upload: its response has begun."""
        self._uploads.discard(_get_task())

    def _cancel(self, task: asyncio.Task[None]) -> None:
        """Cancel `task` after it has begun to run. Before, nothing of it would run, not even what closes its socket."""
        self._loop.call_soon(task.cancel)

    def _count_ended(self) -> None:
        self._connections -= 1
        if not self._connections:
            self._idle.set()
        self._resume_accepting()

    def _to_share_key(self, peer: str) -> str:
        """Return what `peer` is counted by for its share: its address, the /64 of IPv6, "" for a trusted proxy."""
        trusted = self._serving.trusted_proxies
        if not peer or (trusted and peer in trusted):
            return ""
        return to_client_key(peer)

    def _pause_accepting(self, reason: Reason) -> None:
        """Accept nothing for a moment, or until a connection ends, because level-triggered readiness would spin."""
        self._pause = PAUSES.after(self._pause)
        self._watch(self._listeners, on=False)
        self._journal.accepting_paused(reason, self._connections)
        self._paused = self._loop.call_later(self._pause, self._resume_accepting)

    def _resume_accepting(self) -> None:
        if self._paused is not None:
            self._paused.cancel()
            self._paused = None
            self._watch(self._listeners, on=True)


def _get_task() -> asyncio.Task[None]:
    task = asyncio.current_task()
    assert task is not None
    return task


def _list_proxied(config: Config) -> frozenset[ListenAddress] | None:
    """Return the listeners that require a PROXY header, None for all of them."""
    if config.proxy_protocol == "off":
        return frozenset()
    return frozenset(config.proxy_protocol_listen) or None


def _choose_precision(timeouts: Timeouts, shortest_of_workers: float) -> float:
    """Return how often deadlines are checked, in seconds: a tenth of the shortest timeout, from 0.01 to 0.25."""
    shortest = min(timeouts.shortest, shortest_of_workers)
    return max(min(shortest / 10, 0.25), 0.01)


def _bound_handshake(timeouts: Timeouts) -> float:
    """Return how many seconds a handshake takes at most, with a minute for the edge worker and what else there is."""
    stages = (timeouts.tls_handshake, timeouts.request, timeouts.origin_connect, timeouts.origin_response)
    return REMEMBER_SECONDS + sum(stages)


def _raise_descriptor_limit() -> int:
    """Raise the soft limit on descriptors to the hard one; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Fails for a hard limit above fs.nr_open, and on some systems for an infinite one.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else min(soft, MAX_DESCRIPTORS)
