"""Finds the control socket of a running tunnel, and sends it a command. The other end is `tlstunnel.processes.control`.

Commands import this, and nothing that a server needs: they are typed, and should respond at once.

Tested by tests/unit/test_control.py.
"""

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlstunnel.errors import ControlError

SYSTEM_FOLDER = Path("/run/tlstunnel")
"""The folder of a tunnel that is started by root outside a session, or by the shipped unit."""


class NoTunnelRunning(ControlError):
    """No tunnel responds on a control socket."""


def list_folders() -> list[Path]:
    """Return the folders of control sockets. A tunnel creates its own in the first one, if it has no other path.

    With RUNTIME_DIRECTORY, which systemd sets for a service and its ``ExecReload``, only that: tunnels elsewhere are
    not the service's. Otherwise the folder of the user's session, and that of the system.
    """
    if given := os.environ.get("RUNTIME_DIRECTORY"):
        return [Path(given.partition(":")[0])]
    session = os.environ.get("XDG_RUNTIME_DIR")
    return [*([Path(session) / "tlstunnel"] if session else []), SYSTEM_FOLDER]


def find_control_socket() -> Path:
    """Return the control socket of the only running tunnel.

    Raises NoTunnelRunning, and ControlError if there are several.
    """
    folders = list_folders()
    alive = [path for folder in folders for path in sorted(folder.glob("control-*.sock")) if is_listening(path)]
    if not alive:
        listed = " or ".join(map(str, folders))
        raise NoTunnelRunning(f"no running tunnel has a control socket in {listed}; if it is elsewhere, use --control")
    if len(alive) > 1:
        listed = ", ".join(map(str, alive))
        raise ControlError(f"several tunnels are running; choose one with --control: {listed}")
    return alive[0]


def is_listening(path: Path) -> bool:
    """Return whether a program listens on this socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        try:
            sock.connect(str(path))
        except BlockingIOError:
            return True  # its backlog is full
        except OSError:
            return False
        return True


def _list_problems(response: Mapping[str, Any]) -> tuple[str, ...]:
    problems = response.get("problems")
    several = problems if isinstance(problems, list) and problems else [response.get("error")]
    return tuple(map(str, several))


def send_command(path: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Send a request and return the response, without a time limit.

    Raises NoTunnelRunning, and ControlError, also if the request is refused.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(path))
        except OSError as error:
            raise NoTunnelRunning(f"{path}: cannot reach the tunnel: {error.strerror or error}") from None
        try:
            with contextlib.suppress(BrokenPipeError):  # refused before it was read; the response says why
                sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as stream:
                line = stream.readline()
        except OSError as error:
            raise ControlError(f"{path}: cannot reach the tunnel: {error.strerror or error}") from None
    if not line:
        raise ControlError(f"{path}: the tunnel closed the connection without a response")
    try:
        response = json.loads(line)
    except ValueError:
        response = None
    if not isinstance(response, dict):
        raise ControlError(f"{path}: the program that listens there is not a tunnel")
    if not response.get("ok"):
        raise ControlError(*_list_problems(response))
    return response
