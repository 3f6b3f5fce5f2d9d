"""Requests as data: attacks that must be blocked, and ordinary handshakes that must pass.

The tunnel's own reader parses each of them, so all could reach the firewall.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlstunnel.handshake.request import RequestReader, UpgradeRequest

_FOLDER = Path(__file__).parent
KEY = "dGhlIHNhbXBsZSBub25jZQ=="


@dataclass(frozen=True, slots=True)
class Sample:
    """A request, its `name` in reports, and the `category` of rules that must match, "" if it must pass.

    `profile` makes it pass; releases of CRS after `until` let it pass without.
    """

    name: str
    category: str
    request: UpgradeRequest
    profile: str = ""
    paranoia: int = 1
    until: str = ""


def attacks() -> list[Sample]:
    clients = _read("handshakes.toml")["clients"]
    return [
        Sample(
            f"{attack['category']}: {attack['name']}",
            attack["category"],
            upgrade_request(attack["target"], _merge(clients["chromium"], attack.get("headers", []))),
        )
        for attack in _read("attacks.toml")["attacks"]
    ]


def handshakes() -> list[Sample]:
    """Return the ordinary handshakes that need no profile."""
    return [sample for sample in _handshakes() if not sample.profile]


def profile_handshakes() -> list[Sample]:
    """Return the ordinary handshakes that CRS blocks at `paranoia` without the profile."""
    return [sample for sample in _handshakes() if sample.profile]


def _handshakes() -> list[Sample]:
    document = _read("handshakes.toml")
    clients = document["clients"]
    return [
        Sample(
            f"{item['client']}: {item['name']}",
            "",
            upgrade_request(item["target"], _merge(clients[item["client"]], item.get("headers", []))),
            item.get("profile", ""),
            item.get("paranoia", 1),
            item.get("until", ""),
        )
        for item in document["handshakes"]
    ]


def upgrade_request(target: str, headers: list[str]) -> UpgradeRequest:
    head = "\r\n".join([f"GET {target} HTTP/1.1", *headers, "", ""])
    request = RequestReader().feed(head.encode())
    assert request is not None
    return request


def _merge(base: list[str], extra: list[str]) -> list[str]:
    """Return `base` with `extra` in place of the headers of the same name, or at the end."""
    replaced = {header.split(":", 1)[0].lower(): header for header in extra}
    kept = [replaced.pop(header.split(":", 1)[0].lower(), header) for header in base]
    return [*kept, *replaced.values()]


def _read(name: str) -> dict[str, Any]:
    with (_FOLDER / name).open("rb") as file:
        return tomllib.load(file)
