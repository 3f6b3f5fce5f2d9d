"""On a signal to exit, the tunnel stops accepting, delivers what is in flight, ends tunnels in turn, and exits 0."""

import contextlib
import os
import selectors
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.harness import (
    TIMEOUT,
    Certificate,
    RawOrigin,
    Record,
    Tunnel,
    accept_upgrade,
    client_context,
    connect_tcp,
    connect_tls,
    echo_bytes,
    eventually,
    receive_all,
    receive_exactly,
    upgrade,
)
from tests.promises.wire import ABRUPT_ENDS, client_hello

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
KIB = 1024


def _over(seconds: str, wait: str = "0s") -> str:
    return f'[release]\ndrain_over = "{seconds}"\ndrain_wait = "{wait}"\n'


def _ended_well(tunnel: Tunnel, within: float) -> None:
    """Check the exit status 0, within that time, and that `stopped` is the last record."""
    began = time.monotonic()
    assert tunnel.wait(within + TIMEOUT) == 0
    assert time.monotonic() - began < within
    assert tunnel.records()[-1]["event"] == "stopped"


def _refuses_connections(tunnel: Tunnel) -> bool:
    try:
        connect_tcp(tunnel).close()
    except ConnectionRefusedError:
        return True
    return False


def _at(record: Record) -> float:
    return datetime.fromisoformat(record["timestamp"]).timestamp()


def _open(tunnel: Tunnel, context: ssl.SSLContext | None = None) -> ssl.SSLSocket:
    client = connect_tls(tunnel, context=context)
    assert upgrade(client).status == 101
    return client


@contextlib.contextmanager
def _serving(certificate: Certificate, settings: str = "") -> Iterator[tuple[Tunnel, contextlib.ExitStack]]:
    with (
        RawOrigin(echo_bytes) as origin,
        Tunnel(origin.address, certificate, settings=settings) as tunnel,
        contextlib.ExitStack() as clients,
    ):
        yield tunnel, clients


@SIGNALS
def test_without_tunnels_it_exits_at_once(certificate: Certificate, number: signal.Signals) -> None:
    with _serving(certificate) as (tunnel, _):
        with _open(tunnel) as client:
            client.sendall(b"once")
            assert receive_exactly(client, 4) == b"once"
        tunnel.wait_records(1)
        tunnel.send_signal(number)
        _ended_well(tunnel, within=4)  # SIGINT's drain takes 5 s, SIGTERM's 60 s
        assert tunnel.wait_record(lambda record: record["event"] == "drain requested")["signal"] == number.name


@SIGNALS
def test_it_exits_when_the_last_tunnel_has_ended_by_itself(certificate: Certificate, number: signal.Signals) -> None:
    with _serving(certificate, _over("60s")) as (tunnel, _):
        with _open(tunnel) as client:
            tunnel.send_signal(number)
            eventually(lambda: _refuses_connections(tunnel))
            # Its turn comes within the time, so it may have ended already; until then it continues.
            with contextlib.suppress(*ABRUPT_ENDS, AssertionError):
                client.sendall(b"still open")
                receive_exactly(client, 10)
        _ended_well(tunnel, within=10)


def test_endings_are_spread_out(certificate: Certificate) -> None:
    """Twelve tunnels over 3 s: not at one moment, the oldest first, each with close_notify and FIN."""
    with _serving(certificate, _over("3s")) as (tunnel, clients):
        context = client_context(tunnel)
        opened = [clients.enter_context(_open(tunnel, context)) for _ in range(12)]
        tunnel.send_signal(signal.SIGTERM)
        tunnel.wait_record(lambda record: record["event"] == "draining")
        assert _refuses_connections(tunnel), "the listeners close at once"

        order, times = _ends_of(opened)
        assert tunnel.wait(TIMEOUT) == 0
        assert len(order) == 12
        # Jitter and a busy machine may bring two together, but not all.
        assert times[-1] - times[0] > 1.5, times
        assert times[-1] - times[0] < 3 + 5
        assert set(order[:3]) <= set(range(6)), order
        assert set(order[-3:]) <= set(range(6, 12)), order
        records = tunnel.records("connection")
        assert [(record["ended_by"], record["reason"]) for record in records] == [("tunnel", "drained")] * 12
        assert _at(records[-1]) - _at(records[0]) > 1.5
        assert tunnel.records()[-1]["event"] == "stopped"


def _ends_of(clients: list[ssl.SSLSocket]) -> tuple[list[int], list[float]]:
    """Return which ended, in order, and when. Each has to end with close_notify."""
    order: list[int] = []
    times: list[float] = []
    with selectors.DefaultSelector() as selector:
        for number, client in enumerate(clients):
            selector.register(client, selectors.EVENT_READ, number)
        while len(order) < len(clients):
            ready = selector.select(TIMEOUT)
            assert ready, f"only {len(order)} have ended"
            for key, _ in ready:
                client = clients[key.data]
                assert client.recv(1) == b""
                selector.unregister(client)
                client.close()
                order.append(key.data)
                times.append(time.monotonic())
    return order, times


def test_bytes_in_flight_are_delivered_first(certificate: Certificate) -> None:
    """Sent by either side before the signal, and read only after it."""
    from_origin, from_client = os.urandom(300 * KIB), os.urandom(300 * KIB)
    all_sent = threading.Event()
    may_read = threading.Event()
    received: list[bytes] = []

    def origin_(sock: socket.socket) -> None:
        request = accept_upgrade(sock)
        sock.sendall(from_origin)
        all_sent.set()
        assert may_read.wait(TIMEOUT)
        received.append(request.leftover + receive_all(sock))

    settings = _over("500ms")
    with (
        RawOrigin(origin_) as origin,
        Tunnel(origin.address, certificate, settings=settings) as tunnel,
        connect_tls(tunnel) as client,
    ):
        answer = upgrade(client)
        assert answer.status == 101
        client.sendall(from_client)
        assert all_sent.wait(TIMEOUT)
        tunnel.send_signal(signal.SIGTERM)
        tunnel.wait_record(lambda record: record["event"] == "draining")
        may_read.set()
        assert answer.leftover + receive_all(client) == from_origin, "and then close_notify: any other end raises"
        client.close()
        _ended_well(tunnel, within=20)
        eventually(lambda: received)
        assert received == [from_client]
        record = tunnel.records("connection")[0]
        assert (record["up"], record["down"]) == (300 * KIB, 300 * KIB)


def test_drain_wait_keeps_accepting_for_that_long(certificate: Certificate) -> None:
    with _serving(certificate, _over("500ms", wait="1500ms")) as (tunnel, clients):
        context = client_context(tunnel)
        clients.enter_context(_open(tunnel, context))
        tunnel.send_signal(signal.SIGTERM)
        ending = tunnel.wait_record(lambda record: record["event"] == "drain requested")
        with _open(tunnel, context) as late:
            late.sendall(b"still served")
            assert receive_exactly(late, 12) == b"still served"
        draining = tunnel.wait_record(lambda record: record["event"] == "draining")
        assert _at(draining) - _at(ending) >= 1.4
        assert _refuses_connections(tunnel)
        _ended_well(tunnel, within=10)


def test_sigint_does_not_wait_for_drain_wait(certificate: Certificate) -> None:
    with _serving(certificate, _over("60s", wait="60s")) as (tunnel, _):
        tunnel.send_signal(signal.SIGINT)
        _ended_well(tunnel, within=4)


@SIGNALS
def test_a_second_signal_ends_it_at_once(certificate: Certificate, number: signal.Signals) -> None:
    """RST to both sides; the exit status is still 0, as the exit was requested."""
    resets = []

    def origin_(sock: socket.socket) -> None:
        accept_upgrade(sock)
        try:
            receive_all(sock)
        except ConnectionResetError as error:
            resets.append(error)

    with (
        RawOrigin(origin_) as origin,
        Tunnel(origin.address, certificate, settings=_over("60s", wait="60s")) as tunnel,
        contextlib.ExitStack() as clients,
    ):
        context = client_context(tunnel)
        opened = [clients.enter_context(_open(tunnel, context)) for _ in range(5)]
        tunnel.send_signal(signal.SIGTERM)
        tunnel.wait_record(lambda record: record["event"] == "drain requested")
        tunnel.send_signal(number)
        for client in opened:
            raw = socket.socket(fileno=client.detach())  # below TLS, where a RST is visible
            clients.enter_context(raw)
            raw.settimeout(TIMEOUT)
            with pytest.raises(ConnectionResetError):
                receive_all(raw)
        _ended_well(tunnel, within=5)
        eventually(lambda: len(resets) == 5)
        reasons = {(record["ended_by"], record["reason"]) for record in tunnel.wait_records(5)}
        assert reasons == {("tunnel", "stopped")}


def test_unfinished_handshakes_are_not_left_hanging(certificate: Certificate) -> None:
    settings = _over("1s") + '[timeouts]\ntls_handshake = "60s"\nrequest = "60s"\n'
    with _serving(certificate, settings) as (tunnel, clients):
        silent = clients.enter_context(connect_tcp(tunnel))
        half = clients.enter_context(connect_tcp(tunnel))
        half.sendall(client_hello()[:100])
        hung = clients.enter_context(connect_tcp(tunnel))
        hung.sendall(client_hello())
        assert hung.recv(1)
        mute = clients.enter_context(connect_tls(tunnel))
        tunnel.send_signal(signal.SIGTERM)
        assert tunnel.wait_record(lambda record: record["event"] == "draining")["unfinished"] == 4
        for client in (silent, half, hung, mute):
            with contextlib.suppress(*ABRUPT_ENDS):
                while client.recv(65536):
                    pass
        _ended_well(tunnel, within=10)


def test_a_handshake_under_way_may_still_finish(certificate: Certificate) -> None:
    with _serving(certificate, _over("3s")) as (tunnel, clients):
        client = clients.enter_context(connect_tls(tunnel))
        clients.enter_context(_open(tunnel))
        tunnel.send_signal(signal.SIGTERM)
        tunnel.wait_record(lambda record: record["event"] == "draining")
        assert upgrade(client).status == 101
        client.sendall(b"just in time")
        assert receive_exactly(client, 12) == b"just in time"
        assert receive_all(client) == b""
        client.close()
        _ended_well(tunnel, within=10)


def test_a_client_that_never_closes_does_not_hold_it_up(certificate: Certificate) -> None:
    """It is sent close_notify, and has a moment to respond."""
    with _serving(certificate, _over("500ms")) as (tunnel, clients):
        clients.enter_context(_open(tunnel))
        tunnel.send_signal(signal.SIGTERM)
        _ended_well(tunnel, within=10)


def test_a_client_that_never_reads_is_cut_after_timeouts_close(certificate: Certificate) -> None:
    def pour(sock: socket.socket) -> None:
        accept_upgrade(sock)
        with contextlib.suppress(ConnectionError):
            while True:
                sock.sendall(bytes(256 * KIB))

    settings = _over("500ms") + '[timeouts]\nclose = "1s"\n'
    with (
        RawOrigin(pour) as origin,
        Tunnel(origin.address, certificate, settings=settings) as tunnel,
        _open(tunnel),
    ):
        tunnel.send_signal(signal.SIGTERM)
        _ended_well(tunnel, within=12)
        record = tunnel.records("connection")[0]
        assert record["ended_by"] == "tunnel"


# --- what it leaves behind ------------------------------------------------------------------------------------------


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_gone(pid: int) -> bool:
    """Whether there is no such process, or only a zombie that its new parent has not reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_the_echo_origin_exits_with_it(certificate: Certificate, number: signal.Signals) -> None:
    with contextlib.ExitStack() as stack:
        tunnel = Tunnel(None, certificate)
        if number == signal.SIGKILL:
            stack.enter_context(pytest.raises(AssertionError, match="it exited with -9"))
        stack.enter_context(tunnel)
        children = _children(tunnel.parent)
        assert children, "the embedded echo origin is a process of its own"
        with _open(tunnel):
            pass
        tunnel.stop(number)
        eventually(lambda: all(map(_is_gone, children)))


def test_the_file_of_a_unix_socket_is_removed(certificate: Certificate, tmp_path: Path) -> None:
    path = tmp_path / "tunnel.sock"
    with Tunnel(None, certificate, listen=[f"unix:{path}"]) as tunnel:
        assert path.is_socket()
        assert tunnel.stop() == 0
        assert not path.exists()


def test_a_stale_unix_socket_is_replaced(certificate: Certificate, tmp_path: Path) -> None:
    path = tmp_path / "tunnel.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    assert path.is_socket(), "left behind by a process that has exited"
    with (
        RawOrigin(echo_bytes) as origin,
        Tunnel(origin.address, certificate, listen=[f"unix:{path}"]) as tunnel,
        socket.socket(socket.AF_UNIX) as plain,
    ):
        plain.settimeout(TIMEOUT)
        plain.connect(str(path))
        with client_context(tunnel).wrap_socket(plain, server_hostname="localhost") as client:
            assert upgrade(client).status == 101


def test_a_unix_socket_in_use_is_left_alone(certificate: Certificate, tmp_path: Path) -> None:
    path = tmp_path / "tunnel.sock"
    with Tunnel(None, certificate, listen=[f"unix:{path}"]) as first:
        with pytest.raises(AssertionError, match=r"in use by another program"):
            Tunnel(None, certificate, listen=[f"unix:{path}"]).__enter__()
        assert path.is_socket()
        with socket.socket(socket.AF_UNIX) as plain:
            plain.settimeout(TIMEOUT)
            plain.connect(str(path))
            with client_context(first).wrap_socket(plain, server_hostname="localhost") as client:
                assert upgrade(client).status == 101


def test_a_file_that_is_not_a_socket_is_left_alone(certificate: Certificate, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("not a socket")
    with pytest.raises(AssertionError, match=r"in use by another program"):
        Tunnel(None, certificate, listen=[f"unix:{path}"]).__enter__()
    assert path.read_text() == "not a socket"
