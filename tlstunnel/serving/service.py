"""What one process serves: how it is loaded, how a reload replaces it while tunnels run, and how it ends.

Everything is loaded and checked before anything is switched, in a thread beside the loop that serves tunnels: ten
thousand sites take seconds. A change that fails changes nothing.
"""

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Self

import structlog

from tlstunnel.certificates.watch import Watch
from tlstunnel.config.invocation import Invocation
from tlstunnel.journal.journal import Journal
from tlstunnel.serving.changes import describe_changes
from tlstunnel.serving.loading import Description, LoadedConfig, load
from tlstunnel.serving.server import Server
from tlstunnel.sockets.listeners import Listener

MAX_WARNINGS = 100
"""Warnings of one configuration that get a line of their own; the rest is a number."""


class Service:
    """Serves a configuration in the running loop. The holder of the listening sockets controls it.

    `begin` creates one. `quiet` leaves warnings to another process, which has the same configuration.
    """

    def __init__(self, invocation: Invocation, journal: Journal, loaded: LoadedConfig, *, quiet: bool = False) -> None:
        self._invocation = invocation
        self._journal = journal
        self._quiet = quiet
        self._log = structlog.get_logger()
        self._background: set[asyncio.Task[None]] = set()
        self._loaded = loaded
        self._server = Server(loaded.config, loaded.sites, loaded.firewall, journal)
        self._watch = Watch(loaded.sites.certificates, quiet=quiet)
        self._prepared: LoadedConfig | None = None
        self._draining: asyncio.Task[None] | None = None

    @classmethod
    async def begin(cls, invocation: Invocation, text: str | None, journal: Journal, *, quiet: bool = False) -> Self:
        """Load the configuration in `text` and be ready, without accepting. Raises ConfigurationError."""
        loaded = await _load_in_thread(invocation, text, journal, None)
        await loaded.start()
        service = cls(invocation, journal, loaded, quiet=quiet)
        loaded.sites.start()
        service._watch.start()
        service._warn()
        return service

    def accept(self, listeners: Iterable[Listener]) -> None:
        """Accept at these listeners from now on, and at no others."""
        self._server.accept(() if self.draining else listeners)

    def close_listener(self, listener: Listener) -> None:
        """Accept the connections that wait at this listener, then close it."""
        self._server.close_listener(listener)

    async def prepare(self, text: str | None) -> list[str]:
        """Load the configuration in `text` for `commit`; return what is different. Raises ConfigurationError."""
        await self.abandon()
        loaded = await _load_in_thread(self._invocation, text, self._journal, self._loaded)
        await loaded.start()
        self._prepared = loaded
        return [*describe_changes(self._loaded.config, loaded.config), *loaded.sites.certificates.complaints()]

    def commit(self) -> None:
        """Serve new connections with what was prepared. Open tunnels are not touched."""
        loaded, self._prepared = self._prepared, None
        if loaded is None:
            return
        before, self._loaded = self._loaded, loaded
        loaded.sites.adopt(before.sites)
        if loaded.workers is not None:
            loaded.workers.adopt()
        loaded.sites.start()
        self._watch.switch_to(loaded.sites.certificates)
        self._server.switch(loaded.config, loaded.sites, loaded.firewall)
        self._warn()
        self._run_in_background(self._retire(before))

    async def abandon(self) -> None:
        """Discard what was prepared."""
        loaded, self._prepared = self._prepared, None
        if loaded is not None:
            await loaded.close()

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._draining is not None

    def drain(self, after: float | None, over: float | None, done: Callable[[], None]) -> None:
        """Accept no more and end the tunnels, spread over `over` seconds (None: as configured), after `after`.

        Earlier where an earlier end was to be later. `done` is called when there is none any more.
        """
        if self._draining is not None:
            self._draining.cancel()
        over = self._loaded.config.release.drain_over if over is None else over
        self._draining = asyncio.ensure_future(self._server.drain(after, over))
        self._draining.add_done_callback(lambda task: None if task.cancelled() else done())

    def status(self) -> dict[str, int]:
        """Return how many tunnels and unfinished handshakes there are."""
        return {"tunnels": self._server.tunnels, "handshakes": self._server.unfinished}

    async def close(self) -> None:
        """Release everything; tunnels that are still open end at once."""
        if self._draining is not None:
            self._draining.cancel()
        await self._server.close()
        await self.abandon()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._loaded.close()
        await self._watch.close()

    async def _retire(self, before: LoadedConfig) -> None:
        """Close the previous configuration once no handshake uses it any more."""
        await self._server.wait_for_handshakes()
        await before.close()

    def _warn(self) -> None:
        warnings = [] if self._quiet else self._loaded.warnings()
        for warning in warnings[:MAX_WARNINGS]:
            self._log.warning(warning.kind, site=warning.site, hint=warning.hint)
        if len(warnings) > MAX_WARNINGS:
            self._log.warning(warnings[-1].kind, more_sites=len(warnings) - MAX_WARNINGS)

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _load_in_thread(
    invocation: Invocation, text: str | None, journal: Journal, before: LoadedConfig | None
) -> LoadedConfig:
    """Load in a thread. With Python's 5 ms for each turn of a thread, tunnels would get a tenth of their time.

    With 10 000 sites: 658 round trips a second during a load, 9 426 with 0.5 ms, 9 023 without a load (one run each).
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(min(interval, 0.0005))
    try:
        return await asyncio.to_thread(_load, invocation, text, journal, before)
    finally:
        sys.setswitchinterval(interval)


def _load(invocation: Invocation, text: str | None, journal: Journal, before: LoadedConfig | None) -> LoadedConfig:
    return load(Description.from_invocation(invocation, text), journal.metrics, before)
