"""Sites built from a configuration: their certificates, their origins, and what they change in a request."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tlstunnel.certificates import clients, describe, pairs
from tlstunnel.certificates.clients import ClientFiles
from tlstunnel.certificates.pairs import PairFiles
from tlstunnel.certificates.store import Certificates, ServerCredentials
from tlstunnel.config import RouteConfig, SiteConfig
from tlstunnel.config.document import KeyPath
from tlstunnel.config.problems import Problems
from tlstunnel.errors import CertificateError
from tlstunnel.handshake.forwarding import SPOOFABLE_FIELDS
from tlstunnel.origins.pool import Pool
from tlstunnel.origins.tls import Contexts, OriginTLS
from tlstunnel.sockets.proxy_protocol import write_local
from tlstunnel.state.counting import Counting
from tlstunnel.tunnel.sites import NO_EDITS_OF_SITE, Site, SiteEdits, Sites

if TYPE_CHECKING:  # it brings a library that sites without a worker do without
    from tlstunnel.edge.workers import Workers


def build_sites(  # noqa: PLR0913 - what sites are built from
    configured: Sequence[SiteConfig],
    test_pair: tuple[Path, Path] | None = None,
    before: Sites | None = None,
    *,
    resolve_every: float = 30.0,
    workers: "Workers | None" = None,
    counting: Counting | None = None,
    health_path: str | None = None,
) -> Sites:
    """Build the sites of a configuration. `test_pair` (certificate, key) is for sites without a certificate.

    `workers` are those of the same configuration, None if no site has one. `counting` counts the tunnels of origins.
    `health_path` is for the sites without one of their own.

    Files that have not changed since they were read for `before` are not read again. A certificate of `before` whose
    files are no longer good stays in service, and `certificates.complaints` says so. Takes 0.2 ms a site, in any
    thread. Raises InvalidConfiguration with every problem of every site.
    """
    return _Builder(test_pair, before, resolve_every, workers, counting, health_path).build(configured)


class _Builder:
    """Builds sites and collects their problems."""

    def __init__(  # noqa: PLR0913, PLR0917 - what sites are built from
        self,
        test_pair: tuple[Path, Path] | None,
        before: Sites | None,
        resolve_every: float,
        workers: "Workers | None",
        counting: Counting | None,
        health_path: str | None,
    ) -> None:
        self._health_path = health_path
        self._test_pair = test_pair
        self._before = before.certificates if before is not None else None
        self._resolve_every = resolve_every
        self._workers = workers
        self._counting = counting
        self._certificates = Certificates(self._before.contexts if self._before is not None else None)
        self._contexts = Contexts()
        self._problems = Problems()
        # Thousands of sites may share a pair that cannot be read.
        self._broken: dict[PairFiles | ClientFiles, Sequence[tuple[str, str]]] = {}

    def build(self, configured: Sequence[SiteConfig]) -> Sites:
        """Build them all. Raises InvalidConfiguration."""
        sites = []
        default = None
        for index, config in enumerate(configured):
            site = self._build_site(config, ("sites", index))
            if site is None:
                continue
            sites.append(site)
            if config.default:
                default = site
        self._problems.raise_found()
        return Sites(sites, default, self._certificates)

    def _build_site(self, config: SiteConfig, path: KeyPath) -> Site | None:
        served = self._read_certificates(config, path)
        tls, tls_built = self._build_origin_tls(config, path)
        if served is None or not tls_built:
            return None
        version = config.send_proxy_protocol
        preface = b"" if version == "off" else write_local(version)
        name = config.names[0]
        pool = self._build_pool(config, (name,), preface, tls)
        routes = tuple(
            (route.path, self._build_pool(route, (name, route.path), preface, tls)) for route in config.routes
        )
        pools = (pool, *(one for _, one in routes))
        workers = self._workers
        return Site(
            frozenset(config.names),
            config.names[0],
            served,
            pool,
            routes,
            passes=config.http == "pass",
            edits=build_edits(config),
            max_age=config.max_age,
            max_age_jitter=config.max_age_jitter,
            edge=workers.build_edge(config, pools, self._resolve_every, preface, tls) if workers is not None else None,
            health_path=(config.health_path or self._health_path or "").encode("ascii"),
        )

    def _read_certificates(self, config: SiteConfig, path: KeyPath) -> ServerCredentials | None:
        """Read the site's certificates and client policy; None if there is a problem, which is collected."""
        files = self._list_pairs(config, path)
        clients = _make_client_files(config)
        before = len(self._problems.found)
        for place, pair in files:
            self._read_pair(pair, place)
        if clients is not None:
            self._read_clients(clients, path)
        if not files or len(self._problems.found) > before:
            return None
        try:
            return self._certificates.serve(tuple(pair for _, pair in files), clients, self._before)
        except CertificateError as error:
            self._problems.add(str(error), *path)
            return None

    def _list_pairs(self, config: SiteConfig, path: KeyPath) -> list[tuple[KeyPath, PairFiles]]:
        """Return each pair of the site, and the path of its table."""
        tables = list(config.pairs)
        own = len(tables) - len(config.certificates)
        places = [path] * own + [(*path, "certificates", index) for index in range(len(config.certificates))]
        if tables:
            return [
                (place, PairFiles(table.cert, table.key, table.passphrase_file, table.passphrase_env))
                for place, table in zip(places, tables, strict=True)
            ]
        if self._test_pair is None:
            reason = f"the site {config.names[0]} has no certificate; add one with cert = and key ="
            self._problems.add(reason, *path)
            return []
        return [(path, PairFiles(*self._test_pair))]

    def _read_pair(self, files: PairFiles, path: KeyPath) -> None:
        if files not in self._broken:
            try:
                self._certificates.read_pair(files, self._before)
            except CertificateError as error:
                self._broken[files] = pairs.find_problems(files) or [("cert", str(error))]
            else:
                return
        for key, reason in self._broken[files]:
            self._problems.add(reason, *path, key)

    def _read_clients(self, files: ClientFiles, path: KeyPath) -> None:
        if files not in self._broken:
            try:
                self._certificates.read_clients(files, self._before)
            except CertificateError as error:
                self._broken[files] = clients.find_problems(files) or [("client_ca", str(error))]
            else:
                return
        for key, reason in self._broken[files]:
            self._problems.add(reason, *path, key)

    def _build_origin_tls(self, config: SiteConfig, path: KeyPath) -> tuple[OriginTLS | None, bool]:
        """Return how to speak TLS with the site's origins, None if none of them can use it; and whether that worked."""
        tables = (config.origins, *(route.origins for route in config.routes))
        if not config.worker_origins and not any(origin.address.tls for origins in tables for origin in origins):
            return None, True
        ca, cert, key, verify = config.origin_ca, config.origin_cert, config.origin_key, config.origin_verify == "on"
        try:
            context = self._contexts.get(ca=ca, cert=cert, key=key, verify=verify)
        except CertificateError as error:
            together = "origin_key" if str(error).startswith(f"{key}: ") else "origin_cert" if cert else "origin_ca"
            found = _find_origin_problems(ca, cert, key) or [(together, str(error))]
            for name, reason in found:
                self._problems.add(reason, *path, name)
            return None, False
        return OriginTLS(context, config.origin_name), True

    def _build_pool(
        self, table: SiteConfig | RouteConfig, scope: Sequence[str], preface: bytes, tls: OriginTLS | None
    ) -> Pool:
        return build_pool(table, self._resolve_every, preface, tls, self._counting, scope)


def build_pool(  # noqa: PLR0913, PLR0917 - what a pool is built from
    table: SiteConfig | RouteConfig,
    resolve_every: float,
    preface: bytes,
    tls: OriginTLS | None,
    counting: Counting | None = None,
    scope: Sequence[str] = (),
) -> Pool:
    """Build the pool of a site's or a route's origins. See `Pool`."""
    return Pool(
        table.origins,
        balance=table.balance,
        ejection=table.ejection,
        health=table.health,
        resolve_every=resolve_every,
        preface=preface,
        tls=tls,
        counting=counting,
        scope=scope,
    )


def build_edits(site: SiteConfig) -> SiteEdits:
    """Return what a site changes in the head of each request."""
    made = SiteEdits(
        site.origin_host,
        tuple((name.encode("ascii"), value.encode("ascii")) for name, value in site.set_headers.items()),
        frozenset(name.lower().encode("ascii") for name in site.remove_headers)
        | (SPOOFABLE_FIELDS if site.remove_spoofable_headers else frozenset()),
        site.send_proxy_protocol,
        site.client_subject_header.encode("ascii") if site.client_ca is not None else b"",
    )
    return NO_EDITS_OF_SITE if made == NO_EDITS_OF_SITE else made


def _make_client_files(site: SiteConfig) -> ClientFiles | None:
    if site.client_ca is None:
        return None
    return ClientFiles(
        ca=site.client_ca, crl=site.client_crl, required=site.client_auth == "require", allow=site.client_allow
    )


def _find_origin_problems(ca: Path | None, cert: Path | None, key: Path | None) -> list[tuple[str, str]]:
    """Return the files that cannot be read, each with its key; none if the files do not go together."""
    found = []
    for name, path, read in (
        ("origin_ca", ca, describe.read_certificates),
        ("origin_cert", cert, describe.read_certificates),
        ("origin_key", key, describe.read_key),
    ):
        if path is None:
            continue
        try:
            read(path)
        except CertificateError as error:
            found.append((name, str(error)))
    return found
