"""Exponential back-off: each delay between failed attempts is twice the previous one, up to a limit."""

import random
from dataclasses import dataclass

_random = random.Random()  # noqa: S311 - not for cryptography


@dataclass(frozen=True, slots=True)
class Backoff:
    """The delays, in seconds. The caller keeps the current delay, which is 0 while no attempt has failed.

    `jitter` is the largest fraction of a delay that `spread` adds to it.
    """

    first: float
    longest: float
    jitter: float = 0.0

    def after(self, delay: float) -> float:
        """Return the delay after `delay`."""
        return min(2 * delay, self.longest) if delay else self.first

    def spread(self, delay: float) -> float:
        """Return `delay` plus a random jitter, so that processes that failed together do not retry together."""
        return delay * (1 + self.jitter * _random.random())
