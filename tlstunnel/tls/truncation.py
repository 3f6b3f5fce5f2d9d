"""An end of a TLS stream that nobody announced (RFC 8446 section 6.1), told apart from other failures."""

import ssl


def is_truncation(error: OSError) -> bool:
    """Whether `error` says that the peer's bytes ended, by a FIN, without ``close_notify``.

    Python from 3.11.4 on makes an ``SSLEOFError`` of it, 3.11.2 (Debian 12) a plain ``SSLError``; for a system call
    that failed, both make an ``SSLEOFError`` to which OpenSSL gives no reason (seen with OpenSSL 3.0).
    """
    return isinstance(error, ssl.SSLError) and error.reason == "UNEXPECTED_EOF_WHILE_READING"
