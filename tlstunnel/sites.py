"""Sites as they are served: which one a client means, with which certificate, and where it leads."""

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tlstunnel.certificates.serving import server_context
from tlstunnel.config import SiteConfig
from tlstunnel.errors import CertificateError
from tlstunnel.origins.connect import Origin


@dataclass(frozen=True, slots=True)
class Site:
    """A set of names with one certificate and one origin. `name`, the first of them, is what the record says.

    `passes` says that requests which ask for no upgrade go to the origin too.
    """

    names: frozenset[str]
    name: str
    context: ssl.SSLContext
    origin: Origin
    passes: bool = False


class Sites:
    """All sites, asked by the name that the client's hello gives."""

    def __init__(self, sites: Sequence[Site], default: Site | None) -> None:
        self._by_name = {name: site for site in sites for name in site.names}
        self._names = frozenset(site.name for site in sites)
        self._default = default

    def __contains__(self, name: str) -> bool:
        """Whether there is a site whose first name this is."""
        return name in self._names

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


def load_sites(configured: Sequence[SiteConfig], test_pair: tuple[Path, Path] | None = None) -> Sites:
    """Make the sites of a configuration, `test_pair` (certificate, key) serving those without a certificate.

    Raises CertificateError, also where a site has neither.
    """
    sites = []
    default = None
    for site in configured:
        pair = (site.cert, site.key) if site.cert and site.key else test_pair
        if pair is None:
            raise CertificateError(f"the site {site.names[0]} has no certificate; give it one with cert = and key =")
        made = Site(
            frozenset(site.names), site.names[0], server_context(*pair), Origin(site.origins[0]), site.http == "pass"
        )
        sites.append(made)
        if site.default:
            default = made
    return Sites(sites, default)
