"""Rate limits are exact with 200 concurrent clients, and every tunnel is uncounted, however its connection ends."""

import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.corpus.managed_rules import require_libmodsecurity
from tests.harness import (
    Certificate,
    RawOrigin,
    Tunnel,
    accept_upgrade,
    client_context,
    eventually,
    handshake_request,
    read_request,
    read_response,
    reset,
    switching_protocols,
    upgrade,
)
from tests.promises.firewalled import connect_from, try_handshake, tunnel_to, write_rules
from tests.promises.scripted_origin import ScriptedOrigin
from tests.promises.wire import read_until_end

CLIENTS, LIMIT = 200, 30

EXACT = f"""
[[sites.rate_limits]]
name = "fixed"
limit = "{LIMIT}/year"
strategy = "fixed"
when = 'path == "/fixed"'

[[sites.rate_limits]]
name = "moving"
limit = "{LIMIT}/day"
strategy = "moving"
when = 'path == "/moving"'

[[sites.rate_limits]]
name = "sliding"
limit = "{LIMIT}/day"
strategy = "sliding"
when = 'path == "/sliding"'

[[sites.rate_limits]]
name = "tunnels"
max_tunnels = {LIMIT}
when = 'path == "/tunnels"'
"""


def _hold(sock: socket.socket) -> None:
    """Accept, and hold the tunnel until its client ends it."""
    accept_upgrade(sock)
    while sock.recv(65_536):
        pass


@contextlib.contextmanager
def _connected(tunnel: Tunnel, count: int) -> Iterator[list[ssl.SSLSocket]]:
    """Return so many clients whose TLS handshakes are done."""
    context = client_context(tunnel)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect_from(tunnel, "127.0.0.1", context)) for _ in range(count)]


def _asked_at_once(clients: list[ssl.SSLSocket], path: str) -> list[int]:
    """Send all requests before reading any response, and return the statuses."""
    for client in clients:
        client.sendall(handshake_request(path))
    return [read_response(client).status for client in clients]


@pytest.mark.parametrize("strategy", ["fixed", "moving", "sliding", "tunnels"])
def test_of_200_clients_at_once_exactly_30_pass(certificate: Certificate, strategy: str) -> None:
    with (
        RawOrigin(_hold) as origin,
        tunnel_to(origin.address, certificate, site=EXACT) as tunnel,
        _connected(tunnel, CLIENTS) as clients,
    ):
        statuses = _asked_at_once(clients, f"/{strategy}")
        assert statuses.count(101) == LIMIT
        assert statuses.count(429) == CLIENTS - LIMIT
        assert origin.connections == LIMIT


# --- tunnels that are open -------------------------------------------------------------------------------------------

TWO = """
[[sites.rate_limits]]
name = "tunnels"
max_tunnels = 2
"""


def _statuses(tunnel: Tunnel, count: int) -> list[int]:
    """Send requests one after the other, closing each connection."""
    statuses = []
    context = client_context(tunnel)
    for _ in range(count):
        with connect_from(tunnel, "127.0.0.1", context) as client:
            statuses.append(upgrade(client).status)
            read_until_end(client)
    return statuses


def test_a_tunnel_that_ends_makes_room_for_exactly_one(certificate: Certificate) -> None:
    """By an orderly end of the client's, by a reset, and by the end of the origin's."""
    with RawOrigin(_hold) as origin, tunnel_to(origin.address, certificate, site=TWO) as tunnel:
        ended = 0
        for end in (lambda client: client.unwrap(), reset, lambda client: client.close()):
            with _connected(tunnel, 6) as clients:
                statuses = _asked_at_once(clients, "/")
                assert sorted(statuses) == [101, 101, 429, 429, 429, 429]
                open_ = [client for client, status in zip(clients, statuses, strict=True) if status == 101]
                end(open_[0])
                ended += 1
                _wait_ended(tunnel, ended)
                with _connected(tunnel, 3) as more:
                    assert sorted(_asked_at_once(more, "/")) == [101, 429, 429]
            ended += 2
            _wait_ended(tunnel, ended)


def _wait_ended(tunnel: Tunnel, count: int) -> None:
    """Wait for the records of so many tunnels: a tunnel is uncounted when its record is written."""
    eventually(lambda: len([r for r in tunnel.records("connection") if r["verdict"] == "pass"]) >= count)


def test_clients_are_counted_separately(certificate: Certificate) -> None:
    with RawOrigin(_hold) as origin, tunnel_to(origin.address, certificate, site=TWO) as tunnel:
        with contextlib.ExitStack() as stack:
            for ip in ("127.0.0.1", "127.0.0.2"):
                clients = [stack.enter_context(connect_from(tunnel, ip)) for _ in range(3)]
                assert sorted(_asked_at_once(clients, "/")) == [101, 101, 429]
        _wait_ended(tunnel, 4)


def test_too_many_tunnels_is_reported_as_such(certificate: Certificate) -> None:
    with (
        RawOrigin(_hold) as origin,
        tunnel_to(origin.address, certificate, site=TWO) as tunnel,
        _connected(tunnel, 3) as clients,
    ):
        assert _asked_at_once(clients[:2], "/") == [101, 101]
        clients[2].sendall(handshake_request())
        answer = read_response(clients[2])
        assert answer.status == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.headers["RateLimit"] == '"tunnels";r=0'
        assert answer.headers["RateLimit-Policy"] == '"tunnels";q=2;qu="concurrent-requests"'


def test_an_origin_that_is_down_keeps_no_tunnel_counted(certificate: Certificate) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound but not listening: it refuses
        origin = f"127.0.0.1:{reserved.getsockname()[1]}"
        with tunnel_to(origin, certificate, site=TWO) as tunnel:
            assert _statuses(tunnel, 6) == [502] * 6
            with _connected(tunnel, 4) as clients:  # and not one too few: those that wait are counted
                assert set(_asked_at_once(clients, "/")) <= {502, 429}
            assert _statuses(tunnel, 3) == [502] * 3


def _decline(sock: socket.socket) -> None:
    read_request(sock)
    sock.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")


def _lie(sock: socket.socket) -> None:
    read_request(sock)
    sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")


def _close(sock: socket.socket) -> None:
    read_request(sock)


@pytest.mark.parametrize(("handler", "status"), [(_decline, 403), (_lie, 502), (_close, 502)], ids=lambda value: value)
def test_an_origin_that_declines_keeps_no_tunnel_counted(
    certificate: Certificate, handler: "object", status: int
) -> None:
    assert callable(handler)
    with RawOrigin(handler) as origin, tunnel_to(origin.address, certificate, site=TWO) as tunnel:
        assert _statuses(tunnel, 6) == [status] * 6


def test_an_origin_that_is_silent_keeps_no_tunnel_counted(certificate: Certificate) -> None:
    def silent(sock: socket.socket) -> None:
        while sock.recv(65_536):
            pass

    top = '[timeouts]\norigin_response = "150ms"\n'
    with RawOrigin(silent) as origin, tunnel_to(origin.address, certificate, top=top, site=TWO) as tunnel:
        assert _statuses(tunnel, 4) == [504] * 4


def test_client_that_leaves_before_the_response_keeps_no_tunnel_counted(certificate: Certificate) -> None:
    """It is counted before the origin is connected to, and its reset is noticed while the origin is silent."""
    connected: list[socket.socket] = []

    def hesitate(sock: socket.socket) -> None:
        request = read_request(sock)
        connected.append(sock)
        if request.line.startswith("GET /patient "):
            sock.sendall(switching_protocols(request))
        while sock.recv(65_536):
            pass

    with RawOrigin(hesitate) as origin, tunnel_to(origin.address, certificate, site=TWO) as tunnel:
        for number in range(1, 7):
            client = connect_from(tunnel, "127.0.0.1")
            client.sendall(handshake_request("/impatient"))
            eventually(lambda number=number: len(connected) == number)  # type: ignore[misc]
            reset(client)
            tunnel.wait_records(number)
        with connect_from(tunnel, "127.0.0.1") as client:
            assert upgrade(client, "/patient").status == 101


def test_a_request_that_managed_rules_refuse_keeps_no_tunnel_counted(certificate: Certificate, tmp_path: Path) -> None:
    require_libmodsecurity()
    site = f'{TWO}\n[sites.managed_rules]\nrules = "{write_rules(tmp_path)}"\ntimeout = "10s"\n'
    with ScriptedOrigin() as origin, tunnel_to(origin.address, certificate, site=site) as tunnel:
        for _ in range(5):
            assert try_handshake((origin, tunnel), "/?x=bad").reason == "managed rules"
        assert try_handshake((origin, tunnel), "/?x=good").status == 101


# --- where limits belong together ------------------------------------------------------------------------------------


def test_limits_of_all_sites_and_of_a_site_are_reported_together(certificate: Certificate) -> None:
    """One that refuses uses up none of the others: the second of all sites remains for another user."""
    top = '[[rate_limits]]\nname = "all"\nlimit = "2/day"\nstrategy = "moving"\n'
    site = '[[sites.rate_limits]]\nname = "user"\nkey = ["header:X-User"]\nlimit = "1/day"\nstrategy = "moving"\n'
    with ScriptedOrigin() as origin, tunnel_to(origin.address, certificate, top=top, site=site) as tunnel:
        servers = origin, tunnel
        assert try_handshake(servers, headers=[("X-User", "a")]).status == 101
        assert try_handshake(servers, headers=[("X-User", "a")]).reason == "rate limit: user"
        assert try_handshake(servers, headers=[("X-User", "b")]).status == 101
        outcome = try_handshake(servers, headers=[("X-User", "a")])
        assert outcome.reason == "rate limit: all"
        assert outcome.headers["RateLimit-Policy"] == '"all";q=2;w=86400, "user";q=1;w=86400'
        assert try_handshake(servers, headers=[("X-User", "a")], ip="127.0.0.2").reason == "rate limit: user"


def test_block_applies_to_every_request(certificate: Certificate) -> None:
    site = (
        '[[sites.rate_limits]]\nname = "logins"\nlimit = "1/day"\nstrategy = "moving"\n'
        'when = \'path == "/login"\'\nblock_for = "1h"\n'
    )
    with ScriptedOrigin() as origin, tunnel_to(origin.address, certificate, site=site) as tunnel:
        servers = origin, tunnel
        assert try_handshake(servers, "/chat").status == 101
        assert try_handshake(servers, "/login").status == 101
        assert try_handshake(servers, "/chat").status == 101
        assert try_handshake(servers, "/login").status == 429
        outcome = try_handshake(servers, "/chat")
        assert (outcome.status, outcome.record["detail"]) == (429, "blocked")
        assert 3500 < int(outcome.headers["Retry-After"]) <= 3600
        assert try_handshake(servers, "/chat", ip="127.0.0.2").status == 101


def test_a_limit_without_its_key_does_not_apply(certificate: Certificate) -> None:
    """One counter for all clients without the cookie would let one of them refuse the others."""
    site = (
        '[[sites.rate_limits]]\nname = "sessions"\nkey = ["cookie:sid", "path"]\nlimit = "1/day"\nstrategy = "moving"\n'
    )
    with ScriptedOrigin() as origin, tunnel_to(origin.address, certificate, site=site) as tunnel:
        servers = origin, tunnel
        for _ in range(3):
            assert try_handshake(servers).status == 101
        assert try_handshake(servers, "/a", [("Cookie", "sid=1")]).status == 101
        assert try_handshake(servers, "/b", [("Cookie", "sid=1")]).status == 101
        assert try_handshake(servers, "/a", [("Cookie", "sid=2")]).status == 101
        for path in ("/a", "/%61", "/a?x"):
            for cookies in ("sid=1", "sid=3; sid=1", "sid=1; sid=4"):
                assert try_handshake(servers, path, [("Cookie", cookies)]).reason == "rate limit: sessions"
