"""Listening sockets, with one-line errors that say what to do.

Tested by tests/promises/test_upgrade.py.
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tlstunnel.addresses import ListenAddress
from tlstunnel.errors import ListenError
from tlstunnel.sockets.options import tune

BACKLOG = 4096
"""Connections that may wait to be accepted. The kernel limits it to net.core.somaxconn (4096 by default)."""

LOCK_SECONDS = 2.0
"""How long another start may hold the folder of a Unix socket; it takes milliseconds."""


class Listener:
    """A listening socket, the `address` that it is bound to, and the one `written` in the configuration."""

    def __init__(self, sock: socket.socket, address: ListenAddress, written: ListenAddress) -> None:
        self.sock = sock
        self.address = address
        self.written = written

    def close(self) -> None:
        """Close this process's descriptor. The socket listens until every process has closed it."""
        self.sock.close()

    def remove(self) -> None:
        """Close it and delete the file of a Unix socket."""
        if self.sock.fileno() < 0:
            return  # the file may belong to another tunnel by now
        self.sock.close()
        if self.address.path is not None:
            with contextlib.suppress(OSError):
                Path(self.address.path).unlink()


def listen(address: ListenAddress, shares: int = 1, *, mode: int | None = None) -> list[Listener]:
    """Listen on `address` with `shares` sockets. Raises ListenError, naming the address and what to do.

    The kernel spreads connections over several sockets (SO_REUSEPORT, socket(7)). A Unix socket is always a single one,
    and its file has `mode`, or what the umask leaves.

    TCP_DEFER_ACCEPT stays off: it would save a wait per connection, but the connections that it holds back are reset
    when the listener closes, as happens in an upgrade.
    """
    try:
        if address.path is not None:
            return [Listener(_listen_unix(Path(address.path), mode), address, address)]
        # Unshared at first, to get an error if another tunnel listens here: shared, each would get half of the
        # connections.
        unshared = _listen_tcp(address)
        if shares == 1:
            return [_make_listener(unshared, address)]
        host, port = unshared.getsockname()[:2]
        unshared.close()
        with contextlib.ExitStack() as stack:
            opened = [
                _make_listener(stack.enter_context(_listen_tcp(ListenAddress(host, port), shared=True)), address)
                for _ in range(shares)
            ]
            stack.pop_all()
        return opened
    except OSError as error:
        raise ListenError(f"cannot listen on {address}: {_explain(error)}") from None


def listen_beside(address: ListenAddress, others: Sequence[Listener]) -> list[Listener]:
    """Listen on `address` with one socket, although `others` of this process have its port, such as ``0.0.0.0``.

    The kernel allows that for sockets of one user that all have SO_REUSEPORT (socket(7)), and gives a connection to the
    socket with the most specific address. Raises ListenError.
    """
    shared = [(other.sock, other.sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)) for other in others]
    try:
        for sock, _ in shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        return [_make_listener(_listen_tcp(address, shared=True), address)]
    except OSError as error:
        raise ListenError(f"cannot listen on {address}: {_explain(error)}") from None
    finally:
        for sock, before in shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, before)


def adopt(descriptor: int, written: ListenAddress | None = None) -> Listener:
    """Return the listener of an inherited or received descriptor that listens already. Raises ListenError.

    `written` is its address in the configuration, by default the one that it is bound to.
    """
    try:
        sock = socket.socket(fileno=descriptor)
        sock.setblocking(False)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ListenError(f"descriptor {descriptor} is not a listening stream socket")
        if sock.family == socket.AF_UNIX:
            path = os.fsdecode(sock.getsockname())
            address = ListenAddress.parse(f"unix:{path}")
        else:
            tune(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)  # earlier releases have set it
            host, port = sock.getsockname()[:2]
            address = ListenAddress(host, port)
    except (OSError, ValueError) as error:
        raise ListenError(f"descriptor {descriptor} is not a listening socket: {error}") from None
    return Listener(sock, address, written or address)


def is_in_use(error: ListenError) -> bool:
    """Return whether `listen` failed because something else listens there."""
    return isinstance(error.__context__, OSError) and error.__context__.errno == errno.EADDRINUSE


def _make_listener(sock: socket.socket, written: ListenAddress) -> Listener:
    host, port = sock.getsockname()[:2]
    return Listener(sock, ListenAddress(host, port), written)


def _listen_tcp(address: ListenAddress, *, shared: bool = False) -> socket.socket:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, where = found[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        tune(sock)
        sock.setblocking(False)
        sock.bind(where)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _listen_unix(path: Path, mode: int | None) -> socket.socket:
    with _lock_folder(path.parent):
        _remove_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            if mode is not None:
                os.fchmod(sock.fileno(), mode)  # on Linux the file gets the mode of the socket, less the umask
            sock.bind(str(path))
            if mode is not None:
                path.chmod(mode)
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
            raise
    return sock


def _remove_stale(path: Path) -> None:
    """Remove a socket's file that a process left behind when it exited. Raises OSError if it is something else."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        with socket.socket(socket.AF_UNIX) as attempt:
            attempt.setblocking(False)  # a full backlog gives EAGAIN
            if attempt.connect_ex(str(path)) != errno.ECONNREFUSED:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        path.unlink()


@contextlib.contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder for a moment, so that of two simultaneous starts only one replaces a stale socket in it.

    Otherwise the second one could remove the socket that the first one has just created. Whoever can read a folder can
    lock it for as long as they like, so after `LOCK_SECONDS` it is not waited for. A folder that cannot be read is not
    locked.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        yield
        return
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _try_lock(fd) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _explain(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "it is in use by another program; stop that program, or choose another address with --listen"
        case errno.EACCES:
            return "permission denied; ports below 1024 require the capability CAP_NET_BIND_SERVICE"
        case errno.EADDRNOTAVAIL:
            return "this machine does not have that address"
        case _:
            return error.strerror or str(error)
