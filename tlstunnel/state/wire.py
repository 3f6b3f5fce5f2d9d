"""The messages between a serving process, the asker, and the ledger: their types, framing and versions. No I/O.

A frame is the length of its payload (4 bytes, big-endian) and the payload, in MessagePack. The first frame of either
side is a `Hello`, which never changes except that items may be added at its end. An asker's other frames are a `Batch`
each, those of the ledger a list of replies. A side sends all messages of one turn of its event loop in one frame, but
a question at once if no other one waits.
Messages are arrays that begin with a number for their type, so a frame with one question has 70 bytes.

The ledger answers each asker in the version of the asker's `Hello`, because processes of earlier releases serve for as
long as their tunnels last. Whoever changes a message

- may append a field with a default, without a new version: readers ignore the items that they do not know, and use
  the default where there is none. This includes the fields of `LimitCheck` and `LimitResult`;
- for any other change raises `VERSION`, moves the messages as they were into a module for the old version, with a
  `Dialect` that translates from and to the current ones, and lists it in `DIALECTS`, which keeps the two before the
  current one;
- leaves the frames in tests/unit/test_state_wire.py as they are, and adds those of the new version.

Tested by tests/unit/test_state_wire.py.
"""

import struct
from collections.abc import Sequence
from typing import Annotated

import msgspec

from tlstunnel.state.counters import MAX_TUNNELS, Key, LimitCheck, LimitResult

VERSION = 1
"""The version that this release's askers speak."""

MAX_FRAME = 1 << 20
"""The longest payload, in bytes."""

FULL_FRAME = 1 << 16
"""An asker begins another frame beyond so many bytes. Each limit of a question takes some 60."""

MAX_ITEMS = 4_096
"""Messages, checks and keys in a frame of an asker: the ledger handles so many in 20 ms, and others wait meanwhile."""

MAX_WAITING = 1024
"""Questions of one asker that may wait for an answer: 20 000 a second, if each takes 50 ms."""

LEASES_PER_FRAME = 4_000
"""How many keys of a declaration are in one frame, so that it is below `MAX_FRAME`."""

MAX_TOPIC, MAX_TEXT = 64, 4096
"""The longest topic and text of an announcement, in characters."""

MAX_LIFE = 86_400.0
"""The longest time, in seconds, for which the ledger keeps an announcement."""

ANNOUNCEMENTS_PER_FRAME = 16
"""How many announcements are in one frame, so that it is below `MAX_FRAME`."""

_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError)
"""What msgspec raises for a payload that is malformed."""

_LENGTH = struct.Struct(">I")


class WireError(Exception):
    """The other side sent what is not a frame of this protocol. The connection cannot be used any further."""


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """The first frame of either side. With a `refusal`, which is a sentence, the ledger closes the connection."""

    version: int
    refusal: str = ""


Leases = dict[Key, Annotated[int, msgspec.Meta(ge=0, le=MAX_TUNNELS)]]
"""Numbers of open tunnels by their keys."""


# What an asker sends.


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """A question: `Counters.check`. The reply is `Answer` or `Failed`, or none if it is too late."""

    number: int
    checks: list[LimitCheck]


class Count(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """A question: `Counters.count_tunnels`. The reply is `Counted` or `Failed`, or none if it is too late."""

    number: int
    keys: list[Key]


class Return(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """One tunnel under each key has ended."""

    keys: list[Key]


class Take(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """The asker holds more tunnels, which were not asked for: so many under each key."""

    leases: Leases


class Declare(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """The asker holds exactly these tunnels. Answers that it has not yet received take none."""

    leases: Leases


class Announce(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False):
    """A text for all other askers.

    With a `key`, it replaces what was announced with this topic and key, and askers that connect within `seconds` learn
    of it too.
    """

    topic: Annotated[str, msgspec.Meta(max_length=MAX_TOPIC)]
    text: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
    key: Key = ""
    seconds: Annotated[float, msgspec.Meta(ge=0.0, le=MAX_LIFE)] = 0.0


class Probe(msgspec.Struct, frozen=True, array_like=True, tag=7, gc=False):
    """Asks for `Alive`, however late."""


AskerMessage = Ask | Count | Return | Take | Declare | Announce | Probe


class Batch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A frame of an asker. At `deadline`, on CLOCK_MONOTONIC in seconds, it stops waiting for the answers."""

    deadline: float
    messages: list[AskerMessage]


# What the ledger sends.


class Answer(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """The results of an `Ask`; none at all if every check is within its limit."""

    number: int
    results: Sequence[LimitResult] = ()


class Counted(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """The open tunnels that a `Count` asked for."""

    number: int
    tunnels: list[int]


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """A question could not be answered, because the ledger cannot reach what it counts in."""

    number: int
    reason: str


class Alive(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """The reply to `Probe`."""


class Announced(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """A text that another asker announced `age` seconds ago."""

    topic: str
    text: str
    age: Annotated[float, msgspec.Meta(ge=0.0, le=MAX_LIFE)] = 0.0


class Pausing(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False):
    """Another process takes over. Answers may take until `until`, on CLOCK_MONOTONIC in seconds."""

    until: float


class Resumed(msgspec.Struct, frozen=True, array_like=True, tag=7, gc=False):
    """The end of what `Pausing` began."""


LedgerMessage = Answer | Counted | Failed | Alive | Announced | Pausing | Resumed

_encode = msgspec.msgpack.Encoder().encode
_decode_hello = msgspec.msgpack.Decoder(Hello).decode
_decode_batch = msgspec.msgpack.Decoder(Batch).decode
_decode_replies = msgspec.msgpack.Decoder(list[LedgerMessage]).decode


def frame(payload: bytes) -> bytes:
    """Return the frame with this payload."""
    return _LENGTH.pack(len(payload)) + payload


def split(received: bytes) -> tuple[list[bytes], bytes]:
    """Return the payloads of the complete frames in what was received, and the rest.

    Raises WireError for a frame that is too long.
    """
    payloads = []
    start, end = 0, len(received)
    while end - start >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(received, start)
        if length > MAX_FRAME:
            raise WireError(f"a frame of {length} bytes; {MAX_FRAME} is the most")
        first = start + _LENGTH.size
        if end - first < length:
            break
        start = first + length
        payloads.append(received[first:start])
    return payloads, received[start:]


def encode_hello(hello: Hello) -> bytes:
    """Return the frame of a `Hello`."""
    return frame(_encode(hello))


def decode_hello(payload: bytes) -> Hello:
    """Raises WireError."""
    try:
        return _decode_hello(payload)
    except _MALFORMED as error:
        raise WireError(f"not a hello: {error}") from None


def encode_batch(batch: Batch) -> list[bytes]:
    """Return the frame of an asker's messages, or several if one would be too long."""
    payload = _encode(batch)
    if len(payload) <= FULL_FRAME or len(batch.messages) == 1:
        return [frame(payload)]
    middle = len(batch.messages) // 2
    halves = batch.messages[:middle], batch.messages[middle:]
    return [one for half in halves for one in encode_batch(Batch(batch.deadline, half))]


def decode_replies(payload: bytes) -> list[LedgerMessage]:
    """Return the messages in a frame of the ledger. Raises WireError."""
    try:
        return _decode_replies(payload)
    except _MALFORMED as error:
        raise WireError(f"not replies: {error}") from None


class Dialect:
    """How the ledger speaks one version of the protocol: to and from the current messages. This one is the current."""

    def decode_batch(self, payload: bytes) -> Batch:
        """Return the messages in a frame of an asker. Raises WireError."""
        try:
            return _decode_batch(payload)
        except _MALFORMED as error:
            raise WireError(f"not a batch: {error}") from None

    def encode_replies(self, replies: Sequence[LedgerMessage]) -> bytes:
        """Return the frame of these replies. A message that the version does not have is left out."""
        return frame(_encode(replies))


DIALECTS: dict[int, Dialect] = {VERSION: Dialect()}
"""The versions that the ledger speaks."""
