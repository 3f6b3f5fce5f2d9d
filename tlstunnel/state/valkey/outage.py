"""Reports that a server does not answer: once it has lasted for some time, and when it is over.

Tested by tests/unit/test_state_valkey_outage.py.
"""

from collections.abc import Callable


class Outage:
    """Whether something has been unanswered for `seconds`, by `clock`, since it was made or last answered."""

    def __init__(self, clock: Callable[[], float], seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self._answered = clock()
        self._reported = False

    def note_answer(self) -> bool:
        """Note an answer; return whether this ends an outage that was reported."""
        self._answered = self._clock()
        was_reported, self._reported = self._reported, False
        return was_reported

    def note_failure(self) -> bool:
        """Note a failure; return whether it is to be reported now."""
        if self._reported or self._clock() - self._answered < self._seconds:
            return False
        self._reported = True
        return True
