"""The check against real servers: a good one, and TLS servers that fail in every step."""

import base64
import contextlib
import hashlib
import ipaddress
import json
import re
import socket
import ssl
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from websockets import Subprotocol
from websockets.sync.server import ServerConnection, serve

from tests.pki import PREFERRED_GROUP
from tlstunnel.certificates import issue
from tlstunnel.check.results import CloseResult, DnsResult, PingResult, Step, TcpResult, TlsResult, UpgradeResult
from tlstunnel.check.steps import MAX_BODY, run
from tlstunnel.check.target import Target, Trust, check_subprotocols, parse_field
from tlstunnel.check.wire import get_sent_chain
from tlstunnel.check.words import explain_distrust
from tlstunnel.errors import CertificateError
from tlstunnel.escaping import printable
from tlstunnel.tls.server_hello import find_group

Handler = Callable[[Any], None]

SWITCH = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> issue.Issued:
    return issue.create([], tmp_path_factory.mktemp("check"))


@pytest.fixture(scope="module")
def trust(issued: issue.Issued) -> Trust:
    return Trust.load(issued.ca)


def server_context(cert: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["http/1.1"])
    return context


@contextlib.contextmanager
def serving(handler: Handler, context: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> Iterator[int]:
    """Run ``handler`` on each connection, after the TLS handshake if there is a context, and ignore its failures."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)

    def serve_all() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.settimeout(10)
                with contextlib.suppress(OSError), connection:
                    if context is None:
                        handler(connection)
                        continue
                    with context.wrap_socket(connection, server_side=True) as secured:
                        handler(secured)

    thread = threading.Thread(target=serve_all)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(15)
        listener.close()
        assert not thread.is_alive()


def steps(port: int, trust: Trust, host: str = "localhost", **options: Any) -> list[Step]:
    return list(run(Target.parse(f"wss://{host}:{port}/path?q=1"), trust, **options))


def failure(found: Sequence[Step]) -> tuple[str, str]:
    """Return the failed step's name and reason; the steps before it succeeded."""
    assert all(step.ok for step in found[:-1])
    assert found[-1].error is not None, found
    return found[-1].name, found[-1].error


def head(connection: Any) -> bytes:
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        piece = connection.recv(4096)
        assert piece
        data += piece
    return data


def token(request: bytes) -> str:
    key = re.search(rb"Sec-WebSocket-Key: (\S+)", request)
    assert key is not None
    accept = hashlib.sha1(key[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    return base64.b64encode(accept).decode()


def accept(connection: Any, more: str = "") -> None:
    request = head(connection)
    connection.sendall(f"{SWITCH}Sec-WebSocket-Accept: {token(request)}\r\n{more}\r\n".encode())


def frame(opcode: int, payload: bytes = b"", *, first: int = 0x80) -> bytes:
    if len(payload) < 126:
        return bytes([first | opcode, len(payload)]) + payload
    if len(payload) < 65_536:
        return bytes([first | opcode, 126]) + struct.pack("!H", len(payload)) + payload
    return bytes([first | opcode, 127]) + struct.pack("!Q", len(payload)) + payload


def read_frame(connection: Any) -> tuple[int, bytes]:
    def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = connection.recv(size - len(data))
            if not piece:
                raise ConnectionError
            data += piece
        return data

    first, length = exactly(2)
    mask = exactly(4)
    return first & 15, bytes(byte ^ mask[i % 4] for i, byte in enumerate(exactly(length & 127)))


def until_gone(connection: Any) -> None:
    while connection.recv(4096):
        pass


def answering(data: bytes) -> Handler:
    def handler(connection: Any) -> None:
        head(connection)
        connection.sendall(data)

    return handler


# --- success


@pytest.fixture(scope="module")
def good_server(issued: issue.Issued) -> Iterator[int]:
    def echo(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    context = server_context(issued.cert, issued.key)
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    with serve(echo, "127.0.0.1", 0, ssl=context, subprotocols=[Subprotocol("chat.v2"), Subprotocol("chat")]) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.socket.getsockname()[1]
        server.shutdown()
        thread.join(10)


def test_every_step_of_a_good_server(good_server: int, trust: Trust) -> None:
    started = time.perf_counter()
    found = steps(good_server, trust, subprotocols=["chat", "none.such"])
    assert [(step.name, step.error) for step in found] == [
        ("dns", None),
        ("tcp", None),
        ("tls", None),
        ("handshake", None),
        ("ping", None),
        ("close", None),
    ]
    assert 0 < sum(step.seconds for step in found) < time.perf_counter() - started
    dns, tcp, tls, handshake, ping, close = (step.result for step in found)
    assert isinstance(dns, DnsResult)
    assert "127.0.0.1" in dns.addresses
    assert isinstance(tcp, TcpResult)
    assert tcp.address == f"127.0.0.1:{good_server}"
    assert isinstance(tls, TlsResult)
    assert (tls.version, tls.group, tls.alpn, tls.unreadable) == ("TLSv1.3", PREFERRED_GROUP, "http/1.1", 0)
    assert tls.cipher is not None
    assert tls.cipher.startswith("TLS_")
    assert [certificate.is_ca for certificate in tls.chain] == [False, True]
    assert tls.chain[0].names == ("localhost", "127.0.0.1", "::1")
    assert isinstance(handshake, UpgradeResult)
    assert (handshake.status, handshake.reason, handshake.subprotocol) == (101, "Switching Protocols", "chat")
    assert handshake.extensions is not None
    assert handshake.extensions.startswith("permessage-deflate")
    assert ("Upgrade", "websocket") in handshake.fields
    assert isinstance(ping, PingResult)
    assert 0 < ping.round_trip <= found[4].seconds
    assert close == CloseResult(1000, "")


def test_an_abandoned_check_closes_its_connection(issued: issue.Issued, trust: Trust) -> None:
    gone = threading.Event()

    def handler(connection: Any) -> None:
        try:
            until_gone(connection)
        finally:
            gone.set()

    with serving(handler, server_context(issued.cert, issued.key)) as port:
        found = run(Target.parse(f"wss://localhost:{port}"), trust)
        assert [next(found).name for _ in range(3)] == ["dns", "tcp", "tls"]
        found.close()  # type: ignore[attr-defined]  # a generator, though its annotation is less specific
        assert gone.wait(10)


@pytest.mark.parametrize(
    ("version", "curve", "name"),
    [
        (ssl.TLSVersion.TLSv1_3, "prime256v1", "secp256r1"),  # a HelloRetryRequest: no client sends this share
        (ssl.TLSVersion.TLSv1_3, "X25519", "X25519"),
        (ssl.TLSVersion.TLSv1_2, "secp384r1", "secp384r1"),
    ],
)
def test_the_group(issued: issue.Issued, trust: Trust, version: ssl.TLSVersion, curve: str, name: str) -> None:
    context = server_context(issued.cert, issued.key)
    context.minimum_version = context.maximum_version = version
    try:
        context.set_ecdh_curve(curve)
    except ssl.SSLError:
        pytest.skip(f"this Python knows no curve {curve} to choose")  # 3.11.2
    with serving(answering(b""), context) as port:
        found = steps(port, trust)
    assert isinstance(found[2].result, TlsResult)
    assert found[2].result.group == name
    assert failure(found)[0] == "handshake"


def test_ipv6_literals_and_a_request_with_own_fields(issued: issue.Issued, trust: Trust) -> None:
    requests: list[bytes] = []

    def handler(connection: Any) -> None:
        requests.append(head(connection))

    with serving(handler, server_context(issued.cert, issued.key), "::1") as port:
        steps(port, trust, host="[::1]", fields=[("Origin", "https://a.example")], subprotocols=["a", "b"])
        steps(port, trust, host="[::1]", fields=[("Host", "other.example")])
    lines = requests[0].decode().split("\r\n")
    assert lines[0] == "GET /path?q=1 HTTP/1.1"
    assert lines[1] == f"Host: [::1]:{port}"
    assert "Origin: https://a.example" in lines
    assert "Sec-WebSocket-Protocol: a, b" in lines
    assert "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits" in lines
    assert requests[1].lower().count(b"host:") == 1
    assert b"Host: other.example" in requests[1]


def test_frames_before_the_pong_and_the_close(issued: issue.Issued, trust: Trust) -> None:
    heard: list[tuple[int, bytes]] = []
    deflated = zlib.compressobj(wbits=-15)
    message = deflated.compress(b"squeezed") + deflated.flush(zlib.Z_SYNC_FLUSH)[:-4]

    def handler(connection: Any) -> None:
        request = head(connection)
        accepted = f"Sec-WebSocket-Accept: {token(request)}\r\nSec-WebSocket-Extensions: permessage-deflate\r\n"
        # The first frames are in the segment of the head; an early hint comes before it.
        connection.sendall(
            f"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n{SWITCH}{accepted}X-Request-Id: abc\r\n\r\n".encode()
            + frame(1, message, first=0xC0)
            + frame(9, b"are you there")
            + frame(10, b"unasked")
        )
        heard.append(read_frame(connection))
        heard.append(read_frame(connection))
        payload = next(payload for opcode, payload in heard if opcode == 9)
        connection.sendall(frame(10, payload) + frame(2, bytes(300)))
        heard.append(read_frame(connection))
        connection.sendall(frame(9, b"late") + frame(8))
        until_gone(connection)

    with serving(handler, server_context(issued.cert, issued.key)) as port:
        found = steps(port, trust)
    assert found[-1].result == CloseResult(1005, "")
    assert isinstance(found[3].result, UpgradeResult)
    assert found[3].result.request_id == "abc"
    assert sorted(opcode for opcode, _ in heard) == [8, 9, 10]
    assert (10, b"are you there") in heard
    assert (8, b"\x03\xe8") in heard


# --- DNS and TCP


def test_a_name_that_does_not_resolve(trust: Trust) -> None:
    found = steps(443, trust, host="no-such-name.invalid")
    name, reason = failure(found)
    assert name == "dns"
    assert reason.startswith("no-such-name.invalid: ")
    assert found[0].result == DnsResult("no-such-name.invalid")


def test_messages_for_errors_of_the_resolver(monkeypatch: pytest.MonkeyPatch, trust: Trust) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", missing)
    assert failure(steps(443, trust)) == ("dns", "localhost: name not found")


def test_a_resolver_that_is_silent(monkeypatch: pytest.MonkeyPatch, trust: Trust) -> None:
    enough = threading.Event()

    def silent(*_: Any, **__: Any) -> None:
        enough.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "later")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    found = steps(443, trust, timeout=0.2)
    enough.set()
    assert failure(found) == ("dns", "localhost: the name server did not respond within 0.2 s")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_refused_port(trust: Trust) -> None:
    port = free_port()
    found = steps(port, trust, host="127.0.0.1")
    assert failure(found) == ("tcp", f"127.0.0.1:{port}: connection refused; is it running on that port?")
    assert isinstance(found[-1].result, TcpResult)
    assert found[-1].result.address is None


def test_the_next_address_is_tried(good_server: int, monkeypatch: pytest.MonkeyPatch, trust: Trust) -> None:
    def two(_host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    found = steps(good_server, trust, subprotocols=["chat"])
    assert found[1].result == TcpResult(
        f"127.0.0.1:{good_server}",
        ((f"127.0.0.2:{good_server}", "connection refused; is it running on that port?"),),
    )
    assert len(found) == 6


def test_a_port_that_drops_connections(trust: Trust) -> None:
    # Linux drops SYNs to a listener whose queue is full.
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        port = listener.getsockname()[1]
        started = time.monotonic()
        found = steps(port, trust, host="127.0.0.1", timeout=0.3)
    assert failure(found) == ("tcp", f"127.0.0.1:{port}: no response in time; does a firewall drop the packets?")
    assert time.monotonic() - started < 5


# --- TLS


def signed(folder: Path, name: str, names: Sequence[str], begins: timedelta, ends: timedelta) -> tuple[Path, Path]:
    """Create a certificate by the CA in ``folder``, valid from now + begins to now + ends."""
    ca = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    ca_key = load_pem_private_key((folder / "ca-key.pem").read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "leaf\x1b[2J")]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in names]), False)
    cert_path, key_path = folder / f"{name}.pem", folder / f"{name}-key.pem"
    cert_path.write_bytes(builder.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM))
    key_path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return cert_path, key_path


DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("names", "begins", "ends", "reason"),
    [
        (["localhost"], -9 * DAY, -DAY - DAY / 2, r"certificate CN=leaf\1B[2J expired 1 day ago"),
        (["localhost"], -9 * DAY, -3 * DAY - DAY / 2, r"certificate CN=leaf\1B[2J expired 3 days ago"),
        (["localhost"], DAY, 9 * DAY, "certificate is not valid yet: CN=leaf"),
        (["a.example", "b.example"], -DAY, DAY, "name mismatch: certificate is for a.example, b.example, not for loc"),
        ([], -DAY, DAY, "name mismatch: certificate is for no name, not for localhost"),
    ],
)
def test_an_invalid_certificate(
    tmp_path: Path, names: list[str], begins: timedelta, ends: timedelta, reason: str
) -> None:
    ca = issue.create([], tmp_path).ca
    context = server_context(*signed(tmp_path, "leaf", names, begins, ends))
    with serving(until_gone, context) as port:
        found = steps(port, Trust.load(ca))
    assert failure(found)[0] == "tls"
    assert failure(found)[1].startswith(reason)
    # The server's certificate is reported anyway.
    assert isinstance(found[-1].result, TlsResult)
    assert found[-1].result.version == "TLSv1.3"
    assert [certificate.names for certificate in found[-1].result.chain] == [tuple(names)]


def test_an_authority_that_is_not_trusted(issued: issue.Issued, tmp_path: Path) -> None:
    with serving(until_gone, server_context(issued.cert, issued.key)) as port:
        system = failure(steps(port, Trust.load(None)))
        other = failure(steps(port, Trust.load(issue.create([], tmp_path).ca)))
    assert system[0] == other[0] == "tls"
    assert re.fullmatch(
        "certificate not trusted: self-signed certificate in chain; pass --ca with the certificate of CN=tlstunnel.*",
        system[1],
    )
    assert re.fullmatch(
        f"certificate not trusted: self-signed certificate in chain; {re.escape(str(tmp_path))}/ca.pem "
        "does not contain that of CN=tlstunnel.*",
        other[1],
    )


def test_a_missing_issuer_and_a_self_signed_leaf(tmp_path: Path) -> None:
    ca = issue.create([], tmp_path).ca
    leaf, key = signed(tmp_path, "leaf", ["localhost"], -DAY, DAY)
    with serving(until_gone, server_context(leaf, key)) as port:
        missing = failure(steps(port, Trust.load(None)))
    with serving(until_gone, server_context(ca, tmp_path / "ca-key.pem")) as port:
        alone = failure(steps(port, Trust.load(None)))
    assert missing[1].startswith("certificate not trusted: its issuer is unknown")
    assert "pass --ca with the certificate of CN=tlstunnel test CA" in missing[1]
    assert alone[1].startswith("certificate not trusted: it is self-signed; pass --ca")


def test_a_certificate_refused_for_another_reason(tmp_path: Path) -> None:
    ca = issue.create([], tmp_path).ca
    trust = Trust.load(ca)
    trust.context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    with serving(until_gone, server_context(*signed(tmp_path, "leaf", ["localhost"], -DAY, DAY))) as port:
        assert failure(steps(port, trust)) == ("tls", "certificate not trusted: unable to get certificate CRL")


def test_the_chain_of_an_untrusted_server_that_is_gone(issued: issue.Issued) -> None:
    context, connections = server_context(issued.cert, issued.key), 0

    def once(connection: Any) -> None:
        nonlocal connections
        connections += 1
        if connections == 1:
            with context.wrap_socket(connection, server_side=True) as secured:
                until_gone(secured)

    with serving(once) as port:
        found = steps(port, Trust.load(None))
    assert failure(found)[1] == (
        "certificate not trusted: self-signed certificate in chain; pass --ca with the certificate of its authority "
        "(a second connection, to fetch the chain, failed)"
    )
    assert found[-1].result == TlsResult()


def test_expired_without_a_chain() -> None:
    error = ssl.SSLCertVerificationError()
    error.verify_code, error.verify_message = 10, "certificate has expired"
    assert explain_distrust(error, (), "a.example", None) == "certificate expired"


def test_alerts_have_names(issued: issue.Issued, trust: Trust) -> None:
    context = server_context(issued.cert, issued.key)
    context.sni_callback = lambda *_: ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
    with serving(until_gone, context) as port:
        assert failure(steps(port, trust)) == (
            "tls",
            "TLS alert unrecognized_name: the server has no site with this name",
        )
    context.sni_callback = lambda *_: ssl.ALERT_DESCRIPTION_ACCESS_DENIED
    with serving(until_gone, context) as port:
        assert failure(steps(port, trust)) == ("tls", "TLS alert access_denied")


def test_a_client_certificate_is_requested(issued: issue.Issued, trust: Trust) -> None:
    context = server_context(issued.cert, issued.key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(issued.ca)
    # In TLS 1.3 the alert comes after the client's last message; the server's reset may arrive before it is read.
    with serving(until_gone, context) as port:
        name, reason = failure(steps(port, trust))
    assert name == "handshake"
    assert "certificate_required: the server requires a client certificate" in reason


def test_plain_http_and_other_protocols(trust: Trust) -> None:
    def http(connection: Any) -> None:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    def ssh(connection: Any) -> None:
        connection.sendall(b"SSH-2.0-Open\x1b[2JSSH\r\n")
        until_gone(connection)

    def broken(connection: Any) -> None:
        connection.recv(4096)
        connection.sendall(b"\x16\x03\x03\x00\x04\x63\x00\x00\x00")
        until_gone(connection)

    with serving(http) as port:
        assert failure(steps(port, trust)) == ("tls", "the server speaks plain HTTP on this port, not TLS")
    with serving(ssh) as port:
        name, reason = failure(steps(port, trust))
        assert name == "tls"
        assert reason.startswith("the server does not speak TLS on this port: it begins with 'SSH-2.0-Open\\x1b[2JSSH")
    with serving(broken) as port:
        assert failure(steps(port, trust)) == ("tls", "TLS error: unexpected message")


def test_a_connection_closed_or_reset_or_silent_in_the_tls_handshake(trust: Trust) -> None:
    def close(connection: Any) -> None:
        connection.recv(4096)

    def reset(connection: Any) -> None:
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with serving(close) as port:
        assert failure(steps(port, trust)) == ("tls", "the server closed the connection during the TLS handshake")
    with serving(reset) as port:
        assert failure(steps(port, trust)) == (
            "tls",
            "connection lost during the TLS handshake: Connection reset by peer",
        )
    with serving(until_gone) as port:
        assert failure(steps(port, trust, timeout=1)) == (
            "tls",
            "the check timed out after 1 s, during the TLS handshake",
        )


# --- the handshake


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 403 Forbidden\r\nX-Request-Id: 7f\r\nContent-Length: 3\r\n\r\nno\n", "403 Forbidden (id 7f): no"),
        (b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 3\r\n\r\nup!", "426 Upgrade Required: up!"),
        (b"HTTP/1.1 400\r\n\r\nuntil\x1b]0;end\xff", "400: until\\x1b]0;end\ufffd"),
        (b"HTTP/1.1 502 Bad\x1bGateway\r\nContent-Length: 9\r\n\r\nshort", "502 Bad\\x1bGateway: short"),
        (b"HTTP/1.1 301 Moved\r\nLocation: /a\x80\r\nContent-Length: 0\r\n\r\n", "301 Moved, to /a\\x80"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n\\o\r\n0\r\n\r\n", "200 OK: \\\\o"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 9000\r\n\r\n" + b"x" * 9000, "500 Oh: " + "x" * 1024),
    ],
)
def test_refusals(issued: issue.Issued, trust: Trust, answer: bytes, reason: str) -> None:
    with serving(answering(answer), server_context(issued.cert, issued.key)) as port:
        found = steps(port, trust)
    assert failure(found) == ("handshake", f"the server responded with {reason}")
    assert isinstance(found[-1].result, UpgradeResult)
    assert len(found[-1].result.body) <= MAX_BODY


def test_a_refusal_whose_body_never_ends(issued: issue.Issued, trust: Trust) -> None:
    def handler(connection: Any) -> None:
        head(connection)
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 9\r\n\r\nwait")
        until_gone(connection)

    with serving(handler, server_context(issued.cert, issued.key)) as port:
        assert failure(steps(port, trust, timeout=2)) == ("handshake", "the server responded with 403 Forbidden: wait")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "the server closed the connection without a response to the handshake"),
        (b"HTTP/1.1 10", "the server closed the connection in the middle of its response to the handshake"),
        (b"\x1b[2Jhello\r\n\r\n", "the response is not HTTP/1.1: it begins with '\\x1b[2Jhello\\r\\n\\r\\n' ("),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000, "the response's head does not end within 65536 bytes"),
    ],
)
def test_invalid_responses(issued: issue.Issued, trust: Trust, answer: bytes, reason: str) -> None:
    with serving(answering(answer), server_context(issued.cert, issued.key)) as port:
        name, why = failure(steps(port, trust))
    assert name == "handshake"
    assert why.startswith(reason)


def test_an_endless_head_and_a_trickled_one(issued: issue.Issued, trust: Trust) -> None:
    def endless(connection: Any) -> None:
        head(connection)
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\n")
        while True:
            connection.sendall(b"X-More: and more\r\n" * 1000)

    def hints(connection: Any) -> None:
        head(connection)
        while True:
            connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")

    with serving(endless, server_context(issued.cert, issued.key)) as port:
        name, why = failure(steps(port, trust))
        assert (name, why) == ("handshake", "the response's head does not end within 65536 bytes")
    started = time.monotonic()
    with serving(hints, server_context(issued.cert, issued.key)) as port:
        name, why = failure(steps(port, trust, timeout=2))
        assert why == "the check timed out after 2 s, while waiting for the response to the handshake"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ("Connection: Upgrade\r\nSec-WebSocket-Accept: {token}\r\n", "without 'Upgrade: websocket'"),
        ("Upgrade: websocket\r\nSec-WebSocket-Accept: {token}\r\n", "without 'Connection: Upgrade'"),
        ("Upgrade: websocket\r\nConnection: Upgrade\r\n", "without Sec-WebSocket-Accept"),
        (
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: AAAA\r\n",
            "with a wrong Sec-WebSocket-Accept",
        ),
        (
            (
                "Upgrade: WebSocket\r\nConnection: keep-alive, upgrade\r\nSec-WebSocket-Accept: {token}\r\n"
                "Sec-WebSocket-Protocol: evil\r\n"
            ),
            "with a subprotocol that was not requested: evil",
        ),
        (
            (
                "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {token}\r\n"
                "Sec-WebSocket-Protocol: chat\r\nSec-WebSocket-Protocol: chat\r\n"
            ),
            "with a subprotocol that was not requested: chat, chat",
        ),
        (
            (
                "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {token}\r\n"
                "Sec-WebSocket-Extensions: x-own\r\n"
            ),
            "with extensions that were not requested or are malformed: x-own",
        ),
        (
            (
                "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {token}\r\n"
                "Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits\r\n"
            ),
            "with extensions that were not requested or are malformed: permessage-deflate; server_max_window_bits",
        ),
    ],
)
def test_an_invalid_101(issued: issue.Issued, trust: Trust, fields: str, reason: str) -> None:
    def handler(connection: Any) -> None:
        answer = fields.replace("{token}", token(head(connection)))
        connection.sendall(f"HTTP/1.1 101 Switching Protocols\r\n{answer}\r\n".encode())
        until_gone(connection)

    with serving(handler, server_context(issued.cert, issued.key)) as port:
        found = steps(port, trust, subprotocols=["chat"])
    assert failure(found) == ("handshake", f"101, but {reason}")
    assert isinstance(found[-1].result, UpgradeResult)


def test_a_reset_after_the_request(issued: issue.Issued, trust: Trust) -> None:
    def handler(connection: Any) -> None:
        head(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with serving(handler, server_context(issued.cert, issued.key)) as port:
        assert failure(steps(port, trust)) == (
            "handshake",
            "connection lost while waiting for the response to the handshake: Connection reset by peer",
        )


# --- ping and close


def after_accepting(behave: Handler) -> Handler:
    def handler(connection: Any) -> None:
        accept(connection)
        behave(connection)

    return handler


def sending(data: bytes) -> Handler:
    def behave(connection: Any) -> None:
        connection.sendall(data)
        until_gone(connection)

    return behave


def endless_data(connection: Any) -> None:
    chunk = frame(2, bytes(60_000))
    while True:
        connection.sendall(chunk)


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (lambda connection: None, "the server closed the connection before the pong"),
        (until_gone, "the check timed out after 2 s, while waiting for the pong"),
        (
            sending(frame(8, b"\x03\xf0go\x1baway")),
            "the server closed the WebSocket before the pong, code 1008 (go\\x1baway)",
        ),
        (
            sending(frame(8)),
            "the server closed the WebSocket before the pong, code 1005",
        ),
        (
            sending(frame(3, b"?")),
            "the server sent a broken frame before the pong: Invalid opcode 0x3",
        ),
    ],
)
def test_no_pong(issued: issue.Issued, trust: Trust, behave: Handler, reason: str) -> None:
    with serving(after_accepting(behave), server_context(issued.cert, issued.key)) as port:
        found = steps(port, trust, timeout=2 if "timed out" in reason else 10)
    assert failure(found) == ("ping", reason)


def test_endless_data_before_the_pong(issued: issue.Issued, trust: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlstunnel.check.steps.MAX_UNSOLICITED", 1_048_576)
    with serving(after_accepting(endless_data), server_context(issued.cert, issued.key)) as port:
        assert failure(steps(port, trust)) == ("ping", "the server sent 1 MiB before the pong")


def test_a_broken_record_while_waiting_for_the_pong(issued: issue.Issued, trust: Trust) -> None:
    def behave(connection: Any) -> None:
        with socket.socket(fileno=connection.detach()) as beneath:
            beneath.settimeout(10)
            beneath.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
            until_gone(beneath)

    with serving(after_accepting(behave), server_context(issued.cert, issued.key)) as port:
        name, reason = failure(steps(port, trust))
    assert name == "ping"
    assert reason.startswith("TLS error: ")
    assert reason.endswith(", while waiting for the pong")


def test_a_connection_that_ends_without_a_close(issued: issue.Issued, trust: Trust) -> None:
    def behave(connection: Any) -> None:
        _, payload = read_frame(connection)
        connection.sendall(frame(10, payload))
        read_frame(connection)

    with serving(after_accepting(behave), server_context(issued.cert, issued.key)) as port:
        assert failure(steps(port, trust)) == ("close", "the server closed the connection without a Close")


# --- values


@pytest.mark.parametrize(
    ("url", "host", "port", "resource", "authority"),
    [
        ("wss://localhost", "localhost", 443, "/", "localhost"),
        ("WSS://LocalHost:8443", "localhost", 8443, "/", "localhost:8443"),
        ("wss://a.example.:443/x?y=1", "a.example", 443, "/x?y=1", "a.example"),
        ("wss://a.example:?q", "a.example", 443, "/?q", "a.example"),
        ("wss://[::1]:8443/", "::1", 8443, "/", "[::1]:8443"),
        ("wss://127.0.0.1:1/%20ü", "127.0.0.1", 1, "/%20%C3%BC", "127.0.0.1:1"),
        ("wss://München.example/", "xn--mnchen-3ya.example", 443, "/", "xn--mnchen-3ya.example"),
        ("wss://my_host/", "my_host", 443, "/", "my_host"),
    ],
)
def test_urls(url: str, host: str, port: int, resource: str, authority: str) -> None:
    target = Target.parse(url)
    assert (target.host, target.port, target.resource, target.authority) == (host, port, resource, authority)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ws://localhost", "check needs a URL like wss:"),
        ("localhost:8443", "check needs a URL like wss:"),
        ("https://localhost", "check needs a URL like wss:"),
        ("wss://local host", "spaces or control"),
        ("wss://localhost/\n", "spaces or control"),
        ("wss://localhost/#", "no fragment"),
        ("wss://me:secret@localhost/", "no user"),
        ("wss://", "not HOST"),
        ("wss:///path", "not HOST"),
        ("wss://::1/", "not HOST"),
        ("wss://[::1]x/", "not HOST"),
        ("wss://a:b/", "not HOST"),
        ("wss://a:0/", "port"),
        ("wss://a:65536/", "port"),
        ("wss://[1.2.3.4]/", "not an IPv6 address"),
        ("wss://[fe80::1%25eth0]/", "zone"),
        ("wss://a..b/", "not a host name"),
        ("wss://-a/", "not a host name"),
        ("wss://" + "a." * 127 + "a/", "not a host name"),
        ("wss://ü" + "ü" * 70 + "/", "not a host name"),
        ("wss://./", "not a host name"),
    ],
)
def test_invalid_urls(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Target.parse(url)


@given(st.text())
def test_any_text_is_a_target_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        target = Target.parse(f"wss://{text}")
        assert target.resource.isascii()
        assert target.host
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(target.host)
            return
        assert target.host.encode("idna")


def test_fields() -> None:
    assert parse_field("Origin:https://a.example") == ("Origin", "https://a.example")
    assert parse_field("X-Empty: ") == ("X-Empty", "")
    for wrong in ("Origin", "A b: c", ": c", "Upgrade: h2c", "Sec-WebSocket-Key: a", "A: b\r\nC: d"):
        with pytest.raises(ValueError, match=r"header|set by|control"):
            parse_field(wrong)


def test_subprotocols() -> None:
    assert check_subprotocols(["a", "b"]) == ("a", "b")
    for wrong in (["a b"], [""], ["a", "a"]):
        with pytest.raises(ValueError, match=r"subprotocol's name|twice"):
            check_subprotocols(wrong)


def test_an_invalid_ca_file(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    with pytest.raises(CertificateError, match=re.escape(str(path))):
        Trust.load(path)
    path.write_text("nothing")
    with pytest.raises(CertificateError, match=re.escape(str(path))):
        Trust.load(path)


@given(st.text())
def test_printable_text_contains_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown).count("\\") == 2 * shown.count("\\")


@given(st.binary(max_size=200))
def test_any_bytes_are_accepted_when_looking_for_the_group(data: bytes) -> None:
    find_group(data)
    find_group(b"\x16\x03\x03" + struct.pack("!H", len(data)) + data)
    find_group(b"\x16\x03\x03" + struct.pack("!H", len(data) + 4) + b"\x02\0" + struct.pack("!H", len(data)) + data)


def handshake_record(kind: int, body: bytes) -> bytes:
    message = bytes([kind]) + len(body).to_bytes(3, "big") + body
    # One message over two records, as RFC 8446 section 5.1 allows.
    return b"".join(b"\x16\x03\x03" + struct.pack("!H", len(part)) + part for part in (message[:5], message[5:]))


def server_hello(extensions: bytes) -> bytes:
    body = b"\x03\x03" + bytes(32) + b"\x02ab" + b"\x13\x01\x00" + struct.pack("!H", len(extensions)) + extensions
    return handshake_record(2, body)


def test_groups_by_hand() -> None:
    versions = bytes.fromhex("002b00020304")
    hybrids = {"11eb": "SecP256r1MLKEM768", "11ec": "X25519MLKEM768", "11ed": "SecP384r1MLKEM1024"}
    for code, name in hybrids.items():
        assert find_group(server_hello(versions + bytes.fromhex(f"00330004{code}0000"))) == name
    assert find_group(server_hello(versions + bytes.fromhex("00330004fafa0000"))) == "0xfafa"
    assert find_group(server_hello(versions)) is None
    assert find_group(server_hello(versions) + handshake_record(12, b"\x03\x00\x18")) == "secp384r1"
    # TLS 1.2 with finite-field Diffie-Hellman: a 6144-bit prime's length begins with 3 too.
    assert find_group(handshake_record(12, b"\x03\x00\xff")) is None
    assert find_group(handshake_record(12, b"\x01\x00\xff")) is None


def test_the_chain_with_every_python() -> None:
    class Public:
        def get_unverified_chain(self) -> list[bytes]:
            return [b"leaf", b"ca"]

    class Certificate:
        def public_bytes(self, encoding: int) -> bytes:
            return b"der" if encoding == 2 else b"pem"

    class Beneath:
        def get_unverified_chain(self) -> list[Certificate]:
            return [Certificate()]

    class Older:
        def __init__(self, leaf: bytes | None, beneath: object) -> None:
            self._leaf = leaf
            self._sslobj = beneath

        def getpeercert(self, *, binary_form: bool) -> bytes | None:
            assert binary_form
            return self._leaf

    assert get_sent_chain(Public()) == [b"leaf", b"ca"]
    assert get_sent_chain(Older(b"leaf", Beneath())) == [b"der"]
    assert get_sent_chain(Older(b"leaf", None)) == [b"leaf"]
    assert get_sent_chain(Older(None, None)) == []


def test_facts_are_plain_values(good_server: int, trust: Trust) -> None:
    for step in steps(good_server, trust, subprotocols=["chat"]):
        assert step.result is not None
        json.dumps(asdict(step.result), default=str)
