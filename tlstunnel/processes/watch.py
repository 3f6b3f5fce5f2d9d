"""Finds out which children hang, without I/O: who was polled, who responded, and what follows (docs/operations.md).

A child is polled at even intervals. One that has not responded for a while is *silent*: others take over its listening
sockets. If it stays silent, it is killed. That only counts while the parent itself runs on schedule: if the machine or
all processes were paused, every count begins again.
"""

import math
import os
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, Self, TypeVar

VARIABLE = "TLSTUNNEL_WATCH"
"""An environment variable with other `WatchTimes`, for tests and debuggers: four numbers, separated by commas."""

KeyT = TypeVar("KeyT", bound=Hashable)


@dataclass(frozen=True, slots=True)
class WatchTimes:
    """Seconds: between two polls, until a child is silent, until it is killed, until its event loop counts as hung.

    The loop of a healthy child runs its callbacks within a second. The longest stall that clients are known to cause
    is 9 s (docs/architecture.md), so 20 s without any callback is not mere load.
    """

    every: float = 1.0
    silent: float = 5.0
    kill: float = 30.0
    loop: float = 20.0

    @classmethod
    def from_environment(cls) -> Self:
        """Return the times in `VARIABLE`, or the defaults if it is not set or malformed."""
        try:
            every, silent, kill, loop = map(float, os.environ[VARIABLE].split(","))
        except (KeyError, ValueError):
            return cls()
        given = cls(every, silent, kill, loop)
        return given if all(0.0 < seconds < math.inf for seconds in (every, silent, kill, loop)) else cls()


class Finding(Enum):
    """What the watch has found out about a child."""

    SILENT = auto()
    RESPONDS = auto()
    HUNG = auto()


@dataclass(slots=True)
class _Watched:
    """`since`: when it last responded, or when the count began again."""

    since: float
    silent: bool = False
    hung: bool = False


class Watch(Generic[KeyT]):
    """Keeps the time of the last response of each child. `now` is always the time of the same monotonic clock."""

    def __init__(self, times: WatchTimes, now: float) -> None:
        self._times = times
        self._watched: dict[KeyT, _Watched] = {}
        self._checked = now

    def add(self, key: KeyT, now: float) -> None:
        """Watch a child, from now on."""
        self._watched[key] = _Watched(now)

    def discard(self, key: KeyT) -> None:
        """Forget a child that has exited."""
        self._watched.pop(key, None)

    def note_response(self, key: KeyT, now: float) -> Iterator[Finding]:
        """Note that a child has responded. Yields `RESPONDS` if it was silent."""
        one = self._watched.get(key)
        if one is None or one.hung:
            return  # it is being killed
        one.since = now
        if one.silent:
            one.silent = False
            yield Finding.RESPONDS

    def check(self, now: float) -> list[tuple[KeyT, Finding, float]]:
        """Return what is new: the child, the finding, and for how long it has been silent.

        Call this once per interval. If the last call was more than two intervals ago, the parent was not on schedule.
        """
        late = now - self._checked > 2 * self._times.every
        self._checked = now
        found = []
        for key, one in self._watched.items():
            if late:
                one.since = now
            silence = now - one.since
            if not one.silent and silence >= self._times.silent:
                one.silent = True
                found.append((key, Finding.SILENT, silence))
            elif not one.hung and silence >= self._times.kill:
                one.hung = True
                found.append((key, Finding.HUNG, silence))
        return found
