"""The servers behind a site or a route: their addresses, the choice between them, and their health.

Tested by tests/unit/test_config.py.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from tlstunnel.addresses import OriginAddress, normalise_name, quoted
from tlstunnel.config.durations import Timeout
from tlstunnel.config.headers import FIELD_NAME
from tlstunnel.config.kinds import Integer, Kind, PlacedText, Text
from tlstunnel.config.tables import Findings, Shorthand, Table

_BALANCE = re.compile(rf"round_robin|least_tunnels|hash:ip|hash:(header|cookie):{FIELD_NAME.pattern}")
_BALANCES = '"round_robin", "least_tunnels", "hash:ip", "hash:header:NAME" or "hash:cookie:NAME"'
_HEALTH_PATH = re.compile(r"/[!-~]{0,1000}")


def parse_balance(text: str) -> str:
    """Return a way to choose between origins. Raises ValueError."""
    if not _BALANCE.fullmatch(text):
        raise ValueError(f"expected {_BALANCES}, got {quoted(text)}")
    return text


def parse_health_path(text: str) -> str:
    """Return the path that health checks request. Raises ValueError."""
    if not _HEALTH_PATH.fullmatch(text):
        raise ValueError(f'expected a path such as "/healthz", got {quoted(text)}')
    return text


def parse_origin_host(text: str) -> str:
    """Return ``keep``, ``origin``, or a name or address, with or without a port. Raises ValueError."""
    if text not in ("keep", "origin") and not _is_host(text):
        raise ValueError(f'expected "keep", "origin" or a host name, got {quoted(text)}')
    return text


def parse_origin_name(text: str) -> str:
    """Return the name that the certificates of origins have. Raises ValueError."""
    if not _is_name(text):
        raise ValueError(f"expected the name in the certificates of the origins, got {quoted(text)}")
    return text


def _is_name(text: str) -> bool:
    try:
        return "*" not in normalise_name(text)
    except ValueError:
        return False


def _is_host(text: str) -> bool:
    host, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if colon and port.isascii() and port.isdecimal() and int(port) <= 65535:
        text = host
    return text.isascii() and _is_name(text)


Balance = Annotated[str, Text(parse_balance, "round_robin", expected=_BALANCES, pattern=f"^({_BALANCE.pattern})$")]
HealthPath = Annotated[str, Text(parse_health_path, "/healthz", pattern=f"^{_HEALTH_PATH.pattern}$")]
OriginHost = Annotated[str, Text(parse_origin_host, "keep")]
OriginName = Annotated[str, Text(parse_origin_name, "chat.internal")]
MaxTunnels = Annotated[int, Integer(1, 1_000_000)]


class OriginConfig(Table, frozen=True):
    """An origin, and its share of the tunnels. A ``backup`` is used only while no other origin can be."""

    address: Annotated[OriginAddress, PlacedText(OriginAddress.parse, "localhost:3000")]
    weight: Annotated[int, Integer(1, 1000)] = 1
    backup: bool = False
    max_tunnels: MaxTunnels | None = None

    @classmethod
    def table_kind(cls) -> Kind:
        """Return the kind of this table: it may be written as its address alone."""
        return Shorthand(cls, "address")


class Ejection(Table, frozen=True):
    """How many failures in a row eject an origin, and for how long: ``delay``, doubled up to ``max_delay``."""

    renamed: ClassVar[Mapping[str, str]] = {"longest": "max_delay"}

    failures: Annotated[int, Integer(1, 1000)] = 3
    delay: Timeout = Timeout(1)
    max_delay: Timeout = Timeout(60)

    def check_max_delay(self) -> Findings:
        """The delays grow."""
        if self.max_delay < self.delay:
            yield ("max_delay",), f"must not be shorter than delay ({self.delay})"


class Health(Table, frozen=True):
    """The health check of each origin."""

    type: Literal["tcp", "websocket", "http"] = "tcp"
    path: HealthPath = "/"
    interval: Timeout = Timeout(10)
    timeout: Timeout = Timeout(2)

    def check_path(self) -> Findings:
        """Only requests have a path."""
        if self.type == "tcp" and self.path != "/":
            yield ("path",), 'requires type = "websocket" or type = "http"'


def check_pool(origins: Sequence[OriginConfig]) -> Findings:
    """Find what is wrong with the number of origins."""
    if not origins:
        yield ("origins",), 'expected at least one origin, such as origins = ["localhost:3000"]'
    elif all(origin.backup for origin in origins):
        yield ("origins",), "at least one origin must not be a backup"


def check_duplicates(origins: Sequence[OriginConfig]) -> Findings:
    """Find addresses that are listed twice."""
    addresses = [origin.address for origin in origins]
    for index, address in enumerate(addresses):
        if (first := addresses.index(address)) != index:
            yield ("origins", index), f"{address} is origins[{first}] already; to send it more, set its weight"


class RouteConfig(Table, frozen=True):
    """Separate origins for requests whose path starts with ``path``."""

    path: str
    origins: tuple[OriginConfig, ...] = ()
    balance: Balance = "round_robin"
    health: Health | None = None
    ejection: Ejection = Ejection()

    def check_path(self) -> Findings:
        """The path is the beginning of one."""
        if not self.path.startswith("/") or len(self.path) > 1000:
            yield ("path",), f'expected the beginning of a path, such as "/ws/", got {quoted(self.path)}'

    def check_origins(self) -> Findings:
        """There are origins, and not only backups."""
        return check_pool(self.origins)

    def check_addresses(self) -> Findings:
        """Each address is listed once."""
        return check_duplicates(self.origins)
