"""The TLS policy for clients and origins: versions, suites, ALPN and options, all in one place.

To refuse TLS 1.2, set MINIMUM_VERSION to TLS 1.3. Groups are those of OpenSSL, which Python cannot restrict; the finite
fields among them are refused by the ClientHello (docs/tls.md#groups, `hello.ClientHello.finite_field`).
"""

import ssl
from typing import Final

MINIMUM_VERSION: Final = ssl.TLSVersion.TLSv1_2
MAXIMUM_VERSION: Final = ssl.TLSVersion.TLSv1_3
"""RFC 9325 section 3.1.1: TLS 1.2 and 1.3, nothing older."""

TLS_1_2_CIPHERS: Final = ":".join(
    (
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-RSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        "ECDHE-RSA-CHACHA20-POLY1305",
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-RSA-AES256-GCM-SHA384",
    )
)
"""OpenSSL's names of the suites for clients: forward-secret AEAD only (RFC 9325 section 4.2).

The order counts only for a client that leaves the choice to us; see `apply_to_server_context`. The suites of TLS 1.3
are all of that kind and cannot be set from Python.
"""

ALPN: Final = "http/1.1"
"""The one protocol that is offered and accepted: a WebSocket handshake is HTTP/1.1 (RFC 6455 section 4.1)."""

TICKETS: Final = 1
"""Session tickets for each connection. OpenSSL's default is 2."""


def supports_version(versions: tuple[int, ...]) -> bool:
    """Return whether one of the versions that a ClientHello offers is not too old."""
    return any(version >= MINIMUM_VERSION for version in versions)


def supports_alpn(protocols: tuple[bytes, ...]) -> bool:
    """Return whether a ClientHello offers our protocol, or does not use ALPN."""
    return not protocols or ALPN.encode() in protocols


def apply_to_server_context(context: ssl.SSLContext) -> None:
    """Set the versions, suites and options for clients."""
    context.minimum_version = MINIMUM_VERSION
    context.maximum_version = MAXIMUM_VERSION
    context.set_ciphers(TLS_1_2_CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION
    # Every suite left is a good one, so the client chooses: it knows whether it has AES in hardware or is faster with
    # ChaCha20. By our order OpenSSL would also give every TLS 1.3 client AES-256, and browsers ask for AES-128 first.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = TICKETS
    _apply_to_both(context)


def apply_to_client_context(context: ssl.SSLContext) -> None:
    """Set the version and options for origins and `tlstunnel check`."""
    context.minimum_version = MINIMUM_VERSION
    _apply_to_both(context)


def _apply_to_both(context: ssl.SSLContext) -> None:
    context.options |= ssl.OP_NO_RENEGOTIATION
    # Set by Python up to 3.11.2, which is Debian 12's: a FIN without close_notify would read like an end (seen).
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    context.set_alpn_protocols([ALPN])
