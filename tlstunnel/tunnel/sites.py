"""Sites as they are served: which one a client means, with which certificate, and where it leads."""

import math
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tlstunnel.certificates.clients import ClientFiles
from tlstunnel.certificates.pairs import PairFiles
from tlstunnel.certificates.store import Certificates, Served
from tlstunnel.config import RouteConfig, SiteConfig
from tlstunnel.errors import CertificateError
from tlstunnel.firewall.facts import normal_path
from tlstunnel.handshake.forwarding import NO_EDITS, Edits
from tlstunnel.handshake.refusal import Fields
from tlstunnel.handshake.request import Request
from tlstunnel.origins.pool import Pool
from tlstunnel.origins.tls import Contexts, OriginTLS
from tlstunnel.sockets.proxy_protocol import write_local

if TYPE_CHECKING:  # it brings a library that sites without a worker do without
    from tlstunnel.edge.stage import Edge
    from tlstunnel.edge.workers import Workers


@dataclass(frozen=True, slots=True)
class SiteEdits:
    """What a site changes of the head for an origin, and which PROXY header goes before it."""

    host: str = "keep"
    added: Fields = ()
    removed: frozenset[bytes] = frozenset()
    proxy_header: str = "off"
    subject_header: bytes = b""

    def of(self, origin: str, subject: str) -> Edits:
        """The edits of a head for `origin`, as it is written, from a client whose certificate has this `subject`."""
        if self is _NONE:
            return NO_EDITS
        origin = origin.removeprefix("wss://")
        host = None if self.host == "keep" else (origin if self.host == "origin" else self.host).encode("ascii")
        if origin.startswith("unix:") and self.host == "origin":
            host = b"localhost"
        if not self.subject_header:
            return Edits(host, self.added, self.removed)
        # Removed where there is none: no client may claim one.
        own = ((self.subject_header, subject.encode("ascii")),) if subject else ()
        return Edits(host, (*self.added, *own), self.removed | {self.subject_header.lower()})


_NONE = SiteEdits()


@dataclass(frozen=True, slots=True)
class Site:
    """A set of names with one certificate and its origins. `name`, the first of them, is what the record says.

    `pool` are the origins of requests that none of `routes` (the beginning of a path, and its origins) takes.
    `edits` is what origins are told beside the client's own, `edge` who is asked before them. A tunnel lives for
    `max_age` seconds and a part of `max_age_jitter` at most. `passes` says that requests which ask for no upgrade go
    to the origin too.
    """

    names: frozenset[str]
    name: str
    served: Served
    pool: Pool
    routes: tuple[tuple[str, Pool], ...] = ()
    passes: bool = False
    edits: SiteEdits = _NONE
    max_age: float | None = None
    max_age_jitter: float = 0.0
    edge: "Edge | None" = None

    @property
    def context(self) -> ssl.SSLContext:
        """The context for a TLS handshake that begins now: a microsecond, or one thousand where it has to be made.

        Raises CertificateError when it cannot be made, for want of means: the files were read long ago.
        """
        return self.served.context()

    def client_subject(self, tls: ssl.SSLSocket) -> str:
        """Give the subject (RFC 4514, visible ASCII) of the client at `tls`, TLS handshake done; "" without one.

        Raises ClientRefused, whose text is for the client too. Of a resumed session it asks no less.
        """
        return self.served.client_subject(tls)

    def pool_of(self, request: Request) -> Pool:
        """The origins that a request is for, by its path as rules see it."""
        if self.routes:
            path = normal_path(request.target.partition(b"?")[0])
            for beginning, pool in self.routes:
                if path.startswith(beginning):
                    return pool
        return self.pool


class Sites:
    """All sites, asked by the name that the client's hello gives. `certificates` is what they are served with."""

    def __init__(self, sites: Sequence[Site], default: Site | None, certificates: Certificates | None = None) -> None:
        self.certificates = certificates if certificates is not None else Certificates()
        self._by_name = {name: site for site in sites for name in site.names}
        self._default = default
        self._sites = sites

    @property
    def pools(self) -> Iterator[tuple[tuple[str, str], Pool]]:
        """Every pool, by its site's first name and its route's path, "" where it has none."""
        for site in self._sites:
            yield (site.name, ""), site.pool
            for path, pool in site.routes:
                yield (site.name, path), pool

    def start(self) -> None:
        """Begin the health checks."""
        for _, pool in self.pools:
            pool.start()

    def adopt(self, old: "Sites") -> None:
        """Go on with what `old` knows of the same origins."""
        before = dict(old.pools)
        for key, pool in self.pools:
            if (known := before.get(key)) is not None:
                pool.adopt(known)

    async def close(self) -> None:
        """End the health checks."""
        for _, pool in self.pools:
            await pool.close()
        for site in self._sites:
            if site.edge is not None:
                await site.edge.close()

    @property
    def shortest_wait(self) -> float:
        """The shortest time, in seconds, that a worker of a site has; infinite where there is none."""
        return min((site.edge.timeout for site in self._sites if site.edge is not None), default=math.inf)

    def __contains__(self, name: str) -> bool:
        """Whether a site has this very name."""
        return name in self._by_name

    def choose(self, server_name: str | None) -> Site | None:
        """The site of `server_name`: exact before wildcard before ``*``; without one (no SNI), the default site."""
        if server_name is None:
            return self._default or self._by_name.get("*")
        for name in candidates(server_name):
            if site := self._by_name.get(name):
                return site
        return None


def candidates(host: str) -> tuple[str, str, str]:
    """The names that can stand for `host`, the closest first. A wildcard covers one label (RFC 9525 section 6.3)."""
    _, _, parent = host.partition(".")
    return host, f"*.{parent}", "*"


def load_sites(
    configured: Sequence[SiteConfig],
    test_pair: tuple[Path, Path] | None = None,
    before: Sites | None = None,
    *,
    resolve_every: float = 30.0,
    workers: "Workers | None" = None,
) -> Sites:
    """Make the sites of a configuration, `test_pair` (certificate, key) serving those without a certificate.

    `workers` are those of the same configuration, None where no site has one.

    What `before` has read of files that are still the same is not read again, and what it serves goes on when its
    files are no good any more: `certificates.complaints` then says so. Takes 0.2 ms a site; may run in any thread.
    Raises CertificateError, also where a site has neither certificate nor `test_pair`.
    """
    certificates = Certificates(before.certificates.contexts if before is not None else None)
    contexts = Contexts()
    sites = []
    default = None
    for site in configured:
        served = certificates.serve(
            _pair_files(site, test_pair), _client_files(site), before.certificates if before is not None else None
        )
        tls = _origin_tls(site, contexts)
        version = site.send_proxy_protocol
        preface = b"" if version == "off" else write_local(version)
        pool = _pool(site, resolve_every, preface, tls)
        routes = tuple((route.path, _pool(route, resolve_every, preface, tls)) for route in site.routes)
        pools = (pool, *(one for _, one in routes))
        made = Site(
            frozenset(site.names),
            site.names[0],
            served,
            pool,
            routes,
            passes=site.http == "pass",
            edits=edits_of(site),
            max_age=site.max_age,
            max_age_jitter=site.max_age_jitter,
            edge=workers.edge(site, pools, resolve_every, preface, tls) if workers is not None else None,
        )
        sites.append(made)
        if site.default:
            default = made
    return Sites(sites, default, certificates)


def _pair_files(site: SiteConfig, test_pair: tuple[Path, Path] | None) -> tuple[PairFiles, ...]:
    if several := site.pairs:
        return tuple(PairFiles(pair.cert, pair.key, pair.passphrase_file, pair.passphrase_env) for pair in several)
    if test_pair is None:
        raise CertificateError(f"the site {site.names[0]} has no certificate; give it one with cert = and key =")
    return (PairFiles(*test_pair),)


def _client_files(site: SiteConfig) -> ClientFiles | None:
    if site.client_ca is None:
        return None
    return ClientFiles(
        ca=site.client_ca, crl=site.client_crl, required=site.client_auth == "require", allow=site.client_allow
    )


def edits_of(site: SiteConfig) -> SiteEdits:
    """What a site changes of each head."""
    made = SiteEdits(
        site.origin_host,
        tuple((name.encode("ascii"), value.encode("ascii")) for name, value in site.set_headers.items()),
        frozenset(name.lower().encode("ascii") for name in site.remove_headers),
        site.send_proxy_protocol,
        site.client_subject_header.encode("ascii") if site.client_ca is not None else b"",
    )
    return _NONE if made == _NONE else made


def _origin_tls(site: SiteConfig, contexts: Contexts) -> OriginTLS | None:
    """How the site's ``wss://`` origins are spoken to; None where there can be none. Raises CertificateError."""
    pools = (site.origins, *(route.origins for route in site.routes))
    if not site.worker_origins and not any(origin.address.tls for origins in pools for origin in origins):
        return None
    context = contexts.get(
        ca=site.origin_ca, cert=site.origin_cert, key=site.origin_key, verify=site.origin_verify == "on"
    )
    return OriginTLS(context, site.origin_name)


def _pool(table: SiteConfig | RouteConfig, resolve_every: float, preface: bytes, tls: OriginTLS | None) -> Pool:
    return Pool(
        table.origins,
        balance=table.balance,
        ejection=table.ejection,
        health=table.health,
        resolve_every=resolve_every,
        preface=preface,
        tls=tls,
    )
