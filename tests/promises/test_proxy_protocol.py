"""The PROXY protocol both ways, with HAProxy as sender and receiver; what origins receive; the lifetime limit."""

import contextlib
import re
import select
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness import (
    TIMEOUT,
    Certificate,
    RawOrigin,
    Tunnel,
    WebsocketsOrigin,
    client_context,
    connect_tcp,
    connect_tls,
    eventually,
    handshake_request,
    read_response,
    receive_exactly,
    require,
    switching_protocols,
    upgrade,
)
from tests.promises.firewalled import config_for, tunnel_to
from tests.promises.scripted_origin import ScriptedOrigin
from tests.promises.wire import read_until_end
from tlstunnel.sockets.proxy_protocol import SIGNATURE, read_header, write_v1, write_v2

REQUIRED = 'proxy_protocol = "required"\ntrusted_proxies = ["127.0.0.1"]\n'
CLIENT = ("203.0.113.9", 4711)
SERVER = ("192.0.2.1", 443)


@pytest.fixture
def origin() -> Iterator[ScriptedOrigin]:
    with ScriptedOrigin() as origin:
        yield origin


@pytest.fixture(scope="module")
def trusting(certificate: Certificate) -> Iterator[tuple[ScriptedOrigin, Tunnel]]:
    top = REQUIRED + 'timeouts.tls_handshake = "2s"\n'
    with ScriptedOrigin() as origin, tunnel_to(origin.address, certificate, top=top) as tunnel:
        yield origin, tunnel


def test_a_client_behind_a_proxy_has_a_share_of_the_unfinished_handshakes(certificate: Certificate) -> None:
    """A tenth of them, by the address in the header; the proxy's own address has no share."""
    top = REQUIRED + "limits.unfinished_handshakes = 20\n"
    with WebsocketsOrigin() as origin, tunnel_to(origin.address, certificate, top=top) as tunnel, ExitStack() as stack:
        greedy = [stack.enter_context(connect_tcp(tunnel)) for _ in range(15)]
        for sock in greedy:
            sock.sendall(write_v1(CLIENT, SERVER))
        for sock in greedy[:-2]:
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        other = stack.enter_context(connect_tcp(tunnel))
        other.sendall(write_v1(("203.0.113.10", 4711), SERVER))
        with client_context(tunnel).wrap_socket(other, server_hostname="localhost") as client:
            assert upgrade(client).status == 101


def _send_header(tunnel: Tunnel, header: bytes, *pieces: int) -> int:
    """Send the header, in pieces if requested, then TLS and a handshake right after it."""
    plain = connect_tcp(tunnel)
    start = 0
    for end in (*pieces, len(header)):
        plain.sendall(header[start:end])
        start = end
    with client_context(tunnel).wrap_socket(plain, server_hostname="localhost") as client:
        # An X-Forwarded-For does not come from a proxy here.
        client.sendall(handshake_request("/", headers=[("X-Forwarded-For", "198.51.100.1")]))
        return read_response(client).status


def _assert_one_is_closed(same: list[socket.socket], other: socket.socket) -> None:
    """Assert that one of the two connections of the same client is closed, and the one of another client is not."""
    readable, _, _ = select.select([*same, other], [], [], TIMEOUT)
    assert len(readable) == 1
    assert readable[0] in same
    assert read_until_end(readable[0]) == b""
    assert select.select([*same, other], [], [], 0)[0] == readable


def test_a_client_in_x_forwarded_for_has_its_share_of_unfinished_handshakes(certificate: Certificate) -> None:
    top = 'trusted_proxies = ["127.0.0.1"]\nlimits.unfinished_handshakes = 10\n'
    with (
        RawOrigin(lambda sock: (read_until_end(sock), None)[1]) as silent,
        tunnel_to(silent.address, certificate, top=top) as tunnel,
        contextlib.ExitStack() as stack,
    ):
        # Without session tickets, of which OpenSSL reads none before the response.
        context = client_context(tunnel)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        clients = [stack.enter_context(connect_tls(tunnel, context=context)) for _ in range(3)]
        for client, ip in zip(clients, ("203.0.113.10", CLIENT[0], CLIENT[0]), strict=True):
            client.sendall(handshake_request("/", headers=[("X-Forwarded-For", ip)]))
        _assert_one_is_closed([*clients[1:]], clients[0])


@pytest.mark.parametrize(
    ("header", "address"),
    [
        (write_v1(CLIENT, SERVER), CLIENT[0]),
        (write_v2(CLIENT, SERVER), CLIENT[0]),
        (write_v2(("2001:db8::7", 1), ("2001:db8::1", 443)), "2001:db8::7"),
        (write_v2(None, None), "127.0.0.1"),
        (SIGNATURE + b"\x20\x11" + struct.pack("!H", 12) + b"\xcb\x00\x71\x09" * 3, "127.0.0.1"),
        (b"PROXY UNKNOWN\r\n", "127.0.0.1"),
    ],
)
def test_the_clients_address_is_that_of_the_header(
    trusting: tuple[ScriptedOrigin, Tunnel], header: bytes, address: str
) -> None:
    origin, tunnel = trusting
    for pieces in ((), (1,), (5, 6, 11), (len(header) - 1,)):
        traffic = origin.play(switching_protocols)
        assert _send_header(tunnel, header, *pieces) == 101
        record = traffic.record(tunnel)
        assert (record["client"], record.get("peer", address)) == (address, "127.0.0.1")
        shown = f"[{address}]" if ":" in address else address
        assert f"\r\nX-Forwarded-For: {address}\r\n".encode() in traffic.heads[0], shown


def test_lists_and_rules_apply_to_the_client_behind_the_proxy(origin: ScriptedOrigin, certificate: Certificate) -> None:
    top = REQUIRED + f'block_addresses = ["{CLIENT[0]}"]\n'
    rule = '[[sites.rules]]\nname = "seven"\nwhen = \'ip == "203.0.113.7"\'\naction = "block"\n'
    with tunnel_to(origin.address, certificate, top=top, site=rule) as tunnel:
        with connect_tcp(tunnel) as plain:
            plain.sendall(write_v2(CLIENT, SERVER))
            assert read_until_end(plain) == b""
        dropped = tunnel.wait_records(1, "no TLS handshake")[0]
        assert (dropped["client"], dropped["peer"]) == (CLIENT[0], "127.0.0.1")
        assert _send_header(tunnel, write_v2(("203.0.113.7", 1), SERVER)) == 403
        origin.play(switching_protocols)
        assert _send_header(tunnel, write_v2(("203.0.113.8", 1), SERVER)) == 101


def test_a_proxy_that_sends_no_header_is_closed(origin: ScriptedOrigin, certificate: Certificate) -> None:
    top = REQUIRED + 'timeouts.tls_handshake = "300ms"\n'
    headless = [b"", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\n\r\n", SIGNATURE + b"\x11\x11\0\0", b"PROX"]
    with tunnel_to(origin.address, certificate, top=top) as tunnel:
        for sent in headless:
            with connect_tcp(tunnel) as plain:
                plain.sendall(sent)
                assert read_until_end(plain) == b"", sent
        # The log counts equal reasons together.
        for record in tunnel.wait_records(1, "no TLS handshake"):
            assert record["reason"].startswith("PROXY header: ")
            assert "peer" not in record


def test_an_untrusted_client_is_closed_whatever_it_sends(origin: ScriptedOrigin, certificate: Certificate) -> None:
    with tunnel_to(origin.address, certificate, top=REQUIRED.replace("127.0.0.1", "10.0.0.1")) as tunnel:
        with connect_tcp(tunnel) as plain:
            with contextlib.suppress(OSError):
                plain.sendall(write_v2(CLIENT, SERVER))
            assert read_until_end(plain) == b""
        assert tunnel.wait_records(1, "not accepted")[0]["reason"] == "untrusted proxy"


def test_only_on_some_listeners(origin: ScriptedOrigin, certificate: Certificate) -> None:
    top = REQUIRED + 'proxy_protocol_listen = ["localhost:0"]\n'
    text = config_for(origin.address, certificate, top=top).replace(
        'listen = ["127.0.0.1:0"]', 'listen = ["127.0.0.1:0", "localhost:0"]', 1
    )
    text = text.replace('trusted_proxies = ["127.0.0.1"]', 'trusted_proxies = ["127.0.0.1", "::1"]')
    with Tunnel(None, certificate, config=text) as tunnel:
        origin.play(switching_protocols)
        with connect_tls(tunnel) as client:
            assert upgrade(client).status == 101
        host, _, port = tunnel.addresses[1].rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), TIMEOUT) as plain:
            plain.sendall(b"\x16\x03\x01")
            assert read_until_end(plain) == b""


# --- on to the origin ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _proxied_origin() -> Iterator[tuple[str, list[tuple[bytes, bytes]]]]:
    """An origin that expects a PROXY header; returns each with the head of the request after it."""
    seen: list[tuple[bytes, bytes]] = []

    def serve() -> None:
        while True:
            try:
                sock, _ = server.accept()
            except OSError:
                return
            with sock, contextlib.suppress(OSError):
                sock.settimeout(TIMEOUT)
                data = b""
                while b"\r\n\r\n" not in data.removeprefix(SIGNATURE):
                    more = sock.recv(65536)
                    if not more:
                        break
                    data += more
                else:
                    header = read_header(data)
                    assert header is not None
                    seen.append((data[: header.length], data[header.length :]))
                    key = re.search(rb"(?i)sec-websocket-key: (\S+)", data)
                    assert key
                    from tests.harness import accept_token  # noqa: PLC0415

                    sock.sendall(
                        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                        b"Sec-WebSocket-Accept: " + accept_token(key[1].decode()).encode() + b"\r\n\r\n"
                    )

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", seen
        server.shutdown(socket.SHUT_RDWR)
    thread.join(TIMEOUT)


@pytest.mark.parametrize("version", ["v1", "v2", "v2-tls"])
def test_origins_receive_the_clients_address(certificate: Certificate, version: str) -> None:
    with (
        _proxied_origin() as (address, seen),
        tunnel_to(address, certificate, site=f'send_proxy_protocol = "{version}"') as tunnel,
    ):
        with connect_tls(tunnel) as client:
            port = client.getsockname()[1]
            assert upgrade(client).status == 101
        ((header, head),) = eventually(lambda: seen)
        if version == "v1":
            assert header == f"PROXY TCP4 127.0.0.1 127.0.0.1 {port} {tunnel.port}\r\n".encode()
        else:
            assert header[16:28] == bytes([127, 0, 0, 1] * 2) + struct.pack("!HH", port, tunnel.port)
            assert [fact in header for fact in (b"TLSv1.3", b"localhost")] == [version == "v2-tls"] * 2
        assert head.startswith(b"GET / HTTP/1.1\r\n")


@contextlib.contextmanager
def haproxy(folder: Path, text: str) -> Iterator[int]:
    """Run HAProxy with what comes after ``listen l``; return its port. It inherits the listener: no one can take it."""
    program = require("haproxy")
    file = folder / "haproxy.cfg"
    listener = socket.create_server(("127.0.0.1", 0))
    file.write_text(
        "global\n log stdout format raw local0\ndefaults\n timeout connect 5s\n timeout client 60s\n"
        f" timeout server 60s\nlisten l\n bind fd@{listener.fileno()}{text}"
    )
    process = subprocess.Popen(
        [program, "-db", "-f", str(file)],
        pass_fds=(listener.fileno(),),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with listener:
            yield int(listener.getsockname()[1])
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(TIMEOUT)


@pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2", "send-proxy-v2-ssl"])
def test_haproxy_before_the_tunnel(certificate: Certificate, tmp_path: Path, version: str) -> None:
    with (
        WebsocketsOrigin() as origin,
        tunnel_to(origin.address, certificate, top=REQUIRED) as tunnel,
        haproxy(tmp_path, f"\n mode tcp\n server s 127.0.0.1:{tunnel.port} {version}\n") as port,
    ):
        plain = socket.create_connection(("127.0.0.1", port), TIMEOUT, source_address=("127.0.0.3", 0))
        with client_context(tunnel).wrap_socket(plain, server_hostname="localhost") as client:
            own = client.getsockname()[0]
            assert upgrade(client).status == 101
            client.sendall(b"\x81\x85\0\0\0\0hello")
            assert receive_exactly(client, 7) == b"\x81\x05hello"
        assert tunnel.wait_records(1)[0]["client"] == own == "127.0.0.3"


@pytest.mark.parametrize("version", ["v1", "v2", "v2-tls"])
def test_haproxy_behind_the_tunnel(certificate: Certificate, tmp_path: Path, version: str) -> None:
    """It refuses connections without a header, and forwards the address in the header to its own server."""
    with ScriptedOrigin() as origin:
        text = (
            " accept-proxy\n mode http\n option forwardfor header X-Seen\n"
            f" timeout tunnel 60s\n server s {origin.address}\n"
        )
        site = f'send_proxy_protocol = "{version}"\nhealth = {{ type = "tcp", interval = "100ms" }}'
        with (
            haproxy(tmp_path, text) as port,
            tunnel_to(f"127.0.0.1:{port}", certificate, site=site) as tunnel,
        ):
            traffic = origin.play(switching_protocols)
            plain = socket.create_connection(("127.0.0.1", tunnel.port), TIMEOUT, source_address=("127.0.0.5", 0))
            with client_context(tunnel).wrap_socket(plain, server_hostname="localhost") as client:
                assert upgrade(client).status == 101
            eventually(lambda: traffic.heads)
            assert re.search(rb"(?i)\r\nx-seen: 127\.0\.0\.5\r\n", traffic.heads[0])


def test_what_origins_receive_can_be_changed(certificate: Certificate) -> None:
    site = (
        'origin_host = "chat.internal:81"\nset_headers = { X-Site = "chat", X-Forwarded-Proto = "wss" }\n'
        'remove_headers = ["X-Debug", "cookie"]\n'
    )
    with (
        ScriptedOrigin() as origin,
        tunnel_to(origin.address, certificate, site=site) as tunnel,
        connect_tls(tunnel) as client,
    ):
        traffic = origin.play(switching_protocols)
        sent = [("X-Site", "forged"), ("X-DEBUG", "1"), ("Cookie", "a=b"), ("X-Other", "kept")]
        assert upgrade(client, headers=sent).status == 101
        eventually(lambda: traffic.heads)
        lines = traffic.heads[0].decode().split("\r\n")
        assert "Host: chat.internal:81" in lines
        assert [line for line in lines if line.lower().startswith("x-site")] == ["X-Site: chat"]
        assert [line for line in lines if line.lower().startswith("x-forwarded-proto")] == ["X-Forwarded-Proto: wss"]
        assert "X-Other: kept" in lines
        assert not [line for line in lines if line.lower().startswith(("x-debug", "cookie"))]


def test_the_lifetime_limit_of_a_tunnel(certificate: Certificate) -> None:
    site = 'max_age = "300ms"\nmax_age_jitter = "200ms"\n'
    with WebsocketsOrigin() as origin, tunnel_to(origin.address, certificate, site=site) as tunnel:
        with connect_tls(tunnel) as client:
            began = time.monotonic()
            assert upgrade(client).status == 101
            # An orderly end, with close_notify.
            assert read_until_end(client) == b""
            assert time.monotonic() - began > 0.29
        record = tunnel.wait_records(1)[0]
        assert (record["ended_by"], record["reason"]) == ("tunnel", "max age")
