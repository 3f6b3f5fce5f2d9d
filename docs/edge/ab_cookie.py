"""A/B tests: a part of the visitors, by a hash of their cookie, goes to another origin, and always the same part.

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

Who has no cookie gets the first variant. The origin gets the variant's name as ``X-Variant``, and none of the client's.
Another `experiment` divides the visitors in another way; a percentage that grows keeps those who are in it already,
where there are two variants. A visitor can choose the cookie, and so the variant: this protects nothing, which is why
``worker_on_error`` may be "forward".
"""

import hashlib
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tlstunnel.edge import UpgradeRequest


@dataclass(frozen=True)
class Variant:
    """Where a part of the visitors goes: those whose bucket is below `end`, and not below the one before."""

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
    """Read the experiment. What is wrong with it refuses the configuration."""
    variants = config["variants"]
    ends = list(accumulate(variant["percent"] for variant in variants))
    if not ends or ends[-1] != 100 or any(variant["percent"] < 0 for variant in variants):
        raise ValueError("the percentages of the variants have to make 100 together")
    made = (Variant(one["name"], one["origin"], end) for one, end in zip(variants, ends, strict=True))
    return Env(config["experiment"], config["cookie"], tuple(made))


async def fetch(request: UpgradeRequest, env: Env) -> UpgradeRequest:
    """Send a visitor to the origin of their variant."""
    visitor = request.cookies.get(env.cookie)
    variant = _variant(env, visitor) if visitor else env.variants[0]
    return request.forward(origin=variant.origin, headers={"X-Variant": variant.name})


def _variant(env: Env, visitor: str) -> Variant:
    # Not hash(): that is another in each process.
    digest = hashlib.sha256(f"{env.experiment}\n{visitor}".encode()).digest()
    bucket = int.from_bytes(digest[:8]) % 100
    return next(variant for variant in env.variants if bucket < variant.end)
