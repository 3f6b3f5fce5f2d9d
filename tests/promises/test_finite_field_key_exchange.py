"""No client can make the tunnel compute a finite-field key exchange: ffdhe8192 would block all others for 160 ms."""

import subprocess

import pytest

from tests.harness import Certificate, Tunnel, connect_tcp, connect_tls, receive_exactly, require, upgrade

P_521, FFDHE_2048, FFDHE_8192 = 0x0019, 0x0100, 0x0104
RETRY = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")  # RFC 8446 section 4.1.3


@pytest.mark.parametrize("offered", ["ffdhe2048", "ffdhe8192", "ffdhe2048:X25519"])
def test_openssl_is_refused(certificate: Certificate, offered: str) -> None:
    with Tunnel(None, certificate) as tunnel:
        command = [require("openssl"), "s_client", "-connect", f"127.0.0.1:{tunnel.port}", "-servername", "localhost"]
        done = subprocess.run(
            [*command, "-groups", offered], input="", capture_output=True, text=True, timeout=30, check=False
        )
        assert "alert handshake failure" in done.stderr
        record = tunnel.wait_records(1, "no TLS handshake")[0]
        assert record["reason"] == "hello: finite-field key exchange"
        with connect_tls(tunnel) as client:
            assert upgrade(client).status == 101


def test_openssl_that_supports_it_is_served_with_a_curve(certificate: Certificate) -> None:
    with Tunnel(None, certificate) as tunnel:
        command = [require("openssl"), "s_client", "-connect", f"127.0.0.1:{tunnel.port}", "-servername", "localhost"]
        command += ["-groups", "X25519:ffdhe8192"]
        done = subprocess.run(command, input="", capture_output=True, text=True, timeout=30, check=False)
        assert "Temp Key: X25519, " in done.stdout  # "Server ..." or, since OpenSSL 3.2, "Peer ..."


@pytest.mark.parametrize("groups", [(FFDHE_8192, FFDHE_2048, P_521), (P_521, FFDHE_8192)])
def test_a_client_that_supports_a_curve_is_asked_for_it(certificate: Certificate, groups: tuple[int, ...]) -> None:
    """The refusal relies on this: OpenSSL's HelloRetryRequest selects the curve, wherever it is in the list."""
    with Tunnel(None, certificate) as tunnel, connect_tcp(tunnel) as plain:
        plain.sendall(_hello(groups))
        header = receive_exactly(plain, 5)
        answer = receive_exactly(plain, int.from_bytes(header[3:]))
        assert header[0] == 22
        assert answer[6:38] == RETRY
        assert b"\x00\x33\x00\x02" + P_521.to_bytes(2) in answer


def _hello(groups: tuple[int, ...]) -> bytes:
    """A ClientHello of TLS 1.3 without any key share, RFC 8446 section 4.1.2."""
    extensions = {
        0: b"\x00\x0c\x00\x00\x09localhost",
        10: _vector(b"".join(group.to_bytes(2) for group in groups)),
        13: _vector(b"\x04\x03\x08\x04"),
        43: b"\x02\x03\x04",
        51: _vector(b""),
    }
    block = b"".join(kind.to_bytes(2) + _vector(data) for kind, data in extensions.items())
    body = b"\x03\x03" + bytes(32) + b"\0" + _vector(b"\x13\x01") + b"\x01\0" + _vector(block)
    return b"\x16\x03\x01" + _vector(b"\x01" + len(body).to_bytes(3) + body)


def _vector(data: bytes) -> bytes:
    return len(data).to_bytes(2) + data
