"""`tlstunnel top` in a real terminal (tmux): what it shows agrees with the clients, and its keys do what they say."""

import contextlib
import os
import re
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness import (
    PROGRAM,
    TIMEOUT,
    Certificate,
    RawOrigin,
    Tunnel,
    connect_tls,
    echo_bytes,
    eventually,
    handshake_request,
    read_response,
    receive_all,
    require,
)
from tests.promises.firewalled import config_for

SITE = "localhost"
CLIENTS = 7


class Terminal:
    """A terminal of 160 columns in which a command runs, and another one `after` it."""

    def __init__(self, folder: Path, command: list[str], after: str = "true") -> None:
        self._tmux = [require("tmux"), "-S", str(folder / f"{uuid.uuid4().hex[:8]}.sock"), "-f", os.devnull]
        self._status = folder / "status"
        line = f"{' '.join(command)}; echo $? > {self._status}; {after}"
        environment = {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        for name in ("COLUMNS", "LINES"):  # they would override the size of the terminal
            environment.pop(name, None)
        subprocess.run([*self._tmux, "new-session", "-d", "-x", "160", "-y", "40", line], check=True, env=environment)

    def screen(self) -> str:
        """Return what the terminal shows."""
        return subprocess.run([*self._tmux, "capture-pane", "-p"], check=True, capture_output=True, text=True).stdout

    def wait(self, pattern: str, gone: str = "") -> str:
        """Wait until the screen matches `pattern`, and not `gone`; return it."""
        last = ""

        def is_there() -> bool:
            nonlocal last
            last = self.screen()
            return bool(re.search(pattern, last)) and not (gone and re.search(gone, last))

        try:
            eventually(is_there)
        except AssertionError:
            raise AssertionError(f"the screen does not match {pattern!r}:\n{last}") from None
        return last

    def press(self, *keys: str) -> None:
        """Press keys, by tmux's names."""
        subprocess.run([*self._tmux, "send-keys", *keys], check=True)

    def exit_status(self) -> int:
        """Wait until the command has exited."""
        eventually(self._status.exists)
        eventually(self._status.read_text)
        return int(self._status.read_text())

    def close(self) -> None:
        """End it, with what runs in it."""
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run([*self._tmux, "kill-server"], check=True, capture_output=True)


@pytest.fixture(scope="module")
def tunnel(certificate: Certificate) -> Iterator[Tunnel]:
    with RawOrigin(echo_bytes) as origin:
        top = 'processes = 2\nrelease.drain_over = "0s"\n'
        with Tunnel(None, certificate, config=config_for(origin.address, certificate, top=top)) as tunnel:
            yield tunnel


@pytest.fixture
def terminal(tunnel: Tunnel, tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(tmp_path, [*PROGRAM, "top", "--control", str(tunnel.control), "--every", "0.3"])
    with contextlib.closing(made):
        yield made


def _open(tunnel: Tunnel, stack: ExitStack, path: str) -> Callable[[], bytes]:
    client = stack.enter_context(connect_tls(tunnel))
    client.sendall(handshake_request(path))
    assert read_response(client).status == 101
    return lambda: receive_all(client)


def test_it_shows_sites_tunnels_and_refusals_as_they_are(tunnel: Tunnel, terminal: Terminal) -> None:
    with ExitStack() as stack:
        ends = [_open(tunnel, stack, f"/room/{number}") for number in range(CLIENTS)]
        with connect_tls(tunnel) as client:
            client.sendall(b"GET /page HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert read_response(client).status == 426
        # The headline, and the site with its tunnels and its refusal.
        terminal.wait(rf"(?s){CLIENTS} tunnels.*/s opened.*\n +{CLIENTS} +{SITE} +{CLIENTS} +1 ")
        terminal.press("Enter")
        terminal.wait(rf"tunnels of {SITE} · {CLIENTS} · by rate")
        terminal.press("/")
        terminal.wait("only rows that contain")
        terminal.press("-l", "ROOM/3")
        terminal.wait(rf'1 of {CLIENTS} · by rate · with "ROOM/3"', gone="/room/4")
        terminal.press("Enter")
        terminal.press("x")
        terminal.wait("End this tunnel")
        terminal.press("y")
        assert ends[3]() == b"", "its client sees an orderly end"
        record = tunnel.wait_record(lambda one: one.get("path") == "/room/3" and "ended_by" in one)
        assert record["ended_by"] == "tunnel"
        terminal.press("Escape")
        screen = terminal.wait(rf"tunnels of {SITE} · {CLIENTS - 1} · by rate")
        assert "/room/3" not in screen
        terminal.press("s")
        screen = terminal.wait("by client")
        terminal.press("4")
        terminal.wait(r"426 +no upgrade")
        terminal.press("Enter")
        terminal.wait(r'(?s)http = "pass" passes plain requests on.*refused +request.*not reached +firewall')
        terminal.press("Escape")
        terminal.wait("by time", gone="not reached")
        terminal.press("3")
        terminal.wait(r"healthy +127\.0\.0\.1:\d+")
        terminal.press("Escape")
        terminal.wait(r"sites · 1 ")
    terminal.wait(r"\n +0 tunnels|\n 0 tunnels")
    terminal.press("q")
    assert terminal.exit_status() == 0


def test_a_tunnel_that_has_gone_is_reported_and_found_again(certificate: Certificate, tmp_path: Path) -> None:
    with RawOrigin(echo_bytes) as origin, Tunnel(origin.address, certificate) as tunnel:
        control = tunnel.control
        terminal = Terminal(tmp_path, [*PROGRAM, "top", "--control", str(control), "--every", "0.3"])
        with contextlib.closing(terminal):
            terminal.wait("0 tunnels")
            tunnel.stop()
            terminal.wait("cannot reach the tunnel")
            terminal.press("q")
            assert terminal.exit_status() == 0


def test_without_a_terminal_it_names_the_command_that_prints(tunnel: Tunnel) -> None:
    command = [*PROGRAM, "top", "--control", str(tunnel.control)]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT)
    assert ran.returncode == 2
    assert "tlstunnel status --sites" in ran.stderr


def test_without_a_tunnel_it_says_so_and_shows_no_screen(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, [*PROGRAM, "top", "--control", str(tmp_path / "none.sock")], after="cat")
    with contextlib.closing(terminal):
        terminal.wait("none.sock: cannot reach the tunnel")
        assert terminal.exit_status() == 1
