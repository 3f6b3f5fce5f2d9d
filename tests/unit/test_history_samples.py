"""Rows per minute: beside a plain model, over restarts of everything and jumps of the clock."""

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.state.history.samples import (
    MAX_ABSENT,
    MAX_ABSENT_SITES,
    MINUTE,
    NEW_SECONDS,
    Counts,
    Instance,
    Minute,
    Sampler,
    SiteMinute,
    Totals,
    add_counts,
)

START = 1_800_000_000.0


def one(site: str = "a", tunnels: int = 0, *, name: str = "x", age: float = 0, **counts: int) -> list[Instance]:
    return [Instance(name, age, {site: Totals(tunnels, Counts(**counts))})]


def take(sampler: Sampler) -> Minute:
    minute = sampler.take()
    assert minute is not None
    return minute


def test_a_minute_has_the_peak_and_the_sum_of_its_samples() -> None:
    sampler = Sampler()
    assert [sampler.sample(START + second, one(tunnels=second % 7)) for second in range(60)] == [None] * 60
    minute = sampler.sample(START + 60, one())
    assert minute is not None
    assert (minute.time, minute.samples) == (START // 60, 60)
    assert minute.sites == (SiteMinute("a", 6, sum(second % 7 for second in range(60)), Counts()),)
    assert not minute.sites[0].idle
    assert take(sampler).sites[0].idle


def test_several_machines_are_added_up_at_each_moment() -> None:
    """The peaks of two machines at different moments are not the peak of both."""
    sampler = Sampler()
    for first, second in ((10, 1), (2, 9), (5, 5)):
        sampler.sample(START, one(tunnels=first) + one(tunnels=second, name="y"))
    assert take(sampler).sites == (SiteMinute("a", 11, 32, Counts()),)


def test_a_new_instance_counts_from_zero_and_an_old_one_from_now_on() -> None:
    """A history that is switched on after a month does not show the month in its first minute."""
    for age, expected in ((NEW_SECONDS, 500), (NEW_SECONDS + 1, 0)):
        sampler = Sampler()
        sampler.sample(START, one(age=age, bytes_up=500))
        assert take(sampler).sites[0].counts.bytes_up == expected
        sampler.sample(START, one(age=age + 1, bytes_up=507))
        assert take(sampler).sites[0].counts.bytes_up == 7


def test_a_site_that_appears_later_counts_from_zero() -> None:
    sampler = Sampler()
    sampler.sample(START, one("a", age=1000, handshakes=5))
    sampler.sample(START, [Instance("x", 1000, {"a": Totals(0, Counts(5)), "b": Totals(0, Counts(3))})])
    assert {row.site: row.counts.handshakes for row in take(sampler).sites} == {"a": 0, "b": 3}


def test_a_total_that_decreases_has_begun_again() -> None:
    sampler = Sampler()
    for handshakes, short in ((100, 1), (150, 2), (20, 3), (30, 4)):
        sampler.sample(START, one(handshakes=handshakes, short=short))
    assert take(sampler).sites[0].counts == Counts(handshakes=180, short=4)


def test_a_part_of_a_minute_can_be_taken() -> None:
    sampler = Sampler()
    assert sampler.take() is None
    sampler.sample(START, one(tunnels=3))
    assert take(sampler).samples == 1
    assert sampler.take() is None
    sampler.sample(START + 1, one(tunnels=4))
    assert take(sampler).time == START // 60


def test_absent_instances_are_remembered_but_not_for_ever() -> None:
    sampler = Sampler()
    sampler.sample(START, one(name="first", handshakes=10))
    take(sampler)
    for number in range(MAX_ABSENT):
        sampler.sample(START, one(name=str(number), handshakes=1))
        take(sampler)
    sampler.sample(START, one(name="first", age=1e6, handshakes=11))
    assert take(sampler).sites[0].counts.handshakes == 1
    for number in range(MAX_ABSENT + 2):
        sampler.sample(START, one(name=f"other {number}", handshakes=1))
        take(sampler)
    sampler.sample(START, one(name="first", age=1e6, handshakes=12))
    assert take(sampler).sites[0].counts.handshakes == 0, "it was forgotten, so it counts from now on"


def test_sites_that_are_no_longer_listed_are_remembered_but_not_for_ever() -> None:
    sampler = Sampler()
    sites = {str(number): Totals(0, Counts(1)) for number in range(MAX_ABSENT_SITES + 10)}
    sampler.sample(START, [Instance("x", 0, sites)])
    take(sampler)
    sampler.sample(START, [Instance("x", 0, {"new": Totals(0)})])
    assert len(take(sampler).positions["x"]) == MAX_ABSENT_SITES + 1


counts = st.tuples(st.integers(0, 3), st.integers(0, 10**15)).map(lambda pair: Counts(pair[0], bytes_up=pair[1]))
seconds = st.one_of(st.just(1.0), st.integers(-200, 200).map(float), st.sampled_from([-86400.0, 1e8, 0.25]))
samples = st.tuples(
    st.just("sample"), seconds, st.dictionaries(st.sampled_from("ab"), st.tuples(st.integers(0, 9), counts))
)


class Model:
    """A tunnel whose counts are known, the samples that were stored, and those that wait in the sampler."""

    def __init__(self) -> None:
        self.now = START
        self.counted: defaultdict[str, Counts] = defaultdict(Counts)
        self.instance = 0
        self.totals: dict[str, Totals] = {}
        self.waiting: list[tuple[int, dict[str, int]]] = []
        self.stored: list[tuple[int, dict[str, int]]] = []
        self.minutes: list[Minute] = []

    def run(self, sites: dict[str, tuple[int, Counts]], passed: float) -> list[Instance]:
        self.now += passed
        for site in "ab":
            tunnels, more = sites.get(site, (0, Counts()))
            self.counted[site] = add_counts(self.counted[site], more)
            self.totals[site] = Totals(tunnels, add_counts(self.totals.get(site, Totals(0)).counts, more))
        return [Instance(f"run {self.instance}", 0, dict(self.totals))]

    def store(self, minute: Minute | None) -> None:
        if minute is not None:
            self.minutes.append(minute)
            self.stored += self.waiting
            self.waiting = []


@given(st.lists(st.one_of(samples, samples, st.just(("crash",)), st.just(("stop",)), st.just(("restart",)))))
def test_nothing_is_lost_or_counted_twice(steps: list[tuple[object, ...]]) -> None:
    """Whatever is restarted, and wherever the clock jumps: counts are complete; peaks and sums are those of the samples
    that were stored.
    """
    model, sampler = Model(), Sampler()

    def sample(passed: float, sites: dict[str, tuple[int, Counts]]) -> None:
        instances = model.run(sites, passed)
        model.store(sampler.sample(model.now, instances))
        tunnels = {site: totals.tunnels for site, totals in model.totals.items()}
        model.waiting.append((int(model.now // MINUTE), tunnels))

    for step in steps:
        match step:
            case ("sample", float() as passed, dict() as sites):
                sample(passed, sites)
            case ("crash",):  # of the ledger: it starts with what is stored
                positions: dict[str, dict[str, Counts]] = {}
                for minute in model.minutes:
                    positions |= {name: dict(sites) for name, sites in minute.positions.items()}
                sampler, model.waiting = Sampler(positions), []
            case ("stop",):
                model.store(sampler.take())
            case _:  # of the tunnel
                sample(0.0, {})
                model.instance, model.totals = model.instance + 1, {}
                model.store(sampler.take())
    sample(1.0, {})
    model.store(sampler.take())

    counted: defaultdict[str, Counts] = defaultdict(Counts)
    rows: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
    sums: defaultdict[tuple[int, str], int] = defaultdict(int)
    measured: defaultdict[int, int] = defaultdict(int)
    for minute in model.minutes:
        measured[minute.time] += minute.samples
        for row in minute.sites:
            counted[row.site] = add_counts(counted[row.site], row.counts)
            rows[minute.time, row.site].append(row.peak)
            sums[minute.time, row.site] += row.tunnels
    expected: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
    expected_measured: defaultdict[int, int] = defaultdict(int)
    for time, tunnels in model.stored:
        expected_measured[time] += 1
        for site, number in tunnels.items():
            expected[time, site].append(number)
    assert counted == model.counted
    assert measured == expected_measured
    assert {key: max(peaks) for key, peaks in rows.items()} == {key: max(levels) for key, levels in expected.items()}
    assert sums == {key: sum(levels) for key, levels in expected.items()}


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=30))
def test_totals_may_begin_again_within_an_instance(steps: list[tuple[bool, int]]) -> None:
    sampler, total, counted, written = Sampler(), 0, 0, 0
    now = START
    for again, more in steps:
        if again and more < total:  # as long as it can be seen
            total = more
        else:
            total += more
        counted += more
        now += 7
        minute = sampler.sample(now, one(handshakes=total))
        written += sum(row.counts.handshakes for row in minute.sites) if minute else 0
    minute = sampler.take()
    written += sum(row.counts.handshakes for row in minute.sites) if minute else 0
    assert written == counted
