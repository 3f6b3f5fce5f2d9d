"""The words of the log: what happened, why, who ended it. `docs/log.md` explains each, and a test compares the two.

The texts are part of the public interface: scripts and alerts match them. To add one, add it here and there.
"""

from enum import StrEnum


class Word(StrEnum):
    """A fixed text of the log. It is a string in every respect; also its `repr`, which the text format writes."""

    __repr__ = str.__repr__


class Event(Word):
    """What a line of the log is about: its field `event`."""

    # Connections
    CONNECTION = "connection"
    OPENED = "opened"
    NO_TLS_HANDSHAKE = "no TLS handshake"
    NOT_ACCEPTED = "not accepted"
    ACCEPTING_PAUSED = "accepting paused"

    # Start and configuration
    CONFIGURATION_FILE = "configuration file"
    LISTENING = "listening"
    READY = "ready"
    RUNNING_AS_ROOT = "running as root"
    NO_IPV6 = "IPv6 not available"
    NO_CONTROL_SOCKET = "no control socket"
    CONTROL_SOCKET = "control socket"
    ADMIN_ADDRESS = "admin address"
    NO_ADMIN_ADDRESS = "no admin address"
    ADMIN_NOT_CONFIGURED = "admin settings not used"
    ACTION = "action"
    TOKEN_REFUSED = "token refused"  # noqa: S105 - not a password
    LOGIN = "login"
    LOGOUT = "logout"
    ECHO_ORIGIN = "embedded echo origin"
    TEST_CERTIFICATE = "test certificate"
    ORIGINS_NOT_VERIFIED = "origins not verified"
    OPEN_TO_WEB_PAGES = "open to web pages"
    NAMES_NOT_IN_CERTIFICATE = "names not in certificate"
    CERTIFICATE_PURPOSE = "certificate for another purpose"
    REQUESTS_SPREAD = "plain requests spread over origins"
    RELOADED = "reloaded"
    NOT_RELOADED = "not reloaded"

    # Releases and processes
    UPGRADED = "upgraded"
    NOT_UPGRADED = "not upgraded"
    UPGRADE_PROCESSES_FAILED = "upgrade: new processes do not start"
    UPGRADE_LISTENERS_KEPT = "upgrade: previous listeners kept"
    PACKAGE_REPLACED = "package replaced on disk"
    PROCESS_EXITED = "process exited"
    PROCESS_NOT_STARTED = "process not started"
    PROCESS_DRAINED = "process drained"
    PROCESS_SILENT = "process does not respond"
    PROCESS_RESPONDS = "process responds again"
    PROCESS_KILLED = "process killed"
    PROCESS_STACK = "process stack"
    PARENT_EXITED = "parent exited"
    THREADS_ABANDONED = "threads abandoned"

    # Counting together
    LEDGER = "ledger"
    LEDGER_REPLACED = "ledger replaced"
    COUNTING = "counting"
    ELECTION = "election"
    ENDED_TAGS = "ended tags"

    # The end
    DRAIN_REQUESTED = "drain requested"
    DRAINING = "draining"
    STOPPED = "stopped"

    # Certificates
    CERTIFICATES = "certificates"
    CERTIFICATE_WARNING = "certificate warning"
    CERTIFICATE_REPLACED = "certificate replaced"
    CERTIFICATE_NOT_REPLACED = "certificate not replaced"
    CERTIFICATE_CHECK_FAILED = "certificate check failed"

    # Origins
    ORIGIN_EJECTED = "origin ejected"
    ORIGIN_RESTORED = "origin restored"
    ORIGIN_DOWN = "origin down"
    ORIGIN_UP = "origin up"
    HEALTH_CHECK_FAILED = "health check failed"

    # The firewall
    LIST_RELOADED = "list reloaded"
    LIST_NOT_RELOADED = "list not reloaded"
    RULE_FAILED = "rule failed"
    RATE_LIMIT_CONDITION_FAILED = "rate limit condition failed"
    MANAGED_RULES = "managed rules"

    # Edge workers
    WORKER_FAILED = "edge worker failed"
    WORKER_TIMED_OUT = "edge worker timed out"
    WORKER_BUSY = "edge worker busy"
    WORKER_BLOCKING = "edge worker blocks the event loop"
    WORKER_HOLDS_GIL = "edge worker holds the GIL"
    WORKER_RESUMED = "edge worker resumed"
    WORKER_TEARDOWN_FAILED = "edge worker teardown failed"
    WORKER_TEARDOWN_TIMED_OUT = "edge worker teardown timed out"
    EDGE_THREAD_REPLACED = "edge thread replaced"
    EDGE_TASK_EXITED = "edge task tried to exit the process"

    # Resources
    RUNNING_SHORT = "running short"
    NO_LONGER_SHORT = "no longer short"

    # The history
    HISTORY_OPENED = "history opened"
    MACHINE_AWAY = "machine away"
    MACHINE_BACK = "machine back"
    HISTORY_NOT_OPENED = "history not opened"
    HISTORY_NOT_CLOSED = "history not closed in time"
    HISTORY_NOT_WRITTEN = "history not written"
    HISTORY_MINUTES_LOST = "history minutes lost"
    HISTORY_WRITTEN_AGAIN = "history written again"

    # Notices
    NOTICE = "notice"
    NOTICE_DELIVERED = "notice delivered"
    NOTICE_NOT_DELIVERED = "notice not delivered"
    NOTICE_PLOT_FAILED = "notice without its plot"
    NOTICES_NOT_WRITTEN = "notices not written"
    NOTICES_WRITTEN_AGAIN = "notices written again"

    # Plans
    NOT_ASSESSED = "sites not assessed"
    NOT_CONFIGURED = "plans not reloaded"
    SITE_THROTTLED = "site throttled"
    THROTTLE_RELEASED = "throttle released"

    # The log itself, and bugs
    LINES_LOST = "log lines lost"
    LOG_FILE_NOT_WRITTEN = "log file not written"
    LOG_FILE_WRITTEN_AGAIN = "log file written again"
    TUNNEL_FAILED = "tunnel failed"
    SPLICE_FAILED = "splice failed"
    HANDLER_FAILED = "handler failed"
    REQUEST_FAILED = "request failed"
    COMMAND_FAILED = "command failed"
    NOTIFICATION_FAILED = "notification failed"
    NOTICE_FAILED = "notice failed"
    ADMIN_REQUEST_FAILED = "admin request failed"


class EndedBy(Word):
    """Who ended a connection: the field `ended_by` of its record."""

    CLIENT = "client"
    ORIGIN = "origin"
    TUNNEL = "tunnel"


class Decision(Word):
    """Whose response the client got: the field `verdict` of the record, empty when there was none."""

    NONE = ""
    PASS = "pass"  # noqa: S105 - not a password
    REFUSED = "refused"


class WorkerOutcome(Word):
    """The outcome of calling an edge worker: the field `edge` of the record, and a label of its metric."""

    FORWARDED = "forwarded"
    REPLIED = "replied"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    BUSY = "busy"


class Reason(Word):
    """Why a connection ended or was not accepted: the field `reason` of its line.

    Those of `VARIABLE` are followed by a colon and a text that is not fixed, such as OpenSSL's name of an error.
    """

    # After a 101
    CLOSED = "closed"
    TRUNCATED = "truncated"
    RESET = "reset"
    TLS_ERROR = "TLS error"
    SOCKET_ERROR = "socket error"
    NO_ACKNOWLEDGEMENT = "no acknowledgement"
    IDLE_TIMEOUT = "idle timeout"
    CLOSE_TIMEOUT = "close timeout"
    MAX_AGE = "max age"
    EXPIRED = "expired"
    ENDED_BY_REQUEST = "ended by request"
    SITE_REMOVED = "site removed"
    DRAINED = "drained"
    STOPPED = "stopped"
    INTERNAL_ERROR = "internal error"

    # The origin sent another response
    DECLINED = "declined"
    RESPONDED = "responded"
    MALFORMED_BODY = "malformed body"
    RESPONSE_TRUNCATED = "response truncated"
    CLOSED_DURING_RESPONSE = "closed during the response"
    RESPONSE_TIMED_OUT = "response timed out"

    # No response
    CLOSED_DURING_HANDSHAKE = "closed during the handshake"
    HANDSHAKE_ABORTED = "handshake aborted"

    # Refused: the request
    MALFORMED_HEAD = "malformed head"
    BARE_LF = "bare LF"
    CONTROL_CHARACTER = "control character"
    FOLDED_FIELD = "folded field"
    TARGET_FORM = "target form"
    HOST = "Host"
    BODY = "body"
    CONNECTION_FIELD = "Connection"
    KEY_FIELD = "Sec-WebSocket-Key"
    METHOD = "method"
    REQUEST_TIMED_OUT = "request timed out"
    MISDIRECTED = "misdirected"
    NO_UPGRADE = "no upgrade"
    WEBSOCKET_VERSION = "WebSocket version"
    HEAD_TOO_LARGE = "head too large"
    TOO_MANY_FIELDS = "too many fields"
    HTTP_VERSION = "HTTP version"
    CLIENT_CERTIFICATE = "client certificate"
    CLIENT_EXPIRED = "client certificate expired"
    CLIENT_REVOKED = "client certificate revoked"
    CLIENT_CRL_EXPIRED = "revocation list expired"
    CLIENT_NO_CRL = "no revocation list"

    # Refused: the firewall
    AMBIGUOUS_TARGET = "ambiguous target"
    TOO_MANY_QUERY_VALUES = "too many query values"
    TOO_MANY_COOKIES = "too many cookies"
    TOO_MANY_ELEMENTS = "too many elements"
    REPEATED_FIELD = "repeated field"
    ADDRESS_BLOCKED = "address blocked"
    ADDRESS_NOT_ALLOWED = "address not allowed"
    WEB_ORIGIN_MISSING = "web origin missing"
    WEB_ORIGIN_NOT_ALLOWED = "web origin not allowed"
    RULE = "rule"
    RATE_LIMIT = "rate limit"
    NOT_COUNTED = "counts out of reach"
    THROTTLED = "throttled"
    MANAGED_RULES = "managed rules"
    MANAGED_RULES_GUARD = "managed rules: guard"
    MANAGED_RULES_FAILURE = "managed rules: failure"

    # Refused: the edge worker
    WORKER_FAILED = "edge: worker failed"
    WORKER_ORIGIN = "edge: origin not allowed"
    WORKER_BUSY = "edge: worker busy"
    WORKER_TIMED_OUT = "edge: worker timed out"
    WORKER_REPLY = "edge: reply"
    WORKER_EXPIRED = "edge: expired"

    # Refused: the origin
    TOO_MANY_UPLOADS = "too many uploads"
    ORIGIN_UNREACHABLE = "origin unreachable"
    ORIGIN_CONNECT_TIMED_OUT = "origin connect timed out"
    ORIGIN_FAILED = "origin failed"
    ORIGIN_RESPONSE_TIMED_OUT = "origin response timed out"
    INVALID_RESPONSE = "invalid response"
    NO_ORIGIN = "no origin"
    OUT_OF_RESOURCES = "out of resources"
    ORIGIN_NO_TLS = "origin does not speak TLS"
    ORIGIN_TLS_FAILED = "origin TLS failed"
    ORIGIN_NOT_TRUSTED = "origin certificate not trusted"
    ORIGIN_SELF_SIGNED = "origin certificate self-signed"
    ORIGIN_UNKNOWN_ISSUER = "origin certificate from unknown issuer"
    ORIGIN_WRONG_NAME = "origin certificate for another name"
    ORIGIN_EXPIRED = "origin certificate expired"
    ORIGIN_NOT_YET_VALID = "origin certificate not yet valid"

    # Not accepted, accepting paused
    UNTRUSTED_PROXY = "untrusted proxy"
    OUT_OF_DESCRIPTORS = "out of descriptors"
    OUT_OF_MEMORY = "out of memory"

    # Before the TLS handshake is complete
    PROXY_TIMED_OUT = "PROXY header: timed out"
    PROXY_CLIENT_CLOSED = "PROXY header: client closed"
    PROXY_MALFORMED = "PROXY header: malformed"
    HELLO_TIMED_OUT = "hello: timed out"
    HELLO_CLIENT_CLOSED = "hello: client closed"
    HELLO_PLAIN_HTTP = "hello: plain HTTP"
    HELLO_NOT_TLS = "hello: not TLS"
    HELLO_MALFORMED = "hello: malformed"
    HELLO_TLS_VERSION = "hello: no TLS 1.2 or 1.3"
    HELLO_FINITE_FIELD = "hello: finite-field key exchange"
    HELLO_ALPN = "hello: no common ALPN protocol"
    HELLO_NO_SITE = "hello: no site for this name"
    TLS_TIMED_OUT = "tls: timed out"
    TLS_CLIENT_CLOSED = "tls: client closed"
    TLS_FAILED = "tls: handshake failed"
    TLS_NO_CLIENT_CERTIFICATE = "tls: no client certificate"
    TLS_CLIENT_UNKNOWN_ISSUER = "tls: client certificate from unknown issuer"
    TLS_CLIENT_EXPIRED = "tls: client certificate expired"
    TLS_CLIENT_NOT_YET_VALID = "tls: client certificate not yet valid"
    TLS_CLIENT_REVOKED = "tls: client certificate revoked"
    TLS_CLIENT_OTHER_PURPOSE = "tls: client certificate for another purpose"
    TLS_CLIENT_NOT_TRUSTED = "tls: client certificate not trusted"
    TLS_CLIENT_CHAIN_TOO_LONG = "tls: client certificate chain too long"
    TLS_CLIENT_NO_CRL = "tls: no revocation list"
    TLS_CLIENT_CRL_EXPIRED = "tls: revocation list expired"
    TLS_ABORTED = "tls: handshake aborted"
    TLS_OUT_OF_RESOURCES = "tls: out of resources"
    TLS_SOCKET_ERROR = "tls: socket error"
    TLS_INTERNAL_ERROR = "tls: internal error"


VARIABLE = frozenset({Reason.TLS_ERROR, Reason.SOCKET_ERROR, Reason.RULE, Reason.RATE_LIMIT, Reason.TLS_SOCKET_ERROR})
"""Reasons that a text of the system, of OpenSSL or of the configuration follows."""

_FIXED = {str(reason): reason for reason in Reason}


def fixed_reason(reason: str) -> Reason | None:
    """Return the fixed part of `reason`, or None for one that is not in the table.

    Metrics have it as a label: there are few of them, whatever clients do.
    """
    fixed = _FIXED.get(reason)
    if fixed is not None:
        return fixed
    for one in VARIABLE:
        if reason.startswith(f"{one}: "):
            return one
    return None
