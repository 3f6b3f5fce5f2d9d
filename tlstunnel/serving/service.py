"""What one process serves: how it is made, how it is replaced while tunnels run, and how it ends.

What is served is made whole and checked before anything is switched (`load`), off the loop that serves tunnels: ten
thousand sites take seconds. A change that fails changes nothing.
"""

import asyncio
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from tlstunnel.certificates import CERTIFICATES, issue
from tlstunnel.certificates.watch import Watch
from tlstunnel.config import Config, SiteConfig
from tlstunnel.config.invocation import Invocation, sites_to_serve, uses_test_certificate
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.verdict import Firewall
from tlstunnel.journal.events import Event
from tlstunnel.journal.journal import Journal
from tlstunnel.metrics.registry import Registry
from tlstunnel.program import is_package_replaced
from tlstunnel.serving.changes import changes
from tlstunnel.serving.server import Server
from tlstunnel.sockets.listeners import Listener
from tlstunnel.tunnel.sites import Sites, load_sites

if TYPE_CHECKING:
    from tlstunnel.edge.workers import Workers

REPLACED = (
    "edge workers need modules that this process has not imported yet, and the package on the disk was replaced since"
    " it was started: tlstunnel upgrade goes on with what is there now"
)

UNVERIFIED = (
    "whoever is on the way to them can read and change everything; give origin_ca instead of origin_verify = off"
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything that serving takes, whole and checked."""

    config: Config
    configured: tuple[SiteConfig, ...]
    sites: Sites
    firewall: Firewall
    workers: "Workers | None" = None

    async def start(self) -> None:
        """Start what runs beside. Raises ConfigurationError, with nothing of it running."""
        await self.firewall.start()
        try:
            if self.workers is not None:
                await self.workers.start()
        except BaseException:
            await self.firewall.close()
            raise

    async def close(self) -> None:
        """End it, but for what another goes on with."""
        await self.firewall.close()
        await self.sites.close()
        if self.workers is not None:
            await self.workers.close()


def load(wanted: Invocation, config: Config, metrics: Registry, before: Loaded | None = None) -> Loaded:
    """Make what `config` describes, going on with what there is of `before`.

    Raises ConfigurationError or CertificateError.
    """
    configured = sites_to_serve(wanted, config)
    try:
        counters = before.firewall.counters if before is not None else None
        firewall = Firewall(config, configured, metrics=metrics, counters=counters)
        workers = load_workers(configured, metrics, before.workers if before is not None else None)
    except ConfigurationError as error:
        raise ConfigurationError(f"{wanted.file}: {error}") from None
    test_pair = None
    try:
        if uses_test_certificate(configured):
            test = issue.ensure(CERTIFICATES)
            test_pair = test.cert, test.key
        sites = load_sites(
            configured,
            test_pair,
            before.sites if before is not None else None,
            resolve_every=config.resolve_interval,
            workers=workers,
        )
    except BaseException:
        if workers is not None:
            workers.forget()
        raise
    return Loaded(config, configured, sites, firewall, workers)


def load_workers(
    configured: Iterable[SiteConfig], metrics: Registry, before: "Workers | None" = None
) -> "Workers | None":
    """The edge workers of these sites, None where there is none and was none. Raises ConfigurationError."""
    configured = tuple(configured)
    if before is None and not any(site.worker for site in configured):
        return None
    if "tlstunnel.edge.workers" not in sys.modules and is_package_replaced():
        raise ConfigurationError(REPLACED)
    # It brings a library that tunnels without a worker do without.
    from tlstunnel.edge.workers import Workers as Made  # noqa: PLC0415

    return Made(configured, metrics, before)


class Service:
    """Serves what `wanted` asks for, in the running loop. Told by whoever holds the listening sockets."""

    def __init__(self, wanted: Invocation, journal: Journal, *, quiet: bool = False) -> None:
        self._wanted = wanted
        self._journal = journal
        self._quiet = quiet
        self._log = structlog.get_logger()
        self._beside: set[asyncio.Task[Any]] = set()
        self._prepared: Loaded | None = None
        self._end: asyncio.Task[None] | None = None

    async def begin(self, text: str | None) -> None:
        """Load, and be ready without accepting. Raises ConfigurationError or CertificateError."""
        loaded = await self._load_beside(text, None)
        await loaded.start()
        self._loaded = loaded
        self._server = Server(loaded.config, loaded.sites, loaded.firewall, self._journal)
        loaded.sites.start()
        self._watch = Watch(loaded.sites.certificates, quiet=self._quiet)
        self._watch.start()
        self._warn()

    def accept(self, listeners: Iterable[Listener]) -> None:
        """Accept at these from now on, and at no others."""
        self._server.accept(() if self.ending else listeners)

    def leave(self, listener: Listener) -> None:
        """Close this one, having accepted what waits there."""
        self._server.leave(listener)

    async def prepare(self, text: str | None) -> list[str]:
        """Load again, to switch to it by `commit`; give what is different. Raises what `load` raises."""
        await self.abandon()
        loaded = await self._load_beside(text, self._loaded)
        await loaded.start()
        self._prepared = loaded
        return [*changes(self._loaded.config, loaded.config), *loaded.sites.certificates.complaints()]

    def commit(self) -> None:
        """Serve what connects from now on with what was prepared. No tunnel is touched."""
        loaded, self._prepared = self._prepared, None
        if loaded is None:
            return
        before, self._loaded = self._loaded, loaded
        loaded.sites.adopt(before.sites)
        if loaded.workers is not None:
            loaded.workers.adopt()
        loaded.sites.start()
        self._watch.follow(loaded.sites.certificates)
        self._server.switch(loaded.config, loaded.sites, loaded.firewall)
        self._warn()
        self._begin(self._retire(before))

    async def abandon(self) -> None:
        """Forget what was prepared."""
        loaded, self._prepared = self._prepared, None
        if loaded is not None:
            await loaded.close()

    @property
    def ending(self) -> bool:
        """Whether `end` was called."""
        return self._end is not None

    def end(self, linger: float | None, over: float | None, done: Callable[[], None]) -> None:
        """Accept no more and end the tunnels, spread over `over` seconds (None: as configured), after `linger`.

        Earlier where an earlier end was to be later. `done` is called when there is none any more.
        """
        if self._end is not None:
            self._end.cancel()
        over = self._loaded.config.release.drain_over if over is None else over
        self._end = asyncio.ensure_future(self._server.finish(linger, over))
        self._end.add_done_callback(lambda task: None if task.cancelled() else done())

    def status(self) -> dict[str, int]:
        """What there is of what costs."""
        return {"tunnels": self._server.tunnels, "handshakes": self._server.unfinished}

    async def close(self) -> None:
        """Release everything; what is left of tunnels ends at once."""
        if self._end is not None:
            self._end.cancel()
        await self._server.close()
        await self.abandon()
        await asyncio.gather(*self._beside, return_exceptions=True)
        await self._loaded.close()
        await self._watch.close()

    async def _load_beside(self, text: str | None, before: Loaded | None) -> Loaded:
        """Load in a thread. With Python's 5 ms for each turn of a thread, tunnels would get a tenth of theirs.

        10 000 sites: 658 round trips a second meanwhile, 9 426 with 0.5 ms, of 9 023 without a load (one run each).
        """
        interval = sys.getswitchinterval()
        sys.setswitchinterval(min(interval, 0.0005))
        try:
            return await asyncio.to_thread(self._load, text, before)
        finally:
            sys.setswitchinterval(interval)

    def _load(self, text: str | None, before: Loaded | None) -> Loaded:
        config = self._wanted.configuration(text)
        return load(self._wanted, config, self._journal.metrics, before)

    async def _retire(self, before: Loaded) -> None:
        """Close what was served with before once nobody asks it any more."""
        await self._server.handshakes_done()
        await before.close()

    def _warn(self) -> None:
        for site in () if self._quiet else self._loaded.configured:
            if site.origin_verify == "off":
                self._log.warning(Event.ORIGINS_NOT_VERIFIED, site=site.names[0], hint=UNVERIFIED)

    def _begin(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)
