"""Headless Chromium from Debian: the page's own `new WebSocket(...)`, with the test authority trusted by the user.

Trust comes only from an NSS database in a home folder made for the test: no flag makes Chromium
ignore certificate errors.
"""

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from tests.harness import Certificate, Tunnel, WebsocketsOrigin, require

PAGE = b"<!doctype html><title>A page that opens a WebSocket</title>"

CONVERSE = """
(uri) => new Promise((resolve) => {
  const socket = new WebSocket(uri, ["v2.echo", "v1.echo"]);
  const bytes = new Uint8Array(1024 * 1024).map((_, index) => index * 31);
  const heard = [];
  socket.binaryType = "arraybuffer";
  socket.onopen = () => { socket.send("grüße"); socket.send(bytes); };
  socket.onmessage = (event) => {
    heard.push(event.data);
    if (heard.length == 2) socket.close(4004, "enough");
  };
  socket.onclose = (event) => resolve({
    protocol: socket.protocol,
    extensions: socket.extensions,
    text: heard[0],
    sameBytes: heard.length == 2 && new Uint8Array(heard[1]).every((value, index) => value == bytes[index]),
    close: [event.code, event.reason, event.wasClean],
  });
})
"""


class _PageHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _page_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _PageHandler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://localhost:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def _browser_page(home: Path) -> Iterator[Page]:
    chromium = require("chromium")
    options = [
        "--no-sandbox",  # root has none
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with _page_server() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=options, env={"HOME": str(home)})
        try:
            page = browser.new_page()
            page.goto(address)
            yield page
        finally:
            browser.close()


def _trust(home: Path, ca: Path) -> None:
    database = home / ".pki" / "nssdb"
    database.mkdir(parents=True)
    certutil = require("certutil", "libnss3-tools")
    for action in (["-N", "--empty-password"], ["-A", "-t", "C,,", "-n", "tlstunnel test", "-i", str(ca)]):
        subprocess.run([certutil, "-d", f"sql:{database}", *action], check=True, timeout=30)


@pytest.fixture
def echo(certificate: Certificate) -> Iterator[Tunnel]:
    with WebsocketsOrigin(subprotocols=["v1.echo"]) as origin, Tunnel(origin.address, certificate) as tunnel:
        yield tunnel


def test_a_page_converses_through_the_tunnel(echo: Tunnel, tmp_path: Path) -> None:
    _trust(tmp_path, echo.ca)
    with _browser_page(tmp_path) as page:
        result = page.evaluate(CONVERSE, echo.uri)
    assert result == {
        "protocol": "v1.echo",
        "extensions": "permessage-deflate; server_max_window_bits=12; client_max_window_bits=12",
        "text": "grüße",
        "sameBytes": True,
        "close": [4004, "enough", True],
    }
    record = echo.wait_records(1)[0]
    assert (record["status"], record["tls_version"], record["sni"]) == (101, "TLSv1.3", "localhost")


def test_a_browser_that_does_not_trust_the_authority_refuses(echo: Tunnel, tmp_path: Path) -> None:
    """Confirms that the other test passes because the authority is trusted."""
    with _browser_page(tmp_path) as page:
        result = page.evaluate(CONVERSE, echo.uri)
    assert result["close"] == [1006, "", False]
    assert result["text"] is None
