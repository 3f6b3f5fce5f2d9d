"""A site's edge worker sees each upgrade request after the firewall and before the origin, and decides about it.

It can forward the request as it is, changed or elsewhere, or refuse it; and it sees nothing but the request.
"""

import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import (
    Certificate,
    RawOrigin,
    WebsocketsOrigin,
    accept_upgrade,
    client_context,
    connect_tcp,
    connect_tls,
    handshake_request,
    read_response,
    receive_exactly,
    switching_protocols,
    upgrade,
)
from tests.pki import Authority, cert_pem
from tests.promises.edged import BY_PATH, attempt, edged, reply_json
from tests.promises.firewalled import Servers
from tests.promises.scripted_origin import SMUGGLED, ScriptedOrigin, record_of
from tests.promises.wire import parse_response, read_until_end, send_request
from tlstunnel.sockets.proxy_protocol import write_v2

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
PROXY = "127.0.0.9"

WORKER = (
    BY_PATH.replace('"""Call', 'met.append(request.id)\n    """Call')
    + '''
met = []


async def setup(config):
    return config


async def seen(request, env):
    """Reply with the requests that it has seen so far."""
    return Reply(400, json.dumps(met))


async def logged(request, env):
    return request.forward(log={"room": request.query["room"], "seats": 7, "id": "forged"})


async def full(request, env):
    return Reply(403, log={"why": "no seat"})


async def facts(request, env):
    certificate = request.client_certificate
    return Reply(400, json.dumps({
        "method": request.method,
        "path": request.path,
        "raw_path": request.raw_path,
        "query": [*request.query.items()],
        "headers": [*request.headers.items()],
        "users": request.headers.getall("x-USER", []),
        "cookies": {**request.cookies},
        "subprotocols": request.subprotocols,
        "host": request.host,
        "client_address": request.client_address,
        "tls": [request.tls.version, request.tls.cipher, request.tls.server_name, request.tls.ja4],
        "certificate": certificate and [certificate.subject, certificate.der.hex()],
        "site": request.site,
        "id": request.id,
        "origin": request.origin,
        "env": env,
    }))


async def changed(request, env):
    return request.forward(
        path="/chat room/ü",
        query={"room": ["1", "2"], "name": "a&b"},
        headers={"x-user": "7", "X-Several": ["a", "b"], "Host": "inside.example", "X-Forwarded-Proto": "wss"},
        remove_headers=["Cookie", "x-forwarded-host", "Forwarded"],
        subprotocols=["chat"],
    )


async def elsewhere(request, env):
    return request.forward(origin=env["other"])


async def routed(request, env):
    return request.forward(path="/other/" + request.path)


async def refused(request, env):
    return Reply(
        int(request.query["status"]), "sign in first: ü\\n", {"Set-Cookie": ["a=1", "b=2"], "WWW-Authenticate": "Basic"}
    )


async def picture(request, env):
    return Reply(403, b"\\x00\\xff\\r\\n\\r\\n", {"content-type": "image/png"})


async def unmodified(request, env):
    return Reply(304, headers={"ETag": '"1"'})


async def protocols(request, env):
    *tokens, kept = request.subprotocols
    return request.forward(subprotocols=[kept], headers={"Authorization": "Bearer " + tokens[0]})


def all_of(thing, depth=0):
    """Iterate over all values reachable from a request, except through a module or a class."""
    yield thing
    if depth < 8 and not isinstance(thing, (type, type(json))):
        inner = [getattr(thing, name, None) for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        inner += [*getattr(thing, "__dict__", {}).values()]
        inner += [*thing.items()] if hasattr(thing, "items") else []
        inner += thing if isinstance(thing, (tuple, list, set, frozenset)) else []
        for one in inner:
            yield from all_of(one, depth + 1)


async def everything(request, env):
    text = " ".join(str(one) for one in all_of(request) if isinstance(one, (bytes, str, bytearray)))
    return Reply(400, json.dumps(text)) if "refuse" in request.query else request.forward(headers={"X-All": text})
'''
)
RULES = """
[[sites.rules]]
name = "closed"
when = 'path.startsWith("/closed")'
action = "block"
[[sites.rate_limits]]
name = "once"
limit = "1/day"
when = 'path == "/asis/limited"'
"""


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Path, Path]]:
    """An authority of clients, and one client's pair."""
    folder, authority = tmp_path_factory.mktemp("people"), Authority("people")
    (folder / "ca.pem").write_bytes(cert_pem(authority.cert))
    return folder / "ca.pem", authority.pair(folder, "ann", "ann")


@pytest.fixture(scope="module")
def other() -> Iterator[ScriptedOrigin]:
    with ScriptedOrigin() as other:
        yield other


@pytest.fixture(scope="module")
def stage(certificate: Certificate, other: ScriptedOrigin, people: tuple[Path, tuple[Path, Path]]) -> Iterator[Servers]:
    site = (
        f'http = "pass"\nworker_config = {{ other = "{other.address}" }}\nblock_addresses = ["127.0.0.66"]\n'
        f'client_ca = "{people[0]}"\nclient_auth = "request"\n'
        f'[[sites.routes]]\npath = "/other"\norigins = ["{other.address}"]\n{RULES}'
    )
    with (
        ScriptedOrigin() as origin,
        edged(origin.address, certificate, WORKER, top=f'trusted_proxies = ["{PROXY}"]\n', site=site) as tunnel,
    ):
        yield origin, tunnel


# --- its place --------------------------------------------------------------------------------------------------------


def test_the_worker_is_not_called_for_what_the_firewall_refuses(stage: Servers) -> None:
    """Rules, rate limits, malformed requests and unknown hosts are refused before it."""
    assert attempt(stage, "/asis/limited").status == 101
    refused = [
        (403, attempt(stage, "/closed")),
        (403, attempt(stage, "/closed/asis")),
        (429, attempt(stage, "/asis/limited")),
        (421, attempt(stage, request=handshake_request("/asis", host="other.example"))),
        (400, attempt(stage, "/asis/%zz")),
        (426, attempt(stage, request=handshake_request("/asis").replace(b"Version: 13", b"Version: 12"))),
    ]
    assert [outcome.status for _, outcome in refused] == [status for status, _ in refused]
    met = reply_json(stage, "/seen")
    assert met
    assert not {outcome.record["id"] for _, outcome in refused}.intersection(met)


def test_a_refused_request_reaches_no_origin(stage: Servers, other: ScriptedOrigin) -> None:
    """`attempt` checks that the site's origin was not connected to; here also the other's."""
    traffic = other.play(switching_protocols)
    outcome = attempt(stage, "/refused?status=401")
    assert (outcome.status, outcome.reason, outcome.record["origin"]) == (401, "edge: reply", "")
    assert outcome.body == "sign in first: ü\n"
    assert traffic.connections == 0


def test_it_is_called_once_per_request(stage: Servers) -> None:
    before = reply_json(stage, "/seen")
    record = attempt(stage, "/asis").record
    after = reply_json(stage, "/seen")
    assert after[len(before) : -1] == [record["id"]]


def test_it_is_not_called_for_plain_requests(stage: Servers) -> None:
    """With `http = "pass"`."""
    origin, tunnel = stage
    before = reply_json(stage, "/seen")
    traffic = origin.play(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\npage", then="end")
    answer = send_request(tunnel, b"GET /refused?status=401 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (answer.status, answer.body) == (200, b"page")
    assert traffic.heads[0].startswith(b"GET /refused?status=401 HTTP/1.1\r\n")
    assert len(reply_json(stage, "/seen")) == len(before) + 1
    record = record_of(tunnel, _id_in(traffic.heads[0]))
    assert "edge" not in record


def _id_in(head: bytes) -> str:
    return head.partition(b"\r\nX-Request-Id: ")[2].partition(b"\r\n")[0].decode()


# --- what it can do ---------------------------------------------------------------------------------------------------

SENT = (
    ("Cookie", "sid=5"),
    ("X-User", "forged"),
    ("x_user", "forged too"),
    ("X-Kept", "a  b"),
    ("Sec-WebSocket-Protocol", "token.7, chat"),
    ("sec-websocket-protocol", "third"),
)


def test_a_request_forwarded_unchanged(stage: Servers) -> None:
    """The origin gets exactly the bytes that it would get without a worker."""
    outcome = attempt(stage, request=handshake_request("/asis/a%20b?x=%41&y", headers=SENT, key=KEY))
    assert outcome.head.decode("latin-1").split("\r\n") == [
        "GET /asis/a%20b?x=%41&y HTTP/1.1",
        "Host: localhost",
        f"Sec-WebSocket-Key: {KEY}",
        "Sec-WebSocket-Version: 13",
        "Cookie: sid=5",
        "X-User: forged",
        "x_user: forged too",
        "X-Kept: a  b",
        "Sec-WebSocket-Protocol: token.7, chat",
        "sec-websocket-protocol: third",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "X-Forwarded-For: 127.0.0.1",
        "X-Forwarded-Proto: https",
        "X-Forwarded-Host: localhost",
        'Forwarded: for=127.0.0.1;proto=https;host="localhost"',
        f"X-Request-Id: {outcome.record['id']}",
        "",
        "",
    ]
    assert outcome.record["edge"] == "forwarded"


def test_a_request_forwarded_with_changes(stage: Servers) -> None:
    """Byte by byte: what it sets replaces the client's fields, also those spelled with an underscore."""
    outcome = attempt(stage, request=handshake_request("/changed?room=9", headers=SENT, key=KEY))
    assert outcome.head.decode("latin-1").split("\r\n") == [
        "GET /chat%20room/%C3%BC?room=1&room=2&name=a%26b HTTP/1.1",
        "Host: inside.example",
        f"Sec-WebSocket-Key: {KEY}",
        "Sec-WebSocket-Version: 13",
        "X-Kept: a  b",
        "Sec-WebSocket-Protocol: chat",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "X-Forwarded-For: 127.0.0.1",
        f"X-Request-Id: {outcome.record['id']}",
        "x-user: 7",
        "X-Several: a",
        "X-Several: b",
        "X-Forwarded-Proto: wss",
        "",
        "",
    ]
    assert outcome.record["path"] == "/changed"


def test_a_request_forwarded_to_another_origin(stage: Servers, other: ScriptedOrigin) -> None:
    """To a declared origin that it chooses, here that of a route."""
    origin, tunnel = stage
    mine, its = origin.play(switching_protocols), other.play(switching_protocols)
    with connect_tls(tunnel) as client:
        assert upgrade(client, "/elsewhere").status == 101
    record = its.record(tunnel)
    assert record["origin"] == other.address
    assert (mine.connections, its.connections) == (0, 1)


def test_the_changed_path_selects_the_route(stage: Servers, other: ScriptedOrigin) -> None:
    _, tunnel = stage
    its = other.play(switching_protocols)
    with connect_tls(tunnel) as client:
        assert upgrade(client, "/routed").status == 101
    assert its.heads[0].startswith(b"GET /other//routed HTTP/1.1\r\n")
    assert its.record(tunnel)["origin"] == other.address


@pytest.mark.parametrize(
    ("status", "phrase"), [(302, "Found"), (401, "Unauthorized"), (499, "Refused"), (599, "Refused")]
)
def test_its_reply_arrives_whole(stage: Servers, status: int, phrase: str) -> None:
    answer = send_request(stage[1], handshake_request(f"/refused?status={status}"))
    head, _, body = answer.raw.partition(b"\r\n\r\n")
    assert head.decode().split("\r\n") == [
        f"HTTP/1.1 {status} {phrase}",
        "Content-Length: 18",
        "Connection: close",
        "Content-Type: text/plain; charset=utf-8",
        "Set-Cookie: a=1",
        "Set-Cookie: b=2",
        "WWW-Authenticate: Basic",
        f"X-Request-Id: {answer.headers['X-Request-Id']}",
    ]
    assert body == "sign in first: ü\n".encode()


def test_a_reply_of_bytes_and_one_without_a_body(stage: Servers) -> None:
    picture = send_request(stage[1], handshake_request("/picture"))
    assert (picture.status, picture.body) == (403, b"\x00\xff\r\n\r\n")
    assert picture.headers.get_all("Content-Type") == ["image/png"]
    unmodified = send_request(stage[1], handshake_request("/unmodified"))
    assert (unmodified.status, unmodified.body, unmodified.headers["ETag"]) == (304, b"", '"1"')
    assert unmodified.headers["Content-Length"] is None
    assert unmodified.raw.endswith(b"\r\n\r\n")


# --- what it sees -----------------------------------------------------------------------------------------------------


def test_the_request_as_the_client_sent_it(stage: Servers) -> None:
    """Repeated fields are kept, names match in any case, and it sees what the firewall compares."""
    cookies = [("Cookie", 'sid="5"; b=2'), ("Cookie", "sid=6")]
    sent = [("X-User", "a"), ("x-user", "b"), *cookies, ("Sec-WebSocket-Protocol", "v1, v2"), ("X-Bytes", "J\xfcrgen")]
    found = reply_json(stage, "/facts/%41/b?q=1&q=%C3%BC&r=a+b", sent)
    assert found["method"] == "GET"
    assert (found["path"], found["raw_path"]) == ("/facts/A/b", "/facts/%41/b")
    assert found["query"] == [["q", "1"], ["q", "ü"], ["r", "a b"]]
    assert found["users"] == ["a", "b"]
    assert [value for name, value in found["headers"] if name.lower() == "cookie"] == ['sid="5"; b=2', "sid=6"]
    assert ["X-Bytes", "J\xfcrgen"] in found["headers"]
    assert ["Host", "localhost"] in found["headers"]
    assert found["cookies"] == {"sid": "5", "b": "2"}
    assert found["subprotocols"] == ["v1", "v2"]
    assert (found["host"], found["site"], found["origin"]) == ("localhost", "localhost", None)
    assert set(found["env"]) == {"other"}


def test_the_client_behind_a_proxy_and_without_one(stage: Servers) -> None:
    """The address as in the log and for lists: behind a trusted proxy, the one that the proxy names."""
    said = [("X-Forwarded-For", "198.51.100.7")]
    assert reply_json(stage, "/facts", said, ip=PROXY)["client_address"] == "198.51.100.7"
    assert reply_json(stage, "/facts", said, ip="127.0.0.3")["client_address"] == "127.0.0.3"


def test_the_client_that_a_proxy_header_names(certificate: Certificate) -> None:
    top = 'proxy_protocol = "required"\ntrusted_proxies = ["127.0.0.1"]\n'
    with edged("127.0.0.1:1", certificate, WORKER, top=top) as tunnel, connect_tcp(tunnel) as plain:
        plain.sendall(write_v2(("2001:db8::7", 4711), ("2001:db8::1", 443)))
        with client_context(tunnel).wrap_socket(plain, server_hostname="localhost") as client:
            client.sendall(handshake_request("/facts", headers=[("X-Forwarded-For", "198.51.100.1")]))
            assert json.loads(parse_response(read_until_end(client)).body)["client_address"] == "2001:db8::7"


def test_its_id_is_that_of_the_record_and_the_origin(stage: Servers) -> None:
    """The id of a trusted proxy, if it sends one; otherwise the tunnel's own."""
    outcome = attempt(stage, "/facts")
    assert json.loads(outcome.body)["id"] == outcome.record["id"] == outcome.headers["X-Request-Id"]
    given = attempt(stage, "/facts", [("X-Request-Id", "of-the-proxy.1")], ip=PROXY)
    assert json.loads(given.body)["id"] == given.record["id"] == given.headers["X-Request-Id"] == "of-the-proxy.1"
    forged = attempt(stage, "/facts", [("X-Request-Id", "forged")])
    assert json.loads(forged.body)["id"] == forged.record["id"] != "forged"
    forwarded = attempt(stage, "/asis")
    assert _id_in(forwarded.head) == forwarded.record["id"] == reply_json(stage, "/seen")[-2]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_clients_tls(stage: Servers, version: ssl.TLSVersion) -> None:
    context = client_context(stage[1])
    context.minimum_version = context.maximum_version = version
    outcome = attempt(stage, "/facts", context=context)
    tls_version, cipher, server_name, ja4 = json.loads(outcome.body)["tls"]
    assert tls_version == {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}[version.name]
    assert (cipher, ja4) == (outcome.record["cipher"], outcome.record["ja4"])
    assert server_name == "localhost"
    assert len(ja4.split("_")) == 3


def test_the_clients_certificate(stage: Servers, people: tuple[Path, tuple[Path, Path]]) -> None:
    """Subject and DER of the verified certificate; None for a client without one."""
    assert reply_json(stage, "/facts")["certificate"] is None
    context = client_context(stage[1])
    context.load_cert_chain(*people[1])
    der = ssl.PEM_cert_to_DER_cert(people[1][0].read_text())
    # The second one resumes the first one's session.
    for _ in range(2):
        assert reply_json(stage, "/facts", context=context)["certificate"] == ["CN=ann", der.hex()]


# --- subprotocols -----------------------------------------------------------------------------------------------------


def test_a_token_in_a_subprotocol_is_removed(certificate: Certificate) -> None:
    """Client and origin agree on one of the rest, as negotiated by independent libraries."""
    with (
        WebsocketsOrigin(subprotocols=["secret-token", "chat"]) as origin,
        edged(origin.address, certificate, WORKER) as tunnel,
        connect_tls(tunnel) as client,
    ):
        answer = upgrade(client, "/protocols", [("Sec-WebSocket-Protocol", "secret-token, chat")])
        assert (answer.status, answer.headers["Sec-WebSocket-Protocol"]) == (101, "chat")
        client.sendall(b"\x82\x84\0\0\0\0ping")
        assert receive_exactly(client, 6) == b"\x82\x04ping"
        assert origin.requests[0].headers.get_all("Sec-WebSocket-Protocol") == ["chat"]
        assert origin.requests[0].headers["Authorization"] == "Bearer secret-token"


@pytest.mark.parametrize(("chosen", "status"), [("chat", 101), ("token", 502)])
def test_an_origin_cannot_choose_a_removed_subprotocol(stage: Servers, chosen: str, status: int) -> None:
    origin, tunnel = stage
    origin.play(lambda request: switching_protocols(request, [("Sec-WebSocket-Protocol", chosen)]))
    with connect_tls(tunnel) as client:
        assert upgrade(client, "/protocols", [("Sec-WebSocket-Protocol", "token, chat")]).status == status


# --- what it cannot ---------------------------------------------------------------------------------------------------


def test_it_never_sees_bytes_after_the_request(stage: Servers) -> None:
    """Nothing reachable from the request contains them, and only the origin gets them, after the 101."""
    origin, tunnel = stage
    traffic = origin.play(switching_protocols, then="end")
    with connect_tls(tunnel) as client:
        client.sendall(handshake_request("/everything", headers=[("X-Marker", "here")]) + SMUGGLED)
        assert read_response(client).status == 101
        client.unwrap()
    assert traffic.surplus_at_end() == SMUGGLED
    assert b"X-All: " in traffic.heads[0]
    assert b"here" in traffic.heads[0].partition(b"X-All: ")[2]
    assert b"/internal/secrets" not in traffic.heads[0]


def test_bytes_after_a_refused_request_are_discarded(stage: Servers) -> None:
    outcome = attempt(stage, request=handshake_request("/everything?refuse") + SMUGGLED)
    assert outcome.status == 400
    assert "/internal/secrets" not in outcome.body
    assert "/everything" in outcome.body


def test_it_never_sees_a_message(certificate: Certificate) -> None:
    """Messages bypass it both ways: it is called once, and a request that it keeps shows nothing of them."""
    with RawOrigin(_chatty) as origin, edged(origin.address, certificate, WORKER) as tunnel:
        with connect_tls(tunnel) as client:
            assert upgrade(client, "/asis").status == 101
            for _ in range(100):
                client.sendall(b"\x82\x84\0\0\0\0ping")
                assert receive_exactly(client, 10) == b"\x82\x84\0\0\0\0ping"
        met = json.loads(send_request(tunnel, handshake_request("/seen")).body)
        assert len(met) == 2


def _chatty(sock: socket.socket) -> None:
    accept_upgrade(sock)
    while some := sock.recv(65536):
        sock.sendall(some)


# --- a wss:// origin --------------------------------------------------------------------------------------------------


def test_it_may_choose_a_wss_origin(certificate: Certificate, tmp_path: Path) -> None:
    """Its certificate is verified like that of the site's origins: by `origin_ca`, for the chosen name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert, certificate.key)

    def secure(sock: socket.socket) -> None:
        try:
            with contexts.pop(0).wrap_socket(sock, server_side=True) as inside:
                _chatty(inside)
        except ssl.SSLError:
            return  # the tunnel did not trust it

    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    stranger.load_cert_chain(*Authority("stranger").pair(tmp_path, "stranger"))
    contexts = [context, stranger]
    code = BY_PATH + "async def to(request, env):\n    return request.forward(origin=request.query['where'])\n"
    site = f'worker_origins = ["localhost"]\norigin_ca = "{certificate.ca}"\n'
    with RawOrigin(secure) as origin, edged("127.0.0.1:1", certificate, code, site=site) as tunnel:
        where = f"wss://localhost:{origin.port}"
        with connect_tls(tunnel) as client:
            assert upgrade(client, f"/to?where={where}").status == 101
            client.sendall(b"ping")
            assert receive_exactly(client, 4) == b"ping"
        assert tunnel.wait_records()[0]["origin"] == where
        refused = send_request(tunnel, handshake_request(f"/to?where={where}"))
        assert refused.status == 502
        assert record_of(tunnel, refused.headers)["reason"] == "origin certificate from unknown issuer"


def test_it_adds_fields_to_the_record_which_replace_none(stage: Servers) -> None:
    outcome = attempt(stage, "/logged?room=%1b%5b2J%22%0a")
    assert outcome.record["edge_log"] == {"room": '\\x1b[2J"\\n', "seats": 7, "id": "forged"}
    assert outcome.record["id"] != "forged"
    assert attempt(stage, "/full").record["edge_log"] == {"why": "no seat"}


TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


def test_the_trace_of_a_trusted_proxy_is_logged_and_any_is_passed_on(stage: Servers) -> None:
    trusted = attempt(stage, "/asis", [("Traceparent", TRACEPARENT)], ip=PROXY)
    other = attempt(stage, "/asis", [("Traceparent", TRACEPARENT)])
    assert trusted.record["trace"] == TRACE
    assert "trace" not in other.record
    for outcome in (trusted, other):
        assert f"Traceparent: {TRACEPARENT}".encode() in outcome.head
