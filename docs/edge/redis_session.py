"""Sign-in with a session in Redis or Valkey: a cookie has its id, and a Redis hash has its user.

Needs ``redis`` (redis-py) where tlstunnel is installed::

    [[sites]]
    names = ["chat.example.com"]
    origins = ["10.0.0.5:3000"]
    worker = "edge/redis_session.py:fetch"
    worker_config = { url = "redis://10.0.0.20:6379/0", cookie = "sid" }
    web_origins = ["same"]

The application runs ``HSET session:SID user USER`` and ``EXPIRE session:SID 3600``. The origin gets USER in
``X-User``, with all but visible ASCII percent-encoded, and never the client's own field. ``web_origins`` is needed
because browsers send the cookie with the WebSocket of any page.

When a user signs out, delete the session, and then run ``tlstunnel tunnels end --tag user=USER`` with the same USER, or
do the same by HTTP: all tunnels of the user end.

When Redis is down or slow, the response is a 503 within half a second: no client connects without a session, and
clients can try again. The tunnel starts without Redis, too, and open tunnels do not need it.
"""

import asyncio
import logging
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tlstunnel.edge import Reply, WorkerRequest

LOOK_UP = 0.5  # seconds; less than worker_timeout, so that the response is this worker's
CONNECTIONS = 20  # at most; further requests wait for one
LONGEST_TAG = 255  # characters; tunnels of users with longer names cannot be ended by them
SID = re.compile(r"[A-Za-z0-9_-]{16,128}")  # as secrets.token_urlsafe makes them

LOG = logging.getLogger(__name__)


@dataclass
class Env:
    """The client, and the name of the cookie."""

    redis: Redis
    cookie: str


async def setup(config: dict[str, Any]) -> Env:
    """Create the client, which connects when it is first used."""
    pool = BlockingConnectionPool.from_url(
        config["url"],
        max_connections=CONNECTIONS,
        timeout=LOOK_UP,
        socket_connect_timeout=LOOK_UP,
        socket_timeout=LOOK_UP,
        retry=Retry(NoBackoff(), 1),  # once, in case Redis has closed the connection; without a delay
    )
    return Env(Redis.from_pool(pool), config.get("cookie", "sid"))


async def teardown(env: Env) -> None:
    """Close the connections."""
    await env.redis.aclose()


async def fetch(request: WorkerRequest, env: Env) -> WorkerRequest | Reply:
    """Accept clients that have a session."""
    sid = request.cookies.get(env.cookie, "")
    if not SID.fullmatch(sid):
        return Reply(401, "sign in first\n")
    try:
        async with asyncio.timeout(LOOK_UP):
            user = await env.redis.hget(f"session:{sid}", "user")
    except (RedisError, OSError, TimeoutError) as error:
        LOG.warning("%s: no session could be looked up: %s", request.id, str(error) or type(error).__name__)
        return Reply(503, "try again\n", {"Retry-After": "1"})
    if not user:
        return Reply(401, "sign in first\n")
    # A user may have chosen any name: with a line break, or with characters that a field cannot contain.
    name = quote(user, safe="!#$&'()*+,/:;=?@[]")
    return request.forward(headers={"X-User": name}, tags={"user": name} if len(name) <= LONGEST_TAG else {})
