"""Traffic of single clients, as it is in reality: what is called abuse, and what is not.

Each connection is simulated: when it begins, from which address, how long it lasts and how it ends. A process observes
them (`Observer`), and each minute is judged (`AbuseWatch`), with the default thresholds.
"""

import heapq
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from tlstunnel.config.usage import Abuse
from tlstunnel.journal.events import EndedBy
from tlstunnel.journal.kinds import Kind
from tlstunnel.journal.record import Record
from tlstunnel.plans.abuse import AbuseWatch, Suspicion, to_attempts
from tlstunnel.plans.addresses import AddressFigures, merge_reports
from tlstunnel.plans.observer import SHORT_SECONDS, Observer
from tlstunnel.state.history.samples import Counts

KEY = b"k" * 32
SITE = "a.test"
HOUR = 60
"""Minutes."""


class Connection(NamedTuple):
    """A connection: `kind` is None if it has a tunnel, which ends after `seconds`."""

    begin: float
    client: str
    seconds: float = 0.1
    kind: Kind | None = None
    ended_by: EndedBy = EndedBy.CLIENT


Traffic = Iterator[Connection]


def judge(connections: list[Connection], minutes: int) -> list[Suspicion | None]:
    """Return what is suspected in each minute."""
    now = [0.0]
    observer = Observer(KEY, [SITE], lambda: now[0])
    watch = AbuseWatch(Abuse())
    ends: list[tuple[float, int, Connection, Record]] = []
    waiting = sorted(connections)
    place = 0
    found = []
    for minute in range(minutes):
        counts = dict.fromkeys(Counts._fields, 0)
        until = (minute + 1) * 60.0
        while place < len(waiting) and waiting[place].begin < until:
            one = waiting[place]
            place += 1
            end_others(observer, now, ends, counts, one.begin)
            now[0] = one.begin
            record = Record(id="1", peer=one.client, site=SITE, started=one.begin)
            if one.kind is None:
                counts["handshakes"] += 1
                observer.opened(record)
                heapq.heappush(ends, (one.begin + one.seconds, place, one, record))
            else:
                counts[one.kind] += 1
                (observer.failed(record) if one.kind == "unfinished" else observer.ended(record, one.kind, 0.1))
        end_others(observer, now, ends, counts, until)
        now[0] = until
        seen = observer.take().get(SITE)
        figures = merge_reports(KEY, [seen.to_report()]) if seen is not None else AddressFigures()
        lost, failing = (seen.lost, seen.failing) if seen is not None else (0, False)
        attempts = to_attempts(Counts(**counts), figures, lost=lost, origin_failing=failing)
        found.append(watch.observe({SITE: attempts}).get(SITE))
    return found


def end_others(
    observer: Observer,
    now: list[float],
    ends: list[tuple[float, int, Connection, Record]],
    counts: dict[str, int],
    until: float,
) -> None:
    """End the tunnels that end before this time."""
    while ends and ends[0][0] < until:
        end, _, one, record = heapq.heappop(ends)
        now[0] = end
        record.ended_by = one.ended_by
        counts["short"] += one.seconds < SHORT_SECONDS
        observer.ended(record, None, one.seconds)


def name(number: int) -> str:
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"


def use(clients: int, minutes: int, choose: Callable[[int], str] = name, seed: int = 1) -> Traffic:
    """People with a tunnel for some minutes, one after another."""
    chance = random.Random(seed)
    for client in range(clients):
        at = chance.uniform(0, 300)
        while at < minutes * 60:
            seconds = chance.expovariate(1 / 600)
            yield Connection(at, choose(client), seconds)
            at += seconds + chance.expovariate(1 / 60)


def come_back(clients: int, drained: float, first: float, longest: float, busy: float) -> Traffic:
    """Clients whose tunnels, an hour old, end within 30 s. Each tries again with a back-off, in vain while `busy`."""
    chance = random.Random(2)
    for client in range(clients):
        end = drained + chance.uniform(0, 30)
        yield Connection(end - 3600, name(client), 3600, ended_by=EndedBy.TUNNEL)
        at, delay = end + chance.uniform(0, first), first
        while at < drained + busy:
            yield Connection(at, name(client), kind=chance.choice(["unfinished", "limited"]))
            at += chance.uniform(0.5, 1) * delay
            delay = min(delay * 2, longest)
        yield Connection(at, name(client), 3600)


@pytest.mark.parametrize(("first", "longest"), [(1.0, 30.0), (1.0, 1.0), (0.2, 5.0)], ids=str)
def test_a_reconnect_storm_with_back_off(first: float, longest: float) -> None:
    """1 000 clients after a drain; the machine has no room for them for two minutes."""
    storm = list(come_back(1000, 4000, first, longest, busy=120))
    assert set(judge(storm, 2 * HOUR)) == {None}


@pytest.mark.parametrize("strict", [False, True])
def test_a_thousand_clients_behind_one_address(strict: bool) -> None:
    """One in ten of them is quick to go, and a rate limit refuses some; also right after a start."""
    chance = random.Random(3)
    traffic = list(use(1000, HOUR, lambda _: "192.0.2.1"))
    for _ in range(20 * 60 * HOUR):
        at = chance.uniform(0, 60 * HOUR)
        traffic.append(Connection(at, "192.0.2.1", 0.4, "limited" if strict and chance.random() < 0.5 else None))
    assert set(judge(traffic, HOUR)) == {None}


def test_pages_that_are_opened_and_closed() -> None:
    """Readers who were never here before: a tunnel for each page, one in six of which is left within a second."""
    chance = random.Random(4)
    traffic = []
    for client in range(40 * 60 * 60):  # it begins within half an hour, as when a link becomes popular
        at = chance.uniform(0, 60 * 60) if client % 2 else chance.uniform(60 * 20, 60 * 60)
        traffic.append(Connection(at, name(client % 150_000), chance.expovariate(1 / 8) + 0.05))
        if chance.random() < 0.17:
            traffic.append(Connection(at, name(client % 150_000), chance.uniform(0.05, 0.9)))
    assert set(judge(traffic, HOUR)) == {None}


@pytest.mark.parametrize("probes", [1, 15])
@pytest.mark.parametrize("kind", ["unfinished", "invalid", None])
def test_probes_each_second(probes: int, kind: Kind | None) -> None:
    """Of a monitoring, or of load balancers: connections only, requests that are no handshakes, or short tunnels."""
    traffic = [
        Connection(at + probe / 20, f"198.51.100.{probe}", 0.05, kind)
        for at in range(3600 * 3)
        for probe in range(probes)
    ]
    assert set(judge(traffic, 3 * HOUR)) == {None}


@pytest.mark.parametrize("kind", ["unfinished", "invalid", "blocked", None])
@pytest.mark.parametrize(("addresses", "rate"), [(1, 50), (20, 100), (3000, 50), (3000, 15)])
def test_floods_are_suspected_within_five_minutes(addresses: int, rate: int, kind: Kind | None) -> None:
    """And it is over ten minutes after them, at a site that 100 people use."""
    chance = random.Random(5)
    traffic = list(use(100, 2 * HOUR))
    for _ in range(rate * 600):
        client = (
            f"203.0.{chance.randrange(addresses) >> 8}.{chance.randrange(addresses) & 255}" if addresses > 1 else "x"
        )
        traffic.append(Connection(chance.uniform(3600, 4200), client, 0.2, kind))
    found = judge(traffic, 2 * HOUR)
    assert found[:60] == [None] * 60
    assert all(found[65:70])
    assert set(found[82:]) == {None}


def test_a_flood_during_ordinary_use_of_many_is_suspected() -> None:
    """5 000 people, with a flood that is as large as their own connections."""
    chance = random.Random(6)
    traffic = list(use(5000, 2 * HOUR))
    traffic += [
        Connection(chance.uniform(3600, 4200), f"203.0.{chance.randrange(12)}.{chance.randrange(250)}", kind="blocked")
        for _ in range(30 * 600)
    ]
    found = judge(traffic, 2 * HOUR)
    assert found[:60] == [None] * 60
    assert all(found[65:70])
