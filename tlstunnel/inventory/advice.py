"""For each reason of the log: what to do about it, and the page that explains it.

Tested by tests/unit/test_inventory_advice.py.
"""

from collections.abc import Mapping
from typing import NamedTuple

from tlstunnel.journal.events import Reason, fixed_reason


class Advice(NamedTuple):
    """What to do, in a sentence or two, and a page of the documents with its heading's anchor."""

    text: str
    document: str


_REFUSALS = "docs/handshake.md#refusals"
_BEFORE_TLS = "docs/log.md#before-the-tls-handshake-is-complete"
_CLIENT_CERTIFICATES = "docs/certificates.md#client-certificates"
_ORIGIN_FAILS = "docs/origins.md#when-an-origin-fails"
_ORIGIN_TLS = "docs/origins.md#tls-on-to-the-origin"
_WORKER_FAILS = "docs/edge.md#when-it-fails"
_RECORD = "docs/log.md#ended_by-and-reason"
_PATH = "docs/firewall.md#the-path"
_MANAGED = "docs/firewall.md#managed-rules"

_INVALID = Advice(
    "The client sends a request that violates HTTP or the WebSocket handshake; no setting accepts it. Try the client "
    "without the tunnel, and correct or update it.",
    _REFUSALS,
)
_BUG = Advice(
    "This is a bug in tlstunnel. The log has a line of level error with a traceback: please report it.", _RECORD
)
_NORMAL = Advice("This is how connections usually end; nothing needs to change.", _RECORD)
_CLIENT_LEFT = Advice(
    "The client closed the connection itself. If many do, they may not have the patience that the origin needs: look "
    "at its latency.",
    _RECORD,
)
_ADDRESS = Advice(
    "Take the address out of block_addresses, or add it to allow_addresses, of the site or of all sites. "
    'addresses_mode = "log" only logs such clients.',
    "docs/firewall.md#lists",
)
_CRL = Advice(
    "client_crl has no current list of the authority that issued the certificate, so all of its clients are refused. "
    "Download the list again; it is read again by itself.",
    _CLIENT_CERTIFICATES,
)
_NOT_IN_TIME = Advice(
    "The client was too slow, or it is a port scan or a health check by TCP. timeouts.tls_handshake allows more time.",
    "docs/configuration.md#timeouts",
)
_PROXY_HEADER = Advice(
    "The peer sends no valid PROXY header, which proxy_protocol requires. Turn it on in the proxy, or list in "
    "proxy_protocol_listen only the addresses that the proxy connects to.",
    "docs/handshake.md#trusted-proxies",
)
_SHORTAGE = Advice(
    "The process has no descriptors, ports or memory left. Raise the limit on open files (LimitNOFILE), or start more "
    "processes.",
    "docs/operations.md#processes",
)
_TOO_MANY_VALUES = Advice(
    "The request has more values than the firewall evaluates, so it cannot be checked reliably. Ordinary clients stay "
    "far below the bounds; they are fixed.",
    "docs/firewall.md#bounds",
)
_ORIGIN_TRUST = Advice(
    "The origin's certificate was not issued by an authority that is trusted. Name its authority in origin_ca.",
    _ORIGIN_TLS,
)
_ORIGIN_VALIDITY = Advice("Renew the origin's certificate, and check the clocks of both machines.", _ORIGIN_TLS)
_CLIENT_ISSUER = Advice(
    "The client's certificate was not issued by an authority in client_ca, or the client does not send the "
    "intermediate certificates.",
    _CLIENT_CERTIFICATES,
)
_CLIENT_VALIDITY = Advice(
    "Renew the client's certificate, and check the clocks of both machines.", _CLIENT_CERTIFICATES
)
_CLIENT_REVOKED = Advice(
    "The client's certificate is on a list in client_crl. Issue another one to the client, if it may connect.",
    _CLIENT_CERTIFICATES,
)
_PEER_FAILED = Advice(
    "The connection of the client failed, most often because it was reset or its network is gone.", _RECORD
)

_ADVICE: Mapping[Reason, Advice] = {
    # After a 101
    Reason.CLOSED: _NORMAL,
    Reason.TRUNCATED: Advice(
        "The peer ended without closing its TLS: its process was killed, or it is a client that never does so.",
        _RECORD,
    ),
    Reason.RESET: Advice("The peer reset the connection, as a process that is killed does.", _RECORD),
    Reason.TLS_ERROR: Advice(
        "The peer sent invalid TLS, or an alert that ends the connection. The name is OpenSSL's.",
        _RECORD,
    ),
    Reason.SOCKET_ERROR: _PEER_FAILED,
    Reason.NO_ACKNOWLEDGEMENT: Advice(
        "The peer's machine or its network is gone. timeouts.acknowledge says how long the tunnel waits for it.",
        "docs/configuration.md#timeouts",
    ),
    Reason.IDLE_TIMEOUT: Advice(
        "Nothing was sent for timeouts.idle. Let the application send pings more often, or raise it.",
        "docs/configuration.md#timeouts",
    ),
    Reason.CLOSE_TIMEOUT: Advice(
        "A side took nothing of what was left for timeouts.close, after the other side had ended.",
        "docs/configuration.md#timeouts",
    ),
    Reason.MAX_AGE: Advice(
        "The site's max_age has passed. Clients are expected to connect again.", "docs/configuration.md#sites"
    ),
    Reason.EXPIRED: Advice(
        "The time that the edge worker passed as until is over. Clients are expected to connect again.",
        "docs/edge.md#how-long-a-tunnel-may-be-open",
    ),
    Reason.ENDED_BY_REQUEST: Advice(
        "Somebody ended it, by tlstunnel tunnels end or the API. The record says who, and why.",
        "docs/cli.md#tunnels-end",
    ),
    Reason.SITE_REMOVED: Advice(
        "The site was removed from the configuration, and drain_removed is set.",
        "docs/configuration.md#the-top-of-the-file",
    ),
    Reason.DRAINED: Advice(
        "The process was draining, for a release or a shutdown. The keys in [release] say how long tunnels may go on.",
        "docs/operations.md#draining",
    ),
    Reason.STOPPED: Advice("The process was stopped at once, by a second signal.", "docs/operations.md#draining"),
    Reason.INTERNAL_ERROR: _BUG,
    # The origin sent another response
    Reason.DECLINED: Advice(
        "The origin itself refused the upgrade, and its response was passed on. Look at its status and at the origin's "
        "log; the id is in its X-Request-Id.",
        "docs/handshake.md#how-the-response-is-verified",
    ),
    Reason.RESPONDED: Advice(
        "A plain request was passed on, and answered by the origin.", "docs/handshake.md#plain-requests"
    ),
    Reason.MALFORMED_BODY: Advice(
        "The body of the client's request violates its framing. Correct the client.", "docs/handshake.md#plain-requests"
    ),
    Reason.RESPONSE_TRUNCATED: Advice(
        "The origin broke off in the middle of its response. Look at its log; it may have been restarted.",
        _ORIGIN_FAILS,
    ),
    Reason.CLOSED_DURING_RESPONSE: _CLIENT_LEFT,
    Reason.RESPONSE_TIMED_OUT: Advice(
        "Nothing of the response moved for timeouts.close: the client did not read, or the origin did not go on.",
        "docs/configuration.md#timeouts",
    ),
    # No response
    Reason.CLOSED_DURING_HANDSHAKE: _CLIENT_LEFT,
    Reason.HANDSHAKE_ABORTED: Advice(
        "It was the oldest of too many handshakes in progress, or the process was stopped. Raise "
        "limits.unfinished_handshakes if there is no attack.",
        "docs/configuration.md#limits",
    ),
    # Refused: the request
    Reason.MALFORMED_HEAD: _INVALID,
    Reason.BARE_LF: _INVALID,
    Reason.CONTROL_CHARACTER: _INVALID,
    Reason.FOLDED_FIELD: _INVALID,
    Reason.TARGET_FORM: _INVALID,
    Reason.HOST: _INVALID,
    Reason.BODY: _INVALID,
    Reason.CONNECTION_FIELD: _INVALID,
    Reason.KEY_FIELD: _INVALID,
    Reason.METHOD: Advice(
        'A WebSocket handshake is a GET. If the site has pages or an API too, http = "pass" passes such requests on.',
        "docs/handshake.md#plain-requests",
    ),
    Reason.REQUEST_TIMED_OUT: Advice(
        "The request was not complete in time. timeouts.request allows more time.", "docs/configuration.md#timeouts"
    ),
    Reason.MISDIRECTED: Advice(
        "The Host field does not name the site that the client asked for in TLS. Add the name to the names of the "
        "site, with a certificate for it.",
        "docs/troubleshooting.md#421-misdirected-request",
    ),
    Reason.NO_UPGRADE: Advice(
        'The request asks for no WebSocket: open wss:// with a WebSocket client. http = "pass" passes plain requests '
        "on; a proxy in front must pass the Upgrade field on.",
        "docs/troubleshooting.md#405-method-not-allowed-426-upgrade-required",
    ),
    Reason.WEBSOCKET_VERSION: Advice(
        "The client speaks a version of the protocol from before RFC 6455. Update it.", _REFUSALS
    ),
    Reason.HEAD_TOO_LARGE: Advice(
        "The head has more than 16 384 bytes, mostly because of cookies. Send fewer; the bound is fixed.", _REFUSALS
    ),
    Reason.TOO_MANY_FIELDS: Advice("The head has more than 100 fields. Send fewer; the bound is fixed.", _REFUSALS),
    Reason.HTTP_VERSION: Advice(
        "The tunnel speaks HTTP/1.1. Let the proxy in front use HTTP/1.1 to the tunnel.", _REFUSALS
    ),
    Reason.CLIENT_CERTIFICATE: Advice(
        "The client's certificate is valid, but none of its names is in client_allow. Add one.", _CLIENT_CERTIFICATES
    ),
    Reason.CLIENT_EXPIRED: _CLIENT_VALIDITY,
    Reason.CLIENT_REVOKED: _CLIENT_REVOKED,
    Reason.CLIENT_CRL_EXPIRED: _CRL,
    Reason.CLIENT_NO_CRL: _CRL,
    # Refused: the firewall
    Reason.AMBIGUOUS_TARGET: Advice(
        "The path has something that servers read in different ways, such as %2f, // or /../. If the origin needs such "
        "paths, set strict_path = false for the site.",
        _PATH,
    ),
    Reason.TOO_MANY_QUERY_VALUES: _TOO_MANY_VALUES,
    Reason.TOO_MANY_COOKIES: _TOO_MANY_VALUES,
    Reason.TOO_MANY_ELEMENTS: _TOO_MANY_VALUES,
    Reason.REPEATED_FIELD: Advice(
        "A field that must be there once came twice, so that origins could read another one than the firewall. Correct "
        "the client, or the proxy in front.",
        "docs/firewall.md#repeated-fields",
    ),
    Reason.ADDRESS_BLOCKED: _ADDRESS,
    Reason.ADDRESS_NOT_ALLOWED: _ADDRESS,
    Reason.WEB_ORIGIN_MISSING: Advice(
        "Browsers send an Origin field, and this client sent none. require_web_origin = false lets other programs in.",
        "docs/firewall.md#the-origin-check",
    ),
    Reason.WEB_ORIGIN_NOT_ALLOWED: Advice(
        'The page that opened the WebSocket is not in web_origins of the site. Add it, such as "https://app.example.com"'
        '; "same" stands for the site itself. web_origins_mode = "log" only logs.',
        "docs/firewall.md#the-origin-check",
    ),
    Reason.RULE: Advice(
        "Change the expression of the rule with this name in rules. tlstunnel firewall explain shows how it sees a "
        'request, and mode = "log" tries a change without refusing anything.',
        "docs/firewall.md#trying-a-policy",
    ),
    Reason.RATE_LIMIT: Advice(
        "Raise limit or max_tunnels of the rate limit with this name in rate_limits, or count by another key: clients "
        'behind one address share it. mode = "log" only logs.',
        "docs/firewall.md#rate-limits",
    ),
    Reason.NOT_COUNTED: Advice(
        'The counts cannot be reached, and state.on_failure is "refuse". Repair the server in state.url, or choose '
        '"local".',
        "docs/operations.md#counting-together",
    ),
    Reason.THROTTLED: Advice(
        "The site, or this address at it, is throttled for a while. tlstunnel usage release ends that.",
        "docs/plans.md#throttles",
    ),
    Reason.MANAGED_RULES: Advice(
        "The managed rules with these ids matched. Put one into exclude in managed_rules of the site, or raise "
        'threshold; mode = "log" only logs.',
        _MANAGED,
    ),
    Reason.MANAGED_RULES_GUARD: Advice(
        "The request would take the managed rules too long, so it was refused before. A rule with action skip for "
        "this path leaves them out.",
        _MANAGED,
    ),
    Reason.MANAGED_RULES_FAILURE: Advice(
        "The managed rules did not answer in time, or their helpers fail. on_failure says what happens then; see the "
        "log for the cause.",
        _MANAGED,
    ),
    # Refused: the edge worker
    Reason.WORKER_FAILED: Advice(
        'The worker raised an exception, or returned something invalid: the log has it. worker_on_error = "forward" '
        "lets requests go on.",
        _WORKER_FAILS,
    ),
    Reason.WORKER_ORIGIN: Advice(
        "The worker chose an origin that is neither one of the site nor in worker_origins. Add it there.",
        "docs/edge.md#forward",
    ),
    Reason.WORKER_BUSY: Advice(
        "Too many calls of the worker are late. Make it faster; it must not block.", _WORKER_FAILS
    ),
    Reason.WORKER_TIMED_OUT: Advice(
        "The worker did not return within worker_timeout. Raise it, or make the worker faster.", _WORKER_FAILS
    ),
    Reason.WORKER_REPLY: Advice(
        "The worker of the site replied itself. Change its code, or the data that it decides by.", "docs/edge.md#reply"
    ),
    Reason.WORKER_EXPIRED: Advice(
        "The time that the worker passed as until was over. Have the client renew its token or session.",
        "docs/edge.md#how-long-a-tunnel-may-be-open",
    ),
    # Refused: the origin
    Reason.TOO_MANY_UPLOADS: Advice(
        "Too many requests with a body from this address wait for their response. Look at how long the origin takes.",
        "docs/handshake.md#plain-requests",
    ),
    Reason.ORIGIN_UNREACHABLE: Advice(
        "Start the origin, or correct its address in origins. The detail has the system's error.",
        "docs/troubleshooting.md#502-bad-gateway",
    ),
    Reason.ORIGIN_CONNECT_TIMED_OUT: Advice(
        "The origin's machine does not respond: is a firewall in between? timeouts.origin_connect allows more time.",
        "docs/troubleshooting.md#504-gateway-timeout",
    ),
    Reason.ORIGIN_FAILED: Advice(
        "The origin closed the connection before it responded. Look at its log; it may have crashed, or it speaks TLS "
        "and needs wss:// in origins.",
        "docs/troubleshooting.md#502-bad-gateway",
    ),
    Reason.ORIGIN_RESPONSE_TIMED_OUT: Advice(
        "The origin accepted the connection and did not respond in time. timeouts.origin_response allows more time.",
        "docs/troubleshooting.md#504-gateway-timeout",
    ),
    Reason.INVALID_RESPONSE: Advice(
        "The origin's response to the WebSocket handshake is not valid. The detail says what is wrong with it.",
        "docs/handshake.md#how-the-response-is-verified",
    ),
    Reason.NO_ORIGIN: Advice(
        "All origins are full or cannot be reached. Add one, raise max_tunnels, or see under origins which one fails.",
        _ORIGIN_FAILS,
    ),
    Reason.OUT_OF_RESOURCES: _SHORTAGE,
    Reason.ORIGIN_NO_TLS: Advice(
        "The origin does not speak TLS on this port. Write it without wss:// in origins, or correct the port.",
        _ORIGIN_TLS,
    ),
    Reason.ORIGIN_TLS_FAILED: Advice(
        "The TLS handshake with the origin failed. The detail has OpenSSL's error; it may want a certificate "
        "(origin_cert).",
        _ORIGIN_TLS,
    ),
    Reason.ORIGIN_NOT_TRUSTED: _ORIGIN_TRUST,
    Reason.ORIGIN_SELF_SIGNED: _ORIGIN_TRUST,
    Reason.ORIGIN_UNKNOWN_ISSUER: _ORIGIN_TRUST,
    Reason.ORIGIN_WRONG_NAME: Advice(
        "The origin's certificate is for another name. Set origin_name to a name in it.", _ORIGIN_TLS
    ),
    Reason.ORIGIN_EXPIRED: _ORIGIN_VALIDITY,
    Reason.ORIGIN_NOT_YET_VALID: _ORIGIN_VALIDITY,
    # Not accepted, accepting paused
    Reason.UNTRUSTED_PROXY: Advice(
        "A PROXY header is required, and the peer is not in trusted_proxies. Add it there if it is a proxy of yours.",
        "docs/handshake.md#trusted-proxies",
    ),
    Reason.OUT_OF_DESCRIPTORS: _SHORTAGE,
    Reason.OUT_OF_MEMORY: _SHORTAGE,
    # Before the TLS handshake is complete
    Reason.PROXY_TIMED_OUT: _PROXY_HEADER,
    Reason.PROXY_CLIENT_CLOSED: _PROXY_HEADER,
    Reason.PROXY_MALFORMED: _PROXY_HEADER,
    Reason.HELLO_TIMED_OUT: _NOT_IN_TIME,
    Reason.HELLO_CLIENT_CLOSED: Advice(
        "The client closed before it sent anything: a port scan, or a health check by TCP. Nothing needs to change.",
        _BEFORE_TLS,
    ),
    Reason.HELLO_PLAIN_HTTP: Advice(
        "The client used http:// or ws://; this port needs https:// or wss://.", _BEFORE_TLS
    ),
    Reason.HELLO_NOT_TLS: Advice("The client speaks neither TLS nor HTTP. It has the wrong port.", _BEFORE_TLS),
    Reason.HELLO_MALFORMED: Advice(
        "The ClientHello violates TLS; the detail says how. No setting accepts it.", _BEFORE_TLS
    ),
    Reason.HELLO_TLS_VERSION: Advice(
        "The client supports neither TLS 1.2 nor 1.3. Update it; older versions are not safe.", "docs/tls.md"
    ),
    Reason.HELLO_FINITE_FIELD: Advice(
        "The client offers a key exchange that would cost the tunnel too much. Let it offer X25519 or P-256.",
        "docs/tls.md#groups",
    ),
    Reason.HELLO_ALPN: Advice(
        "The client offers protocols by ALPN, but not http/1.1, which WebSockets need. Let it offer http/1.1.",
        "docs/troubleshooting.md#err_ssl_version_or_cipher_mismatch",
    ),
    Reason.HELLO_NO_SITE: Advice(
        "No site has the name that the client asked for. Add it to names of a site; default = true serves clients "
        "that send no name.",
        "docs/troubleshooting.md#err_ssl_unrecognized_name_alert",
    ),
    Reason.TLS_TIMED_OUT: _NOT_IN_TIME,
    Reason.TLS_CLIENT_CLOSED: Advice(
        "The client closed during the TLS handshake. Browsers do so when they do not trust the certificate.",
        "docs/troubleshooting.md#err_cert_authority_invalid",
    ),
    Reason.TLS_FAILED: Advice(
        "The detail has OpenSSL's name: an alert about the certificate means that the client does not trust it, "
        "NO_SHARED_CIPHER that both have no suite in common.",
        "docs/troubleshooting.md#it-fails-before-any-http",
    ),
    Reason.TLS_NO_CLIENT_CERTIFICATE: Advice(
        'The site requires a certificate of clients, and this one sent none. client_auth = "request" lets clients '
        "without one in.",
        _CLIENT_CERTIFICATES,
    ),
    Reason.TLS_CLIENT_UNKNOWN_ISSUER: _CLIENT_ISSUER,
    Reason.TLS_CLIENT_EXPIRED: _CLIENT_VALIDITY,
    Reason.TLS_CLIENT_NOT_YET_VALID: _CLIENT_VALIDITY,
    Reason.TLS_CLIENT_REVOKED: _CLIENT_REVOKED,
    Reason.TLS_CLIENT_OTHER_PURPOSE: Advice(
        "The extended key usage of the client's certificate does not allow TLS clients. Issue one with clientAuth.",
        "docs/certificates.md#extended-key-usage",
    ),
    Reason.TLS_CLIENT_NOT_TRUSTED: _CLIENT_ISSUER,
    Reason.TLS_CLIENT_CHAIN_TOO_LONG: Advice(
        "The client's certificates have more than 10 240 bytes together. It should send its own and the intermediate "
        "ones only.",
        _CLIENT_CERTIFICATES,
    ),
    Reason.TLS_CLIENT_NO_CRL: _CRL,
    Reason.TLS_CLIENT_CRL_EXPIRED: _CRL,
    Reason.TLS_ABORTED: Advice(
        "It was the oldest of too many handshakes in progress, or the process was stopped. Raise "
        "limits.unfinished_handshakes if there is no attack.",
        "docs/configuration.md#limits",
    ),
    Reason.TLS_OUT_OF_RESOURCES: _SHORTAGE,
    Reason.TLS_SOCKET_ERROR: _PEER_FAILED,
    Reason.TLS_INTERNAL_ERROR: _BUG,
}


def find_advice(reason: str) -> Advice | None:
    """Return the advice for a reason as it is in the log, None for one that is not known."""
    fixed = fixed_reason(reason)
    return None if fixed is None else _ADVICE[fixed]
