"""A tunnel with an admin address, and a client that sends exactly what a test writes."""

import http.client
import json
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.harness import TIMEOUT, Certificate, Tunnel
from tests.promises.firewalled import config_for

ALICE, RITA = "alice-" + "a" * 30, "rita-" + "r" * 30
"""The tokens: alice may act, rita may read."""


def write_tokens(folder: Path) -> str:
    """Write the files of the tokens; return their tables."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = ""
    for name, text, access in (("alice", ALICE, "full"), ("rita", RITA, "read")):
        (folder / name).write_text(text + "\n")
        tables += f'[[admin.tokens]]\nname = "{name}"\nfile = "{folder / name}"\naccess = "{access}"\n'
    return tables


def config_of(
    certificate: Certificate,
    folder: Path,
    *,
    origin: str = "127.0.0.1:9",
    admin: str = "",
    top: str = "",
    site: str = "",
) -> str:
    """Return a configuration with an admin address, whose table has `admin` besides; "none" for no table."""
    table = "" if admin == "none" else f'[admin]\nlisten = "127.0.0.1:0"\n{admin}\n{write_tokens(folder)}'
    if "listen =" in admin:
        table = table.replace('listen = "127.0.0.1:0"\n', "", 1)
    top = f'state.dir = "{folder / "state"}"\nrelease.drain_over = "0s"\n{top}\n{table}'
    return config_for(origin, certificate, top=top, site=site)


def administered(certificate: Certificate, folder: Path, **options: Any) -> Tunnel:
    """Return a tunnel with the configuration of `config_of`."""
    rest = {name: options.pop(name) for name in ("environment", "errors_expected", "arguments") if name in options}
    return Tunnel(None, certificate, config=config_of(certificate, folder, **options), **rest)


class Reply(NamedTuple):
    """What was received."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)


class Admin:
    """A client of the admin address of a tunnel. Each request has a connection of its own."""

    def __init__(self, tunnel: Tunnel, context: ssl.SSLContext | None = None) -> None:
        self.tunnel = tunnel
        self.context = context

    @property
    def url(self) -> str:
        """The address of the dashboard."""
        url = self.tunnel.status()["dashboard"]
        assert isinstance(url, str)
        return url

    @property
    def port(self) -> int:
        """The port."""
        found = re.fullmatch(r"https?://.*:(\d+)/", self.url)
        assert found is not None, self.url
        return int(found[1])

    @property
    def host(self) -> str:
        """What a browser sends as Host."""
        return f"127.0.0.1:{self.port}"

    def connect(self, timeout: float = TIMEOUT) -> socket.socket:
        """Return a new connection."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout)
        return self.context.wrap_socket(plain, server_hostname="localhost") if self.context is not None else plain

    def send(self, data: bytes) -> Reply:
        """Send these bytes, and return the response."""
        with self.connect() as sock:
            sock.sendall(data)
            return read_reply(sock, data.partition(b" ")[0].decode("latin-1"))

    def ask(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        *,
        token: str = "",
        host: str | None = None,
    ) -> Reply:
        """Send a request, and return the response. `body` is sent as JSON."""
        data = b"" if body is None else json.dumps(body).encode()
        fields = {"Host": self.host if host is None else host}
        if token:
            fields["Authorization"] = f"Bearer {token}"
        if body is not None:
            fields |= {"Content-Type": "application/json", "Content-Length": str(len(data))}
        fields |= headers or {}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return self.send(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + data)

    def get(self, target: str, **options: Any) -> Any:
        """Return the JSON at a path."""
        reply = self.ask("GET", target, **options)
        assert reply.status == 200, reply
        return reply.json

    def log_in(self, token: str = ALICE) -> tuple[str, str, Reply]:
        """Log in as the page does; return the field Cookie, `csrf`, and the response."""
        scheme = "http" if self.context is None else "https"
        reply = self.ask("POST", "/login", {"Origin": f"{scheme}://{self.host}"}, {"token": token})
        assert reply.status == 200, reply
        cookie = reply.headers["Set-Cookie"].partition(";")[0]
        return cookie, reply.json["csrf"], reply


def read_reply(sock: socket.socket, method: str = "GET") -> Reply:
    """Read the response to a request with this method."""
    response = http.client.HTTPResponse(sock, method=method)
    try:
        response.begin()
        return Reply(response.status, response.headers, response.read())
    finally:
        response.close()


def upgrade_request(host: str, headers: Mapping[str, str] | None = None, path: str = "/api/v1/live") -> bytes:
    """Return the request for the live WebSocket."""
    fields = {
        "Host": host,
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        **(headers or {}),
    }
    return (f"GET {path} HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in fields.items()) + "\r\n").encode()


@contextmanager
def holding(admin: Admin, count: int) -> Iterator[list[socket.socket]]:
    """Hold so many connections that send nothing."""
    port = admin.port
    with ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT)) for _ in range(count)]
