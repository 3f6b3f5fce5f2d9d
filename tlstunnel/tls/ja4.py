"""JA4, the fingerprint of a client's TLS library and its settings.

Sources: FoxIO's technical details of JA4 (https://github.com/FoxIO-LLC/ja4, technical_details/JA4.md); RFC 8701
(GREASE: code points that clients offer only to make sure that servers ignore them).

Tested by tests/unit/test_hello.py.
"""

from hashlib import sha256

_GREASE = frozenset(f"{digit:x}a{digit:x}a" for digit in range(16))
_JA4_VERSIONS = {
    0x0304: "13",
    0x0303: "12",
    0x0302: "11",
    0x0301: "10",
    0x0300: "s3",
    0x0002: "s2",
    0xFEFF: "d1",
    0xFEFD: "d2",
    0xFEFC: "d3",
}
_JA4_NOTHING = "000000000000"


def list_codes(numbers: bytes) -> list[str]:
    """Return two-byte numbers as four hexadecimal digits each, in order, without GREASE."""
    return [code for code in numbers.hex(" ", 2).split() if code not in _GREASE]


def compute_ja4(version: int, suites: bytes, types: bytes, alpn: tuple[bytes, ...], algorithms: bytes) -> str:
    """Return the JA4 fingerprint, as its technical details describe it; JA4 itself is under the BSD 3-clause licence.

    `suites`, `types` (of the extensions) and `algorithms` (for signatures) are two-byte numbers as they were sent.
    """
    ciphers, kinds, signatures = list_codes(suites), list_codes(types), list_codes(algorithms)
    server_name = "d" if "0000" in kinds else "i"
    counts = f"{min(len(ciphers), 99):02}{min(len(kinds), 99):02}"
    # Server name and ALPN are only in the first part, so that the last is the same for all servers.
    hashed = ",".join(sorted(kind for kind in kinds if kind not in {"0000", "0010"}))
    if signatures:
        hashed = f"{hashed}_{','.join(signatures)}"
    return (
        f"t{_JA4_VERSIONS.get(version, '00')}{server_name}{counts}{_render_alpn(alpn)}"
        f"_{_hash(','.join(sorted(ciphers)))}_{_hash(hashed)}"
    )


def _render_alpn(alpn: tuple[bytes, ...]) -> str:
    """Return the first and the last character of the first protocol, or of its hexadecimal form.

    Some of FoxIO's own programs write a 9 for each byte that is not ASCII; the text takes precedence (FoxIO's issue
    178).
    """
    if not alpn:
        return "00"
    first = alpn[0]
    ends = first[:1] + first[-1:]
    text = ends.decode("ascii") if ends.isalnum() else first.hex()
    return text[0] + text[-1]


def _hash(text: str) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256, or the zeros that stand for an empty list."""
    return sha256(text.encode("ascii")).hexdigest()[:12] if text else _JA4_NOTHING
