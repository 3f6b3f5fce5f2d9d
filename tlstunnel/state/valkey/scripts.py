"""The scripts that run in the server, and what they are sent and return.

A script gets one argument and returns one string, both msgpack: a request costs the client less than half as much as
with an argument for each number.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from typing import Final, Literal, Self

import msgspec

from tlstunnel.escaping import printable, shorten

ScriptName = Literal["check", "register", "beat", "tunnels", "count", "elect", "ended"]

_LATEST: Final = 1 << 53
"""The time in microseconds from which on numbers of Lua, which are floats, are not exact: the year 2255."""

_SECRET: Final = re.compile(r"[0-9a-f]{32}")
_HOLDER: Final = re.compile(r"[0-9A-Za-z.]{1,100}")
_LONGEST_SHOWN: Final = 100
"""Characters of how a machine is shown."""

_MOST: Final = 1_000
"""Replaced holders. There is one for each connection of the last 45 s."""

_FOLDER = Path(__file__).parent
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[int | str]).decode
_decode_numbers = msgspec.msgpack.Decoder(list[int]).decode


@dataclass(frozen=True, slots=True)
class Script:
    """A script, and by which digest the server knows it (EVALSHA)."""

    source: bytes
    digest: bytes

    @classmethod
    def make(cls, source: bytes) -> Self:
        """Return a script with its digest."""
        return cls(source, sha1(source, usedforsecurity=False).hexdigest().encode("ascii"))

    def build_call(self, keys: Sequence[bytes], request: object) -> tuple[bytes | int, ...]:
        """Return the command that runs it."""
        return (b"EVALSHA", self.digest, len(keys), *keys, _encode(request))


def load_script(name: ScriptName) -> Script:
    """Read a script, which begins with what all of them share."""
    return Script.make(b"".join((_FOLDER / f"{part}.lua").read_bytes() for part in ("prelude", name)))


SCRIPTS: Final[dict[ScriptName, Script]] = {
    name: load_script(name) for name in ("check", "register", "beat", "tunnels", "count", "elect", "ended")
}


def decode_numbers(reply: object) -> list[int]:
    """Return the numbers that a script has returned: a status, the time, and others.

    Raises ValueError for anything else.
    """
    numbers = _decode_numbers(_get_bytes(reply))
    if len(numbers) < 2 or not 0 < numbers[1] < _LATEST:
        raise ValueError("unexpected reply")
    return numbers


def decode_registration(reply: object) -> tuple[int, str, list[str]]:
    """Return what `register.lua` has returned: the time, the secret, the replaced holders. Raises ValueError."""
    match _decode(_get_bytes(reply)):
        case [int(now), str(secret), *names] if 0 < now < _LATEST and _SECRET.fullmatch(secret):
            return now, secret, [name for name in names if isinstance(name, str) and _HOLDER.fullmatch(name)][-_MOST:]
    raise ValueError("unexpected reply")


def decode_election(reply: object) -> tuple[bool, bool, int, str, list[str]]:
    """Return what `elect.lua` has returned. Raises ValueError.

    It is whether the lease is had, whether there are more deliveries, the time to ask for them from, who has the lease,
    and deliveries.
    """
    match _decode(_get_bytes(reply)):
        case [int(has), int(more), int(since), str(holder), *deliveries] if since >= 0:
            return (
                bool(has),
                bool(more),
                since,
                shorten(printable(holder), _LONGEST_SHOWN),
                [one for one in deliveries if isinstance(one, str)],
            )
    raise ValueError("unexpected reply")


def decode_ended_tags(reply: object) -> tuple[int, bool, list[tuple[float, str]]]:
    """Return what `ended.lua` has returned. Raises ValueError.

    It is the time to ask for from next, whether there are more, and texts, each with how many seconds ago it was told.
    """
    match _decode(_get_bytes(reply)):
        case [int(since), int(more), *told] if since >= 0:
            pairs = zip(told[::2], told[1::2], strict=True)
            return (
                since,
                bool(more),
                [(max(ago, 0) / 1e6, text) for ago, text in pairs if isinstance(ago, int) and isinstance(text, str)],
            )
    raise ValueError("unexpected reply")


def _get_bytes(reply: object) -> bytes:
    if not isinstance(reply, bytes):
        raise ValueError("unexpected reply")
    return reply
