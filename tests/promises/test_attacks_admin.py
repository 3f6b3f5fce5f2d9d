"""What clients of the admin address do, tunnels and the operator do not notice."""

import shutil
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.harness import Certificate, RawOrigin, Tunnel, echo_bytes
from tests.promises.administered import ALICE, Admin, administered, config_of, read_reply
from tests.promises.listed import clients_of
from tlstunnel.certificates import issue


@pytest.fixture(scope="module")
def tunnel(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tunnel]:
    with (
        RawOrigin(echo_bytes) as origin,
        administered(certificate, tmp_path_factory.mktemp("admin"), origin=origin.address) as tunnel,
    ):
        yield tunnel


@pytest.fixture
def admin(tunnel: Tunnel) -> Admin:
    return Admin(tunnel)


def test_who_asks_all_the_time_takes_little_of_serving_processes(admin: Admin, tunnel: Tunnel) -> None:
    """A list of 50 tunnels costs a serving process more than a millisecond. These clients do not wait for it."""
    requests = 1_000
    with clients_of(tunnel, 50):
        port = admin.port
        request = f"GET /api/v1/tunnels?limit=1000 HTTP/1.1\r\nHost: {admin.host}\r\n\r\n".encode()
        before = tunnel.cpu_seconds()
        for _ in range(requests):
            with socket.create_connection(("127.0.0.1", port), 30) as sock:
                sock.sendall(request)
        # The operator, who has a token, is not among those who wait.
        assert admin.get("/api/v1/tunnels", token=ALICE)["total"] == 50
        used = tunnel.cpu_seconds() - before
        assert used < 0.0005 * requests


def test_who_has_a_certificate_of_an_authority_that_was_replaced_gets_nothing_more(
    certificate: Certificate, tmp_path: Path
) -> None:
    client, other = (issue.create_client("olga", tmp_path / name) for name in ("one", "other"))
    authority = tmp_path / "ca.pem"
    shutil.copy(client.ca, authority)
    settings = f'cert = "{certificate.cert}"\nkey = "{certificate.key}"\nclient_ca = "{authority}"\n'
    context = ssl.create_default_context(cafile=certificate.ca)
    context.load_cert_chain(client.cert, client.key)
    with administered(certificate, tmp_path, admin=f'listen = "0.0.0.0:0"\n{settings}') as tunnel:
        admin = Admin(tunnel, context)
        request = f"GET /api/v1/session HTTP/1.1\r\nHost: {admin.host}\r\n\r\n".encode()
        with admin.connect() as sock:
            sock.sendall(request)
            assert read_reply(sock).status == 200
            shutil.copy(other.ca, authority)
            tunnel.reload()
            with suppress(ConnectionError):
                assert sock.recv(1) == b""


def test_a_glance_at_many_sites_costs_the_parent_little(certificate: Certificate, tmp_path: Path) -> None:
    """The dashboard takes one every second, and nobody needs a token for that here."""
    config = config_of(certificate, tmp_path, admin="metric_sites = 10")
    pair = f'cert = "{certificate.cert}"\nkey = "{certificate.key}"\n'
    for number in range(500):
        config += f'[[sites]]\nnames = ["s{number}.example"]\norigins = ["127.0.0.1:9"]\n{pair}'
    with Tunnel(None, certificate, config=config) as tunnel:
        admin = Admin(tunnel)
        assert len(tunnel.status()["metrics"]["tlstunnel_tunnels"]) == 501
        sizes = {path: len(admin.ask("GET", path).body) for path in ("/api/v1/status", "/api/v1/overview")}
        assert sizes["/api/v1/status"] < 50_000
        assert sizes["/api/v1/overview"] < 5_000
        shown = admin.get("/api/v1/status")["metrics"]["tlstunnel_tunnels"]
        assert len(shown) <= 11, "ten, and all others together"
        assert admin.ask("GET", "/api/v1/status?metrics=all").status == 400
