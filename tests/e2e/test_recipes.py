"""docs/recipes: each configuration there is accepted, and does what its page says, with real clients."""

import contextlib
import re
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from tests.harness import (
    PROGRAM,
    REPOSITORY,
    TIMEOUT,
    RawOrigin,
    Tunnel,
    WebsocketsOrigin,
    child_environment,
    eventually,
    read_request,
    require,
    switching_protocols,
)
from tests.pki import Authority, cert_pem
from tlstunnel.certificates import issue

RECIPES = sorted((REPOSITORY / "docs" / "recipes").glob("*.md"))
PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 11\r\n\r\n<h1>hi</h1>"


def _block(name: str, language: str) -> str:
    text = (REPOSITORY / "docs" / "recipes" / f"{name}.md").read_text()
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return str(block)


def _replace(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def _write_certificates(folder: Path, name: str) -> Authority:
    """Write the files that the recipes name; return the authority of the devices."""
    certs = folder / "certs"
    issue.create([name], certs)
    devices = Authority("devices")
    (certs / "devices-ca.pem").write_bytes(cert_pem(devices.cert))
    (certs / "devices-crl.pem").write_bytes(devices.revoke().public_bytes(Encoding.PEM))
    return devices


@contextlib.contextmanager
def _tunnel(name: str, host: str, *changes: tuple[str, str]) -> Iterator[tuple[Tunnel, Authority]]:
    """Run the tunnel of a recipe, which serves `host`; only ports and addresses differ from the page."""
    tunnel = Tunnel(config=_replace(_block(name, "toml"), *changes))
    devices = _write_certificates(tunnel.folder, host)
    with tunnel:
        yield tunnel, devices


def _context(tunnel: Tunnel) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=tunnel.ca)


def _connect(port: int, host: str, context: ssl.SSLContext, origin: str | None = None) -> ClientConnection:
    sock = socket.create_connection(("127.0.0.1", port), TIMEOUT)
    return connect(f"wss://{host}/", sock=sock, ssl=context, origin=Origin(origin) if origin else None)


def _echoes(port: int, host: str, context: ssl.SSLContext) -> bool:
    with _connect(port, host, context) as client:
        client.send("hello")
        return client.recv() == "hello"


def test_there_are_recipes() -> None:
    assert [file.stem for file in RECIPES] == ["behind-haproxy", "client-certificates", "page-and-socket"]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_config_check_accepts_each(file: Path, tmp_path: Path) -> None:
    text = _block(file.stem, "toml")
    (name,) = re.findall(r'^names = \["(.*)"\]$', text, re.MULTILINE)
    _write_certificates(tmp_path, name)
    (tmp_path / "tlstunnel.toml").write_text(text)
    done = subprocess.run(
        [*PROGRAM, "config", "check"],
        cwd=tmp_path,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done


def _serve_page_and_socket(sock: socket.socket) -> None:
    request = read_request(sock)
    if request.headers["Upgrade"] is None:
        sock.sendall(PAGE)
        return
    sock.sendall(switching_protocols(request))
    while some := sock.recv(65536):
        sock.sendall(bytes([some[0], some[1] & 0x7F]) + _unmask(some[2:]))
        if some[0] & 0x0F == 8:  # after a Close, the client waits for the end of the connection
            return


def _unmask(rest: bytes) -> bytes:
    key, payload = rest[:4], rest[4:]
    return bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))


def test_a_page_and_its_socket() -> None:
    host = "app.example.com"
    with RawOrigin(_serve_page_and_socket) as origin:
        changes = ('["0.0.0.0:443", "[::]:443"]', '["127.0.0.1:0"]'), ("127.0.0.1:3000", origin.address)
        with _tunnel("page-and-socket", host, *changes) as (tunnel, _):
            to = ["--connect-to", f"::127.0.0.1:{tunnel.port}", "--cacert", str(tunnel.ca), "--noproxy", "*"]
            page = subprocess.run(
                [require("curl"), *to, "--silent", f"https://{host}/"], capture_output=True, timeout=30, check=True
            )
            assert page.stdout == b"<h1>hi</h1>"
            assert _echoes(tunnel.port, host, _context(tunnel))
            with _connect(tunnel.port, host, _context(tunnel), origin=f"https://{host}") as client:
                client.send("hello")
                assert client.recv() == "hello"
            with pytest.raises(InvalidStatus) as caught:
                _connect(tunnel.port, host, _context(tunnel), origin="https://evil.example")
            assert caught.value.response.status_code == 403


@contextlib.contextmanager
def _haproxy(folder: Path, text: str) -> Iterator[None]:
    file = folder / "haproxy.cfg"
    file.write_text(text)
    process = subprocess.Popen(
        [require("haproxy"), "-db", "-f", file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(TIMEOUT)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_behind_haproxy(tmp_path: Path) -> None:
    host = "chat.example.com"
    with WebsocketsOrigin() as origin:
        changes = (
            ("0.0.0.0:8443", "127.0.0.1:0"),
            ("127.0.0.1:3000", origin.address),
            ('"10.0.0.2"', '"127.0.0.1"'),
            ('"10s"', '"0s"'),
        )
        with _tunnel("behind-haproxy", host, *changes) as (tunnel, _):
            port = _free_port()
            text = _replace(
                _block("behind-haproxy", "haproxy"),
                ("bind :443", f"bind 127.0.0.1:{port}"),
                ("10.0.0.3:8443", f"127.0.0.1:{tunnel.port}"),
            )
            with _haproxy(tmp_path, text):
                eventually(lambda: _accepts(port))
                assert _echoes(port, host, _context(tunnel))
                forwarded = origin.requests[-1].headers["X-Forwarded-For"]
                record = tunnel.wait_records(1)[0]
                assert record["client"] == forwarded == "127.0.0.1"
            reasons = {record["reason"] for record in tunnel.records("no TLS handshake")}
            assert not any(reason.startswith("PROXY header") for reason in reasons), reasons


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), TIMEOUT).close()
    except ConnectionRefusedError:
        return False
    return True


def test_devices_with_client_certificates(tmp_path: Path) -> None:
    host = "devices.example.com"
    with WebsocketsOrigin() as origin:
        changes = ('["0.0.0.0:8443", "[::]:8443"]', '["127.0.0.1:0"]'), ("127.0.0.1:3000", origin.address)
        with _tunnel("client-certificates", host, *changes) as (tunnel, devices):
            known = _context(tunnel)
            known.load_cert_chain(*devices.pair(tmp_path, "device", "device-7"))
            assert _echoes(tunnel.port, host, known)
            assert origin.requests[-1].headers["X-Client-Subject"] == "CN=device-7"
            with pytest.raises((ssl.SSLError, ConnectionError, WebSocketException)):
                _connect(tunnel.port, host, _context(tunnel))
            assert len(origin.requests) == 1
