"""The PROXY protocol: the client's address, which a proxy sends before the first byte of a connection.

Bytes in, values out. Source: The PROXY protocol, versions 1 and 2 (https://www.haproxy.org/download/2.9/doc/
proxy-protocol.txt): section 2.1 the text header, 2.2 the binary one, 2.2.1 to 2.2.6 its TLVs.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
"""The first bytes of every header of version 2, and of no other protocol (section 2.2)."""

LONGEST_V1 = 107
"""Bytes of the longest text header, including CRLF (section 2.1)."""

MAX_V2 = 4096
"""Bytes of a binary header that are accepted. Addresses and common TLVs need a few hundred; 65 551 are possible."""

MAX_COMMON_NAME = 255
"""Bytes of a common name that is sent. A longer one is left out, because a cut one could equal another."""

_V1 = re.compile(
    rb"PROXY (?:UNKNOWN(?: [^\r\n]*)?|(?P<family>TCP[46])"
    rb" (?P<source>[0-9A-Fa-f.:]{2,45}) (?P<destination>[0-9A-Fa-f.:]{2,45})"
    rb" (?P<from>0|[1-9][0-9]{0,4}) (?P<to>0|[1-9][0-9]{0,4}))\r\n"
)
_HEAD = struct.Struct("!12sBBH")
_LOCAL, _PROXY = 0x20, 0x21
_PORTS = struct.Struct("!HH")

# Types of TLVs, section 2.2.
ALPN, AUTHORITY, UNIQUE_ID, SSL = 0x01, 0x02, 0x05, 0x20
SSL_VERSION, SSL_CN, SSL_CIPHER = 0x21, 0x22, 0x23
CLIENT_SSL, CLIENT_CERT_CONN, CLIENT_CERT_SESS = 0x01, 0x02, 0x04


class BadHeader(Exception):
    """The first bytes are not a valid PROXY header. `reason` contains no bytes of the peer."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Header:
    """A header of `length` bytes. `source` is the client's address, without a port; None if it has none.

    LOCAL (the proxy's own connection, such as a health check) and UNKNOWN have none: the socket's address is used then.
    An IPv4-mapped IPv6 address becomes the IPv4 address.
    """

    length: int
    source: str | None


@dataclass(frozen=True, slots=True)
class TLSInfo:
    """What a header of version 2 says about the client's TLS. Empty values are left out."""

    version: str
    cipher: str
    server_name: str = ""
    common_name: str = ""
    verified: bool = False


def read_header(data: bytes) -> Header | None:
    """Return the header at the start of `data`; None if more bytes are needed. What follows it is ignored.

    The result depends only on the bytes: for every prefix it is None or the final result. Raises BadHeader as soon as
    the bytes cannot be a header.
    """
    if data[: len(SIGNATURE)] == SIGNATURE[: len(data)] and data[:1] != b"P":
        return _read_v2(data) if len(data) >= len(SIGNATURE) else None
    if data[:6] != b"PROXY "[: len(data)]:
        raise BadHeader("not a PROXY header")
    end = data.find(b"\n", 0, LONGEST_V1)
    if end < 0:
        if len(data) >= LONGEST_V1:
            raise BadHeader("a PROXY header longer than 107 bytes")
        return None
    return _read_v1(data[: end + 1])


def bytes_needed(data: bytes) -> int:
    """Return the minimum length of `data` for which `read_header` can return a header."""
    if len(data) >= _HEAD.size and data.startswith(SIGNATURE):
        return _HEAD.size + int.from_bytes(data[14:16])
    return len(data) + 1


def _read_v1(line: bytes) -> Header:
    match = _V1.fullmatch(line)
    if match is None:
        raise BadHeader("a malformed PROXY header")
    if match["family"] is None:
        return Header(len(line), None)
    kind = IPv4Address if match["family"] == b"TCP4" else IPv6Address
    try:
        source, _ = (kind(match[name].decode()) for name in ("source", "destination"))
    except ValueError:
        raise BadHeader("a PROXY header with a malformed address") from None
    if max(int(match["from"]), int(match["to"])) > 65_535:
        raise BadHeader("a PROXY header with a port above 65535")
    return Header(len(line), _unmap(source))


def _read_v2(data: bytes) -> Header | None:
    # Each byte is checked as soon as it arrives, so that the result does not depend on splits.
    if len(data) > 12 and data[12] not in {_LOCAL, _PROXY}:
        raise BadHeader("a PROXY header of an unknown version or command")
    if len(data) > 13 and data[13] not in _FAMILIES:
        raise BadHeader("a PROXY header of an unknown address family")
    if len(data) < _HEAD.size:
        return None
    length = int.from_bytes(data[14:16])
    end = _HEAD.size + length
    if end > MAX_V2:
        raise BadHeader(f"a PROXY header longer than {MAX_V2} bytes")
    # LOCAL: the family must be ignored (section 2.2).
    addresses = 0 if data[12] == _LOCAL else _FAMILIES[data[13]]
    if length < addresses:
        raise BadHeader("a PROXY header too short for its addresses")
    if len(data) < end:
        return None
    if not addresses or addresses == _UNIX:
        return Header(end, None)
    size = 4 if addresses == _IPV4 else 16
    return Header(end, _unmap(ip_address(data[16 : 16 + size])))


_IPV4, _IPV6, _UNIX = 12, 36, 216
# Family and transport, and the length of the addresses in bytes: UNSPEC, then stream and datagram of each.
_FAMILIES = {0x00: 0, 0x11: _IPV4, 0x12: _IPV4, 0x21: _IPV6, 0x22: _IPV6, 0x31: _UNIX, 0x32: _UNIX}


def _unmap(address: IPv4Address | IPv6Address) -> str:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


def write_v1(source: tuple[str, int] | None, destination: tuple[str, int] | None) -> bytes:
    """Return a text header (section 2.1). The addresses are those of the sockets, None for a Unix socket."""
    both = _to_one_family(source, destination)
    if both is None:
        return b"PROXY UNKNOWN\r\n"
    first, second, from_port, to_port = both
    family = 4 if first.version == 4 else 6
    return f"PROXY TCP{family} {first} {second} {from_port} {to_port}\r\n".encode()


def write_v2(
    source: tuple[str, int] | None,
    destination: tuple[str, int] | None,
    tls: TLSInfo | None = None,
    unique_id: str = "",
) -> bytes:
    """Return a binary header (section 2.2), with TLVs about TLS if `tls` is given."""
    both = _to_one_family(source, destination)
    family, addresses = 0x00, b""
    if both is not None:
        first, second, from_port, to_port = both
        family = 0x11 if first.version == 4 else 0x21
        addresses = first.packed + second.packed + _PORTS.pack(from_port, to_port)
    body = addresses + b"".join(_render_tlvs(tls, unique_id))
    return _HEAD.pack(SIGNATURE, _PROXY, family, len(body)) + body


def write_local(version: str) -> bytes:
    """Return the header for the tunnel's own connections, such as health checks, in ``v1`` or any ``v2``."""
    return b"PROXY UNKNOWN\r\n" if version == "v1" else _HEAD.pack(SIGNATURE, _LOCAL, 0x00, 0)


def _render_tlvs(tls: TLSInfo | None, unique_id: str) -> Iterator[bytes]:
    if tls is not None:
        if tls.server_name:
            yield _render_tlv(AUTHORITY, tls.server_name.encode())
        yield _render_tlv(ALPN, b"http/1.1")
        inner = _render_tlv(SSL_VERSION, tls.version.encode()) + _render_tlv(SSL_CIPHER, tls.cipher.encode())
        client = CLIENT_SSL
        if tls.verified:
            client |= CLIENT_CERT_CONN | CLIENT_CERT_SESS
            name = tls.common_name.encode()
            inner += _render_tlv(SSL_CN, name) if 0 < len(name) <= MAX_COMMON_NAME else b""
        # `verify` is zero if a certificate was presented and verified (section 2.2.6).
        yield _render_tlv(SSL, struct.pack("!BI", client, 0 if tls.verified else 1) + inner)
    if unique_id:
        yield _render_tlv(UNIQUE_ID, unique_id.encode()[:128])


def _render_tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def _to_one_family(
    source: tuple[str, int] | None, destination: tuple[str, int] | None
) -> tuple[IPv4Address | IPv6Address, IPv4Address | IPv6Address, int, int] | None:
    """Return both addresses in the same family, IPv4 mapped to IPv6 if needed; None if one is missing."""
    if source is None or destination is None:
        return None
    first, second = (ip_address(address.partition("%")[0]) for address, _ in (source, destination))
    if first.version != second.version:
        first, second = (IPv6Address(f"::ffff:{one}") if one.version == 4 else one for one in (first, second))
    return first, second, source[1], destination[1]
