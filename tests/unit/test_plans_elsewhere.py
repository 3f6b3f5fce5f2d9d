"""What machines tell each other of a minute: it is bounded, understood or ignored, and has no addresses."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.plans import elsewhere as module
from tlstunnel.plans.elsewhere import MAX_BYTES, Sighting, add_sightings, decode_sightings, encode_sightings

NUMBERS = st.integers(0, 1 << 53)
SIGHTINGS = st.builds(Sighting, NUMBERS, st.booleans(), NUMBERS, NUMBERS, NUMBERS)


@given(st.dictionaries(st.text(max_size=20), SIGHTINGS, max_size=5))
def test_what_is_told_is_understood(sites: dict[str, Sighting]) -> None:
    assert decode_sightings(encode_sightings(sites)) == {name: one for name, one in sites.items() if one}


def test_the_sites_with_most_to_tell_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SITES", 2)
    sites = {"a": Sighting(lost=3), "b": Sighting(failing=True), "c": Sighting(heavy=9), "d": Sighting()}
    assert list(decode_sightings(encode_sightings(sites))) == ["c", "a"]


def test_what_is_told_of_most_sites_is_short_enough() -> None:
    most = 1 << 53
    sites = {f"{number:0253}": Sighting(most, True, most, most, most) for number in range(module.MOST_SITES)}
    text = encode_sightings(sites)
    assert len(text) <= MAX_BYTES
    assert decode_sightings(text) == sites


@pytest.mark.parametrize("told", [{"a": [-1]}, {"a": [1 << 60]}, {"a": ["x"]}, {1: [1]}, [], {"a": {"lost": 1}}])
def test_what_is_not_understood_is_ignored(told: object) -> None:
    assert decode_sightings(msgspec.msgpack.encode(told)) == {}
    assert decode_sightings(b"\x80" * (MAX_BYTES + 1)) == {}


def test_a_release_that_tells_less_is_understood() -> None:
    assert decode_sightings(msgspec.msgpack.encode({"a": [7]})) == {"a": Sighting(7)}


@given(st.binary(max_size=100))
def test_any_bytes_are_understood_or_ignored(text: bytes) -> None:
    assert all(isinstance(one, Sighting) for one in decode_sightings(text).values())


def test_machines_are_added_up() -> None:
    one, two = Sighting(3, True, 10, 4, 0), Sighting(1, False, 5, 9, 200)
    assert add_sightings([one, two]) == Sighting(4, True, 15, 9, 200)
    assert not add_sightings([])
