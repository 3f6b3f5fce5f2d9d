"""The embedded echo origin: what ``tlstunnel start`` tunnels to when no origin is given.

It has a process of its own, so that it costs the tunnel's loop nothing, and which ends when its standard input does:
that is, when the tunnel's process is gone, however that ended.
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Mapping
from typing import Self

from tlstunnel.program import PYTHON, module_command, module_environment

END_SECONDS = 5.0


class EchoOrigin:
    """The echo origin's process and where it listens: a port of 127.0.0.1 that the system chose."""

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
            # A group of its own: a Ctrl-C is for the tunnel, which ends its tunnels before it ends this.
            pid = os.posix_spawn(
                PYTHON,
                module_command("tlstunnel.origins.echo", str(listener.fileno())),
                module_environment(),
                file_actions=[(os.POSIX_SPAWN_DUP2, reading, 0)],
                setpgroup=0,
                setsigmask=(),
            )
            os.close(reading)
            return cls(listener.getsockname()[1], pid, writing)

    def kept(self) -> dict[str, int]:
        """What `restored` takes in the program that is executed next."""
        return {"port": self.port, "pid": self._pid, "pipe": self._pipe}

    @classmethod
    def restored(cls, kept: Mapping[str, int]) -> Self:
        """The one that the program executed before has started."""
        os.set_inheritable(kept["pipe"], False)
        return cls(**kept)

    def close(self) -> None:
        """End the process and wait for it, at most 5 s."""
        os.close(self._pipe)
        deadline = time.monotonic() + END_SECONDS
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
                if time.monotonic() > deadline:
                    os.kill(self._pid, signal.SIGKILL)
                time.sleep(0.005)
