"""The metrics, in one table: names, kinds, labels and help. `docs/metrics.md` lists them, and a test compares the two.

Names and labels are part of the public interface. They follow Prometheus' conventions: the unit is in the name, a
counter's ends in ``_total``. No label has a value that a client chose, so the number of series stays small.

Tested by tests/unit/test_metrics.py.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Family:
    """A metric: one value for each combination of values of its `labels`.

    A histogram has a value for each bucket as well: the observations of at most so many seconds, its `bounds`, and of
    more than the bound before.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    bounds: tuple[float, ...] = ()

    @property
    def series_labels(self) -> tuple[str, ...]:
        """The labels of each value in a snapshot."""
        return (*self.labels, LE) if self.kind == "histogram" else self.labels

    @property
    def buckets(self) -> tuple[str, ...]:
        """The values of the label `LE`, except `SUM`."""
        return (*map(str, self.bounds), INFINITE)


LE = "le"
"""The label of a histogram's values that names the bucket by its bound, as in Prometheus."""

INFINITE, SUM = "+Inf", "sum"
"""Its values besides the bounds: what exceeds them all, and the sum of all observations, in microseconds."""


FAMILIES: dict[str, Family] = {}
"""All families by name, in the order in which they are shown."""


def _family(kind: Literal["counter", "gauge"], name: str, labels: tuple[str, ...], text: str) -> Family:
    FAMILIES[name] = family = Family(name, kind, labels, text)
    return family


def _histogram(name: str, *labels: str, bounds: tuple[float, ...], text: str) -> Family:
    FAMILIES[name] = family = Family(name, "histogram", labels, text, bounds)
    return family


def _counter(name: str, *labels: str, text: str) -> Family:
    return _family("counter", name, labels, text)


CONNECTIONS_ACCEPTED = _counter("tlstunnel_connections_accepted_total", text="Connections accepted from listeners.")
CONNECTIONS_NOT_ACCEPTED = _counter(
    "tlstunnel_connections_not_accepted_total",
    "reason",
    text="Connections closed as soon as they were accepted: address lists, PROXY protocol from an untrusted address.",
)
HEALTH_CHECKS = _counter(
    "tlstunnel_health_checks_total",
    "status",
    text="Requests of load balancers for health_path, by the status of the response. They are in no other counter.",
)
ACCEPT_PAUSES = _counter(
    "tlstunnel_accept_pauses_total", "reason", text="Times that accepting paused for lack of descriptors or memory."
)
HANDSHAKES_EVICTED = _counter(
    "tlstunnel_unfinished_handshakes_evicted_total",
    text="Connections closed before their handshake was complete, to make room for newer ones.",
)
TLS_HANDSHAKES_FAILED = _counter(
    "tlstunnel_tls_handshakes_failed_total",
    "reason",
    text="Connections that ended before their TLS handshake was complete.",
)
CONNECTIONS = _counter(
    "tlstunnel_connections_total",
    "site",
    "ended_by",
    "reason",
    text="Connections with a complete TLS handshake, counted when they end: one for each connection record.",
)
TUNNELS_OPENED = _counter("tlstunnel_tunnels_opened_total", "site", text="WebSocket handshakes that opened a tunnel.")
SHORT_TUNNELS = _counter(
    "tlstunnel_short_tunnels_total", "site", text="Tunnels that ended within a second of their connection."
)
BYTES = _counter(
    "tlstunnel_bytes_total",
    "site",
    "direction",
    text="Bytes moved by tunnels, without TLS and HTTP: up from clients to origins, down from origins to clients.",
)
FIREWALL_CHECKS_FAILED = _counter(
    "tlstunnel_firewall_checks_failed_total",
    "site",
    "reason",
    "mode",
    text="Requests that address lists or the check of the web origin refused, or in mode log would have refused.",
)
RULES = _counter(
    "tlstunnel_firewall_rules_total", "site", "rule", "outcome", text="Firewall rules that matched or failed."
)
RATE_LIMITS = _counter(
    "tlstunnel_firewall_rate_limits_total",
    "site",
    "limit",
    "outcome",
    "mode",
    text="Requests that a rate limit applied to, by outcome.",
)
MANAGED_RULES = _counter(
    "tlstunnel_firewall_managed_rules_total",
    "site",
    "outcome",
    text="Requests that managed rules evaluated, by outcome.",
)
MANAGED_RULE_MATCHES = _counter(
    "tlstunnel_firewall_managed_rule_matches_total", "rule", text="Requests that a managed rule matched, by its id."
)
EDGE_REQUESTS = _counter(
    "tlstunnel_edge_requests_total", "worker", "outcome", text="Requests given to an edge worker, by outcome."
)
COUNTER_QUESTIONS = _counter(
    "tlstunnel_counter_questions_total",
    "answered_by",
    text="Questions about rate limits and open tunnels while there is a ledger, by what answered them.",
)
COUNTER_QUESTION_SECONDS = _histogram(
    "tlstunnel_counter_question_seconds",
    bounds=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    text="How long a process waited for the ledger's answer to a question.",
)
LEDGER_FAILURES = _counter(
    "tlstunnel_ledger_failures_total", "reason", text="Times that a process could not count with the others any more."
)
TUNNELS = _family("gauge", "tlstunnel_tunnels", ("site",), "Tunnels that are open.")
UNFINISHED_HANDSHAKES = _family(
    "gauge", "tlstunnel_unfinished_handshakes", (), "Connections whose handshake is not complete."
)
PROCESSES_COUNTING_ALONE = _family(
    "gauge", "tlstunnel_processes_counting_alone", (), "Processes that cannot reach the ledger."
)
