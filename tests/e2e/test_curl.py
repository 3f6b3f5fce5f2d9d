"""curl: what a person sees who tries the handshake by hand."""

import socket
import subprocess

from tests.harness import Certificate, RawOrigin, Tunnel, accept_upgrade, require

KEY, TOKEN = "dGhlIHNhbXBsZSBub25jZQ==", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 section 1.3
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": KEY,
}


def _curl(
    tunnel: Tunnel, *arguments: str, fields: dict[str, str] | None = None
) -> tuple[list[str], dict[str, str], str]:
    """Return the status line's parts, the fields (names in lower case) and the body."""
    command = [require("curl"), "--silent", "--show-error", "--include", "--no-buffer", "--http1.1", "--max-time", "20"]
    command += ["--cacert", str(tunnel.ca)]
    for name, value in (fields or {}).items():
        command += ["--header", f"{name}: {value}"]
    done = subprocess.run([*command, *arguments], capture_output=True, encoding="latin-1", timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    head, _, body = done.stdout.partition("\n\n")
    status, *lines = head.splitlines()
    pairs = (line.partition(": ") for line in lines)
    return status.split(maxsplit=2), {name.lower(): value for name, _, value in pairs}, body


def _https(tunnel: Tunnel) -> str:
    return f"https://localhost:{tunnel.port}/"


def _hello_and_goodbye(sock: socket.socket) -> None:
    accept_upgrade(sock, [("X-Origin", "was here")])
    sock.sendall(b"\x81\x05hello\x88\x00")
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(4096):
        pass


def test_the_handshake(certificate: Certificate) -> None:
    with RawOrigin(_hello_and_goodbye) as origin, Tunnel(origin.address, certificate) as tunnel:
        status, fields, body = _curl(tunnel, _https(tunnel), fields=UPGRADE)
        record = tunnel.wait_records(1)[0]
    assert status[:2] == ["HTTP/1.1", "101"]
    assert fields["upgrade"].lower() == "websocket"
    assert fields["connection"].lower() == "upgrade"
    assert fields["sec-websocket-accept"] == TOKEN
    assert fields["x-origin"] == "was here"
    assert "hello" in body
    assert (record["status"], record["ended_by"], record["down"]) == (101, "origin", 9)


def _refused(tunnel: Tunnel, *arguments: str, fields: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Return a refusal's status and fields, after the checks that apply to every refusal."""
    status, received, body = _curl(tunnel, *arguments, _https(tunnel), fields=fields)
    assert "close" in received["connection"].lower().split(", ")  # beside "upgrade" where Upgrade is sent: RFC 9110
    assert received["content-type"] == "text/plain; charset=utf-8"
    identity = received["x-request-id"]
    assert identity in body
    record = tunnel.wait_record(lambda record: record["event"] == "connection" and record["id"] == identity)
    assert str(record["status"]) == status[1]
    return status[1], received


def test_requests_that_are_no_upgrade_are_refused_with_the_reason(certificate: Certificate) -> None:
    with (
        RawOrigin(_hello_and_goodbye) as origin,
        Tunnel(origin.address, certificate, arguments=("--http", "refuse")) as tunnel,
    ):
        status, fields = _refused(tunnel, fields={})
        assert (status, fields["upgrade"]) == ("426", "websocket")
        status, fields = _refused(tunnel, fields=UPGRADE | {"Sec-WebSocket-Version": "8"})
        assert (status, fields["upgrade"], fields["sec-websocket-version"]) == ("426", "websocket", "13")
        assert _refused(tunnel, fields=UPGRADE | {"Sec-WebSocket-Key": "short"})[0] == "400"
        status, fields = _refused(tunnel, "--data", "x=1", fields={})
        assert (status, fields["allow"]) == ("405", "GET")
        status, fields = _refused(tunnel, "--http1.0", "--no-alpn", fields=UPGRADE)
        assert status == "505"
        assert _refused(tunnel, fields=UPGRADE | {"Cookie": "c" * 20_000})[0] == "431"
        assert origin.connections == 0


def test_plain_http_on_the_port_gets_a_hint_to_use_wss(certificate: Certificate) -> None:
    with Tunnel(None, certificate) as tunnel:
        status, fields, body = _curl(tunnel, f"http://localhost:{tunnel.port}/", fields=UPGRADE)
        assert status[:2] == ["HTTP/1.1", "400"]
        assert fields["connection"].lower() == "close"
        assert "wss://" in body


def test_curl_without_the_authority_refuses(certificate: Certificate) -> None:
    with Tunnel(None, certificate) as tunnel:
        command = [require("curl"), "--silent", "--max-time", "20", _https(tunnel)]
        assert subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 60
