"""Going through all open tunnels without holding the loop: ten thousand of them take longer than a message may wait.

Tested by tests/unit/test_slices.py.
"""

import asyncio
import time

SLICE_SECONDS = 0.0005
"""How long a slice of the work lasts. What comes in between waits that long at most, and for the longest step of it."""


class Slices:
    """Work in slices. Call `pause` whenever one `is_over`."""

    __slots__ = ("_end", "_seconds")

    def __init__(self, seconds: float = SLICE_SECONDS) -> None:
        self._seconds = seconds
        self._end = time.perf_counter() + seconds

    @property
    def is_over(self) -> bool:
        """Whether the slice has lasted long enough."""
        return time.perf_counter() >= self._end

    async def pause(self) -> None:
        """Let the loop do everything else that is due, then begin another slice."""
        await asyncio.sleep(0)
        self._end = time.perf_counter() + self._seconds
