"""How long handshakes take, for the metrics: one clock read for each stage.

Tested by tests/promises/test_metrics_scraped.py.
"""

from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Registry


class Stages:
    """A histogram for each stage that connections pass, and for the whole handshake that opens a tunnel."""

    __slots__ = (
        "edge",
        "firewall",
        "handshake",
        "hello",
        "origin_connect",
        "origin_response",
        "proxy_header",
        "request",
        "tls",
    )

    def __init__(self, metrics: Registry) -> None:
        stage = families.HANDSHAKE_STAGE_SECONDS
        self.proxy_header = metrics.histogram(stage, "proxy header")
        self.hello = metrics.histogram(stage, "hello")
        self.tls = metrics.histogram(stage, "tls")
        self.request = metrics.histogram(stage, "request")
        self.firewall = metrics.histogram(stage, "firewall")
        self.edge = metrics.histogram(stage, "edge")
        self.origin_connect = metrics.histogram(stage, "origin connect")
        self.origin_response = metrics.histogram(stage, "origin response")
        self.handshake = metrics.histogram(families.HANDSHAKE_SECONDS)
