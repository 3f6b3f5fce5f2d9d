"""`openssl s_client`: which versions and features of TLS are supported, and which are not."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Certificate, Tunnel, handshake_request, require

REFUSED_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""The response is a 426 and the end of the connection, so that s_client exits without waiting."""


@pytest.fixture(scope="module")
def tunnel(certificate: Certificate) -> Iterator[Tunnel]:
    with Tunnel(None, certificate) as tunnel:
        yield tunnel


def _s_client(tunnel: Tunnel, *options: str, name: str | None = "localhost") -> tuple[int, str]:
    """Return the exit status and all output of one connection on which `REFUSED_REQUEST` is sent."""
    command = [require("openssl"), "s_client", "-connect", f"127.0.0.1:{tunnel.port}", "-ign_eof"]
    command += ["-CAfile", str(tunnel.ca), "-verify_return_error"]
    command += ["-noservername"] if name is None else ["-servername", name, "-verify_hostname", name]
    done = subprocess.run([*command, *options], input=REFUSED_REQUEST, capture_output=True, timeout=30, check=False)
    return done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace")


def _accepted(output: str) -> bool:
    return "Verify return code: 0 (ok)" in output and "HTTP/1.1 426 " in output


@pytest.mark.parametrize(
    ("options", "protocol", "cipher"),
    [
        (["-tls1_3"], "TLSv1.3", "TLS_AES_128_GCM_SHA256"),
        (["-tls1_3", "-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256"], "TLSv1.3", "TLS_CHACHA20_POLY1305_SHA256"),
        (["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-GCM-SHA256"], "TLSv1.2", "ECDHE-ECDSA-AES128-GCM-SHA256"),
        (["-tls1_2", "-cipher", "ECDHE-ECDSA-CHACHA20-POLY1305"], "TLSv1.2", "ECDHE-ECDSA-CHACHA20-POLY1305"),
    ],
)
def test_supported_tls(tunnel: Tunnel, options: list[str], protocol: str, cipher: str) -> None:
    if options == ["-tls1_3"]:
        options = ["-tls1_3", "-ciphersuites", cipher]
    status, output = _s_client(tunnel, *options)
    assert status == 0, output
    assert _accepted(output), output
    assert f"New, {protocol}, Cipher is {cipher}" in output
    assert "Compression: NONE" in output


@pytest.mark.parametrize(
    "options",
    [
        ["-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0"],
        ["-tls1", "-cipher", "DEFAULT@SECLEVEL=0"],
        ["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA"],
        ["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA256"],
        ["-tls1_2", "-cipher", "AES128-GCM-SHA256"],
    ],
    ids=["tls-1.1", "tls-1.0", "cbc-sha1", "cbc-sha256", "no-forward-secrecy"],
)
def test_unsupported_tls(tunnel: Tunnel, options: list[str]) -> None:
    status, output = _s_client(tunnel, *options)
    assert status != 0
    assert "alert protocol version" in output or "alert handshake failure" in output, output
    assert "Cipher is (NONE)" in output


def test_the_whole_upgrade_over_tls(certificate: Certificate, tunnel: Tunnel) -> None:
    """-quiet does not change the connection: standard input is sent, and the response is printed."""
    close_frame = b"\x88\x80\x00\x00\x00\x00"  # masked, as a client's must be; the echo origin responds and closes
    done = subprocess.run(
        [require("openssl"), "s_client", "-quiet", "-connect", f"127.0.0.1:{tunnel.port}", "-CAfile", str(tunnel.ca)],
        input=handshake_request() + close_frame,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.stdout.startswith(b"HTTP/1.1 101 "), done
    assert done.stdout.endswith(b"\r\n\r\n\x88\x00")


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_a_session_is_resumed(tunnel: Tunnel, tmp_path: Path, version: str) -> None:
    session = str(tmp_path / "session.pem")
    status, output = _s_client(tunnel, version, "-sess_out", session)
    assert status == 0, output
    assert _accepted(output), output
    assert "New, TLS" in output
    status, output = _s_client(tunnel, version, "-sess_in", session)
    assert status == 0, output
    assert "Reused, TLS" in output
    assert "HTTP/1.1 426 " in output


def test_reconnecting_resumes_each_time(tunnel: Tunnel) -> None:
    status, output = _s_client(tunnel, "-tls1_2", "-reconnect")
    assert status == 0, output
    assert output.count("New, TLSv1.2") == 1
    assert output.count("Reused, TLSv1.2") == 5


def test_one_ticket_is_issued(tunnel: Tunnel) -> None:
    status, output = _s_client(tunnel, "-tls1_3")
    assert status == 0, output
    assert output.count("Post-Handshake New Session Ticket arrived") == 1


def test_alpn(tunnel: Tunnel) -> None:
    status, output = _s_client(tunnel, "-alpn", "h2,http/1.1")
    assert status == 0, output
    assert "ALPN protocol: http/1.1" in output
    status, output = _s_client(tunnel, "-alpn", "h2")
    assert status != 0
    assert "alert no application protocol" in output
    assert "Cipher is (NONE)" in output


@pytest.mark.parametrize("name", ["localhost", None])
def test_a_site_without_names_accepts_any(certificate: Certificate, name: str | None) -> None:
    with Tunnel(None, certificate) as tunnel:
        status, output = _s_client(tunnel, name=name)
        assert status == 0, output
        assert _accepted(output), output
        assert tunnel.wait_records(1)[0]["sni"] == (name or "")


def test_the_chain_that_is_served(tunnel: Tunnel) -> None:
    _, output = _s_client(tunnel, "-showcerts")
    assert output.count("BEGIN CERTIFICATE") >= 1
    assert "Verification: OK" in output


def test_renegotiation_is_refused(tunnel: Tunnel) -> None:
    """`R` on a line makes s_client request it; the request that follows shows whether the connection continued."""
    done = subprocess.run(
        [
            require("openssl"),
            "s_client",
            "-connect",
            f"127.0.0.1:{tunnel.port}",
            "-tls1_2",
            "-CAfile",
            str(tunnel.ca),
        ],
        input=b"R\n",
        capture_output=True,
        timeout=30,
        check=False,
    )
    output = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert "RENEGOTIATING" in output
    assert "no renegotiation" in output, output
