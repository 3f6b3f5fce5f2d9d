"""The format before this one, so that a running tunnel can be upgraded from it, and back.

Format 1 is that of the code up to commit 581955a. Its messages are those of format 2, but ``drain`` was ``finish``, and
there were no notifications: a message with ``"answer": 0``, which notifications have, was dropped. Its handover knows
children of one role, and calls a draining child *finishing*.

A child does not learn that its parent was replaced by one of an earlier release, so it understands both at all times.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from tlstunnel.processes.messages import Done, Drain, ReplyT, Request

FORMAT = 1


class Finish(Request[Done], frozen=True, tag="finish", kw_only=True):
    """`Drain` in format 1."""

    after: float | None = msgspec.field(name="linger")
    over: float | None

    def to_drain(self) -> Drain:
        """Return the same in the present format."""
        return Drain(after=self.after, over=self.over)


def translate_request(request: Request[ReplyT]) -> Request[ReplyT]:
    """Return `request` as a child of format 1 understands it."""
    if isinstance(request, Drain):
        return Finish(after=request.after, over=request.over)  # type: ignore[return-value]  # both have Done
    return request


IDENTITY = ("place", "generation", "version", "started")


def upgrade_handover(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return a handover of format 1 in the present format. Raises KeyError, TypeError: it is not one."""
    children = [
        {
            "identity": {
                **{name: child[name] for name in IDENTITY},
                "role": "serving",
                "format": child.get("format", FORMAT),
            },
            "pid": child["pid"],
            "draining": child["finishing"],
            "link": child["link"],
        }
        for child in text["children"]
    ]
    return {**text, "children": children}


def downgrade_handover(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return a handover of the present format in format 1. Children of other roles than serving are left out."""
    children = [
        {
            **{name: child["identity"][name] for name in IDENTITY},
            "pid": child["pid"],
            "finishing": child["draining"],
            "link": child["link"],
        }
        for child in text["children"]
        if child["identity"]["role"] == "serving"
    ]
    known = {name: value for name, value in text.items() if name != "metrics"}
    return {**known, "format": FORMAT, "children": children}
