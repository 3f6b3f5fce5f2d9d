"""A worker may choose the site's origins and those in `worker_origins`; any other is a 502, and logged.

The workers here do what no worker should: they take the address, and everything else they set, from the client.
"""

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.harness import Certificate, RawOrigin, connect_tls, switching_protocols, upgrade
from tests.promises.edged import BY_PATH, attempt, edged
from tests.promises.firewalled import Outcome, Servers, config_for
from tests.promises.scripted_origin import ScriptedOrigin

WORKER = (
    BY_PATH
    + """
async def to(request, env):
    return request.forward(origin=request.headers["X-To"])

async def user(request, env):
    return request.forward(headers={"X-User": request.query["u"]})

async def field(request, env):
    return request.forward(headers={request.query["f"]: "1"})

async def path(request, env):
    return request.forward(path=request.query["p"])

async def query(request, env):
    return request.forward(query=request.query["q"])

async def host(request, env):
    return request.forward(headers={"Host": request.query["h"]})

async def reply(request, env):
    return Reply(302, "elsewhere", {"Location": request.query["l"]})

async def protocol(request, env):
    return request.forward(subprotocols=[request.query["s"]])
"""
)


@pytest.fixture(scope="module")
def target() -> Iterator[ScriptedOrigin]:
    """An origin that no site has, on 127.0.0.1. A request that reaches it has found an open relay."""
    with ScriptedOrigin() as target:
        yield target


@pytest.fixture(scope="module")
def stage(certificate: Certificate) -> Iterator[Servers]:
    site = 'worker_origins = ["127.0.0.2", "10.255.255.0/24", "2001:db8::/32", "inside.example", "*.inside.example"]\n'
    with (
        ScriptedOrigin() as origin,
        edged(origin.address, certificate, WORKER, site=site, errors_expected=True) as tunnel,
    ):
        yield origin, tunnel


def _sent(stage: Servers, target: ScriptedOrigin, where: str) -> Outcome:
    """Request this destination, and check that nothing has reached the forbidden origin."""
    traffic = target.play(switching_protocols)
    outcome = attempt(stage, "/to", [("X-To", where)])
    assert traffic.connections == 0, "an open relay"
    return outcome


@pytest.mark.parametrize(
    "where",
    [
        "127.0.0.1:{port}",
        "ws://127.0.0.1:{port}/",
        "wss://127.0.0.1:{port}",
        "127.0.0.3:{port}",
        "0.0.0.0:{port}",
        "[::]:{port}",
        "[::1]:{port}",
        "[::1%lo]:{port}",
        "[::ffff:127.0.0.1]:{port}",
        "[::ffff:7f00:1]:{port}",
        "[::127.0.0.1]:{port}",
        "[64:ff9b::7f00:1]:{port}",
        "unix:/run/nobody.sock",
        "169.254.169.254:80",
    ],
)
def test_an_address_outside_is_refused(stage: Servers, target: ScriptedOrigin, where: str) -> None:
    """In every spelling. The log names it; the client only learns that the origin is not allowed."""
    where = where.format(port=target.address.rpartition(":")[2])
    outcome = _sent(stage, target, where)
    assert (outcome.status, outcome.reason) == (502, "edge: origin not allowed")
    assert "worker_origins" in outcome.record["detail"] or "one of the site's origins" in outcome.record["detail"]
    assert outcome.record["id"] in outcome.body
    assert where.rpartition(":")[0] not in outcome.body


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "localhost."])
def test_a_name_that_resolves_outside_is_refused(stage: Servers, target: ScriptedOrigin, name: str) -> None:
    """Networks are allowed, so names may be resolved; but the addresses of this name are in none of them."""
    outcome = _sent(stage, target, f"{name}:{target.address.rpartition(':')[2]}")
    assert (outcome.status, outcome.reason) == (502, "edge: origin not allowed")
    assert "none of its addresses is in worker_origins" in outcome.record["detail"]
    assert "localhost" in outcome.record["origin"]


@pytest.mark.parametrize(
    "where",
    [
        "127.1:80",
        "0x7f.1:80",
        "0x7f000001:80",
        "2130706433:80",
        "0177.0.0.1:80",
        "127.0.0.1",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "127.0.0.1:80:80",
        "user@127.0.0.1:80",
        "ws://127.0.0.2@127.0.0.1:80",
        "ws://127.0.0.2#@127.0.0.1:80",
        "http://127.0.0.1:80",
        "127.0.0.2:80/../",
        "unix:relative",
        "[127.0.0.1]:80",
        "[::1]80",
        "",
        ":80",
        "*:80",
        "*.inside.example:80",
    ],
)
def test_an_old_form_of_an_address_is_a_500(stage: Servers, target: ScriptedOrigin, where: str) -> None:
    """An old form of an IPv4 address, which resolvers accept, is an error of the worker: a 500."""
    assert _sent(stage, target, where).status == 500


def test_a_name_that_cannot_be_resolved(stage: Servers, target: ScriptedOrigin) -> None:
    """An allowed name is resolved like that of any origin."""
    outcome = _sent(stage, target, "shard-1.inside.example:80")
    assert (outcome.status, outcome.reason) == (502, "origin unreachable")


def test_a_declared_origin(stage: Servers) -> None:
    origin, _ = stage
    outcome = attempt(stage, "/to", [("X-To", f"ws://{origin.address}/")])
    assert (outcome.status, outcome.record["origin"]) == (101, origin.address)


def test_a_declared_origin_under_another_name_is_refused(certificate: Certificate, target: ScriptedOrigin) -> None:
    """Without `worker_origins`, only the declared origin is allowed, as it is written, and no name is resolved."""
    with ScriptedOrigin() as origin, edged(origin.address, certificate, WORKER) as tunnel:
        port = origin.address.rpartition(":")[2]
        for where in (
            f"localhost:{port}",
            f"[::ffff:127.0.0.1]:{port}",
            f"wss://{origin.address}",
            "unknown.example:1",
        ):
            outcome = attempt((origin, tunnel), "/to", [("X-To", where)])
            assert (outcome.status, outcome.reason) == (502, "edge: origin not allowed")
            assert "neither an origin of the site nor in worker_origins" in outcome.record["detail"]
        assert attempt((origin, tunnel), "/to", [("X-To", origin.address)]).status == 101


@pytest.mark.parametrize(
    ("allowed", "hosts"),
    [
        ("127.0.0.0/8", ["127.0.0.1", "[::ffff:127.0.0.1]", "localhost", "LocalHost."]),
        ("localhost", ["localhost", "ws://localhost"]),
    ],
)
def test_allowed_origins_are_reached(
    certificate: Certificate, target: ScriptedOrigin, allowed: str, hosts: list[str]
) -> None:
    port = target.address.rpartition(":")[2]
    with edged("127.0.0.1:1", certificate, WORKER, site=f'worker_origins = ["{allowed}"]\n') as tunnel:
        for host in hosts:
            traffic = target.play(switching_protocols)
            with connect_tls(tunnel) as client:
                assert upgrade(client, "/to", [("X-To", f"{host}:{port}")]).status == 101
            assert traffic.record(tunnel)["verdict"] == "pass"


def test_a_unix_socket_that_is_declared(certificate: Certificate, tmp_path: Path) -> None:
    def handler(sock: socket.socket) -> None:
        pytest.fail("the other one was reached")

    with ScriptedOrigin() as origin, RawOrigin(handler, path=tmp_path / "other.sock"):
        site = '[[sites.routes]]\npath = "/never"\norigins = ["unix:mine.sock"]\n'
        with edged(origin.address, certificate, WORKER, site=site) as tunnel:
            outcome = attempt((origin, tunnel), "/to", [("X-To", f"unix:{tmp_path}/other.sock")])
            assert outcome.reason == "edge: origin not allowed"
            declared = f"unix:{tunnel.folder}/mine.sock"
            assert attempt((origin, tunnel), "/to", [("X-To", declared)]).reason == "origin unreachable"


def test_allowed_origins_change_with_a_reload(certificate: Certificate, target: ScriptedOrigin) -> None:
    with edged("127.0.0.1:1", certificate, WORKER, site='worker_origins = ["127.0.0.0/8"]\n') as tunnel:
        there = [("X-To", target.address)]
        target.play(switching_protocols)
        with connect_tls(tunnel) as client:
            assert upgrade(client, "/to", there).status == 101
        narrower = config_for(
            "127.0.0.1:1", certificate, site='worker = "worker.py:fetch"\nworker_origins = ["10.0.0.0/8"]\n'
        )
        assert tunnel.reload(narrower) == ["site localhost: changed: worker_origins"]
        traffic = target.play(switching_protocols)
        with connect_tls(tunnel) as client:
            assert upgrade(client, "/to", there).status == 502
        assert traffic.connections == 0


# --- and no other hole ------------------------------------------------------------------------------------------------

HOSTILE = (
    "a\r\nX-Injected: 1",
    "a\nX-Injected: 1",
    "a\rX-Injected: 1",
    "a\0b",
    "\r\n\r\nGET / HTTP/1.1\r\n",
    "a\x1bb",
    "a\x7f",
)


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("how", ["user?u=", "field?f=", "query?q=", "host?h=", "reply?l=", "protocol?s="])
def test_no_value_can_split_the_head(stage: Servers, how: str, value: str) -> None:
    """A client's value that the worker decodes cannot end a line. It is a 500, and no origin is connected to."""
    if "\0" in value:  # the firewall's own, before the worker
        assert attempt(stage, f"/{how}{quote(value)}").status == 400
        return
    outcome = attempt(stage, f"/{how}{quote(value)}")
    assert (outcome.status, outcome.reason) == (500, "edge: worker failed")
    assert "X-Injected" not in str(outcome.headers)
    assert "Injected" not in outcome.body


@pytest.mark.parametrize("value", [value for value in HOSTILE if "\0" not in value])
def test_no_path_can_split_the_request_line(stage: Servers, value: str) -> None:
    """A path may contain anything: it is escaped."""
    outcome = attempt(stage, f"/path?p=/{quote(value)}")
    assert outcome.status == 101
    line, *fields = outcome.head.split(b"\r\n")
    assert line == f"GET /{quote(value, safe='/:')}?p=/{quote(value)} HTTP/1.1".encode()
    assert not [field for field in fields if field.lower().startswith(b"x-injected")]


@pytest.mark.parametrize(
    "name",
    [
        "Connection",
        "upgrade",
        "Keep-Alive",
        "Proxy-Connection",
        "TE",
        "Trailer",
        "Transfer-Encoding",
        "transfer_encoding",
        "Content-Length",
        "CONTENT_LENGTH",
        "Sec-WebSocket-Key",
        "Sec-WebSocket-Version",
        "Sec-WebSocket-Protocol",
        "sec_websocket_extensions",
        "Sec-WebSocket-Anything",
    ],
)
def test_fields_of_the_handshake_stay(stage: Servers, name: str) -> None:
    assert attempt(stage, f"/field?f={name}").status == 500


@pytest.mark.parametrize("forged", ["X-User_Id", "x_user-ID"])
def test_a_client_cannot_forge_a_set_field_in_another_spelling(certificate: Certificate, forged: str) -> None:
    """CGI and WSGI treat underscores as hyphens, and join fields whose names are then equal."""
    code = BY_PATH + "async def ann(request, env):\n    return request.forward(headers={'X-User-Id': 'ann'})\n"
    with ScriptedOrigin() as origin, edged(origin.address, certificate, code) as tunnel:
        head = attempt((origin, tunnel), "/ann", [(forged, "bob")]).head
        assert b"ann" in head
        assert b"bob" not in head
