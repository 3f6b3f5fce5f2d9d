"""Sign-in by a session in Redis or Valkey: a cookie names it, and the hash of that key holds whose it is.

Needs ``redis`` (redis-py) where tlstunnel is installed::

    [[sites]]
    names = ["chat.example.com"]
    origins = ["10.0.0.5:3000"]
    worker = "edge/redis_session.py:fetch"
    worker_config = { url = "redis://10.0.0.20:6379/0", cookie = "sid" }
    web_origins = ["same"]

The application does ``HSET session:SID user USER`` and ``EXPIRE session:SID 3600``. The origin gets USER as ``X-User``,
percent-encoded where it is no visible ASCII, and no ``X-User`` of the client's. ``web_origins`` because a browser
sends the cookie with the WebSocket of any page.

When Redis is down or slow, the answer is a 503 within half a second: nobody gets in without a session, and clients
come back. The tunnel starts without Redis too, and open tunnels do not need it.
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

from tlstunnel.edge import Reply, UpgradeRequest

LOOK_UP = 0.5  # seconds; less than worker_timeout, so that the answer is this worker's
CONNECTIONS = 20  # at most; more requests wait for one
SID = re.compile(r"[A-Za-z0-9_-]{16,128}")  # as secrets.token_urlsafe makes them

LOG = logging.getLogger(__name__)


@dataclass
class Env:
    """The client, and the name of the cookie."""

    redis: Redis
    cookie: str


async def setup(config: dict[str, Any]) -> Env:
    """Make the client, which connects when it is first needed."""
    pool = BlockingConnectionPool.from_url(
        config["url"],
        max_connections=CONNECTIONS,
        timeout=LOOK_UP,
        socket_connect_timeout=LOOK_UP,
        socket_timeout=LOOK_UP,
        retry=Retry(NoBackoff(), 1),  # once, for a connection that Redis has closed since; not with seconds between
    )
    return Env(Redis.from_pool(pool), config.get("cookie", "sid"))


async def teardown(env: Env) -> None:
    """Close the connections."""
    await env.redis.aclose()


async def fetch(request: UpgradeRequest, env: Env) -> UpgradeRequest | Reply:
    """Let in who has a session."""
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
    # A name that somebody has chosen may hold anything: a line break, or letters that no field can hold.
    return request.forward(headers={"X-User": quote(user, safe="!#$&'()*+,/:;=?@[]")})
