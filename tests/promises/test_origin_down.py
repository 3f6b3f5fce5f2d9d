"""If an origin is down, its clients get a clear response, 502 or 504, and other clients are unaffected."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import (
    TIMEOUT,
    Certificate,
    RawOrigin,
    Tunnel,
    accept_upgrade,
    connect_tls,
    handshake_request,
    read_response,
    reset,
)
from tests.promises.wire import Response, send_request


def _refused(tunnel: Tunnel, status: int, reasons: set[str]) -> Response:
    """Request a tunnel; the response must have this status, and the record must agree with it."""
    response = send_request(tunnel, handshake_request("/down"))
    assert response.status == status, response.raw
    assert response.headers["Connection"] == "close"
    request_id = response.headers["X-Request-Id"]
    assert request_id in response.body.decode()
    record = tunnel.wait_record(lambda record: record.get("id") == request_id)
    assert (record["event"], record["status"], record["verdict"]) == ("connection", status, "refused"), record
    assert record["ended_by"] == "tunnel"
    assert record["reason"] in reasons, record
    assert record["path"] == "/down"
    if status == 502:
        assert record["detail"], "the record explains the failure"
    return response


def test_a_refused_connection_is_a_502(certificate: Certificate) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound but not listening: no other program gets the port, and it refuses
        with Tunnel(f"127.0.0.1:{reserved.getsockname()[1]}", certificate) as tunnel:
            _refused(tunnel, 502, {"origin unreachable"})


def test_a_missing_unix_socket_is_a_502(certificate: Certificate, tmp_path: Path) -> None:
    with Tunnel(f"unix:{tmp_path / 'absent.sock'}", certificate) as tunnel:
        _refused(tunnel, 502, {"origin unreachable"})


def test_an_unknown_name_is_a_502(certificate: Certificate) -> None:
    # On a machine without a resolver the response takes as long as the resolver's own timeout.
    patience = {"RES_OPTIONS": "timeout:1 attempts:1"}
    with Tunnel("no-such-host.invalid:80", certificate, environment=patience) as tunnel:
        response = _refused(tunnel, 502, {"origin unreachable"})
    assert b"no-such-host" not in response.body, "the client must not learn the address of the origin"


def _fill(connect_to: object, family: int) -> list[socket.socket]:
    """Connect until the accept queue is full: nothing accepts, so later connections wait."""
    held: list[socket.socket] = []
    waiting = 0
    while waiting < 2:
        sock = socket.socket(family)
        held.append(sock)
        sock.settimeout(0.2)
        try:
            sock.connect(connect_to)  # type: ignore[arg-type]
        except (TimeoutError, BlockingIOError):
            waiting += 1
        assert len(held) < 64, "the queue does not fill up"
    return held


@contextlib.contextmanager
def _full(family: int, address: object) -> Iterator[socket.socket]:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family))
        listener.bind(address)  # type: ignore[arg-type]
        listener.listen(0)
        for sock in _fill(listener.getsockname(), family):
            stack.enter_context(sock)
        yield listener


def test_a_connection_that_is_not_established_is_a_504(certificate: Certificate) -> None:
    with _full(socket.AF_INET, ("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with Tunnel(address, certificate, settings='[timeouts]\norigin_connect = "300ms"\n') as tunnel:
            _refused(tunnel, 504, {"origin connect timed out"})


def test_a_unix_socket_whose_queue_is_full_is_a_504(certificate: Certificate, tmp_path: Path) -> None:
    path = str(tmp_path / "full.sock")
    with (
        _full(socket.AF_UNIX, path),
        Tunnel(f"unix:{path}", certificate, settings='[timeouts]\norigin_connect = "300ms"\n') as tunnel,
    ):
        _refused(tunnel, 504, {"origin connect timed out"})


def test_a_unix_socket_whose_queue_empties_in_time_is_waited_for(certificate: Certificate, tmp_path: Path) -> None:
    """connect(2) on a Unix socket does not wait for room, so the tunnel has to."""
    path = str(tmp_path / "full.sock")
    with (
        _full(socket.AF_UNIX, path) as listener,
        Tunnel(f"unix:{path}", certificate) as tunnel,
        connect_tls(tunnel) as client,
    ):
        client.sendall(handshake_request())
        listener.settimeout(TIMEOUT)
        # Those that filled the queue sent nothing; the tunnel's connection is behind them.
        for _ in range(64):
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    accept_upgrade(sock)
                    assert read_response(client).status == 101
                    return
        pytest.fail("the tunnel did not come back to the queue")


def _reads_and_ends(sock: socket.socket) -> None:
    sock.recv(65536)


def _reads_and_resets(sock: socket.socket) -> None:
    sock.recv(65536)
    reset(sock)


def _half_an_answer_and_end(sock: socket.socket) -> None:
    sock.recv(65536)
    sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: webso")


@pytest.mark.parametrize(
    ("handler", "reasons"),
    [
        (_reads_and_ends, {"invalid response"}),
        (_reads_and_resets, {"origin failed"}),
        (reset, {"origin failed", "origin unreachable"}),  # the reset may arrive before connecting is noticed
        (_half_an_answer_and_end, {"invalid response"}),
    ],
    ids=["closes", "resets", "resets-at-once", "closes-within-the-head"],
)
def test_no_response_is_a_502(
    certificate: Certificate, handler: Callable[[socket.socket], None], reasons: set[str]
) -> None:
    with RawOrigin(handler) as origin, Tunnel(origin.address, certificate) as tunnel:
        response = _refused(tunnel, 502, reasons)
        assert b"webso" not in response.raw
