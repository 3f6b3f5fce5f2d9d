"""Measures how late the timers of a process run: that is how long its event loop is busy with one thing.

It is measured only while someone reads the metrics, because a timer would wake an idle process up.

Tested by tests/unit/test_processes_lag.py.
"""

import asyncio
import time

from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Registry

SAMPLE_SECONDS = 0.25
"""How often it is measured. A pause shorter than that may be missed, as may those of any sampling."""

WATCH_SECONDS = 60.0
"""For how long after the metrics were read."""


class LoopLag:
    """Measures the lag of the running loop, for a minute after each call of `watch`."""

    def __init__(self, metrics: Registry) -> None:
        self._histogram = metrics.histogram(families.EVENT_LOOP_LAG_SECONDS)
        self._until = 0.0
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_measuring(self) -> bool:
        """Whether there is a timer."""
        return self._timer is not None

    def watch(self) -> None:
        """Measure for another minute from now on."""
        self._until = time.monotonic() + WATCH_SECONDS
        if self._timer is None:
            self._plan()

    def close(self) -> None:
        """Measure no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _plan(self) -> None:
        loop = asyncio.get_running_loop()
        self._due = loop.time() + SAMPLE_SECONDS
        self._timer = loop.call_at(self._due, self._measure)

    def _measure(self) -> None:
        self._timer = None
        now = self._histogram.observe_since(self._due)
        if now < self._until:
            self._plan()
