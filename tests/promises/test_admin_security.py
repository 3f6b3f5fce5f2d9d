"""Nobody reads or acts at the admin address who must not: no other page, name, machine, or client that misbehaves."""

import contextlib
import resource
import socket
import ssl
import time
from collections.abc import Iterator

import pytest

from tests.harness import TIMEOUT, Certificate, Tunnel, eventually
from tests.promises.administered import ALICE, RITA, Admin, administered, holding, read_reply, upgrade_request
from tlstunnel.certificates import issue


@pytest.fixture(scope="module")
def tunnel(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tunnel]:
    admin = 'hosts = ["tunnel.example"]'
    with administered(certificate, tmp_path_factory.mktemp("admin"), admin=admin) as tunnel:
        yield tunnel


@pytest.fixture
def admin(tunnel: Tunnel) -> Admin:
    return Admin(tunnel)


# --- other names: DNS rebinding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/static/main.js", "/metrics", "/openapi.json", "/api/v1/status", "/nothing"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}"])
def test_a_name_that_was_pointed_here_gets_nothing(admin: Admin, path: str, host: str) -> None:
    reply = admin.ask("GET", path, host=host.format(port=admin.port), token=ALICE)
    assert reply.status == 421
    assert "admin.hosts" in reply.json["error"]


def test_a_name_that_was_pointed_here_cannot_act_or_watch(admin: Admin) -> None:
    host = f"evil.example:{admin.port}"
    headers = {"Origin": f"http://{host}"}
    assert admin.ask("POST", "/api/v1/reload", headers, host=host, token=ALICE).status == 421
    assert admin.ask("POST", "/login", headers, {"token": ALICE}, host=host).status == 421
    assert admin.send(upgrade_request(host, headers)).status == 421


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]:5", "tunnel.example", "TUNNEL.example:443"])
def test_its_own_names(admin: Admin, host: str) -> None:
    assert admin.ask("GET", "/api/v1/session", host=host).status == 200


def test_health_needs_no_name(admin: Admin) -> None:
    assert admin.ask("GET", "/healthz", host="10.1.2.3:80").json == {"alive": True}
    assert admin.ask("GET", "/readyz", host="anything").json == {"ready": True, "reason": ""}
    assert admin.send(b"GET /healthz HTTP/1.0\r\n\r\n").status == 200


# --- other pages: CSRF ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://{host}", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "https://localhost:8443", "Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://127.0.0.1:1"},
        {},
    ],
)
@pytest.mark.parametrize("csrf", [True, False])
def test_another_page_cannot_act_with_the_cookie(admin: Admin, headers: dict[str, str], csrf: bool) -> None:
    cookie, secret, _ = admin.log_in()
    fields = {name: value.format(host=admin.host) for name, value in headers.items()} | {"Cookie": cookie}
    fields |= {"X-CSRF-Token": secret} if csrf else {}
    for path in ("/api/v1/reload", "/api/v1/drain", "/logout"):
        reply = admin.ask("POST", path, fields, {})
        assert reply.status == 403, (path, reply)
    assert admin.get("/api/v1/session", headers={"Cookie": cookie})["logged_in"]


def test_a_server_that_has_seen_the_cookie_cannot_act_with_it(admin: Admin) -> None:
    """A browser sends it to every port of the host, such as to an origin behind this tunnel."""
    cookie, csrf, _ = admin.log_in()
    own = {"Cookie": cookie, "Origin": f"http://{admin.host}"}
    assert admin.ask("POST", "/api/v1/reload", own, {}).status == 403
    assert admin.ask("POST", "/api/v1/reload", {**own, "X-CSRF-Token": "x" * 43}, {}).status == 403
    assert admin.ask("POST", "/api/v1/reload", {**own, "X-CSRF-Token": csrf}, {}).status == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_page_cannot_ask_for_data(admin: Admin, site: str) -> None:
    assert admin.ask("GET", "/api/v1/status", {"Sec-Fetch-Site": site}).status == 403
    assert admin.ask("GET", "/api/v1/status", {"Origin": "http://evil.example"}).status == 403
    assert admin.ask("GET", "/", {"Sec-Fetch-Site": site}).status == 200, "a link to the dashboard works"


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_form_is_no_body(admin: Admin, media_type: str) -> None:
    """These are what other pages may send without asking first (CORS)."""
    reply = admin.ask("POST", "/api/v1/reload", {"Content-Type": media_type}, {}, token=ALICE)
    assert reply.status == 415


def test_nothing_allows_other_pages_anything(admin: Admin) -> None:
    reply = admin.ask("OPTIONS", "/api/v1/reload", {"Origin": "http://evil.example"})
    assert reply.status in {403, 405}
    for path in ("/", "/try", "/api/v1/status", "/healthz", "/nothing", "/metrics"):
        headers = admin.ask("GET", path).headers
        assert not [name for name in headers if name.lower().startswith("access-control-")]
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert f"frame-ancestors '{'self' if path == '/try' else 'none'}'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == ("no-cache" if path in {"/", "/try"} else "no-store")


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}],
)
def test_another_page_cannot_watch(admin: Admin, headers: dict[str, str]) -> None:
    reply = admin.send(upgrade_request(admin.host, headers))
    assert reply.status == 403
    assert reply.headers["Content-Security-Policy"]
    own = upgrade_request(admin.host, {"Origin": f"http://{admin.host}"})
    with admin.connect() as sock:
        sock.sendall(own)
        assert sock.recv(12) == b"HTTP/1.1 101"


# --- tokens and sessions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_and_path", ["POST /api/v1/reload", "POST /api/v1/drain", "POST /api/v1/sites/a/mute"])
def test_every_action_needs_a_token_that_may_act(admin: Admin, method_and_path: str) -> None:
    method, path = method_and_path.split()
    reply = admin.ask(method, path, body={})
    assert reply.status == 401
    assert reply.headers["WWW-Authenticate"].startswith("Bearer")
    assert admin.ask(method, path, body={}, token=RITA).status == 403
    assert admin.ask(method, path, body={}, token="x" * 40).status in {401, 429}


def test_a_token_in_a_url_is_refused_and_logged_nowhere(admin: Admin) -> None:
    for path in ("/api/v1/status", "/", "/metrics", "/nothing"):
        for name in ("token", "access_token"):
            reply = admin.ask("GET", f"{path}?{name}={ALICE}")
            assert reply.status == 400
            assert ALICE not in reply.body.decode()
    assert admin.send(upgrade_request(admin.host, path=f"/api/v1/live?token={ALICE}")).status == 400
    assert ALICE not in admin.tunnel.log


def test_a_login_and_its_cookie(admin: Admin) -> None:
    planted = f"tlstunnel-session={'p' * 43}"
    reply = admin.ask("POST", "/login", {"Origin": f"http://{admin.host}", "Cookie": planted}, {"token": ALICE})
    assert reply.status == 200
    value, *flags = reply.headers["Set-Cookie"].split("; ")
    assert value != planted, "session fixation"
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(flags)
    assert reply.json["name"] == "alice"
    assert not admin.get("/api/v1/session", headers={"Cookie": planted})["logged_in"]
    session = admin.get("/api/v1/session", headers={"Cookie": value})
    assert (session["who"], session["access"], session["logged_in"]) == ("token alice", "full", True)
    assert ALICE not in admin.tunnel.log

    own = {"Cookie": value, "Origin": f"http://{admin.host}", "X-CSRF-Token": reply.json["csrf"]}
    out = admin.ask("POST", "/logout", own, {})
    assert out.status == 200
    assert "Max-Age=0" in out.headers["Set-Cookie"]
    assert not admin.get("/api/v1/session", headers={"Cookie": value})["logged_in"]
    assert admin.ask("POST", "/api/v1/reload", own, {}).status == 401


def test_behind_a_proxy_with_tls_the_cookie_is_secure(admin: Admin) -> None:
    headers = {"Origin": "https://tunnel.example"}
    reply = admin.ask("POST", "/login", headers, {"token": ALICE}, host="tunnel.example")
    assert reply.headers["Set-Cookie"].startswith("__Host-tlstunnel-session=")
    assert reply.headers["Set-Cookie"].endswith("; Secure")
    cookie = reply.headers["Set-Cookie"].partition(";")[0]
    forwarded = {"Cookie": cookie, "X-Forwarded-For": "192.0.2.1"}
    assert admin.ask("GET", "/api/v1/session", forwarded, host="tunnel.example").json["logged_in"]


@pytest.mark.parametrize("field", ["X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"])
def test_what_a_proxy_passes_on_needs_a_token(admin: Admin, field: str) -> None:
    assert admin.ask("GET", "/api/v1/status", {field: "192.0.2.1"}).status == 401
    assert admin.ask("GET", "/api/v1/status", {field: "192.0.2.1"}, token=RITA).status == 200
    assert admin.ask("GET", "/", {field: "192.0.2.1"}).status == 200, "where one logs in"


def test_guessing_is_limited_but_locks_nobody_out(admin: Admin) -> None:
    statuses = [admin.ask("GET", "/api/v1/session", token=f"{number:030d}").status for number in range(20)]
    assert statuses[-1] == 429
    assert set(statuses) <= {401, 429}
    assert admin.ask("GET", "/api/v1/session", token=RITA).status == 200
    admin.log_in()
    refused = admin.tunnel.records("token refused")
    assert 1 <= len(refused) <= 20
    assert all("0000" not in str(record["client"]) for record in refused)


@pytest.mark.parametrize("body", [{}, {"token": 1}, {"token": None}, [], "x", {"token": "x" * 60_000}])
def test_other_logins(admin: Admin, body: object) -> None:
    reply = admin.ask("POST", "/login", {"Origin": f"http://{admin.host}"}, body)
    assert reply.status in {400, 401, 429}


# --- paths, bodies, heads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "/../tlstunnel/admin/app.py",
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static/..%5capp.py",
        "/static//etc/passwd",
        "/static/",
        "/static",
        "/static/index.html",
        "//etc/passwd",
        "/static/main.js/",
        "/static/main.js%00",
        "/static/%c0%ae%c0%ae/app.py",
        "/api/v1/../../static/main.js",
        "http://127.0.0.1/static/main.js",
        "/STATIC/main.js",
        "*",
        "main.js",
    ],
)
def test_path_tricks(admin: Admin, target: str) -> None:
    reply = admin.ask("GET", target)
    assert reply.status in {400, 404}
    assert b"import" not in reply.body


@pytest.mark.parametrize("target", ["/api/v1/sites/%2e%2e%2fx", "/api/v1/sites/a%2fb", "/api/v1/usage/%00"])
def test_names_in_paths(admin: Admin, target: str) -> None:
    assert admin.ask("GET", target).status in {404, 409}


def test_a_huge_body_is_refused(admin: Admin) -> None:
    head = f"POST /api/v1/reload HTTP/1.1\r\nHost: {admin.host}\r\nAuthorization: Bearer {ALICE}\r\n"
    head += "Content-Type: application/json\r\n"
    assert admin.send(f"{head}Content-Length: 100000000\r\n\r\n".encode()).status == 413
    assert admin.send(f"{head}Content-Length: 100000000\r\n\r\n".encode() + b" " * 200_000).status == 413
    chunk = b"ffff\r\n" + b" " * 0xFFFF + b"\r\n"
    assert admin.send(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + 3 * chunk).status == 413
    assert admin.ask("POST", "/api/v1/reload", {}, {"x": "y" * 70_000}, token=ALICE).status == 413
    assert admin.ask("POST", "/api/v1/reload", {"Content-Length": "-1"}, token=ALICE).status == 400


def test_a_huge_head_is_refused(admin: Admin) -> None:
    assert admin.ask("GET", "/healthz", {"X-Large": "x" * 20_000}).status in {400, 431}
    assert admin.ask("GET", "/healthz?" + "x" * 20_000).status in {400, 431}


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /\x80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /login HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_garbage_is_refused_and_not_logged(admin: Admin, data: bytes) -> None:
    before = len(admin.tunnel.records())
    with admin.connect() as sock:
        sock.sendall(data)
        received = b""
        with contextlib.suppress(ConnectionError):
            sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(65_536):
                received += part
    assert not received or received.startswith((b"HTTP/1.1 4", b"HTTP/1.1 200"))
    assert admin.get("/healthz") == {"alive": True}
    logged = [one for one in admin.tunnel.records()[before:] if one["level"] in {"warning", "error"}]
    assert [one for one in logged if not str(one["event"]).startswith("Executing ")] == []  # asyncio on a busy machine


def test_a_thousand_idle_connections_do_not_block_it(admin: Admin, tunnel: Tunnel) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    try:
        with holding(admin, 1_000) as socks:
            began = time.monotonic()
            assert admin.get("/healthz") == {"alive": True}
            assert admin.get("/api/v1/session")["access"] == "read"
            assert time.monotonic() - began < TIMEOUT / 2
            # The oldest were closed, and the latest are still there.
            socks[0].settimeout(TIMEOUT)
            assert socks[0].recv(1) == b""
            socks[-1].sendall(f"GET /healthz HTTP/1.1\r\nHost: {admin.host}\r\n\r\n".encode())
            assert read_reply(socks[-1]).status == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- another address: TLS ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def protected(
    certificate: Certificate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Tunnel, Certificate]]:
    """Return a tunnel whose admin address others could reach, and a certificate for a client."""
    folder = tmp_path_factory.mktemp("protected")
    issued = issue.create_client("olga", folder)
    admin = (
        f'listen = "0.0.0.0:0"\ncert = "{certificate.cert}"\nkey = "{certificate.key}"\n'
        f'client_ca = "{issued.ca}"\nclient_access = "full"\n'
    )
    with administered(certificate, folder, admin=admin) as tunnel:
        yield tunnel, Certificate(issued.ca, issued.cert, issued.key)


def trusting(certificate: Certificate) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate.ca)


def test_elsewhere_everything_needs_a_token(protected: tuple[Tunnel, Certificate], certificate: Certificate) -> None:
    admin = Admin(protected[0], trusting(certificate))
    assert admin.url.startswith("https://0.0.0.0:")
    assert admin.get("/healthz") == {"alive": True}
    assert admin.get("/readyz")["ready"]
    for path in ("/api/v1/status", "/metrics", "/openapi.json", "/api/v1/session"):
        assert admin.ask("GET", path).status == 401
    assert admin.send(upgrade_request(admin.host)).status == 401
    assert admin.get("/api/v1/session", token=RITA)["who"] == "token rita"
    assert admin.ask("GET", "/").status == 200, "where one logs in"


def test_with_tls_the_cookie_is_secure(protected: tuple[Tunnel, Certificate], certificate: Certificate) -> None:
    admin = Admin(protected[0], trusting(certificate))
    cookie, _, reply = admin.log_in()
    assert reply.headers["Set-Cookie"].startswith("__Host-tlstunnel-session=")
    assert "Secure" in reply.headers["Set-Cookie"].split("; ")
    assert admin.get("/api/v1/session", headers={"Cookie": cookie})["logged_in"]
    assert admin.ask("GET", "/api/v1/session", {"Cookie": cookie.removeprefix("__Host-")}).status == 401
    plain = {"Origin": f"http://{admin.host}"}
    assert admin.ask("POST", "/login", plain, {"token": ALICE}).status == 403


def test_without_tls_nothing_is_said(protected: tuple[Tunnel, Certificate]) -> None:
    with Admin(protected[0]).connect() as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        with contextlib.suppress(ConnectionError):
            received = sock.recv(100)
    assert not received.startswith(b"HTTP")


def test_connections_that_do_not_finish_the_tls_handshake_do_not_block_it(
    protected: tuple[Tunnel, Certificate], certificate: Certificate
) -> None:
    admin = Admin(protected[0], trusting(certificate))
    with holding(Admin(protected[0]), 300):
        assert admin.get("/healthz") == {"alive": True}


def test_a_client_certificate_instead_of_a_token(
    protected: tuple[Tunnel, Certificate], certificate: Certificate
) -> None:
    tunnel, client = protected
    context = trusting(certificate)
    context.load_cert_chain(client.cert, client.key)
    admin = Admin(tunnel, context)
    session = admin.get("/api/v1/session")
    assert session["who"] == "certificate olga"
    assert session["access"] == "full"
    assert admin.ask("POST", "/api/v1/reload", body={}).status == 200
    action = eventually(lambda: tunnel.records("action"))[-1]
    assert action["who"] == session["who"]
    # Another page cannot use it: a browser sends it by itself.
    assert admin.ask("POST", "/api/v1/reload", {"Origin": "https://evil.example"}, {}).status == 403


def test_a_certificate_of_another_authority(protected: tuple[Tunnel, Certificate], certificate: Certificate) -> None:
    context = trusting(certificate)
    context.load_cert_chain(certificate.cert, certificate.key)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        Admin(protected[0], context).ask("GET", "/healthz")
