"""How a child shows that it is alive: a thread of its own responds to polls of the parent, as long as its loop runs.

The thread responds even if the loop is busy for some seconds, in a callback of Python or in a library. It does not if
the process is stopped, if something holds the GIL, or if the loop has run no callback for `loop_seconds`.

The parent also sends a memory file. On SIGUSR1, the child writes the stacks of its threads to it, and exits.
`faulthandler` does that in the signal handler, so it also works when the interpreter does not run.

Tested by tests/unit/test_processes_watch.py and tests/promises/test_processes.py.
"""

import asyncio
import contextlib
import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Self

_POLL = b"."

STACKS_SIGNAL = signal.SIGUSR1
"""Makes a child write the stacks of its threads, and exit."""

MAX_STACKS = 65_536
"""How many bytes of the stacks are read. A thread has at most 100 lines (faulthandler), and most have 20."""


class Pulse:
    """The parent's side. `on_response` is called for each response that arrives."""

    def __init__(self, sock: socket.socket, stacks: int, on_response: Callable[[], None]) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.stacks = stacks
        self._on_response = on_response
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._read)

    @classmethod
    def create(cls, on_response: Callable[[], None]) -> tuple[Self, socket.socket]:
        """Return the parent's side, and the socket for the child. Raises OSError if there are no descriptors left."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            stacks = os.memfd_create("tlstunnel-stacks", os.MFD_CLOEXEC)
        except OSError:
            ours.close()
            theirs.close()
            raise
        return cls(ours, stacks, on_response), theirs

    def poll(self) -> None:
        """Request a response, without waiting for it."""
        with contextlib.suppress(OSError):  # full, if it has not read for long, or closed
            self.sock.send(_POLL)

    def close(self) -> None:
        """Close both descriptors."""
        if self.sock.fileno() >= 0:
            self._loop.remove_reader(self.sock)
            self.sock.close()
            os.close(self.stacks)

    def _read(self) -> None:
        try:
            responded = self.sock.recv(64) != b""
        except BlockingIOError:
            return
        except OSError:
            responded = False
        if responded:
            self._on_response()
        else:
            self._loop.remove_reader(self.sock)


class Responder:
    """The child's side: the thread that responds while the running loop runs."""

    def __init__(self, sock: socket.socket, stacks: int, loop_seconds: float) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._stacks = stacks
        self._loop_seconds = loop_seconds
        self._loop = asyncio.get_running_loop()
        self._ran = time.monotonic()
        self._pending = False
        self._thread = threading.Thread(target=self._respond, name="pulse", daemon=True)

    def start(self) -> None:
        """Start the thread, and write stacks on `STACKS_SIGNAL` from now on."""
        # The chain ends the process: the previous action is the default one.
        faulthandler.register(STACKS_SIGNAL, self._stacks, all_threads=True, chain=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _respond(self) -> None:
        with self._sock, contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the loop is closed
            while self._sock.recv(64):
                if time.monotonic() - self._ran <= self._loop_seconds:
                    self._sock.send(_POLL)
                if not self._pending:
                    self._pending = True
                    self._loop.call_soon_threadsafe(self._note_run)

    def _note_run(self) -> None:
        self._pending = False
        self._ran = time.monotonic()
