"""TLS to a ``wss://`` origin: verified, and with the same promises as TLS with the client."""

import contextlib
import fcntl
import hashlib
import os
import random
import socket
import ssl
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from websockets.sync.client import connect as connect_websocket

from tests.harness import (
    TIMEOUT,
    Certificate,
    RawOrigin,
    Tunnel,
    WebsocketsOrigin,
    accept_token,
    client_context,
    connect_tls,
    eventually,
    receive_all,
    receive_exactly,
    require,
    reset,
    upgrade,
)
from tests.promises.both_ends import Threads, TlsEnd, receive_until_reset, wait_until_acknowledged
from tests.promises.secure import DAY, Authority, OriginEnd, SecureEnds, refused, server_context, site, truncated
from tests.promises.wire import assert_does_not_spin

MIB = 1 << 20
DATA = random.Random(9).randbytes(4 * MIB)
VERSIONS = pytest.mark.parametrize("tls_1_2", [False, True], ids=["TLSv1.3", "TLSv1.2"])


@pytest.fixture(scope="module")
def ends(certificate: Certificate) -> Iterator[SecureEnds]:
    """One tunnel process for most of this file."""
    with SecureEnds(certificate) as running:
        yield running


@pytest.fixture(scope="module")
def measured(certificate: Certificate) -> Iterator[SecureEnds]:
    """The same without coverage and the interpreter's debug modes, which change what is measured."""
    with SecureEnds(certificate, measured=True) as running:
        yield running


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Signs the origins' certificates in this file."""
    return Authority(tmp_path_factory.mktemp("authority"))


def _who_and_why(ends: SecureEnds, client: TlsEnd) -> tuple[str, str]:
    record = ends.record(client)
    return record["ended_by"], record["reason"]


# --- bytes -----------------------------------------------------------------------------------------------------------


def _digest(receive: Callable[[], bytes]) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    while some := receive():
        digest.update(some)
        size += len(some)
    return size, digest.hexdigest()


def _send(end: TlsEnd, times: int, step: int) -> str:
    digest = hashlib.sha256()
    for number in range(times):
        block = DATA[number * step % MIB :][:MIB]
        digest.update(block)
        end.send(block)
    end.end()
    return digest.hexdigest()


@VERSIONS
def test_every_byte_both_ways_at_once(measured: SecureEnds, tls_1_2: bool) -> None:
    count = 32
    with Threads() as threads:
        client, origin = measured.open_secure(tls_1_2=tls_1_2)
        assert origin.version == ("TLSv1.2" if tls_1_2 else "TLSv1.3")
        upwards, downwards = threads.do(_digest, origin.receive), threads.do(_digest, client.receive)
        sent_up, sent_down = threads.do(_send, client, count, 4099), threads.do(_send, origin, count, 7919)
        assert upwards.result() == (count * MIB, sent_up.result())
        assert downwards.result() == (count * MIB, sent_down.result())
        record = measured.record(client)
        assert (record["up"], record["down"], record["reason"]) == (count * MIB, count * MIB, "closed")


@VERSIONS
def test_records_of_any_size_arrive(ends: SecureEnds, tls_1_2: bool) -> None:
    """Many to a segment: none is left behind in the TLS library."""
    seed = ssl.RAND_bytes(4).hex()
    print(f"seed {seed}")
    chooses = random.Random(seed)
    with Threads() as threads:
        client, origin = ends.open_secure(tls_1_2=tls_1_2)

        def send() -> None:
            start, sealed = 0, b""
            while start < MIB:
                size = chooses.choice((1, 2, 100, 1500, 4096, 16_384))
                sealed += origin.encrypt(DATA[start : min(start + size, MIB)])
                start += size
                if len(sealed) > chooses.randrange(200_000):
                    origin.sock.sendall(sealed)
                    sealed = b""
            origin.sock.sendall(sealed)
            origin.end()

        threads.do(send)
        assert client.receive_all() == DATA[:MIB]


@pytest.mark.parametrize("size", [1, 16_383, 16_384, 16_385, 262_143, 262_144, 262_145])
def test_sizes_about_those_of_records_and_buffers(ends: SecureEnds, size: int) -> None:
    with Threads() as threads:
        client, origin = ends.open_secure()
        for _ in range(3):
            threads.do(client.send, DATA[:size])
            threads.do(origin.send, DATA[-size:])
            assert client.receive_exactly(size) == DATA[-size:]
            assert origin.receive_exactly(size) == DATA[:size]


def test_bytes_behind_both_heads_arrive(ends: SecureEnds) -> None:
    """The origin sends them in one record with its 101, and after it in the same segment."""
    client = ends.connect()
    client.send(_request("/early") + b"early up")
    origin = OriginEnd(ends.accept(), ends.origin_context)
    request = origin.read_request()
    head = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
    head += accept_token(request.headers["Sec-WebSocket-Key"]).encode() + b"\r\n\r\n"
    origin.sock.sendall(origin.encrypt(head + b"early down, ") + origin.encrypt(b"and later"))
    received = b""
    while not received.endswith(b"\r\n\r\nearly down, and later"):
        received += client.receive()
    assert origin.receive_exactly(8) == b"early up"


def _request(path: str) -> bytes:
    key = "dGhlIHNhbXBsZSBub25jZQ=="
    return (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_slow_reader_holds_the_sender_and_no_memory(measured: SecureEnds, direction: str) -> None:
    with Threads() as threads:
        client, origin = measured.open_secure(buffers=65_536)
        sender, receiver = (client, origin) if direction == "up" else (origin, client)
        before = measured.tunnel.rss()
        sending = threads.do(_send, sender, 32, 4099)
        time.sleep(0.5)
        assert measured.tunnel.rss() - before < 4 * MIB
        received = _digest(receiver.receive)
        assert received == (32 * MIB, sending.result())


# --- ends ------------------------------------------------------------------------------------------------------------


def _send_and_end(end: TlsEnd, data: bytes) -> None:
    end.send(data)
    end.end()


@VERSIONS
def test_the_origin_continues_after_the_client_has_ended(ends: SecureEnds, tls_1_2: bool) -> None:
    with Threads() as threads:
        client, origin = ends.open_secure(tls_1_2=tls_1_2)
        threads.do(_send_and_end, client, DATA)
        assert origin.receive_all() == DATA
        for number in range(20):
            origin.send(b"%3d" % number)
            assert client.receive() == b"%3d" % number
        threads.do(_send_and_end, origin, DATA)
        assert client.receive_all() == DATA
        record = ends.record(client)
        assert (record["ended_by"], record["reason"]) == ("client", "closed")
        assert (record["up"], record["down"]) == (len(DATA), len(DATA) + 60)


@VERSIONS
def test_the_client_continues_after_the_origin_has_ended(ends: SecureEnds, tls_1_2: bool) -> None:
    client, origin = ends.open_secure(tls_1_2=tls_1_2)
    origin.send(b"all of it")
    origin.end()
    assert client.receive_all() == b"all of it"
    for number in range(20):
        client.send(b"%3d" % number)
        assert origin.receive_exactly(3) == b"%3d" % number
    client.end()
    assert origin.receive_all() == b""
    assert _who_and_why(ends, client) == ("origin", "closed")


@VERSIONS
def test_the_origin_sends_while_the_client_ends(ends: SecureEnds, tls_1_2: bool) -> None:
    """``close_notify`` is written while the origin's records wait in the socket and half of one in the TLS library."""
    with Threads() as threads:
        for _ in range(3):
            client, origin = ends.open_secure(tls_1_2=tls_1_2, buffers=65_536)
            sending = threads.do(_send, origin, 8, 4099)
            client.receive()
            client.end()
            ending = threads.do(origin.receive_all)
            size, _ = _digest(client.receive)
            sending.result()
            assert ending.result() == b""
            assert size > 7 * MIB
            record = ends.record(client)
            assert (record["down"], record["reason"]) == (8 * MIB, "closed")


def test_half_a_record_when_the_client_ends(ends: SecureEnds) -> None:
    """The rest of a record that the TLS library has begun to read comes after the tunnel's ``close_notify``."""
    for cut in (1, 3, 5, 6, 500, -1):
        client, origin = ends.open_secure()
        origin.send(b"before ")
        record = origin.encrypt(b"x" * 1000)
        origin.sock.sendall(record[:cut])
        assert client.receive_exactly(7) == b"before "
        client.end()
        assert origin.receive_all() == b""
        origin.sock.sendall(record[cut:])
        origin.send(b" after")
        origin.end()
        assert client.receive_all() == b"x" * 1000 + b" after"


def test_both_end_at_once(ends: SecureEnds) -> None:
    with Threads() as threads:
        for _ in range(20):
            client, origin = ends.open_secure()
            threads.do(_send_and_end, client, DATA[:300_000])
            threads.do(_send_and_end, origin, DATA[:300_000])
            upwards = threads.do(origin.receive_all)
            assert client.receive_all() == DATA[:300_000]
            assert upwards.result() == DATA[:300_000]
            assert ends.record(client)["reason"] == "closed"


@VERSIONS
def test_an_origin_cut_off_is_a_truncation_for_the_client_too(ends: SecureEnds, tls_1_2: bool) -> None:
    client, origin = ends.open_secure(tls_1_2=tls_1_2)
    origin.send(DATA[:MIB])
    origin.sock.shutdown(socket.SHUT_WR)
    assert client.receive_exactly(MIB) == DATA[:MIB]
    truncated(client.receive)
    assert _who_and_why(ends, client) == ("origin", "truncated")


def test_a_record_of_the_origin_cut_by_a_fin_is_a_truncation(ends: SecureEnds) -> None:
    client, origin = ends.open_secure()
    origin.sock.sendall(origin.encrypt(b"whole") + origin.encrypt(b"never whole")[:-3])
    origin.sock.shutdown(socket.SHUT_WR)
    assert client.receive_exactly(5) == b"whole"
    truncated(client.receive)
    assert _who_and_why(ends, client) == ("origin", "truncated")


def test_a_client_cut_off_is_a_truncation_for_the_origin_too(ends: SecureEnds) -> None:
    client, origin = ends.open_secure()
    client.send(DATA[:MIB])
    client.sock.shutdown(socket.SHUT_WR)
    assert origin.receive_exactly(MIB) == DATA[:MIB]
    truncated(origin.receive)
    assert _who_and_why(ends, client) == ("client", "truncated")


@pytest.mark.parametrize("size", [0, 5000, 200_000])
@pytest.mark.parametrize("side", ["client", "origin"])
def test_data_and_then_a_reset(ends: SecureEnds, side: str, size: int) -> None:
    idle = ends.tunnel.descriptors()
    for number in range(5):
        client, origin = ends.open_secure()
        aborts, other = (client, origin) if side == "client" else (origin, client)
        aborts.send(DATA[:size])
        wait_until_acknowledged(aborts.sock)
        reset(aborts.sock)
        assert receive_until_reset(other.receive) == DATA[:size], f"the {number}th"
        assert _who_and_why(ends, client) == (side, "reset")
    eventually(lambda: ends.tunnel.descriptors() <= idle)


def test_an_origin_that_continues_unencrypted_is_an_error(ends: SecureEnds) -> None:
    client, origin = ends.open_secure()
    origin.send(b"sealed")
    origin.sock.sendall(b"in clear, which is no record")
    assert client.receive_exactly(6) == b"sealed"
    with pytest.raises(ConnectionResetError):
        client.receive()
    who, why = _who_and_why(ends, client)
    assert who == "origin"
    assert why.startswith("TLS error: ")


@pytest.mark.parametrize("side", ["client", "origin"])
def test_a_reset_while_the_tunnel_waits_for_the_other(measured: SecureEnds, side: str) -> None:
    """The socket is not read at that time, and epoll still reports its error, again and again."""
    idle = measured.tunnel.descriptors()
    client, origin = measured.open_secure(buffers=65_536)
    aborts, other = (client, origin) if side == "client" else (origin, client)
    aborts.sock.settimeout(0.5)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while True:
            aborts.sock.sendall(aborts.encrypt(DATA[sent % MIB :][:16_384]))
            sent += 16_384
    reset(aborts.sock)
    assert_does_not_spin(measured.tunnel)
    received = receive_until_reset(other.receive)
    assert received == (DATA[:MIB] * (sent // MIB + 1))[: len(received)]
    assert _who_and_why(measured, client) == (side, "reset")
    eventually(lambda: measured.tunnel.descriptors() <= idle)


def test_a_drain_ends_both_sides_in_an_orderly_way(certificate: Certificate) -> None:
    with SecureEnds(certificate, head='[timeouts]\nidle = "1s"') as ends:
        client, origin = ends.open_secure()
        assert client.receive_all() == b""
        assert origin.receive_all() == b""
        assert _who_and_why(ends, client) == ("tunnel", "idle timeout")


# --- trust -----------------------------------------------------------------------------------------------------------


def _accept_all(context: ssl.SSLContext) -> Callable[[socket.socket], None]:
    """Return a handler of an origin that echoes in TLS, and ignores clients that fail the TLS handshake."""

    def handle(sock: socket.socket) -> None:
        try:
            origin = OriginEnd(sock, context)
            request = origin.read_request()
        except (ssl.SSLError, AssertionError):
            return
        head = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        head += b"X-Peer: " + origin.peer.encode() + b"\r\nSec-WebSocket-Accept: "
        origin.send(head + accept_token(request.headers["Sec-WebSocket-Key"]).encode() + b"\r\n\r\n")
        while some := origin.receive():
            origin.send(some)
        origin.end()

    return handle


def _works(tunnel: Tunnel) -> str:
    """Check that it is a tunnel; return the name in the certificate that the origin received."""
    with connect_tls(tunnel) as client:
        answer = upgrade(client)
        assert answer.status == 101
        client.sendall(b"there and back")
        assert receive_exactly(client, 14) == b"there and back"
        client.unwrap()
    return answer.headers["X-Peer"] or ""


PROBLEMS: dict[str, tuple[Callable[[Authority], Certificate], str]] = {
    "origin certificate expired": (lambda by: by.issue("localhost", begins=-2 * DAY, ends=-DAY), "has expired"),
    "origin certificate not yet valid": (lambda by: by.issue("localhost", begins=DAY, ends=2 * DAY), "not valid yet"),
    "origin certificate for another name": (lambda by: by.issue("other.example"), "localhost"),
    "origin certificate self-signed": (lambda by: by.issue("localhost", self_signed=True), "self-signed"),
}


@pytest.mark.parametrize("reason", PROBLEMS)
def test_what_is_wrong_with_a_certificate_is_in_the_record(
    certificate: Certificate, authority: Authority, reason: str
) -> None:
    wrong, word = PROBLEMS[reason]
    with RawOrigin(_accept_all(server_context(wrong(authority)))) as origin:
        address = f"wss://localhost:{origin.port}"
        with Tunnel(certificate=certificate, config=site(certificate, address, f'origin_ca = "{authority.file}"')) as t:
            answer = refused(t)
            assert answer.startswith(b"HTTP/1.1 502 ")
            assert b"certificate" not in answer
            record = t.wait_records(1)[0]
            assert (record["status"], record["reason"]) == (502, reason)
            assert f"localhost:{origin.port}" in record["detail"]
            assert word in record["detail"]
        with Tunnel(certificate=certificate, config=site(certificate, address, 'origin_verify = "off"')) as t:
            _works(t)


def test_an_issuer_that_is_not_trusted(certificate: Certificate, authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue("localhost")
    with RawOrigin(_accept_all(server_context(pair))) as origin:
        address = f"wss://localhost:{origin.port}"
        other = Authority(tmp_path, "another authority")
        for settings in (f'origin_ca = "{other.file}"', ""):  # the system's store does not have it either
            with Tunnel(certificate=certificate, config=site(certificate, address, settings)) as tunnel:
                assert refused(tunnel).startswith(b"HTTP/1.1 502 ")
                assert tunnel.wait_records(1)[0]["reason"] == "origin certificate from unknown issuer"


def test_a_self_signed_certificate_may_be_trusted_itself(certificate: Certificate, authority: Authority) -> None:
    pair = authority.issue("localhost", self_signed=True)
    with RawOrigin(_accept_all(server_context(pair))) as origin:
        text = site(certificate, f"wss://localhost:{origin.port}", f'origin_ca = "{pair.cert}"')
        with Tunnel(certificate=certificate, config=text) as tunnel:
            _works(tunnel)


@pytest.mark.parametrize(
    ("host", "names", "settings", "works"),
    [
        ("127.0.0.1", ["127.0.0.1"], "", True),
        ("127.0.0.1", ["localhost"], "", False),
        ("127.0.0.1", ["inner.example"], 'origin_name = "inner.example"', True),
        ("localhost", ["localhost"], 'origin_name = "inner.example"', False),
        ("localhost", [], "", False),  # a common name alone does not count (RFC 9525 section 2)
    ],
)
def test_the_name_that_counts(
    certificate: Certificate, authority: Authority, *, host: str, names: list[str], settings: str, works: bool
) -> None:
    context = server_context(authority.issue(*names, common="localhost"))
    with RawOrigin(_accept_all(context)) as origin:
        text = site(certificate, f"wss://{host}:{origin.port}", f'origin_ca = "{authority.file}"\n{settings}')
        with Tunnel(certificate=certificate, config=text) as tunnel:
            if works:
                _works(tunnel)
            else:
                assert refused(tunnel).startswith(b"HTTP/1.1 502 ")
                assert tunnel.wait_records(1)[0]["reason"] == "origin certificate for another name"


@VERSIONS
def test_a_client_certificate_for_an_origin_that_requests_one(
    certificate: Certificate, authority: Authority, tls_1_2: bool
) -> None:
    context = server_context(authority.issue("localhost"))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority.file)
    if tls_1_2:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    ours = authority.issue(common="the tunnel")
    with RawOrigin(_accept_all(context)) as origin:
        address, ca = f"wss://localhost:{origin.port}", f'origin_ca = "{authority.file}"\n'
        pair = f'origin_cert = "{ours.cert}"\norigin_key = "{ours.key}"\n'
        with Tunnel(certificate=certificate, config=site(certificate, address, ca + pair)) as tunnel:
            assert [_works(tunnel) for _ in range(2)] == ["the tunnel"] * 2  # the second resumes
        with Tunnel(certificate=certificate, config=site(certificate, address, ca)) as tunnel:
            assert refused(tunnel).startswith(b"HTTP/1.1 502 ")
            record = tunnel.wait_records(1)[0]
            # With TLS 1.3 a server reports this after the handshake has completed for the client.
            assert record["reason"] == ("origin TLS failed" if tls_1_2 else "origin failed")
            assert ("handshake failure" if tls_1_2 else "certificate required") in record["detail"]
            assert "origin_cert" in record["detail"]


def _http_in_clear(sock: socket.socket) -> None:
    sock.recv(65_536)
    sock.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def _closes(sock: socket.socket) -> None:
    sock.recv(65_536)


def _alert(sock: socket.socket) -> None:
    sock.recv(65_536)
    sock.sendall(b"\x15\x03\x03\x00\x02\x02\x70")
    sock.recv(1)


@pytest.mark.parametrize(
    ("handler", "reason", "word"),
    [
        (_http_in_clear, "origin does not speak TLS", "not TLS"),
        (_closes, "origin TLS failed", "closed the connection"),
        (_alert, "origin TLS failed", "unrecognized name"),
    ],
)
def test_an_origin_that_does_not_speak_tls(
    certificate: Certificate, handler: Callable[[socket.socket], None], reason: str, word: str
) -> None:
    with RawOrigin(handler) as origin:
        text = site(certificate, f"wss://localhost:{origin.port}", f'origin_ca = "{certificate.ca}"')
        with Tunnel(certificate=certificate, config=text) as tunnel:
            idle = tunnel.descriptors()
            assert refused(tunnel).startswith(b"HTTP/1.1 502 ")
            record = tunnel.wait_records(1)[0]
            assert (record["reason"], word in record["detail"]) == (reason, True), record
            eventually(lambda: tunnel.descriptors() <= idle)


def test_an_origin_that_is_silent_in_its_tls_handshake(certificate: Certificate) -> None:
    release = threading.Event()

    def silent(_: socket.socket) -> None:
        release.wait(TIMEOUT)

    with RawOrigin(silent) as origin:
        text = site(
            certificate,
            f"wss://localhost:{origin.port}",
            f'origin_ca = "{certificate.ca}"',
            '[timeouts]\norigin_connect = "1s"',
        )
        with Tunnel(certificate=certificate, config=text) as tunnel:
            idle = tunnel.descriptors()
            assert refused(tunnel).startswith(b"HTTP/1.1 504 ")
            assert tunnel.wait_records(1)[0]["reason"] == "origin connect timed out"
            # If the client leaves meanwhile, the connection to the origin is closed too.
            with connect_tls(tunnel) as client:
                client.sendall(_request("/"))
                eventually(lambda: origin.connections == 2)
                reset(client)
            assert tunnel.wait_records(2)[1]["ended_by"] == "client"
            eventually(lambda: tunnel.descriptors() <= idle)
        release.set()


@VERSIONS
def test_later_connections_resume_the_session(ends: SecureEnds, tls_1_2: bool) -> None:
    def resumes() -> bool:
        client, origin = ends.open_secure(tls_1_2=tls_1_2)
        client.end()
        origin.end()
        assert ends.record(client)["reason"] == "closed"
        return origin.resumed

    # Other tests have used this origin, and no session is taken within a second of the last.
    eventually(resumes)
    assert resumes()


# --- independent origins ----------------------------------------------------------------------------------------------


def test_nginx_as_the_origin(certificate: Certificate, tmp_path: Path) -> None:
    nginx = require("nginx")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with WebsocketsOrigin() as behind:
        (tmp_path / "nginx.conf").write_text(
            f"""
daemon off; master_process off; pid {tmp_path}/pid; error_log stderr;
events {{}}
http {{
  access_log off;
  client_body_temp_path {tmp_path}/body; proxy_temp_path {tmp_path}/proxy; fastcgi_temp_path {tmp_path}/fastcgi;
  uwsgi_temp_path {tmp_path}/uwsgi; scgi_temp_path {tmp_path}/scgi;
  server {{
    listen 127.0.0.1:{port} ssl; ssl_certificate {certificate.cert}; ssl_certificate_key {certificate.key};
    location / {{
      proxy_pass http://{behind.address}; proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade;
    }}
  }}
}}
"""
        )
        process = subprocess.Popen(
            [nginx, "-e", "stderr", "-p", str(tmp_path), "-c", "nginx.conf"], stderr=subprocess.DEVNULL
        )
        try:
            eventually(lambda: _accepts(port))
            text = site(certificate, f"wss://localhost:{port}", f'origin_ca = "{certificate.ca}"')
            with Tunnel(certificate=certificate, config=text) as tunnel:
                for _ in range(3):
                    with connect_websocket(tunnel.uri, ssl=client_context(tunnel), max_size=None) as websocket:
                        for size in (0, 1, 70_000, 2 * MIB):
                            websocket.send(DATA[:size])
                            assert websocket.recv(TIMEOUT) == DATA[:size]
                reasons = {record["reason"] for record in tunnel.wait_records(3)}
                assert reasons == {"closed"}
        finally:
            process.terminate()
            process.wait(TIMEOUT)


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def test_openssl_s_server_that_changes_its_keys(certificate: Certificate) -> None:
    """``K`` on its standard input sends a KeyUpdate that requests one of the tunnel."""
    command = [require("openssl"), "s_server", "-accept", "127.0.0.1:0", "-naccept", "1"]
    command += ["-cert", str(certificate.cert), "-key", str(certificate.key), "-cert_chain", str(certificate.cert)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = _Output(process)
    try:
        port = int(output.wait_for(b"ACCEPT 127.0.0.1:", b"\n"))
        text = site(certificate, f"wss://localhost:{port}", f'origin_ca = "{certificate.ca}"')
        with Tunnel(certificate=certificate, config=text) as tunnel, connect_tls(tunnel) as client:
            client.sendall(_request("/keys"))
            output.wait_for(b"GET /keys ", b"\r\n\r\n")
            answer = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            answer += b"Sec-WebSocket-Accept: " + accept_token("dGhlIHNhbXBsZSBub25jZQ==").encode() + b"\r\n\r\n"
            _type(process, answer)
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(1000)
            for number in range(5):
                _type(process, b"K\n")
                client.sendall(b"up %d\n" % number)
                output.wait_for(b"up %d" % number, b"\n")
                _type(process, b"down %d\n" % number)
                assert receive_exactly(client, 7) == b"down %d\n" % number
            _type(process, b"Q\n")
            with contextlib.suppress(ssl.SSLEOFError):  # it writes to a descriptor that it has closed
                assert receive_all(client) == b""
            assert tunnel.wait_records(1)[0]["ended_by"] == "origin"
    finally:
        process.kill()
        process.wait(TIMEOUT)
        output.close()


def _type(process: "subprocess.Popen[bytes]", line: bytes) -> None:
    """It takes what it reads at once as one command: wait until it has been read."""
    stdin = process.stdin
    assert stdin is not None
    stdin.write(line)
    stdin.flush()
    eventually(lambda: not any(fcntl.ioctl(stdin, termios.FIONREAD, b"\0\0\0\0")))


class _Output:
    """Wait for output of a process, and return it."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._data = b""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait_for(self, begin: bytes, end: bytes) -> bytes:
        """Return what is between the next ``begin`` and the ``end`` after it."""
        with self._changed:
            found = self._changed.wait_for(lambda: end in self._data.partition(begin)[2], TIMEOUT)
            assert found, self._data
            between, _, self._data = self._data.partition(begin)[2].partition(end)
            return between

    def close(self) -> None:
        """Return the output after the process has ended."""
        self._thread.join(TIMEOUT)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        while some := os.read(self._process.stdout.fileno(), 65_536):
            with self._changed:
                self._data += some
                self._changed.notify_all()
