"""A list of tunnels has those that match, in order, whichever processes have them and however many pages it takes."""

import asyncio
import base64
import dataclasses
import json
from collections.abc import Iterator
from typing import Any, cast, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.commands.tunnels import Order, Tunnels, TunnelStatus
from tlstunnel.errors import ControlError
from tlstunnel.journal.journal import Journal
from tlstunnel.journal.record import Record
from tlstunnel.processes.answers.listing import (
    FORGET_SECONDS,
    LOOK_SECONDS,
    Listing,
    Rates,
)
from tlstunnel.processes.pages import Cursor, find_place, join_pages
from tlstunnel.tunnel.open_tunnel import OpenTunnel
from tlstunnel.tunnel.splice import Splice

ORDERS: tuple[Order, ...] = get_args(Order)


@dataclasses.dataclass(eq=False)
class FakeSplice:
    """What a list reads of a splice."""

    about: OpenTunnel
    up: int
    down: int
    draining_since: float = 0.0
    closed: bool = False


def make(number: int, **fields: Any) -> FakeSplice:
    up, down = fields.pop("up", 0), fields.pop("down", 0)
    known: dict[str, Any] = {"id": f"{number:016x}", "peer": "192.0.2.1", "started": 100.0}
    record = Record(**(known | fields))
    return FakeSplice(OpenTunnel(record, Journal(), None, None, lambda: None), up, down)


@st.composite
def tunnels(draw: st.DrawFn) -> list[FakeSplice]:
    """Return tunnels that differ in few ways, so that many are alike."""
    small = st.integers(0, 3)
    found = draw(st.lists(st.tuples(small, small, small, small, small, small), max_size=25))
    return [
        make(
            number,
            site=f"{site}.test",
            peer=f"192.0.2.{client}",
            origin=f"10.0.0.{origin}:1",
            started=100.0 + started,
            tags=(f"user={site}",) if origin else (),
            up=up,
            down=down,
        )
        for number, (site, client, origin, started, up, down) in enumerate(found)
    ]


class Processes:
    """Listings of several processes, asked as the parent asks them."""

    def __init__(self, parts: list[list[FakeSplice]]) -> None:
        self.listings = [Listing(lambda part=part: cast(list[Splice], part)) for part in parts]  # type: ignore[misc]

    async def list(self, command: Tunnels) -> tuple[list[TunnelStatus], str, int]:
        pages = [await listing.list_page(command) for listing in self.listings]
        tunnels, cursor = join_pages(pages, command.sort, command.limit)
        return tunnels, cursor, sum(page.total for page in pages)

    def close(self) -> None:
        for listing in self.listings:
            listing.close()


@given(
    tunnels(),
    st.lists(st.integers(0, 2), min_size=25, max_size=25),
    st.sampled_from(ORDERS),
    st.integers(1, 7),
    st.sampled_from([{}, {"site": "1.test"}, {"client": "192.0.2.2/31"}, {"tag": "user=2"}, {"tag": "user"}]),
)
def test_the_pages_are_the_sorted_union_of_what_matches(
    splices: list[FakeSplice], places: list[int], order: Order, limit: int, filters: dict[str, Any]
) -> None:
    parts: list[list[FakeSplice]] = [[], [], []]
    for splice, place in zip(splices, places, strict=False):
        parts[place].append(splice)

    async def read() -> tuple[list[TunnelStatus], list[TunnelStatus], set[int]]:
        processes = Processes(parts)
        everything, rest, _ = await processes.list(Tunnels(sort="age", limit=1000))
        assert rest == ""
        paged: list[TunnelStatus] = []
        totals = set()
        command = Tunnels(sort=order, limit=limit, **filters)
        while True:
            page, cursor, total = await processes.list(command)
            assert len(page) <= limit
            paged += page
            totals.add(total)
            if not cursor:
                processes.close()
                return everything, paged, totals
            command = Tunnels(sort=order, limit=limit, after=cursor, **filters)

    everything, paged, totals = asyncio.run(read())
    matching = [one for one in everything if _matches(one, filters)]
    assert totals == {len(matching)}
    if order == "rate":  # it falls while the tunnels get older
        assert {one.id for one in paged} <= {one.id for one in matching}
        return
    assert [one.id for one in paged] == [one.id for one in sorted(matching, key=lambda one: find_place(one, order))]


def _matches(tunnel: TunnelStatus, filters: dict[str, str]) -> bool:
    if (tag := filters.get("tag")) is not None:
        return tag in {"user", f"user={tunnel.tags.get('user')}"} and bool(tunnel.tags)
    if "client" in filters:
        return tunnel.client in {"192.0.2.2", "192.0.2.3"}
    return filters.get("site", tunnel.site) == tunnel.site


def read_all(splices: list[FakeSplice], **fields: Any) -> list[TunnelStatus]:
    async def read() -> list[TunnelStatus]:
        processes = Processes([splices])
        found, _, _ = await processes.list(Tunnels(**fields))
        processes.close()
        return found

    return asyncio.run(read())


def test_what_is_busiest_or_largest_is_first() -> None:
    splices = [make(1, up=5, down=50), make(2, up=500, down=0), make(3, up=50, down=1000)]
    for order, ids in (("up", "231"), ("down", "312"), ("rate", "321")):
        assert "".join(one.id[-1] for one in read_all(splices, sort=order)) == ids


def test_two_tunnels_with_the_same_id_are_both_listed() -> None:
    """A trusted proxy may have chosen it."""
    assert len(read_all([make(1), make(1)])) == 2


def test_a_limit_of_nothing_only_counts() -> None:
    async def read() -> tuple[list[TunnelStatus], str, int]:
        processes = Processes([[make(1), make(2)]])
        try:
            return await processes.list(Tunnels(limit=0))
        finally:
            processes.close()

    assert asyncio.run(read()) == ([], "", 2)


def test_a_tunnel_that_ends_while_it_is_listed() -> None:
    """A closed splice has no sides any more."""
    splice = make(1, up=7)

    class Ending(list[FakeSplice]):
        def __iter__(self) -> Iterator[FakeSplice]:
            return super().__iter__()

    async def read() -> list[TunnelStatus]:
        listing = Listing(lambda: cast(list[Splice], Ending([splice])))
        splice.about.record.up = 7
        splice.closed = False
        found = listing._describe(cast(Splice, splice), 200.0, None)
        splice.closed = True
        del splice.up, splice.down
        ended = listing._describe(cast(Splice, splice), 200.0, None)
        page = await listing.list_page(Tunnels())
        assert page.total == 0
        listing.close()
        return [found, ended]

    found, ended = asyncio.run(read())
    assert (found.up, found.draining, ended.up, ended.draining, ended.rate) == (7, False, 7, True, 0.0)


CURSOR = Cursor("age", 1.5, "1f").encode()


def forge(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "=",
        "é",
        "\ud800",
        CURSOR[:-1],
        CURSOR + "AAAA",
        "A" * 5000,
        forge(["age", "text", "1f"]),
        forge(["site", 1.5, "1f"]),
        forge(["up", 1.5, "1f"]),
        forge(["age", None, "1f"]),
        forge(["age", 1.5, 1]),
        forge(["age", 1.5]),
        forge({"order": "age"}),
        forge([[[[["age"]]]]]),
        base64.urlsafe_b64encode(b'["age", NaN, "1f"]').decode(),
        base64.urlsafe_b64encode(b"[" * 1000).decode(),
        base64.urlsafe_b64encode(b"\xff\xfe").decode(),
    ],
    ids=lambda text: ascii(text)[:30],
)
def test_a_forged_cursor_is_refused(text: str) -> None:
    with pytest.raises(ControlError, match="after: not the end of a list"):
        Cursor.decode(text, "age")


@given(st.text())
def test_any_text_is_a_cursor_or_refused(text: str) -> None:
    try:
        Cursor.decode(text, "site")
    except ControlError:
        return


@given(st.sampled_from(ORDERS), st.floats(allow_nan=False, allow_infinity=False), st.text(), st.text())
def test_a_cursor_is_read_as_it_was_written(order: Order, number: float, text: str, name: str) -> None:
    key = text if order in {"site", "client", "origin"} else number
    assert Cursor.decode(Cursor(order, key, name).encode(), order).place == (key, name)


def test_a_place_beyond_all_others_is_the_end_of_the_list() -> None:
    assert read_all([make(1)], after=forge(["age", 1e308, ""])) == []


# --- rates ------------------------------------------------------------------------------------------------------------


class FakeTimer:
    def __init__(self, call: Any) -> None:
        self.call = call

    def cancel(self) -> None:
        self.call = None


class FakeLoop:
    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[FakeTimer] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, call: Any) -> FakeTimer:
        assert seconds == FORGET_SECONDS
        self.timers.append(FakeTimer(call))
        return self.timers[-1]


class Looks:
    """Somebody who looks at one tunnel, which began at 900."""

    def __init__(self) -> None:
        self.loop = FakeLoop()
        self.rates = Rates(cast(Any, self.loop))

    def look(self, now: float, moved: int) -> float:
        self.loop.now = now
        self.rates.begin()
        return self.rates.measure("1f", moved, now, 900.0)


def test_the_first_rate_is_that_since_the_tunnel_began() -> None:
    assert Looks().look(1000.0, 500) == 5.0


def test_a_rate_is_that_since_the_look_before() -> None:
    looks = Looks()
    looks.look(1000.0, 500)
    assert looks.look(1001.0, 600) == 100.0
    assert looks.look(1003.0, 600) == 0.0


def test_looks_of_several_people_do_not_shorten_the_time() -> None:
    looks = Looks()
    looks.look(1000.0, 500)
    looks.look(1001.0, 600)
    assert looks.look(1001.0 + LOOK_SECONDS / 2, 600) == pytest.approx(100 / (1 + LOOK_SECONDS / 2))


def test_another_tunnel_with_the_same_id_has_no_negative_rate() -> None:
    looks = Looks()
    looks.look(1000.0, 500)
    assert looks.look(1001.0, 10) == pytest.approx(10 / 101)


def test_what_was_looked_at_is_forgotten() -> None:
    looks = Looks()
    looks.look(1000.0, 500)
    looks.look(1001.0, 600)
    timers = [timer for timer in looks.loop.timers if timer.call is not None]
    assert len(timers) == 1
    timers[0].call()
    assert (looks.rates._before, looks.rates._latest) == ({}, {})
    assert looks.look(1040.0, 1400) == 10.0
