"""Warnings about a configuration that can be served, but probably not as its author expects.

Tested by tests/unit/test_loading_corpus.py: each has a file in tests/corpus/configurations/good.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cryptography.x509 import Certificate
from cryptography.x509.oid import ExtendedKeyUsageOID

from tlstunnel.certificates import describe
from tlstunnel.certificates.pairs import Pair
from tlstunnel.config import Config, SiteConfig
from tlstunnel.config.document import KeyPath
from tlstunnel.config.together import list_pools_of
from tlstunnel.errors import CertificateError
from tlstunnel.journal.events import Event
from tlstunnel.tunnel.sites import Sites

SHOWN = 3
"""How many of several names a warning shows."""

_OPEN = (
    "without web_origins any web page may connect, with the cookies of its visitor;"
    ' write web_origins = ["same"], or the origins of your pages'
)
_NOT_VERIFIED = (
    'origin_verify = "off": an attacker between here and the origins can read and change everything; use origin_ca'
)
_SPREAD = (
    'http = "pass" with several origins: requests of one client go to different origins, where the polling of Socket.IO'
    ' and sessions in memory fail; write balance = "hash:ip" or "hash:cookie:NAME", unless every origin can serve every'
    " request"
)
_CLIENT_ADVICE = "public authorities no longer issue certificates for clients, so use an authority of your own"


@dataclass(frozen=True, slots=True)
class LoadWarning:
    """Something that works but should be changed: its kind, the key, the site's first name, and what to do.

    `site` is empty for what concerns all sites.
    """

    kind: Event
    path: KeyPath
    site: str
    hint: str


def find_warnings(config: Config, sites: Sites) -> Iterator[LoadWarning]:
    """Find what should be changed in `config`. `sites` were built from its sites, in the same order."""
    read = lru_cache(maxsize=None)(_read)  # thousands of sites may name the same file
    for index, (site, served) in enumerate(zip(config.sites, sites, strict=True)):
        path: KeyPath = ("sites", index)
        if site.web_origins is None:
            yield LoadWarning(Event.OPEN_TO_WEB_PAGES, path, site.names[0], _OPEN)
        if site.origin_verify == "off":
            yield LoadWarning(Event.ORIGINS_NOT_VERIFIED, path, site.names[0], _NOT_VERIFIED)
        if site.pairs:  # the test certificate is for localhost only, and its users know
            yield from _find_missing_names(path, site, served.served.pairs)
        yield from _find_other_purposes(path, site, served.served.pairs, read)
        yield from _find_spread_requests(path, site)


def _find_missing_names(path: KeyPath, site: SiteConfig, pairs: Iterable[Pair]) -> Iterator[LoadWarning]:
    for pair in pairs:
        missing = [name for name in site.names if name != "*" and not pair.covers(name)]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            hint = f"{_render_some(missing)} {verb} not in the certificate {pair.cert}: clients will refuse it"
            yield LoadWarning(Event.NAMES_NOT_IN_CERTIFICATE, (*path, "names"), site.names[0], hint)


def _find_other_purposes(
    path: KeyPath, site: SiteConfig, pairs: Iterable[Pair], read: Callable[[Path], Iterable[Certificate]]
) -> Iterator[LoadWarning]:
    kind, name = Event.CERTIFICATE_PURPOSE, site.names[0]
    for pair in pairs:
        if not pair.for_servers:
            hint = f"the extended key usage of {pair.cert} lacks serverAuth: clients will refuse it"
            yield LoadWarning(kind, path, name, hint)
    own = list(read(site.origin_cert))[:1] if site.origin_cert is not None else []
    if not all(describe.allows(cert, ExtendedKeyUsageOID.CLIENT_AUTH) for cert in own):
        hint = (
            f"the extended key usage of {site.origin_cert} lacks clientAuth: origins will refuse it; {_CLIENT_ADVICE}"
        )
        yield LoadWarning(kind, (*path, "origin_cert"), name, hint)
    authorities = read(site.client_ca) if site.client_ca is not None else ()
    # OpenSSL applies the usage of an authority to what it has issued.
    if not all(describe.allows(cert, ExtendedKeyUsageOID.CLIENT_AUTH) for cert in authorities):
        hint = (
            f"the extended key usage of an authority in {site.client_ca} lacks clientAuth: its clients are refused;"
            f" {_CLIENT_ADVICE}"
        )
        yield LoadWarning(kind, (*path, "client_ca"), name, hint)


def _read(path: Path) -> tuple[Certificate, ...]:
    try:
        return tuple(describe.read_certificates(path))
    except CertificateError:  # it could be read a moment ago
        return ()


def _find_spread_requests(path: KeyPath, site: SiteConfig) -> Iterator[LoadWarning]:
    if site.http != "pass":
        return
    for place, table in list_pools_of(path, site):
        used = [origin for origin in table.origins if not origin.backup]
        if len(used) > 1 and not table.balance.startswith("hash:"):
            yield LoadWarning(Event.REQUESTS_SPREAD, (*place, "balance"), site.names[0], _SPREAD)


def _render_some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
