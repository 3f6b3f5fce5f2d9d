"""The lines at the top of ``tlstunnel top``: what a glance should show.

Tested by tests/unit/test_cli_top.py and tests/e2e/test_top.py.
"""

import msgspec
from rich.text import Text

from tlstunnel.admin.overview import Overview, Overviews
from tlstunnel.cli.tables import count, render_size
from tlstunnel.cli.top.source import Source
from tlstunnel.commands.metrics import Metrics
from tlstunnel.commands.processes import Status
from tlstunnel.escaping import printable

SEPARATOR = "  ·  "


class Headline:
    """Asks `source`, and remembers what it needs for rates."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._overviews = Overviews()

    def ask(self) -> Text:
        """Return the lines of this moment. Raises ControlError."""
        status = msgspec.to_builtins(self._source.ask(Status(metrics="none")))
        metrics = self._source.ask(Metrics())
        return render_overview(self._overviews.add(metrics.now, metrics.snapshot, status))


def render_overview(overview: Overview) -> Text:
    """Return an overview as two lines, and one for each warning."""
    ending = f", shutting down ({overview.ending})" if overview.ending else ""
    generations = sorted({one["generation"] for one in overview.processes})
    older = f" and {', '.join(map(str, generations[:-1]))}" if len(generations) > 1 else ""
    text = Text()
    text.append(f"tlstunnel {printable(overview.version)}", "bold")
    text.append(
        SEPARATOR.join(
            [
                f", generation {overview.generation}{older}{ending}",
                count(len(overview.processes), "process", "processes"),
                f"{overview.memory / 2**20:.0f} MiB",
                count(overview.totals.opened, "tunnel") + " since the start",
            ]
        )
    )
    text.append("\n")
    text.append(count(overview.tunnels, "tunnel"), "bold")
    rates = [
        "",
        f"{overview.handshakes_per_second:.1f}/s opened",
        f"{overview.refused_per_second:.1f}/s refused",
        f"up {render_size(overview.up_per_second)}/s",
        f"down {render_size(overview.down_per_second)}/s",
    ]
    if (total := overview.latency.get("total")) is not None:
        rates.append(f"handshake p50 {1000 * total.p50:.1f} ms, p99 {1000 * total.p99:.1f} ms")
    text.append(SEPARATOR.join(rates))
    for problem in overview.shortages:
        text.append(f"\nrunning short: {printable(problem)}", "bold yellow")
    for one in overview.processes:
        if one["state"] == "not responding":
            text.append(f"\nprocess {one['process']} does not respond", "bold red")
    return text
