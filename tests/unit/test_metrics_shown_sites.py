"""Sites that come into view and leave it: no series decreases, and together they increase as all sites do."""

from collections import Counter

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tlstunnel.metrics.families import CONNECTIONS, CONNECTIONS_ACCEPTED, FAMILIES, OTHER, SITE_VALUES, TUNNELS
from tlstunnel.metrics.shown_sites import RANK_SECONDS, ShownSites
from tlstunnel.metrics.snapshot import Labels, Snapshot
from tlstunnel.metrics.usage import FIELDS

WIDTH = len(FIELDS) + 1
COUNTERS = [FAMILIES[name] for name in sorted({family.name for family, _, _ in SITE_VALUES} - {TUNNELS.name})]
SITES = st.sampled_from([f"{letter}.example" for letter in "abcdef"])


def snapshot_of(sites: dict[str, int]) -> Snapshot:
    """Return a snapshot in which everything of a site has this value."""
    return Snapshot(
        {CONNECTIONS.name: [((site, "client", "closed"), value) for site, value in sites.items()]},
        {site: [value] * WIDTH for site, value in sites.items()},
    )


def test_few_sites_are_all_shown() -> None:
    snapshot = snapshot_of({"a.example": 3, "b.example": 4})
    reduced = ShownSites(2).reduce(snapshot)
    assert reduced.sites == snapshot.sites
    assert reduced[CONNECTIONS] == snapshot[CONNECTIONS]


def test_of_many_the_busiest_are_shown_and_the_others_added_up() -> None:
    reduced = ShownSites(2).reduce(snapshot_of({"a.example": 1, "b.example": 40, "c.example": 2, "d.example": 30}))
    assert {site: values[0] for site, values in reduced.sites.items()} == {"b.example": 40, "d.example": 30, OTHER: 3}
    assert reduced[CONNECTIONS][OTHER, "client", "closed"] == 3
    assert reduced[TUNNELS][OTHER,] == 3


def test_without_any_site_in_view_all_are_added_up() -> None:
    reduced = ShownSites(0).reduce(snapshot_of({"a.example": 1, "b.example": 2}))
    assert reduced.sites == {OTHER: [3] * WIDTH}


def test_what_has_no_site_stays_as_it_is() -> None:
    families: dict[str, list[tuple[Labels, int]]] = {
        CONNECTIONS_ACCEPTED.name: [((), 7)],
        CONNECTIONS.name: [(("", "client", "closed"), 2), (("gone.example", "client", "closed"), 3)],
    }
    reduced = ShownSites(2).reduce(Snapshot(families))
    assert reduced[CONNECTIONS_ACCEPTED] == {(): 7}
    assert reduced[CONNECTIONS] == {("", "client", "closed"): 2, (OTHER, "client", "closed"): 3}


def test_a_busier_site_takes_the_place_of_another_after_an_hour() -> None:
    now = [0.0]
    shown = ShownSites(1, lambda: now[0])
    shown.reduce(snapshot_of({"a.example": 100, "b.example": 10}))
    assert "a.example" in shown.reduce(snapshot_of({"a.example": 101, "b.example": 500})).sites
    now[0] = RANK_SECONDS
    reduced = shown.reduce(snapshot_of({"a.example": 102, "b.example": 600}))
    bytes_up = FIELDS.index("bytes_up")
    # What b has counted up to now was among the others; what a has counted by itself does not go there.
    assert {site: values[bytes_up] for site, values in reduced.sites.items()} == {"b.example": 0, OTHER: 601}
    reduced = shown.reduce(snapshot_of({"a.example": 103, "b.example": 700}))
    assert {site: values[bytes_up] for site, values in reduced.sites.items()} == {"b.example": 100, OTHER: 602}


class SitesComeAndGo(RuleBasedStateMachine):
    """The totals of sites grow; some are removed, and what they have counted is one of the others from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.shown = ShownSites(2, lambda: self.now)
        self.usage: dict[str, int] = {}
        self.counted: Counter[str] = Counter()
        self.forgotten = 0
        self.last: dict[tuple[str, tuple[str, ...]], int] = {}
        self.totals: Counter[str] = Counter()

    @rule(site=SITES, amount=st.integers(0, 1000))
    def grow(self, site: str, amount: int) -> None:
        self.usage[site] = self.usage.get(site, 0) + amount
        self.counted[site] += amount

    @precondition(lambda self: self.usage)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        site = data.draw(st.sampled_from(sorted(self.usage)))
        self.forgotten += self.usage.pop(site)

    @rule()
    def wait_an_hour(self) -> None:
        self.now += RANK_SECONDS

    @invariant()
    def nothing_decreases(self) -> None:
        sites = {site: [value] * WIDTH for site, value in self.usage.items()}
        if self.forgotten:
            sites[OTHER] = [0, *[self.forgotten] * (WIDTH - 1)]
        families: dict[str, list[tuple[Labels, int]]] = {
            CONNECTIONS.name: [((site, "client", "closed"), value) for site, value in self.counted.items()]
        }
        snapshot = Snapshot(families, sites)
        reduced = self.shown.reduce(snapshot)
        assert len(reduced.sites.keys() - {OTHER}) == min(len(self.usage), 2)
        now: dict[tuple[str, tuple[str, ...]], int] = {}
        for family in (*COUNTERS, CONNECTIONS):
            found = {(family.name, labels): value for labels, value in reduced[family].items()}
            increase = sum(value - self.last.get(key, 0) for key, value in found.items())
            assert increase == snapshot.total(family) - self.totals[family.name], family.name
            self.totals[family.name] += increase
            now.update(found)
        assert reduced.total(TUNNELS) == snapshot.total(TUNNELS)
        assert all(value >= 0 for value in now.values())
        decreased = {key: value for key, value in now.items() if value < self.last.get(key, 0)}
        assert not decreased
        others = {key for key, value in self.last.items() if key[1][0] == OTHER and value}
        assert others <= now.keys()
        self.last.update(now)


TestSitesComeAndGo = SitesComeAndGo.TestCase
