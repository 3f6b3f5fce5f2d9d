"""Find the key exchange group that a server chose, in the plaintext records that it sends first.

Tested by tests/unit/test_check_steps.py.
"""

from collections.abc import Iterator
from typing import Final

# IANA, TLS Supported Groups.
GROUPS: Final = {
    0x0017: "secp256r1",
    0x0018: "secp384r1",
    0x0019: "secp521r1",
    0x001A: "brainpoolP256r1",
    0x001B: "brainpoolP384r1",
    0x001C: "brainpoolP512r1",
    0x001D: "X25519",
    0x001E: "X448",
    0x0100: "ffdhe2048",
    0x0101: "ffdhe3072",
    0x0102: "ffdhe4096",
    0x0103: "ffdhe6144",
    0x0104: "ffdhe8192",
    0x11EB: "SecP256r1MLKEM768",
    0x11EC: "X25519MLKEM768",
    0x11ED: "SecP384r1MLKEM1024",
}
# RFC 8446 section 4.1.3: the random of a ServerHello that is a HelloRetryRequest.
_RETRY_RANDOM: Final = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")


def find_group(captured: bytes) -> str | None:
    """Return the name of the key exchange group in the first bytes that the server sent, None if it is not there.

    In TLS 1.3 it is the ServerHello's key_share (RFC 8446 section 4.2.8), the last one if a HelloRetryRequest came
    first; in TLS 1.2 the ServerKeyExchange's named curve (RFC 8422 section 5.4).
    """
    for kind, body in _read_messages(captured):
        number: int | None = None
        if kind == 2 and body[2:34] != _RETRY_RANDOM:
            number = _read_key_share(body)
        elif kind == 12 and body[:1] == b"\x03":
            number = int.from_bytes(body[1:3])
        if number is not None:
            # 0x03 may also begin a finite-field prime's length: then this is not the number of a group.
            return GROUPS.get(number) if kind == 12 else GROUPS.get(number, f"0x{number:04x}")
    return None


def _read_messages(captured: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the complete TLS handshake messages of the plaintext records (RFC 8446 sections 4 and 5.1)."""
    buffer, at = b"", 0
    # 22 is handshake; 20, change_cipher_spec, stands between the two ServerHellos of a HelloRetryRequest.
    while captured[at : at + 1] in {b"\x14", b"\x16"}:
        length = int.from_bytes(captured[at + 3 : at + 5])
        if captured[at] == 0x16:
            buffer += captured[at + 5 : at + 5 + length]
        at += 5 + length
        while len(buffer) >= 4 and len(buffer) >= 4 + int.from_bytes(buffer[1:4]):
            end = 4 + int.from_bytes(buffer[1:4])
            yield buffer[0], buffer[4:end]
            buffer = buffer[end:]


def _read_key_share(server_hello: bytes) -> int | None:
    # Version 2, random 32, session id with its length, cipher 2, compression 1, length of extensions 2.
    at = 35 + int.from_bytes(server_hello[34:35]) + 5
    while at + 4 <= len(server_hello):
        kind, length, named = (int.from_bytes(server_hello[at + i : at + i + 2]) for i in (0, 2, 4))
        if kind == 51:
            return named
        at += 4 + length
    return None
