"""tlstunnel.testing: the fixtures with which authors of edge workers test them."""

import contextlib
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tlstunnel.edge import ClientCertificate
from tlstunnel.testing import EdgeOrigin, EdgeTunnel, worker_request

pytest_plugins = ["tlstunnel.testing"]

Origins = Callable[[], EdgeOrigin]
Tunnels = Callable[..., EdgeTunnel]

WORKER = """
import json, logging, os, signal

from tlstunnel.edge import Reply

async def setup(config):
    return config

async def fetch(request, env):
    match request.path:
        case "/config":
            return Reply(400, json.dumps(env))
        case "/told":
            logging.getLogger(__name__).info("told %s", request.client_address)
            return Reply(403, "grüße", {"X-Host": request.host, "X-Site": request.site})
        case "/end":
            os.kill(os.getppid(), signal.SIGKILL)
        case "/else":
            return request.forward(origin=env["else"], path="/new", headers={"X-Request-Id": "mine"})
        case "/raise":
            raise LookupError("of the worker")
    return request

async def unset(request, env):
    return Reply(400, json.dumps(env))

async def leaves(request):
    return request
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("edge") / "worker.py"
    file.write_text(WORKER)
    return str(file)


@pytest.fixture(scope="module")
def tunnel(worker: str) -> Iterator[EdgeTunnel]:
    with EdgeTunnel(f"{worker}:fetch", names=["*.example.com"], site='http = "pass"') as tunnel:
        yield tunnel


def test_a_handshake_shows_what_reached_the_origin(tunnel: EdgeTunnel) -> None:
    answer = tunnel.handshake(
        "/chat?room=1",
        headers=[("X-A", "1"), ("x-a", "2")],
        subprotocols=["chat", "else"],
        messages=["hello", b"\0\xff"],
    )
    assert (answer.status, answer.body, answer.messages) == (101, "", ("hello", b"\0\xff"))
    assert answer.headers["sec-websocket-protocol"] == "chat"
    assert answer.request is not None
    assert answer.request is tunnel.origin.requests[-1]
    assert answer.request.target == "/chat?room=1"
    assert answer.request.headers.getall("X-A") == ["1", "2"]
    assert answer.request.head.startswith(b"GET /chat?room=1 HTTP/1.1\r\nHost: localhost\r\n")
    assert answer.request.head.endswith(b"\r\n\r\n")
    assert answer.record["id"] == answer.request.headers["X-Request-Id"]
    assert answer.record["origin"] == tunnel.origin.address


def test_a_refusal_shows_that_nothing_did(tunnel: EdgeTunnel) -> None:
    answer = tunnel.handshake("/told", client_address="127.0.0.7", host="a.example.com")
    assert (answer.status, answer.body, answer.request, answer.messages) == (403, "grüße", None, ())
    assert (answer.headers["X-Host"], answer.headers["X-Site"]) == ("a.example.com", "*.example.com")
    assert (answer.record["client"], answer.record["sni"]) == ("127.0.0.7", "a.example.com")
    assert tunnel.wait_for("told 127.0.0.7")["level"] == "info"


def test_a_message_may_be_large(tunnel: EdgeTunnel) -> None:
    message = "x" * (4 << 20)
    assert tunnel.handshake(messages=[message, ""]).messages == (message, "")


def test_any_client_can_use_it(tunnel: EdgeTunnel) -> None:
    with connect(tunnel.uri, ssl=tunnel.context, proxy=None, max_size=None) as client:
        for message in ("hello", b"\0" * 100_000, ["in ", "parts"]):
            client.send(message)
            assert client.recv() == ("".join(message) if isinstance(message, list) else message)
        assert client.ping().wait(5)
    assert tunnel.ca.read_text().startswith("-----BEGIN CERTIFICATE-----")


def test_a_plain_request_reaches_the_origin_too(tunnel: EdgeTunnel) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"https://localhost:{tunnel.port}/page", context=tunnel.context)
    with caught.value:
        assert caught.value.code in {400, 426}
    assert tunnel.origin.requests[-1].target == "/page"


def test_waiting_for_a_record_has_a_timeout(tunnel: EdgeTunnel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlstunnel.testing.program.TIMEOUT", 0.05)
    with pytest.raises(
        AssertionError, match=r"(?s)no record 'nothing' with .* within 0.05 s; its log:.*ready"
    ) as caught:
        tunnel.wait_for("nothing", id="7")
    assert "tlstunnel/testing/" not in str(caught.getrepr(style="short", funcargs=False))


def test_a_failing_worker_is_found_in_the_log(tunnel: EdgeTunnel) -> None:
    answer = tunnel.handshake("/raise")
    assert answer.status == 500
    assert "LookupError: of the worker" in tunnel.wait_for("edge worker failed", id=answer.record["id"])["exception"]


def test_a_worker_may_choose_another_origin(worker: str, edge_tunnel: Tunnels, edge_origin: Origins) -> None:
    first, other = edge_origin(), edge_origin()
    allowed = edge_tunnel(f"{worker}:fetch", config={"else": other.address}, origins=[first], worker_origins=[other])
    answer = allowed.handshake("/else?a=b", messages=["hello"])
    assert (answer.status, answer.messages, first.requests) == (101, ("hello",), [])
    assert answer.request is other.requests[0]
    assert (answer.request.target, answer.request.headers["X-Request-Id"]) == ("/new?a=b", "mine")
    assert answer.record["origin"] == other.address
    forbidden = edge_tunnel(f"{worker}:fetch", config={"else": "192.0.2.1:80"}, origins=[first.address])
    assert (forbidden.handshake("/else").status, forbidden.handshake("/").status) == (502, 101)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"text": 'a "b" \\ \n ü 🚇 \x7f', "a key.with dots": 1, "": "empty"},
        {"numbers": [1, -2.5, 1e30], "truths": [True, False], "nested": {"deep": [{"er": []}]}, "tuple": (1,)},
    ],
)
def test_a_worker_gets_its_configuration(worker: str, config: dict[str, Any], edge_tunnel: Tunnels) -> None:
    answer = edge_tunnel(f"{worker}:fetch", config=config).handshake("/config")
    assert json.loads(answer.body) == json.loads(json.dumps(config))


@pytest.mark.parametrize(
    ("reference", "options", "said"),
    [
        ("fetsh", {}, r"there is no fetsh in \S+/worker.py"),
        ("leaves", {}, r"expected async def leaves\(request, env\)"),
        ("fetch", {"site": "worker_timeot = '1s'"}, 'did you mean "worker_timeout"'),
        ("fetch", {"top": "broken ["}, "tlstunnel.toml:2"),
    ],
)
def test_a_start_that_fails_reports_why(
    worker: str, edge_tunnel: Tunnels, reference: str, options: dict[str, str], said: str
) -> None:
    with pytest.raises(AssertionError, match=rf"(?s)the tunnel did not start.* its log:\n.*{said}"):
        edge_tunnel(f"{worker}:{reference}", **options)


def test_a_tunnel_that_does_not_exit_cleanly_fails_the_test(worker: str) -> None:
    def test() -> None:
        with EdgeTunnel(f"{worker}:fetch") as tunnel:
            with contextlib.suppress(AssertionError, OSError):  # the serving process may be quicker
                tunnel.handshake("/end")
            tunnel._program.process.wait()

    with pytest.raises(AssertionError, match=r"(?s)the tunnel exited with -9; its log:\n.*ready"):
        test()


def test_an_error_of_the_test_takes_precedence_over_the_tunnels(worker: str) -> None:
    def test() -> None:
        with EdgeTunnel(f"{worker}:fetch") as tunnel:
            tunnel._program.process.kill()
            raise KeyError("of the test")

    with pytest.raises(KeyError, match="of the test"):
        test()


def test_an_origin_closes_its_connections_and_accepts_no_more() -> None:
    with contextlib.ExitStack() as stack:
        origin = stack.enter_context(EdgeOrigin())
        with connect(f"ws://{origin.address}/", proxy=None) as client:
            client.send("hello")
            assert client.recv() == "hello"
            stack.close()
            with pytest.raises(ConnectionClosed):
                client.recv(timeout=10)
    with pytest.raises(OSError, match="refused"), connect(f"ws://{origin.address}/", proxy=None):
        pass


# --- worker_request


def test_worker_request_returns_what_a_worker_gets() -> None:
    request = worker_request(
        "GET /chat/%C3%BC?x=1&x=2",
        headers=[("Cookie", "sid=7"), ("X-A", "1"), ("X-A", "2")],
        subprotocols=["chat", "else"],
        client_address="192.0.2.1",
        site="*.example.com",
        client_certificate=ClientCertificate("CN=ops", b"DER"),
    )
    assert (request.path, request.raw_path, request.query.getall("x")) == ("/chat/ü", "/chat/%C3%BC", ["1", "2"])
    assert (request.cookies["sid"], request.headers.getall("x-a")) == ("7", ["1", "2"])
    assert request.subprotocols == ("chat", "else")
    assert (request.client_address, request.site, request.host) == ("192.0.2.1", "*.example.com", "www.example.com")
    assert request.client_certificate == ClientCertificate("CN=ops", b"DER")
    assert (request.id, request.tls.version, request.tls.server_name) == ("0123456789abcdef", "TLSv1.3", request.host)
    forwarded = request.forward(origin="shard-1:3000", headers={"X-A": "3"}, subprotocols=["else"])
    assert (forwarded.origin, forwarded.headers.getall("X-A")) == ("shard-1:3000", ["3"])
    assert forwarded.subprotocols == ("else",)


def test_worker_request_needs_nothing() -> None:
    request = worker_request()
    assert (request.path, request.site, request.client_address) == ("/", "localhost", "127.0.0.1")
    assert (request.client_certificate, request.subprotocols, dict(request.cookies)) == (None, (), {})
    assert worker_request(headers={"Host": "other.example"}).host == "other.example"


@pytest.mark.parametrize(
    ("text", "headers", "said"),
    [
        ("/chat", {}, "expected a method and a target"),
        ("GET chat", {}, "refuses this with 400: the request target must be a path"),
        ("POST /", {}, "refuses this with 405"),
        ("GET /", {"Upgrade": "h2c"}, "refuses this with 426"),
        ("GET /", {"Host": "a b"}, "refuses this with 400"),
        ("GET /", {"X-A": "1\r\n y"}, "refuses this with 400"),
    ],
)
def test_worker_request_refuses_what_no_worker_would_see(text: str, headers: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        worker_request(text, headers=headers)


# --- in another project


THEIRS = """
from tlstunnel.testing import EdgeTunnel, worker_request

pytest_plugins = ["tlstunnel.testing"]


async def env_less(request, env):
    return request


def test_by_file(edge_tunnel):
    assert edge_tunnel("edge/chat.py:fetch").handshake(messages=["hello"]).messages == ("hello",)


def test_by_module(edge_tunnel):
    assert edge_tunnel("edge.chat:fetch", config={"user": "7"}).handshake().request.headers["X-User"] == "7"


def test_of_the_function():
    import asyncio
    from edge.chat import fetch
    request = asyncio.run(fetch(worker_request("GET /chat"), {"user": "8"}))
    assert request.headers["X-User"] == "8"


def test_that_fails(edge_tunnel):
    assert edge_tunnel("edge/chat.py:fetch").handshake("/sorry").status == 101


def test_of_a_missing_worker(edge_tunnel):
    edge_tunnel("edge/chat.py:fetsh")
"""

CHAT = """
import logging
from pathlib import Path

async def setup(config):
    assert Path("edge/chat.py").exists(), "it runs in the folder of the tests"
    return config

async def fetch(request, env):
    if request.path == "/sorry":
        logging.getLogger(__name__).info("a line that helps")
        raise RuntimeError("of the worker")
    return request.forward(headers={"X-User": env.get("user", "")})
"""


def test_another_project_uses_it_as_a_plugin(tmp_path: Path) -> None:
    (tmp_path / "edge").mkdir()
    (tmp_path / "edge" / "chat.py").write_text(CHAT)
    (tmp_path / "test_chat.py").write_text(THEIRS)
    command = [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--color=no", "--timeout=60"], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    said = done.stdout + done.stderr
    assert re.search(r"= 2 failed, 3 passed in ", said), said
    assert "assert 500 == 101" in said
    assert "a line that helps" in said
    assert '"event":"edge worker failed"' in said.replace('": "', '":"')
    assert re.search(r"AssertionError: the tunnel did not start .*\n.*edge worker .*: there is no fetsh in ", said), (
        said
    )
    assert "tlstunnel/testing/" not in said, "the report ends in the code of the test"
