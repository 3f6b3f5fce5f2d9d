"""Sign-in by a JSON Web Token (RFC 7519): its signature by the keys of a JWKS file, and who it is from, for and until.

Needs ``PyJWT[crypto]`` where tlstunnel is installed::

    [[sites]]
    names = ["chat.example.com"]
    origins = ["10.0.0.5:3000"]
    worker = "edge/jwt_check.py:fetch"
    web_origins = ["same"]
    max_age = "1h"

    [sites.worker_config]
    jwks = "/etc/tlstunnel/jwks.json"
    issuer = "https://login.example.com/"
    audience = "chat"
    cookie = "token"
    reload_every = 5

The token comes in ``Authorization: Bearer``, or in the cookie. ``web_origins`` belongs to the cookie: a browser
sends it with the WebSocket of any page. ``max_age`` because a tunnel outlives the token that opened it.

The origin gets the token's subject as ``X-User``, and no ``X-User`` of the client's. Replace the file by a rename, and
its keys are used within ``reload_every`` seconds; while it cannot be read, those of before are. Of two cookies of the
name, the first counts: the origin has to go by ``X-User``, and not by the cookie.
"""

import asyncio
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt

from tlstunnel.edge import Reply, UpgradeRequest

# Never taken from the token: "none" would need no key, and HS256 would take a public key for a shared secret.
ALGORITHMS = ("RS256", "PS256", "ES256", "ES384", "EdDSA")
LEEWAY = 10  # seconds that the issuer's clock and this one may differ
# OpenID Connect Core section 2. What is none could not stand in a field, or would mean something else there.
SUBJECT = re.compile(r"[!-~]{1,255}")

LOG = logging.getLogger(__name__)

Keys = dict[str | None, jwt.PyJWK]


@dataclass
class Env:
    """What a request is checked by. `stamp` tells whether the file is still the one that the keys are from."""

    file: Path
    issuer: str
    audience: str
    cookie: str
    stamp: object
    keys: Keys
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


async def setup(config: dict[str, Any]) -> Env:
    """Read the keys, and keep looking after their file. One that cannot be read refuses the configuration."""
    file = Path(config["jwks"])
    stamp = await asyncio.to_thread(_stamp, file)
    keys = await asyncio.to_thread(_keys, file)
    env = Env(file, config["issuer"], config["audience"], config.get("cookie", "token"), stamp, keys)
    env.tasks.add(asyncio.create_task(_follow(env, float(config.get("reload_every", 5)))))
    return env


async def teardown(env: Env) -> None:
    """Stop looking after the file."""
    for task in env.tasks:
        task.cancel()


async def fetch(request: UpgradeRequest, env: Env) -> UpgradeRequest | Reply:
    """Let in who has a valid token."""
    token = _token(request, env.cookie)
    if token is None:
        return Reply(401, "a token is needed\n", {"WWW-Authenticate": "Bearer"})
    try:
        user = _subject(token, env)
    except Exception as error:
        # Not only PyJWT's own errors: whatever a stranger's token brings about, it is not a valid one.
        # The token is not logged, nor what is said about it: either may be a secret.
        LOG.info("%s: token refused: %s", request.id, type(error).__name__)
        return Reply(401, "this token is not valid\n", {"WWW-Authenticate": 'Bearer error="invalid_token"'})
    return request.forward(headers={"X-User": user})


def _token(request: UpgradeRequest, cookie: str) -> str | None:
    """The token, None where there is none. Whoever sends Authorization means it: then the cookie is not asked."""
    fields = request.headers.getall("Authorization", [])
    if not fields:
        return request.cookies.get(cookie)
    scheme, _, token = fields[0].partition(" ")
    return token.strip() if len(fields) == 1 and scheme.lower() == "bearer" else ""


def _subject(token: str, env: Env) -> str:
    """Whose token it is. Raises for one that is not valid."""
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
    return subject


def _keys(file: Path) -> Keys:
    """The file's keys by their id. Raises OSError, ValueError or PyJWTError.

    A shared secret (``oct``) has no place in a file that others may read, and is left out with what is not for
    signatures.
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
    """Read the file again when it has changed. In a thread: a file may be slow, and requests are not to wait for it."""
    while True:
        await asyncio.sleep(every)
        stamp = await asyncio.to_thread(_stamp, env.file)
        if stamp == env.stamp:
            continue
        env.stamp = stamp
        try:
            env.keys = await asyncio.to_thread(_keys, env.file)
        except Exception as error:
            LOG.warning("%s: the keys stay those of before: %s", env.file, error)
        else:
            LOG.info("%s: read again, %d keys", env.file, len(env.keys))
