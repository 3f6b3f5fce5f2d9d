"""Truncation of a TLS stream: an end without close_notify (RFC 8446 section 6.1).

Tested by tests/promises/test_ending.py.
"""

import ssl


class Truncated(ssl.SSLEOFError):
    """The peer sent FIN without close_notify."""

    reason = "UNEXPECTED_EOF_WHILE_READING"
    """OpenSSL's name for it."""

    def __str__(self) -> str:
        return "the peer closed the connection without close_notify"


def is_truncation(error: OSError) -> bool:
    """Return whether `error` means that the peer sent FIN without ``close_notify``.

    Python 3.11.4 and later raise ``SSLEOFError`` for it, 3.11.2 (Debian 12) a plain ``SSLError``. For a failed system
    call, both raise an ``SSLEOFError`` without a reason of OpenSSL's (seen with OpenSSL 3.0).
    """
    return isinstance(error, ssl.SSLError) and error.reason == Truncated.reason
