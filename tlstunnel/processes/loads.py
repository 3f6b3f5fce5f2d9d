"""The loads of the configuration: when, by whom, and what changed each time. An upgrade hands them over.

Tested by tests/unit/test_processes_loads.py and tests/promises/test_inventory.py.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal

from tlstunnel import __version__
from tlstunnel.commands.configuration import LoadStatus
from tlstunnel.escaping import printable, shorten

MOST_LOADS = 50

MOST_LINES = 50
"""Changes, or problems, that are kept of each; then how many more there were."""

LONGEST_LINE = 300


class Loads:
    """The latest times at which the configuration was read. `before` are those of the previous program."""

    def __init__(self, before: Iterable[LoadStatus] = ()) -> None:
        self._loads = deque(before, MOST_LOADS)

    def note(  # noqa: PLR0913 - what a load has
        self,
        what: Literal["start", "reload", "upgrade"],
        generation: int,
        *,
        file: str = "",
        who: str = "",
        changes: Sequence[str] = (),
        problems: Sequence[str] = (),
    ) -> None:
        """Note that it was read now, or that this has failed because of `problems`."""
        self._loads.append(
            LoadStatus(
                at=round(time.time(), 3),
                what=what,
                generation=generation,
                version=__version__,
                file=file,
                who=who,
                changes=_shorten(changes),
                problems=_shorten(problems),
            )
        )

    def list_latest(self) -> list[LoadStatus]:
        """Return them, the latest first."""
        return list(reversed(self._loads))

    def hand_over(self) -> list[LoadStatus]:
        """Return what the next program continues with."""
        return list(self._loads)

    @property
    def loaded(self) -> float:
        """When what is served was read, in Unix time; 0 if that is not known."""
        return next((one.at for one in reversed(self._loads) if not one.problems), 0.0)


def _shorten(lines: Sequence[str]) -> list[str]:
    kept = [shorten(printable(line), LONGEST_LINE) for line in lines[:MOST_LINES]]
    more = len(lines) - len(kept)
    return [*kept, f"and {more} more"] if more else kept
