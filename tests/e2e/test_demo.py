"""`./scripts/demo`, as a newcomer runs it: up to the first echoed message, and until Ctrl-C ends it."""

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.request import urlopen

import pytest
from websockets.sync.client import connect

from tests.harness import REPOSITORY, eventually
from tlstunnel.testing.program import kill_left_behind, mark_environment, start_process

DEMO = REPOSITORY / "scripts" / "demo"
LAST_LINE = "Ctrl-C stops it. Its log:"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _demo(port: int, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """It uses the virtual environment of the tests; at its end, nothing that it started may be left."""
    mark, environment = mark_environment(os.environ | {"TLSTUNNEL_VENV": sys.prefix, "XDG_STATE_HOME": str(folder)})
    process = start_process(
        [DEMO, "--port", str(port), "--admin", "127.0.0.1:0"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        ended = process.poll() is not None
        orphans = kill_left_behind(mark, grace=2.0 if ended else 0.0)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert ended
    assert orphans == []


def _read_until(stream: IO[str] | None, text: str) -> str:
    assert stream is not None
    read = ""
    for line in stream:
        read += line
        if text in line:
            return read
    raise AssertionError(f"{text!r} did not appear in:\n{read}")


def _interrupt(process: subprocess.Popen[str]) -> None:
    """As Ctrl-C does: SIGINT to the terminal's foreground process group."""
    os.killpg(process.pid, signal.SIGINT)


def test_from_nothing_to_an_echo_and_ctrl_c(tmp_path: Path) -> None:
    port = _free_port()
    with _demo(port, tmp_path) as demo:
        said = _read_until(demo.stdout, LAST_LINE)
        dashboard = re.search(r"^Dashboard: (http://127\.0\.0\.1:\d+/)$", said, re.MULTILINE)
        assert dashboard is not None
        with urlopen(dashboard[1], timeout=30) as response:
            assert b"<title>" in response.read()
        assert f"tlstunnel check wss://localhost:{port}/ --ca certs/ca.pem" in said
        _try_printed_commands(said, tmp_path)
        _interrupt(demo)
        assert demo.wait(15) == 0
        assert demo.stdout is not None
        log = demo.stdout.read()
        assert "stopped" in log
        assert "Traceback" not in said + log


def _try_printed_commands(said: str, folder: Path) -> None:
    """Run the commands that it printed, unchanged, with a shell in the repository's folder."""
    commands = re.findall(r"^ {4}((?:.*\\\n)*.*)$", said, re.MULTILINE)
    by_curl = next(command for command in commands if command.startswith("curl "))
    curl = subprocess.run(
        ["bash", "-c", by_curl], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False
    )
    assert curl.stdout.startswith("HTTP/1.1 101 "), curl

    by_websockets = next(command for command in commands if " websockets wss:" in command)
    printed = folder / "websockets.txt"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with printed.open("w") as output:
        websockets = subprocess.Popen(
            ["bash", "-c", by_websockets],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    assert websockets.stdin is not None
    with websockets.stdin:
        websockets.stdin.write("hello\n")
        websockets.stdin.flush()
        eventually(lambda: "< hello" in printed.read_text())
    assert websockets.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_ways_to_end_it_leave_nothing(number: signal.Signals, tmp_path: Path) -> None:
    with _demo(_free_port(), tmp_path) as demo:
        _read_until(demo.stdout, LAST_LINE)
        demo.send_signal(number)
        assert demo.wait(15) == 0


def test_a_client_that_stays_does_not_prevent_its_exit(tmp_path: Path) -> None:
    port = _free_port()
    with _demo(port, tmp_path) as demo:
        _read_until(demo.stdout, LAST_LINE)
        context = ssl.create_default_context(cafile=REPOSITORY / "certs" / "ca.pem")
        with connect(f"wss://localhost:{port}/", ssl=context) as client:
            client.send("hello")
            assert client.recv() == "hello"
            _interrupt(demo)
            assert demo.wait(15) == 0


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with _demo(port, tmp_path) as demo:
            assert demo.wait(60) == 1
            assert demo.stdout is not None
            said = demo.stdout.read()
    assert re.search(rf"^tlstunnel: .*{port}.*in use", said, re.MULTILINE), said
