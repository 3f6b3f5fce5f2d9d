"""The commands about sites, their origins and their certificates.

Tested by tests/unit/test_commands.py.
"""

from typing import ClassVar, Literal

import msgspec

from tlstunnel.commands.command import Command

MOST_LISTED = 1_000
"""Sites, origins or certificates in one result."""


class SiteStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A site. `tunnels` are open now; what follows counts since the start, over all processes.

    `refused` has the connections that ended without a tunnel, by kind (`tlstunnel.metrics.usage`). `shown` is the name
    that people read, which differs from the first of `names` if that is international. `ejected` of its `origins` are
    not used at the moment, and `certificate_days` are left until the first of its certificates ends. A site that was
    `removed` from the configuration is listed as long as it has tunnels.
    """

    names: list[str]
    shown: str = ""
    tunnels: int = 0
    handshakes: int = 0
    refused: dict[str, int] = {}
    bytes_up: int = 0
    bytes_down: int = 0
    origins: int = 0
    ejected: int = 0
    plan: str = ""
    guideline: int | None = None
    throttled: bool = False
    worker: str = ""
    http: str = ""
    certificate_days: float | None = None
    removed: bool = False


class SitesResult(msgspec.Struct, frozen=True, kw_only=True):
    """The sites, by name; `total` match. `since` is when counting began."""

    now: float
    since: float
    total: int
    sites: list[SiteStatus] = []


class Sites(Command[SitesResult], frozen=True, kw_only=True):
    """Report the sites, or the one that has the name `site`. `search` is a part of a name.

    `sites` are the first names of some: a serving process reports what it knows of these.
    """

    name: ClassVar[str] = "sites"
    result: ClassVar[type[msgspec.Struct]] = SitesResult

    site: str = ""
    search: str = ""
    sort: Literal["name", "tunnels", "handshakes", "refused", "bytes"] = "name"
    limit: int = MOST_LISTED
    offset: int = 0
    sites: tuple[str, ...] = ()


class OriginStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An origin of a site, or of the route with that `route` prefix. `tunnels` are open, over all processes.

    `state` is "trial" while one request at a time tries an origin that was ejected, and "down" if its health check
    fails, or if it is the only one and cannot be reached. The name of one that is "unresolved" has no address yet: it
    was not needed, or that failed. `until` is when its ejection ends. `checked` means that it has a health check.
    `connects` and `failures` count since the start; `connected_at` is when it was connected to last, `problem` is the
    last failure, and `problem_at` when that was. `resolved` are its addresses.
    """

    site: str
    route: str = ""
    address: str
    backup: bool = False
    weight: int = 1
    state: Literal["healthy", "ejected", "trial", "down", "unresolved"] = "healthy"
    checked: bool = False
    until: float | None = None
    tunnels: int = 0
    max_tunnels: int | None = None
    connects: int = 0
    failures: int = 0
    connected_at: float | None = None
    problem: str = ""
    problem_at: float | None = None
    resolved: list[str] = []


class OriginsResult(msgspec.Struct, frozen=True, kw_only=True):
    """The origins, by site, route and address; `total` match."""

    now: float
    total: int = 0
    origins: list[OriginStatus] = []
    silent: list[int] = []


class Origins(Command[OriginsResult], frozen=True, kw_only=True):
    """Report the origins: all, or those of a site; with `unhealthy`, only those that have a problem.

    `sites` are the first names of some: a serving process reports the origins of these.
    """

    name: ClassVar[str] = "origins"
    result: ClassVar[type[msgspec.Struct]] = OriginsResult

    site: str = ""
    unhealthy: bool = False
    limit: int = MOST_LISTED
    offset: int = 0
    sites: tuple[str, ...] = ()


class CertificateStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate that is served. `days` are left, negative after its end. `problem` is what is wrong, or "".

    `more_sites` have it besides `sites`.
    """

    sites: list[str]
    more_sites: int = 0
    names: list[str]
    file: str
    issuer: str
    subject: str
    serial: str
    key: str
    not_before: float
    not_after: float
    days: float
    problem: str = ""


class CertificatesResult(msgspec.Struct, frozen=True, kw_only=True):
    """The certificates, those that expire first at the top; `total` match."""

    now: float
    total: int = 0
    certificates: list[CertificateStatus] = []


class Certificates(Command[CertificatesResult], frozen=True, kw_only=True):
    """Report the certificates: all, or those of a site."""

    name: ClassVar[str] = "certificates"
    result: ClassVar[type[msgspec.Struct]] = CertificatesResult

    site: str = ""
    limit: int = MOST_LISTED
    offset: int = 0
