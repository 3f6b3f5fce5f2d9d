"""Checks whether the tunnel has become more expensive than the committed baseline.

Times are compared as ratios to HAProxy's in the same round, which removes most of the influence of the machine. Memory,
instructions and system calls are compared directly. A number above its tolerance is measured again, and the median
of all rounds counts.
"""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

PEER = "haproxy"
OURS = "tlstunnel"


@dataclass(frozen=True, slots=True)
class Check:
    """A number of the gate. `tolerance` is how much higher than the baseline it may be, as a fraction."""

    title: str
    figure: str
    column: str
    tolerance: float
    beside_peer: bool = True

    @property
    def name(self) -> str:
        """Its name in the baseline."""
        return f"{self.figure}.{self.column}"


# How the tolerances were found: docs/performance.md, "The gate".
CHECKS = (
    Check("echo 64 B, 1 tunnel, CPU", "echo-1-64", "cpu", 0.15),
    Check("echo 64 B, 64 tunnels, CPU", "echo-64-64", "cpu", 0.08),
    Check("echo 4 KiB, 64 tunnels, CPU", "echo-64-4096", "cpu", 0.08),
    Check("bulk down, CPU of the path", "bulk-down", "path", 0.08),
    Check("bulk up, CPU of the path", "bulk-up", "path", 0.08),
    Check("bulk both, CPU of the path", "bulk-both", "path", 0.15),
    Check("TLS + upgrade, full, CPU", "handshakes-full", "cpu", 0.15),
    Check("TLS + upgrade, resumed, CPU", "handshakes-resumed", "cpu", 0.15),
    Check("PSS per idle tunnel", "idle-1000", "kib", 0.08, beside_peer=False),
    Check("PSS per tunnel after 1 MiB each way", "idle-1000", "moved_kib", 0.15, beside_peer=False),
    Check("instructions, TLS + upgrade, full", "instructions", "full", 0.03, beside_peer=False),
    Check("instructions, TLS + upgrade, resumed", "instructions", "resumed", 0.03, beside_peer=False),
    Check("instructions, message of 64 B", "instructions", "small", 0.01, beside_peer=False),
    Check("instructions, message of 4 KiB", "instructions", "page", 0.01, beside_peer=False),
    Check("instructions, start to first handshake", "instructions", "start", 0.05, beside_peer=False),
    Check("system calls, TLS + upgrade, full", "calls", "full", 0.01, beside_peer=False),
    Check("system calls, TLS + upgrade, resumed", "calls", "resumed", 0.01, beside_peer=False),
    Check("system calls, message of 64 B", "calls", "small", 0.01, beside_peer=False),
    Check("system calls, message of 4 KiB", "calls", "page", 0.01, beside_peer=False),
)

Rounds = dict[str, dict[str, dict[str, list[float]]]]


@dataclass(frozen=True, slots=True)
class Versions:
    """What the numbers depend on, besides our code."""

    python: str
    openssl: str
    valgrind: str
    haproxy: str
    kernel: str
    processor: str

    def to_json(self) -> dict[str, str]:
        """Return the fields as in the baseline."""
        return asdict(self)

    def compare(self, other: dict[str, str], names: tuple[str, ...]) -> list[str]:
        """Return the differences from a baseline in the fields `names`, such as `python 3.11.2, not 3.11.1`."""
        return [
            f"{name} {mine}, not {theirs}"
            for name in names
            if (mine := getattr(self, name)) != (theirs := other.get(name, "unknown"))
        ]


def compute_values(found: Rounds) -> dict[str, float]:
    """Return the number of each check that was measured, as a median over the rounds."""
    numbers = {}
    for check in CHECKS:
        subjects = found.get(check.figure, {})
        if not (ours := subjects.get(OURS, {}).get(check.column)):
            continue
        if not check.beside_peer:
            numbers[check.name] = statistics.median(ours)
        elif peers := subjects.get(PEER, {}).get(check.column):
            # Compared within a round, because a slow minute is slow for both.
            numbers[check.name] = statistics.median(
                mine / theirs for mine, theirs in zip(ours, peers, strict=False) if theirs
            )
    return numbers


def find_worse(now: dict[str, float], baseline: dict[str, Any], versions: Versions) -> list[Check]:
    """Return the comparable checks that were measured and are above their tolerance."""
    return [
        check
        for check in find_comparable(baseline, versions)
        if check.name in now and now[check.name] > baseline["values"][check.name] * (1 + check.tolerance)
    ]


def find_comparable(baseline: dict[str, Any], versions: Versions) -> list[Check]:
    """Return the checks with a baseline; those of instructions only if the versions that matter are the same."""
    same = not versions.compare(baseline["versions"], ("python", "openssl", "valgrind"))
    return [check for check in CHECKS if check.name in baseline["values"] and (same or check.figure != "instructions")]


def render(now: dict[str, float], baseline: dict[str, Any], versions: Versions) -> Iterator[str]:
    """Yield a line for each check, with both numbers and the change."""
    compared = find_comparable(baseline, versions)
    over = find_worse(now, baseline, versions)
    yield f"{'':38}{'baseline':>10}{'now':>10}{'change':>9}{'allowed':>9}"
    for check in CHECKS:
        before, after = baseline["values"].get(check.name), now.get(check.name)
        title = f"{check.title}{' / haproxy' if check.beside_peer else ''}"
        if before is None or after is None:
            yield f"{title:38.38}{_format(before)}{_format(after)}   not compared"
            continue
        verdict = "" if check in compared else "  not compared"
        verdict = "  WORSE" if check in over else verdict
        change = after / before - 1
        yield f"{title:38.38}{_format(before)}{_format(after)}{change:>+9.1%}{check.tolerance:>+9.0%}{verdict}"
    if differences := versions.compare(baseline["versions"], tuple(versions.to_json())):
        yield f"not the baseline's: {'; '.join(differences)}"


def explain(now: dict[str, float], baseline: dict[str, Any], versions: Versions) -> Iterator[str]:
    """Yield a sentence for each check that got worse."""
    for check in find_worse(now, baseline, versions):
        change = now[check.name] / baseline["values"][check.name] - 1
        beside = f", beside {PEER}," if check.beside_peer else ""
        yield f"{check.title}{beside} is {change:.0%} worse than the baseline (allowed {check.tolerance:.0%})"


def _format(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value:>10.3f}" if value < 100 else f"{value:>10.1f}"
