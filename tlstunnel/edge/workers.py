"""The workers of one configuration: load them, set them up, and take over those that have not changed.

Tested by tests/promises/test_edge_reload.py.
"""

import asyncio
import gc
from collections.abc import Sequence

from tlstunnel.config import SiteConfig
from tlstunnel.config.problems import Problems
from tlstunnel.edge.destinations import Destinations
from tlstunnel.edge.loading import Loader
from tlstunnel.edge.stage import Edge
from tlstunnel.edge.thread import EdgeThread
from tlstunnel.edge.worker import Worker
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.metrics.registry import Registry
from tlstunnel.origins.pool import Pool
from tlstunnel.origins.tls import OriginTLS

RESPONSE_SECONDS = 2.0
"""How long the workers' thread may take to respond at a reload, before the workers move to a new thread."""


class Workers:
    """The workers of `sites`. Imported workers keep their environment of `before`, unless their configuration changed.

    `metrics` count the outcomes of calls. May be created in any thread. Raises InvalidConfiguration with the problem
    of every worker that cannot be loaded.
    """

    def __init__(self, sites: Sequence[SiteConfig], metrics: Registry, before: "Workers | None" = None) -> None:
        self._metrics = metrics
        self._before = before
        self._thread: EdgeThread | None = None
        self._by_key: dict[tuple[str, str], Worker] = {}
        self._continued: list[tuple[Worker, Worker]] = []
        self._loader = Loader()
        problems = Problems()
        for index, site in enumerate(sites):
            if site.worker is None or _worker_key(site) in self._by_key:
                continue
            with problems.collect("sites", index, "worker"):
                self._by_key[_worker_key(site)] = Worker(
                    site.worker, site.worker_config, self._loader.load(site.worker)
                )
        if problems.found:
            self.discard()
            problems.raise_found()

    def discard(self) -> None:
        """Discard what was loaded, without having started it."""
        self._by_key = {}
        self._loader.discard()

    def build_edge(
        self, site: SiteConfig, pools: Sequence[Pool], resolve_every: float, preface: bytes, tls: OriginTLS | None
    ) -> Edge | None:
        """Return the edge of a site with these `pools`, None if it has no worker. The others are those of `Pool`."""
        if site.worker is None:
            return None
        allowed = Destinations(pools, site.worker_origins, resolve_every=resolve_every, preface=preface, tls=tls)
        return Edge(
            self._by_key[_worker_key(site)],
            allowed,
            timeout=site.worker_timeout,
            on_error=site.worker_on_error,
            metrics=self._metrics,
        )

    async def start(self) -> None:
        """Set up the new workers, one after another. Raises ConfigurationError, after everything has been undone."""
        try:
            self._thread = thread = await self._usable_thread() if self._by_key else None
            for key, worker in self._by_key.items():
                assert thread is not None
                known = (
                    self._before._by_key.get(key) if self._before is not None and not worker.code.module_name else None
                )
                if known is not None and known.thread is thread:
                    worker.continue_from(known)
                    self._continued.append((worker, known))
                else:
                    await worker.set_up(thread)
        except BaseException:
            await self.close()
            raise

    async def _usable_thread(self) -> EdgeThread:
        """Return the thread of the previous configuration if it responds, else a new one."""
        thread = self._before._thread if self._before is not None else None
        if thread is None or not thread.usable:
            return EdgeThread()
        if await thread.responds(RESPONSE_SECONDS):
            return thread
        # The previous workers keep it: this configuration may still be refused.
        structlog.get_logger().error(Event.EDGE_THREAD_REPLACED, place=thread.place)
        return EdgeThread()

    def adopt(self) -> None:
        """Take over the environments that are kept. The caller closes the previous workers next."""
        for worker, previous in self._continued:
            worker.take_over(previous)
        self._continued = []
        self._before = None

    async def close(self) -> None:
        """Tear down the environments that it owns, and stop the thread if no other configuration uses it."""
        self._continued = []
        self._before = None
        await asyncio.gather(*(worker.tear_down() for worker in self._by_key.values()))
        executed = any(worker.code.module_name for worker in self._by_key.values())
        self._by_key = {}
        if executed:
            # A module and its functions refer to each other, and keep what the import has read: perhaps a hundred
            # megabytes at each reload. Takes 4 ms for each 1 000 tunnels of the process.
            gc.collect()
        thread, self._thread = self._thread, None
        if thread is not None and not thread.workers:
            await thread.stop()


def _worker_key(site: SiteConfig) -> tuple[str, str]:
    """Return what sites with the same worker have in common."""
    assert site.worker is not None
    return site.worker, site.worker_config.canonical
