"""How a child's metrics reach the parent: soon after a change, and once more before it exits.

Tested by tests/promises/test_metrics.py.
"""

import asyncio
import contextlib

from tlstunnel.metrics.registry import Registry
from tlstunnel.processes.link import Link
from tlstunnel.processes.messages import Measured

REPORT_SECONDS = 1.0
"""How long after a change the metrics are sent to the parent. A process that is killed loses as much."""


class Reporter:
    """Sends the metrics in `registry` to the parent at the other end of `link`, once `start` was called."""

    def __init__(self, registry: Registry, link: Link) -> None:
        self._registry = registry
        self._link = link
        self._started = False
        self._reporting: asyncio.TimerHandle | None = None
        registry.on_change = self._report_soon

    def start(self) -> None:
        """Report from now on."""
        self._started = True

    async def close(self) -> None:
        """Send the final metrics, and wait a moment until the parent has read them."""
        if not self._started:
            return
        if self._reporting is not None:
            self._reporting.cancel()
        self._report()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPORT_SECONDS):
                while not (self._link.closed or self._link.idle):  # noqa: ASYNC110 - once, at the end
                    await asyncio.sleep(0.01)

    def _report_soon(self) -> None:
        if self._reporting is None:
            self._reporting = asyncio.get_running_loop().call_later(REPORT_SECONDS, self._report)

    def _report(self) -> None:
        self._reporting = None
        if self._started:
            self._link.notify(Measured(metrics=self._registry.snapshot()))
