"""The service of one process: loads a configuration, replaces it at a reload while tunnels are open, and drains.

Everything is loaded and checked before anything is switched. This happens in a thread, because ten thousand sites take
seconds and the event loop serves tunnels meanwhile. A reload that fails changes nothing.

Tested by tests/promises/test_reload.py.
"""

import asyncio
import functools
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Self

from tlstunnel.certificates.watch import Watch
from tlstunnel.config.invocation import Invocation
from tlstunnel.escaping import printable
from tlstunnel.journal.journal import Journal
from tlstunnel.journal.logger import structlog
from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Collected
from tlstunnel.origins.metrics import OriginMetrics
from tlstunnel.origins.pool import Pool
from tlstunnel.origins.sharing import EJECTION, Ejected
from tlstunnel.serving.loading import Description, LoadedConfig, load
from tlstunnel.serving.server import Server
from tlstunnel.sockets.listeners import Listener
from tlstunnel.state.counting import Counting
from tlstunnel.tunnel.lifetimes import Lifetimes
from tlstunnel.tunnel.sites import Sites
from tlstunnel.tunnel.splice import Splice

MAX_WARNINGS = 100
"""How many warnings of a configuration are logged one by one; the others are only counted."""


class Service:
    """Serves a configuration in the running loop. Create one with `begin`.

    With `quiet` it logs no warnings, because another process with the same configuration does. `counting` counts for
    the process.
    """

    def __init__(
        self,
        invocation: Invocation,
        journal: Journal,
        loaded: LoadedConfig,
        *,
        counting: Counting,
        quiet: bool = False,
    ) -> None:
        self._invocation = invocation
        self._journal = journal
        self._quiet = quiet
        self._counting = counting
        self._pools: Mapping[str, Pool] = {}
        self._log = structlog.get_logger()
        self._background: set[asyncio.Task[None]] = set()
        self._loaded = loaded
        self._server = Server(loaded.config, loaded.sites, loaded.firewall, journal)
        self._watch = Watch(loaded.sites.certificates, quiet=quiet)
        self._origins = OriginMetrics(journal.metrics)
        journal.metrics.collect(self._collect)
        self._prepared: LoadedConfig | None = None
        self._draining: asyncio.Task[None] | None = None

    @classmethod
    async def begin(
        cls,
        invocation: Invocation,
        text: str | None,
        journal: Journal,
        *,
        quiet: bool = False,
        counting: Counting | None = None,
    ) -> Self:
        """Load the configuration in `text` and start everything it needs, without accepting.

        Raises ConfigurationError.
        """
        counting = Counting(journal.metrics) if counting is None else counting
        loaded = await _load_in_thread(invocation, text, journal, None, counting)
        await loaded.start()
        service = cls(invocation, journal, loaded, counting=counting, quiet=quiet)
        service._count()
        loaded.sites.start()
        service._watch.start()
        service._warn()
        return service

    @property
    def sites(self) -> Sites:
        """The sites that are served."""
        return self._loaded.sites

    def accept(self, listeners: Iterable[Listener]) -> None:
        """Accept at these listeners from now on, and at no others."""
        self._server.accept(() if self.draining else listeners)

    def close_listener(self, listener: Listener) -> None:
        """Accept the connections in the backlog of this listener, then close it."""
        self._server.close_listener(listener)

    async def prepare(self, text: str | None) -> list[str]:
        """Load the configuration in `text` for `commit`; return what changes. Raises ConfigurationError."""
        await self.abandon()
        loaded = await _load_in_thread(self._invocation, text, self._journal, self._loaded, self._counting)
        await loaded.start()
        self._prepared = loaded
        return loaded.describe_changes(self._loaded)

    def commit(self) -> None:
        """Serve new connections with the configuration that was prepared. Open tunnels are not affected."""
        loaded, self._prepared = self._prepared, None
        if loaded is None:
            return
        before, self._loaded = self._loaded, loaded
        loaded.sites.adopt(before.sites)
        if loaded.workers is not None:
            loaded.workers.adopt()
        self._count()
        loaded.sites.start()
        self._watch.switch_to(loaded.sites.certificates)
        self._server.switch(loaded.config, loaded.sites, loaded.firewall)
        self._warn()
        self._run_in_background(self._retire(before))

    async def abandon(self) -> None:
        """Discard the configuration that was prepared."""
        loaded, self._prepared = self._prepared, None
        if loaded is not None:
            await loaded.close()

    def announce_drain(self) -> None:
        """Fail health checks from now on: a shutdown has begun, and connections are still accepted."""
        self._server.announce_drain()

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._draining is not None

    def drain(self, after: float | None, over: float | None, done: Callable[[], None]) -> None:
        """Accept no more. After `after` seconds, end the tunnels over `over` seconds.

        `after` is None for no limit, `over` is None for the configured period. A second call replaces the first. `done`
        is called when no tunnel is left.
        """
        if self._draining is not None:
            self._draining.cancel()
        over = self._loaded.config.release.drain_over if over is None else over
        self._draining = asyncio.ensure_future(self._server.drain(after, over))
        self._draining.add_done_callback(lambda task: None if task.cancelled() else done())

    @property
    def splices(self) -> Iterable[Splice]:
        """The open tunnels."""
        return self._server.splices

    @property
    def tunnels(self) -> int:
        """The number of open tunnels."""
        return self._server.tunnels

    @property
    def unfinished(self) -> int:
        """The number of connections whose handshake is not complete."""
        return self._server.unfinished

    @property
    def lifetimes(self) -> Lifetimes:
        """What ends open tunnels early."""
        return self._server.lifetimes

    async def close(self) -> None:
        """Close everything. Tunnels that are still open end at once."""
        if self._draining is not None:
            self._draining.cancel()
        await self._server.close()
        await self.abandon()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._loaded.close()
        await self._watch.close()
        self._journal.flush()

    async def _retire(self, before: LoadedConfig) -> None:
        """Close the previous configuration once no handshake uses it any more."""
        await self._server.wait_for_handshakes()
        await before.close()

    def _count(self) -> None:
        """Count as the configuration says, and take announcements for its pools."""
        state = self._loaded.config.state
        self._counting.configure(float(state.timeout), state.on_failure)
        self._pools = {pool.key: pool for _, pool in self._loaded.sites.pools}
        for (site, _), pool in self._loaded.sites.pools:
            pool.on_health_change = functools.partial(self._note_health_change, site)
        self._origins.watch(pool for _, pool in self._loaded.sites.pools)
        self._counting.listen(EJECTION, self._take_ejection)
        self._counting.on_joined = self._announce_ejections

    def _collect(self) -> Collected:
        """Return when certificates expire, for a snapshot of the metrics."""
        for certificate, expiry in self._loaded.sites.certificates.find_first_expiries():
            yield families.CERTIFICATE_EXPIRY, (printable(certificate),), expiry

    def _announce_ejections(self) -> None:
        for pool in self._pools.values():
            pool.announce_ejections()

    def _note_health_change(self, site: str) -> None:
        if self._journal.observer is not None:
            self._journal.observer.note_failing(site)

    def _take_ejection(self, text: str, age: float) -> None:
        ejected = Ejected.decode(text)
        pool = self._pools.get(ejected.pool) if ejected is not None else None
        if ejected is not None and pool is not None:
            pool.take_ejection(ejected, age)

    def _warn(self) -> None:
        warnings = [] if self._quiet else self._loaded.warnings()
        for warning in warnings[:MAX_WARNINGS]:
            about = {"site": warning.site} if warning.site else {}
            self._log.warning(warning.kind, **about, hint=warning.hint)
        if len(warnings) > MAX_WARNINGS:
            self._log.warning(warnings[-1].kind, more_sites=len(warnings) - MAX_WARNINGS)

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _load_in_thread(
    invocation: Invocation, text: str | None, journal: Journal, before: LoadedConfig | None, counting: Counting
) -> LoadedConfig:
    """Load in a thread, with a shorter switch interval than Python's 5 ms, which would starve the open tunnels.

    With 10 000 sites, there were 658 round trips per second during a load, 9 426 with 0.5 ms, and 9 023 without a load
    (one run each).
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(min(interval, 0.0005))
    try:
        return await asyncio.to_thread(_load, invocation, text, journal, before, counting)
    finally:
        sys.setswitchinterval(interval)


def _load(
    invocation: Invocation, text: str | None, journal: Journal, before: LoadedConfig | None, counting: Counting
) -> LoadedConfig:
    return load(Description.from_invocation(invocation, text), journal.metrics, before, counting=counting)
