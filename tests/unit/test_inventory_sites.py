"""The sites of a configuration with what they have used: filtered, sorted and paged, also if there are many."""

import time
from pathlib import Path

import pytest

from tests.harness import assert_below
from tlstunnel.commands.sites import MOST_LISTED, Sites
from tlstunnel.config import Config, decode
from tlstunnel.inventory.sites import SiteIndex, show_name
from tlstunnel.metrics.usage import FIELDS


def configure(*sites: str) -> Config:
    text = "\n".join(f"[[sites]]\n{site}\n" for site in sites)
    return decode(text, Path("/"), "tlstunnel.toml")


def use(**values: int) -> list[int]:
    return [values.get(name, 0) for name in (*FIELDS, "cpu")]


CONFIG = configure(
    'names = ["b.test", "www.b.test"]\norigins = ["127.0.0.1:1"]\nplan = "pro"',
    'names = ["a.test"]\norigins = ["127.0.0.1:1", "127.0.0.1:2"]\nguideline = 7\n[[sites.routes]]\npath = "/x"\n'
    'origins = ["127.0.0.1:3"]',
    'names = ["xn--bcher-kva.test"]\norigins = ["127.0.0.1:1"]\nhttp = "pass"',
)
TOTALS = {
    "a.test": use(tunnels=1, handshakes=9, blocked=2, limited=1, bytes_up=10, bytes_down=20),
    "b.test": use(tunnels=5, handshakes=6),
    "gone.test": use(tunnels=2),
    "past.test": use(handshakes=8),
}


def names(command: Sites) -> list[str]:
    return [site.names[0] for site in SiteIndex(CONFIG).select(command, TOTALS, ())[1]]


def test_a_site_is_reported_with_what_it_has_used() -> None:
    total, sites = SiteIndex(CONFIG).select(Sites(site="a.test"), TOTALS, {"a.test"})
    assert total == 1
    (site,) = sites
    assert (site.names, site.shown, site.tunnels, site.handshakes) == (["a.test"], "a.test", 1, 9)
    assert (site.refused["blocked"], site.refused["limited"], site.refused["origin"]) == (2, 1, 0)
    assert (site.bytes_up, site.bytes_down, site.origins, site.guideline) == (10, 20, 3, 7)
    assert site.throttled
    assert not site.removed


def test_a_site_has_its_plan_and_its_readable_name() -> None:
    _, sites = SiteIndex(CONFIG).select(Sites(), {}, ())
    by_name = {site.names[0]: site for site in sites}
    assert by_name["b.test"].plan.lower() == "pro"
    assert by_name["b.test"].guideline
    assert by_name["xn--bcher-kva.test"].shown == "bücher.test"
    assert by_name["xn--bcher-kva.test"].http == "pass"


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (Sites(), ["a.test", "b.test", "gone.test", "xn--bcher-kva.test"]),
        (Sites(site="www.b.test"), ["b.test"]),
        (Sites(site="c.test"), []),
        (Sites(search="WWW"), ["b.test"]),
        (Sites(search="bücher"), ["xn--bcher-kva.test"]),
        (Sites(search="kva"), ["xn--bcher-kva.test"]),
        (Sites(sort="tunnels"), ["b.test", "gone.test", "a.test", "xn--bcher-kva.test"]),
        (Sites(sort="handshakes", limit=2), ["a.test", "b.test"]),
        (Sites(sort="refused", limit=1, offset=1), ["b.test"]),
        (Sites(sort="bytes", limit=1), ["a.test"]),
        (Sites(limit=1, offset=3), ["xn--bcher-kva.test"]),
        (Sites(limit=-1, offset=-5), []),
    ],
)
def test_sites_are_filtered_sorted_and_paged(command: Sites, found: list[str]) -> None:
    assert names(command) == found


def test_a_removed_site_is_listed_while_it_has_tunnels() -> None:
    _, sites = SiteIndex(CONFIG).select(Sites(), TOTALS, ())
    assert [site.names[0] for site in sites if site.removed] == ["gone.test"]


@pytest.mark.parametrize("name", ["a.test", "*.xn--bcher-kva.test", "xn--.test", "*"])
def test_a_name_that_cannot_be_shown_stays_as_it_is(name: str) -> None:
    assert show_name(name) == name.replace("xn--bcher-kva", "bücher")


def test_ten_thousand_sites_take_little_time() -> None:
    config = configure(*(f'names = ["s{number}.test"]\norigins = ["127.0.0.1:1"]' for number in range(10_000)))
    index = SiteIndex(config)
    totals = {f"s{number}.test": use(tunnels=number, handshakes=number % 7) for number in range(10_000)}

    def measure() -> float:
        began = time.process_time()
        total, sites = index.select(Sites(sort="handshakes", limit=100_000, search="test"), totals, ())
        assert (total, len(sites)) == (10_000, MOST_LISTED)
        return time.process_time() - began

    assert_below(0.1, measure)
