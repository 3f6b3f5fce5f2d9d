"""The hello stage against published fingerprints, real clients' bytes, the rules of the RFCs and hostile input."""

import os
import re
import shutil
import socket
import ssl
import subprocess
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.tls import hello
from tlstunnel.tls.hello import (
    MAX_HELLO,
    BadHello,
    ClientHello,
    HelloError,
    NotTLS,
    PlainHTTP,
    alert,
    bytes_needed,
    read_client_hello,
)

TLS13 = b"\x00\x2b", b"\x02\x03\x04"
CIPHERS = bytes.fromhex("1301")

# Two ClientHellos out of FoxIO's own captures (github.com/FoxIO-LLC/ja4, pcap/), as handshake messages.
CHROME = bytes.fromhex(  # tls-sni.pcapng, first stream
    "010001fc03030f9e38acb9a54a7c6e00e29a70ac2feee180ff76d7f25dca84932a66a42d1e5a20bc58b92f865e6b9aa4a6371cadcb0afe"
    "1da1c0f705209a11d52357f56d5dd9620020aaaa130113021303c02bc02fc02cc030cca9cca8c013c014009c009d002f0035010001939a"
    "9a0000ff010001000033002b00290a0a000100001d0020cf55af2603e92f59eb321779706a18fa6b96b16c16404c2264ed687a59401878"
    "002d00020101000500050100000000446900050003026832000d00120010040308040401050308050501080606010010000e000c026832"
    "08687474702f312e3100230000001b0003020002002b0007060a0a0304030300000022002000001d636c69656e7473657276696365732e"
    "676f6f676c65617069732e636f6d00120000000a000a00080a0a001d0017001800170000000b000201006a6a000100001500ba"
) + bytes(0xBA)
SOCKS = bytes.fromhex(  # socks-https-example.pcap
    "0100006f0301529cbff829e8f23edf4bb09e1feaadd0131b7bc56eab3d7567b17e0374bd6b7500002e00390038003500160013000a0033"
    "0032002f009a00990096000500040015001200090014001100080006000300ff0100001800000014001200000f7777772e6578616d706c"
    "652e636f6d"
)


def record(fragment: bytes, kind: int = 22) -> bytes:
    return bytes((kind, 3, 1)) + len(fragment).to_bytes(2) + fragment


def vector(data: bytes, width: int) -> bytes:
    return len(data).to_bytes(width) + data


def message(
    extensions: list[tuple[bytes, bytes]] | None,
    *,
    ciphers: bytes = CIPHERS,
    version: bytes = b"\x03\x03",
    session_id: bytes = b"",
    compressions: bytes = b"\x00",
) -> bytes:
    body = version + bytes(32) + vector(session_id, 1) + vector(ciphers, 2) + vector(compressions, 1)
    if extensions is not None:
        body += vector(b"".join(kind + vector(data, 2) for kind, data in extensions), 2)
    return b"\x01" + vector(body, 3)


def server_name(name: bytes) -> tuple[bytes, bytes]:
    return b"\x00\x00", vector(b"\x00" + vector(name, 2), 2)


def alpn(*protocols: bytes) -> tuple[bytes, bytes]:
    return b"\x00\x10", vector(b"".join(vector(protocol, 1) for protocol in protocols), 2)


def read(handshake: bytes) -> ClientHello:
    answer = read_client_hello(record(handshake))
    assert answer is not None
    return answer


def refusal(data: bytes) -> BadHello:
    with pytest.raises(BadHello) as caught:
        read_client_hello(data)
    return caught.value


# JA4


def from_raw(raw: str) -> bytes:
    """Build a ClientHello that has the given JA4_r, in another order and with GREASE wherever RFC 8701 puts it."""
    first, ciphers, kinds, *signatures = raw.split("_")
    bodies = {
        "002b": vector(bytes.fromhex("8a8a 0304 0303"), 1),
        "000d": vector(bytes.fromhex("0a0a" + "".join(signatures).replace(",", "")), 2),
        "000a": vector(bytes.fromhex("0a0a 001d"), 2),
        "0033": vector(bytes.fromhex("0a0a 0001 00"), 2),
    }
    extensions = [(bytes.fromhex(kind), bodies.get(kind, b"")) for kind in kinds.split(",") if kind]
    if first[3] == "d":
        extensions.append(server_name(b"example.com"))
    if first[8:] != "00":
        extensions.append(alpn({"h1": b"http/1.1", "h2": b"h2"}[first[8:]], b"other"))
    grease = [(b"\x9a\x9a", b""), (b"\x6a\x6a", b"\x00")]
    version = {"13": "0303", "12": "0303", "10": "0301"}[first[1:3]]
    return message(
        [grease[0], *reversed(extensions), grease[1]],
        ciphers=bytes.fromhex("aaaa" + "".join(reversed(ciphers.split(",")))),
        version=bytes.fromhex(version),
    )


CHROME_CIPHERS = "002f,0035,009c,009d,1301,1302,1303,c013,c014,c02b,c02c,c02f,c030,cca8,cca9"
CHROME_SIGNATURES = "0403,0804,0401,0503,0805,0501,0806,0601"

# FoxIO: github.com/FoxIO-LLC/ja4. "python/test/testdata" has JA4.1 beside JA4_r.1 for the captures in pcap/.
PUBLISHED = [
    pytest.param(
        "t13d1516h2_8daaf6152771_e5627efa2ab1",
        f"t13d1516h2_{CHROME_CIPHERS}"
        f"_0005,000a,000b,000d,0012,0015,0017,001b,0023,002b,002d,0033,4469,ff01_{CHROME_SIGNATURES}",
        id="FoxIO technical_details/JA4.md, example",
    ),
    pytest.param(
        "t13d1516h2_8daaf6152771_6d807ffa2a79",
        f"t13d1516h2_{CHROME_CIPHERS}_0005,000a,000b,000d,0012,0015,0017,001b,0023,002b,002d,0033,4469,ff01",
        id="FoxIO technical_details/JA4.md, no signature algorithms",
    ),
    pytest.param(
        "t13d1517h2_8daaf6152771_cb7bf5808d99",
        f"t13d1517h2_{CHROME_CIPHERS}_0005,000a,000b,000d,0012,0017,001b,0023,002b,002d,0033,44cd,ca34,fe0d,ff01"
        f"_0904,0905,0906,{CHROME_SIGNATURES}",
        id="FoxIO python/test/testdata/sigalg-grease.pcapng.json",
    ),
    pytest.param(
        "t12d190800_d83cc789557e_7af1ed941c26",
        "t12d190800_000a,002f,0035,003c,003d,009c,009d,c009,c00a,c013,c014,c023,c024,c027,c028,c02b,c02c,c02f,c030"
        "_0005,000a,000b,000d,0017,0023,ff01_0804,0805,0806,0401,0501,0201,0403,0503,0203,0202,0601,0603",
        id="FoxIO python/test/testdata/latest.pcapng.json, stream 3",
    ),
    pytest.param(
        "t13d1516h2_8daaf6152771_9b887d9acb53",
        f"t13d1516h2_{CHROME_CIPHERS}"
        f"_0005,000a,000b,000d,0012,0017,001b,0023,0029,002b,002d,0033,4469,ff01_{CHROME_SIGNATURES}",
        id="FoxIO python/test/testdata/latest.pcapng.json, stream 5",
    ),
    pytest.param(
        "t13d1615h2_46e7e9700bed_45f260be83e2",
        f"t13d1615h2_000a,{CHROME_CIPHERS}"
        f"_0005,000a,000b,000d,0012,0015,0017,001b,0023,002b,002d,0033,ff01_{CHROME_SIGNATURES},0201",
        id="FoxIO python/test/testdata/badcurveball.pcap.json",
    ),
    pytest.param(
        "t13d1715h2_5b57614c22b0_3d5424432f57",
        "t13d1715h2_002f,0035,009c,009d,1301,1302,1303,c009,c00a,c013,c014,c02b,c02c,c02f,c030,cca8,cca9"
        "_0005,000a,000b,000d,0015,0017,001c,0022,0023,002b,002d,0033,ff01"
        "_0403,0503,0603,0804,0805,0806,0401,0501,0601,0203,0201",
        id="FoxIO python/test/testdata/tls12.pcap.json",
    ),
    pytest.param(
        "t13d2613h2_2802a3db6c62_845d286b0d67",
        "t13d2613h2_000a,002f,0035,003c,003d,009c,009d,1301,1302,1303,c008,c009,c00a,c012,c013,c014,c023,c024,c027,"
        "c028,c02b,c02c,c02f,c030,cca8,cca9_0005,000a,000b,000d,0012,0015,0017,002b,002d,0033,ff01"
        "_0403,0804,0401,0503,0203,0805,0805,0501,0806,0601,0201",
        id="FoxIO python/test/testdata/macos_tcp_flags.pcap.json",
    ),
    pytest.param(
        "t10d230100_6a57a6f57151_000000000000",
        "t10d230100_0003,0004,0005,0006,0008,0009,000a,0011,0012,0013,0014,0015,0016,002f,0032,0033,0035,0038,0039,"
        "0096,0099,009a,00ff_",
        id="FoxIO python/test/testdata/socks-https-example.pcap.json",
    ),
    pytest.param(  # the lists are in the order of that capture; 0xefef, 0xeeee and 0xeded look like GREASE and are not
        "t12d4605h2_85626a9a5f7f_aaf95bb78ec9",
        "t12d4605h2_c030,c02c,c028,c024,c014,c00a,009f,006b,0039,cca9,cca8,ccaa,ff85,00c4,0088,0081,009d,003d,0035,00c0,"
        "0084,c02f,c02b,c027,c023,c013,c009,009e,0067,0033,00be,0045,009c,003c,002f,00ba,0041,c011,c007,0005,0004,c012,"
        "c008,0016,000a,00ff_000b,000a,000d_0601,0603,efef,0501,0503,0401,0403,eeee,eded,0301,0303,0201,0203",
        id="FoxIO rust/ja4/src/snapshots/ja4__insta@tls-alpn-h2.pcap.snap",
    ),
    pytest.param(
        "t13d1516h2_8daaf6152771_02713d6af862",
        f"t13d1516h2_{CHROME_CIPHERS}"
        f"_0005,000a,000b,000d,0012,0017,001b,0023,002b,002d,0033,4469,fe0d,ff01_{CHROME_SIGNATURES}",
        id="FoxIO README.md, Chrome; lists from a server built on fingerproxy",
    ),
    pytest.param(
        "t13d1517h2_8daaf6152771_b0da82dd1658",
        f"t13d1517h2_{CHROME_CIPHERS}"
        f"_0005,000a,000b,000d,0012,0017,001b,0023,0029,002b,002d,0033,4469,fe0d,ff01_{CHROME_SIGNATURES}",
        id="FoxIO README.md, Chrome with a pre-shared key; the list is Chrome's with 0029",
    ),
    pytest.param(
        "t13d1517h2_8daaf6152771_b1ff8ab2d16f",
        f"t13d1517h2_{CHROME_CIPHERS}"
        f"_0005,000a,000b,000d,0012,0015,0017,001b,0023,002b,002d,0033,4469,fe0d,ff01_{CHROME_SIGNATURES}",
        id="FoxIO README.md, Chrome without a key; the list is Chrome's with 0015",
    ),
    pytest.param(
        "t13d1516h2_8daaf6152771_d8a2da3f94cd",
        f"t13d1516h2_{CHROME_CIPHERS}"
        f"_0005,000a,000b,000d,0012,0017,001b,0023,002b,002d,0033,44cd,fe0d,ff01_{CHROME_SIGNATURES}",
        id="tls.browserleaks.com, Chrome 146",
    ),
    pytest.param(
        "t13d4213h1_171bc101b036_5f0018e59d20",
        "t13d4213h1_002f,0032,0033,0035,0038,0039,003c,003d,0040,0067,006a,006b,009c,009d,009e,009f,00a2,00a3,00ff,1301,"
        "1302,1303,1304,c009,c00a,c013,c014,c023,c027,c02b,c02c,c02f,c030,c09c,c09d,c09e,c09f,c0ac,c0ad,cca8,cca9,ccaa"
        "_000a,000b,000d,0015,0016,0017,001b,002b,002d,0031,0033"
        "_0403,0503,0603,0807,0808,0809,080a,080b,0804,0805,0806,0401,0501,0601,0303,0301,0402,0502,0602,0302,0203,0201,0202",
        id="README of the tool tlsfp, curl with OpenSSL 3.2",
    ),
]


@pytest.mark.parametrize(("ja4", "raw"), PUBLISHED)
def test_published_fingerprint(ja4: str, raw: str) -> None:
    assert read(from_raw(raw)).ja4 == ja4


# groups


def groups(*numbers: int) -> tuple[bytes, bytes]:
    return b"\x00\x0a", vector(b"".join(number.to_bytes(2) for number in numbers), 2)


def shares(*numbers: int) -> tuple[bytes, bytes]:
    return b"\x00\x33", vector(b"".join(number.to_bytes(2) + vector(b"\1\0\4", 2) for number in numbers), 2)


@pytest.mark.parametrize(
    ("extensions", "finite"),
    [
        ([], False),
        ([groups(0x1D), shares(0x1D)], False),
        ([groups(0x1D, 0x17, 0x100, 0x104), shares(0x1D, 0x17)], False),  # GnuTLS
        ([groups(0x0A0A, 0x104, 0x19), shares(0x0A0A)], False),
        ([groups(0x11EC), shares(0x11EC)], False),
        ([groups(0x11EC, 0x1D, 0x17, 0x100, 0x101), shares(0x11EC, 0x1D)], False),  # OpenSSL 3.5
        ([groups(0x11EB, 0x11EC, 0x11ED), shares(0x11ED, 0x11EB)], False),
        ([groups(0x11EC, 0x100), shares(0x11EC)], True),  # OpenSSL 3.0 would ask for ffdhe2048
        ([groups(0x11EC, 0x1D, 0x100), shares(0x11EC, 0x100)], True),
        ([groups(0x104), shares()], True),
        ([groups(0x0A0A, 0x6399, 0x104), shares(0x6399)], True),
        ([groups(0x104)], True),
        ([groups(0x1D, 0x100), shares(0x1D, 0x100)], True),
        ([groups(0x100, 0x1D), shares(0x100)], True),
        ([shares(0x1FF, 0x1D)], True),
    ],
)
def test_whether_a_finite_field_may_be_used(extensions: list[tuple[bytes, bytes]], finite: bool) -> None:
    assert read(message([TLS13, *extensions])).finite_field is finite


@pytest.mark.parametrize("kind", [b"\x00\x0a", b"\x00\x33"])
@pytest.mark.parametrize("body", [b"", b"\0", b"\0\1", b"\0\1\0", b"\0\3\0\x1d\0", b"\0\5\0\x1d\0\2\0", b"\0\0\0"])
def test_malformed_groups_and_shares(kind: bytes, body: bytes) -> None:
    assert refusal(record(message([TLS13, (kind, body)]))).alert == hello.DECODE_ERROR


def test_captured_chrome() -> None:
    assert read(CHROME) == ClientHello(
        server_name="clientservices.googleapis.com",
        alpn=(b"h2", b"http/1.1"),
        versions=(0x0304, 0x0303),
        ja4="t13d1516h2_8daaf6152771_e5627efa2ab1",
    )


def test_captured_tls_1_0() -> None:
    assert read(SOCKS) == ClientHello("www.example.com", (), (0x0301,), "t10d230100_6a57a6f57151_000000000000")


@pytest.mark.parametrize(
    ("protocol", "characters"),
    [  # FoxIO technical_details/JA4.md, ALPN Extension Value; the last from FoxIO's issue 178
        ("h2", "h2"),
        ("http/1.1", "h1"),
        ("x", "xx"),
        (b"\xab", "ab"),
        (b"\xab\xcd", "ad"),
        (b"\x30\xab", "3b"),
        (b"\x30\x31\xab\xcd", "3d"),
        (b"\x30\xab\xcd\x31", "01"),
        (b" h", "28"),
        (b"h_", "6f"),
    ],
)
def test_ja4_alpn(protocol: str | bytes, characters: str) -> None:
    first = protocol if isinstance(protocol, bytes) else protocol.encode()
    answer = read(message([TLS13, alpn(first, b"zz")]))
    assert answer.ja4.startswith(f"t13i0102{characters}_")
    assert answer.alpn == (first, b"zz")


@pytest.mark.parametrize(
    ("versions", "characters", "offered"),
    [
        ("0303 0304 0302", "13", (0x0303, 0x0304, 0x0302)),
        ("0302 0301", "11", (0x0302, 0x0301)),
        ("0300", "s3", (0x0300,)),
        ("0002", "s2", (0x0002,)),
        ("fafa 0303", "12", (0x0303,)),
        ("0304 0305", "00", (0x0304, 0x0305)),
        ("0a0a", "00", ()),
    ],
)
def test_versions(versions: str, characters: str, offered: tuple[int, ...]) -> None:
    answer = read(message([(b"\x00\x2b", vector(bytes.fromhex(versions), 1))], version=b"\x03\x01"))
    assert answer.ja4[1:3] == characters
    assert answer.versions == offered


def test_ja4_counts_stop_at_99_and_empty_lists_are_zeros() -> None:
    many = b"".join(number.to_bytes(2) for number in range(0x0100, 0x0200))
    assert read(message([(number.to_bytes(2), b"") for number in range(256, 400)], ciphers=many)).ja4[4:8] == "9999"
    assert read(message([], ciphers=b"\x0a\x0a")).ja4 == "t12i000000_000000000000_000000000000"
    assert read(message(None)).ja4 == f"t12i010000_{sha256(b'1301').hexdigest()[:12]}_000000000000"


# Real clients


def first_flight(context: ssl.SSLContext, server_hostname: str | None) -> bytes:
    outgoing = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=server_hostname)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


def client(
    least: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2, most: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, *protocols: str
) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.minimum_version, context.maximum_version = least, most
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
REAL = [
    first_flight(client(), "name.example"),
    first_flight(client(V12, V13, "http/1.1"), None),
    first_flight(client(V12, V12, "h2", "http/1.1"), "name.example"),
    first_flight(client(V13, V13), None),
    record(CHROME),
    record(SOCKS),
]


@pytest.mark.parametrize("name", [None, "name.example", "a." * 120 + "example", "127.0.0.1"])
@pytest.mark.parametrize("protocols", [(), ("http/1.1",), ("h2", "http/1.1")])
@pytest.mark.parametrize("versions", [(V12, V12), (V12, V13), (V13, V13)])
def test_python_client(
    name: str | None, protocols: tuple[str, ...], versions: tuple[ssl.TLSVersion, ssl.TLSVersion]
) -> None:
    least, most = versions
    answer = read_client_hello(first_flight(client(least, most, *protocols), name))
    assert answer is not None
    # OpenSSL sends no server_name for an address, as RFC 6066 asks.
    assert answer.server_name == (None if name == "127.0.0.1" else name)
    assert answer.alpn == tuple(protocol.encode() for protocol in protocols)
    assert max(answer.versions) == most
    assert min(answer.versions) == least
    assert answer.ja4[:4] == f"t{'12' if most == V12 else '13'}{'d' if answer.server_name else 'i'}"


def openssl_client(*arguments: str) -> tuple[bytes, str]:
    """Return the first flight of `openssl s_client` and its own description of it."""
    program = shutil.which("openssl")
    if program is None:
        assert "CI" not in os.environ, "openssl is missing"
        pytest.skip("openssl is missing")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        process = subprocess.Popen(
            [program, "s_client", "-connect", f"127.0.0.1:{listener.getsockname()[1]}", "-trace", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with process:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(20)
                data = b""
                while read_client_hello(data) is None:
                    more = connection.recv(4096)
                    assert more, "the client is gone"
                    data += more
            trace, _ = process.communicate(timeout=20)
    return data, trace.partition("ClientHello")[2].partition("Sent Record")[0]


@pytest.mark.parametrize(
    ("arguments", "name", "protocols"),
    [
        (["-servername", "Name.Example.", "-alpn", "http/1.1,h2"], "name.example", (b"http/1.1", b"h2")),
        (["-noservername"], None, ()),
        (["-tls1_2", "-servername", "[::1]"], "[::1]", ()),
        (["-tls1_3", "-servername", "203.0.113.7", "-alpn", "x"], "203.0.113.7", (b"x",)),
    ],
)
def test_openssl_client(arguments: list[str], name: str | None, protocols: tuple[bytes, ...]) -> None:
    data, trace = openssl_client(*arguments)
    answer = read_client_hello(data)
    assert answer is not None
    assert (answer.server_name, answer.alpn) == (name, protocols)

    # The fingerprint again, from OpenSSL's own description of what it sent.
    ciphers = sorted(f"{a}{b}".lower() for a, b in re.findall(r"\{0x(..), 0x(..)\} ", trace))
    kinds = sorted(f"{int(kind):04x}" for kind in re.findall(r"extension_type=\w+\((\d+)\)", trace))
    signatures = re.findall(r"\(0x(....)\)$", trace.partition("=signature_algorithms(")[2], re.MULTILINE)
    hashed = ",".join(kind for kind in kinds if kind not in ("0000", "0010")) + "_" + ",".join(signatures)
    ends = f"{protocols[0].decode()[0]}{protocols[0].decode()[-1]}" if protocols else "00"
    assert answer.ja4 == "_".join(
        (
            f"t{'12' if '-tls1_2' in arguments else '13'}{'d' if name else 'i'}{len(ciphers):02}{len(kinds):02}{ends}",
            sha256(",".join(ciphers).encode()).hexdigest()[:12],
            sha256(hashed.encode()).hexdigest()[:12],
        )
    )


# The rules


@pytest.mark.parametrize("name", [b"Example.COM", b"example.com.", b"EXAMPLE.com"])
def test_server_name_is_lower_case_without_the_dot(name: bytes) -> None:
    assert read(message([server_name(name)])).server_name == "example.com"


@pytest.mark.parametrize("name", [b"xn--bcher-kva.example", b"a_b.example", b"192.0.2.1", b"2001:db8::1", b"a" * 255])
def test_server_name_as_sent(name: bytes) -> None:
    assert read(message([server_name(name)])).server_name == name.decode()


def test_empty_and_absent_extensions_are_allowed() -> None:
    assert read(message([])) == read(message(None))


@pytest.mark.parametrize("data", [b"GET ", b"GET / HTTP/1.1\r\n", b"POST /x", b"A ", b"ABCDEFGHIJKLMNO /"])
def test_plain_http(data: bytes) -> None:
    with pytest.raises(PlainHTTP):
        read_client_hello(data)
    with pytest.raises(PlainHTTP):
        bytes_needed(data)


@pytest.mark.parametrize("data", [b"", b"G", b"GE", b"GET", b"ABCDEFGHIJKLMNO"])
def test_perhaps_http(data: bytes) -> None:
    assert read_client_hello(data) is None
    assert len(data) < bytes_needed(data) <= 16


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"get / HTTP/1.1\r\n",
        b" ",
        b"\r\n",
        b"\x00",
        b"ABCDEFGHIJKLMNOP",
        b"ABCDEFGHIJKLMNOP /",
        b"GE\x00",
        b"\x80\x2e\x01\x03\x01",  # SSL 2.0's form
        b"\x15\x03\x01\x00\x02",  # an alert first
        b"\x16\x02",
        b"\x16G",
        b"\x05\x01\x00",  # SOCKS
    ],
)
def test_not_tls(data: bytes) -> None:
    with pytest.raises(NotTLS):
        read_client_hello(data)


WHOLE = message([TLS13])


@pytest.mark.parametrize(
    ("data", "description"),
    [
        (record(b""), hello.UNEXPECTED_MESSAGE),
        (record(WHOLE[:3]) + record(b"") + record(WHOLE[3:]), hello.UNEXPECTED_MESSAGE),
        (record(WHOLE[:9]) + record(b"\x02\x28", 21), hello.UNEXPECTED_MESSAGE),
        (record(b"\x02" + WHOLE[1:]), hello.UNEXPECTED_MESSAGE),
        (record(WHOLE + b"\x00"), hello.UNEXPECTED_MESSAGE),
        (b"\x16\x03\x01\x40\x01", hello.RECORD_OVERFLOW),
        (b"\x16\x03\x01\x00\x04\x01\xff\xff\xff", hello.ILLEGAL_PARAMETER),
        (b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc", hello.ILLEGAL_PARAMETER),
        (record(b"\x01\x00\x00\x00"), hello.DECODE_ERROR),
    ],
)
def test_bad_records(data: bytes, description: int) -> None:
    assert refusal(data).alert == description
    assert refusal(data + b"more").alert == description


@pytest.mark.parametrize(
    "handshake",
    [
        message([], session_id=bytes(33)),
        message([], ciphers=b""),
        message([], ciphers=b"\x13"),
        message([], compressions=b""),
        b"\x01" + vector(WHOLE[4:] + b"\x00", 3),  # bytes after the extensions
        b"\x01" + vector(WHOLE[4:-1], 3),
        b"\x01" + vector(message(None)[4:] + b"\x00", 3),  # half a length
        b"\x01" + vector(message(None)[4:] + vector(b"\x00", 2), 3),  # half an extension
        message([(b"\x00\x00", b"")]),
        message([(b"\x00\x00", vector(b"", 2))]),
        message([(b"\x00\x00", vector(b"\x00", 2))]),
        message([(b"\x00\x00", server_name(b"a")[1] + b"x")]),
        message([(b"\x00\x00", vector(b"\x00" + b"\x00\x09abc", 2))]),
        message([(b"\x00\x10", vector(b"", 2))]),
        message([alpn(b"")]),
        message([alpn(b"h2", b"")]),
        message([(b"\x00\x10", vector(b"\x05h2", 2))]),
        message([(b"\x00\x2b", b"\x00")]),
        message([(b"\x00\x2b", b"\x03\x03\x04\x03")]),
        message([(b"\x00\x2b", b"\x02\x03\x04\x03")]),
        message([(b"\x00\x0d", b"")]),
        message([(b"\x00\x0d", b"\x00\x01\x04")]),
    ],
)
def test_malformed(handshake: bytes) -> None:
    assert refusal(record(handshake)).alert == hello.DECODE_ERROR


@pytest.mark.parametrize(
    "extensions",
    [
        [TLS13, TLS13],
        [(b"\x12\x34", b""), (b"\x12\x34", b"x")],
        [(b"\x00\x00", vector(b"\x00" + vector(b"a", 2) + b"\x00" + vector(b"b", 2), 2))],
        [(b"\x00\x00", vector(b"\x01" + vector(b"a", 2), 2))],
        *[[server_name(name)] for name in (b"", b".", b"a" * 256, b"a\x00b", b"a b", b"a\nb", b"\x7f", b"b\xc3\xbc")],
    ],
)
def test_illegal(extensions: list[tuple[bytes, bytes]]) -> None:
    error = refusal(record(message(extensions)))
    assert error.alert == hello.ILLEGAL_PARAMETER
    assert str(error) == error.reason


def test_longest_hello() -> None:
    padding = MAX_HELLO - 5 - len(message([(b"\x00\x15", b"")]))
    longest = record(message([(b"\x00\x15", bytes(padding))]))
    assert len(longest) == MAX_HELLO
    assert read_client_hello(longest) is not None
    too_long = record(message([(b"\x00\x15", bytes(padding + 1))]))
    # The length is in the first nine bytes, so they decide.
    assert read_client_hello(too_long[:8]) is None
    assert refusal(too_long[:9]).alert == hello.ILLEGAL_PARAMETER


def test_record_headers_count() -> None:
    whole = message([(b"\x00\x15", bytes(8000))])
    assert refusal(b"".join(record(whole[at : at + 1]) for at in range(len(whole)))).alert == hello.ILLEGAL_PARAMETER


def test_alert() -> None:
    assert alert(hello.UNRECOGNIZED_NAME) == b"\x15\x03\x03\x00\x02\x02\x70"
    assert alert(hello.NO_APPLICATION_PROTOCOL)[-1] == 120
    assert alert(hello.PROTOCOL_VERSION)[-1] == 70


def test_client_understands_the_alert() -> None:
    incoming = ssl.MemoryBIO()
    connection = client().wrap_bio(incoming, ssl.MemoryBIO(), server_hostname="name.example")
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    incoming.write(alert(hello.NO_APPLICATION_PROTOCOL))
    with pytest.raises(ssl.SSLError, match=r"(?i)no.application.protocol"):
        connection.do_handshake()


# In any pieces


Outcome = ClientHello | tuple[type[HelloError], int | None, str] | None


def outcome(data: bytes) -> Outcome:
    try:
        return read_client_hello(data)
    except HelloError as error:
        return type(error), getattr(error, "alert", None), str(error)


def in_records(handshake: bytes, sizes: list[int]) -> bytes:
    records = b""
    for size in sizes:
        fragment, handshake = handshake[:size], handshake[size:]
        if fragment:
            records += record(fragment)
    return records + record(handshake) if handshake else records


def mutated(data: st.DataObject) -> bytes:
    """Draw one of the real hellos, in one record or several, with a few bytes or lengths changed."""
    real = data.draw(st.sampled_from(REAL))
    sizes = data.draw(st.lists(st.integers(1, 400), max_size=6))
    changed = bytearray(in_records(real[5:], sizes))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at] = data.draw(st.sampled_from((0, 1, 255, changed[at] ^ 1, changed[at] ^ 128)))
    return bytes(changed)


def assert_prefixes_agree(data: bytes, ends: list[int]) -> None:
    """None up to some length, and one outcome from there on; never a hello before `bytes_needed`."""
    decided: Outcome = None
    needed = 0
    for end in ends:
        now = outcome(data[:end])
        if decided is None:
            decided = now
        assert now == decided
        if isinstance(now, ClientHello):
            assert end >= needed
        if now is None:
            assert end < bytes_needed(data[:end]) <= MAX_HELLO
            assert needed <= bytes_needed(data[:end])
            needed = bytes_needed(data[:end])


@pytest.mark.parametrize("data", [*REAL, b"OPTIONS * HTTP/1.1\r\n", in_records(SOCKS, [1] * 200)])
def test_every_prefix(data: bytes) -> None:
    assert outcome(data) is not None
    assert_prefixes_agree(data + b"\x17\x03\x03\x00\x01x", list(range(len(data) + 7)))


@given(st.data())
def test_any_split_of_mutated_hellos_gives_one_outcome(data: st.DataObject) -> None:
    changed = mutated(data) + data.draw(st.binary(max_size=30))
    ends = data.draw(st.lists(st.integers(0, len(changed)), max_size=20))
    assert_prefixes_agree(changed, [*sorted(ends), len(changed)])


@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda data: b"\x16\x03\x01\x00" + data))
def test_any_bytes_give_one_outcome(data: bytes) -> None:
    assert_prefixes_agree(data, list(range(len(data) + 1)))


@given(st.binary(max_size=80), st.binary(max_size=40))
def test_any_body_is_read_or_refused(body: bytes, block: bytes) -> None:
    assert outcome(record(b"\x01" + vector(body, 3))) is not None
    assert outcome(record(b"\x01" + vector(message(None)[4:] + vector(block, 2), 3))) is not None
    for kind in (b"\x00\x00", b"\x00\x0d", b"\x00\x10", b"\x00\x2b"):
        assert outcome(record(message([(kind, body)]))) is not None


@given(st.sampled_from(REAL), st.lists(st.integers(1, 300), max_size=40))
def test_any_fragmentation_gives_the_same_hello(real: bytes, sizes: list[int]) -> None:
    assert outcome(in_records(real[5:], sizes)) == outcome(real)


def test_bytes_needed() -> None:
    two_records = in_records(CHROME, [100])
    assert bytes_needed(b"") == 1
    assert bytes_needed(two_records[:1]) == 9
    for length in (9, 50, 105, 109, 110, 300):
        assert bytes_needed(two_records[:length]) == len(two_records)
    assert bytes_needed(two_records) == len(two_records)


def test_records_of_one_byte() -> None:
    data = in_records(CHROME, [1] * len(CHROME))
    assert read_client_hello(data) == read(CHROME)
    reads = length = 0
    while length < len(data):
        length = bytes_needed(data[:length])
        reads += 1
    # A reader that waits for the bytes that are needed reads rarely, however small the records.
    assert length == len(data)
    assert reads < 50
