"""The cost of an edge worker: the same handshakes without a worker, with an empty one, and with one that does work."""

from collections.abc import Iterator

from scripts.load.figures import Figure, handshakes
from scripts.load.firewall import HEAD, beside
from scripts.load.subjects import Subject

EMPTY = """\
async def fetch(request, env):
    return request
"""

CHANGES = """\
from tlstunnel.edge import Reply


async def fetch(request, env):
    if "sid" not in request.cookies and request.headers.get("Upgrade") is None:
        return Reply(401, "sign in first")
    return request.forward(headers={"X-User": "7"}, remove_headers=["X-Debug"])
"""

WAITS = """\
import asyncio


async def fetch(request, env):
    await asyncio.sleep(0.001)
    return request
"""

WORKERS = {"no worker": "", "empty worker": EMPTY, "changes": CHANGES, "waits 1 ms": WAITS}
"""The site is the same for each; the request is a browser's."""


def list_variants(program: str) -> Iterator[Subject]:
    """Return the tunnel with each of the workers."""
    for name, code in WORKERS.items():
        stem = name.replace(" ", "-")
        files = {f"{stem}.toml": HEAD + (f'worker = "$dir/{stem}.py:fetch"\n' if code else "")}
        yield Subject(
            name=name,
            command=(program, "start", "--config", f"$dir/{stem}.toml"),
            files=files | ({f"{stem}.py": code} if code else {}),
            version=(program, "--version"),
            is_peer=name == "no worker",
        )


def choose(seconds: float | None) -> list[Figure]:
    """Return the figures of ``scripts/bench --edge``."""
    seconds = seconds or 1.5
    # One at a time wakes the workers' thread for each; many share a wake-up.
    at_once = [handshakes("resumed", seconds, count) for count in (1, 4, 32)]
    return [*at_once, handshakes("full", seconds), beside(seconds)]
