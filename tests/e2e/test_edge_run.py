"""`tlstunnel edge run` and `config check`, with which authors try a worker before clients connect."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.harness import PROGRAM, child_environment

WORKER = """
import asyncio, logging
from tlstunnel.edge import Reply

log = logging.getLogger(__name__)


async def setup(config):
    log.info("set up with %s", sorted(config))
    return config


async def fetch(request, env):
    match request.path:
        case "/no":
            return Reply(302, "elsewhere", {"Location": "/login", "Set-Cookie": ["a=1", "b=2"]})
        case "/boom":
            return request.forward(headers={"X-Set": request.headers["X-Given"] + "\\n"})
        case "/late":
            await asyncio.sleep(60)
        case "/limits":
            return request.forward(until=4_102_444_800, tags={"user": "4 2", "room": "a"})
        case "/shard":
            return request.forward(origin=env["shard"], path="/v2", headers={"X-User": request.client_address})
    return request
"""

CONFIG = """
[[sites]]
names = ["chat.example"]
origins = ["10.0.0.5:3000", "unix:chat.sock"]
set_headers = { X-Site = "chat" }
worker = "edge.py:fetch"
worker_config = { shard = "one.shards.example:3000" }
worker_origins = ["*.shards.example"]
worker_timeout = "100ms"

[[sites]]
names = ["closed.example"]
origins = ["10.0.0.6:3000"]
worker = "edge.py:fetch"
worker_config = { shard = "one.shards.example:3000" }
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="tlstunnel-test-") as name:
        (Path(name) / "edge.py").write_text(WORKER)
        (Path(name) / "tlstunnel.toml").write_text(CONFIG)
        yield Path(name)


def said(folder: Path, *arguments: str, status: int = 0) -> tuple[str, str]:
    """Run a command that must exit with this status; return its standard output and standard error."""
    done = subprocess.run(
        [*PROGRAM, *arguments],
        cwd=folder,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done
    return done.stdout, done.stderr


def run(folder: Path, *arguments: str, status: int = 0) -> tuple[str, str]:
    return said(folder, "edge", "run", "edge.py:fetch", *arguments, status=status)


def test_the_request_for_the_origin(folder: Path) -> None:
    """Including the site's own changes of fields, which the worker's changes follow."""
    out, err = run(
        folder, "GET /shard?a=1", "--config", "tlstunnel.toml", "--ip", "198.51.100.7", "--header", "X-User: 1"
    )
    words = [line.split(None, 1) for line in out.splitlines()]
    assert ["outcome", "forwarded"] in words
    assert ["origin", "one.shards.example:3000"] in words
    assert "  GET /v2?a=1 HTTP/1.1" in out.splitlines()
    assert out.splitlines()[-2:] == ["  X-Site: chat", "  X-User: 198.51.100.7"]
    assert out.count("X-User") == 1
    assert "set up with ['shard']" in err


def test_the_tunnel_chooses_if_the_worker_does_not(folder: Path) -> None:
    out, _ = run(folder, "GET /", "--config", "tlstunnel.toml")
    assert "chosen by the tunnel: 10.0.0.5:3000, unix:chat.sock" in out


def test_the_response_for_the_client(folder: Path) -> None:
    out, _ = run(folder, "GET /no")
    lines = [line.strip() for line in out.splitlines()]
    assert {"HTTP/1.1 302 Found", "Location: /login", "Set-Cookie: a=1", "Set-Cookie: b=2", "elsewhere"} <= set(lines)


def test_json(folder: Path) -> None:
    out, _ = run(folder, "GET /no", "--json")
    told = json.loads(out)
    assert (told["outcome"], told["status"], told["body"]) == ("replied", 302, "elsewhere")
    assert ["Set-Cookie", "b=2"] in told["headers"]
    out, _ = run(folder, "GET /shard", "--json", "--worker-config", '{"shard": "[2001:db8::1]:80"}')
    told = json.loads(out)
    assert (told["outcome"], told["origin"], told["target"]) == ("forwarded", "[2001:db8::1]:80", "/v2")
    assert ["X-User", "127.0.0.1"] in told["headers"]


def test_when_the_tunnel_would_end_and_its_tags(folder: Path) -> None:
    lines = run(folder, "GET /limits")[0].splitlines()
    assert "until       2100-01-01 00:00:00 UTC" in lines
    assert "tags        room=a, user=4 2" in lines
    printed = json.loads(run(folder, "GET /limits", "--json")[0])
    assert (printed["until"], printed["tags"]) == (4_102_444_800, {"room": "a", "user": "4 2"})


def test_a_worker_that_fails(folder: Path) -> None:
    """Exit status 1, and the traceback with the problem and the line."""
    out, err = run(folder, "GET /boom", "--header", "X-Given: 1", status=1)
    assert "worker failed: 500" in out
    assert f'File "{folder}/edge.py", line 18, in fetch' in err
    assert "EdgeError: the value of X-Set contains a control character" in err


def test_a_worker_that_is_late(folder: Path) -> None:
    """With the deadline of the site."""
    out, _ = run(folder, "GET /late", "--config", "tlstunnel.toml", status=1)
    assert "worker timed out: 504" in out
    assert "within 0.1 s" in out


def test_an_origin_that_is_not_allowed(folder: Path) -> None:
    out, _ = run(folder, "GET /shard", "--config", "tlstunnel.toml", "--header", "Host: closed.example", status=1)
    assert "origin not allowed: 502" in out
    assert "one.shards.example:3000: neither an origin of the site nor in worker_origins" in out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("edge.py", "GET /"), 2, 'expected "edge/chat.py:fetch" or "package.module:fetch"'),
        (("edge.py:fetch", "GET"), 2, "expected a method and a target"),
        (("edge.py:fetch", "GET /", "--header", "nothing"), 2, "'nothing' is not a header field"),
        (("edge.py:fetch", "GET /", "--ip", "home"), 2, "'home' is not an IP address"),
        (("edge.py:fetch", "GET /", "--worker-config", "[1]"), 2, "expected a JSON object"),
        (("edge.py:fetch", "POST /"), 1, "the request is refused before a worker is called"),
        (("edge.py:none", "GET /"), 1, "there is no none in"),
        (("gone.py:fetch", "GET /"), 1, "cannot be read: No such file or directory"),
        (("no.such.module:fetch", "GET /"), 1, "there is no module no"),
        (("edge.py:fetch", "GET /", "--config", "gone.toml"), 1, "gone.toml: cannot be read"),
        (
            ("edge.py:fetch", "GET /", "--config", "tlstunnel.toml", "--header", "Host: other.example"),
            1,
            "other.example is not a name of any site",
        ),
    ],
)
def test_errors_are_one_line(folder: Path, arguments: tuple[str, ...], status: int, words: str) -> None:
    _, err = said(folder, "edge", "run", *arguments, status=status)
    assert words in err
    assert "Traceback" not in err


def test_config_check_loads_workers_without_setup(folder: Path) -> None:
    out, err = said(folder, "config", "check")
    assert f"worker {folder}/edge.py:fetch" in out
    assert "set up" not in err
    bad = folder / "bad.toml"
    bad.write_text(CONFIG.replace("edge.py:fetch", "bad.py:fetch", 1))
    (folder / "bad.py").write_text(
        "async def fetch(request, env):\n    return request\n\nimport nothing_of_this_name\n"
    )
    _, err = said(folder, "config", "check", "bad.toml", status=1)
    assert f"sites[0].worker: the edge worker {folder}/bad.py:4: cannot be imported: ModuleNotFoundError" in err
