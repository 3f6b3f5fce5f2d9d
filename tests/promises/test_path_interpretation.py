"""No target that ``strict_path`` accepts is routed by a real server to another place than the one that rules see.

The servers have a route for /admin and all below it. Each gets every target that is accepted; a target that is refused
never reaches an origin.
"""

import contextlib
import importlib.util
import itertools
import json
import posixpath
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.handshakes import request
from tests.harness import TIMEOUT, eventually, missing, require
from tlstunnel.firewall.facts import gather
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import RequestReader
from tlstunnel.testing.program import start_process

CLIENTS = Path(__file__).parent.parent / "clients"

BYPASSES = [
    "/admin/../x",
    "/admin/..",
    "/admin/%2e%2e/x",
    "/admin/.%2E/x",
    "//x/admin",
    "//[::1]/admin",
    "/admin//../",
    "/admin/x//../..",
    "/admin%0a",
]
"""What some server routes to /admin although the normalised path is another."""

# fmt: off
_PIECES = [
    "/", "//", "/.", "/..", "/%2e", "/%2E%2e", "/%2f", "/%5c", "\\", "/;", ";x", "..;x", "%0a", "%0d", "%7f", "%c2%85",
    "%20", "%00", "%25", "%ff", "admin", "/admin", "adm%69n", "x", "[::1]", ":80", "@x", "?/",
]
# fmt: on
_ALL = ["/" + "".join(some) for n in (1, 2, 3) for some in itertools.product(_PIECES, repeat=n)]
# A fixed choice: another one in each run would fail in others' runs.
TARGETS = [*BYPASSES, *_ALL[: len(_PIECES)], *random.Random(5).sample([one for one in _ALL if "min" in one], 600)]


def see_path(target: str, *, strict: bool = True) -> str:
    """Return the path as rules see it. Raises Refusal."""
    found = RequestReader().feed(request(line=b"GET %b HTTP/1.1" % target.encode()))
    assert found is not None
    return gather(found, Connection(ip="192.0.2.1"), strict_path=strict, now=0).path


def is_admin(path: str) -> bool:
    """Return what a rule for /admin would decide, for servers that may ignore case."""
    return path.lower() == "/admin" or path.lower().startswith("/admin/")


@cache
def accepted() -> Mapping[str, str]:
    """Return the path of each target that is accepted, about a quarter."""
    found = {}
    for target in TARGETS:
        with contextlib.suppress(Refusal):
            found[target] = see_path(target)
    return found


# --- the servers ------------------------------------------------------------------------------------------------------

Address = tuple[str, int] | str
"""Of a server: host and port, or the path of a Unix socket."""


def route_at(address: Address, target: str) -> str:
    """Return where the server routes a target: "admin", or anything else."""
    with contextlib.closing(socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(address)
        sock.sendall(b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % target.encode())
        with sock.makefile("rb") as stream:
            return stream.read().rpartition(b"\r\n\r\n")[2].decode("latin-1")


def route_with_go(target: str) -> str:
    """Return where Go's ServeMux routes a target, by its documentation (https://pkg.go.dev/net/http#ServeMux).

    It redirects any request whose path has dot segments or repeated slashes to the clean path, and matches the
    segments, each decoded by itself: escaped dots and slashes stay within theirs.
    """
    path = target.partition("?")[0]
    clean = posixpath.normpath(path).replace("//", "/") + ("/" if path.endswith("/") and path != "/" else "")
    if clean != path:
        return "redirected"
    return "admin" if unquote(path.split("/")[1]) == "admin" else "other"


def route_with_go_1_21(target: str) -> str:
    """Return where ServeMux routed a target up to Go 1.21, which decoded the path first."""
    return route_with_go(unquote(target.partition("?")[0]))


@contextlib.contextmanager
def servers_of(command: list[str]) -> Iterator[Mapping[str, Address]]:
    process = start_process(command, cwd=CLIENTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="ascii")
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield {name: ("127.0.0.1", port) for name, port in json.loads(process.stdout.readline()).items()}
        process.stdin.close()
        process.wait(TIMEOUT)


@pytest.fixture(scope="module")
def python_servers() -> Iterator[Mapping[str, Address]]:
    for name in ("aiohttp", "tornado"):
        if importlib.util.find_spec(name) is None:
            missing(f"{name} is not installed: ./scripts/install gets it")
    with servers_of([sys.executable, "routers.py"]) as ports:
        yield ports


@pytest.fixture(scope="module")
def node_servers() -> Iterator[Mapping[str, Address]]:
    node = require("node", "nodejs")
    if not (CLIENTS / "node_modules" / "express").is_dir():
        missing("Express is not installed: ./scripts/install gets it")
    with servers_of([node, "routers.mjs"]) as ports:
        yield ports


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Address]]:
    folder = tmp_path_factory.mktemp("nginx")
    (folder / "nginx.conf").write_text(
        f"""
daemon off; master_process off; pid {folder}/pid; error_log stderr crit;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen unix:{folder}/socket;
    location / {{ return 200 other; }}
    location = /admin {{ return 200 admin; }}
    location /admin/ {{ return 200 admin; }}
  }}
}}
"""
    )
    address = str(folder / "socket")
    process = start_process(
        [require("nginx"), "-e", "stderr", "-p", str(folder), "-c", "nginx.conf"], stderr=subprocess.DEVNULL
    )
    try:
        eventually(lambda: Path(address).is_socket())
        yield {"nginx": address}
    finally:
        process.terminate()
        process.wait(TIMEOUT)


PYTHON, NODE = ("starlette", "aiohttp", "tornado"), ("url", "express")


@pytest.fixture(params=[*PYTHON, *NODE, "nginx", "go", "go 1.21"])
def route(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """The routing of each server."""
    name = request.param
    if name.startswith("go"):
        return route_with_go if name == "go" else route_with_go_1_21
    fixture = "python_servers" if name in PYTHON else "node_servers" if name in NODE else "nginx"
    address = request.getfixturevalue(fixture)[name]
    return lambda target: route_at(address, target)


# --- what they did ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", BYPASSES)
def test_what_was_a_bypass_is_refused(target: str) -> None:
    assert not is_admin(see_path(target, strict=False))
    with pytest.raises(Refusal) as caught:
        see_path(target)
    assert (caught.value.status, caught.value.reason) == (400, "ambiguous target")


def test_rules_see_where_servers_route(route: Callable[[str], str]) -> None:
    assert route("/admin") == route("/admin/x") == "admin" != route("/x")
    routed = {target for target in accepted() if route(target) == "admin"}
    assert len(routed) > 10
    assert {target for target in routed if not is_admin(accepted()[target])} == set()


@pytest.mark.parametrize("name", ["starlette", "aiohttp", "nginx"])
def test_servers_that_decode_the_path_route_as_rules_see(name: str, request: pytest.FixtureRequest) -> None:
    address = request.getfixturevalue("nginx" if name == "nginx" else "python_servers")[name]
    missed = {target for target, path in accepted().items() if is_admin(path) != (route_at(address, target) == "admin")}
    assert missed == set()


def test_bypasses_are_what_servers_do(
    python_servers: Mapping[str, Address], node_servers: Mapping[str, Address]
) -> None:
    """Each refusal of `BYPASSES` is needed: some server routes it to /admin."""
    addresses = [*python_servers.values(), *node_servers.values()]
    assert [one for one in BYPASSES if not any(route_at(each, one) == "admin" for each in addresses)] == []
