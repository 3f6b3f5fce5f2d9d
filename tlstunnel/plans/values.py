"""What assessing sites and notifying people share: standings, their figures, notices.

Times are Unix times in seconds. All texts are plain: one line, and no markup.
"""

from enum import StrEnum
from typing import Literal

import msgspec

Resource = Literal["tunnels", "handshakes", "bytes", "cpu"]
"""What a site can have a large share of."""

Scarcity = Literal["cpu", "descriptors", "memory"]
"""What a machine can be short of."""

Flood = Literal["refused", "short", "unfinished"]
"""What abuse consists of: refused handshakes, tunnels that end within a second, connections that send no request."""

Recipient = Literal["contact", "operator"]
"""Who gets a notice: the contact of the site, or whoever runs the tunnel."""


class Standing(StrEnum):
    """Where a site stands. Later ones weigh more. None of them ends a tunnel or refuses a handshake."""

    WITHIN = "within"
    SPIKE = "spike"
    REPEATED = "repeated"
    SUSTAINED = "sustained"
    DISPROPORTIONATE = "disproportionate"
    SUSPECTED_ABUSE = "suspected abuse"

    @property
    def weight(self) -> int:
        """0 for `WITHIN`, and more for each that weighs more."""
        return _WEIGHTS[self]

    @property
    def recipient(self) -> Recipient | None:
        """Who gets a notice about it: nobody about what is tolerated, only the operator about abuse."""
        return _RECIPIENTS.get(self)


_WEIGHTS = {standing: weight for weight, standing in enumerate(Standing)}
_RECIPIENTS: dict[Standing, Recipient] = {
    Standing.REPEATED: "contact",
    Standing.SUSTAINED: "contact",
    Standing.DISPROPORTIONATE: "contact",
    Standing.SUSPECTED_ABUSE: "operator",
}


class Figures(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an assessment is based on. What plays no part in it, or is not known, has its default."""

    guideline: int | None = None
    """Concurrent tunnels; None if the site has no guideline."""
    now: int = 0
    """Open tunnels in the last sample."""
    peak: int = 0
    """The most tunnels that were open at once in the hours looked at, or now."""
    latest_peak: int = 0
    """The most in the last 24 of these hours, or now."""
    p95: float | None = None
    """The highest 95th percentile of a day in the last week: only 72 minutes of that day were above it."""
    hours: int = 0
    """Hours looked at."""
    hours_measured: int = 0
    """Those of them in which anything was sampled. The others are gaps, about which nothing is known."""
    hours_over: int = 0
    """Those in which the site was over its guideline."""
    days_over: int = 0
    """Days with at least one such hour."""
    days_sustained: int = 0
    """Days of the last week on which it was over its guideline for many hours."""
    resource: Resource | None = None
    """What the share is of: where the site is furthest above the share that its plan suggests."""
    share: float | None = None
    """The site's part of what all sites with a guideline use, 0 to 1."""
    suggested_share: float | None = None
    """Its guideline divided by the sum of the guidelines of the sites in use, 0 to 1."""
    factor: float | None = None
    """`share` divided by `suggested_share`."""
    scarcity: Scarcity | None = None
    """What the machine is shortest of; None if it is not busy."""
    scarcity_share: float = 0.0
    """How much of that is used, 0 to 1."""
    flood: Flood | None = None
    """What abuse is suspected from."""
    flood_rate: float = 0.0
    """How much of that there was, per second."""
    flood_share: float = 0.0
    """What part of all connections to the site it was, 0 to 1."""
    flood_addresses: int = 0
    """From how many addresses the connections came, about. The addresses themselves are kept nowhere."""


class Assessment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a site stands, since when, and why."""

    site: str
    """The site's first name."""
    plan: str = ""
    """The name of its plan, or "" for a site without one."""
    label: str = ""
    """The plan as people read it, such as "Pro"."""
    next_plan: str = ""
    """The name of the plan to suggest, or "" if there is none."""
    next_label: str = ""
    """That plan as people read it."""
    standing: Standing = Standing.WITHIN
    holds: tuple[Standing, ...] = ()
    """All standings that apply at once. `standing` is the last of them, which weighs most."""
    since: float
    """When this standing began."""
    figures: Figures = Figures()
    sentence: str
    """Why, in one plain sentence of English."""


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """A message about a site's standing to one recipient."""

    id: str
    """The same however often it is sent, and on all machines that share their counts."""
    site: str
    standing: Standing
    created: float
    recipient: Recipient
    address: str
    """A `mailto:` or `https:` URL, or "" if there is none: then the log has the notice."""
    assessment: Assessment
    language: str
    """The language of its text, such as "en"."""
