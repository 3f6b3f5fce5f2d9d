"""The workers of one configuration: loaded with it, set up before it is switched to, and what goes on from the last."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog

from tlstunnel.config import SiteConfig
from tlstunnel.edge.destinations import Destinations
from tlstunnel.edge.loading import Loader
from tlstunnel.edge.stage import Edge
from tlstunnel.edge.thread import EdgeThread
from tlstunnel.edge.worker import Worker
from tlstunnel.errors import ConfigurationError
from tlstunnel.origins.pool import Pool

if TYPE_CHECKING:
    from tlstunnel.origins.tls import OriginTLS

RESPONDS_SECONDS = 2.0
"""What the workers' thread has for one turn at a reload, before its workers are moved to another."""


class Workers:
    """The workers of `sites`. Those that are imported go on from the workers `before`, where nothing of them changed.

    `counted` counts what comes of asking them. To be made in any thread. Raises ConfigurationError.
    """

    def __init__(self, sites: Sequence[SiteConfig], counted: Counter[str], before: "Workers | None" = None) -> None:
        self._counted = counted
        self._before = before
        self._thread: EdgeThread | None = None
        self._mine: set[Worker] = set()
        self._all: dict[tuple[str, str], Worker] = {}
        loader = Loader()
        for index, site in enumerate(sites):
            if site.worker is None:
                continue
            key = (site.worker, repr(site.worker_config))
            if key in self._all:
                continue
            known = before._all.get(key) if before is not None else None
            try:
                code = loader.load(site.worker)
            except ConfigurationError as error:
                self._forget()
                raise ConfigurationError(f"sites[{index}].worker: {error}") from None
            if known is not None and not code.fresh:
                self._all[key] = known
            else:
                worker = self._all[key] = Worker(site.worker, site.worker_config, code)
                self._mine.add(worker)

    def edge(
        self, site: SiteConfig, pools: Sequence[Pool], resolve_every: float, preface: bytes, tls: "OriginTLS | None"
    ) -> Edge | None:
        """The edge of a site with these `pools`, None where it has no worker. The others are as `Pool` has them."""
        if site.worker is None:
            return None
        allowed = Destinations(pools, site.worker_origins, resolve_every=resolve_every, preface=preface, tls=tls)
        return Edge(
            self._all[site.worker, repr(site.worker_config)],
            allowed,
            timeout=site.worker_timeout,
            on_error=site.worker_on_error,
            counted=self._counted,
        )

    def __len__(self) -> int:
        return len(self._all)

    async def start(self) -> None:
        """Set up those that are new, each in its turn. Raises ConfigurationError, with nothing of theirs left."""
        try:
            self._thread = await self._usable_thread() if self._all else None
            for worker in self._all.values():
                if self._thread is not None and worker.thread is not self._thread:
                    await worker.set_up(self._thread)
        except BaseException:
            await self.close()
            raise

    async def _usable_thread(self) -> EdgeThread:
        """The thread of before, as long as nobody holds it; another otherwise."""
        before = self._before
        thread = before._thread if before is not None else None
        if thread is not None and await thread.responds(RESPONDS_SECONDS):
            return thread
        if thread is not None:
            structlog.get_logger().error("edge: the workers' thread is held; another is started", place=thread.place)
            thread.abandon()
        thread = EdgeThread()
        if before is not None:
            before._thread = thread  # what goes on is moved to it, whether this one is switched to or not
        return thread

    def adopt(self) -> None:
        """Take over from the workers of before, which are closed next: what goes on is this one's to end."""
        before = self._before
        if before is None:
            return
        shared = before._mine.intersection(self._all.values())
        self._mine |= shared
        before._mine -= shared
        self._before = None

    async def close(self) -> None:
        """Tear down those that nobody else has, and end the thread that nobody else uses."""
        mine, self._mine = self._mine, set()
        await asyncio.gather(*(worker.tear_down() for worker in mine))
        thread, self._thread = self._thread, None
        if thread is not None and not thread.workers:
            await thread.stop()

    def _forget(self) -> None:
        for worker in self._mine:
            worker.code.forget()
