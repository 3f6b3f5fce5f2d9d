"""The metrics, in one table: names, kinds, labels and help. `docs/metrics.md` lists them, and a test compares the two.

Names and labels are part of the public interface. They follow Prometheus' conventions: the unit is in the name, a
counter's ends in ``_total``. No label has a value that a client chose, so the number of series stays small.

Tested by tests/unit/test_metrics.py.
"""

from dataclasses import dataclass
from typing import Literal

MOST_SERIES = 5_000
"""Combinations of labels that one family keeps in a process. Sites and rules come and go with reloads, for as long as
it runs."""

MICROSECONDS = 1_000_000
"""The divisor of what is counted in microseconds and shown in seconds."""


@dataclass(frozen=True, slots=True)
class Family:
    """A metric: one value for each combination of values of its `labels`.

    A histogram has a value for each bucket as well: the observations of at most so many seconds, its `bounds`, and of
    more than the bound before.

    Values are integers: what is shown is the value divided by `divisor`. Those of several processes are added up, or
    for some gauges the `lowest` counts. A process keeps at most `most` combinations of labels.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    bounds: tuple[float, ...] = ()
    divisor: int = 1
    lowest: bool = False
    most: int = MOST_SERIES

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


OTHER = "other"
"""The value of labels for what is not shown, or not even counted, one by one."""


FAMILIES: dict[str, Family] = {}
"""All families by name, in the order in which they are shown."""


def _add(family: Family) -> Family:
    FAMILIES[family.name] = family
    return family


def _histogram(name: str, *labels: str, bounds: tuple[float, ...], text: str) -> Family:
    return _add(Family(name, "histogram", labels, text, bounds))


def _counter(name: str, *labels: str, text: str, divisor: int = 1, most: int = MOST_SERIES) -> Family:
    return _add(Family(name, "counter", labels, text, divisor=divisor, most=most))


def _gauge(
    name: str, *labels: str, text: str, divisor: int = 1, lowest: bool = False, most: int = MOST_SERIES
) -> Family:
    return _add(Family(name, "gauge", labels, text, divisor=divisor, lowest=lowest, most=most))


_LATENCIES = (
    0.00005,
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
"""From the fastest stage of the firewall to the longest timeout by default that a handshake does not exceed."""

_LIFETIMES = (1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 43_200.0, 86_400.0, 604_800.0)
"""From the tunnels that count as short to a week."""

MOST_ORIGINS = 500
"""Addresses of origins with series of their own. A name may resolve to other addresses at any time."""

MOST_CERTIFICATES = 200
"""Certificates with series of their own: those that expire first."""


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
HANDSHAKES = _counter(
    "tlstunnel_handshakes_total", "site", "outcome", text="Handshakes, counted when their outcome is known."
)
HANDSHAKE_STAGE_SECONDS = _histogram(
    "tlstunnel_handshake_stage_seconds",
    "stage",
    bounds=_LATENCIES,
    text="How long connections took for a stage of the handshake, of those that passed it.",
)
HANDSHAKE_SECONDS = _histogram(
    "tlstunnel_handshake_seconds",
    bounds=_LATENCIES,
    text="How long it took from accepting a connection to its open tunnel.",
)
FIREWALL_CHECK_SECONDS = _histogram(
    "tlstunnel_firewall_check_seconds",
    "check",
    bounds=_LATENCIES,
    text="How long the checks of the firewall took, whatever they decided.",
)
TUNNELS_OPENED = _counter("tlstunnel_tunnels_opened_total", "site", text="WebSocket handshakes that opened a tunnel.")
SHORT_TUNNELS = _counter(
    "tlstunnel_short_tunnels_total", "site", text="Tunnels that ended within a second of their connection."
)
TUNNEL_LIFETIME_SECONDS = _histogram(
    "tlstunnel_tunnel_lifetime_seconds",
    bounds=_LIFETIMES,
    text="The age of tunnels when they ended, from accepting the connection.",
)
BYTES = _counter(
    "tlstunnel_bytes_total",
    "site",
    "direction",
    text="Bytes moved by tunnels, without TLS and HTTP: up from clients to origins, down from origins to clients.",
)
SITE_CPU_SECONDS = _counter(
    "tlstunnel_site_cpu_seconds_total",
    "site",
    divisor=MICROSECONDS,
    text="CPU time of the serving processes, as estimated for each site from its handshakes and bytes.",
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
    "tlstunnel_count_questions_total",
    "answered_by",
    text="Questions about rate limits and open tunnels while there is a ledger, by what answered them.",
)
COUNTER_QUESTION_SECONDS = _histogram(
    "tlstunnel_count_question_seconds",
    bounds=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    text="How long a process waited for the ledger's answer to a question.",
)
LEDGER_FAILURES = _counter(
    "tlstunnel_ledger_failures_total", "reason", text="Times that a process could not count with the others any more."
)
ORIGIN_FAILURES = _counter(
    "tlstunnel_origin_failures_total",
    "origin",
    "address",
    "reason",
    most=2 * MOST_ORIGINS,
    text="Attempts of handshakes and health checks that failed because of an origin.",
)
ORIGIN_EJECTIONS = _counter(
    "tlstunnel_origin_ejections_total",
    "origin",
    "address",
    most=MOST_ORIGINS,
    text="Times that a process has ejected an address of an origin.",
)
LOG_LINES_LOST = _counter(
    "tlstunnel_log_lines_lost_total", text="Lines of the log that were lost because nothing read them in time."
)
EVENT_LOOP_LAG_SECONDS = _histogram(
    "tlstunnel_event_loop_lag_seconds",
    bounds=_LATENCIES,
    text="How late timers of serving processes ran, measured four times a second while the metrics are read.",
)
TUNNELS = _gauge("tlstunnel_tunnels", "site", text="Tunnels that are open.")
UNFINISHED_HANDSHAKES = _gauge("tlstunnel_unfinished_handshakes", text="Connections whose handshake is not complete.")
OPEN_CONNECTIONS = _gauge(
    "tlstunnel_open_connections", text="Connections that are open, from accepting to the end of the tunnel."
)
MOST_OPEN_CONNECTIONS = _gauge(
    "tlstunnel_open_connections_limit", text="Connections that the descriptors of all processes allow."
)
PROCESSES_COUNTING_ALONE = _gauge("tlstunnel_processes_counting_alone", text="Processes that cannot reach the ledger.")
ORIGIN_UP = _gauge(
    "tlstunnel_origin_up",
    "origin",
    "address",
    lowest=True,
    most=2 * MOST_ORIGINS,
    text="Whether all processes use an address of an origin: 0 if it is ejected or fails its health check.",
)
ORIGIN_TUNNELS = _gauge(
    "tlstunnel_origin_tunnels",
    "origin",
    "address",
    most=2 * MOST_ORIGINS,
    text="Tunnels at an address of an origin, including handshakes in progress.",
)
CERTIFICATE_EXPIRY = _gauge(
    "tlstunnel_certificate_expiry_timestamp_seconds",
    "certificate",
    lowest=True,
    most=MOST_CERTIFICATES,
    text="When a certificate that is served expires.",
)
LEDGER_UP = _gauge("tlstunnel_ledger_up", text="Whether the ledger responds. There is none if nothing needs it.")
LEDGER_CONNECTIONS = _gauge("tlstunnel_ledger_connections", text="Processes that are connected to the ledger.")
LEDGER_KEYS = _gauge("tlstunnel_ledger_keys", text="Keys of rate limits that the ledger has in memory.")
LEDGER_LEASES = _gauge("tlstunnel_ledger_leases", text="Open tunnels that the ledger counts.")
LEDGER_QUESTIONS = _counter(
    "tlstunnel_ledger_questions_total", "outcome", text="Questions that reached the ledger, by what became of them."
)
VALKEY_UP = _gauge(
    "tlstunnel_valkey_up", text="Whether the ledger reaches the server of state.url. Without one there is no value."
)
HISTORY_WAITING = _gauge(
    "tlstunnel_history_waiting_seconds", text="How much of the history is not written yet, in whole minutes."
)
HISTORY_LOST = _gauge("tlstunnel_history_lost_seconds", text="How much of the history was lost since the ledger began.")
PROCESSES = _gauge("tlstunnel_processes", "role", "state", text="Processes besides the parent.")
PROCESSES_WANTED = _gauge(
    "tlstunnel_processes_wanted", "role", text="Processes that should run, of the current release."
)
PROCESS_EXITS = _counter(
    "tlstunnel_process_exits_total", "role", text="Processes that exited by themselves, and were restarted."
)
PROCESS_MEMORY = _gauge(
    "tlstunnel_process_resident_memory_bytes",
    "role",
    "generation",
    "place",
    text="Resident memory of a process. Pages that processes share count in each of them.",
)
PROCESS_DESCRIPTORS = _gauge(
    "tlstunnel_process_open_fds", "role", "generation", "place", text="Open descriptors of a process."
)
PROCESS_MOST_DESCRIPTORS = _gauge(
    "tlstunnel_process_max_fds", "role", "generation", "place", text="Descriptors that a process may open."
)
CPU_SECONDS = _counter(
    "tlstunnel_cpu_seconds_total",
    divisor=MICROSECONDS,
    text="CPU time of all processes, those that have exited included.",
)
MEMORY_USED = _gauge(
    "tlstunnel_memory_used_ratio",
    divisor=MICROSECONDS,
    text="The share of memory that is used, of the machine or of the control group, whichever is more.",
)
GENERATION = _gauge("tlstunnel_generation", text="Programs that the parent has run: 1, and one more for each upgrade.")
DRAINING_TUNNELS = _gauge("tlstunnel_draining_tunnels", text="Open tunnels of processes that drain.")
SHUTTING_DOWN = _gauge("tlstunnel_shutting_down", text="Whether the whole tunnel drains, and then exits.")
START_TIME = _gauge("tlstunnel_start_time_seconds", divisor=MICROSECONDS, text="When the parent process started.")
CONFIG_RELOADS = _counter("tlstunnel_config_reloads_total", "outcome", text="Reloads of the configuration.")
CONFIG_LOADED = _gauge("tlstunnel_config_last_reload_successful", text="Whether the last reload was successful.")
CONFIG_LOAD_TIME = _gauge(
    "tlstunnel_config_last_reload_success_timestamp_seconds",
    divisor=MICROSECONDS,
    text="When the configuration that is served was loaded.",
)
BUILD_INFO = _gauge(
    "tlstunnel_build_info", "version", "python", "openssl", text="1, with the releases that the parent runs."
)

SITE_VALUES: tuple[tuple[Family, tuple[str, ...], str], ...] = (
    (TUNNELS, (), "tunnels"),
    (TUNNELS_OPENED, (), "handshakes"),
    (SHORT_TUNNELS, (), "short"),
    (HANDSHAKES, ("opened",), "handshakes"),
    (HANDSHAKES, ("unfinished",), "unfinished"),
    (HANDSHAKES, ("invalid",), "invalid"),
    (HANDSHAKES, ("blocked",), "blocked"),
    (HANDSHAKES, ("limited",), "limited"),
    (HANDSHAKES, ("worker",), "worker"),
    (HANDSHAKES, ("origin",), "origin"),
    (HANDSHAKES, ("declined",), "declined"),
    (BYTES, ("up",), "bytes_up"),
    (BYTES, ("down",), "bytes_down"),
    (SITE_CPU_SECONDS, (), "cpu"),
)
"""What the parent knows of each site (`tlstunnel.metrics.usage.FIELDS`, and the CPU time): exact for any number of
sites. The family, the values of its labels after the site, and the field."""

SITE_FAMILIES = frozenset(family.name for family, _, _ in SITE_VALUES)
"""Their names. Processes do not count these; those of earlier releases do."""
