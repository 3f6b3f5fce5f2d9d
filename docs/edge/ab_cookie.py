"""A/B tests: send a share of the visitors to another origin, chosen by a hash of their cookie.

    [[sites]]
    names = ["chat.example.com"]
    origins = ["10.0.0.5:3000"]
    worker = "edge/ab_cookie.py:fetch"
    worker_origins = ["10.0.1.5"]
    worker_on_error = "forward"

    [sites.worker_config]
    experiment = "new-editor"
    cookie = "uid"
    variants = [
        { name = "old", percent = 90, origin = "10.0.0.5:3000" },
        { name = "new", percent = 10, origin = "10.0.1.5:3000" },
    ]

A visitor always gets the same variant; without a cookie, it is the first one. The origin gets the variant's name in
``X-Variant``, and never the client's own field. Another `experiment` divides the visitors differently. With two
variants, raising a percentage keeps the visitors who are in it already. Visitors can choose the cookie, and so the
variant: this protects nothing, which is why ``worker_on_error`` may be "forward".
"""

import hashlib
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tlstunnel.edge import WorkerRequest


@dataclass(frozen=True)
class Variant:
    """The origin for a share of the visitors: those whose bucket is below `end`, and not below the previous one."""

    name: str
    origin: str
    end: int


@dataclass(frozen=True)
class Env:
    """The experiment."""

    experiment: str
    cookie: str
    variants: tuple[Variant, ...]


async def setup(config: dict[str, Any]) -> Env:
    """Read the experiment. An exception here makes the configuration invalid."""
    variants = config["variants"]
    ends = list(accumulate(variant["percent"] for variant in variants))
    if not ends or ends[-1] != 100 or any(variant["percent"] < 0 for variant in variants):
        raise ValueError("the percentages of the variants must add up to 100")
    made = (Variant(one["name"], one["origin"], end) for one, end in zip(variants, ends, strict=True))
    return Env(config["experiment"], config["cookie"], tuple(made))


async def fetch(request: WorkerRequest, env: Env) -> WorkerRequest:
    """Send a visitor to the origin of their variant."""
    visitor = request.cookies.get(env.cookie)
    variant = _variant(env, visitor) if visitor else env.variants[0]
    return request.forward(origin=variant.origin, headers={"X-Variant": variant.name})


def _variant(env: Env, visitor: str) -> Variant:
    # Not hash(), which differs in each process.
    digest = hashlib.sha256(f"{env.experiment}\n{visitor}".encode()).digest()
    bucket = int.from_bytes(digest[:8]) % 100
    return next(variant for variant in env.variants if bucket < variant.end)
