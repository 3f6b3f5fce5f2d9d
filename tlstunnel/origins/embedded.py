"""The embedded echo origin, to which ``tlstunnel start`` tunnels if no origin is configured.

It runs in its own process, so that it does not slow down the tunnel's loop. The process exits when its standard input
ends, and so whenever the tunnel's parent exits.

Tested by tests/e2e/test_demo.py.
"""

import os
import socket
from typing import Self

import msgspec

from tlstunnel.program import PYTHON, build_helper_environment, build_module_command
from tlstunnel.supervisor import wait_or_kill

EXIT_SECONDS = 5.0


class EchoHandover(msgspec.Struct, frozen=True):
    """What an upgrade hands over: the port, the process, and the descriptor that stops the process when closed."""

    port: int
    pid: int
    pipe: int


class EchoOrigin:
    """The echo origin's process and its port on 127.0.0.1, which the system chose."""

    def __init__(self, port: int, pid: int, pipe: int) -> None:
        self.port = port
        self._pid = pid
        self._pipe = pipe

    @classmethod
    def start(cls) -> Self:
        """Start the process."""
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
            reading, writing = os.pipe()
            os.set_inheritable(listener.fileno(), True)
            # A process group of its own: Ctrl-C is for the tunnel, which drains before it stops this process.
            pid = os.posix_spawn(
                PYTHON,
                build_module_command("tlstunnel.origins.echo", str(listener.fileno())),
                build_helper_environment(),
                file_actions=[(os.POSIX_SPAWN_DUP2, reading, 0)],
                setpgroup=0,
                setsigmask=(),
            )
            os.close(reading)
            return cls(listener.getsockname()[1], pid, writing)

    def hand_over(self) -> EchoHandover:
        """Return the argument of `restore` in the program that is executed next."""
        return EchoHandover(port=self.port, pid=self._pid, pipe=self._pipe)

    @classmethod
    def restore(cls, kept: EchoHandover) -> Self:
        """Return the echo origin that the previous program started."""
        os.set_inheritable(kept.pipe, False)
        return cls(kept.port, kept.pid, kept.pipe)

    def close(self) -> None:
        """Stop the process and wait for it to exit; kill it after 5 s."""
        os.close(self._pipe)
        wait_or_kill(self._pid, EXIT_SECONDS)
