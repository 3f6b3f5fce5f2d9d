"""The workers of one configuration: loaded with it, set up before it is switched to, and what goes on from the last."""

import asyncio
import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog

from tlstunnel.config import SiteConfig
from tlstunnel.config.problems import Problems
from tlstunnel.edge.destinations import Destinations
from tlstunnel.edge.loading import Loader
from tlstunnel.edge.stage import Edge
from tlstunnel.edge.thread import EdgeThread
from tlstunnel.edge.worker import Worker
from tlstunnel.journal.events import Event
from tlstunnel.metrics.registry import Registry
from tlstunnel.origins.pool import Pool

if TYPE_CHECKING:
    from tlstunnel.origins.tls import OriginTLS

RESPONSE_SECONDS = 2.0
"""What the workers' thread has for one turn at a reload, before its workers are moved to another."""


class Workers:
    """The workers of `sites`. Imported workers continue from those of `before` where nothing about them has changed.

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
        """Discard what was loaded, if it is never started."""
        self._by_key = {}
        self._loader.discard()

    def build_edge(
        self, site: SiteConfig, pools: Sequence[Pool], resolve_every: float, preface: bytes, tls: "OriginTLS | None"
    ) -> Edge | None:
        """The edge of a site with these `pools`, None where it has no worker. The others are as `Pool` has them."""
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
        """Set up those that are new, each in its turn. Raises ConfigurationError, with nothing of theirs left."""
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
        """The thread of before, as long as nobody holds it; another otherwise."""
        thread = self._before._thread if self._before is not None else None
        if thread is None or not thread.usable:
            return EdgeThread()
        if await thread.responds(RESPONSE_SECONDS):
            return thread
        # It goes on to be theirs who have it: whether this configuration is switched to or not is not known yet.
        structlog.get_logger().error(Event.EDGE_THREAD_REPLACED, place=thread.place)
        return EdgeThread()

    def adopt(self) -> None:
        """Take over from the workers of before, which are closed next: what goes on is this one's to end."""
        for worker, known in self._continued:
            worker.take_over(known)
        self._continued = []
        self._before = None

    async def close(self) -> None:
        """Tear down those that nobody else has, and end the thread that nobody else uses."""
        self._continued = []
        self._before = None
        await asyncio.gather(*(worker.tear_down() for worker in self._by_key.values()))
        executed = any(worker.code.module_name for worker in self._by_key.values())
        self._by_key = {}
        if executed:
            # A module and its functions hold each other, and with them whatever it has read at its import, which may be
            # a hundred megabytes at each reload. 4 ms for each 1 000 tunnels of the process.
            gc.collect()
        thread, self._thread = self._thread, None
        if thread is not None and not thread.workers:
            await thread.stop()


def _worker_key(site: SiteConfig) -> tuple[str, str]:
    """What makes the worker of another site the same."""
    assert site.worker is not None
    return site.worker, site.worker_config.canonical
