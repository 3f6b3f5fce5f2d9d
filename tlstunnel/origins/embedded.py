"""The embedded echo origin: what ``tlstunnel start`` tunnels to when no origin is given.

It has a process of its own, so that it costs the tunnel's loop nothing, and which ends when its standard input does:
that is, when the tunnel's process is gone, however that ended.
"""

import socket
import subprocess
import sys


class EchoOrigin:
    """The echo origin's process and where it listens: a port of 127.0.0.1 that the system chose."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
            self.port: int = listener.getsockname()[1]
            descriptor = listener.fileno()
            # A session of its own: a Ctrl-C is for the tunnel, which ends its tunnels before it ends this.
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "tlstunnel.origins.echo", str(descriptor)],
                stdin=subprocess.PIPE,
                pass_fds=(descriptor,),
                start_new_session=True,
            )

    def close(self) -> None:
        """End the process and wait for it, at most 5 s."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
