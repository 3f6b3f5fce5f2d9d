"""Sharding: everyone in ``/rooms/NAME`` gets the same origin, chosen by the room's name.

    [[sites]]
    names = ["chat.example.com"]
    origins = ["shard-1.internal:3000"]
    worker = "edge/shard_by_path.py:fetch"
    worker_origins = ["*.internal"]

    [sites.worker_config]
    prefix = "/rooms/"
    shards = ["shard-1.internal:3000", "shard-2.internal:3000", "shard-3.internal:3000"]
    pinned = { lobby = "shard-large.internal:3000" }

A room is on the shard whose name makes the largest hash with the room's name (rendezvous hashing). When a shard is
added, only the rooms that move to it change their shard; when one is removed, only its own rooms do. A room that is
too large for a shared origin is `pinned` to its own. Other paths get 404. For a few fixed paths, ``[[sites.routes]]``
need no worker.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from tlstunnel.edge import Reply, WorkerRequest


@dataclass(frozen=True)
class Env:
    """The shards, and the rooms that are pinned."""

    prefix: str
    shards: tuple[str, ...]
    pinned: dict[str, str]


async def setup(config: dict[str, Any]) -> Env:
    """Read the shards. An exception here makes the configuration invalid."""
    shards, prefix = tuple(config["shards"]), config["prefix"]
    if not shards or len(set(shards)) != len(shards):
        raise ValueError("shards are one origin or more, each of them once")
    if not prefix.startswith("/") or not prefix.endswith("/"):
        raise ValueError('the prefix begins and ends with "/"')
    return Env(prefix, shards, config.get("pinned", {}))


async def fetch(request: WorkerRequest, env: Env) -> WorkerRequest | Reply:
    """Send a request to its room's shard."""
    # The normalised path: /rooms/a, /rooms/./a and /rooms/%61 are the same room.
    path = request.path
    room = path.removeprefix(env.prefix).partition("/")[0] if path.startswith(env.prefix) else ""
    if not room:
        return Reply(404, "there is no such room\n")
    shard = env.pinned.get(room) or max(env.shards, key=lambda shard: _weight(shard, room))
    # The origin gets the normalised path, too, so that it sees the same room.
    return request.forward(origin=shard, path=path)


def _weight(shard: str, room: str) -> bytes:
    return hashlib.sha256(f"{shard}\n{room}".encode()).digest()
