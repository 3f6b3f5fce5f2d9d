"""Out of descriptors, the tunnel logs it once, does not spin, serves its open tunnels, and recovers by itself."""

import contextlib
import ssl

from tests.harness import (
    TIMEOUT,
    Certificate,
    RawOrigin,
    Tunnel,
    client_context,
    connect_tcp,
    echo_bytes,
    eventually,
    receive_exactly,
    upgrade,
)
from tests.promises.wire import assert_does_not_spin, wait_for_descriptors

DESCRIPTORS = 100


def _open(tunnel: Tunnel, context: ssl.SSLContext, patience: float) -> ssl.SSLSocket:
    """Open a tunnel. Raises TimeoutError if the connection is not accepted."""
    plain = connect_tcp(tunnel, patience)
    try:
        client = context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False)
        assert upgrade(client).status == 101
    except BaseException:
        plain.close()
        raise
    client.settimeout(TIMEOUT)
    return client


def _echoes(client: ssl.SSLSocket) -> bool:
    client.sendall(b"still there?")
    return receive_exactly(client, 12) == b"still there?"


def test_it_pauses_and_resumes(certificate: Certificate) -> None:
    with (
        RawOrigin(echo_bytes) as origin,
        Tunnel(origin.address, certificate, descriptors=DESCRIPTORS, measured=True) as tunnel,
        contextlib.ExitStack() as stack,
    ):
        context = client_context(tunnel)
        idle = tunnel.descriptors()
        clients: list[ssl.SSLSocket] = []
        with contextlib.suppress(TimeoutError):
            while not tunnel.records("accepting paused"):
                clients.append(stack.enter_context(_open(tunnel, context, 5)))
        tunnel.wait_records(1, "accepting paused")
        full = len(clients)
        assert 20 <= full <= (DESCRIPTORS - idle) // 2, full
        assert tunnel.descriptors() < DESCRIPTORS

        for _ in range(2):
            # It waits in the backlog while the tunnel does not accept.
            waiting = stack.enter_context(connect_tcp(tunnel))
            assert_does_not_spin(tunnel)
            assert all(_echoes(client) for client in clients)
            for client in clients[:5]:
                client.close()
            del clients[:5]
            wrapped = context.wrap_socket(waiting, server_hostname="localhost", suppress_ragged_eofs=False)
            clients.append(stack.enter_context(wrapped))
            assert upgrade(clients[-1]).status == 101, "it did not resume by itself"
            while len(clients) < full:
                clients.append(stack.enter_context(_open(tunnel, context, TIMEOUT)))
            assert all(_echoes(client) for client in clients)

        paused = tunnel.records("accepting paused")
        assert 1 <= len(paused) <= 4, "one line in 10 s, not one per attempt"
        for client in clients:
            client.close()
        wait_for_descriptors(tunnel, idle)
        eventually(lambda: len(tunnel.records("connection")) >= full + 5)
        assert not [record for record in tunnel.records("connection") if record["ended_by"] != "client"]


def test_many_silent_connections_do_not_use_them_up(certificate: Certificate) -> None:
    """Far more than there are descriptors, at once, silent: when they have gone, the next client is served."""
    with (
        RawOrigin(echo_bytes) as origin,
        Tunnel(origin.address, certificate, descriptors=DESCRIPTORS, measured=True) as tunnel,
    ):
        idle = tunnel.descriptors()
        with contextlib.ExitStack() as crowd:
            for _ in range(DESCRIPTORS * 2):
                crowd.enter_context(connect_tcp(tunnel))
            tunnel.wait_records(1, "accepting paused")
            assert_does_not_spin(tunnel)
        with _open(tunnel, client_context(tunnel), TIMEOUT) as client:
            assert _echoes(client)
        wait_for_descriptors(tunnel, idle)
