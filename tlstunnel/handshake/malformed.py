"""Say what is wrong with a head that h11 refuses, without a byte of it: heads contain tokens and passwords."""

import re

import h11

_FIELD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*")

_KINDS: tuple[tuple[str, str, bytes], ...] = (
    ("illegal request line", "malformed request line", b""),
    ("illegal status line", "malformed status line", b""),
    ("illegal header line", "malformed field", b""),
    ("bad Content-Length", "malformed Content-Length", b"content-length"),
    ("conflicting Content-Length", "several values in Content-Length", b"content-length"),
    ("multiple Transfer-Encoding", "several Transfer-Encoding fields", b"transfer-encoding"),
    ("Only Transfer-Encoding", "transfer coding other than chunked", b"transfer-encoding"),
    ("Missing mandatory Host", "no Host field", b""),
    ("Found multiple Host", "several Host fields", b"host"),
    ("Receive buffer too long", "head too large", b""),
    ("Illegal header", "malformed field", b""),
)
"""How h11's texts begin, what is wrong, and the name of the field that it is about, if it has one."""


def describe_malformed_head(error: h11.RemoteProtocolError, head: bytes = b"") -> str:
    """Return the kind of the error, and the number of the line in `head` if that is known.

    h11's texts quote whole lines. One that is not known here becomes "not HTTP/1.1".
    """
    text = str(error)
    for beginning, kind, name in _KINDS:
        if text.startswith(beginning):
            number = _find_line(head, kind, name)
            return f"line {number}: {kind}" if number else kind
    return "not HTTP/1.1"


def _find_line(head: bytes, kind: str, name: bytes) -> int:
    """Return the number of the line that the error is about, from 1; 0 if it is not known."""
    lines = head.split(b"\r\n")[:-2]
    if not lines:
        return 0
    if kind.endswith(" line"):
        return 1
    fields = [*enumerate(lines[1:], 2)]
    if name:
        return max((number for number, line in fields if line.partition(b":")[0].lower() == name), default=0)
    return next((number for number, line in fields if not _FIELD.fullmatch(line)), 0)
