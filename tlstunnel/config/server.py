"""The top of the file: where to listen, and what all sites share.

Tested by tests/unit/test_config.py.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal

from tlstunnel.addresses import ListenAddress, Networks
from tlstunnel.config.admin import Admin
from tlstunnel.config.document import KeyPath
from tlstunnel.config.durations import Duration, OffOr, Timeout
from tlstunnel.config.firewall import (
    AddressEntry,
    Lists,
    ManagedRules,
    Mode,
    RateLimitConfig,
    RuleConfig,
    check_names,
    find_unknown_lists,
)
from tlstunnel.config.kinds import UNREADABLE, Array, Integer, Kind, Reading, Schema, Text
from tlstunnel.config.log import Log
from tlstunnel.config.origins import HealthPath
from tlstunnel.config.plans import BUILT_IN, Plans, describe_unknown
from tlstunnel.config.site import SiteConfig
from tlstunnel.config.state import State
from tlstunnel.config.tables import Findings, Table, UnreadableError
from tlstunnel.config.urls import WebURL
from tlstunnel.config.usage import Usage


class _NetworksKind(Kind):
    def __init__(self) -> None:
        self._array = Array(Text(lambda text: Networks.parse([text]), "10.0.0.0/8"))

    def read(self, value: object, path: KeyPath, reading: Reading) -> Any:
        networks = self._array.read(value, path, reading)
        return UNREADABLE if networks is UNREADABLE else Networks(chain.from_iterable(networks))

    def schema(self) -> Schema:
        return self._array.schema()

    def render(self, value: Any) -> Any:
        return [str(network) for network in value]


Listen = Annotated[ListenAddress, Text(ListenAddress.parse, "127.0.0.1:8443")]


class Timeouts(Table, frozen=True):
    """How long each step of a connection may take. ``idle`` is None when it is off."""

    renamed: ClassVar[Mapping[str, str]] = {"origin_answer": "origin_response"}

    tls_handshake: Timeout = Timeout(10)
    request: Timeout = Timeout(10)
    origin_connect: Timeout = Timeout(5)
    origin_response: Timeout = Timeout(30)
    idle: OffOr[Timeout] = None
    close: Timeout = Timeout(30)
    acknowledge: Timeout = Timeout(120)

    @property
    def shortest(self) -> float:
        """The shortest of those that are on, seconds."""
        values = (getattr(self, name) for name in self.__struct_fields__)
        return float(min(value for value in values if value is not None))


class Limits(Table, frozen=True):
    """How much of the resources of a process clients may take."""

    unfinished_handshakes: Annotated[int, Integer(10, 1_000_000)] = 4096


class Release(Table, frozen=True):
    """How tunnels are drained when a process has to end, and how an upgrade is tried."""

    renamed: ClassVar[Mapping[str, str]] = {"linger": "drain_after"}

    drain_after: OffOr[Timeout] = Timeout(86_400)
    drain_wait: Duration = Duration(0)
    drain_over: Duration = Duration(60)
    upgrade_timeout: Timeout = Timeout(30)


class Config(Table, frozen=True):
    """The whole file."""

    renamed: ClassVar[Mapping[str, str]] = {"origin_resolve": "resolve_interval", "end_removed": "drain_removed"}

    listen: tuple[Listen, ...] = ()
    processes: Annotated[int, Integer(1, 256)] | Literal["auto"] = 1
    trusted_proxies: Annotated[Networks, _NetworksKind()] = Networks()
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    release: Release = Release()
    log: Log = Log()
    admin: Admin | None = None
    state: State = State()
    plans: Plans = Plans(BUILT_IN)
    usage: Usage = Usage()
    lists: Lists = Lists()
    allow_addresses: tuple[AddressEntry, ...] = ()
    block_addresses: tuple[AddressEntry, ...] = ()
    addresses_mode: Mode = "block"
    rules: tuple[RuleConfig, ...] = ()
    rate_limits: tuple[RateLimitConfig, ...] = ()
    managed_rules: ManagedRules = ManagedRules()
    proxy_protocol: Literal["off", "required"] = "off"
    proxy_protocol_listen: tuple[Listen, ...] = ()
    resolve_interval: Timeout = Timeout(30)
    drain_removed: bool = False
    health_path: HealthPath | None = None
    health_addresses: Annotated[Networks, _NetworksKind()] = Networks()
    sites: tuple[SiteConfig, ...] = ()

    def check_listen(self) -> Findings:
        """Each address is listed once."""
        for index, address in enumerate(self.listen):
            if address in self.listen[:index]:
                yield ("listen", index), f"{address} is listed twice"

    def check_proxy_protocol_listen(self) -> Findings:
        """The addresses are listened on, and the protocol is on."""
        for index, address in enumerate(self.proxy_protocol_listen):
            if address not in self.listen:
                yield ("proxy_protocol_listen", index), f"{address} is not in listen"
        if self.proxy_protocol_listen and self.proxy_protocol == "off":
            yield ("proxy_protocol_listen",), 'requires proxy_protocol = "required"'

    def check_proxy_protocol(self) -> Findings:
        """Someone may send the header."""
        if self.proxy_protocol == "required" and not self.trusted_proxies:
            reason = "every connection would be refused: list the proxies that send the header in trusted_proxies"
            yield ("proxy_protocol",), reason

    def check_health_path(self) -> Findings:
        """Someone may ask for it."""
        if self.health_addresses or self.trusted_proxies:
            return
        reason = "no one may ask for it: list the load balancers in health_addresses, or in trusted_proxies"
        if self.health_path is not None:
            yield ("health_path",), reason
        for number, path in _read_all("health_path", self.sites):
            if path is not None:
                yield ("sites", number, "health_path"), reason

    def check_health_addresses(self) -> Findings:
        """There is something to ask for."""
        if not self.health_addresses or self.health_path is not None:
            return
        if all(path is None for _, path in _read_all("health_path", self.sites)):
            yield ("health_addresses",), 'requires health_path, such as health_path = "/.tlstunnel/ready"'

    def check_rule_names(self) -> Findings:
        """The names of rules are unique."""
        return check_names("rules", self.rules)

    def check_rate_limit_names(self) -> Findings:
        """The names of rate limits are unique."""
        return check_names("rate_limits", self.rate_limits)

    def check_list_names(self) -> Findings:
        """Entries ``@NAME`` refer to lists that exist."""
        lists = self.lists
        for path, table in ((), self), *((("sites", index), site) for index, site in enumerate(self.sites)):
            for key in ("allow_addresses", "block_addresses"):
                with suppress(UnreadableError):
                    for inside, reason in find_unknown_lists(getattr(table, key), lists):
                        yield (*path, key, *inside), reason

    def check_names(self) -> Findings:
        """Each name belongs to one site."""
        owners: dict[str, int] = {}
        for number, names in _read_all("names", self.sites):
            for index, name in enumerate(names):
                if name in owners:
                    hint = ", like every site without names" if name == "*" else ""
                    yield (
                        ("sites", number, "names", index),
                        f'sites[{owners[name]}] already has the name "{name}"{hint}',
                    )
                owners[name] = number

    def check_plans(self) -> Findings:
        """The plans of sites are there."""
        for number, plan in _read_all("plan", self.sites):
            if plan is not None and plan not in self.plans:
                yield ("sites", number, "plan"), describe_unknown(plan, self.plans)

    def check_contacts(self) -> Findings:
        """What is posted to a contact is signed."""
        if self.usage.notices.secret_file is None:
            for number, contact in _read_all("contact", self.sites):
                if isinstance(contact, WebURL):
                    yield (
                        ("sites", number, "contact"),
                        "requires usage.notices.secret_file, with which notices are signed",
                    )

    def check_default(self) -> Findings:
        """One site at most is the default."""
        defaults = [number for number, default in _read_all("default", self.sites) if default]
        for number in defaults[1:]:
            yield ("sites", number, "default"), f"sites[{defaults[0]}] is the default already; there can be only one"


def _read_all(key: str, sites: tuple[SiteConfig, ...]) -> Iterator[tuple[int, Any]]:
    """Yield the number of each site with its value of a key, where that can be read."""
    for number, site in enumerate(sites):
        with suppress(UnreadableError):
            yield number, getattr(site, key)
