"""What people have decided, which machines tell each other: acknowledgements, mutes, throttles of sites. No I/O.

On the way, each is a text, in the place of a delivery (`tlstunnel.plans.duty`). Earlier releases ignore it. A text that
is told again, or that is older than what is known, changes nothing, so the order of texts does not matter.
"""

import msgspec

from tlstunnel.escaping import printable, shorten
from tlstunnel.plans.notices import DAY
from tlstunnel.plans.values import Standing

MOST_DECISIONS = 2000
"""Decisions that a machine tells at a time, and that wait until they are stored. The oldest are left out."""

MAX_BYTES = 600
"""Bytes of a text. The server is asked for a thousand at once, and its replies have a limit (`MAX_REPLY`)."""

_LONGEST_WHO = 64
_LONGEST_WHY = 120
_LONGEST_ID = 64
_LONGEST_RATE = 32
_LATEST = 1e11
"""A Unix time, in the year 5138. Later ones are no times."""

_AHEAD = 366 * DAY + DAY
"""How far ahead the end can be of a mute or throttle: the longest one, and a day for clocks that are wrong."""


class Acknowledgement(msgspec.Struct, frozen=True, array_like=True, tag="ack"):
    """A notice was read: the one about a standing of a site that was made at that time. `who` has said so, `since`."""

    site: str
    standing: Standing
    created: float
    since: float
    who: str


class Mute(msgspec.Struct, frozen=True, array_like=True, tag="mute"):
    """A site that gets no notices for a while. `who` has asked for it, `since`. The latest one of a site counts."""

    site: str
    until: float
    since: float
    who: str

    def replaces(self, other: "Mute") -> bool:
        """Return whether this is the later one of two of the same site. All machines find the same one."""
        return (self.since, self.until, self.who) > (other.since, other.until, other.who)


class SiteThrottle(msgspec.Struct, frozen=True, array_like=True, tag="throttle"):
    """A throttle of a whole site, which `who` has asked for `since`; `released` once somebody has lifted it.

    Throttles of addresses are not told: addresses of clients leave no machine in clear.
    """

    site: str
    rate: str
    since: float
    until: float
    who: str
    why: str
    notice: str
    abuse: bool
    released: float | None = None
    released_by: str = ""


Decision = Acknowledgement | Mute | SiteThrottle

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Decision).decode


def render_decision(decision: Decision) -> str | None:
    """Return the text that machines tell each other; None if it would be too long."""
    text = _encode(_clean(decision))
    if len(text) > MAX_BYTES and isinstance(decision, SiteThrottle):
        text = _encode(_clean(msgspec.structs.replace(decision, why="")))  # the record here has it
    return text.decode() if len(text) <= MAX_BYTES else None


def parse_decision(text: str) -> Decision | None:
    """Return what a machine has told, None if it is not understood."""
    if len(text) > MAX_BYTES:
        return None
    try:
        decision = _decode(text.encode())
    except (msgspec.DecodeError, UnicodeEncodeError):
        return None
    times = [decision.since, decision.created if isinstance(decision, Acknowledgement) else decision.until]
    if isinstance(decision, SiteThrottle) and decision.released is not None:
        times.append(decision.released)
    if not all(0.0 <= time <= _LATEST for time in times):
        return None
    if not isinstance(decision, Acknowledgement) and decision.until - decision.since > _AHEAD:
        return None
    if isinstance(decision, Acknowledgement) and decision.standing.recipient is None:
        return None
    return _clean(decision)


def _clean(decision: Decision) -> Decision:
    """Return it with texts that are short and printable."""
    who = _cut(decision.who, _LONGEST_WHO)
    if not isinstance(decision, SiteThrottle):
        return msgspec.structs.replace(decision, who=who)
    return msgspec.structs.replace(
        decision,
        who=who,
        why=_cut(decision.why, _LONGEST_WHY),
        rate=_cut(decision.rate, _LONGEST_RATE),
        notice=_cut(decision.notice, _LONGEST_ID),
        released_by=_cut(decision.released_by, _LONGEST_WHO),
    )


def _cut(text: str, length: int) -> str:
    return shorten(printable(text), length)
