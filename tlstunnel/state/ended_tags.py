"""What machines tell each other when the tunnels with a tag are ended, and its text in the server. No I/O.

Whoever can write to the server can end tunnels, as an operator can. Anything else that is found there is ignored.

Tested by tests/unit/test_state_ended_tags.py.
"""

import base64
from typing import Annotated

import msgspec

LONGEST_TEXT = 4_096
"""Characters of the text of one in the server. The script returns none that is longer (`ended.lua`)."""

LONGEST_WHY = 200
"""Characters of why tunnels are ended, and of who has asked for it."""

FORMAT = 1
"""The version of a text. A machine ignores texts of versions that it does not know."""

_Filter = Annotated[str, msgspec.Meta(max_length=1024)]
_Words = Annotated[str, msgspec.Meta(max_length=LONGEST_WHY)]


class EndedTag(msgspec.Struct, frozen=True, kw_only=True):
    """Tunnels with the tag, and those of them that match the other filters, have been ended `age` seconds ago.

    `who` asked for it, and `why`. The filters are those of `tlstunnel.commands.tunnels`.
    """

    tag: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
    who: _Words
    why: _Words = ""
    site: _Filter = ""
    client: _Filter = ""
    origin: _Filter = ""
    age: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.0


class _Told(msgspec.Struct, frozen=True, kw_only=True):
    """What the server has. `token` tells apart two with the same content; `instance` is the machine that sent it."""

    format: int
    token: str
    instance: str
    ended: EndedTag


_decode = msgspec.json.Decoder(_Told).decode


def encode_ended(ended: EndedTag, instance: str, token: str) -> str:
    """Return the text for the server."""
    told = _Told(format=FORMAT, token=token, instance=instance, ended=ended)
    return base64.urlsafe_b64encode(msgspec.json.encode(told)).decode("ascii")


def decode_ended(text: str) -> tuple[str, EndedTag] | None:
    """Parse a text; return which machine sent it, and what; None if it is not valid."""
    if len(text) > LONGEST_TEXT:
        return None
    try:
        told = _decode(base64.b64decode(text.encode("ascii"), b"-_", validate=True))
    except (ValueError, msgspec.MsgspecError):
        return None
    return (told.instance, told.ended) if told.format == FORMAT else None
