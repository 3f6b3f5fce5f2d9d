"""Listening sockets: opened so that what goes wrong is said in one line."""

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from tlstunnel.addresses import ListenAddress
from tlstunnel.errors import ListenError
from tlstunnel.sockets.options import tune

BACKLOG = 4096
"""Connections that wait to be accepted; the kernel cuts it to net.core.somaxconn (4096 on Linux)."""


class Listener:
    """A listening socket, the address it is really bound to, and the one that was `written`."""

    def __init__(self, sock: socket.socket, address: ListenAddress, written: ListenAddress) -> None:
        self.sock = sock
        self.address = address
        self.written = written

    def close(self) -> None:
        """Close this process's descriptor; the last one that is closed, in whichever process, ends the listening."""
        self.sock.close()

    def remove(self) -> None:
        """Close it for good: a Unix socket's file goes with it."""
        if self.sock.fileno() < 0:
            return  # and by now the file may be the next tunnel's
        self.sock.close()
        if self.address.path is not None:
            with contextlib.suppress(OSError):
                Path(self.address.path).unlink()


def listen(address: ListenAddress, shares: int = 1) -> list[Listener]:
    """Listen on `address` with so many sockets. Raises ListenError, naming the address and what to do.

    With more than one, the kernel spreads connections over them (SO_REUSEPORT, socket(7)); a Unix socket is one always.

    TCP_DEFER_ACCEPT stays off: it would spare one wait a connection, but what it holds back is reset when the listener
    closes, which a release must not do.
    """
    try:
        if address.path is not None:
            return [Listener(_listen_unix(Path(address.path)), address, address)]
        # Alone at first: shared, a second tunnel's sockets would get half of the connections, and nobody would be told.
        alone = _listen_tcp(address)
        if shares == 1:
            return [_make_listener(alone, address)]
        host, port = alone.getsockname()[:2]
        alone.close()
        with contextlib.ExitStack() as stack:
            opened = [
                _make_listener(stack.enter_context(_listen_tcp(ListenAddress(host, port), shared=True)), address)
                for _ in range(shares)
            ]
            stack.pop_all()
        return opened
    except OSError as error:
        raise ListenError(f"cannot listen on {address}: {_explain(error)}") from None


def adopt(descriptor: int, written: ListenAddress | None = None) -> Listener:
    """The listener of a descriptor that is one already, inherited or sent. Raises ListenError.

    `written` is what it was asked for by; without it, what it is bound to.
    """
    try:
        sock = socket.socket(fileno=descriptor)
        sock.setblocking(False)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ListenError(f"descriptor {descriptor} is no listening stream socket")
        if sock.family == socket.AF_UNIX:
            path = os.fsdecode(sock.getsockname())
            address = ListenAddress.parse(f"unix:{path}")
        else:
            host, port = sock.getsockname()[:2]
            address = ListenAddress(host, port)
    except (OSError, ValueError) as error:
        raise ListenError(f"descriptor {descriptor} is no listening socket: {error}") from None
    return Listener(sock, address, written or address)


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


def _listen_unix(path: Path) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        with socket.socket(socket.AF_UNIX) as attempt:
            attempt.setblocking(False)  # one that does not accept has a full backlog: EAGAIN
            if attempt.connect_ex(str(path)) != errno.ECONNREFUSED:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        path.unlink()  # left by a process that is gone
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind(str(path))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _explain(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "it is in use by another program; stop that one, or choose another with --listen"
        case errno.EACCES:
            return "not permitted; ports below 1024 need the capability CAP_NET_BIND_SERVICE"
        case errno.EADDRNOTAVAIL:
            return "this machine does not have that address"
        case _:
            return error.strerror or str(error)
