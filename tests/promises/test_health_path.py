"""Load balancers can ask the serving port whether to send clients here; for all others there is no such path."""

import http.client
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness import (
    TIMEOUT,
    Certificate,
    Tunnel,
    client_context,
    connect_tls,
    eventually,
    handshake_request,
    read_response,
    receive_all,
    switching_protocols,
    upgrade,
)
from tests.promises.firewalled import Servers, config_for, tunnel_to
from tests.promises.scripted_origin import ScriptedOrigin
from tests.promises.test_proxy_protocol import haproxy
from tlstunnel.config import decode
from tlstunnel.errors import ConfigurationError
from tlstunnel.metrics import families

PATH = "/.tlstunnel/ready"
BALANCER, PROXY, CLIENT = "127.0.0.2", "127.0.0.3", "127.0.0.4"
TOP = (
    f'health_path = "{PATH}"\nhealth_addresses = ["{BALANCER}"]\ntrusted_proxies = ["{PROXY}"]\n'
    '[release]\ndrain_wait = "60s"\n'
)
BLOCKED = '[[sites.rules]]\nname = "none"\nwhen = "path.startsWith(\'/.\')"\naction = "block"\n'


@pytest.fixture(scope="module")
def servers(certificate: Certificate) -> Iterator[Servers]:
    with ScriptedOrigin() as origin, tunnel_to(origin.address, certificate, top=TOP, site=BLOCKED) as tunnel:
        yield origin, tunnel


class Answer(NamedTuple):
    """The response to a health check."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


def _ask(tunnel: Tunnel, source: str, *more: str, line: str = f"GET {PATH} HTTP/1.1", host: str = "") -> Answer:
    plain = socket.create_connection(("127.0.0.1", tunnel.port), TIMEOUT, source_address=(source, 0))
    with client_context(tunnel).wrap_socket(plain, server_hostname="localhost") as client:
        client.sendall("\r\n".join([line, f"Host: {host or 'localhost'}", *more, "", ""]).encode())
        response = read_response(client)
        return Answer(response.status, response.headers, response.leftover + receive_all(client))


def _count(tunnel: Tunnel, status: int) -> int:
    series = tunnel.status()["metrics"].get(families.HEALTH_CHECKS.name, [])
    return sum(one["value"] for one in series if one["labels"] == {"status": str(status)})


@pytest.mark.parametrize(
    ("source", "line", "host"),
    [
        (BALANCER, f"GET {PATH} HTTP/1.1", ""),
        (PROXY, f"GET {PATH} HTTP/1.1", ""),
        (BALANCER, f"GET {PATH}?from=balancer HTTP/1.1", ""),
        (BALANCER, f"GET {PATH} HTTP/1.1", "192.0.2.1:443"),  # many ask by address
    ],
)
def test_a_load_balancer_gets_an_answer_before_the_firewall(
    servers: Servers, source: str, line: str, host: str
) -> None:
    _, tunnel = servers
    before = len(tunnel.records("connection")), _count(tunnel, 200)
    response = _ask(tunnel, source, line=line, host=host)
    assert (response.status, response.body) == (200, b"ready\n")
    assert response.headers["Cache-Control"] == "no-store"
    # It is counted, and not recorded.
    assert (len(tunnel.records("connection")), _count(tunnel, 200)) == (before[0], before[1] + 1)


def test_head_has_no_body(servers: Servers) -> None:
    response = _ask(servers[1], BALANCER, line=f"HEAD {PATH} HTTP/1.1")
    assert (response.status, response.body, response.headers["Content-Length"]) == (200, b"", "6")


@pytest.mark.parametrize(
    ("source", "line", "more"),
    [
        (CLIENT, f"GET {PATH} HTTP/1.1", ()),
        (PROXY, f"GET {PATH} HTTP/1.1", (f"X-Forwarded-For: {CLIENT}",)),  # passed on for a client
        (CLIENT, f"GET {PATH} HTTP/1.1", (f"X-Forwarded-For: {BALANCER}",)),  # a forged address
        (BALANCER, f"POST {PATH} HTTP/1.1", ("Content-Length: 0",)),
        (BALANCER, f"GET {PATH}/ HTTP/1.1", ()),
        (BALANCER, f"GET /{PATH} HTTP/1.1", ()),
    ],
)
def test_for_all_others_there_is_no_such_path(servers: Servers, source: str, line: str, more: tuple[str, ...]) -> None:
    origin, tunnel = servers
    traffic = origin.play(b"")
    before = _count(tunnel, 200)
    # As for any other path: 426 as it is no handshake, 405 as it is no GET, 403 by the rule.
    assert _ask(tunnel, source, *more, line=line).status in {403, 405, 426}
    assert _count(tunnel, 200) == before
    assert not traffic.heads


def test_a_handshake_at_this_path_is_an_ordinary_one(certificate: Certificate) -> None:
    top = f'health_path = "{PATH}"\nhealth_addresses = ["127.0.0.1"]\n'
    with (
        ScriptedOrigin() as origin,
        tunnel_to(origin.address, certificate, top=top, site='http = "pass"') as tunnel,
        connect_tls(tunnel) as client,
    ):
        traffic = origin.play(switching_protocols)
        client.sendall(handshake_request(PATH))
        assert read_response(client).status == 101
        eventually(lambda: traffic.heads)


def test_a_site_has_a_path_of_its_own_and_rate_limits_do_not_apply(certificate: Certificate) -> None:
    limit = '[[sites.rate_limits]]\nname = "one"\nkey = ["ip"]\nlimit = "1/hour"\n'
    site = f'health_path = "/own"\n{limit}'
    top = f'health_path = "{PATH}"\nhealth_addresses = ["{BALANCER}"]\n'
    with ScriptedOrigin() as origin, tunnel_to(origin.address, certificate, top=top, site=site) as tunnel:
        for _ in range(3):
            assert _ask(tunnel, BALANCER, line="GET /own HTTP/1.1").status == 200
        assert _ask(tunnel, BALANCER).status == 426  # the site has a path of its own
        assert _ask(tunnel, CLIENT, line="GET /own HTTP/1.1").status == 426


def test_it_fails_from_the_beginning_of_a_shutdown_while_clients_are_still_accepted(certificate: Certificate) -> None:
    with ScriptedOrigin() as origin, tunnel_to(origin.address, certificate, top=TOP, site=BLOCKED) as tunnel:
        origin.play(switching_protocols)
        assert _ask(tunnel, BALANCER).status == 200
        tunnel.send_signal(signal.SIGTERM)
        eventually(lambda: _ask(tunnel, BALANCER).status == 503)
        response = _ask(tunnel, BALANCER)
        assert (response.status, response.body) == (503, b"draining\n")
        with connect_tls(tunnel) as client:
            assert upgrade(client).status == 101
        tunnel.send_signal(signal.SIGTERM)
        tunnel.wait()


def test_haproxy_asks_through_tls_and_the_proxy_protocol(certificate: Certificate, tmp_path: Path) -> None:
    top = f'health_path = "{PATH}"\nproxy_protocol = "required"\ntrusted_proxies = ["127.0.0.1"]\n'
    with (
        ScriptedOrigin() as origin,
        tunnel_to(origin.address, certificate, top=top) as tunnel,
        haproxy(
            tmp_path,
            "\n mode tcp\n option httpchk\n"
            f" http-check send meth GET uri {PATH} ver HTTP/1.1 hdr Host localhost\n http-check expect status 200\n"
            f" server s 127.0.0.1:{tunnel.port} send-proxy-v2 check inter 200ms check-ssl check-sni localhost"
            " verify none check-alpn http/1.1 check-send-proxy\n",
        ) as port,
    ):
        eventually(lambda: _count(tunnel, 200) >= 2)
        origin.play(switching_protocols)
        plain = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        with client_context(tunnel).wrap_socket(plain, server_hostname="localhost") as client:
            assert upgrade(client).status == 101


@pytest.mark.parametrize(
    ("top", "problem"),
    [
        (f'health_path = "{PATH}"\n', "health_path: no one may ask for it: list the load balancers"),
        ('health_addresses = ["10.0.0.0/8"]\n', "health_addresses: requires health_path"),
        ('health_path = "ready"\nhealth_addresses = ["10.0.0.0/8"]\n', "health_path: expected a path"),
    ],
)
def test_a_path_that_cannot_be_asked_for_is_an_error(certificate: Certificate, top: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(problem)):
        decode(config_for("127.0.0.1:9", certificate, top=top), Path(), "file")
