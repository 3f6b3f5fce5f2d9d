"""An origin that is silent, or never finishes its response, holds no client for longer than the timeouts."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.harness import (
    TIMEOUT,
    Certificate,
    RawOrigin,
    Tunnel,
    connect_tls,
    eventually,
    handshake_request,
    read_request,
    read_response,
    receive_all,
    reset,
)
from tests.promises.scripted_origin import SMUGGLED, ScriptedOrigin, record_of
from tests.promises.wire import ABRUPT_ENDS, read_until_end, send_request

SETTINGS = '[timeouts]\norigin_response = "1s"\nclose = "300ms"\n'
Stage = tuple[ScriptedOrigin, Tunnel]


@pytest.fixture(scope="module")
def stage(certificate: Certificate) -> Iterator[Stage]:
    with ScriptedOrigin() as origin, Tunnel(origin.address, certificate, settings=SETTINGS) as tunnel:
        yield origin, tunnel


@pytest.mark.parametrize(
    "beginning", [b"", b"HTTP/1.1 101 Switching Pro", b"HTTP/1.1 100 Continue\r\n\r\n"], ids=["nothing", "half", "100"]
)
def test_no_response_in_time_is_a_504(stage: Stage, beginning: bytes) -> None:
    origin, tunnel = stage
    traffic = origin.play(beginning)
    began = time.monotonic()
    response = send_request(tunnel, handshake_request() + SMUGGLED)
    assert time.monotonic() - began >= 0.9
    assert response.status == 504
    record = record_of(tunnel, response.headers)
    assert record["id"] in response.body.decode()
    assert (record["status"], record["ended_by"], record["reason"]) == (504, "tunnel", "origin response timed out")
    assert traffic.surplus_at_end() == b""


def test_a_trickled_response_does_not_extend_the_timeout(certificate: Certificate) -> None:
    """Each byte is progress, but the response is still incomplete."""
    gone = threading.Event()

    def trickle(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nX-Slow: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(int(TIMEOUT * 50)):
                sock.sendall(b"a")
                if gone.wait(0.02):
                    break
                sock.settimeout(0.001)
                with contextlib.suppress(TimeoutError):
                    if not sock.recv(1):
                        break
                sock.settimeout(None)
        gone.set()

    with RawOrigin(trickle) as origin, Tunnel(origin.address, certificate, settings=SETTINGS) as tunnel:
        assert send_request(tunnel, handshake_request()).status == 504
        assert gone.wait(TIMEOUT), "the origin's connection outlived the 504"


def test_a_refusal_whose_body_stops_does_not_look_complete(stage: Stage) -> None:
    origin, tunnel = stage
    traffic = origin.play(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 1000\r\n\r\nonly this")
    with connect_tls(tunnel) as client:
        client.sendall(handshake_request())
        assert read_response(client).status == 403
        # Not a close_notify, which would mark the body as complete.
        with pytest.raises(ABRUPT_ENDS):
            receive_all(client)
    record = traffic.record(tunnel)
    assert (record["status"], record["ended_by"], record["reason"]) == (403, "tunnel", "response timed out")
    assert traffic.surplus_at_end() == b""


def test_a_client_that_leaves_closes_its_connection_to_a_silent_origin(certificate: Certificate) -> None:
    """The tunnel does not wait for origin_response, 30 s: the test would time out first."""
    with ScriptedOrigin() as origin, Tunnel(origin.address, certificate) as tunnel:
        for leave in (socket.socket.close, reset):
            traffic = origin.play(b"")
            client = connect_tls(tunnel)
            client.sendall(handshake_request() + SMUGGLED)
            eventually(lambda: traffic.heads)  # noqa: B023 - called at once
            leave(client)
            assert traffic.surplus_at_end() == b""
            assert traffic.record(tunnel)["ended_by"] == "client"


def test_a_good_client_is_served_while_others_wait_for_a_response(certificate: Certificate) -> None:
    """Twenty that wait do not delay the twenty-first."""

    def only_for_the_patient(sock: socket.socket) -> None:
        request = read_request(sock)
        if request.line.split()[1] == "/silent":
            read_until_end(sock)
        else:
            sock.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    with (
        RawOrigin(only_for_the_patient) as origin,
        Tunnel(origin.address, certificate) as tunnel,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(20):
            stack.enter_context(connect_tls(tunnel)).sendall(handshake_request("/silent"))
        assert send_request(tunnel, handshake_request("/prompt")).status == 404
