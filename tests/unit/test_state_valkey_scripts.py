"""What scripts are sent, and that nothing but what they return is taken for it."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.state.valkey.scripts import SCRIPTS, decode_numbers, decode_registration

packed = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
).map(msgspec.msgpack.encode)


def test_a_call_names_its_keys() -> None:
    command = SCRIPTS["beat"].build_call([b"a", b"b"], ("holder", []))
    assert command[:2] == (b"EVALSHA", SCRIPTS["beat"].digest)
    assert command[2:5] == (2, b"a", b"b")
    assert msgspec.msgpack.decode(command[5]) == ["holder", []]  # type: ignore[arg-type]
    assert len({script.digest for script in SCRIPTS.values()}) == len(SCRIPTS)


def test_replies_of_the_scripts() -> None:
    secret = "0123456789abcdef" * 2
    assert decode_numbers(msgspec.msgpack.encode([0, 17, 1, 2])) == [0, 17, 1, 2]
    assert decode_registration(msgspec.msgpack.encode([5, secret, "a.1", "a.2"])) == (5, secret, ["a.1", "a.2"])
    assert decode_registration(msgspec.msgpack.encode([5, secret, "\x1b", 7, *["a.1"] * 5000])) == (
        5,
        secret,
        ["a.1"] * 1000,
    )


@given(st.one_of(packed, st.binary(), st.integers(), st.none()))
def test_any_other_reply_is_refused(reply: object) -> None:
    for decode in (decode_numbers, decode_registration):
        try:
            decode(reply)
        except ValueError:
            continue
        assert isinstance(reply, bytes)


@pytest.mark.parametrize("reply", [b"", None, [], msgspec.msgpack.encode([1]), msgspec.msgpack.encode(["a", "b"])])
def test_registration_that_is_incomplete(reply: object) -> None:
    with pytest.raises(ValueError, match=r"reply|Expected|truncated"):
        decode_registration(reply)
