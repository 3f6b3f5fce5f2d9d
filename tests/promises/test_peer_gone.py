"""A peer that vanished is noticed by its missing acknowledgements; one that is alive and reads nothing is kept."""

import ctypes
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.harness import Certificate, RawOrigin, Tunnel, accept_upgrade, connect_tls, receive_exactly, upgrade

SO_ATTACH_FILTER = 26
BPF_RET = 0x06
MIB = 1 << 20
SIZE = 16 * MIB
"""More than the kernel's buffers of a connection on loopback."""


def _send(sock: socket.socket) -> None:
    accept_upgrade(sock)
    sock.sendall(bytes(SIZE))
    sock.recv(1)


def _vanish(sock: socket.socket) -> None:
    """Let the kernel drop every packet that arrives for this socket, so that none is acknowledged (socket(7))."""
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", BPF_RET, 0, 0, 0), 8)  # return 0: keep no byte
    program = struct.pack("@HP", 1, ctypes.addressof(instruction))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


@pytest.fixture(scope="module")
def tunnel(certificate: Certificate) -> Iterator[Tunnel]:
    settings = '[timeouts]\nacknowledge = "1s"\n'
    with RawOrigin(_send) as origin, Tunnel(origin.address, certificate, settings=settings) as running:
        yield running


def test_a_client_that_vanished(tunnel: Tunnel) -> None:
    with connect_tls(tunnel) as slow, connect_tls(tunnel) as gone:
        begun = [upgrade(client) for client in (slow, gone)]
        assert [one.status for one in begun] == [101, 101]
        _vanish(gone)
        record = tunnel.wait_record(lambda record: record["event"] == "connection")
        assert (record["ended_by"], record["reason"]) == ("client", "no acknowledgement")
        # The other one has read nothing for as long.
        assert begun[0].leftover + receive_exactly(slow, SIZE - len(begun[0].leftover)) == bytes(SIZE)
