"""What a ledger sends to the next one."""

import os
import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from tlstunnel.errors import ProcessError
from tlstunnel.processes.link import MAX_FDS
from tlstunnel.processes.succession import Succession, receive, send
from tlstunnel.state.server import ConnectionSnapshot, Snapshot, SnapshotError

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        yield one, other


def _snapshot(connections: int, counts: bytes = b"") -> Snapshot:
    names = [f"process {number}" for number in range(connections)]
    return Snapshot(1.5, 2.0, [ConnectionSnapshot(name, 1, {"a": 1}, b"b", b"c") for name in names], counts)


@pytest.mark.parametrize("connections", [0, 1, MAX_FDS, MAX_FDS + 1, 256])
def test_everything_arrives(pair: Pair, connections: int) -> None:
    snapshot = _snapshot(connections, os.urandom(1 << 20))
    ends = [socket.socketpair() for _ in range(connections)]
    thread = threading.Thread(target=send, args=(pair[0], "memory", snapshot, [ours for ours, _ in ends]))
    thread.start()
    received = receive(pair[1])
    thread.join()
    assert (received.store, received.snapshot, len(received.socks)) == ("memory", snapshot, connections)
    for (ours, theirs), sock in zip(ends, received.socks, strict=True):
        assert not os.get_inheritable(sock.fileno())
        ours.close()
        sock.sendall(b"x")
        assert theirs.recv(1) == b"x"
        sock.close()
        theirs.close()


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (b"", "sent something else"),
        (b"[]", "sent something else"),
        (msgspec.json.encode(Succession("memory", 0, format=2)), "in format 2, this release in 1"),
        (msgspec.json.encode(Succession("memory", 0)), "without its counts"),
    ],
)
def test_something_else_is_refused(pair: Pair, first: bytes, expected: str) -> None:
    pair[0].send(first)
    pair[0].close()
    with pytest.raises(ProcessError, match=expected):
        receive(pair[1])


def test_too_few_connections_are_refused() -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only their number
    file = os.memfd_create("test")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        socket.send_fds(ours, [msgspec.json.encode(Succession("memory", 2))], [file])
        socket.send_fds(ours, [b"."], [file])
        ours.close()
        os.close(file)
        with pytest.raises(ProcessError, match="too few connections"):
            receive(theirs)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - only their number


def test_a_snapshot_that_is_none_is_refused(pair: Pair) -> None:
    file = os.memfd_create("test")
    os.write(file, b"\xff")
    socket.send_fds(pair[0], [msgspec.json.encode(Succession("memory", 0))], [file])
    os.close(file)
    with pytest.raises(SnapshotError):
        receive(pair[1])
