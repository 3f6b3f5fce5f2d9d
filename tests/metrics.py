"""The metrics of a tunnel, for tests: read from its parent, and as Prometheus gets them."""

import msgspec
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.harness import Tunnel
from tlstunnel.admin.exposition import render
from tlstunnel.metrics.snapshot import Snapshot
from tlstunnel.processes.reach import send_command

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values by the name of a sample, and its labels with their values."""


def read_metrics(tunnel: Tunnel) -> Snapshot:
    """Return the metrics as the admin process gets them."""
    return msgspec.convert(send_command(tunnel.control, {"do": "metrics"})["snapshot"], Snapshot)


def scrape(tunnel: Tunnel) -> Series:
    """Return the metrics as Prometheus gets them."""
    text, _ = render(read_metrics(tunnel), "application/openmetrics-text")
    parse = text_string_to_metric_families
    families = parse(text.decode())  # type: ignore[no-untyped-call]
    return {
        (sample.name, tuple(sample.labels.items())): sample.value for family in families for sample in family.samples
    }


def find_decreased(before: Series, now: Series) -> dict[str, tuple[float, float | None]]:
    """Return the counters that have decreased or are gone; none, if all is well."""
    return {
        f"{name}{dict(labels)}": (value, now.get((name, labels)))
        for (name, labels), value in before.items()
        if name.endswith(("_total", "_bucket", "_count", "_sum")) and now.get((name, labels), -1.0) < value
    }
