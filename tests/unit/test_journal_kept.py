"""The latest refusals: bounded, and a flood at one site does not displace those of others."""

from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.journal.events import Event
from tlstunnel.journal.kept import KeptRecords
from tlstunnel.journal.record import MAX_FIELD, MAX_PATH, Record


def keep(kept: KeptRecords, site: str, path: str = "/", reason: str = "method", id: str = "") -> Record:  # noqa: A002
    record = Record(id=id, peer="192.0.2.1", site=site, path=path, reason=reason)
    kept.add(Event.CONNECTION, record)
    return record


def test_the_latest_come_first() -> None:
    kept = KeptRecords()
    added = [keep(kept, "a.test") for _ in range(3)]
    assert [one.record for one in kept] == added[::-1]


def test_a_record_without_an_id_gets_one() -> None:
    kept = KeptRecords()
    assert len(keep(kept, "").id) == 16
    assert keep(kept, "", id="given").id == "given"


def test_a_flood_at_one_site_displaces_its_own() -> None:
    kept = KeptRecords(most=10)
    others = [keep(kept, "a.test") for _ in range(3)]
    for _ in range(100):
        keep(kept, "b.test")
    assert len(kept) == 10
    found = [one.record for one in kept]
    assert all(record in found for record in others)


def test_without_a_site_a_flood_of_one_reason_displaces_its_own() -> None:
    kept = KeptRecords(most=10)
    rare = keep(kept, "", reason="tls: socket error: No route to host")
    for _ in range(100):
        keep(kept, "", reason="hello: client closed")
    assert rare in [one.record for one in kept]


def test_long_texts_are_cut() -> None:
    kept = KeptRecords()
    assert len(keep(kept, "a.test", path="/" * 10_000).path) == MAX_PATH


def test_what_the_client_sent_counts_and_is_cut() -> None:
    kept = KeptRecords(most_bytes=10_000)
    for _ in range(20):
        record = Record(id="", peer="192.0.2.1", site="a.test", reason="method", tags=("user=" + "u" * 200,))
        record.take_headers(b"https://" + b"o" * 20_000, b"u" * 20_000)
        assert len(record.raw_web_origin) + len(record.raw_user_agent) < 600
        assert record.user_agent == "u" * 255 + "…" or len(record.user_agent) <= MAX_FIELD
        kept.add(Event.CONNECTION, record)
    assert len(kept) <= 10_000 // 1_400


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 2_000)), max_size=80))
def test_number_and_bytes_are_bounded(added: list[tuple[str, int]]) -> None:
    kept = KeptRecords(most=10, most_bytes=8_000)
    for site, length in added:
        keep(kept, site, path="/" * length)
    assert len(kept) == len(list(kept)) <= min(10, len(added))
    assert sum(one.size for one in kept) <= 8_000
    if added:
        assert next(iter(kept)).record.site == added[-1][0]
