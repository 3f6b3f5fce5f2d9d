"""The performance goals of the tunnel, absolute or relative to the best peer of the same run."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Budget:
    """A goal. `beside`: best peer / ours, at least; `behind`: ours / best peer, at most; `alone`: absolute, at most."""

    title: str
    figure: str
    column: str
    kind: Literal["beside", "behind", "alone"]
    must: float
    aim: float
    unit: str = ""

    def find_measured(self, content: dict[str, Any], ours: str) -> float | None:
        """Return the measured number to compare with it, None if the run has none."""
        try:
            found = content["figures"][self.figure]["columns"][self.column]["subjects"][ours]
        except KeyError:
            return None
        if self.kind == "alone":
            return float(found["median"])
        if not (beside := found["ratio_to_best_peer"]):
            return None
        return float(beside) if self.kind == "beside" else 1 / beside

    def render_limit(self, number: float) -> str:
        """Return a limit with its direction."""
        return f"{'>=' if self.kind == 'beside' else '<='} {number:g}{self.unit}"

    def render_result(self, value: float) -> str:
        """Return the measured number, and which limit it meets."""
        shown = f"{value:.1f}" if self.unit else f"{value:.2f}"
        meets = "aim" if self._within(value, self.aim) else "must" if self._within(value, self.must) else "**missed**"
        return f"{shown}{self.unit}: {meets}"

    def _within(self, value: float, limit: float) -> bool:
        return value >= limit if self.kind == "beside" else value <= limit


BUDGETS = (
    Budget("TLS + upgrade, full, CPU each, best peer / ours", "handshakes-full", "cpu", "beside", 0.80, 1.0),
    Budget("TLS + upgrade, resumed, CPU each, best peer / ours", "handshakes-resumed", "cpu", "beside", 0.75, 1.0),
    Budget("echo 64 B, 64 tunnels, CPU per message, best peer / ours", "echo-64-64", "cpu", "beside", 0.9, 1.0),
    Budget("echo 4 KiB, 64 tunnels, CPU per message, best peer / ours", "echo-64-4096", "cpu", "beside", 0.9, 1.0),
    Budget("echo 64 KiB, 1 tunnel, CPU per message, best peer / ours", "echo-1-65536", "cpu", "beside", 0.9, 1.1),
    Budget("bulk down, CPU per GB, best peer / ours", "bulk-down", "cpu", "beside", 1.3, 1.5),
    Budget("bulk up, CPU per GB, best peer / ours", "bulk-up", "cpu", "beside", 1.15, 1.3),
    Budget("PSS per idle tunnel of 1 000", "idle-1000", "kib", "alone", 17, 14, " KiB"),
    Budget("PSS per tunnel of 1 000 after 1 MiB both ways", "idle-1000", "moved_kib", "alone", 18, 16, " KiB"),
    Budget("PSS per idle tunnel of 9 000, ours / best peer (below every peer)", "idle-9000", "kib", "behind", 1.0, 1.0),
    Budget("latency, one tunnel, p50, ours / best peer", "echo-1-64", "p50_us", "behind", 1.15, 1.0),
    Budget("storm of 5 000, seconds until all are back, ours / best peer", "storm-5000", "seconds", "behind", 1.3, 1.0),
    Budget("cost of a message, 9 000 tunnels / 100, 100 busy", "grow-9000", "growth", "alone", 1.1, 1.05),
)
