"""The metrics of a tunnel, for tests: read from its parent, and as Prometheus gets them."""

from pathlib import Path

import msgspec
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.harness import Certificate, Tunnel
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


def config_with_a_closed_origin(
    origin: str,
    closed: int,
    certificate: Certificate,
    folder: Path,
    *,
    ejected: str,
    top: str = "",
    site: str = "",
) -> str:
    """Return a configuration of two processes, a history, a rule, a rate limit, and two origins.

    Nothing listens at port `closed`, the address of the second origin, which is ejected for the time `ejected` after
    one failure. `top` comes before the first table, `site` at the end of the site's.
    """
    return f"""
        listen = ["127.0.0.1:0"]
        processes = 2
        state.dir = "{folder}"
        {top}
        [[rules]]
        name = "no admin"
        when = 'path == "/admin"'
        action = "block"
        [[rate_limits]]
        name = "many"
        key = ["ip"]
        limit = "100000/minute"
        [[sites]]
        names = ["localhost"]
        cert = "{certificate.cert}"
        key = "{certificate.key}"
        origins = ["{origin}", "127.0.0.1:{closed}"]
        balance = "round_robin"
        ejection = {{ failures = 1, delay = "{ejected}", max_delay = "{ejected}" }}
        {site}
    """
