"""The TLS policy for clients and origins: versions, suites, ALPN and options, all in one place.

To refuse TLS 1.2, set MINIMUM_VERSION to TLS 1.3. Groups are those of OpenSSL, which Python cannot restrict; the finite
fields among them are refused by the ClientHello (docs/tls.md#groups, `hello.ClientHello.finite_field`).
"""

import ssl
from typing import Final

from tlstunnel.tls.limits import apply_limits, exclude_finite_fields

MINIMUM_VERSION: Final = ssl.TLSVersion.TLSv1_2
MAXIMUM_VERSION: Final = ssl.TLSVersion.TLSv1_3
"""RFC 9325 section 3.1.1: TLS 1.2 and 1.3 only."""

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

The client's order of preference applies; see `apply_to_server_context`. All suites of TLS 1.3 are of that kind, and
Python cannot restrict them.
"""

ALPN: Final = "http/1.1"
"""The only protocol that is offered and accepted: a WebSocket handshake uses HTTP/1.1 (RFC 6455 section 4.1)."""

TICKETS: Final = 1
"""Session tickets per connection. OpenSSL's default is 2."""


def supports_version(versions: tuple[int, ...]) -> bool:
    """Return whether a ClientHello offers a version that is not too old."""
    return any(version >= MINIMUM_VERSION for version in versions)


def supports_alpn(protocols: tuple[bytes, ...]) -> bool:
    """Return whether a ClientHello offers http/1.1 or does not use ALPN."""
    return not protocols or ALPN.encode() in protocols


def apply_to_server_context(context: ssl.SSLContext) -> None:
    """Set the versions, suites, options and limits for clients."""
    context.minimum_version = MINIMUM_VERSION
    context.maximum_version = MAXIMUM_VERSION
    context.set_ciphers(TLS_1_2_CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION
    # All suites are good, so the client chooses: it knows whether it has AES in hardware or is faster with ChaCha20.
    # With the server's preference, OpenSSL would also use AES-256 with every TLS 1.3 client; browsers prefer AES-128.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = TICKETS
    apply_limits(context)
    _apply_to_both(context)


def apply_to_client_context(context: ssl.SSLContext) -> None:
    """Set the version and options for origins and `tlstunnel check`."""
    context.minimum_version = MINIMUM_VERSION
    exclude_finite_fields(context)
    _apply_to_both(context)


def _apply_to_both(context: ssl.SSLContext) -> None:
    context.options |= ssl.OP_NO_RENEGOTIATION
    # Python up to 3.11.2 (Debian 12) sets this: a FIN without close_notify would look like a regular end (seen).
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    context.set_alpn_protocols([ALPN])
