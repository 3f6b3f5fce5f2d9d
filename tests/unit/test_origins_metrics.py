"""The metrics of origins: failures, ejections, and who is up; of many, the first and those that fail."""

import asyncio

import pytest

from tlstunnel.addresses import OriginAddress
from tlstunnel.config import Ejection, OriginConfig
from tlstunnel.metrics.families import ORIGIN_EJECTIONS, ORIGIN_FAILURES, ORIGIN_TUNNELS, ORIGIN_UP
from tlstunnel.metrics.registry import Registry
from tlstunnel.origins import metrics as origin_metrics
from tlstunnel.origins.metrics import OriginMetrics
from tlstunnel.origins.place import Place
from tlstunnel.origins.pool import Pool

EJECTION = Ejection(failures=2)


def make_pool(*hosts: str) -> Pool:
    return Pool([OriginConfig(address=OriginAddress.parse(f"{host}:80")) for host in hosts], ejection=EJECTION)


def label(host: str) -> tuple[str, str]:
    return f"{host}:80", host


def test_failures_ejections_and_tunnels_of_each_address() -> None:
    async def use() -> None:
        registry, pool = Registry(), make_pool("192.0.2.1", "192.0.2.2")
        OriginMetrics(registry).watch([pool])
        first, second = pool.members
        places = [Place(pool, member, "198.51.100.1") for member in (first, first, second)]
        assert registry.snapshot()[ORIGIN_UP] == {label("192.0.2.1"): 1, label("192.0.2.2"): 1}
        for place in places[:2]:
            place.record_unreachable("refused")
        places[2].record_no_response("closed")
        pool.record_check(second, "status 500")
        pool.record_check(second, "")
        snapshot = registry.snapshot()
        assert snapshot[ORIGIN_UP] == {label("192.0.2.1"): 0, label("192.0.2.2"): 1}
        assert snapshot[ORIGIN_TUNNELS] == {label("192.0.2.1"): 2, label("192.0.2.2"): 1}
        assert snapshot[ORIGIN_FAILURES] == {
            (*label("192.0.2.1"), "unreachable"): 2,
            (*label("192.0.2.2"), "no response"): 1,
            (*label("192.0.2.2"), "health check"): 1,
        }
        assert snapshot[ORIGIN_EJECTIONS] == {label("192.0.2.1"): 1}
        for place in places:
            place.close()
        assert registry.snapshot().total(ORIGIN_TUNNELS) == 0

    asyncio.run(use())


def test_the_failures_of_a_single_origin_are_counted_too() -> None:
    async def use() -> None:
        registry, pool = Registry(), make_pool("192.0.2.1")
        OriginMetrics(registry).watch([pool])
        place = Place(pool, pool.members[0], "198.51.100.1")
        place.record_no_response("closed")
        place.close()
        assert registry.snapshot().total(ORIGIN_FAILURES, reason="no response") == 1

    asyncio.run(use())


def test_of_many_origins_the_first_are_shown_and_those_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin_metrics, "MOST_ORIGINS", 2)

    async def use() -> None:
        registry, pools = Registry(), [make_pool(f"192.0.2.{number}") for number in range(1, 7)]
        watched = OriginMetrics(registry)
        watched.watch(pools)

        def shown() -> dict[str, int]:
            return {host: up for (_, host), up in registry.snapshot()[ORIGIN_UP].items()}

        assert shown() == {"192.0.2.1": 1, "192.0.2.2": 1}
        for pool in pools[3:]:
            for _ in range(EJECTION.failures):
                pool.record_unreachable(pool.members[0], "refused")
        assert shown() == {"192.0.2.1": 1, "192.0.2.2": 1, "192.0.2.4": 0, "192.0.2.5": 0}
        watched.watch(pools)  # after a reload
        assert shown() == {"192.0.2.1": 1, "192.0.2.2": 1, "192.0.2.4": 0, "192.0.2.5": 0}
        for pool in pools[3:]:
            pool.record_connected(pool.members[0])
        assert shown() == {"192.0.2.1": 1, "192.0.2.2": 1}

    asyncio.run(use())
