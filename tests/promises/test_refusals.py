"""A client that gets no tunnel learns why: a status, a sentence, and an id that is also in the log; never a reset."""

import base64
import contextlib
import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import (
    Certificate,
    RawOrigin,
    Tunnel,
    connect_tcp,
    connect_tls,
    eventually,
    handshake_request,
    read_response,
    receive_all,
    switching_protocols,
    upgrade,
)
from tests.promises.scripted_origin import ScriptedOrigin, record_of
from tests.promises.wire import (
    NO_APPLICATION_PROTOCOL,
    PROTOCOL_VERSION,
    UNRECOGNIZED_NAME,
    MemoryTlsClient,
    Response,
    alert,
    client_hello,
    parse_response,
    send_request,
    unverified_context,
)
from tlstunnel.certificates import issue
from tlstunnel.sockets.closing import DISCARD_BYTES

Stage = tuple[ScriptedOrigin, Tunnel]
KEY = base64.b64encode(b"sixteen bytes ok").decode()
RIGHT = {
    "Host": "localhost",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": KEY,
    "Sec-WebSocket-Version": "13",
}


@pytest.fixture(scope="module")
def stage(certificate: Certificate) -> Iterator[Stage]:
    with ScriptedOrigin() as origin, Tunnel(origin.address, certificate, arguments=("--http", "refuse")) as tunnel:
        yield origin, tunnel


def _request(line: str = "GET /chat HTTP/1.1", more: str = "", **changed: str | None) -> bytes:
    """A valid handshake except for ``line``, fields changed (or omitted, with None), and ``more`` at its end."""
    fields = RIGHT | {name.replace("_", "-"): value for name, value in changed.items()}
    given = "".join([f"{name}: {value}\r\n" for name, value in fields.items() if value is not None])
    return f"{line}\r\n{given}{more}\r\n".encode("latin-1")


def _head_of(size: int) -> bytes:
    """A valid handshake of this many bytes."""
    bare = _request(more="X-Filler: \r\n")
    return _request(more=f"X-Filler: {'a' * (size - len(bare))}\r\n")


def _fields(count: int) -> bytes:
    return _request(more="X-More: a\r\n" * (count - len(RIGHT)))


ALLOW = {"Allow": "GET"}
UPGRADE = {"Upgrade": "websocket"}
VERSION = UPGRADE | {"Sec-WebSocket-Version": "13"}

# name: the request, the status, what else the response contains, and the record's reason
REFUSED: dict[str, tuple[bytes, int, dict[str, str], str]] = {
    "POST": (_request("POST /chat HTTP/1.1"), 405, ALLOW, "method"),
    "PUT": (_request("PUT /chat HTTP/1.1"), 405, ALLOW, "method"),
    "OPTIONS": (_request("OPTIONS * HTTP/1.1"), 405, ALLOW, "method"),
    "get": (_request("get /chat HTTP/1.1"), 405, ALLOW, "method"),
    "HTTP/1.0": (_request("GET /chat HTTP/1.0"), 505, {}, "HTTP version"),
    "HTTP/1.9": (_request("GET /chat HTTP/1.9"), 505, {}, "HTTP version"),
    "HTTP/2.0": (_request("GET /chat HTTP/2.0"), 505, {}, "HTTP version"),
    "HTTP/2": (_request("GET /chat HTTP/2"), 400, {}, "malformed head"),
    "no Upgrade": (_request(Upgrade=None), 426, UPGRADE, "no upgrade"),
    "no Upgrade, no Connection": (_request(Upgrade=None, Connection=None), 426, UPGRADE, "no upgrade"),
    "another Upgrade": (_request(Upgrade="h2c"), 426, UPGRADE, "no upgrade"),
    "no Connection": (_request(Connection=None), 400, {}, "Connection"),
    "another Connection": (_request(Connection="keep-alive"), 400, {}, "Connection"),
    "no version": (_request(Sec_WebSocket_Version=None), 426, VERSION, "WebSocket version"),
    "version 8": (_request(Sec_WebSocket_Version="8"), 426, VERSION, "WebSocket version"),
    "two versions": (_request(more="Sec-WebSocket-Version: 13\r\n"), 426, VERSION, "WebSocket version"),
    "no key": (_request(Sec_WebSocket_Key=None), 400, {}, "Sec-WebSocket-Key"),
    "two keys": (_request(more=f"Sec-WebSocket-Key: {KEY}\r\n"), 400, {}, "Sec-WebSocket-Key"),
    "empty key": (_request(Sec_WebSocket_Key=""), 400, {}, "Sec-WebSocket-Key"),
    "key of 15 bytes": (_request(Sec_WebSocket_Key=base64.b64encode(bytes(15)).decode()), 400, {}, "Sec-WebSocket-Key"),
    "key of 17 bytes": (_request(Sec_WebSocket_Key=base64.b64encode(bytes(17)).decode()), 400, {}, "Sec-WebSocket-Key"),
    "key without padding": (_request(Sec_WebSocket_Key=KEY.rstrip("=")), 400, {}, "Sec-WebSocket-Key"),
    "key not in base64": (_request(Sec_WebSocket_Key="?" * 22 + "=="), 400, {}, "Sec-WebSocket-Key"),
    "no Host": (_request(Host=None), 400, {}, "malformed head"),
    "two Hosts": (_request(more="Host: localhost\r\n"), 400, {}, "malformed head"),
    "empty Host": (_request(Host=""), 400, {}, "Host"),
    "Host with a space": (_request(Host="local host"), 400, {}, "Host"),
    "Host with user": (_request(Host="user@localhost"), 400, {}, "Host"),
    "Host with a scheme": (_request(Host="https://localhost"), 400, {}, "Host"),
    "Host that is only a port": (_request(Host=":8443"), 400, {}, "Host"),
    "Host with no such port": (_request(Host="localhost:65536"), 400, {}, "Host"),
    "Host with half an address": (_request(Host="[::1"), 400, {}, "Host"),
    "Host with no address": (_request(Host="[1::2::3]"), 400, {}, "Host"),
    "a body": (_request(more="Content-Length: 3\r\n") + b"abc", 400, {}, "body"),
    "a chunked body": (_request(more="Transfer-Encoding: chunked\r\n") + b"0\r\n\r\n", 400, {}, "body"),
    "absolute form, wss": (_request("GET wss://localhost/chat HTTP/1.1"), 400, {}, "target form"),
    "absolute form, invalid host": (_request("GET https://a@localhost/ HTTP/1.1"), 400, {}, "Host"),
    "authority form": (_request("GET localhost:443 HTTP/1.1"), 400, {}, "target form"),
    "asterisk form": (_request("GET * HTTP/1.1"), 400, {}, "target form"),
    "a fragment": (_request("GET /chat#room HTTP/1.1"), 400, {}, "target form"),
    "a space in the target": (_request("GET /chat room HTTP/1.1"), 400, {}, "malformed head"),
    "a target that is not ASCII": (_request("GET /ch\xe4t HTTP/1.1"), 400, {}, "malformed head"),
    "a bare LF": (_request().replace(b"\r\nUpgrade", b"\nUpgrade"), 400, {}, "bare LF"),
    "LF throughout": (_request().replace(b"\r\n", b"\n"), 400, {}, "bare LF"),
    "a folded field": (_request(more="X-A: b\r\n c\r\n"), 400, {}, "folded field"),
    "a control character": (_request(more="X-A: \x1b[31m\r\n"), 400, {}, "control character"),
    "a field without a colon": (_request(more="what is this\r\n"), 400, {}, "malformed head"),
    "no HTTP": (b"hello\r\n\r\n", 400, {}, "malformed head"),
    "a WebSocket frame": (b"\x81\x85\x00\x00\x00\x00hello", 400, {}, "malformed head"),
    "TLS in TLS": (client_hello(), 400, {}, "malformed head"),
    "a head of 16 385 bytes": (_head_of(16_385), 431, {}, "head too large"),
    "a head of 100 000 bytes": (_head_of(100_000), 431, {}, "head too large"),
    "a line without an end": (b"GET /" + b"a" * 20_000, 431, {}, "head too large"),
    "101 fields": (_fields(101), 431, {}, "too many fields"),
}


def _as_all_refusals_are(tunnel: Tunnel, response: Response, status: int, reason: str) -> None:
    assert response.status == status
    assert response.raw.startswith(b"HTTP/1.1 %d " % status)
    assert "close" in [token.strip() for token in response.headers["Connection"].split(",")]
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert int(response.headers["Content-Length"]) == len(response.body) > 0
    assert response.raw.endswith(b"\r\n\r\n" + response.body), "something follows the body"
    assert response.headers["X-Request-Id"] in response.body.decode("utf-8")
    record = record_of(tunnel, response.headers)
    assert (record["status"], record["verdict"], record["reason"]) == (status, "refused", reason), record
    assert record["ended_by"] == "tunnel"
    assert (record["client"], record["origin"]) == ("127.0.0.1", "")


def _ask_with_more_than_is_drained(tunnel: Tunnel, request: bytes) -> Response:
    """As `send_request`, but the tunnel may reset the connection before everything has been sent."""
    tls = MemoryTlsClient(server_name="localhost")
    with connect_tcp(tunnel) as client:
        client.sendall(tls.step())
        tls.finish(client)
        with contextlib.suppress(ConnectionError):  # what it sent remains readable
            client.sendall(tls.encrypt(request))
        return parse_response(tls.read_all(client))


@pytest.mark.parametrize(("request_", "status", "fields", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_each_refusal_over_the_wire(
    stage: Stage, request_: bytes, status: int, fields: dict[str, str], reason: str
) -> None:
    origin, tunnel = stage
    traffic = origin.play(switching_protocols)
    asking = send_request if len(request_) <= DISCARD_BYTES else _ask_with_more_than_is_drained
    response = asking(tunnel, request_)
    _as_all_refusals_are(tunnel, response, status, reason)
    for name, value in fields.items():
        assert response.headers.get_all(name) == [value]
    if "Upgrade" in fields:
        assert response.headers["Connection"] == "close, Upgrade"  # RFC 9110 section 7.8
    assert traffic.connections == 0


ACCEPTED = {
    "other cases": _request(Upgrade="WebSocket", Connection="UPGRADE"),
    "beside others": _request(Upgrade="h2c, websocket", Connection="keep-alive, Upgrade"),
    "on two lines": _request(Connection="keep-alive", more="Connection: Upgrade\r\n"),
    "length 0": _request(more="Content-Length: 0\r\n"),
    "Host with a port": _request(Host="localhost:8443"),
    "Host with an empty port": _request(Host="localhost:"),
    "Host in other cases": _request(Host="LocalHost"),
    "IPv6 Host": _request(Host="[::1]:8443"),
    "a query": _request("GET /chat?room=1&token=%20 HTTP/1.1"),
    "two slashes": _request("GET //chat HTTP/1.1"),
    "absolute form": _request("GET https://localhost/chat HTTP/1.1"),
    "absolute form, another Host": _request("GET HTTP://LocalHost:443 HTTP/1.1", Host="other.example"),
    "an empty line first": b"\r\n" + _request(),
    "a field that is not ASCII": _request(more="X-Name: J\xfcrgen\r\n"),
    "a head of 16 384 bytes": _head_of(16_384),
}


@pytest.mark.parametrize("request_", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_requests_at_the_limits_are_not_refused(stage: Stage, request_: bytes) -> None:
    origin, tunnel = stage
    origin.play(switching_protocols)
    with connect_tls(tunnel) as client:
        client.sendall(request_)
        assert read_response(client).status == 101


def test_100_fields_are_not_too_many(certificate: Certificate) -> None:
    """Not by `ScriptedOrigin`: with the tunnel's fields they are more than Python's own HTTP parser accepts."""

    def decline(sock: socket.socket) -> None:
        received = b""
        while not received.endswith(b"\r\n\r\n"):
            received += sock.recv(65_536)
        assert received.count(b"X-More: a\r\n") == 100 - len(RIGHT)
        sock.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    with RawOrigin(decline) as origin, Tunnel(origin.address, certificate) as tunnel:
        assert send_request(tunnel, _fields(100)).status == 404


def test_a_slow_head_is_a_408(certificate: Certificate) -> None:
    """Single bytes do not extend the deadline: the head has to be complete in time."""
    with (
        ScriptedOrigin() as origin,
        Tunnel(origin.address, certificate, settings='[timeouts]\nrequest = "300ms"\n') as tunnel,
    ):
        traffic = origin.play(switching_protocols)
        for sent in (b"", b"G", _request()[:-2]):
            with connect_tls(tunnel) as client:
                client.sendall(sent)
                response = parse_response(receive_all(client))
            _as_all_refusals_are(tunnel, response, 408, "request timed out")
        assert traffic.connections == 0


# --- a response, and not a reset -------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [0, 1000, 60_000, 200 * 1024], ids=lambda size: f"{size}-behind")
def test_the_response_is_read_whatever_was_sent_after_the_request(stage: Stage, behind: int) -> None:
    """Everything is sent before anything is read, as clients do that write and read in turn."""
    _, tunnel = stage
    response = _ask_with_more_than_is_drained(tunnel, _request("POST /chat HTTP/1.1") + b"b" * behind)
    _as_all_refusals_are(tunnel, response, 405, "method")


@pytest.mark.parametrize("behind", [0, 60_000, 200 * 1024], ids=lambda size: f"{size}-behind")
@pytest.mark.parametrize("method", [b"GET", b"POST", b"OPTIONS"])
def test_plain_http_gets_a_hint_to_use_tls(stage: Stage, method: bytes, behind: int) -> None:
    _, tunnel = stage
    with connect_tcp(tunnel) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(method + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"b" * behind)
        received = _received(client, tolerant=behind > 65_536)
    response = parse_response(received)
    assert response.status == 400
    assert b"wss://" in response.body
    assert response.headers["Connection"] == "close"


def _received(client: socket.socket, *, tolerant: bool) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError) if tolerant else contextlib.nullcontext():
        while some := client.recv(65_536):
            received += some
    return received


@pytest.mark.parametrize(
    "garbage",
    [b"SSH-2.0-OpenSSH_9.2p1\r\n", b"\x00" * 100, b"\x80\x2e\x01\x00\x02", b"hello\n", b"\x16\x02\x00" + bytes(50)],
    ids=["ssh", "zeros", "ssl2", "lower-case", "no-tls-version"],
)
def test_other_bytes_are_closed_without_a_response(stage: Stage, garbage: bytes) -> None:
    _, tunnel = stage
    with connect_tcp(tunnel) as client:
        client.sendall(garbage)
        assert receive_all(client) == b""


# --- alerts ----------------------------------------------------------------------------------------------------------


def _alerted(tunnel: Tunnel, hello: bytes) -> bytes:
    with connect_tcp(tunnel) as client:
        client.sendall(hello)
        return receive_all(client)


def _hello_of_tls_1_1() -> bytes:
    """Python no longer creates one: legacy_version 0x0302, one suite, no extensions."""
    body = b"\x03\x02" + bytes(range(32)) + b"\x00" + b"\x00\x02\xc0\x09" + b"\x01\x00"
    message = b"\x01" + len(body).to_bytes(3) + body
    return b"\x16\x03\x01" + len(message).to_bytes(2) + message


def test_tls_1_1_alone_is_a_protocol_version_alert(stage: Stage) -> None:
    assert _alerted(stage[1], _hello_of_tls_1_1()) == alert(PROTOCOL_VERSION)


@pytest.mark.parametrize("offered", [("h2",), ("h3", "h2"), ("http/1.0",), ("HTTP/1.1",)], ids=str)
def test_alpn_without_http_1_1_is_a_no_application_protocol_alert(stage: Stage, offered: tuple[str, ...]) -> None:
    hello = client_hello(context=unverified_context(alpn=offered))
    assert _alerted(stage[1], hello) == alert(NO_APPLICATION_PROTOCOL)


@pytest.mark.parametrize(
    ("offered", "agreed"), [((), None), (("http/1.1",), "http/1.1"), (("h2", "http/1.1"), "http/1.1")]
)
def test_alpn_with_http_1_1_or_none_is_served(stage: Stage, offered: tuple[str, ...], agreed: str | None) -> None:
    origin, tunnel = stage
    origin.play(switching_protocols)
    with connect_tls(tunnel, context=unverified_context(alpn=offered)) as client:
        assert client.selected_alpn_protocol() == agreed
        assert upgrade(client).status == 101


# --- sites -----------------------------------------------------------------------------------------------------------


def _sites(folder: Path, origin: ScriptedOrigin, default: str | None) -> str:
    """A configuration with two sites, each with a certificate of its own, one of them the default if it is named."""
    sites = {"a": ["a.example", "*.a.example"], "b": ["b.example"]}
    text = 'listen = ["127.0.0.1:0"]\n'
    for site, names in sites.items():
        issued = issue.create(names, folder)
        text += f'[[sites]]\nnames = {names}\norigins = ["{origin.address}"]\n'
        text += f'cert = "{issued.cert}"\nkey = "{issued.key}"\n'
        text += "default = true\n" if site == default else ""
    return text


@pytest.fixture(scope="module", params=["a", None], ids=["default", "no-default"])
def two_sites(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stage, bool]]:
    folder = tmp_path_factory.mktemp("sites")
    with ScriptedOrigin() as origin:
        config = _sites(folder, origin, request.param)
        served = Certificate(folder / "ca.pem", folder / "a.example.pem", folder / "a.example-key.pem")
        with Tunnel(None, served, config=config) as tunnel:
            yield (origin, tunnel), request.param is not None


@pytest.mark.parametrize(
    ("name", "certificate_for"),
    [
        ("a.example", "a.example"),
        ("A.Example", "a.example"),
        ("chat.a.example", "*.a.example"),
        ("b.example", "b.example"),
    ],
)
def test_sni_chooses_the_certificate(two_sites: tuple[Stage, bool], name: str, certificate_for: str) -> None:
    (origin, tunnel), _ = two_sites
    origin.play(switching_protocols)
    with connect_tls(tunnel, server_name=name) as client:
        assert ("DNS", certificate_for) in dict(client.getpeercert() or {})["subjectAltName"]
        assert upgrade(client, host=name).status == 101


@pytest.mark.parametrize("name", ["c.example", "x.b.example", "a.b.a.example", "example", "127.0.0.1.example"])
def test_a_name_of_no_site_is_an_unrecognized_name_alert(two_sites: tuple[Stage, bool], name: str) -> None:
    (_, tunnel), _ = two_sites
    assert _alerted(tunnel, client_hello(name)) == alert(UNRECOGNIZED_NAME)


def test_a_client_without_sni_gets_the_default_site_or_an_alert(two_sites: tuple[Stage, bool]) -> None:
    (origin, tunnel), has_default = two_sites
    origin.play(switching_protocols)
    if not has_default:
        assert _alerted(tunnel, client_hello(None)) == alert(UNRECOGNIZED_NAME)
        return
    with connect_tls(tunnel, server_name=None, context=unverified_context()) as client:
        assert upgrade(client, host="a.example").status == 101


@pytest.mark.parametrize(
    ("sni", "host", "status"),
    [
        ("a.example", "b.example", 421),
        ("a.example", "c.example", 421),
        ("a.example", "127.0.0.1", 421),
        ("a.example", "x.y.a.example", 421),
        ("b.example", "x.b.example", 421),
        ("a.example", "A.EXAMPLE:8443", 101),
        ("a.example", "chat.a.example", 101),
        ("chat.a.example", "a.example.", 101),
    ],
)
def test_host_is_a_name_of_the_site_or_it_is_a_421(
    two_sites: tuple[Stage, bool], sni: str, host: str, status: int
) -> None:
    (origin, tunnel), _ = two_sites
    traffic = origin.play(switching_protocols)
    with connect_tls(tunnel, server_name=sni) as client:
        client.sendall(handshake_request(host=host))
        answer = read_response(client)
        assert answer.status == status
        if status == 421:
            record = record_of(tunnel, answer.headers)
            assert (record["status"], record["reason"], record["sni"]) == (421, "misdirected", sni)
            assert traffic.connections == 0


def test_an_unknown_name_is_reported_as_such_by_a_real_client(two_sites: tuple[Stage, bool]) -> None:
    (_, tunnel), _ = two_sites
    with pytest.raises(ssl.SSLError, match=r"(?i)unrecognized.name"):
        connect_tls(tunnel, server_name="c.example").close()


# --- what is logged of them -------------------------------------------------------------------------------------------


def test_the_log_has_nothing_of_a_malformed_head(certificate: Certificate) -> None:
    """Heads contain tokens and passwords, also when a line is malformed, and so do origins' responses."""
    answers = [
        b"HTTP/1.1 hush\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nSet-Cookie : sid=hush\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhush\r\n",
    ]

    def respond(sock: socket.socket) -> None:
        received = b""
        while not received.endswith(b"\r\n\r\n"):
            received += sock.recv(65_536)
        sock.sendall(answers.pop())

    rule = '[[rules]]\nname = "r"\nwhen = \'duration(headers["x-token"]) > duration(query[headers["x-key"]][0])\'\n'
    with (
        RawOrigin(respond) as origin,
        Tunnel(
            None,
            certificate,
            config=f'listen = ["127.0.0.1:0"]\n{rule}action = "block"\n'
            f'[[sites]]\norigins = ["{origin.address}"]\nweb_origins = ["same"]\n'
            f'cert = "{certificate.cert}"\nkey = "{certificate.key}"\n',
        ) as tunnel,
    ):
        for head in (
            _request("GET /chat?token=hush x HTTP/1.1"),
            _request("GET /chat?token=hush"),
            _request("GET /chat#token=hush HTTP/1.1"),
            _request("GET https://user:hush@localhost/ HTTP/1.1"),
            _request("GET ftp://user:hush@localhost/ HTTP/1.1"),
            _request("GET user:hush@localhost HTTP/1.1"),
            _request(more="Authorization : Bearer hush\r\n"),
            _request(more="Bearer hush\r\n"),
            _request(more="Content-Length: hush\r\n"),
            _request(Host="hush hush"),
            _request(more="Origin: https://a.example/?hush\r\n"),
        ):
            assert send_request(tunnel, head).status in {400, 403}
        for more in ("X-Token: hush\r\n", "X-Token: 1s\r\nX-Key: hush\r\n", ""):
            with contextlib.suppress(ssl.SSLEOFError, ConnectionResetError):  # a response is cut off
                send_request(tunnel, _request(more=more))
        assert len(tunnel.wait_records(14)) == 14
        assert "malformed field" in tunnel.log
        assert "hush" not in tunnel.log


def test_a_refusal_close_notify_and_fin_are_one_segment(stage: Stage) -> None:
    """A packet less for each request that is refused, of which an attack consists."""
    _, tunnel = stage
    client = MemoryTlsClient()
    with connect_tcp(tunnel) as sock:
        sock.sendall(client.step())
        client.finish(sock)
        # The tunnel waits for the request, so the session ticket has a segment of its own.
        eventually(lambda: _count_segments(sock) == 2)
        sock.sendall(client.encrypt(_request("POST /chat HTTP/1.1")))
        assert client.read_all(sock).startswith(b"HTTP/1.1 405 ")
        assert sock.recv(1) == b""
        assert _count_segments(sock) == 3


def _count_segments(sock: socket.socket) -> int:
    """Return how many segments with data have arrived: tcpi_data_segs_in of struct tcp_info (linux/tcp.h)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 156)
    return int.from_bytes(info[152:156], sys.byteorder)
