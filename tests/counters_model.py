"""What counters of rate limits must do, as plain models, and steps for hypothesis that fit them."""

from collections.abc import Callable, Sequence
from fractions import Fraction

from hypothesis import strategies as st

from tlstunnel.state.counters import Exceeded, LimitCheck, Strategy


class FixedModel:
    """A window begins with the first request after the end of the last one."""

    def __init__(self, most: int, window: int) -> None:
        self.most, self.window = most, window
        self.began, self.number = -1e9, 0

    def admits(self, now: float) -> bool:
        return now - self.began >= self.window or self.number < self.most

    def count(self, now: float) -> None:
        if now - self.began >= self.window:
            self.began, self.number = now, 0
        self.number += 1


class MovingModel:
    """At most this many in any period as long as the window."""

    def __init__(self, most: int, window: int) -> None:
        self.most, self.window = most, window
        self.times: list[float] = []

    def admits(self, now: float) -> bool:
        return sum(now - time < self.window for time in self.times) < self.most

    def count(self, now: float) -> None:
        self.times.append(now)


class SlidingModel:
    """The previous window counts by its share of the last `window` seconds."""

    def __init__(self, most: int, window: int) -> None:
        self.most, self.window = most, window
        self.counts: dict[int, int] = {}

    def admits(self, now: float) -> bool:
        index = int(now // self.window)
        share = 1 - (Fraction(now) - index * self.window) / self.window
        return self.counts.get(index - 1, 0) * share + self.counts.get(index, 0) < self.most

    def count(self, now: float) -> None:
        index = int(now // self.window)
        self.counts[index] = self.counts.get(index, 0) + 1


Model = FixedModel | MovingModel | SlidingModel
MODELS: dict[Strategy, Callable[[int, int], Model]] = {
    "fixed": FixedModel,
    "moving": MovingModel,
    "sliding": SlidingModel,
}


class CountersModel:
    """`Counters`: all limits of a request, blocks and tunnels."""

    def __init__(self) -> None:
        self.windows: dict[tuple[str, int, int, Strategy], Model] = {}
        self.blocks: dict[str, float] = {}
        self.tunnels: dict[str, int] = {}

    def check(self, checks: Sequence[LimitCheck], now: float) -> list[Exceeded]:
        exceeded = [self._evaluate(check, now) for check in checks]
        if not any(over and check.enforced for check, over in zip(checks, exceeded, strict=True)):
            for check, over in zip(checks, exceeded, strict=True):
                if not over and check.amount:
                    self._window(check).count(now)
                if not over and check.max_tunnels:
                    self.tunnels[check.key] = self.tunnels.get(check.key, 0) + 1
        return exceeded

    def _evaluate(self, check: LimitCheck, now: float) -> Exceeded:
        if check.block_for and self.blocks.get(check.key, 0) > now:
            return "blocked"
        if check.amount and not self._window(check).admits(now):
            if check.block_for:
                self.blocks[check.key] = now + check.block_for
            return "limit"
        if check.max_tunnels and self.tunnels.get(check.key, 0) >= check.max_tunnels:
            return "tunnels"
        return ""

    def _window(self, check: LimitCheck) -> Model:
        limit = (check.key, check.amount, check.window, check.strategy)
        return self.windows.setdefault(limit, MODELS[check.strategy](check.amount, check.window))


@st.composite
def limit_checks(draw: st.DrawFn, key: str) -> LimitCheck:
    """Return a limit of a key: any of its parts, in numbers that a few steps exceed."""
    has_amount = draw(st.booleans())
    return LimitCheck(
        key,
        draw(st.integers(1, 4)) if has_amount else 0,
        draw(st.integers(1, 12)) if has_amount else 0,
        draw(st.sampled_from(sorted(MODELS))),
        draw(st.sampled_from([0, 0, 1, 3])),
        draw(st.sampled_from([0.0, 0.0, 1.5, 8.0])),
        draw(st.booleans()),
    )


steps = st.lists(
    st.tuples(
        st.integers(0, 40).map(lambda quarters: quarters / 4),  # exact as floats, and as microseconds
        st.sets(st.integers(0, 2), min_size=1),
        st.sets(st.sampled_from("abc")),
    ),
    max_size=30,
)
"""Each step: the seconds until it, the limits of the request, and the keys under which a tunnel ends before it."""
