"""What is marked on a plot: the notices about a site, and when it was throttled.

Tested by tests/unit/test_cli_usage.py.
"""

import contextlib
from pathlib import Path

from tlstunnel.errors import StateError
from tlstunnel.plans.notice_store import reading
from tlstunnel.plans.plot import Mark


def read_marks(folder: Path | None, site: str) -> list[Mark]:
    """Return the marks of a site; none if nothing was stored yet."""
    if folder is None:
        return []
    with contextlib.suppress(StateError), reading(folder) as notices:
        return [
            *(
                Mark("notice", one.notice.created, one.notice.created, one.notice.standing)
                for one in notices.read_notices(site)
            ),
            *(
                Mark(
                    "throttle", one.since, one.until if one.released is None else min(one.released, one.until), one.rate
                )
                for one in notices.read_throttles_of(site)
            ),
        ]
    return []
