"""The ledger's protocol: frames that never change, and what is not one."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.state import wire
from tlstunnel.state.counters import LimitCheck, LimitResult

BATCH_1 = wire.Batch(
    12.5,
    [
        wire.Ask(1, [LimitCheck("a", 30, 60, "sliding", 5, 60.0, False), LimitCheck("b")]),
        wire.Count(2, ["a", "b"]),
        wire.Return(["a", "a"]),
        wire.Take({"a": 2}),
        wire.Declare({"b": 3}),
        wire.Announce("origin", "10.0.0.1:80"),
        wire.Probe(),
    ],
)
REPLIES_1: list[wire.LedgerMessage] = [
    wire.Answer(1, [LimitResult("limit", 1.5), LimitResult()]),
    wire.Answer(3, []),
    wire.Counted(2, [4, 0]),
    wire.Failed(4, "away"),
    wire.Alive(),
    wire.Announced("origin", "10.0.0.1:80"),
    wire.Pausing(13.0),
    wire.Resumed(),
]

# What askers of version 1 send and understand. These stay as long as the ledger speaks version 1.
HELLO_1 = "00000003 9201a0"
ASKED_1 = """
    00000079 92cb4029000000000000 97
    9301019297a1611e3ca7736c6964696e6705cb404e000000000000c297a1620000a5666978656400cb0000000000000000c3
    93020292a161a162 920392a161a161 920481a16102 920581a16203
    9506a66f726967696eab31302e302e302e313a3830a0cb0000000000000000 9107
"""
REPLIED_1 = """
    0000005f 98
    9301019292a56c696d6974cb3ff800000000000092a0cb0000000000000000 93010390 930202920400 930304a461776179
    9104 9405a66f726967696eab31302e302e302e313a3830cb0000000000000000 9206cb402a000000000000 9107
"""


def parse(text: str) -> bytes:
    """Return the payload of a frame in hexadecimal."""
    (payload,), rest = wire.split(bytes.fromhex(text))
    assert not rest
    return payload


def test_frames_of_version_1_never_change() -> None:
    dialect = wire.DIALECTS[1]
    assert dialect.decode_batch(parse(ASKED_1)) == BATCH_1
    assert dialect.encode_replies(REPLIES_1) == bytes.fromhex(REPLIED_1)
    assert wire.decode_hello(parse(HELLO_1)) == wire.Hello(1)


def test_this_version_sends_and_reads_these_frames() -> None:
    assert wire.VERSION == 1  # a new version has frames of its own here
    assert wire.encode_hello(wire.Hello(1)) == bytes.fromhex(HELLO_1)
    assert wire.encode_batch(BATCH_1) == [bytes.fromhex(ASKED_1)]
    assert wire.decode_replies(parse(REPLIED_1)) == REPLIES_1


def test_fields_that_a_later_release_adds_are_ignored() -> None:
    later = bytes.fromhex("93 04 a0 c0")
    assert wire.decode_hello(later) == wire.Hello(4)
    later = bytes.fromhex("91 93 04 01 02")
    assert wire.decode_replies(later) == [wire.Alive()]


@given(st.lists(st.binary(max_size=300), max_size=5), st.data())
def test_frames_are_found_however_they_arrive(payloads: list[bytes], data: st.DataObject) -> None:
    sent = b"".join(map(wire.frame, payloads))
    received, found = b"", list[bytes]()
    while sent:
        size = data.draw(st.integers(1, len(sent)))
        payloads_now, received = wire.split(received + sent[:size])
        sent = sent[size:]
        found += payloads_now
    assert found == payloads
    assert not received


def test_too_long_a_frame_is_refused_before_it_has_arrived() -> None:
    with pytest.raises(wire.WireError, match="a frame of 1048577 bytes; 1048576 is the most"):
        wire.split((wire.MAX_FRAME + 1).to_bytes(4, "big"))


@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_an_error(payload: bytes) -> None:
    for decode in (
        wire.decode_hello,
        wire.decode_replies,
        *(dialect.decode_batch for dialect in wire.DIALECTS.values()),
    ):
        with contextlib.suppress(wire.WireError):
            decode(payload)


def test_many_messages_are_sent_in_several_frames() -> None:
    returns: list[wire.AskerMessage] = [wire.Return([f"{number:032x}"] * 400) for number in range(16)]
    frames = wire.encode_batch(wire.Batch(1.0, returns))
    assert len(frames) == 4
    assert max(map(len, frames)) <= wire.FULL_FRAME
    batches = [wire.DIALECTS[1].decode_batch(parse(frame.hex())) for frame in frames]
    assert [message for batch in batches for message in batch.messages] == returns
    assert {batch.deadline for batch in batches} == {1.0}


def test_a_full_frame_of_a_declaration_is_not_too_long() -> None:
    leases = {f"{number:032x}": 1 << 20 for number in range(wire.LEASES_PER_FRAME)}
    (frame,) = wire.encode_batch(wire.Batch(1.0, [wire.Declare(leases)]))
    assert len(frame) < wire.MAX_FRAME
