"""The command for the metrics of all processes.

Tested by tests/unit/test_commands.py.
"""

from typing import ClassVar

import msgspec

from tlstunnel.commands.command import Command
from tlstunnel.metrics.snapshot import Snapshot


class MetricsResult(msgspec.Struct, frozen=True):
    """The sums over all processes, those that have ended included, and what the parent measures."""

    now: float
    snapshot: Snapshot


class Metrics(Command[MetricsResult], frozen=True):
    """Report the metrics."""

    name: ClassVar[str] = "metrics"
    result: ClassVar[type[msgspec.Struct]] = MetricsResult
