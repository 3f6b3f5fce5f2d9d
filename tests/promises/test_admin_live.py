"""Who watches sees what happens within two seconds, and who reads slowly, or must not read any more, harms nobody."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.harness import TIMEOUT, Certificate, RawOrigin, connect_tls, eventually, upgrade
from tests.promises.administered import RITA, Admin, administered, holding, upgrade_request
from tests.promises.counted import hold
from tlstunnel.admin.live import MOST_WATCHERS


@pytest.fixture(scope="module")
def admin(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    folder = tmp_path_factory.mktemp("live")
    with RawOrigin(hold) as origin, administered(certificate, folder, origin=origin.address) as tunnel:
        yield Admin(tunnel)


@contextmanager
def watching(admin: Admin, watch: Any, **headers: str) -> Iterator[ClientConnection]:
    with connect(f"ws://{admin.host}/api/v1/live", additional_headers=headers, proxy=None) as socket_:
        socket_.send(json.dumps(watch))
        yield socket_


def receive(socket_: ClientConnection, what: str) -> Any:
    """Return the next message of this kind."""
    while True:
        message = json.loads(socket_.recv(timeout=TIMEOUT))
        if what in message:
            return message


def test_an_open_tunnel_is_seen_within_two_seconds(admin: Admin) -> None:
    with watching(admin, {"watch": ["overview"]}) as socket_:
        before = receive(socket_, "overview")["overview"]["tunnels"]
        with connect_tls(admin.tunnel) as sock:
            assert upgrade(sock).status == 101
            began = time.monotonic()
            while receive(socket_, "overview")["overview"]["tunnels"] != before + 1:
                assert time.monotonic() - began < TIMEOUT
        opened = receive(socket_, "overview")["overview"]["totals"]["opened"]
        assert opened >= 1


def test_records_are_filtered(admin: Admin) -> None:
    watch = {"watch": ["records"], "records": {"site": "localhost", "client": "127.", "verdict": "refused"}}
    with watching(admin, watch) as socket_, watching(admin, {"watch": ["records"], "records": {"site": "x"}}) as other:
        found: list[dict[str, Any]] = []

        def refused() -> list[dict[str, Any]]:
            with connect_tls(admin.tunnel) as sock:  # until the processes have been asked
                assert upgrade(sock, "/\x01").status == 400
            with suppress(TimeoutError):
                found.extend(json.loads(socket_.recv(timeout=0.5))["records"])
            return found

        record = eventually(refused)[0]
        assert (record["status"], record["site"], record["verdict"]) == (400, "localhost", "refused")
        with pytest.raises(TimeoutError):
            other.recv(timeout=0.2)


@pytest.mark.parametrize("message", ["", "[]", "1", '{"watch": ["nothing"]}', '{"watch": 1}', "[" * 4000, b"\x00"])
def test_other_messages_end_it(admin: Admin, message: str | bytes) -> None:
    with connect(f"ws://{admin.host}/api/v1/live", proxy=None) as socket_:
        socket_.send(message)
        with pytest.raises(ConnectionClosed) as caught:
            socket_.recv(timeout=TIMEOUT)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1007


def test_a_large_message_ends_it(admin: Admin) -> None:
    with connect(f"ws://{admin.host}/api/v1/live", proxy=None) as socket_:
        socket_.send('{"watch": [], "x": "' + "x" * 100_000 + '"}')
        with pytest.raises(ConnectionClosed) as caught:
            socket_.recv(timeout=TIMEOUT)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1009


def test_who_watches_most_makes_room_for_others(admin: Admin) -> None:
    request = upgrade_request(admin.host)
    with (
        watching(admin, {}, Authorization=f"Bearer {RITA}") as rita,
        holding(admin, MOST_WATCHERS) as socks,
    ):
        for sock in socks:
            sock.sendall(request)
            assert sock.recv(12) == b"HTTP/1.1 101"
        received = b""
        while part := socks[0].recv(4096):
            received += part
        assert received.endswith(b"\x88\x02\x03\xf0"), "closed with 1008"
        rita.send('{"watch": ["overview"]}')
        receive(rita, "overview")


def test_who_reads_nothing_is_cut_off(admin: Admin) -> None:
    """It sends pings, which the server would have to answer, and reads neither the answers nor the overviews."""
    with admin.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(upgrade_request(admin.host))
        pings = 100 * (b"\x89\xfd" + bytes(4) + bytes(125))
        sock.settimeout(1.0)
        sent = 0
        with suppress(TimeoutError, ConnectionError):
            while sent < 50 << 20:
                sock.sendall(pings)
                sent += len(pings)
        assert sent < 50 << 20, "the server stops reading"
        assert admin.get("/healthz")["alive"]


def test_the_end_of_a_session_ends_what_it_watches(admin: Admin) -> None:
    cookie, csrf, _ = admin.log_in(RITA)
    own = {"Cookie": cookie, "Origin": f"http://{admin.host}"}
    with watching(admin, {"watch": ["overview"]}, **own) as socket_:
        receive(socket_, "overview")
        # Who may only read may still log out.
        reply = admin.ask("POST", "/logout", {**own, "X-CSRF-Token": csrf}, {})
        assert reply.status == 200, reply
        with pytest.raises(ConnectionClosed) as caught:
            receive(socket_, "nothing")
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1008
