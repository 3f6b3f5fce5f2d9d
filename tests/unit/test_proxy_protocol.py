"""PROXY headers: what versions 1 and 2 allow, in any pieces, and the tunnel's own headers read back."""

import struct
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.sockets.proxy_protocol import (
    LONGEST_V1,
    MAX_V2,
    SIGNATURE,
    BadHeader,
    Header,
    TLSInfo,
    bytes_needed,
    read_header,
    write_local,
    write_v1,
    write_v2,
)

V2 = struct.Struct("!12sBBH")
FOUR = bytes([192, 0, 2, 1, 198, 51, 100, 7]) + struct.pack("!HH", 1234, 443)
SIX = IPv6Address("2001:db8::1").packed + IPv6Address("2001:db8::2").packed + struct.pack("!HH", 1, 2)
MAPPED = IPv6Address("::ffff:192.0.2.9").packed * 2 + struct.pack("!HH", 1, 2)


def v2(command: int, family: int, body: bytes, length: int | None = None) -> bytes:
    return V2.pack(SIGNATURE, command, family, len(body) if length is None else length) + body


# Including the examples in section 2.1.
GOOD = [
    (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", "255.255.255.255"),
    (b"PROXY TCP6 ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", BadHeader),
    (b"PROXY TCP6 2001:DB8::1 2001:db8::2 0 65535\r\n", "2001:db8::1"),
    (b"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2\r\n", "192.0.2.1"),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", None),
    (v2(0x21, 0x11, FOUR), "192.0.2.1"),
    (v2(0x21, 0x21, SIX), "2001:db8::1"),
    (v2(0x21, 0x21, MAPPED), "192.0.2.9"),
    (v2(0x21, 0x12, FOUR + b"\x04\x00\x02ab"), "192.0.2.1"),
    (v2(0x21, 0x31, b"\0" * 216), None),
    (v2(0x21, 0x00, b""), None),
    (v2(0x21, 0x00, b"anything"), None),
    (v2(0x20, 0x00, b""), None),
    (v2(0x20, 0x11, FOUR), None),
    (v2(0x20, 0x11, b""), None),
    (v2(0x21, 0x11, FOUR + b"x" * (MAX_V2 - 16 - 12)), "192.0.2.1"),
    (v2(0x21, 0x11, FOUR + b"x" * (MAX_V2 - 16 - 11)), BadHeader),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n", BadHeader),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 65536\r\n", BadHeader),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n", BadHeader),
    (b"PROXY TCP4 192.0.2.1  192.0.2.2 1 2\r\n", BadHeader),
    (b"PROXY TCP4 192.0.2.01 192.0.2.2 1 2\r\n", BadHeader),
    (b"PROXY TCP4 ::1 ::1 1 2\r\n", BadHeader),
    (b"PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n", BadHeader),
    (b"PROXY UDP4 192.0.2.1 192.0.2.2 1 2\r\n", BadHeader),
    (b"proxy UNKNOWN\r\n", BadHeader),
    (b"PROXY UNKNOWN " + b"x" * 200 + b"\r\n", BadHeader),
    (b"\x16\x03\x01\x02\x00\x01", BadHeader),
    (b"GET / HTTP/1.1\r\n", BadHeader),
    (b"\r\n\r\nnot the signature", BadHeader),
    (v2(0x11, 0x11, FOUR), BadHeader),
    (v2(0x22, 0x11, FOUR), BadHeader),
    (v2(0x21, 0x13, FOUR), BadHeader),
    (v2(0x21, 0x41, FOUR), BadHeader),
    (v2(0x21, 0x11, FOUR[:-1]), BadHeader),
    (v2(0x21, 0x21, FOUR), BadHeader),
]


def outcome(data: bytes) -> object:
    try:
        header = read_header(data)
    except BadHeader:
        return BadHeader
    return header and (header.length, header.source)


@pytest.mark.parametrize(("data", "source"), GOOD)
def test_a_header_and_exactly_its_bytes(data: bytes, source: object) -> None:
    expected = BadHeader if source is BadHeader else (len(data), source)
    assert outcome(data) == expected
    assert outcome(data + b"\x16\x03\x01more") == expected
    # Byte by byte it is undecided, and then the decision is final.
    found = [outcome(data[:end]) for end in range(len(data) + 1)]
    decided = next(end for end, one in enumerate(found) if one is not None)
    assert set(found[:decided]) <= {None}
    assert set(found[decided:]) == {expected}
    if source is not BadHeader:
        assert decided == len(data)
        assert all(end < bytes_needed(data[:end]) <= len(data) for end in range(len(data)))


@given(st.binary(max_size=300) | st.builds(lambda tail: SIGNATURE + tail, st.binary(max_size=300)))
def test_any_bytes_are_decided_once(data: bytes) -> None:
    found = [outcome(data[:end]) for end in range(len(data) + 1)]
    decided = [one for one in found if one is not None]
    assert len(set(decided)) <= 1
    if len(data) >= LONGEST_V1 and not data.startswith(SIGNATURE):
        assert decided


ports = st.integers(0, 65535)
addresses = st.ip_addresses(v=4) | st.ip_addresses(v=6)


@given(addresses, ports, addresses, ports, st.text(st.characters(codec="ascii"), max_size=40))
def test_what_is_written_is_read(
    source: IPv4Address | IPv6Address, from_port: int, destination: IPv4Address | IPv6Address, port: int, unique_id: str
) -> None:
    mapped = source.ipv4_mapped if isinstance(source, IPv6Address) else None
    for data in (
        write_v1((str(source), from_port), (str(destination), port)),
        write_v2((str(source), from_port), (str(destination), port)),
        write_v2(
            (str(source), from_port),
            (str(destination), port),
            TLSInfo("TLSv1.3", "TLS_AES_128_GCM_SHA256", "chat.example", "client", verified=True),
            unique_id,
        ),
    ):
        assert read_header(data + b"\x16") == Header(len(data), str(mapped or source))


def test_the_tlvs() -> None:
    tls = TLSInfo("TLSv1.3", "TLS_AES_128_GCM_SHA256", "chat.example")
    data = write_v2(("192.0.2.1", 1234), ("198.51.100.7", 443), tls, "an id")
    assert data[:28] == V2.pack(SIGNATURE, 0x21, 0x11, len(data) - 16) + FOUR
    assert tlvs(data[28:]) == [
        (0x02, b"chat.example"),
        (0x01, b"http/1.1"),
        (0x20, b"\x01\0\0\0\x01" + b"\x21\0\x07TLSv1.3" + b"\x23\0\x16TLS_AES_128_GCM_SHA256"),
        (0x05, b"an id"),
    ]
    proven = write_v2(None, None, TLSInfo("TLSv1.2", "x", "", "Ann", verified=True))
    assert dict(tlvs(proven[16:]))[0x20] == b"\x07\0\0\0\0" + b"\x21\0\x07TLSv1.2" + b"\x23\0\x01x" + b"\x22\0\x03Ann"


def tlvs(data: bytes) -> list[tuple[int, bytes]]:
    found = []
    while data:
        kind, length = struct.unpack_from("!BH", data)
        found.append((kind, data[3 : 3 + length]))
        data = data[3 + length :]
    return found


@pytest.mark.parametrize("version", ["v1", "v2", "v2-tls"])
def test_a_connection_of_the_proxy_itself(version: str) -> None:
    data = write_local(version)
    assert read_header(data) == Header(len(data), None)


def test_a_unix_socket_has_no_address() -> None:
    assert write_v1(None, ("192.0.2.1", 1)) == b"PROXY UNKNOWN\r\n"
    assert read_header(write_v2(None, None)) == Header(16, None)


@pytest.mark.parametrize(
    ("name", "sent"), [("ann", True), ("a" * 255, True), ("a" * 256, False), ("\u00fc" * 128, False)]
)
def test_a_common_name_is_sent_whole_or_not_at_all(name: str, sent: bool) -> None:
    header = write_v2(None, None, TLSInfo("TLSv1.3", "A", common_name=name, verified=True))
    assert (struct.pack("!BH", 0x22, len(name.encode())) + name.encode() in header) is sent
    assert (b"\x22" in header) is sent
