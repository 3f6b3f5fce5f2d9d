"""The time that ``tlstunnel usage`` shows, and in which steps.

Tested by tests/unit/test_cli_usage.py.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime

import msgspec

from tlstunnel.addresses import quoted
from tlstunnel.state.history.samples import MINUTE
from tlstunnel.state.history.store import DAYS, HOURS, MINUTES, Resolution

STEPS: Mapping[str, Resolution] = {"minute": MINUTES, "hour": HOURS, "day": DAYS}
"""By their names."""

_UNITS = {"m": 60, "h": 3600, "d": 86_400}
_SPAN = re.compile(r"([0-9]{1,7})([mhd])")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_DAY, _HOUR = 86_400, 3600

# Up to these, the steps are minutes or hours unless others are chosen.
_MINUTES_UP_TO, _HOURS_UP_TO = 2 * _HOUR, 2 * _DAY


class Period(msgspec.Struct, frozen=True):
    """From `since` on, at the begin of a step, until `until`, which is now. Unix times."""

    since: float
    until: float
    step: str

    @property
    def resolution(self) -> Resolution:
        """The rows of the history that it consists of."""
        return STEPS[self.step]


def parse_period(text: str, step: str | None, now: float) -> Period:
    """Return the period of ``--since``: a span such as 7d, of which the last step is the present one, or a date (UTC).

    Raises ValueError.
    """
    if match := _SPAN.fullmatch(text):
        span = int(match[1]) * _UNITS[match[2]]
        since = None
    elif _DATE.fullmatch(text):
        since = _parse_date(text)
        span = int(now - since)
    else:
        raise ValueError(f"expected a time such as 7d, 24h or 90m, or a date such as 2026-11-01, got {quoted(text)}")
    if span <= 0:
        raise ValueError(f"{quoted(text)} is not in the past")
    if step is None:
        step = "minute" if span <= _MINUTES_UP_TO else "hour" if span <= _HOURS_UP_TO else "day"
    seconds = STEPS[step].length * MINUTE
    if since is None:
        since = max((now // seconds + 1 + -span // seconds) * seconds, 0.0)
    return Period(since, now, step)


def _parse_date(text: str) -> float:
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise ValueError(f"there is no date {quoted(text)}") from None
