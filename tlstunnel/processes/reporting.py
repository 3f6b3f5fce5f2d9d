"""How a child's metrics reach the parent: soon after a change, and once more before it exits.

What open tunnels move changes nothing in the registry, since that would cost each message. So a process that has open
tunnels looks at them now and then.

Tested by tests/promises/test_metrics.py and test_history.py.
"""

import asyncio
import contextlib
import time

from tlstunnel.metrics.registry import Registry
from tlstunnel.processes.link import Link
from tlstunnel.processes.messages import Measured

REPORT_SECONDS = 1.0
"""How long after a change the metrics are sent to the parent. A process that is killed loses as much."""

OPEN_SECONDS = 5.0
"""How often is looked at what open tunnels have moved: 0.3 us of CPU for each."""


class Reporter:
    """Sends the metrics in `registry` to the parent at the other end of `link`, once `start` was called."""

    def __init__(self, registry: Registry, link: Link) -> None:
        self._registry = registry
        self._link = link
        self._started = False
        self._reporting: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None
        self._cpu_at_start = 0
        registry.on_change = self._report_soon

    def start(self) -> None:
        """Report from now on."""
        self._started = True
        self._cpu_at_start = time.process_time_ns()

    async def close(self) -> None:
        """Send the final metrics, and wait a moment until the parent has read them."""
        if not self._started:
            return
        for timer in (self._reporting, self._looking):
            if timer is not None:
                timer.cancel()
        self._report()
        if self._looking is not None:
            self._looking.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPORT_SECONDS):
                while not (self._link.closed or self._link.idle):  # noqa: ASYNC110 - once, at the end
                    await asyncio.sleep(0.01)

    def report_now(self) -> None:
        """Report at once, with what all open tunnels have moved."""
        if self._reporting is not None:
            self._reporting.cancel()
            self._reporting = None
        self._send(moved=True)

    def _report_soon(self) -> None:
        if self._reporting is None:
            self._reporting = asyncio.get_running_loop().call_later(REPORT_SECONDS, self._report)

    def _report(self) -> None:
        self._reporting = None
        if not self._started:
            return
        if not self._link.idle:  # the parent reads nothing: what it has not got must not pile up
            self._report_soon()
            return
        self._send()

    def _send(self, *, moved: bool = False) -> None:
        metrics, usage = self._registry.take_changes(), self._registry.usage
        if moved:
            usage.find_moved()
        sites, are_more = usage.take_changes()
        cpu = (time.process_time_ns() - self._cpu_at_start) // 1000
        self._link.notify(Measured(metrics, sites, cpu, usage.connections, usage.most_connections))
        if are_more:
            self._report_soon()
        if self._looking is None and usage.is_open:
            self._looking = asyncio.get_running_loop().call_later(OPEN_SECONDS, self._look)

    def _look(self) -> None:
        """Report what open tunnels have moved."""
        self._looking = None
        usage = self._registry.usage
        self._registry.look()
        if usage.find_moved():
            self._report_soon()
        elif usage.is_open:
            self._looking = asyncio.get_running_loop().call_later(OPEN_SECONDS, self._look)
