"""Real applications whose page and WebSocket share a hostname, behind a site with `http = "pass"`.

JupyterLab and Socket.IO, each as its own process; Chromium opens their pages and trusts the test authority.
"""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect

from tests.browser import browser_page
from tests.harness import REPOSITORY, TIMEOUT, Certificate, Record, Tunnel, eventually, missing, require
from tests.promises.firewalled import tunnel_to
from tlstunnel.testing.program import kill_left_behind, mark_environment

CLIENTS = REPOSITORY / "tests" / "clients"
SLOW = 2 * TIMEOUT * 1000
"""Milliseconds for events that wait until JupyterLab has started in the browser, or its kernel in Python."""
SITE = 'http = "pass"\nweb_origins = ["same"]\n'

NOTEBOOK = {
    "cells": [{"cell_type": "code", "id": "a", "execution_count": None, "metadata": {}, "outputs": [], "source": ""}],
    "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
    "nbformat": 4,
    "nbformat_minor": 5,
}


@contextmanager
def _application(
    command: Sequence[str], folder: Path, says: str, environment: Mapping[str, str] | None = None
) -> Iterator[re.Match[str]]:
    """Run it in `folder` until its output matches `says`, yield the match, and end it with SIGTERM.

    Fails if its exit status is not 0, or a process is left.
    """
    log = folder / "output.txt"
    mark, inherited = mark_environment(os.environ | dict(environment or {}))
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=inherited,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        found = eventually(lambda: _said(says, log, process), timeout=SLOW / 1000)
        assert found is not None
        yield found
        process.send_signal(signal.SIGTERM)
        status = process.wait(TIMEOUT)
    except BaseException:
        kill_left_behind(mark, grace=0)
        print(f"the application's output ({' '.join(command)}):\n{log.read_text()}")
        raise
    finally:
        orphans = kill_left_behind(mark)
        process.wait()
    assert (status, orphans) == (0, []), log.read_text()


def _said(pattern: str, log: Path, process: subprocess.Popen[bytes]) -> re.Match[str] | None:
    ended = process.poll()
    found = re.search(pattern, log.read_text())
    assert found or ended is None, f"it ended with {ended} before it was ready:\n{log.read_text()}"
    return found


@contextmanager
def _tunnel(origin: str, certificate: Certificate) -> Iterator[Tunnel]:
    """A tunnel that, at the end, has refused no request of the application's page."""
    with tunnel_to(origin, certificate, site=SITE) as tunnel:
        yield tunnel
    assert [record for record in tunnel.records("connection") if record["verdict"] == "refused"] == []


# --- JupyterLab -------------------------------------------------------------------------------------------------------


@contextmanager
def _jupyter(folder: Path) -> Iterator[str]:
    """JupyterLab with one notebook, on a Unix socket, as freshly installed."""
    python = CLIENTS / ".venv" / "bin" / "python"
    if not python.exists():
        missing("JupyterLab is not installed: ./scripts/install gets it")
    notebooks = folder / "notebooks"
    notebooks.mkdir()
    (notebooks / "sums.ipynb").write_text(json.dumps(NOTEBOOK))
    # No question about news is in the way, and no other machines are contacted.
    settings = folder / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    socket = folder / "jupyter.sock"
    command = [str(python), "-m", "jupyterlab", "--no-browser", "--LabApp.extension_manager=readonly"]
    command += [f"--ServerApp.sock={socket}", f"--ServerApp.root_dir={notebooks}", "--IdentityProvider.token=secret"]
    if os.geteuid() == 0:
        command.append("--allow-root")
    environment = {
        "HOME": str(folder),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
    }
    with _application(command, folder, r"Server \S+ is running at", environment):
        yield f"unix:{socket}"


def test_a_cell_of_a_jupyter_notebook(certificate: Certificate, tmp_path: Path) -> None:
    with _jupyter(tmp_path) as origin, _tunnel(origin, certificate) as tunnel:
        with browser_page(tmp_path / "home", tunnel.ca) as page:
            with page.expect_websocket(lambda socket: "/api/kernels/" in socket.url, timeout=SLOW) as opened:
                page.goto(f"https://localhost:{tunnel.port}/lab/tree/sums.ipynb?token=secret", timeout=SLOW)
            kernel = opened.value
            path = urlsplit(kernel.url).path
            cell = page.locator(".jp-Notebook .jp-CodeCell").first
            # Before its kernel is idle, a page on a busy machine may lose key strokes.
            page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(state="attached", timeout=SLOW)
            cell.locator(".cm-content").click()
            page.keyboard.type("print(6*7)")
            with kernel.expect_event("framereceived", lambda frame: b'"42\\n"' in _bytes(frame), timeout=SLOW):
                page.keyboard.press("Shift+Enter")
            expect(cell.locator(".jp-OutputArea-output")).to_have_text("42", timeout=SLOW)
            page.keyboard.press("Control+s")
            eventually(lambda: '"42\\n"' in (tmp_path / "notebooks" / "sums.ipynb").read_text())
        record = tunnel.wait_record(lambda record: record.get("path") == path)
    assert re.fullmatch(r"/api/kernels/[0-9a-f-]+/channels", path)
    assert (record["status"], record["verdict"], record["origin"]) == (101, "pass", origin)
    assert record["up"] > len("print(6*7)")
    assert record["down"] > len("42")


def _bytes(frame: str | bytes) -> bytes:
    return frame.encode() if isinstance(frame, str) else frame


# --- Socket.IO --------------------------------------------------------------------------------------------------------


@pytest.fixture
def socket_io(certificate: Certificate, tmp_path: Path) -> Iterator[Tunnel]:
    node = require("node", "nodejs")
    if not (CLIENTS / "node_modules" / "socket.io").is_dir():
        missing("Socket.IO is not installed: ./scripts/install gets it")
    command = [node, str(CLIENTS / "socketio.mjs")]
    with (
        _application(command, tmp_path, r"listening on (\S+)\n") as said,
        _tunnel(said[1], certificate) as tunnel,
    ):
        yield tunnel


ASK = "(message) => socket.timeout(10_000).emitWithAck('ask', message)"
REPEAT = "() => socket.on('repeat', (message, answer) => answer(message + ', said the page'))"
REACHED = "(transport) => seen.transports.at(-1) == transport && seen.greetings.length"


def _converse(tunnel: Tunnel, home: Path, query: str, transport: str) -> list[str]:
    """Open the page, wait until it has this transport, have messages go both ways; return the transports it had."""
    with browser_page(home, tunnel.ca) as page:
        page.goto(f"https://localhost:{tunnel.port}/{query}")
        page.evaluate(REPEAT)
        page.wait_for_function(REACHED, arg=transport)
        for message in ("grüße", "x" * 200_000):
            assert page.evaluate(ASK, message) == {"returned": f"{message}, said the page", "transport": transport}
        seen = page.evaluate("seen")
    assert seen["greetings"] == ["https"]
    return [str(name) for name in seen["transports"]]


def _answered(tunnel: Tunnel) -> int:
    """Return the number of Socket.IO's requests that were forwarded and got a response."""
    return sum(
        (record["path"], record["status"], record["reason"]) == ("/socket.io/", 200, "responded")
        for record in tunnel.records("connection")
    )


def _upgraded(record: Record) -> bool:
    return (record.get("path"), record.get("status")) == ("/socket.io/", 101)


def test_socket_io_begins_by_polling_and_continues_by_websocket(socket_io: Tunnel, tmp_path: Path) -> None:
    assert _converse(socket_io, tmp_path / "home", "", "websocket") == ["polling", "websocket"]
    record = socket_io.wait_record(_upgraded)
    assert record["verdict"] == "pass"
    assert min(record["up"], record["down"]) > 2 * 200_000
    eventually(lambda: _answered(socket_io) >= 2)


def test_socket_io_by_polling_alone(socket_io: Tunnel, tmp_path: Path) -> None:
    assert _converse(socket_io, tmp_path / "home", "?transports=polling", "polling") == ["polling"]
    # Two messages of each side, each with its response: as many POSTs, and the GETs that receive them.
    eventually(lambda: _answered(socket_io) >= 8)
    assert not any(map(_upgraded, socket_io.records("connection")))
