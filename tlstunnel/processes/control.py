"""The control socket: how commands reach a running tunnel (`tlstunnel.processes.commands`).

A Unix socket of mode 0600. A client sends a line with a JSON object, such as ``{"do": "reload"}``. Once that is done it
receives another: ``{"ok": true, ...}``, or ``{"ok": false, "error": "..."}``, with all ``problems`` in a list if there
are several. Then the connection is closed.
"""

import asyncio
import contextlib
import difflib
import errno
import fcntl
import json
import os
import pwd
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import msgspec

from tlstunnel.addresses import quoted
from tlstunnel.errors import ControlError
from tlstunnel.escaping import printable
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.processes.reach import is_listening, list_folders

MAX_LINE = 65_536
"""The largest request, in bytes."""

MAX_CLIENTS = 16
"""How many clients may be connected at once. Only this user and root may connect; the limit is against mistakes."""

FIRST_LINE_SECONDS = 10.0
"""How long a client may take to send its request."""

LONGEST_PATH = 107
"""Bytes: sun_path of sockaddr_un has 108, the last of them NUL (unix(7))."""

_CREDENTIALS = struct.Struct("iII")
"""struct ucred: the pid, uid and gid (unix(7))."""

Handler = Callable[[Mapping[str, Any], int], Awaitable[Mapping[str, Any]]]
"""Carries out a request and returns the fields of the response, except ``ok``. Raises ControlError.

The second argument is the descriptor of the client's socket: after an upgrade, the next program responds to it.
"""


class ControlHandover(msgspec.Struct, frozen=True):
    """The control socket as an upgrade hands it over: its path, its descriptor and that of its lock."""

    path: str
    fd: int
    lock: int


class ControlSocketInUse(ControlError):
    """Another tunnel has the control socket, or another program listens there."""


def default_path(port: int) -> Path:
    """Return the default path for a tunnel whose first listener has this port (0 for a Unix socket)."""
    return list_folders()[0] / f"control-{port}.sock"


class ControlSocket:
    """Listens at `path`, and passes each request to the handler that its ``do`` names."""

    def __init__(self, path: Path, sock: socket.socket, lock: BinaryIO) -> None:
        self.path = path
        self._sock = sock
        self._lock = lock
        self._handlers: Mapping[str, Handler] = {}
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._idle: set[asyncio.Task[None]] = set()
        self._own = path.stat().st_ino if path.exists() else 0

    @classmethod
    def bind(cls, path: Path) -> Self:
        """Create the socket, replacing one that a dead tunnel left behind.

        Raises ControlSocketInUse, or ControlError for another reason.
        """
        if len(os.fsencode(path)) > LONGEST_PATH:
            raise ControlError(
                f"{path}: longer than the {LONGEST_PATH} bytes of a socket's path; choose another with --control"
            )
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = _open_lock(path.with_name(path.name + ".lock"))
        except OSError as error:
            raise ControlError(f"{path}: {error.strerror}; choose another with --control") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
                raise ControlError(f"{path}: this file exists and is not a socket")
            if is_listening(path):
                # It is not a tunnel, which would hold the lock.
                raise ControlSocketInUse(f"{path}: another program listens there; choose another with --control")
            path.unlink(missing_ok=True)
            return cls(path, _bind(path), lock)
        except BlockingIOError:
            lock.close()
            raise ControlSocketInUse(
                f"{path}: another tunnel has this control socket; stop it, or choose another"
            ) from None
        except OSError as error:
            lock.close()
            raise ControlError(f"{path}: {error.strerror}; choose another with --control") from None
        except ControlError:
            lock.close()
            raise

    def hand_over(self) -> ControlHandover:
        """Return what `restore` takes in the next program."""
        return ControlHandover(path=str(self.path), fd=self._sock.fileno(), lock=self._lock.fileno())

    @classmethod
    def restore(cls, kept: ControlHandover) -> Self:
        """Return the control socket of the previous program, with its lock."""
        for fd in (kept.fd, kept.lock):
            os.set_inheritable(fd, False)
        os.fchmod(kept.lock, 0o600)  # earlier releases created it with 0644
        return cls(Path(kept.path), socket.socket(fileno=kept.fd), os.fdopen(kept.lock, "r+b", buffering=0))

    async def serve(self, handlers: Mapping[str, Handler]) -> None:
        """Start serving requests."""
        self._handlers = handlers
        self._server = await asyncio.start_unix_server(self._serve, sock=self._sock, limit=MAX_LINE)

    async def close(self) -> None:
        """Stop serving requests, and remove the file if it is still this socket's."""
        if self._server is not None:
            self._server.close()
        # Clients that have sent a request get their response; the others are not waited for.
        for task in self._idle:
            task.cancel()
        if self._clients:
            await asyncio.wait(self._clients)
        self._sock.close()
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._own:
                self.path.unlink()
        self._lock.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        self._idle.add(task)
        try:
            response = await self._respond(reader, task, writer.get_extra_info("socket").fileno())
            writer.write(json.dumps(response).encode() + b"\n")
            await asyncio.wait_for(writer.drain(), FIRST_LINE_SECONDS)
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # the client is gone
        finally:
            self._clients.discard(task)
            self._idle.discard(task)
            writer.close()

    async def _respond(  # noqa: PLR0911 - one for each error
        self, reader: asyncio.StreamReader, task: "asyncio.Task[None]", client: int
    ) -> Mapping[str, Any]:
        if len(self._clients) > MAX_CLIENTS:
            return _make_error(f"more than {MAX_CLIENTS} clients at once")
        try:
            line = await asyncio.wait_for(reader.readline(), FIRST_LINE_SECONDS)
            self._idle.discard(task)
            request = json.loads(line)
        except (ValueError, RecursionError):  # ValueError also if the line is too long
            return _make_error(
                f'expected one JSON object on a line of at most {MAX_LINE} bytes, such as {{"do": "reload"}}'
            )
        command = request.get("do") if isinstance(request, dict) else None
        if not isinstance(command, str):
            return _make_error('expected an object with "do", such as {"do": "reload"}')
        handler = self._handlers.get(command)
        if handler is None:
            near = difflib.get_close_matches(command[:100], self._handlers, n=1)
            hint = (
                f"did you mean {quoted(near[0])}?" if near else f"the commands are {', '.join(sorted(self._handlers))}"
            )
            return _make_error(f"unknown command {quoted(command)}; {hint}")
        try:
            return {"ok": True, **await handler(request, client)}
        except ControlError as error:
            return _make_error(*error.problems)
        except Exception:
            structlog.get_logger().exception(Event.COMMAND_FAILED, command=command)
            return _make_error("internal error in the tunnel; see its log")


def describe_client(client: int) -> str:
    """Return who is at the other end of a control socket's connection, such as "alice (uid 1000)"."""
    with socket.socket(fileno=os.dup(client)) as sock:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    try:
        return f"{printable(pwd.getpwuid(uid).pw_name)} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def _make_error(*problems: str) -> Mapping[str, Any]:
    return {"ok": False, "error": "; ".join(problems), **({"problems": problems} if len(problems) > 1 else {})}


def _open_lock(path: Path) -> BinaryIO:
    """Open the lock's file, which no other user may open: whoever can open a file can lock it (flock(2)).

    The lock ends with the process, and only one of two simultaneous starts can get it. Raises OSError and ControlError.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ControlError(
                f"{path}: is a symbolic link; remove it, or choose another place with --control"
            ) from None
        raise
    lock = os.fdopen(fd, "r+b", buffering=0)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid not in {os.geteuid(), 0}:
        lock.close()
        raise ControlError(f"{path}: is not a file of this user; remove it, or choose another place with --control")
    if found.st_uid == os.geteuid():
        os.fchmod(fd, 0o600)  # earlier releases created it with 0644
    return lock


def _bind(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # On Linux the file gets the mode of the socket, so others cannot connect at any moment.
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(MAX_CLIENTS)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock
