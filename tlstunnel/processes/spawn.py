"""Starting a child: `posix_spawn`, which is fork and exec in one, never a fork of a running loop.

Imports next to nothing: Python takes as long to start and to import in the child as in the parent, so the first one is
started before the parent has imported its own modules: ready after 0.35 s instead of 0.54 (medians of 9).
"""

import atexit
import contextlib
import os
import signal
import socket

from tlstunnel.program import PYTHON, module_command, module_environment

SERVING = "tlstunnel.processes.child"
"""The module of the children that serve, the first of which is started ahead."""

_ahead: list[tuple[int, socket.socket]] = []


def start_ahead() -> None:
    """Start a serving child that `spawn` returns later; it ends with this process if it is not asked for."""
    with contextlib.suppress(OSError):  # `spawn` raises it again
        _ahead.append(_start(SERVING, group=True))
        atexit.register(_forget)


def spawn(module: str, *, group: bool) -> tuple[int, socket.socket]:
    """Start a child that runs `module`, in a process group of its own or in this one's.

    Return its pid and the link to it. Raises OSError.
    """
    return _ahead.pop() if module == SERVING and group and _ahead else _start(module, group=group)


def _start(module: str, *, group: bool) -> tuple[int, socket.socket]:
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            os.set_inheritable(theirs.fileno(), True)
            command = module_command(module, "--link", str(theirs.fileno()))
            if group:
                pid = os.posix_spawn(PYTHON, command, module_environment(), setpgroup=0, setsigmask=())
            else:
                pid = os.posix_spawn(PYTHON, command, module_environment(), setsigmask=())
    except OSError:
        ours.close()
        raise
    return pid, ours


def _forget() -> None:
    for pid, sock in _ahead:
        sock.close()
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    _ahead.clear()
