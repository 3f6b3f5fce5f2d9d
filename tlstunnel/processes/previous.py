"""The previous format, so that a running tunnel can be upgraded from it and downgraded to it.

Format 1 was used up to commit 581955a. Its messages are those of format 2, except that ``drain`` was ``finish``, and
that there were no notifications: messages with ``"answer": 0``, as notifications have, were ignored. Its handover has
no roles of children, and a draining child is *finishing*.

A child does not learn that an earlier release replaced its parent, so it always understands both formats.

Tested by tests/promises/test_upgrade_between_versions.py.
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
        """Return the request in the current format."""
        return Drain(after=self.after, over=self.over)


def translate_request(request: Request[ReplyT]) -> Request[ReplyT]:
    """Translate `request` for a child of format 1."""
    if isinstance(request, Drain):
        return Finish(after=request.after, over=request.over)  # type: ignore[return-value]  # both have Done
    return request


IDENTITY = ("place", "generation", "version", "started")


def upgrade_handover(text: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a handover of format 1 to the current format. Raises KeyError or TypeError if it is not one."""
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
    """Translate a handover of the current format to format 1. Only serving children are kept."""
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
