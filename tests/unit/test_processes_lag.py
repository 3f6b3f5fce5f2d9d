"""The lag of the loop: measured while someone reads the metrics, and not otherwise."""

import asyncio
import time

import pytest

from tlstunnel.metrics.families import EVENT_LOOP_LAG_SECONDS, SUM
from tlstunnel.metrics.registry import Registry
from tlstunnel.processes import lag
from tlstunnel.processes.lag import LoopLag


def count(metrics: Registry) -> int:
    return sum(value for (bucket,), value in metrics.snapshot()[EVENT_LOOP_LAG_SECONDS].items() if bucket != SUM)


def test_it_is_measured_for_a_while_after_the_metrics_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lag, "SAMPLE_SECONDS", 0.001)
    monkeypatch.setattr(lag, "WATCH_SECONDS", 0.05)

    async def measure() -> None:
        metrics = Registry()
        measured = LoopLag(metrics)
        assert not count(metrics)
        for _ in range(2):
            before = count(metrics)
            measured.watch()
            measured.watch()  # does not measure twice
            while measured.is_measuring:
                await asyncio.sleep(0.005)
            assert count(metrics) > before
        measured.watch()
        measured.close()
        assert not measured.is_measuring

    asyncio.run(measure())


def test_a_pause_of_the_loop_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lag, "SAMPLE_SECONDS", 0.01)

    async def measure() -> None:
        metrics = Registry()
        measured = LoopLag(metrics)
        measured.watch()
        time.sleep(0.2)
        while not count(metrics):
            await asyncio.sleep(0.001)
        measured.close()
        assert metrics.snapshot()[EVENT_LOOP_LAG_SECONDS][SUM,] >= 150_000

    asyncio.run(measure())
