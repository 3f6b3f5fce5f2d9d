"""What a process sees of its connections: suspicious ones, known addresses, lost tunnels, failing origins."""

import json
import zlib

import msgspec
import pytest

from tlstunnel.journal.events import Decision, EndedBy
from tlstunnel.journal.kinds import Kind
from tlstunnel.journal.record import Record
from tlstunnel.plans.addresses import Heavy, merge_reports
from tlstunnel.plans.observer import AGE_SECONDS, LASTING_SECONDS, MOST_REPORTED, Observed, Observer
from tlstunnel.processes.messages import Seen

KEY = b"k" * 32
SITE = "a.test"


class Case:
    """An observer of one site, at a time that the test sets."""

    def __init__(self, *sites: str) -> None:
        self.now = 1000.0
        self.observer = Observer(KEY, sites or (SITE,), lambda: self.now)

    def record(self, client: str = "192.0.2.1", site: str = SITE) -> Record:
        return Record(id="1", peer=client, site=site, verdict=Decision.PASS, started=self.now)

    def run_tunnel(
        self, seconds: float, client: str = "192.0.2.1", ended_by: str = EndedBy.CLIENT, site: str = SITE
    ) -> None:
        record = self.record(client, site)
        self.observer.opened(record)
        record.ended_by = ended_by
        self.observer.ended(record, None, seconds)

    def refuse(self, kind: Kind, client: str = "192.0.2.1", site: str = SITE) -> None:
        self.observer.ended(self.record(client, site), kind, 0.1)

    def take(self) -> Observed | None:
        return self.observer.take().get(SITE)


def count(observed: Observed | None) -> tuple[int, int]:
    assert observed is not None
    figures = merge_reports(KEY, [observed.to_report()])
    return figures.addresses, figures.known


def test_an_ordinary_tunnel_is_nothing() -> None:
    case = Case()
    case.run_tunnel(30.0)
    case.run_tunnel(90.0)
    assert case.take() is None


@pytest.mark.parametrize("kind", ["origin", "declined"])
def test_what_origins_do_is_nobody_elses_doing(kind: Kind) -> None:
    case = Case()
    case.refuse(kind)
    assert case.take() is None


@pytest.mark.parametrize(
    ("kind", "excusable"),
    [("unfinished", 0), ("invalid", 0), ("blocked", 0), ("limited", 1), ("worker", 1)],
)
def test_refusals_are_suspicious(kind: Kind, excusable: int) -> None:
    case = Case()
    case.refuse(kind)
    observed = case.take()
    assert count(observed) == (1, 0)
    assert observed is not None
    assert observed.heavy == (Heavy("192.0.2.1", 1, excusable),)
    assert case.take() is None


def test_connections_without_a_request_and_short_tunnels_are_suspicious() -> None:
    case = Case()
    case.observer.failed(case.record("192.0.2.7"))
    case.run_tunnel(0.9, "192.0.2.8", EndedBy.ORIGIN)
    observed = case.take()
    assert count(observed) == (2, 0)
    assert observed is not None
    assert sorted(observed.heavy) == [Heavy("192.0.2.7", 1, 0), Heavy("192.0.2.8", 1, 1)]
    assert observed.lost == 0


@pytest.mark.parametrize("ended_by", [EndedBy.ORIGIN, EndedBy.TUNNEL])
def test_tunnels_that_we_or_their_origin_end_are_lost(ended_by: str) -> None:
    case = Case()
    case.run_tunnel(5.0, ended_by=ended_by)
    case.run_tunnel(500.0, ended_by=ended_by)
    case.run_tunnel(500.0)
    assert case.take() == Observed(lost=2)
    assert case.take() is None


def test_an_address_is_known_after_a_tunnel_of_a_minute_that_is_still_open() -> None:
    case = Case()
    case.observer.opened(case.record())
    case.now += LASTING_SECONDS
    case.refuse("invalid")
    case.refuse("invalid", "192.0.2.2")
    assert count(case.take()) == (2, 1)


def test_an_address_is_known_at_the_end_of_a_long_tunnel_and_not_of_a_shorter_one() -> None:
    case = Case()
    case.run_tunnel(3600.0, "192.0.2.1")
    case.run_tunnel(59.0, "192.0.2.2")
    case.now += LASTING_SECONDS
    for client in ("192.0.2.1", "192.0.2.2"):
        case.refuse("invalid", client)
    assert count(case.take()) == (2, 1)


def test_addresses_are_known_for_half_a_day_at_least_and_a_day_at_most() -> None:
    case = Case()
    case.run_tunnel(3600.0)
    found = []
    for _ in range(3):
        case.refuse("invalid")
        found.append(count(case.take())[1])
        case.now += AGE_SECONDS
    case.refuse("invalid")
    assert (found, count(case.take())[1]) == ([1, 1, 1], 0)


def test_a_failing_origin_is_reported_once() -> None:
    case = Case()
    case.observer.note_failing(SITE)
    assert case.take() == Observed(failing=True)
    assert case.take() is None


def test_other_sites_and_clients_without_an_address_are_left_out() -> None:
    case = Case()
    case.refuse("invalid", site="")
    case.refuse("invalid", site="b.test")
    case.run_tunnel(0.1, site="b.test")
    case.observer.note_failing("b.test")
    case.refuse("invalid", client="")
    observed = case.take()
    assert observed is not None
    assert (observed.suspicious, observed.heavy) == (b"", ())


def test_sites_that_are_no_longer_wanted_are_forgotten() -> None:
    case = Case()
    case.refuse("invalid")
    case.observer.configure(["b.test"])
    case.refuse("invalid")
    assert case.take() is None


def test_only_the_most_suspicious_sites_are_reported_in_full() -> None:
    sites = [f"{number}.test" for number in range(MOST_REPORTED + 6)]
    case = Case(*sites)
    for number, site in enumerate(sites):
        for _ in range(number + 1):
            case.refuse("invalid", site=site)
    case.run_tunnel(9.0, ended_by=EndedBy.TUNNEL, site="0.test")
    found = case.observer.take()
    assert found.pop("0.test") == Observed(lost=1)
    assert set(found) == set(sites[6:])
    assert all(one.heavy for one in found.values())
    assert case.observer.take() == {}


def test_what_is_no_set_is_refused() -> None:
    with pytest.raises(ValueError, match="incorrect header"):
        Observed(suspicious=b"nonsense").to_report()


def test_a_set_does_not_expand_without_bound() -> None:
    report = Observed(suspicious=zlib.compress(bytes(10_000_000))).to_report()
    assert len(report.suspicious) == 8192


def test_what_was_seen_survives_the_way_to_another_process() -> None:
    case = Case()
    case.refuse("limited", "2001:db8::1")
    case.refuse("invalid")
    case.run_tunnel(9.0, ended_by=EndedBy.TUNNEL)
    seen = Seen(sites=case.observer.take())
    assert msgspec.convert(json.loads(msgspec.json.encode(seen)), Seen) == seen
    assert count(seen.sites[SITE]) == (2, 0)
