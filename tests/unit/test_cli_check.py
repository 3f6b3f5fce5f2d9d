"""``tlstunnel check``: text, JSON, exit status, and no raw control characters."""

import io
import json
import os
import pty
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from websockets import Subprotocol
from websockets.sync.server import ServerConnection, serve

from tests.pki import PREFERRED_GROUP
from tlstunnel.certificates import issue
from tlstunnel.certificates.describe import CertificateDescription
from tlstunnel.check.results import CloseResult, DnsResult, PingResult, Step, TcpResult, TlsResult, UpgradeResult
from tlstunnel.check.results import Result as CheckResult
from tlstunnel.cli import check
from tlstunnel.errors import CertificateError, TlstunnelError


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> issue.Issued:
    return issue.create([], tmp_path_factory.mktemp("check"))


@pytest.fixture(scope="module")
def url(issued: issue.Issued) -> Iterator[str]:
    def echo(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.cert, issued.key)
    with serve(echo, "127.0.0.1", 0, ssl=context, subprotocols=[Subprotocol("chat")]) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"wss://localhost:{server.socket.getsockname()[1]}/"
        server.shutdown()
        thread.join(10)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(check.command, arguments)


def test_text(url: str, issued: issue.Issued) -> None:
    result = run(url, "--ca", str(issued.ca), "--subprotocol", "chat", "--header", "Origin: https://a.example")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    steps = [line for line in lines if line[0] != " "]
    assert [line.split()[0] for line in steps] == ["dns", "tcp", "tls", "handshake", "ping", "close", "ok"]
    assert all(line.endswith(" ms") for line in steps[:-1])
    assert len({line.rindex(" ms") for line in steps[:-1]}) == 1
    assert re.match(r"dns +localhost -> .*127\.0\.0\.1", lines[0])
    assert re.match(rf"tls +TLSv1\.3 TLS_\S+ {PREFERRED_GROUP}, ALPN none +", lines[2])
    assert "CN=localhost; names localhost, 127.0.0.1, ::1; 39" in lines[3]
    assert re.match(r"handshake +101 Switching Protocols +", lines[5])
    assert "           subprotocol chat" in lines
    assert re.match(r"close +1000 +", steps[-2])
    assert not result.stderr


def test_json(url: str, issued: issue.Issued) -> None:
    result = run(url, "--ca", str(issued.ca), "--subprotocol", "chat", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["url"], found["ok"]) == (url, True)
    steps = {step["step"]: step for step in found["steps"]}
    assert list(steps) == ["dns", "tcp", "tls", "handshake", "ping", "close"]
    assert all(step["ok"] and step["seconds"] >= 0 and "error" not in step for step in found["steps"])
    assert steps["tls"]["chain"][0]["names"] == ["localhost", "127.0.0.1", "::1"]
    assert steps["tls"]["chain"][0]["days_left"] >= 395
    assert ["Upgrade", "websocket"] in steps["handshake"]["fields"]
    assert steps["close"]["code"] == 1000


def test_a_failure_names_the_step_and_the_reason(url: str, issued: issue.Issued) -> None:
    result = run(url)
    assert result.exit_code == 1
    assert isinstance(result.exception, TlstunnelError)
    assert str(result.exception).startswith("tls failed: certificate not trusted: self-signed certificate in chain;")
    assert re.search(r"^tls +failed; TLSv1.3", result.stdout, re.MULTILINE)
    assert "CN=localhost; names" in result.stdout
    assert "\nok" not in result.stdout
    refused = run(url, "--ca", str(issued.ca))
    assert "handshake failed: the server responded with 400 Bad Request" in str(refused.exception)
    assert re.search(r"^handshake  failed; 400 Bad Request", refused.stdout, re.MULTILINE)
    assert "subprotocol none" not in refused.stdout


def test_connect_replaces_the_address_only(url: str, issued: issue.Issued) -> None:
    port = int(url.rpartition(":")[2].strip("/"))
    for elsewhere, where in ((f"wss://localhost:{port}/", "127.0.0.1"), ("wss://localhost/", f"127.0.0.1:{port}")):
        result = run(elsewhere, "--ca", str(issued.ca), "--subprotocol", "chat", "--connect", where)
        assert result.exit_code == 0, result.output
        assert re.match(r"dns +127\.0\.0\.1 -> 127\.0\.0\.1 ", result.stdout)
    wrong = run(f"wss://a.example:{port}/", "--ca", str(issued.ca), "--connect", "localhost")
    assert "not for a.example" in str(wrong.exception)
    for text in ("a:b", "::1", "[::1", "a:0", "a:99999", "a b"):
        assert run(url, "--connect", text).exit_code == 2


def test_a_client_certificate_is_presented(issued: issue.Issued, tmp_path: Path) -> None:
    ann = issue.create_client("ann", issued.ca.parent)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.cert, issued.key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(issued.ca)

    def echo(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    both = tmp_path / "both.pem"
    both.write_bytes(ann.cert.read_bytes() + ann.key.read_bytes())
    with serve(echo, "127.0.0.1", 0, ssl=context) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"wss://localhost:{server.socket.getsockname()[1]}/"
        for pair in (("--cert", str(ann.cert), "--key", str(ann.key)), ("--cert", str(both))):
            result = run(url, "--ca", str(issued.ca), *pair)
            assert result.exit_code == 0, result.output
        # A certificate for servers is refused.
        refused = run(url, "--ca", str(issued.ca), "--cert", str(issued.cert), "--key", str(issued.key))
        assert refused.exit_code == 1
        server.shutdown()
        thread.join(10)
    assert "TLS alert unsupported_certificate: the certificate in --cert is not for clients" in str(refused.exception)
    assert run(url, "--key", str(ann.key)).exit_code == 2
    mismatch = run(url, "--cert", str(ann.cert), "--key", str(issued.key))
    assert "the private key does not match" in str(mismatch.exception)


def test_a_failure_in_json() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = run(f"wss://127.0.0.1:{port}", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["ok"] is False
    assert [step["step"] for step in found["steps"]] == ["dns", "tcp"]
    assert "connection refused" in found["steps"][1]["error"]


def test_the_reason_is_on_standard_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"wss://127.0.0.1:{listener.getsockname()[1]}"
    done = subprocess.run(
        [sys.executable, "-m", "tlstunnel", "check", url], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"tlstunnel: tcp failed: {url[6:]}: connection refused; is it running on that port?\n"
    assert "no address accepted the connection" in done.stdout


def test_a_terminal_gets_colour(url: str, issued: issue.Issued) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "tlstunnel", "check", url, "--ca", str(issued.ca), "--subprotocol", "chat"]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, env=environment) as child:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 65_536):
                shown += piece
        except OSError:
            pass  # Linux's way to say that the other side of a terminal is gone.
        os.close(ours)
        child.communicate(timeout=30)
    assert child.returncode == 0
    assert b"\x1b[32mok\x1b[0m" in shown
    assert b"dns        localhost" in shown


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "style"), [(_Terminal(), "green"), (_Terminal(), "")])
def test_the_writer_of_a_terminal(monkeypatch: pytest.MonkeyPatch, stream: _Terminal, style: str) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    # Markup is what rich would make of brackets.
    check._make_writer()("[bold]" + "x" * 200, style)
    assert "[bold]" + "x" * 200 in stream.getvalue()


def test_an_encoding_without_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    check._make_writer()("München", "")
    sys.stdout.flush()
    assert raw.getvalue() == b"M\\xfcnchen\n"


HOSTILE = "\x1b]0;x\x07\r\n\u202e"


def test_everything_from_the_server_is_escaped() -> None:
    now = datetime.now(UTC)
    day = timedelta(days=1)
    leaf = CertificateDescription("", "CN=a", (), now - day, now + day, "1", "2", "ECDSA P-256", is_ca=False)
    found: list[CheckResult | None] = [
        DnsResult("a.example"),
        TcpResult("1.2.3.4:5", (("[::1]:5", "connection refused"),)),
        TlsResult(),
        TlsResult("TLSv1.3", "X", None, HOSTILE, (leaf,), 2),
        UpgradeResult(101, HOSTILE, ((HOSTILE, HOSTILE),), HOSTILE, HOSTILE, HOSTILE, HOSTILE),
        UpgradeResult(403, HOSTILE, ((HOSTILE, HOSTILE),), body=HOSTILE),
        PingResult(0.001),
        CloseResult(1000, HOSTILE),
        None,
    ]
    for facts in found:
        for error in (None, "why"):
            lines = list(check._render(Step("step", 0.1, facts, error)))
            assert lines
            assert all(line.isprintable() for line in lines), lines
    assert json.dumps(check._to_json(Step("step", 0.1, found[4], None))).isprintable()
    shown = list(check._render(Step("tls", 0.1, found[3], None)))
    assert shown[1].strip() == "no subject; 0 days left; ECDSA P-256; by CN=a"
    assert shown[2].strip() == "certificates that cannot be decoded: 2"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["ws://localhost:1/"], "check needs a URL like wss:"),
        (["wss://a/#b"], "no fragment"),
        (["wss://a/", "--header", "Upgrade: x"], "set by the check itself"),
        (["wss://a/", "--subprotocol", "a b"], "not a subprotocol"),
        (["wss://a/", "--timeout", "0"], "more than 0"),
        (["wss://a/", "--timeout", "nan"], "more than 0"),
        (["wss://a/", "--timeout", "soon"], "not a valid float"),
        ([], "Missing argument"),
    ],
)
def test_wrong_usage(arguments: list[str], reason: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert reason in result.stderr


def test_a_ca_that_cannot_be_read(tmp_path: Path) -> None:
    result = run("wss://localhost/", "--ca", str(tmp_path / "none.pem"))
    assert result.exit_code == 1
    assert isinstance(result.exception, CertificateError)
    assert "none.pem" in str(result.exception)


def test_the_command_is_found_and_has_help() -> None:
    done: Any = CliRunner().invoke(check.command, ["--help"])
    assert isinstance(check.command, click.Command)
    assert done.exit_code == 0
    assert "default: 10" in done.output
