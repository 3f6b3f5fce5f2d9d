"""Requests as data: attacks that must be blocked, and ordinary handshakes that must not.

Every one goes through the tunnel's own reader first, so that nothing is here that could not reach the firewall.
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
    """A request, its `name` in reports, and the `category` of rules that must name it, "" for an ordinary one."""

    name: str
    category: str
    request: UpgradeRequest
    profile: str = ""
    paranoia: int = 1


def attacks() -> list[Sample]:
    clients = _read("handshakes.toml")["clients"]
    return [
        Sample(
            f"{attack['category']}: {attack['name']}",
            attack["category"],
            upgrade_request(attack["target"], _merged(clients["chromium"], attack.get("headers", []))),
        )
        for attack in _read("attacks.toml")["attacks"]
    ]


def handshakes() -> list[Sample]:
    """The ordinary ones that no profile is needed for."""
    return [sample for sample in _handshakes() if not sample.profile]


def profile_handshakes() -> list[Sample]:
    """The ordinary ones that CRS blocks at `paranoia` unless the profile is on."""
    return [sample for sample in _handshakes() if sample.profile]


def _handshakes() -> list[Sample]:
    document = _read("handshakes.toml")
    clients = document["clients"]
    return [
        Sample(
            f"{item['client']}: {item['name']}",
            "",
            upgrade_request(item["target"], _merged(clients[item["client"]], item.get("headers", []))),
            item.get("profile", ""),
            item.get("paranoia", 1),
        )
        for item in document["handshakes"]
    ]


def upgrade_request(target: str, headers: list[str]) -> UpgradeRequest:
    head = "\r\n".join([f"GET {target} HTTP/1.1", *headers, "", ""])
    request = RequestReader().feed(head.encode())
    assert request is not None
    return request


def _merged(base: list[str], extra: list[str]) -> list[str]:
    """`base` with `extra` in the place of the headers of the same name, or behind."""
    replaced = {header.split(":", 1)[0].lower(): header for header in extra}
    kept = [replaced.pop(header.split(":", 1)[0].lower(), header) for header in base]
    return [*kept, *replaced.values()]


def _read(name: str) -> dict[str, Any]:
    with (_FOLDER / name).open("rb") as file:
        return tomllib.load(file)
