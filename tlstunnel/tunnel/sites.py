"""Sites as they are served: which one a client asks for, with which certificate, and its origins."""

import math
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tlstunnel.certificates.store import Certificates, ServerCredentials
from tlstunnel.firewall.facts import normalise_path
from tlstunnel.handshake.forwarding import NO_EDITS, Edits
from tlstunnel.handshake.refusal import Fields
from tlstunnel.handshake.request import Request
from tlstunnel.origins.pool import Pool

if TYPE_CHECKING:  # it brings a library that sites without a worker do without
    from tlstunnel.edge.stage import Edge


@dataclass(frozen=True, slots=True)
class SiteEdits:
    """How a site changes the head for an origin, and which PROXY header is sent before it."""

    host: str = "keep"
    added: Fields = ()
    removed: frozenset[bytes] = frozenset()
    proxy_header: str = "off"
    subject_header: bytes = b""

    def of(self, origin: str, subject: str) -> Edits:
        """Return the edits for `origin`, as it is configured, and a client whose certificate has this `subject`."""
        if self is NO_EDITS_OF_SITE:
            return NO_EDITS
        origin = origin.removeprefix("wss://")
        host = None if self.host == "keep" else (origin if self.host == "origin" else self.host).encode("ascii")
        if origin.startswith("unix:") and self.host == "origin":
            host = b"localhost"
        if not self.subject_header:
            return Edits(host, self.added, self.removed)
        # Removed also without a subject: no client may claim one.
        own = ((self.subject_header, subject.encode("ascii")),) if subject else ()
        return Edits(host, (*self.added, *own), self.removed | {self.subject_header.lower()})


NO_EDITS_OF_SITE = SiteEdits()


@dataclass(frozen=True, slots=True)
class Site:
    """A set of names with one certificate and its origins. `name`, the first of them, is in the record.

    `pool` are the origins of requests that match none of `routes` (the beginning of a path, and its origins). `edits`
    apply to the heads for origins, and `edge` is called before an origin is chosen. A tunnel lives for `max_age`
    seconds at most, and up to `max_age_jitter` longer. With `passes`, requests without an upgrade are passed on too.
    The tunnel itself answers load balancers that ask for `health_path`, unless it is empty.
    """

    names: frozenset[str]
    name: str
    served: ServerCredentials
    pool: Pool
    routes: tuple[tuple[str, Pool], ...] = ()
    passes: bool = False
    edits: SiteEdits = NO_EDITS_OF_SITE
    max_age: float | None = None
    max_age_jitter: float = 0.0
    edge: "Edge | None" = None
    health_path: bytes = b""

    @property
    def pools(self) -> Iterator[tuple[str, Pool]]:
        """Its pools, by the path of their route; "" for the site's own."""
        yield "", self.pool
        yield from self.routes

    @property
    def context(self) -> ssl.SSLContext:
        """The context for a TLS handshake that begins now: a microsecond, or a millisecond if it has to be made.

        Raises CertificateError if it cannot be made, for lack of resources: the files were read long ago.
        """
        return self.served.context()

    def check_client(self, certificate: bytes | None) -> str:
        """Return the subject (RFC 4514, visible ASCII) of the client's certificate (DER); "" without one.

        Raises ClientRefused, whose text is for the client too. A resumed session is checked in the same way.
        """
        return self.served.check_client(certificate)

    def pool_of(self, request: Request) -> Pool:
        """Return the origins for a request, by its path as rules see it."""
        if self.routes:
            path = normalise_path(request.target.partition(b"?")[0])
            for beginning, pool in self.routes:
                if path.startswith(beginning):
                    return pool
        return self.pool


class Sites:
    """All sites, by the names that clients ask for in their hello. `certificates` are what they are served with."""

    def __init__(self, sites: Sequence[Site], default: Site | None, certificates: Certificates | None = None) -> None:
        self.certificates = certificates if certificates is not None else Certificates()
        self._by_name = {name: site for site in sites for name in site.names}
        self._default = default
        self._sites = sites

    @property
    def pools(self) -> Iterator[tuple[tuple[str, str], Pool]]:
        """Every pool, by its site's first name and its route's path, "" where it has none."""
        for site in self._sites:
            for path, pool in site.pools:
                yield (site.name, path), pool

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def start(self) -> None:
        """Start the health checks."""
        for _, pool in self.pools:
            pool.start()

    def adopt(self, old: "Sites") -> None:
        """Take over the state of the origins that `old` has too."""
        before = dict(old.pools)
        for key, pool in self.pools:
            if (known := before.get(key)) is not None:
                pool.adopt(known)

    async def close(self) -> None:
        """Stop the health checks."""
        for _, pool in self.pools:
            await pool.close()
        for site in self._sites:
            if site.edge is not None:
                await site.edge.close()

    @property
    def shortest_wait(self) -> float:
        """The shortest timeout of the sites' workers, in seconds; infinite without any."""
        return min((site.edge.timeout for site in self._sites if site.edge is not None), default=math.inf)

    def find(self, name: str) -> Site | None:
        """Return the site that has exactly this name."""
        return self._by_name.get(name)

    def __contains__(self, name: str) -> bool:
        """Return whether a site has exactly this name."""
        return name in self._by_name

    def choose(self, server_name: str | None) -> Site | None:
        """The site of `server_name`: exact before wildcard before ``*``; without one (no SNI), the default site."""
        if server_name is None:
            return self._default or self._by_name.get("*")
        if site := self._by_name.get(server_name):
            return site
        _, *others = candidates(server_name)
        return next((site for name in others if (site := self._by_name.get(name))), None)


def candidates(host: str) -> tuple[str, str, str]:
    """The names that can stand for `host`, the closest first. A wildcard covers one label (RFC 9525 section 6.3)."""
    _, _, parent = host.partition(".")
    return host, f"*.{parent}", "*"
