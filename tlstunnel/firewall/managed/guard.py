"""Refuse requests that could keep libmodsecurity busy for seconds, before it sees them.

The backtracking regular expressions of CRS take quadratic time or worse for runs of punctuation. With CRS 3.3.4, 8 kB
of ``$(`` in an argument took 10 s, 1 kB of ``{`` 1 to 2 s, and a cookie of 4 kB of brackets 8 s. Neither
SecPcreMatchLimit nor anything else stops an evaluation. The guard takes microseconds. What it accepts may still be
slow, for which there is the deadline. It refuses none of the ordinary handshakes in the tests.
"""

import re

from tlstunnel.handshake.refusal import Fields

MAX_ARGUMENTS = 64
"""Arguments of a query, each of which takes about 0.1 ms. ModSecurity recommends 1000, for forms."""

MAX_RUN = 31
"""Consecutive characters that are neither letters nor digits. Bytes from 128 on count as letters, which they are parts
of in UTF-8: 1 300 of them in a row took 2.5 ms."""

_CLASSES = bytes(ord("a") if chr(byte).isalnum() or byte >= 0x80 else ord(".") for byte in range(256))
_RUN = b"." * (MAX_RUN + 1)
# Also IIS's %u0041, which CRS decodes. Not urllib's decoder: it takes 15 ms for 16 kB of percent signs.
_ESCAPE = re.compile(rb"%(?:u00)?([0-9A-Fa-f]{2})")

_BYTES = {b"%02x" % byte: bytes((byte,)) for byte in range(256)}


def find_problem(target: bytes, fields: Fields) -> str | None:
    """Return why the rules must not see this request, as a short fixed text, or None.

    Examines the target and all fields, as sent and percent-decoded once and twice, as CRS does.
    """
    if target.count(b"&") >= MAX_ARGUMENTS:
        return f"more than {MAX_ARGUMENTS} arguments"
    if _has_run(target):
        return f"more than {MAX_RUN} punctuation characters in a row in the target"
    if any(_has_run(value) for _, value in fields):
        return f"more than {MAX_RUN} punctuation characters in a row in a field"
    return None


def _has_run(text: bytes) -> bool:
    if len(text) <= MAX_RUN:  # decoding only shortens
        return False
    if _RUN in text.translate(_CLASSES):
        return True
    for _ in range(2):
        if b"%" not in text:
            return False
        text = _ESCAPE.sub(_decode, text)
        if _RUN in text.translate(_CLASSES):
            return True
    return False


def _decode(escape: re.Match[bytes]) -> bytes:
    return _BYTES[escape[1].lower()]
