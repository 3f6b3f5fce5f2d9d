"""What Python's ``ssl`` has no functions for: limits for a client's certificates and sessions, and groups for origins.

They are set through ``ctypes``, on the ``SSL_CTX`` that is the first member of every ``ssl.SSLContext`` of CPython
(Modules/_ssl.c, since 3.2). In a Python that links OpenSSL statically, or is not known to be built like that, OpenSSL's
own limits apply: 102 400 bytes and 20 480 sessions.
"""

import _ssl
import ctypes
import ssl
import sys
from collections.abc import Callable
from typing import Final

MAX_CHAIN: Final = 10_240
"""Bytes of a client's Certificate message. Four certificates with RSA keys of 4 096 bits fit. OpenSSL parses all that
it gets, whoever issued them: 98 small ones, 28 KB, took 12 ms; 35, the most that fit now, take 4 ms."""

MAX_SESSIONS: Final = 256
"""Sessions that are kept per context for clients of TLS 1.2 that support no tickets: 870 bytes each. Others are kept by
the clients themselves."""

_GROUPS: Final = b"X25519:P-256:P-384:P-521"
"""Groups for origins, after the hybrid X25519MLKEM768 of OpenSSL 3.5 and later, which sends a key share of both."""

# openssl/ssl.h, the same numbers since 0.9.8, and 1.0.2 for groups.
_SET_SESSION_CACHE_SIZE = 42
_SET_MAX_CERT_LIST = 51
_SET_GROUPS_LIST = 92

_KNOWN = sys.implementation.name == "cpython" and (3, 11) <= sys.version_info < (3, 15)


def apply_limits(context: ssl.SSLContext) -> bool:
    """Set the limits of a context for clients. Return whether this Python can do that."""
    if _control is None:
        return False
    pointer = ctypes.c_void_p.from_address(id(context) + object.__basicsize__).value
    _control(pointer, _SET_MAX_CERT_LIST, MAX_CHAIN, None)
    _control(pointer, _SET_SESSION_CACHE_SIZE, MAX_SESSIONS, None)
    return True


def exclude_finite_fields(context: ssl.SSLContext) -> bool:
    """Offer elliptic curves only (docs/tls.md#groups). Return whether this Python can do that."""
    if _control is None:
        return False
    pointer = ctypes.c_void_p.from_address(id(context) + object.__basicsize__).value
    # An unknown group would be an error, which stays in OpenSSL's queue and makes the next call of ``ssl`` fail (seen).
    groups = b"*X25519MLKEM768:*" + _GROUPS if ssl.OPENSSL_VERSION_INFO >= (3, 5) else _GROUPS
    return _control(pointer, _SET_GROUPS_LIST, 0, groups) == 1


def _find_control() -> Callable[..., int] | None:
    """Return ``SSL_CTX_ctrl`` of the OpenSSL that ``ssl`` uses, which need not be the only one in this process."""
    file = getattr(_ssl, "__file__", None)
    if not _KNOWN or file is None:
        return None
    try:
        control = ctypes.CDLL(file).SSL_CTX_ctrl
    except (OSError, AttributeError):
        return None
    control.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_void_p)
    control.restype = ctypes.c_long
    return control


_control = _find_control()
