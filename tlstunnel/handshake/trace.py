"""The trace that a request belongs to: ``traceparent`` (W3C Trace Context, level 2, section 3.2).

Tested by tests/unit/test_handshake_trace.py.
"""

import re

from tlstunnel.handshake.request import Request

_TRACEPARENT = re.compile(
    rb"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?P<more>-.*)?",
    re.DOTALL,
)
_LONGEST = 512


def read_trace_id(request: Request) -> str:
    """Return the trace id of a request, "" if it has none that is valid. Only version 00 has no further fields."""
    given = request.by_name.get(b"traceparent", ())
    if len(given) != 1 or len(given[0]) > _LONGEST:
        return ""
    match = _TRACEPARENT.fullmatch(given[0])
    if match is None or (match["version"] == b"00" and match["more"] is not None):
        return ""
    return match["trace"].decode("ascii")
