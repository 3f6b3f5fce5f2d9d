"""Sign-in with a JSON Web Token (RFC 7519): checks its signature, issuer, audience and expiry. Keys are in a JWKS file.

Needs ``PyJWT[crypto]`` where tlstunnel is installed::

    [[sites]]
    names = ["chat.example.com"]
    origins = ["10.0.0.5:3000"]
    worker = "edge/jwt_check.py:fetch"
    web_origins = ["same"]

    [sites.worker_config]
    jwks = "/etc/tlstunnel/jwks.json"
    issuer = "https://login.example.com/"
    audience = "chat"
    cookie = "token"
    reload_every = 5

The token is in ``Authorization: Bearer`` or in the cookie. The cookie needs ``web_origins``: browsers send it with the
WebSocket of any page.

A tunnel ends when its token expires, and after a week in any case. ``tlstunnel tunnels end --tag user=SUBJECT`` ends
all tunnels of a user at once.

The origin gets the token's subject in ``X-User``, and never the client's own field. Replace the file by renaming a
new one over it, and the new keys are used within ``reload_every`` seconds. While the file cannot be read, the
previous keys stay in use. If the cookie occurs twice, the first one counts: the origin has to rely on ``X-User``, not
on the cookie.
"""

import asyncio
import logging
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt

from tlstunnel.edge import Reply, WorkerRequest

# Never the algorithm in the token: "none" needs no key, and HS256 would use a public key as a shared secret.
ALGORITHMS = ("RS256", "PS256", "ES256", "ES384", "EdDSA")
LEEWAY = 10  # seconds by which the issuer's clock may differ from this one
LONGEST = 7 * 86_400  # seconds that a tunnel may be open, whatever its token says
# OpenID Connect Core section 2. Other values cannot be in a field, or would mean something else there.
SUBJECT = re.compile(r"[!-~]{1,255}")

LOG = logging.getLogger(__name__)

Keys = dict[str | None, jwt.PyJWK]


@dataclass
class Env:
    """What requests are checked with. `stamp` identifies the version of the file that the keys are from."""

    file: Path
    issuer: str
    audience: str
    cookie: str
    stamp: object
    keys: Keys
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


async def setup(config: dict[str, Any]) -> Env:
    """Read the keys, and watch their file. If it cannot be read, the configuration is invalid."""
    file = Path(config["jwks"])
    stamp = await asyncio.to_thread(_stamp, file)
    keys = await asyncio.to_thread(_keys, file)
    env = Env(file, config["issuer"], config["audience"], config.get("cookie", "token"), stamp, keys)
    env.tasks.add(asyncio.create_task(_follow(env, float(config.get("reload_every", 5)))))
    return env


async def teardown(env: Env) -> None:
    """Stop watching the file."""
    for task in env.tasks:
        task.cancel()


async def fetch(request: WorkerRequest, env: Env) -> WorkerRequest | Reply:
    """Accept clients with a valid token."""
    token = _token(request, env.cookie)
    if token is None:
        return Reply(401, "a token is needed\n", {"WWW-Authenticate": "Bearer"})
    try:
        user, expiry = _check(token, env)
    except Exception as error:
        # Not only PyJWT's errors: a token that causes any exception is not valid.
        # Neither the token nor the error's text is logged: both may contain a secret.
        LOG.info("%s: token refused: %s", request.id, type(error).__name__)
        return Reply(401, "this token is not valid\n", {"WWW-Authenticate": 'Bearer error="invalid_token"'})
    until = min(expiry + LEEWAY, time.time() + LONGEST)
    return request.forward(headers={"X-User": user}, until=until, tags={"user": user})


def _token(request: WorkerRequest, cookie: str) -> str | None:
    """Return the token, or None. If there is an Authorization field, the cookie is ignored."""
    fields = request.headers.getall("Authorization", [])
    if not fields:
        return request.cookies.get(cookie)
    scheme, _, token = fields[0].partition(" ")
    return token.strip() if len(fields) == 1 and scheme.lower() == "bearer" else ""


def _check(token: str, env: Env) -> tuple[str, float]:
    """Return the subject of the token, and when it expires. Raises an exception if it is not valid."""
    key = env.keys[jwt.get_unverified_header(token).get("kid")]
    claims = jwt.decode(
        token,
        key,
        algorithms=ALGORITHMS,
        audience=env.audience,
        issuer=env.issuer,
        leeway=LEEWAY,
        options={"require": ["exp", "iss", "aud", "sub"], "enforce_minimum_key_length": True},
    )
    subject: str = claims["sub"]
    if not SUBJECT.fullmatch(subject):
        raise ValueError("the subject cannot be the value of a field")
    return subject, float(claims["exp"])


def _keys(file: Path) -> Keys:
    """Return the file's keys by their id. Raises OSError, ValueError or PyJWTError.

    Keys that are not for signatures are ignored, and so are shared secrets (``oct``), which do not belong in a file
    that others may read.
    """
    found = jwt.PyJWKSet.from_json(file.read_text("utf-8"))
    keys = {
        key.key_id: key for key in found if key.algorithm_name in ALGORITHMS and key.public_key_use in {None, "sig"}
    }
    if not keys:
        raise ValueError(f"{file} has no key for {', '.join(ALGORITHMS)}")
    return keys


def _stamp(file: Path) -> object:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


async def _follow(env: Env, every: float) -> None:
    """Read the file again when it has changed. In a thread: reading may be slow, and requests must not wait for it."""
    while True:
        await asyncio.sleep(every)
        stamp = await asyncio.to_thread(_stamp, env.file)
        if stamp == env.stamp:
            continue
        env.stamp = stamp
        try:
            env.keys = await asyncio.to_thread(_keys, env.file)
        except Exception as error:
            LOG.warning("%s: the previous keys stay in use: %s", env.file, error)
        else:
            LOG.info("%s: read again, %d keys", env.file, len(env.keys))
