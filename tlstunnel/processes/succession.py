"""How a ledger sends the next one its counts and its ends of the connections, over a socket pair of their own.

The first message is a `Succession`, and with it comes a memory file with the snapshot. The descriptors of the
connections follow, in the order of the snapshot, as many in a message as fit.
"""

import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from tlstunnel.errors import ProcessError
from tlstunnel.processes.link import MAX_FDS
from tlstunnel.state.server import Snapshot

FORMAT = 1
"""The version of these messages. The snapshot has its own."""

STALL_SECONDS = 2.0
"""How long the other side may take for a message."""

_LARGEST = 65_536


class Succession(msgspec.Struct, frozen=True):
    """The first message. `store` names what has the counts, which a ledger that counts elsewhere does not take over."""

    store: str
    connections: int
    format: int = FORMAT


class Received(NamedTuple):
    """What the previous ledger has sent."""

    store: str
    snapshot: Snapshot
    socks: Sequence[socket.socket]


def send(sock: socket.socket, store: str, snapshot: Snapshot, socks: Sequence[socket.socket]) -> None:
    """Send everything. The sockets stay open here. Blocks. Raises ProcessError."""
    sock.settimeout(STALL_SECONDS)
    try:
        file = os.memfd_create("tlstunnel-ledger", os.MFD_CLOEXEC)
        with os.fdopen(file, "wb") as stream:
            stream.write(snapshot.encode())
            stream.flush()
            socket.send_fds(sock, [msgspec.json.encode(Succession(store, len(socks)))], [file])
        descriptors = [one.fileno() for one in socks]
        for start in range(0, len(descriptors), MAX_FDS):
            socket.send_fds(sock, [b"."], descriptors[start : start + MAX_FDS])
    except OSError as error:
        raise ProcessError(f"the counts could not be sent: {error.strerror or error}") from None


def receive(sock: socket.socket) -> Received:
    """Receive what `send` has sent. Blocks. Raises ProcessError, and SnapshotError for an invalid snapshot."""
    sock.settimeout(STALL_SECONDS)
    first, files = _receive(sock)
    descriptors: list[int] = []
    try:
        try:
            succession = msgspec.json.decode(first, type=Succession)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProcessError(f"the previous ledger sent something else: {error}") from None
        if succession.format != FORMAT:
            raise ProcessError(
                f"the previous ledger hands over in format {succession.format}, this release in {FORMAT}"
            )
        if len(files) != 1:
            raise ProcessError("the previous ledger hands over without its counts")
        while len(descriptors) < succession.connections:
            _, more = _receive(sock)
            if not more:
                raise ProcessError("the previous ledger sent too few connections")
            descriptors += more
        with os.fdopen(files.pop(), "rb") as stream:
            stream.seek(0)
            snapshot = Snapshot.decode(stream.read())
        socks = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        descriptors = []
        return Received(succession.store, snapshot, socks)
    finally:
        for descriptor in (*files, *descriptors):
            os.close(descriptor)


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    try:
        data, descriptors, _, _ = socket.recv_fds(sock, _LARGEST, MAX_FDS)
    except OSError as error:
        raise ProcessError(f"the counts could not be received: {error.strerror or error}") from None
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return data, descriptors
