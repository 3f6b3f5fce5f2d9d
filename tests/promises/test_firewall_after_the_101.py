"""After the 101 nothing is inspected: what every check would refuse in a handshake passes unchanged, both ways."""

import os
import signal
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.corpus import corpus
from tests.corpus.managed_rules import require_crs
from tests.harness import (
    TIMEOUT,
    Certificate,
    RawOrigin,
    Tunnel,
    accept_upgrade,
    handshake_request,
    read_response,
    receive_exactly,
    switching_protocols,
    upgrade,
)
from tests.promises.firewalled import connect_from, helpers, try_handshake, tunnel_to
from tests.promises.scripted_origin import ScriptedOrigin

TOP = """
[[rules]]
name = "everything but the handshake"
when = 'path != "/chat" || size(query) > 0 || user_agent != ""'
action = "block"

[[rules]]
name = "everything, noted"
when = 'path != "/chat" || size(query) > 0 || user_agent != ""'
action = "log"

[[rate_limits]]
name = "one"
limit = "1/day"
strategy = "moving"
max_tunnels = 1
block_for = "1d"
"""

SITE = """
web_origins = ["same"]
require_web_origin = true

[sites.managed_rules]
owasp_crs = true
timeout = "20s"
"""


def _attacks() -> bytes:
    """All attacks of the corpus, as whole requests and then as the contents of their targets and fields."""
    found = []
    for attack in corpus.attacks():
        request = attack.request
        found.append(b"GET %b HTTP/1.1\r\n" % request.target)
        found += [b"%b: %b\r\n" % field for field in request.fields]
        found.append(b"\r\n")
    return b"".join(found)


def _payload() -> bytes:
    """Attacks, as text and as a WebSocket frame without a mask, every byte value, and every pair of these."""
    attacks = _attacks()
    every_pair = bytes(byte for first in range(256) for second in range(256) for byte in (first, second))
    frame = b"\x81\x7f" + len(attacks).to_bytes(8) + attacks
    return attacks + frame + bytes(range(256)) + every_pair


PAYLOAD = _payload()


@pytest.fixture
def servers(certificate: Certificate) -> Iterator[tuple[Tunnel, list[bytes]]]:
    """With an origin that sends the payload, keeps as many bytes of what it receives, and ends."""
    require_crs()
    received: list[bytes] = []

    def handle(sock: socket.socket) -> None:
        request = accept_upgrade(sock)
        sending = threading.Thread(target=sock.sendall, args=(PAYLOAD,))
        sending.start()
        rest = len(PAYLOAD) - len(request.leftover)
        received.append(request.leftover + receive_exactly(sock, rest))
        sending.join(TIMEOUT)

    with RawOrigin(handle) as origin, tunnel_to(origin.address, certificate, top=TOP, site=SITE) as tunnel:
        yield tunnel, received


def test_payload_that_every_check_would_refuse_passes_unchanged(
    servers: tuple[Tunnel, list[bytes]],
) -> None:
    """With the evaluating process stopped after the 101: any check that used it would wait, and be logged."""
    tunnel, received = servers
    with connect_from(tunnel, "127.0.0.1") as client:
        answer = upgrade(client, "/chat", [("Origin", "https://localhost")])
        assert answer.status == 101
        (helper,) = helpers(tunnel)
        os.kill(helper, signal.SIGSTOP)
        client.sendall(PAYLOAD)
        assert answer.leftover + receive_exactly(client, len(PAYLOAD) - len(answer.leftover)) == PAYLOAD
        assert client.recv(1) == b""
    os.kill(helper, signal.SIGCONT)
    (record,) = tunnel.wait_records(1)
    assert received == [PAYLOAD]
    assert (record["verdict"], record["up"], record["down"]) == ("pass", len(PAYLOAD), len(PAYLOAD))
    _says_nothing(tunnel)


def _says_nothing(tunnel: Tunnel) -> None:
    """The log has the start and one connection, and nothing from the firewall."""
    events = [record["event"] for record in tunnel.records()]
    others = ("certificates", "open to web pages", "running as root")
    assert [event for event in events if event not in others] == ["listening", "ready", "connection"], tunnel.log
    (record,) = tunnel.records("connection")
    assert not {"rule", "logged", "managed_rules", "detail"} & record.keys()


def test_data_in_the_same_write_as_the_handshake_is_not_inspected(certificate: Certificate) -> None:
    """It waits beside the request until the 101 and is not taken for a part of it."""
    early = _attacks()[:8000]
    with ScriptedOrigin() as origin, tunnel_to(origin.address, certificate, top=TOP) as tunnel:
        traffic = origin.play(switching_protocols)
        with connect_from(tunnel, "127.0.0.1") as client:
            client.sendall(handshake_request("/chat") + early)
            assert read_response(client).status == 101
            client.sendall(bytes(range(256)))
        assert traffic.surplus_at_end() == early + bytes(range(256))
        assert traffic.record(tunnel)["verdict"] == "pass"
        _says_nothing(tunnel)


def test_second_request_in_a_tunnel_is_not_inspected(certificate: Certificate) -> None:
    """It is not counted by the limits, of which the first used the last place, nor checked, nor sent elsewhere."""
    second = handshake_request("/admin?x=1'%20OR%20'1'='1", headers=[("X-Forwarded-For", "203.0.113.1")])
    with ScriptedOrigin() as origin, tunnel_to(origin.address, certificate, top=TOP) as tunnel:
        traffic = origin.play(switching_protocols)
        with connect_from(tunnel, "127.0.0.1") as client:
            assert upgrade(client, "/chat").status == 101
            client.sendall(second * 100)
        assert traffic.surplus_at_end() == second * 100
        traffic.record(tunnel)
        _says_nothing(tunnel)
        # The policy does refuse handshakes.
        assert try_handshake((origin, tunnel), "/chat").reason == "rate limit: one"
        assert try_handshake((origin, tunnel), "/admin").reason == "rule: everything but the handshake"
