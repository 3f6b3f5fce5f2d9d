"""The overview: rates and percentiles from two moments, as a person would compute them."""

from typing import Any

import msgspec
import pytest

from tlstunnel.admin.overview import MOST_REASONS, Overviews
from tlstunnel.journal.events import Reason
from tlstunnel.metrics import families
from tlstunnel.metrics.families import INFINITE, SUM, Family
from tlstunnel.metrics.snapshot import Snapshot

STATUS: dict[str, Any] = {
    "version": "0.1.0",
    "generation": 2,
    "ending": "",
    "processes": [{"process": 1, "pss_kib": 10}, {"process": 2, "pss_kib": None}],
    "pss_kib": 5,
    "ledger": {"pss_kib": 3},
    "admin": None,
    "shortages": ["memory"],
}


def snapshot(*series: tuple[Family, tuple[str, ...], int]) -> Snapshot:
    values: dict[str, dict[tuple[str, ...], int]] = {}
    for family, labels, value in series:
        values.setdefault(family.name, {})[labels] = value
    return Snapshot.of(values)


def test_the_first_overview_has_totals_and_no_rates() -> None:
    overview = Overviews().add(100.0, snapshot((families.TUNNELS_OPENED, ("a",), 7)), STATUS)
    assert (overview.totals.opened, overview.handshakes_per_second) == (7, 0.0)
    assert (overview.version, overview.generation, overview.shortages) == ("0.1.0", 2, ["memory"])
    assert overview.memory == 18 * 1024
    assert overview.latency == {}


def test_rates_are_those_since_the_last_one() -> None:
    overviews = Overviews()
    overviews.add(100.0, snapshot((families.CONNECTIONS_ACCEPTED, (), 10), (families.BYTES, ("a", "up"), 100)), STATUS)
    overview = overviews.add(
        102.0,
        snapshot(
            (families.CONNECTIONS_ACCEPTED, (), 14),
            (families.TUNNELS_OPENED, ("a",), 3),
            (families.TUNNELS_OPENED, ("b",), 1),
            (families.BYTES, ("a", "up"), 300),
            (families.BYTES, ("b", "down"), 50),
            (families.TUNNELS, ("a",), 5),
        ),
        STATUS,
    )
    assert overview.connections_per_second == 2.0
    assert overview.handshakes_per_second == 2.0
    assert (overview.up_per_second, overview.down_per_second) == (100.0, 25.0)
    assert overview.tunnels == 5


def test_a_counter_that_was_lost_gives_no_negative_rate() -> None:
    overviews = Overviews()
    overviews.add(100.0, snapshot((families.CONNECTIONS_ACCEPTED, (), 10)), STATUS)
    assert overviews.add(101.0, snapshot(), STATUS).connections_per_second == 0.0


@pytest.mark.parametrize("seconds", [11.0, -5.0])
def test_what_is_long_ago_or_in_the_future_gives_no_rate(seconds: float) -> None:
    overviews = Overviews()
    overviews.add(100.0, snapshot(), STATUS)
    overview = overviews.add(100.0 + seconds, snapshot((families.CONNECTIONS_ACCEPTED, (), 1000)), STATUS)
    assert overview.connections_per_second == 0.0


def test_refusals_by_reason_without_those_that_had_a_tunnel() -> None:
    overviews = Overviews()
    overviews.add(100.0, snapshot(), STATUS)
    overview = overviews.add(
        101.0,
        snapshot(
            (families.CONNECTIONS, ("a", "client", str(Reason.CLOSED)), 50),
            (families.CONNECTIONS, ("a", "tunnel", str(Reason.RATE_LIMIT)), 4),
            (families.CONNECTIONS, ("b", "tunnel", str(Reason.RATE_LIMIT)), 1),
            (families.TLS_HANDSHAKES_FAILED, (str(Reason.HELLO_NO_SITE),), 2),
            (families.CONNECTIONS_NOT_ACCEPTED, (str(Reason.ADDRESS_BLOCKED),), 9),
        ),
        STATUS,
    )
    assert [(one.reason, one.per_second, one.total) for one in overview.refused] == [
        ("address blocked", 9.0, 9),
        ("rate limit", 5.0, 5),
        ("hello: no site for this name", 2.0, 2),
    ]
    assert (overview.totals.refused, overview.refused_per_second) == (16, 16.0)


def test_the_list_of_reasons_is_bounded() -> None:
    values: dict[tuple[str, ...], int] = {(str(reason),): 1 for reason in Reason}
    overview = Overviews().add(1.0, Snapshot.of({families.TLS_HANDSHAKES_FAILED.name: values}), STATUS)
    assert len(overview.refused) == MOST_REASONS


def test_percentiles_of_the_last_minute() -> None:
    family = families.HANDSHAKE_STAGE_SECONDS
    overviews = Overviews()

    def at(second: float, **counts: int) -> dict[str, Any]:
        bounds = {"to_100_ms": "0.1", "to_250_ms": "0.25", "to_500_ms": "0.5", "longer": INFINITE, "sum": SUM}
        series = [(family, ("tls", bounds[name]), count) for name, count in counts.items()]
        found = overviews.add(second, snapshot(*series), STATUS).latency
        return {name: msgspec.to_builtins(one) for name, one in found.items()}

    assert at(0.0, to_100_ms=1000) == {}, "what was before is not part of the last minute"
    found = at(1.0, to_100_ms=1000, to_250_ms=10, sum=99)
    assert found == {"tls": {"p50": 0.175, "p90": 0.235, "p99": 0.2485, "count": 10}}
    found = at(59.0, to_100_ms=1000, to_250_ms=10, to_500_ms=10)
    assert found["tls"] == {"p50": 0.25, "p90": 0.45, "p99": 0.495, "count": 20}
    # What is beyond the last bound is shown as that.
    assert at(60.0, to_100_ms=1000, to_250_ms=10, to_500_ms=10, longer=980)["tls"]["p99"] == 10.0
    assert at(200.0, to_100_ms=1000, to_250_ms=10, to_500_ms=10, longer=980) == {}
