"""What is refused before libmodsecurity sees it, because it could keep it busy for seconds.

Backtracking regular expressions of CRS are quadratic and worse in runs of punctuation: 8 kB of ``$(`` in an argument
took 10 s with CRS 3.3.4, 1 kB of ``{`` 1 to 2 s, a 4 kB cookie of brackets 8 s, and neither SecPcreMatchLimit nor
anything else stops an evaluation. This costs microseconds. What it lets through may still be slow: that is the
deadline's share. None of the ordinary handshakes in the tests is touched by it.
"""

import re

from tlstunnel.handshake.refusal import Fields

MAX_ARGUMENTS = 64
"""Arguments of a query: each costs about 0.1 ms. ModSecurity's own recommendation is 1000, for forms."""

MAX_RUN = 31
"""Characters in a row that are neither letters nor digits. Bytes of 128 and more count as letters, being parts of them
in UTF-8: 1 300 of them in a row took 2.5 ms."""

_CLASSES = bytes(ord("a") if chr(byte).isalnum() or byte >= 0x80 else ord(".") for byte in range(256))
_RUN = b"." * (MAX_RUN + 1)
# Also IIS's %u0041, which CRS decodes. Not urllib's decoder: it takes 15 ms for 16 kB of percent signs.
_ESCAPE = re.compile(rb"%(?:u00)?([0-9A-Fa-f]{2})")

_BYTES = {b"%02x" % byte: bytes((byte,)) for byte in range(256)}


def find_problem(target: bytes, fields: Fields) -> str | None:
    """Why the rules are not to see this request, as a short fixed text, or None.

    Looks at the target and every field, as sent and percent-decoded once and twice, which is how far CRS decodes.
    """
    if target.count(b"&") >= MAX_ARGUMENTS:
        return f"more than {MAX_ARGUMENTS} arguments"
    if _has_run(target):
        return f"more than {MAX_RUN} punctuation characters in a row in the target"
    if any(_has_run(value) for _, value in fields):
        return f"more than {MAX_RUN} punctuation characters in a row in a field"
    return None


def _has_run(text: bytes) -> bool:
    if len(text) <= MAX_RUN:  # decoding does not lengthen
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
