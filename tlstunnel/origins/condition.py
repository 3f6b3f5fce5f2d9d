"""What an origin is like at the moment, as one process sees it.

Tested by tests/promises/test_inventory.py.
"""

from dataclasses import dataclass
from typing import Literal

from tlstunnel.config import OriginConfig

State = Literal["healthy", "ejected", "trial", "down", "unresolved"]
"""See `tlstunnel.commands.sites.OriginStatus`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What a configured origin is like: see `tlstunnel.origins.members.Use` for the numbers.

    `until` is when its ejection ends, a time of the loop. `addresses` are those of its name.
    """

    config: OriginConfig
    state: State
    checked: bool
    until: float | None
    tunnels: int
    connects: int
    failures: int
    connected: float
    problem: str
    failed: float
    addresses: tuple[str, ...]
