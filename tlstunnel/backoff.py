"""The delays between attempts at something that fails: each is twice the one before, up to the longest."""

import random
from dataclasses import dataclass

_random = random.Random()  # noqa: S311 - it only spreads attempts


@dataclass(frozen=True, slots=True)
class Backoff:
    """The rule; whoever makes the attempts keeps the current delay, in seconds, where 0 means that none has failed.

    `jitter` is the part of a delay by which `spread` lengthens it at most.
    """

    first: float
    longest: float
    jitter: float = 0.0

    def after(self, delay: float) -> float:
        """Return the delay that follows `delay`."""
        return min(2 * delay, self.longest) if delay else self.first

    def spread(self, delay: float) -> float:
        """Return `delay` lengthened by chance, so that processes that failed together do not try again together."""
        return delay * (1 + self.jitter * _random.random())
