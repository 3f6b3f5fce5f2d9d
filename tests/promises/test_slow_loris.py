"""Slow clients, however many, are ended by the timeouts, and do not prevent others from being served."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator

from tests.harness import (
    Certificate,
    RawOrigin,
    Tunnel,
    connect_tcp,
    connect_tls,
    echo_bytes,
    eventually,
    receive_exactly,
    upgrade,
)
from tests.promises.wire import ABRUPT_ENDS, MemoryTlsClient, client_hello, has_ended, wait_for_descriptors

CAP = 50
SHARE = 5
"""A tenth of the cap is what one address may hold."""


def _from(number: int, tunnel: Tunnel) -> socket.socket:
    """A connection from 127.0.0.NUMBER."""
    return socket.create_connection(("127.0.0.1", tunnel.port), 15, source_address=(f"127.0.0.{number}", 0))


def _hung_after_hello(tunnel: Tunnel, number: int) -> tuple[socket.socket, MemoryTlsClient]:
    """A connection from 127.0.0.NUMBER that has been accepted: the server's flight has been sent."""
    sock, tls = _from(number, tunnel), MemoryTlsClient()
    sock.sendall(tls.step())
    sock.recv(1, socket.MSG_PEEK)
    return sock, tls


def _alive(held: tuple[socket.socket, MemoryTlsClient]) -> bool:
    """Return whether the handshake of this one can still be completed."""
    sock, tls = held
    sock.settimeout(15)
    try:
        tls.finish(sock)
        sock.sendall(tls.encrypt(b"GET / HTTP/1.0\r\n\r\n"))
        return b"505" in tls.read_all(sock)
    except (AssertionError, *ABRUPT_ENDS):
        return False


def test_trickling_clients_are_ended_while_good_ones_are_served(certificate: Certificate) -> None:
    """In each stage thirty send a byte now and then, and never complete it."""
    settings = '[timeouts]\ntls_handshake = "2s"\nrequest = "2s"\n'
    with (
        RawOrigin(echo_bytes) as origin,
        Tunnel(origin.address, certificate, settings=settings) as tunnel,
        contextlib.ExitStack() as stack,
    ):
        idle = tunnel.descriptors()
        trickling: list[tuple[socket.socket, Iterator[bytes]]] = []
        for _ in range(30):
            hello = client_hello()
            trickling.append((stack.enter_context(connect_tcp(tunnel)), iter([hello[n : n + 1] for n in range(200)])))
            sock = stack.enter_context(connect_tcp(tunnel))
            sock.sendall(hello)
            # A record that is never complete.
            trickling.append((sock, iter([b"\x14", b"\x03", b"\x03", b"\x40", b"\x00", *[b"a"] * 200])))
        slow_requests = []
        for _ in range(30):
            client = stack.enter_context(connect_tls(tunnel))
            client.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
            slow_requests.append(client)
        served_meanwhile = 0
        deadline = time.monotonic() + 30
        ended: set[socket.socket] = set()
        while len(ended) < len(trickling) + len(slow_requests) and time.monotonic() < deadline:
            for sock, bytes_ in trickling:
                if sock not in ended:
                    with contextlib.suppress(*ABRUPT_ENDS):
                        sock.sendall(next(bytes_, b""))
                    if has_ended(sock):
                        ended.add(sock)
                    sock.setblocking(True)
            for client in slow_requests:
                if client not in ended:
                    with contextlib.suppress(*ABRUPT_ENDS):
                        client.sendall(b"a")
                    if _has_tls_ended(client):
                        ended.add(client)
            with connect_tls(tunnel) as good:
                assert upgrade(good).status == 101
                good.sendall(b"prompt")
                assert receive_exactly(good, 6) == b"prompt"
            served_meanwhile += not ended
        assert len(ended) == len(trickling) + len(slow_requests) == 90
        assert served_meanwhile >= 3, "good clients waited until the others were ended"
        late = [r for r in tunnel.wait_records(30) if r["status"] == 408]
        assert len(late) == 30
        wait_for_descriptors(tunnel, idle)


def _has_tls_ended(client: socket.socket) -> bool:
    client.settimeout(0.0)
    try:
        while client.recv(65_536):
            pass
    except BlockingIOError:
        return False
    except OSError as error:
        if "did not complete" in str(error):  # SSLWantReadError
            return False
    finally:
        client.settimeout(15)
    return True


def test_when_the_cap_is_reached_the_oldest_goes(certificate: Certificate) -> None:
    with _capped(certificate) as (tunnel, stack):
        held = [_hung_after_hello(tunnel, number) for number in range(2, 12) for _ in range(SHARE)]
        for sock, _ in held:
            stack.enter_context(sock)
        assert len(held) == CAP
        assert _alive(held.pop(7)), "as many as the cap allows are held"
        held.append(_hung_after_hello(tunnel, 20))  # instead of it
        later = [_hung_after_hello(tunnel, number) for number in (21, 22, 23)]
        for sock, _ in (*later, held[-1]):
            stack.enter_context(sock)
        assert [_alive(each) for each in held[:3]] == [False] * 3
        assert [_alive(each) for each in (*held[3:], *later)] == [True] * (CAP - 3 + 3)


def test_one_address_holds_at_most_a_tenth(certificate: Certificate) -> None:
    with _capped(certificate) as (tunnel, stack):
        bystander = _hung_after_hello(tunnel, 2)
        held = [_hung_after_hello(tunnel, 3) for _ in range(SHARE + 3)]
        for sock, _ in (bystander, *held):
            stack.enter_context(sock)
        assert [_alive(each) for each in held] == [False] * 3 + [True] * SHARE
        assert _alive(bystander)


def test_one_address_cannot_shut_another_out(certificate: Certificate) -> None:
    """A slow client and a prompt one get through while another address opens hundreds of connections."""
    with _capped(certificate) as (tunnel, stack):
        slow = _hung_after_hello(tunnel, 2)
        stack.enter_context(slow[0])
        for turn in range(300):
            stack.enter_context(_from(3, tunnel)).sendall(b"\x16\x03\x01")
            if turn % 60 == 0:
                prompt = _hung_after_hello(tunnel, 4)
                stack.enter_context(prompt[0])
                assert _alive(prompt)
        assert _alive(slow)


def test_a_burst_over_the_cap_leaves_nothing_behind(certificate: Certificate) -> None:
    """All of it is accepted in one turn of the loop: some have to be closed before they have begun."""
    with _capped(certificate) as (tunnel, stack):
        settled = tunnel.descriptors()
        os.kill(tunnel.pid, signal.SIGSTOP)
        try:
            burst = [stack.enter_context(connect_tcp(tunnel)) for _ in range(CAP + 14)]
        finally:
            os.kill(tunnel.pid, signal.SIGCONT)
        eventually(lambda: sum(has_ended(sock) for sock in burst) >= len(burst) - SHARE)
        assert [has_ended(sock) for sock in burst[-SHARE:]] == [False] * SHARE
        for sock in burst:
            sock.close()
        wait_for_descriptors(tunnel, settled)
        with connect_tls(tunnel) as client:
            assert upgrade(client).status == 101


def test_clients_that_have_finished_are_not_counted(certificate: Certificate) -> None:
    with _capped(certificate) as (tunnel, stack):
        tunnels = []
        for _ in range(CAP + SHARE):
            tunnels.append(stack.enter_context(connect_tls(tunnel)))
            assert upgrade(tunnels[-1]).status == 101
        for _ in range(CAP):
            stack.enter_context(_hung_after_hello(tunnel, 3)[0])
        for client in tunnels:
            client.sendall(b"still here")
            assert receive_exactly(client, 10) == b"still here"


@contextlib.contextmanager
def _capped(certificate: Certificate) -> Iterator[tuple[Tunnel, contextlib.ExitStack]]:
    """A tunnel with the cap, and a stack for clients, which are closed before it is stopped."""
    with (
        RawOrigin(echo_bytes) as origin,
        Tunnel(origin.address, certificate, settings=f"[limits]\nunfinished_handshakes = {CAP}\n") as tunnel,
        contextlib.ExitStack() as stack,
    ):
        yield tunnel, stack
